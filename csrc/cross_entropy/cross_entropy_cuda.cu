#include "cross_entropy/cross_entropy.h"

#include "common/cuda.cuh"

namespace megagpt2 {
namespace {

// A chunk has some hundreds of rows of some ten thousand words: four blocks of 256 threads, which 56 registers a thread
// allow on each of an H200's 132 processors, take 528 rows at once. A thread has four packs on their way at a time.
constexpr int kThreads = 256;
constexpr int kPacks = 4;

// e^x for x <= 0. The faster instruction's error grows with |x|, where e^x no longer counts: beside the row's largest, 1,
// it is below 2**-22.
__device__ __forceinline__ float exponential(float x) { return __expf(x); }

// What is subtracted in the exponent: no peak where there is nothing but -infinity, so that its exponential is 0, not NaN.
__device__ __forceinline__ float center_of(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// Every thread keeps the sum of its logits relative to the largest so far (Milakov and Gimelshein 2018, "Online normalizer
// calculation for softmax"), and the block joins them. fmaxf passes over a NaN, the sum doesn't.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) statistics_rows(
    const T* __restrict__ logits, const int64_t* __restrict__ targets, float* __restrict__ maximum,
    float* __restrict__ total, float* __restrict__ target, int64_t rows, int64_t width, int64_t first, int64_t words) {
  __shared__ float shared[4][kWarp];
  int turn = 0;  // successive rows use different pieces of shared memory
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 2) {
    const T* from = logits + row * width;
    float peak = -INFINITY, sum = 0.0f;
    for (int64_t begin = threadIdx.x * V; begin < words; begin += int64_t{kThreads} * V * kPacks) {
      Pack<T, V> part[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int64_t column = begin + k * kThreads * V;
        if (column < words) part[k] = load_pack<V>(from + column);
      }
      float found = -INFINITY;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (begin + k * kThreads * V + v < words) found = fmaxf(found, to_float(part[k].value[v]));
        }
      }
      const float larger = fmaxf(peak, found), center = center_of(larger);
      sum *= exponential(peak - center);
      peak = larger;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (begin + k * kThreads * V + v < words) sum += exponential(to_float(part[k].value[v]) - center);
        }
      }
    }
    const float row_peak = block_max(peak, shared[turn]);
    const float row_sum = block_sum(sum * exponential(peak - center_of(row_peak)), shared[turn + 1]);
    if (threadIdx.x == 0) {
      const int64_t word = targets[row] - first;
      maximum[row] = row_peak;
      total[row] = row_sum;
      target[row] = word >= 0 && word < words ? to_float(from[word]) : 0.0f;
    }
  }
}

// A block takes a piece of a row, of one round of packs.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gradient_rows(
    T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ maximum,
    const float* __restrict__ normalizer, int64_t rows, int64_t width, int64_t first, int64_t words, float factor,
    int64_t pieces) {
  for (int64_t item = blockIdx.x; item < rows * pieces; item += gridDim.x) {
    const int64_t row = item / pieces, begin = (item % pieces * kPacks * kThreads + threadIdx.x) * V;
    const float peak = maximum[row], scale = factor / normalizer[row];
    const int64_t word = targets[row] - first;
    T* at = logits + row * width;
    Pack<T, V> part[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = begin + k * kThreads * V;
      if (column < words) part[k] = load_pack<V>(at + column);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t column = begin + k * kThreads * V;
      if (column >= width) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const bool counts = column + v < words;
        const float gradient = counts ? exponential(to_float(part[k].value[v]) - peak) * scale : 0.0f;
        part[k].value[v] = from_float<T>(counts && column + v == word ? gradient - factor : gradient);
      }
      store_pack<V>(at + column, part[k]);
    }
  }
}

}  // namespace

Tensor cross_entropy_statistics_cuda(Tensor logits, Tensor targets, int64_t first, int64_t words) {
  check_chunk(logits, targets, words);
  const Tensor from = packed(logits), wanted = packed(targets);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const DeviceGuard guard(logits.get_device_index());
  Tensor statistics = empty_floats(logits, {3, rows});
  if (rows == 0) return statistics;
  float* out = mutable_data<float>(statistics);
  with_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* source = data<T>(from);
    with_pack<T>(
        width,
        [&](auto v) {
          statistics_rows<T, decltype(v)::value><<<grid_of(rows), kThreads, 0, stream_of(logits)>>>(
              source, data<int64_t>(wanted), out, out + rows, out + 2 * rows, rows, width, first, words);
        },
        source);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return statistics;
}

void cross_entropy_gradient_cuda(
    Tensor logits, Tensor targets, Tensor maximum, Tensor normalizer, int64_t first, int64_t words, double factor) {
  check_gradient(logits, targets, maximum, normalizer, words);
  if (logits.numel() == 0) return;
  const Tensor wanted = packed(targets), peaks = packed(maximum), sums = packed(normalizer);
  const int64_t rows = logits.size(0), width = logits.size(1);
  const DeviceGuard guard(logits.get_device_index());
  with_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* at = mutable_data<T>(logits);
    with_pack<T>(
        width,
        [&](auto v) {
          constexpr int V = decltype(v)::value;
          const int64_t piece = int64_t{kThreads} * kPacks * V, pieces = (width + piece - 1) / piece;
          gradient_rows<T, V><<<grid_of(rows * pieces), kThreads, 0, stream_of(logits)>>>(
              at, data<int64_t>(wanted), data<float>(peaks), data<float>(sums), rows, width, first, words,
              static_cast<float>(factor), pieces);
        },
        at);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics_cuda));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_cuda));
}

}  // namespace megagpt2
