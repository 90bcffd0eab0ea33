// As much of CUDA as csrc/*.cu use, on a CPU: a kernel's threads are run one after the other, so that what it computes can
// be tested where there is no GPU.
//
// Threads of a block take turns at barriers and shuffles, in a random order, some warps far ahead of others; blocks follow
// one another in a random order. So a barrier that is missing changes results from one run to the next. What ends the
// process: a barrier that some threads of the block never reach, a shuffle that some lanes of the warp never do, a pack
// that is not aligned, an index beyond an array's known size.
//
// What does not show: speed, a GPU's own approximations of functions, too few registers for a launch; two threads that
// add to one place between the same barriers; memory, shared or of a tensor, that is read beyond its end or before it is
// written, unless a test sees it in the result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

struct Index {
  unsigned x, y, z;
};

// Waits for all threads of the block.
void wait_for_block();
// What lane (mine ^ offset) of the warp gives.
float from_lane(float mine, int offset);

// kernel<<<blocks, threads, memory, stream>>>(...) is translated to Launch(blocks, threads, memory, stream).run(...).
class Launch {
 public:
  Launch(dim3 blocks, dim3 threads, size_t memory, void* stream);

  template <typename Kernel, typename... Arguments>
  void run(const Kernel& kernel, const Arguments&... arguments) const {
    run_threads([&] { kernel(arguments...); });
  }

 private:
  void run_threads(const std::function<void()>& thread) const;

  dim3 blocks_, threads_;
};

// There is one device, and it is current.
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

}  // namespace cuda_on_cpu

extern cuda_on_cpu::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline float __shfl_xor_sync(unsigned, float x, int offset) { return cuda_on_cpu::from_lane(x, offset); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The CUDA Math API's functions, with the edges that it documents.
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return exp2f(x * 1.44269504088896341f); }
inline float __fdividef(float x, float y) {
  const float size = fabsf(y);
  return size > 0x1p126f && size < INFINITY ? x * 0.0f : x / y;
}
__attribute__((optimize("fp-contract=off"))) inline float __fmul_rn(float x, float y) { return x * y; }

using cudaStream_t = void*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return 0;
}
