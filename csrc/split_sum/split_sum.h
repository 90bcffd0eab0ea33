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
void check_halves(const Tensor& high, const Tensor& low);
void check_term(const Tensor& x, const Tensor& high);
void check_scale(const Tensor& scale);

}  // namespace megagpt2
