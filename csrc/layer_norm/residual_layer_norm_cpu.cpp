#include "layer_norm/residual_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include "common/pairs.h"
#include "common/past_caches.h"
#include "common/sums_over_rows.h"
#include "dropout/row_bits.h"
#include "layer_norm/layer_norm.h"

#define MEGAGPT2_LOOPS "layer_norm/residual_layer_norm_loops.h"
#include "common/variants.h"

namespace megagpt2 {

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_cpu(
    Tensor x, std::optional<Tensor> bias, Tensor residual, Tensor weight, Tensor norm_bias, double epsilon,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [rows, width] = checked_rows(x, weight, norm_bias);
  check_same(x, residual, "x and residual");
  const DropoutArguments dropout = dropout_arguments(x, samples, key0, key1, probability, start);
  const Tensor from = packed(x), stream = packed(residual);
  const Tensor biases = in_order_of_pairs(bias_floats(x, bias, width), x.scalar_type());
  const Tensor weights = in_order_of_pairs(as_floats(weight), x.scalar_type());
  const Tensor norm_biases = in_order_of_pairs(as_floats(norm_bias), x.scalar_type());
  Tensor z = empty_contiguous_like(x), y = empty_contiguous_like(x);
  Tensor mean = empty_floats(x, {rows}), rstd = empty_floats(x, {rows});
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto add = MEGAGPT2_VARIANT(residual_row<T>);
    const auto normalize = MEGAGPT2_VARIANT(forward_rows<T>);
    const bool past = past_caches(4, data<T>(y), rows, width);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      const Fence fence(past);
      Buffer<float> buffer = row_buffer(width);
      RowBits bits(dropout.rows);
      for (int64_t row = begin; row < end; ++row) {
        const T *inputs = data<T>(from) + row * width, *skip = data<T>(stream) + row * width;
        T* sums = mutable_data<T>(z) + row * width;
        bits.for_each_piece(
            row, width, {inputs, skip, sums}, [&](int64_t at, const uint16_t* drawn, int64_t n) {
              add(inputs + at, data<float>(biases) + at, skip + at, drawn, dropout.rows.threshold, dropout.rows.scale,
                  sums + at, false, n);  // which is read again at once; by way of a buffer it takes as long
            });
        normalize(
            sums, mutable_data<T>(y) + row * width, past, mutable_data<float>(mean) + row,
            mutable_data<float>(rstd) + row, data<float>(weights), data<float>(norm_biases), 1, width,
            static_cast<float>(epsilon), buffer.data());
      }
    });
  });
  return {z, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward_cpu(
    Tensor dy, std::optional<Tensor> dz, Tensor z, Tensor mean, Tensor rstd, Tensor weight,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [rows, width] = checked_rows(dy, z, mean, rstd, weight, dz);
  const DropoutArguments dropout = dropout_arguments(z, samples, key0, key1, probability, start);
  const Tensor sums = packed(z), gradients = packed(dy), stream = dz ? packed(*dz) : sums, weights = as_floats(weight);
  Tensor d_residual = empty_contiguous_like(z), dx = samples ? empty_contiguous_like(z) : empty(z, {0});
  SumsOverRows columns(rows, 3 * width);
  with_type(z.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto normalize = MEGAGPT2_VARIANT(backward_rows<T>);
    const auto add = MEGAGPT2_VARIANT(residual_backward_row<T>);
    const bool past = samples && past_caches(dz ? 5 : 4, data<T>(dx), rows, width);
    struct Task {
      Buffer<float> buffer;
      RowBits bits;
      Fence fence;
    };
    const auto make_task = [&] { return Task{row_buffer(width), RowBits(dropout.rows), Fence(past)}; };
    columns.run(make_task, [&](Task& task, int64_t first, int64_t count, float* part) {
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t at = row * width;
        T* to = mutable_data<T>(d_residual) + at;
        normalize(
            data<T>(gradients) + at, data<T>(sums) + at, dz ? data<T>(stream) + at : nullptr, data<float>(mean) + row,
            data<float>(rstd) + row, data<float>(weights), to, false, part, part + width, 1, width, task.buffer.data());
        T* dropped = samples ? mutable_data<T>(dx) + at : nullptr;
        const T* fetched = past ? nullptr : dropped;
        task.bits.for_each_piece(row, width, {fetched}, [&](int64_t i, const uint16_t* drawn, int64_t n) {
          add(to + i, to + i, drawn, dropout.rows.threshold, dropout.rows.scale, samples ? dropped + i : nullptr, past,
              part + 2 * width + i, n);
        });
      }
    });
  });
  const Tensor d_bias = columns.of(2 * width, width, z, true);
  return {d_residual, dx, d_bias, columns.of(0, width, z), columns.of(width, width, z)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def(
      "residual_layer_norm(Tensor x, Tensor? bias, Tensor residual, Tensor weight, Tensor norm_bias, float epsilon,"
      " Tensor? samples, int key0, int key1, float probability, SymInt start) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_layer_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor mean, Tensor rstd, Tensor weight,"
      " Tensor? samples, int key0, int key1, float probability, SymInt start)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm_cpu));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&residual_layer_norm_backward_cpu));
}

}  // namespace megagpt2
