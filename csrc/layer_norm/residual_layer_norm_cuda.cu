#include "layer_norm/residual_layer_norm.h"

#include "bias_dropout_add/bias_dropout_add.h"
#include "common/residual.cuh"
#include "layer_norm/forward.cuh"
#include "layer_norm/layer_norm.h"

namespace megagpt2 {
namespace {

// Rows to normalize that are made, and stored, as they are taken.
template <typename T>
struct Summed {
  static constexpr int kWideThreads = 512;  // of 1024 none may have more than 64 registers: dropout would spill some
  const T *x, *bias, *residual;  // bias may be null
  RowDropout dropout;
  T* values;

  template <int V>
  __device__ __forceinline__ Pack<T, V> take(int64_t row, int64_t column, int64_t at) const {
    const T* b = bias ? bias + column : nullptr;
    const Pack<T, V> z = residual_pack<T, V>(x + at, b, residual + at, dropout, row, column);
    store_pack<V>(values + at, z);
    return z;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_cuda(
    Tensor x, std::optional<Tensor> bias, Tensor residual, Tensor weight, Tensor norm_bias, double epsilon,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [rows, width] = checked_rows(x, weight, norm_bias);
  check_same(x, residual, "x and residual");
  if (bias) check_vector(*bias, width, x.scalar_type(), "bias");
  const DropoutArguments dropout = dropout_arguments(x, samples, key0, key1, probability, start);
  const Tensor from = packed(x), stream = packed(residual), biases = bias ? packed(*bias) : from;
  const Tensor weights = packed(weight), norm_biases = packed(norm_bias);
  Tensor z = empty_contiguous_like(x), y = empty_contiguous_like(x);
  Tensor mean = empty_floats(x, {rows}), rstd = empty_floats(x, {rows});
  if (x.numel() == 0) return {z, y, mean, rstd};
  const DeviceGuard guard(x.get_device_index());
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const Summed<T> source{
        data<T>(from), bias ? data<T>(biases) : nullptr, data<T>(stream), dropout.rows, mutable_data<T>(z)};
    const T *w = data<T>(weights), *b = data<T>(norm_biases);
    T* target = mutable_data<T>(y);
    with_pack<T>(
        width,
        [&](auto v) {
          forward<T, decltype(v)::value>(
              source, w, b, target, mutable_data<float>(mean), mutable_data<float>(rstd), rows, width,
              static_cast<float>(epsilon), stream_of(x));
        },
        source.x, source.bias, source.residual, source.values, w, b, target);
  });
  return {z, y, mean, rstd};
}

// Two steps: the second reads d residual again, while the columns of each keep their own sums in registers.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward_cuda(
    Tensor dy, std::optional<Tensor> dz, Tensor z, Tensor mean, Tensor rstd, Tensor weight,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [d_residual, d_weight, d_norm_bias] = layer_norm_backward_cuda(dy, z, mean, rstd, weight, dz);
  const auto [dx, d_bias] = bias_dropout_add_backward_cuda(d_residual, samples, key0, key1, probability, start);
  return {d_residual, dx, d_bias, d_weight, d_norm_bias};
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) {
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm_cuda));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&residual_layer_norm_backward_cuda));
}

}  // namespace megagpt2
