// GELU of x + bias in the tanh form (Hendrycks and Gimpel 2016). megagpt2/kernels/bias_gelu.py has the contract and the
// reference.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace megagpt2 {

// x [..., width], bias [width] of x's type -> gelu(x + bias) like x.
Tensor bias_gelu_cpu(Tensor x, Tensor bias);

// dy like x -> dx, d bias. x + bias is made again.
std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(Tensor dy, Tensor x, Tensor bias);

}  // namespace megagpt2
