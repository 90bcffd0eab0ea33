// Dropout of a pack of elements on a GPU.
#pragma once

#include "common/cuda.cuh"
#include "dropout/dropout.h"
#include "dropout/row_dropout.h"

namespace megagpt2 {

// Bit v: whether element `first` + v of the sample stays. Where `first` is a multiple of 8 a counter serves 8 elements.
template <int V>
__device__ __forceinline__ unsigned kept_bits(uint64_t first, uint64_t sample, Key key, uint32_t threshold) {
  const int skip = static_cast<int>(first % kKeptPerCounter);
  unsigned bits = 0;
#pragma unroll
  for (int block = 0; block < (V + 2 * kKeptPerCounter - 2) / kKeptPerCounter; ++block) {  // what V elements can touch
    if (kKeptPerCounter * block >= skip + V) break;
    const Words words = philox(first / kKeptPerCounter + block, sample, key);
#pragma unroll
    for (int i = 0; i < kKeptPerCounter; ++i) {
      const uint32_t drawn = i % 2 == 0 ? words.w[i / 2] & 0xFFFFu : words.w[i / 2] >> 16;
      bits |= static_cast<unsigned>(drawn >= threshold) << (kKeptPerCounter * block + i);
    }
  }
  return bits >> skip;
}

}  // namespace megagpt2
