// A pack of the residual stream on a GPU: z = residual + dropout(x + bias), and the way back. residual.h is its twin.
#pragma once

#include "common/cuda.cuh"
#include "dropout/row_dropout.cuh"

namespace megagpt2 {

// x[v] of the elements from (row, column) on, dropped.
template <int V>
__device__ __forceinline__ void drop(const RowDropout& dropout, int64_t row, int64_t column, float (&x)[V]) {
  const uint64_t first = dropout.first_element(row) + column;
  const unsigned bits = kept_bits<V>(first, dropout.sample(row), dropout.key, dropout.threshold);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = bits >> v & 1u ? x[v] * dropout.scale : 0.0f;
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
