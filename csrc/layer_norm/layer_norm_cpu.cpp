#include "layer_norm/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include "common/pairs.h"
#include "common/past_caches.h"
#include "common/sums_over_rows.h"

#define MEGAGPT2_LOOPS "layer_norm/layer_norm_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

constexpr int64_t kRowsPerTask = 16;

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, double epsilon) {
  const auto [rows, width] = checked_rows(x, weight, bias);
  const Tensor from = packed(x);
  Tensor y = empty_contiguous_like(x);
  Tensor mean = empty_floats(x, {rows}), rstd = empty_floats(x, {rows});
  const Tensor weights = in_order_of_pairs(as_floats(weight), x.scalar_type());
  const Tensor biases = in_order_of_pairs(as_floats(bias), x.scalar_type());
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto forward = MEGAGPT2_VARIANT(forward_rows<T>);
    const bool past = past_caches(2, data<T>(y), rows, width);
    torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      const Fence fence(past);
      Buffer<float> buffer = row_buffer(width);
      forward(
          data<T>(from) + begin * width, mutable_data<T>(y) + begin * width, past, mutable_data<float>(mean) + begin,
          mutable_data<float>(rstd) + begin, data<float>(weights), data<float>(biases), end - begin, width,
          static_cast<float>(epsilon), buffer.data());
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> dz) {
  const auto [rows, width] = checked_rows(dy, x, mean, rstd, weight, dz);
  const Tensor inputs = packed(x), gradients = packed(dy);
  const Tensor residual = dz ? packed(*dz) : inputs;
  Tensor dx = empty_contiguous_like(x);
  const Tensor weights = as_floats(weight);
  SumsOverRows sums(rows, 2 * width);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto backward = MEGAGPT2_VARIANT(backward_rows<T>);
    const bool past = past_caches(dz ? 4 : 3, data<T>(dx), rows, width);
    struct Task {
      Buffer<float> buffer;
      Fence fence;
    };
    const auto make_task = [&] { return Task{row_buffer(width), Fence(past)}; };
    sums.run(make_task, [&](Task& task, int64_t row, int64_t count, float* part) {
      const int64_t at = row * width;
      backward(
          data<T>(gradients) + at, data<T>(inputs) + at, dz ? data<T>(residual) + at : nullptr, data<float>(mean) + row,
          data<float>(rstd) + row, data<float>(weights), mutable_data<T>(dx) + at, past, part, part + width, count,
          width, task.buffer.data());
    });
  });
  return {dx, sums.of(0, width, x), sums.of(width, width, x)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float epsilon) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor? dz)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward_cpu));
}

}  // namespace megagpt2
