// A sum in float32 whose bits lie in two tensors of 16: the upper half where the result will be, in bfloat16 or float16,
// the lower half beside it. megagpt2/kernels/split_sum.py has the contract and the reference.
#pragma once

#include "common/tensor.h"

namespace megagpt2 {

// high: bfloat16 or float16, whose bits are the upper halves; low: int16; both contiguous and of x's shape. x: float32, or
// of high's type. Adds x.
void split_sum_add_cpu(Tensor high, Tensor low, Tensor x);

// high becomes sum * scale, rounded once; scale: float32, one element. low is not needed any more.
void split_sum_round_cpu(Tensor high, Tensor low, Tensor scale);

// Throws std::runtime_error unless they are halves of a sum.
inline void check_halves(const Tensor& high, const Tensor& low) {
  STD_TORCH_CHECK(
      high.scalar_type() == ScalarType::BFloat16 || high.scalar_type() == ScalarType::Half,
      "high must be bfloat16 or float16: it will hold the rounded sum");
  STD_TORCH_CHECK(
      low.scalar_type() == ScalarType::Short && same_shape(low, high) && high.is_contiguous() && low.is_contiguous(),
      "low must be int16, of the shape of high, and both contiguous");
}

inline void check_term(const Tensor& x, const Tensor& high) {
  STD_TORCH_CHECK(
      same_shape(x, high) && (x.scalar_type() == ScalarType::Float || x.scalar_type() == high.scalar_type()),
      "x must have the shape of high, in float32 or in the type of high");
}

inline void check_scale(const Tensor& scale) {
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, "scale must be one float32");
}

}  // namespace megagpt2
