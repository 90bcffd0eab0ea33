#include "layer_norm/layer_norm.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

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
  Tensor mean = empty(x, {rows}, ScalarType::Float), rstd = empty(x, {rows}, ScalarType::Float);
  const Tensor weights = as_floats(weight), biases = as_floats(bias);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto forward = MEGAGPT2_VARIANT(forward_rows<T>);
    torch::stable::parallel_for(0, rows, kRowsPerTask, [&](int64_t begin, int64_t end) {
      Buffer<float> buffer = row_buffer(width);
      forward(
          data<T>(from) + begin * width, mutable_data<T>(y) + begin * width, mutable_data<float>(mean) + begin,
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
  Tensor d_weight = empty(x, {width}, ScalarType::Float), d_bias = empty(x, {width}, ScalarType::Float);
  const Tensor weights = as_floats(weight);
  const int64_t step = rows_per_block(rows), blocks = (rows + step - 1) / step;
  Buffer<float> parts(2 * blocks * width);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto backward = MEGAGPT2_VARIANT(backward_rows<T>);
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> buffer = row_buffer(width);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block * step, at = row * width;
        float* part = parts.data() + 2 * block * width;
        backward(
            data<T>(gradients) + at, data<T>(inputs) + at, dz ? data<T>(residual) + at : nullptr,
            data<float>(mean) + row, data<float>(rstd) + row, data<float>(weights), mutable_data<T>(dx) + at, part,
            part + width, std::min(step, rows - row), width, buffer.data());
      }
    });
  });
  const auto add = MEGAGPT2_VARIANT(add_blocks);
  add(parts.data(), blocks, 2 * width, mutable_data<float>(d_weight), width);
  add(parts.data() + width, blocks, 2 * width, mutable_data<float>(d_bias), width);
  return {dx, torch::stable::to(d_weight, x.scalar_type()), torch::stable::to(d_bias, x.scalar_type())};
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
