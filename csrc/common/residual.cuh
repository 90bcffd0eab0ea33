// A pack of the residual stream on a GPU: z = residual + dropout(x + bias), and the way back. residual.h is its twin.
#pragma once

#include "common/cuda.cuh"
#include "dropout/row_dropout.h"

namespace megagpt2 {

// The words of V elements of a sample, from `element` on. Where that is no multiple of 4 they begin within a counter.
template <int V>
__device__ __forceinline__ void draw(uint64_t element, uint64_t sample, Key key, uint32_t (&words)[V + 3]) {
  constexpr int kBlocks = (V + 3) / 4;  // + 1 where the words begin within a counter and don't end in it
  const int skip = static_cast<int>(element % 4);
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const Words drawn = philox(element / 4 + block, sample, key);
#pragma unroll
    for (int word = 0; word < 4; ++word) words[4 * block + word] = drawn.w[word];
  }
  if (skip + V > 4 * kBlocks) {
    const Words drawn = philox(element / 4 + kBlocks, sample, key);
#pragma unroll
    for (int word = 0; 4 * kBlocks + word < V + 3; ++word) words[4 * kBlocks + word] = drawn.w[word];
  }
  // Moves by 2 and by 1, each a choice: an index that depends on `skip` would send the words to memory.
#pragma unroll
  for (int i = 0; i + 2 < V + 3; ++i) words[i] = skip & 2 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i + 1 < V + 3; ++i) words[i] = skip & 1 ? words[i + 1] : words[i];
}

// x[v] of the elements from (row, column) on, dropped.
template <int V>
__device__ __forceinline__ void drop(const RowDropout& dropout, int64_t row, int64_t column, float (&x)[V]) {
  uint32_t words[V + 3];
  draw<V>(dropout.first_element(row) + column, dropout.sample(row), dropout.key, words);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = words[v] >= dropout.threshold ? x[v] * dropout.scale : 0.0f;
}

// bias: of these columns, or null.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> residual_pack(
    const T* x, const T* bias, const T* residual, const RowDropout& dropout, int64_t row, int64_t column) {
  const Pack<T, V> inputs = load_pack<V>(x), stream = load_pack<V>(residual);
  float h[V];
#pragma unroll
  for (int v = 0; v < V; ++v) h[v] = to_float(inputs.value[v]);
  if (bias) {
    const Pack<T, V> b = load_pack<V>(bias);
#pragma unroll
    for (int v = 0; v < V; ++v) h[v] += to_float(b.value[v]);
  }
  if (dropout.samples) drop<V>(dropout, row, column, h);
  Pack<T, V> z;
#pragma unroll
  for (int v = 0; v < V; ++v) z.value[v] = from_float<T>(to_float(stream.value[v]) + h[v]);
  return z;
}

// dropout(dz), as floats; written to dx where something is dropped.
template <typename T, int V>
__device__ __forceinline__ Pack<float, V> residual_backward_pack(
    const T* dz, const RowDropout& dropout, T* dx, int64_t row, int64_t column) {
  const Pack<T, V> gradients = load_pack<V>(dz);
  Pack<float, V> d;
#pragma unroll
  for (int v = 0; v < V; ++v) d.value[v] = to_float(gradients.value[v]);
  if (!dropout.samples) return d;
  drop<V>(dropout, row, column, d.value);
  Pack<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) result.value[v] = from_float<T>(d.value[v]);
  store_pack<V>(dx, result);
  return d;
}

}  // namespace megagpt2
