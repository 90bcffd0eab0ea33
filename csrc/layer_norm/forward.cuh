// Layer normalization's way forward on a GPU: a row belongs to a warp, or to a whole block where it is wide.
#pragma once

#include "common/cuda.cuh"

namespace megagpt2 {

// Each thread keeps its PACKS packs of x in registers from the one read on: the mean, the variance about it, and y are
// made of them. A Source gives them: take<V>(row, column, at), once each, and then they are at source.values + at.
//
//     warp per row      4 rows a block         up to 8 packs a lane
//     block per row     256 threads            up to 4 packs a thread
//                       512                    up to 8: more threads would leave too few registers to dropout
//     wider rows        as many as the Source  x is read again for the variance and for y, from the L2 cache mostly
//                       has registers for
constexpr int kRowsOfWarps = 4, kMostThreads = 512, kMostPacks = 8;

// Over a row's block, or its warp: then nothing is shared.
template <bool whole_block>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  if constexpr (whole_block) return block_sum(x, shared);
  return warp_sum(x);
}
template <bool whole_block>
__device__ __forceinline__ Two row_sum(Two x, float (*shared)[kWarp]) {
  if constexpr (whole_block) return block_sum(x, shared);
  return {warp_sum(x.first), warp_sum(x.second)};
}

struct Moments {
  float mean, rstd;
};

// From a row's mean as it was summed and the sums of (x - mean) and of its square: what the mean lost to rounding is the
// mean of the differences from it, which counts where values are far from zero and close to one another.
__device__ __forceinline__ Moments moments_of(float mean, Two differences_and_squares, int64_t width, float epsilon) {
  const float lost = differences_and_squares.first / width;
  const float variance = differences_and_squares.second / width - lost * lost;
  return {mean + lost, rsqrtf((variance < 0.0f ? 0.0f : variance) + epsilon)};
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> normalized(
    const Pack<T, V>& x, const T* weight, const T* bias, float mean, float rstd) {
  const Pack<T, V> w = load_pack<V>(weight), b = load_pack<V>(bias);
  Pack<T, V> y;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y.value[v] = from_float<T>((to_float(x.value[v]) - mean) * rstd * to_float(w.value[v]) + to_float(b.value[v]));
  }
  return y;
}

// The bound's 1: without it the compiler aims at more blocks on a processor, and may spill for it.
template <typename T, int V, int THREADS, int PACKS, typename Source>
__global__ void __launch_bounds__(THREADS == kWarp ? kRowsOfWarps * kWarp : THREADS, 1) forward_rows(
    Source source, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
    float* __restrict__ means, float* __restrict__ rstds, int64_t rows, int width, float epsilon) {
  constexpr bool kWholeBlock = THREADS > kWarp;
  __shared__ float shared[kWholeBlock ? 6 : 3][kWarp];
  const int lane = kWholeBlock ? threadIdx.x : threadIdx.x % kWarp;
  const int64_t first = kWholeBlock ? blockIdx.x : int64_t{blockIdx.x} * kRowsOfWarps + threadIdx.x / kWarp;
  const int64_t step = kWholeBlock ? gridDim.x : int64_t{gridDim.x} * kRowsOfWarps;
  int turn = 0;  // successive sums use different pieces of shared memory
  for (int64_t row = first; row < rows; row += step, turn = kWholeBlock ? 3 - turn : 0) {
    Pack<T, V> part[PACKS];
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * THREADS + lane) * V;
      if (column < width) part[k] = source.template take<V>(row, column, row * width + column);
    }
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if ((k * THREADS + lane) * V < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) sum += to_float(part[k].value[v]);
      }
    }
    const float center = row_sum<kWholeBlock>(sum, shared[turn]) / width;
    Two sums = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      if ((k * THREADS + lane) * V < width) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float d = to_float(part[k].value[v]) - center;
          sums.first += d;
          sums.second += d * d;
        }
      }
    }
    const auto [mean, rstd] = moments_of(center, row_sum<kWholeBlock>(sums, shared + turn + 1), width, epsilon);
#pragma unroll
    for (int k = 0; k < PACKS; ++k) {
      const int column = (k * THREADS + lane) * V;
      if (column < width) {
        store_pack<V>(y + row * width + column, normalized<T, V>(part[k], weight + column, bias + column, mean, rstd));
      }
    }
    if (lane == 0) {
      means[row] = mean;
      rstds[row] = rstd;
    }
  }
}

template <typename T, int V, typename Source>
__global__ void __launch_bounds__(Source::kWideThreads) forward_wide_rows(
    Source source, const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y,
    float* __restrict__ means, float* __restrict__ rstds, int64_t rows, int64_t width, float epsilon) {
  constexpr int64_t kStep = int64_t{Source::kWideThreads} * V;
  __shared__ float shared[6][kWarp];
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn = 3 - turn) {
    const T* from = source.values + row * width;
    float sum = 0.0f;
    for (int64_t column = threadIdx.x * V; column < width; column += kStep) {
      const Pack<T, V> part = source.template take<V>(row, column, row * width + column);
#pragma unroll
      for (int v = 0; v < V; ++v) sum += to_float(part.value[v]);
    }
    const float center = block_sum(sum, shared[turn]) / width;
    Two sums = {0.0f, 0.0f};
    for (int64_t column = threadIdx.x * V; column < width; column += kStep) {
      const Pack<T, V> part = load_pack<V>(from + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float d = to_float(part.value[v]) - center;
        sums.first += d;
        sums.second += d * d;
      }
    }
    const auto [mean, rstd] = moments_of(center, block_sum(sums, shared + turn + 1), width, epsilon);
    for (int64_t column = threadIdx.x * V; column < width; column += kStep) {
      store_pack<V>(
          y + row * width + column,
          normalized<T, V>(load_pack<V>(from + column), weight + column, bias + column, mean, rstd));
    }
    if (threadIdx.x == 0) {
      means[row] = mean;
      rstds[row] = rstd;
    }
  }
}

template <typename T, int V, int THREADS, int PACKS, typename Source>
void launch_forward(
    Source source, const T* weight, const T* bias, T* y, float* means, float* rstds, int64_t rows, int64_t width,
    float epsilon, cudaStream_t stream) {
  constexpr int kRows = THREADS == kWarp ? kRowsOfWarps : 1;
  forward_rows<T, V, THREADS, PACKS, Source><<<grid_of((rows + kRows - 1) / kRows), THREADS * kRows, 0, stream>>>(
      source, weight, bias, y, means, rstds, rows, static_cast<int>(width), epsilon);
}

template <typename T, int V, typename Source>
void forward(
    Source source, const T* weight, const T* bias, T* y, float* means, float* rstds, int64_t rows, int64_t width,
    float epsilon, cudaStream_t stream) {
  const int64_t packs = (width + V - 1) / V;
  const auto launch = [&](auto kernel) { kernel(source, weight, bias, y, means, rstds, rows, width, epsilon, stream); };
  if (packs <= 2 * kWarp) {
    launch(launch_forward<T, V, kWarp, 2, Source>);
  } else if (packs <= 4 * kWarp) {
    launch(launch_forward<T, V, kWarp, 4, Source>);
  } else if (packs <= 8 * kWarp) {
    launch(launch_forward<T, V, kWarp, 8, Source>);
  } else if (packs <= 4 * 256) {
    launch(launch_forward<T, V, 256, 4, Source>);
  } else if (packs <= kMostPacks * kMostThreads) {
    launch(launch_forward<T, V, kMostThreads, kMostPacks, Source>);
  } else {
    forward_wide_rows<T, V, Source><<<grid_of(rows), Source::kWideThreads, 0, stream>>>(
        source, weight, bias, y, means, rstds, rows, width, epsilon);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megagpt2
