// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3), for CPU and GPU.
//
// The elements of a tensor are numbered row by row. Element e of a sample is word e % 4 of the counter
//
//     (low half of e / 4, high half of e / 4, low half of sample, high half of sample)
//
// megagpt2/kernels/philox.py is the reference: the bits are the same, everywhere.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define MEGAGPT2_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEGAGPT2_HOST_DEVICE inline
#endif

namespace megagpt2 {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;  // what the key grows by in each round

struct Key {
  uint32_t k0, k1;
};

struct Words {
  uint32_t w[4];
};

// The words of elements 4 block .. 4 block + 3 of a sample.
MEGAGPT2_HOST_DEVICE Words philox(uint64_t block, uint64_t sample, Key key) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(sample), c3 = static_cast<uint32_t>(sample >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
    c3 = static_cast<uint32_t>(p0);
    key.k0 += kPhiloxWeyl0;
    key.k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace megagpt2
