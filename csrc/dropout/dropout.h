// Dropout whose mask is drawn tile by tile, never stored: y = x * scale where the element's 16 bits are at least a
// threshold, else 0. The gradient is the same operator on the gradient. megagpt2/kernels/dropout.py is the reference.
//
// Two elements share a random word, the even one its low half: element e of a sample has the bits of element e / 2 in
// philox/philox.h, so that a counter serves eight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/tensor.h"
#include "philox/arguments.h"

namespace megagpt2 {

constexpr int kKeptPerCounter = 8;

// p, rounded to 2**-16, as the reference rounds it: what is kept keeps its expectation exactly.
struct Kept {
  uint32_t threshold;
  double scale;
};
inline Kept kept(double probability) {
  const double rounded = std::min(std::floor(probability * 65536.0 + 0.5), 65535.0);
  return {static_cast<uint32_t>(rounded), 65536.0 / (65536.0 - rounded)};
}

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
Tensor dropout_cuda(
    Tensor x, Tensor samples, int64_t key0, int64_t key1, double probability, int64_t start);

}  // namespace megagpt2
