#include "split_sum/split_sum.h"

#include "common/cuda.cuh"

namespace megagpt2 {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float joined(uint16_t high, uint16_t low) {
  return __uint_as_float(uint32_t{high} << 16 | low);
}

// A thread takes V elements at a time: 16 bytes of x.
template <typename X, int V>
__global__ void __launch_bounds__(kThreads) add_terms(
    uint16_t* __restrict__ high, uint16_t* __restrict__ low, const X* __restrict__ x, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * kThreads * V;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; i < n; i += step) {
    const Pack<X, V> terms = load_pack<V>(x + i);
    Pack<uint16_t, V> upper = load_pack<V>(high + i), lower = load_pack<V>(low + i);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const uint32_t sum = __float_as_uint(joined(upper.value[v], lower.value[v]) + to_float(terms.value[v]));
      upper.value[v] = static_cast<uint16_t>(sum >> 16);
      lower.value[v] = static_cast<uint16_t>(sum);
    }
    store_pack<V>(high + i, upper);
    store_pack<V>(low + i, lower);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) round_sums(
    uint16_t* __restrict__ high, const uint16_t* __restrict__ low, const float* __restrict__ scale, int64_t n) {
  const float factor = *scale;
  const int64_t step = int64_t{gridDim.x} * kThreads * V;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; i < n; i += step) {
    Pack<uint16_t, V> upper = load_pack<V>(high + i);
    const Pack<uint16_t, V> lower = load_pack<V>(low + i);
#pragma unroll
    for (int v = 0; v < V; ++v) upper.value[v] = from_float<T>(joined(upper.value[v], lower.value[v]) * factor).bits;
    store_pack<V>(high + i, upper);
  }
}

unsigned blocks_of(int64_t n, int pack) { return grid_of((n + kThreads * pack - 1) / (kThreads * pack)); }

}  // namespace

void split_sum_add_cuda(Tensor high, Tensor low, Tensor x) {
  check_halves(high, low);
  check_term(x, high);
  const int64_t n = high.numel();
  if (n == 0) return;
  const Tensor terms = packed(x);
  const DeviceGuard guard(high.get_device_index());
  uint16_t *upper = mutable_data<uint16_t>(high), *lower = mutable_data<uint16_t>(low);
  with_type(x.scalar_type(), [&](auto element) {
    using X = decltype(element);
    const X* from = data<X>(terms);
    with_pack<X>(
        n,
        [&](auto v) {
          constexpr int V = decltype(v)::value;
          add_terms<X, V><<<blocks_of(n, V), kThreads, 0, stream_of(high)>>>(upper, lower, from, n);
        },
        upper, lower, from);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void split_sum_round_cuda(Tensor high, Tensor low, Tensor scale) {
  check_halves(high, low);
  check_scale(scale);
  const int64_t n = high.numel();
  if (n == 0) return;
  const DeviceGuard guard(high.get_device_index());
  uint16_t* upper = mutable_data<uint16_t>(high);
  const uint16_t* lower = data<uint16_t>(low);
  const float* factor = data<float>(scale);
  with_pack<uint16_t>(
      n,
      [&](auto v) {
        constexpr int V = decltype(v)::value;
        const auto kernel = high.scalar_type() == ScalarType::Half ? &round_sums<Half, V> : &round_sums<BFloat16, V>;
        kernel<<<blocks_of(n, V), kThreads, 0, stream_of(high)>>>(upper, lower, factor, n);
      },
      upper, lower);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("split_sum_add_", TORCH_BOX(&split_sum_add_cuda));
  m.impl("split_sum_round_", TORCH_BOX(&split_sum_round_cuda));
}

}  // namespace megagpt2
