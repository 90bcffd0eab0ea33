// Dropout whose mask is drawn tile by tile, never stored: y = x / (1 - p) where the element's bits are at least
// p * 2**32, else 0. The gradient is the same operator on the gradient. megagpt2/kernels/dropout.py is the reference.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace megagpt2 {

// x [batch, ...], float64, float32, bfloat16 or float16; samples int64 [batch]; the result is contiguous. x[i] holds
// elements start, start + 1, ... of sample samples[i]. Throws std::runtime_error for anything else.
Tensor dropout_cpu(
    Tensor x, Tensor samples, int64_t key0, int64_t key1, double probability, int64_t start);

}  // namespace megagpt2
