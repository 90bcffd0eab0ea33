// residual + dropout(x + bias): how a layer's output joins the residual stream. megagpt2/kernels/bias_dropout_add.py has
// the contract and the reference.
#pragma once

#include <optional>
#include <tuple>

#include "common/tensor.h"
#include "dropout/row_dropout.h"

namespace megagpt2 {

// x [batch, ..., width], bias [width] or nothing, residual like x, samples int64 [batch] or nothing -> z like x.
// Without samples nothing is dropped.
Tensor bias_dropout_add_cpu(
    Tensor x, std::optional<Tensor> bias, Tensor residual, std::optional<Tensor> samples, int64_t key0, int64_t key1,
    double probability, int64_t start);

// dz like z -> dx, d bias. Without samples dx is dz, and the result is empty in its place.
std::tuple<Tensor, Tensor> bias_dropout_add_backward_cpu(
    Tensor dz, std::optional<Tensor> samples, int64_t key0, int64_t key1, double probability, int64_t start);

}  // namespace megagpt2
