// What the CUDA operators share: numbers, 16-byte accesses, sums over warps and blocks, torch's stream.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "common/tensor.h"

namespace megagpt2 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__half(__half_raw{x.bits})); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half from_float(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// V elements that are read and written in one access: 16 bytes of them, or one where rows are not aligned to 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T value[V];
};
template <typename T>
constexpr int kPackOf = 16 / sizeof(T);

template <int V, typename T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& x) {
  *reinterpret_cast<Pack<T, V>*>(p) = x;
}

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows of `width` elements that begin at these addresses are made of whole, aligned packs.
template <typename T, typename... Pointers>
bool takes_packs(int64_t width, Pointers... pointers) {
  return width % kPackOf<T> == 0 && (is_aligned(pointers) && ...);
}

// Calls function(std::integral_constant<int, V>) with the widest pack that these rows allow.
template <typename T, typename Function, typename... Pointers>
void with_pack(int64_t width, const Function& function, Pointers... pointers) {
  if (takes_packs<T>(width, pointers...)) {
    function(std::integral_constant<int, kPackOf<T>>{});
  } else {
    function(std::integral_constant<int, 1>{});
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The sum, or the maximum, over all threads of a block of whole warps, on each of them, in an order that does not change.
// `shared` has 32 floats that no other thread still reads: two calls in a row need two such pieces.
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < (blockDim.x + kWarp - 1) / kWarp ? shared[lane] : 0.0f);
}
// Two sums at a time, for one barrier; `shared` has two such pieces.
struct Two {
  float first, second;
};
__device__ __forceinline__ Two block_sum(Two x, float (*shared)[kWarp]) {
  x = {warp_sum(x.first), warp_sum(x.second)};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    shared[0][warp] = x.first;
    shared[1][warp] = x.second;
  }
  __syncthreads();
  const bool there = lane < (blockDim.x + kWarp - 1) / kWarp;
  return {warp_sum(there ? shared[0][lane] : 0.0f), warp_sum(there ? shared[1][lane] : 0.0f)};
}
__device__ __forceinline__ float block_max(float x, float* shared) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  return warp_max(lane < (blockDim.x + kWarp - 1) / kWarp ? shared[lane] : -INFINITY);
}

// The stream that torch's user chose on the tensor's device. The device must be current: DeviceGuard.
inline cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

using torch::stable::accelerator::DeviceGuard;

// Blocks of a grid that strides over `items`: enough to fill any device, never more than a grid may have.
inline unsigned grid_of(int64_t items, int64_t most = 1 << 16) {
  return static_cast<unsigned>(items < 1 ? 1 : items < most ? items : most);
}

}  // namespace megagpt2
