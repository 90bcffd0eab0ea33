#include "dropout/dropout.h"

#include <cstring>

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include "common/instructions.h"
#include "philox/philox_cpu.h"

#ifdef MEGAGPT2_X86
#include <immintrin.h>
#endif

namespace megagpt2 {
namespace {

template <size_t bytes>
struct UnsignedOf;
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};

// The product is made in float for the 16-bit types and rounded once, as torch multiplies by a number. The choice is
// made on its bits: written as a choice of numbers, compilers would skip products, and so not use vectors.
template <typename scalar_t>
MEGAGPT2_INLINE void keep(
    const scalar_t* __restrict__ x, scalar_t* __restrict__ y, const uint32_t* __restrict__ words, int64_t n,
    uint32_t threshold, at::opmath_type<scalar_t> scale) {
  using bits_t = typename UnsignedOf<sizeof(scalar_t)>::type;
  for (int64_t i = 0; i < n; ++i) {
    const scalar_t scaled = static_cast<scalar_t>(static_cast<at::opmath_type<scalar_t>>(x[i]) * scale);
    bits_t bits;
    std::memcpy(&bits, &scaled, sizeof(bits));
    bits &= words[i] >= threshold ? static_cast<bits_t>(-1) : bits_t(0);
    std::memcpy(&y[i], &bits, sizeof(bits));
  }
}

template <typename scalar_t>
void keep_portable(
    const scalar_t* x, scalar_t* y, const uint32_t* words, int64_t n, uint32_t threshold,
    at::opmath_type<scalar_t> scale) {
  keep(x, y, words, n, threshold, scale);
}

#ifdef MEGAGPT2_X86
template <typename scalar_t>
MEGAGPT2_AVX2 void keep_avx2(
    const scalar_t* x, scalar_t* y, const uint32_t* words, int64_t n, uint32_t threshold,
    at::opmath_type<scalar_t> scale) {
  keep(x, y, words, n, threshold, scale);
}

// Compilers don't find the instructions that convert fp16 behind c10::Half.
template <>
MEGAGPT2_AVX2 void keep_avx2<c10::Half>(
    const c10::Half* x, c10::Half* y, const uint32_t* words, int64_t n, uint32_t threshold, float scale) {
  const __m256i least = _mm256_set1_epi32(static_cast<int>(threshold));
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i drawn = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + i));
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_max_epu32(drawn, least), drawn);  // drawn >= least, unsigned
    const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(value, factor), _mm256_castsi256_ps(kept));
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  keep(x + i, y + i, words + i, n - i, threshold, scale);
}
#endif

template <typename scalar_t>
auto choose_keep() {
#ifdef MEGAGPT2_X86
  if (instructions() >= Instructions::avx2) return &keep_avx2<scalar_t>;  // AVX512 would do no better here
#endif
  return &keep_portable<scalar_t>;
}

}  // namespace

at::Tensor dropout_cpu(
    const at::Tensor& x, const at::Tensor& samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  TORCH_CHECK_VALUE(
      probability >= 0.0 && probability < 1.0, "probability is ", probability, ": it must be at least 0 and below 1");
  TORCH_CHECK_VALUE(
      x.dim() >= 1 && x.size(0) == samples.numel(),
      "x is ", x.sizes(), " but there are ", samples.numel(), " samples: give one for each x[i]");
  TORCH_CHECK_VALUE(x.is_floating_point(), "x is ", x.scalar_type(), ": dropout scales, give a floating-point tensor");
  const int64_t batch = x.size(0), count = batch == 0 ? 0 : x.numel() / batch;
  check_place(samples, start, count);
  const at::Tensor rows = samples.contiguous(), from = x.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options().memory_format(at::MemoryFormat::Contiguous));
  const uint32_t threshold = dropout_threshold(probability);
  const Key key = make_key(key0, key1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "dropout", [&] {
    const scalar_t* source = from.const_data_ptr<scalar_t>();
    scalar_t* target = y.data_ptr<scalar_t>();
    const auto scale = static_cast<at::opmath_type<scalar_t>>(1.0 / (1.0 - probability));
    const auto keep_tile = choose_keep<scalar_t>();
    for_each_tile(
        rows.const_data_ptr<int64_t>(), batch, start, count, key,
        [=](int64_t offset, const uint32_t* words, int64_t n) {
          keep_tile(source + offset, target + offset, words, n, threshold, scale);
        });
  });
  return y;
}

}  // namespace megagpt2
