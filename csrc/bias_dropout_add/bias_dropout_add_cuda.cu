#include "bias_dropout_add/bias_dropout_add.h"

#include "common/residual.cuh"
#include "common/rows.cuh"

namespace megagpt2 {
namespace {

template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) add_rows(
    const T* __restrict__ x, const T* __restrict__ bias, const T* __restrict__ residual, RowDropout dropout,
    T* __restrict__ z, int64_t rows, int64_t width) {
  for_each_pack<V>(rows, width, [=](int64_t row, int64_t column) {
    const int64_t at = row * width + column;
    const T* b = bias ? bias + column : nullptr;
    store_pack<V>(z + at, residual_pack<T, V>(x + at, b, residual + at, dropout, row, column));
  });
}

template <typename T, int V>
__global__ void __launch_bounds__(kRowThreads) add_backward_rows(
    const T* __restrict__ dz, RowDropout dropout, T* __restrict__ dx, float* __restrict__ partial, int64_t rows,
    int64_t width) {
  sum_columns<V>(rows, width, partial, [=](int64_t row, int64_t column) {
    const int64_t at = row * width + column;
    return residual_backward_pack<T, V>(dz + at, dropout, dx + at, row, column);
  });
}

}  // namespace

Tensor bias_dropout_add_cuda(
    Tensor x, std::optional<Tensor> bias, Tensor residual, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start) {
  const auto [rows, width] = rows_of(x);
  check_same(x, residual, "x and residual");
  if (bias) check_vector(*bias, width, x.scalar_type(), "bias");
  const DropoutArguments dropout = dropout_arguments(x, samples, key0, key1, probability, start);
  const Tensor from = packed(x), stream = packed(residual), biases = bias ? packed(*bias) : from;
  Tensor z = empty_contiguous_like(x);
  if (x.numel() == 0) return z;
  const DeviceGuard guard(x.get_device_index());
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T *xs = data<T>(from), *residuals = data<T>(stream), *b = bias ? data<T>(biases) : nullptr;
    T* out = mutable_data<T>(z);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const RowGrid grid = row_grid(rows, width / V);
      add_rows<T, V><<<grid.blocks, grid.threads, 0, stream_of(x)>>>(xs, b, residuals, dropout.rows, out, rows, width);
    };
    with_pack<T>(width, launch, xs, residuals, b, out);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return z;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward_cuda(
    Tensor dz, std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [rows, width] = rows_of(dz);
  const DropoutArguments dropout = dropout_arguments(dz, samples, key0, key1, probability, start);
  const Tensor gradients = packed(dz);
  Tensor dx = samples ? empty_contiguous_like(dz) : empty(dz, {0}), d_bias = empty(dz, {width});
  const DeviceGuard guard(dz.get_device_index());
  if (dz.numel() == 0) return {dx, torch::stable::zero_(d_bias)};
  with_type(dz.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const T* dzs = data<T>(gradients);
    T* out = mutable_data<T>(dx);
    const auto launch = [&](auto v) {
      constexpr int V = decltype(v)::value;
      const ColumnGrid grid = column_grid(rows, width, V, kPackOf<T>);
      Tensor partial = empty_floats(dz, {grid.blocks.y, width});
      add_backward_rows<T, V><<<grid.blocks, grid.threads, 0, stream_of(dz)>>>(
          dzs, dropout.rows, out, mutable_data<float>(partial), rows, width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      launch_add_partials<T>(data<float>(partial), grid.blocks.y, width, mutable_data<T>(d_bias), stream_of(dz));
    };
    with_pack<T>(width, launch, dzs, out);
  });
  return {dx, d_bias};
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("bias_dropout_add", TORCH_BOX(&bias_dropout_add_cuda));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&bias_dropout_add_backward_cuda));
}

}  // namespace megagpt2
