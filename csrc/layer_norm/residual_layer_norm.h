// z = residual + dropout(x + bias), y = layer_norm(z): a layer's output joins the residual stream, which the next layer
// gets normalized. megagpt2/kernels/residual_layer_norm.py has the contract and the reference.
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "dropout/row_dropout.h"

namespace megagpt2 {

// x [batch, ..., width], bias [width] or nothing, residual like x, weight and norm_bias [width], samples int64 [batch] or
// nothing -> z and y like x, mean and rstd of z, float32 [rows]. Without samples nothing is dropped.
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_layer_norm_cpu(
    Tensor x, std::optional<Tensor> bias, Tensor residual, Tensor weight, Tensor norm_bias, double epsilon,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start);

// dy like z; dz like z or nothing -> d residual, dx, d bias, d weight, d norm_bias. z is read once. Without samples dx is
// d residual, and the result is empty in its place.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_layer_norm_backward_cpu(
    Tensor dy, std::optional<Tensor> dz, Tensor z, Tensor mean, Tensor rstd, Tensor weight,
    std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start);

}  // namespace megagpt2
