// Results that are written past the caches: what an operator reads and writes together is more than the last cache
// holds, so that nothing of them would be left there for who reads them next, from their beginning on. Written so a line
// need not be read before.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "common/buffer.h"
#include "common/instructions.h"

#ifdef MEGAGPT2_X86
#include <immintrin.h>
#endif

namespace megagpt2 {

// What a core reaches of the last cache of most servers. Not asked of the system: a virtual machine may say what all of
// the real one's caches hold. The environment variable MEGAGPT2_LAST_CACHE says another number; read once.
inline int64_t bytes_of_last_cache() {
  static const int64_t bytes = [] {
    const char* asked = std::getenv("MEGAGPT2_LAST_CACHE");
    return asked ? static_cast<int64_t>(std::atoll(asked)) : int64_t{32} << 20;
  }();
  return bytes;
}

// Whether `to` [rows, width] is written so, by an operator that moves so many tensors of its size. Every row must begin
// with a cache line.
template <typename T>
bool past_caches(int64_t tensors, const T* to, int64_t rows, int64_t width) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  return tensors * rows * row_bytes > bytes_of_last_cache() && row_bytes % kCacheLine == 0 &&
      reinterpret_cast<uintptr_t>(to) % kCacheLine == 0;
}

// At the end of its life what this thread has written past the caches is there for the others.
class Fence {
 public:
  explicit Fence(bool past) : past_(past) {}
  Fence(const Fence&) = delete;
  ~Fence() {
#ifdef MEGAGPT2_X86
    if (past_) _mm_sfence();
#endif
  }

 private:
  bool past_;
};

}  // namespace megagpt2
