// What the operators that draw random words are asked to draw, checked: std::runtime_error says what is wrong.
#pragma once

#include <cstdint>
#include <limits>

#include "common/tensor.h"
#include "philox/philox.h"

namespace megagpt2 {

// The two key words of an operator's arguments.
inline Key make_key(int64_t key0, int64_t key1) {
  constexpr int64_t largest = std::numeric_limits<uint32_t>::max();
  STD_TORCH_CHECK(
      key0 >= 0 && key0 <= largest && key1 >= 0 && key1 <= largest,
      "the key is (", key0, ", ", key1, "): give two words in [0, 2**32), as key_of makes them");
  return {static_cast<uint32_t>(key0), static_cast<uint32_t>(key1)};
}

// Sample numbers, and a place that elements can have: 256 at once may be drawn past the last.
inline void check_place(const Tensor& samples, int64_t start, int64_t count) {
  STD_TORCH_CHECK(
      samples.scalar_type() == ScalarType::Long && samples.dim() == 1, "give the number of each sample, int64 [batch]");
  STD_TORCH_CHECK(
      start >= 0 && count >= 0 && start <= std::numeric_limits<int64_t>::max() - 256 - count,
      "start is ", start, " and count is ", count, ": elements have numbers from 0 to 2**63 - 257");
}

}  // namespace megagpt2
