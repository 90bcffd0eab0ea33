// The second stage of a sum over rows: partial sums of blocks of rows, added in an order that depends on the shape alone.
#pragma once

#include "common/cuda.cuh"

namespace megagpt2 {

constexpr int kSumColumns = 32, kSumRows = 16;

// total[column] = sum over `parts` rows of partial [parts, columns], in T.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    add_partials(const float* __restrict__ partial, int parts, int64_t columns, T* __restrict__ total) {
  __shared__ float sums[kSumRows][kSumColumns + 1];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0.0f;
  if (column < columns) {
    for (int64_t part = threadIdx.y; part < parts; part += kSumRows) sum += partial[part * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int row = 1; row < kSumRows; ++row) sum += sums[row][threadIdx.x];
    total[column] = from_float<T>(sum);
  }
}

template <typename T>
void launch_add_partials(const float* partial, int parts, int64_t columns, T* total, cudaStream_t stream) {
  if (columns == 0) return;
  const dim3 threads(kSumColumns, kSumRows);
  add_partials<T><<<static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns), threads, 0, stream>>>(
      partial, parts, columns, total);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megagpt2
