// Layer normalization over the last dimension (Ba et al. 2016), with fp32 sums. megagpt2/kernels/layer_norm.py has the
// contract and the reference.
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"

namespace megagpt2 {

// x [..., width], weight and bias [width] of x's type -> y like x, mean and rstd float32 [rows].
std::tuple<Tensor, Tensor, Tensor> layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, double epsilon);

// dy like x; dz like x or nothing, added to dx -> dx, d weight, d bias. x is read once.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, std::optional<Tensor> dz);

}  // namespace megagpt2
