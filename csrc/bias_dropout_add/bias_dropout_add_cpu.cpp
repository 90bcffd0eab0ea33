#include "bias_dropout_add/bias_dropout_add.h"

#include <torch/csrc/stable/library.h>

#include "common/pairs.h"
#include "common/past_caches.h"
#include "common/sums_over_rows.h"
#include "dropout/row_bits.h"

#define MEGAGPT2_LOOPS "bias_dropout_add/bias_dropout_add_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

constexpr int64_t kRowsAhead = 2;  // of the row that is worked on: sums over rows wait for the memory alone

}  // namespace

Tensor bias_dropout_add_cpu(
    Tensor x, std::optional<Tensor> bias, Tensor residual, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start) {
  const auto [rows, width] = rows_of(x);
  check_same(x, residual, "x and residual");
  const DropoutArguments dropout = dropout_arguments(x, samples, key0, key1, probability, start);
  const Tensor from = packed(x), stream = packed(residual);
  const Tensor biases = in_order_of_pairs(bias_floats(x, bias, width), x.scalar_type());
  Tensor z = empty_contiguous_like(x);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto forward = MEGAGPT2_VARIANT(residual_row<T>);
    const bool past = past_caches(3, data<T>(z), rows, width);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      const Fence fence(past);
      RowBits bits(dropout.rows);
      for (int64_t row = begin; row < end; ++row) {
        const T *inputs = data<T>(from) + row * width, *skip = data<T>(stream) + row * width;
        T* sums = mutable_data<T>(z) + row * width;
        bits.for_each_piece(
            row, width, {inputs, skip, past ? nullptr : sums}, [&](int64_t at, const uint16_t* drawn, int64_t n) {
              forward(
                  inputs + at, data<float>(biases) + at, skip + at, drawn, dropout.rows.threshold, dropout.rows.scale,
                  sums + at, past, n);
            });
      }
    });
  });
  return z;
}

std::tuple<Tensor, Tensor> bias_dropout_add_backward_cpu(
    Tensor dz, std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  const auto [rows, width] = rows_of(dz);
  const DropoutArguments dropout = dropout_arguments(dz, samples, key0, key1, probability, start);
  const Tensor gradients = packed(dz);
  Tensor dx = samples ? empty_contiguous_like(dz) : empty(dz, {0});
  SumsOverRows sums(rows, width);
  with_type(dz.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto backward = MEGAGPT2_VARIANT(residual_backward_row<T>);
    const bool past = samples && past_caches(2, data<T>(dx), rows, width);
    struct Task {
      RowBits bits;
      Fence fence;
    };
    const auto make_task = [&] { return Task{RowBits(dropout.rows), Fence(past)}; };
    sums.run(make_task, [&](Task& task, int64_t first, int64_t count, float* d_bias) {
      for (int64_t row = first; row < first + count; ++row) {
        const T* from = data<T>(gradients) + row * width;
        const T* ahead = from + (row + kRowsAhead < rows ? kRowsAhead * width : 0);
        T* to = samples ? mutable_data<T>(dx) + row * width : nullptr;
        const T* fetched = past ? nullptr : to;
        task.bits.for_each_piece(row, width, {from, fetched}, [&](int64_t at, const uint16_t* drawn, int64_t n) {
          backward(
              from + at, ahead + at, drawn, dropout.rows.threshold, dropout.rows.scale, samples ? to + at : nullptr, past,
              d_bias + at, n);
        });
      }
    });
  });
  return {dx, sums.of(0, width, dz, true)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def(
      "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor? samples, int key0, int key1,"
      " float probability, SymInt start) -> Tensor");
  m.def(
      "bias_dropout_add_backward(Tensor dz, Tensor? samples, int key0, int key1, float probability, SymInt start)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("bias_dropout_add", TORCH_BOX(&bias_dropout_add_cpu));
  m.impl("bias_dropout_add_backward", TORCH_BOX(&bias_dropout_add_backward_cpu));
}

}  // namespace megagpt2
