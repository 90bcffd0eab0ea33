// The 16-bit floating-point types as they lie in memory.
#pragma once

#include <cstdint>

namespace megagpt2 {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace megagpt2
