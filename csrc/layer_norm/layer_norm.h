// Layer normalization over the last dimension (Ba et al. 2016), with fp32 sums. megagpt2/kernels/layer_norm.py has the
// contract and the reference.
#pragma once

#include <optional>
#include <tuple>

#include "common/buffer.h"
#include "common/tensor.h"

namespace megagpt2 {

// x [..., width], weight and bias [width] of x's type -> y like x, mean and rstd float32 [rows].
std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, double epsilon);
std::tuple<Tensor, Tensor, Tensor> layer_norm_cuda(Tensor x, Tensor weight, Tensor bias, double epsilon);

// What a row's loops on the CPU work in: two rows of floats, with the room of the widest vector beside each.
inline Buffer<float> row_buffer(int64_t width) { return Buffer<float>(2 * (width + 16)); }

inline Rows checked_rows(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const Rows sizes = rows_of(x);
  check_vector(weight, sizes.width, x.scalar_type(), "weight");
  check_vector(bias, sizes.width, x.scalar_type(), "bias");
  return sizes;
}

inline Rows checked_rows(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const std::optional<Tensor>& dz) {
  const Rows sizes = rows_of(x);
  check_same(x, dy, "x and dy");
  if (dz) check_same(x, *dz, "x and dz");
  check_vector(weight, sizes.width, x.scalar_type(), "weight");
  for (const Tensor& statistic : {mean, rstd}) {
    STD_TORCH_CHECK(
        statistic.numel() == sizes.rows && statistic.scalar_type() == ScalarType::Float && statistic.is_contiguous(),
        "mean and rstd must be float32 [", sizes.rows, "], as the forward pass gave them");
  }
  return sizes;
}

// dy like x; dz like x or nothing, added to dx -> dx, d weight, d bias. x is read once.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> dz);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> dz);

}  // namespace megagpt2
