#include "bias_gelu/bias_gelu.h"

#include "common/rows.cuh"

namespace megagpt2 {
namespace {

__device__ __forceinline__ float gelu(float h) { return __fdividef(h, 1.0f + expf(h * (kGeluA + kGeluB * (h * h)))); }

__device__ __forceinline__ float gelu_slope(float h) {
  const float limited = h > 10.0f ? 10.0f : h, square = limited * limited;
  const float e = expf(limited * (kGeluA + kGeluB * square));
  const float s = __fdividef(1.0f, 1.0f + e);
  const float slope = s - limited * (e * s) * s * (kGeluA + 3.0f * kGeluB * square);
  return h < -10.0f ? 0.0f : slope;
}

template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) bias_gelu_rows(
    const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, int64_t rows, int64_t width) {
  for_each_pack<V>(rows, width, [=](int64_t row, int64_t column) {
    const int64_t at = row * width + column;
    Pack<T, V> part = load_pack<V>(x + at);
    const Pack<T, V> b = load_pack<V>(bias + column);
#pragma unroll
    for (int v = 0; v < V; ++v) part.value[v] = from_float<T>(gelu(to_float(part.value[v]) + to_float(b.value[v])));
    store_pack<V>(y + at, part);
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) bias_gelu_backward_rows(
    const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ dx,
    float* __restrict__ partial, int64_t rows, int64_t width) {
  sum_columns<V>(rows, width, partial, [=](int64_t row, int64_t column) {
    const int64_t at = row * width + column;
    const Pack<T, V> inputs = load_pack<V>(x + at), gradients = load_pack<V>(dy + at), b = load_pack<V>(bias + column);
    Pack<float, V> d;
    Pack<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      d.value[v] = to_float(gradients.value[v]) * gelu_slope(to_float(inputs.value[v]) + to_float(b.value[v]));
      result.value[v] = from_float<T>(d.value[v]);
    }
    store_pack<V>(dx + at, result);
    return d;
  });
}

}  // namespace

Tensor bias_gelu_cuda(Tensor x, Tensor bias) {
  const auto [rows, width] = rows_of(x);
  check_vector(bias, width, x.scalar_type(), "bias");
  const Tensor from = packed(x), biases = packed(bias);
  Tensor y = empty_contiguous_like(x);
  if (x.numel() == 0) return y;
  const DeviceGuard guard(x.get_device_index());
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T *source = data<T>(from), *b = data<T>(biases);
    T* target = mutable_data<T>(y);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const RowGrid grid = row_grid(rows, width / V);
      bias_gelu_rows<T, V><<<grid.blocks, grid.threads, 0, stream_of(x)>>>(source, b, target, rows, width);
    };
    with_pack<T>(width, launch, source, b, target);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cuda(Tensor dy, Tensor x, Tensor bias) {
  const auto [rows, width] = rows_of(x);
  check_same(x, dy, "x and dy");
  check_vector(bias, width, x.scalar_type(), "bias");
  const Tensor inputs = packed(x), gradients = packed(dy), biases = packed(bias);
  Tensor dx = empty_contiguous_like(x), d_bias = empty(x, {width});
  const DeviceGuard guard(x.get_device_index());
  if (x.numel() == 0) return {dx, torch::stable::zero_(d_bias)};
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T *xs = data<T>(inputs), *dys = data<T>(gradients), *b = data<T>(biases);
    T* out = mutable_data<T>(dx);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const ColumnGrid grid = column_grid(rows, width, V, kPackOf<T>);
      Tensor partial = empty_floats(x, {grid.blocks.y, width});
      bias_gelu_backward_rows<T, V><<<grid.blocks, grid.threads, 0, stream_of(x)>>>(
          dys, xs, b, out, mutable_data<float>(partial), rows, width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      launch_add_partials<T>(data<float>(partial), grid.blocks.y, width, mutable_data<T>(d_bias), stream_of(x));
    };
    with_pack<T>(width, launch, xs, dys, b, out);
  });
  return {dx, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cuda));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cuda));
}

}  // namespace megagpt2
