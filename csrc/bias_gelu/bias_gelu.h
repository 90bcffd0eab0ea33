// GELU of x + bias in the tanh form (Hendrycks and Gimpel 2016). megagpt2/kernels/bias_gelu.py has the contract and the
// reference.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace megagpt2 {

//     gelu(h) = h (1 + tanh(u)) / 2 = h / (1 + e)      e = exp(-2 u)      -2 u = h (a + b h^2)
//     gelu'(h) = s - h (e s) s (a + 3 b h^2)           s = 1 / (1 + e)
//
// The second form of gelu needs no tanh, and keeps its digits where tanh(u) is near -1 and the first loses them all.
// The slope is 1 above 10 and 0 below -10, to less than 1e-35, and taken as such: its factors would overflow there.
constexpr float kGeluA = -1.5957691216057308f;  // -2 sqrt(2 / pi)
constexpr float kGeluB = 0.044715f * kGeluA;

// x [..., width], bias [width] of x's type -> gelu(x + bias) like x.
Tensor bias_gelu_cpu(Tensor x, Tensor bias);
Tensor bias_gelu_cuda(Tensor x, Tensor bias);

// dy like x -> dx, d bias. x + bias is made again.
std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(Tensor dy, Tensor x, Tensor bias);
std::tuple<Tensor, Tensor> bias_gelu_backward_cuda(Tensor dy, Tensor x, Tensor bias);

}  // namespace megagpt2
