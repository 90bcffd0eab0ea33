#include "bias_gelu/bias_gelu.h"

#include <torch/csrc/stable/library.h>

#include "common/past_caches.h"
#include "common/sums_over_rows.h"

#define MEGAGPT2_LOOPS "bias_gelu/bias_gelu_loops.h"
#include "common/variants.h"

namespace megagpt2 {

Tensor bias_gelu_cpu(Tensor x, Tensor bias) {
  const auto [rows, width] = rows_of(x);
  check_vector(bias, width, x.scalar_type(), "bias");
  const Tensor from = packed(x), biases = as_floats(bias);
  Tensor y = empty_contiguous_like(x);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto forward = MEGAGPT2_VARIANT(bias_gelu_rows<T>);
    const bool past = past_caches(2, data<T>(y), rows, width);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      const Fence fence(past);
      const int64_t at = begin * width;
      forward(data<T>(from) + at, data<float>(biases), mutable_data<T>(y) + at, past, end - begin, width);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(Tensor dy, Tensor x, Tensor bias) {
  const auto [rows, width] = rows_of(x);
  check_same(x, dy, "x and dy");
  check_vector(bias, width, x.scalar_type(), "bias");
  const Tensor inputs = packed(x), gradients = packed(dy), biases = as_floats(bias);
  Tensor dx = empty_contiguous_like(x);
  SumsOverRows sums(rows, width);
  with_type(x.scalar_type(), [&, rows = rows, width = width](auto element) {
    using T = decltype(element);
    const auto backward = MEGAGPT2_VARIANT(bias_gelu_backward_rows<T>);
    const bool past = past_caches(3, data<T>(dx), rows, width);
    sums.run([&] { return Fence(past); }, [&](Fence&, int64_t row, int64_t count, float* d_bias) {
      const int64_t at = row * width;
      backward(
          data<T>(gradients) + at, data<T>(inputs) + at, data<float>(biases), mutable_data<T>(dx) + at, past, d_bias,
          count, width);
    });
  });
  return {dx, sums.of(0, width, x)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor bias) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward_cpu));
}

}  // namespace megagpt2
