// Room to work in, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace megagpt2 {

constexpr int64_t kCacheLine = 64;

// `count` zeros that begin with a cache line: a vector that crosses from one line into the next is slow to load and store.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : lines_((count * sizeof(T) + kCacheLine - 1) / kCacheLine) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }

 private:
  struct alignas(kCacheLine) Line {
    char bytes[kCacheLine];
  };
  std::vector<Line> lines_;
};

}  // namespace megagpt2
