#include "philox/philox_cpu.h"

#include <cstring>

#include <torch/csrc/stable/library.h>

#include "common/instructions.h"

#ifdef MEGAGPT2_X86
#include <immintrin.h>
#endif

namespace megagpt2 {
namespace {

void fill_portable(void* bits, uint64_t block, int64_t blocks, uint64_t sample, Key key) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words drawn = philox(block + i, sample, key);
    std::memcpy(static_cast<char*>(bits) + i * sizeof drawn, &drawn, sizeof drawn);
  }
}

#ifdef MEGAGPT2_X86
// A counter takes a lane of 64 bits in each of four vectors, one for each of its words. Only the lower half of a
// lane is the word: the multiplication reads no more, so the upper half may hold anything, and a product serves as
// its own lower half without a mask.
//
//     p0 = c0 * M0                       c2' = (p0 >> 32) ^ c3 ^ k1        c3' = p0
//     p1 = c2 * M1                       c0' = (p1 >> 32) ^ c1 ^ k0        c1' = p1
//
// In the end the words of a counter have to lie side by side. Unpacking pairs lanes 0, 2, 4, ... of two vectors into
// one and lanes 1, 3, 5, ... into another, so with counters 0 4 1 5 2 6 3 7 in the lanes both come out in order.

MEGAGPT2_AVX512 void fill_avx512(void* bits, uint64_t block, int64_t blocks, uint64_t sample, Key key) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxMultiplier0), m1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < blocks; i += 8) {
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(block + i)), order);
    __m512i c1 = _mm512_srli_epi64(c0, 32);
    __m512i c2 = _mm512_set1_epi64(static_cast<int64_t>(sample));
    __m512i c3 = _mm512_srli_epi64(c2, 32);
    Key k = key;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
      constexpr int three_way_xor = 0x96;
      c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(k.k0), three_way_xor);
      c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(k.k1), three_way_xor);
      c1 = p1;
      c3 = p0;
      k.k0 += kPhiloxWeyl0;
      k.k1 += kPhiloxWeyl1;
    }
    constexpr __mmask16 upper_halves = 0xAAAA;
    const __m512i w01 = _mm512_mask_mov_epi32(c0, upper_halves, _mm512_slli_epi64(c1, 32));
    const __m512i w23 = _mm512_mask_mov_epi32(c2, upper_halves, _mm512_slli_epi64(c3, 32));
    auto* out = static_cast<__m512i*>(bits) + i / 4;
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(w01, w23));
    _mm512_storeu_si512(out + 1, _mm512_unpackhi_epi64(w01, w23));
  }
}

MEGAGPT2_AVX2 void fill_avx2(void* bits, uint64_t block, int64_t blocks, uint64_t sample, Key key) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxMultiplier0), m1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);
  for (int64_t i = 0; i < blocks; i += 4) {
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block + i)), order);
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_set1_epi64x(static_cast<int64_t>(sample));
    __m256i c3 = _mm256_srli_epi64(c2, 32);
    Key k = key;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k.k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k.k1));
      c1 = p1;
      c3 = p0;
      k.k0 += kPhiloxWeyl0;
      k.k1 += kPhiloxWeyl1;
    }
    constexpr int upper_halves = 0xAA;
    const __m256i w01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), upper_halves);
    const __m256i w23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), upper_halves);
    auto* out = static_cast<__m256i*>(bits) + i / 2;
    _mm256_storeu_si256(out, _mm256_unpacklo_epi64(w01, w23));
    _mm256_storeu_si256(out + 1, _mm256_unpackhi_epi64(w01, w23));
  }
}
#endif

}  // namespace

void fill_bits(void* bits, uint64_t block, int64_t blocks, uint64_t sample, Key key) {
#ifdef MEGAGPT2_X86
  switch (instructions()) {
    case Instructions::avx512: return fill_avx512(bits, block, blocks, sample, key);
    case Instructions::avx2: return fill_avx2(bits, block, blocks, sample, key);
    case Instructions::portable: break;
  }
#endif
  fill_portable(bits, block, blocks, sample, key);
}

Tensor random_bits_cpu(int64_t key0, int64_t key1, Tensor samples, int64_t start, int64_t count) {
  check_place(samples, start, count);
  const Tensor rows = packed(samples);
  Tensor bits = empty(samples, {rows.numel(), count});
  int64_t* out = mutable_data<int64_t>(bits);
  for_each_tile<uint32_t>(
      data<int64_t>(rows), rows.numel(), start, count, make_key(key0, key1),
      [out](int64_t offset, const uint32_t* words, int64_t n) { std::copy(words, words + n, out + offset); });
  return bits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("random_bits(int key0, int key1, Tensor samples, SymInt start, SymInt count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) { m.impl("random_bits", TORCH_BOX(&random_bits_cpu)); }

}  // namespace megagpt2
