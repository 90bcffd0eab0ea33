// Rows [rows, width] on a GPU where each element stands for itself: the shape of a grid that goes over all of them, and
// of one that sums columns on its way.
#pragma once

#include "common/column_sums.cuh"
#include "common/cuda.cuh"

namespace megagpt2 {

constexpr int kRowThreads = 256;

// Every thread has as many packs of a row as every other, and a block several rows where they are short.
struct RowGrid {
  dim3 threads;
  unsigned blocks;
};
inline RowGrid row_grid(int64_t rows, int64_t packs) {
  const int64_t turns = (packs + kRowThreads - 1) / kRowThreads, across = (packs + turns - 1) / turns;
  const int64_t down = across < kRowThreads ? kRowThreads / across : 1;
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), grid_of((rows + down - 1) / down)};
}

// Calls pack(row, column) for the first element of every pack, with a RowGrid.
template <int V, typename Function>
__device__ __forceinline__ void for_each_pack(int64_t rows, int64_t width, const Function& pack) {
  const int64_t step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows; row += step) {
    for (int64_t column = int64_t{threadIdx.x} * V; column < width; column += int64_t{blockDim.x} * V) {
      pack(row, column);
    }
  }
}

// A thread has one pack of columns, and every blocks.y-th row: it keeps their sums in registers, and writes them once,
// to its row of a partial [blocks.y, width] that add_partials adds. blocks.y depends on the shape alone.
struct ColumnGrid {
  unsigned threads;
  dim3 blocks;
};
inline int64_t column_threads(int64_t packs) {
  const int64_t turns = (packs + kRowThreads - 1) / kRowThreads;
  return ((packs + turns - 1) / turns + kWarp - 1) / kWarp * kWarp;
}
inline int64_t column_tiles(int64_t packs) { return (packs + column_threads(packs) - 1) / column_threads(packs); }

// For packs of `v` elements, of at most `widest`: how many there are decides nothing about the sums, since it depends on
// where tensors lie.
inline ColumnGrid column_grid(int64_t rows, int64_t width, int64_t v, int64_t widest) {
  const int64_t fewest = column_tiles((width + widest - 1) / widest);
  const int64_t most = fewest > 8 ? 132 : 1056 / fewest;  // eight blocks for each of an H200's processors
  const int64_t packs = width / v, parts = rows < most ? rows : most;
  return {
      static_cast<unsigned>(column_threads(packs)),
      dim3(static_cast<unsigned>(column_tiles(packs)), static_cast<unsigned>(parts))};
}

// Sums what pack(row, column) gives, V floats to add to the columns from `column` on, with a ColumnGrid.
template <int V, typename Function>
__device__ __forceinline__ void sum_columns(
    int64_t rows, int64_t width, float* __restrict__ partial, const Function& pack) {
  const int64_t column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
  if (column >= width) return;
  float sums[V] = {};
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const Pack<float, V> part = pack(row, column);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += part.value[v];
  }
#pragma unroll
  for (int v = 0; v < V; ++v) partial[int64_t{blockIdx.y} * width + column + v] = sums[v];
}

}  // namespace megagpt2
