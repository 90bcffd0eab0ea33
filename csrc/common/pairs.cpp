#include "common/pairs.h"

#define MEGAGPT2_LOOPS "common/pairs_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

using Move = void (*)(const float* from, float* to, int64_t n);

Tensor moved(const Tensor& floats, Move move) {
  Tensor result = empty(floats, {floats.numel()});
  move(data<float>(floats), mutable_data<float>(result), floats.numel());
  return result;
}

}  // namespace

Tensor in_order_of_pairs(const Tensor& floats, ScalarType rows) {
  return rows == ScalarType::BFloat16 ? moved(floats, MEGAGPT2_VARIANT(to_pairs)) : floats;
}

Tensor in_order_of_elements(const Tensor& floats, ScalarType rows) {
  return rows == ScalarType::BFloat16 ? moved(floats, MEGAGPT2_VARIANT(to_elements)) : floats;
}

}  // namespace megagpt2
