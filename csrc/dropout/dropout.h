// Dropout whose mask is drawn tile by tile, never stored: y = x / (1 - p) where the element's bits are at least
// p * 2**32, else 0. The gradient is the same operator on the gradient. megagpt2/kernels/dropout.py is the reference.
#pragma once

#include <cstdint>

#include "common/tensor.h"
#include "philox/arguments.h"

namespace megagpt2 {

// Throws std::runtime_error unless these are arguments of a dropout of x [batch, ...].
inline void check_dropout(const Tensor& x, const Tensor& samples, double probability, int64_t start) {
  STD_TORCH_CHECK(
      probability >= 0.0 && probability < 1.0, "probability is ", probability, ": it must be at least 0 and below 1");
  STD_TORCH_CHECK(
      x.dim() >= 1 && x.size(0) == samples.numel(),
      "x has ", x.dim() >= 1 ? x.size(0) : 0, " rows but there are ", samples.numel(),
      " samples: give one for each x[i]");
  STD_TORCH_CHECK(samples.device() == x.device(), "x and samples must be on one device");
  check_place(samples, start, x.size(0) == 0 ? 0 : x.numel() / x.size(0));
}

// x [batch, ...], float64, float32, bfloat16 or float16; samples int64 [batch]; the result is contiguous. x[i] holds
// elements start, start + 1, ... of sample samples[i]. Throws std::runtime_error for anything else.
Tensor dropout_cpu(
    Tensor x, Tensor samples, int64_t key0, int64_t key1, double probability, int64_t start);

}  // namespace megagpt2
