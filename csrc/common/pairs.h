// Floats that lie beside rows of another type on the CPU, such as biases: in the order in which the loops take the rows'
// pairs of vectors apart (vector.h), but for those at the end which make no pair.
#pragma once

#include "common/tensor.h"

namespace megagpt2 {

// floats: contiguous float32 [n]. The tensor itself where that order is the elements' own.
Tensor in_order_of_pairs(const Tensor& floats, ScalarType rows);
// The way back.
Tensor in_order_of_elements(const Tensor& floats, ScalarType rows);

}  // namespace megagpt2
