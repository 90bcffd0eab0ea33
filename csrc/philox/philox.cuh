// Random words on a GPU: each thread draws a group of elements that begins at a multiple of the group, so that no
// counter is drawn twice.
#pragma once

#include "common/cuda.cuh"
#include "philox/arguments.h"

namespace megagpt2 {

constexpr int kGroup = 8, kGroupThreads = 256;

// Calls use(group, sample, offset, begin, end) for groups that cover [0, batch * count): element 8 group + i of the sample
// is at offset + i of a contiguous [batch, count], for i in [begin, end).
template <typename Use>
__global__ void __launch_bounds__(kGroupThreads) for_each_group(
    const int64_t* __restrict__ samples, int64_t batch, int64_t start, int64_t count, Use use) {
  const int64_t first = start / kGroup, groups = (start + count - 1) / kGroup + 1 - first;
  for (int64_t row = blockIdx.y; row < batch; row += gridDim.y) {
    const uint64_t sample = static_cast<uint64_t>(samples[row]);
    for (int64_t group = int64_t{blockIdx.x} * kGroupThreads + threadIdx.x; group < groups;
         group += int64_t{gridDim.x} * kGroupThreads) {
      const int64_t at = (first + group) * kGroup - start;  // below 0 where the row begins within the group
      const int begin = at < 0 ? static_cast<int>(-at) : 0;
      const int end = count - at < kGroup ? static_cast<int>(count - at) : kGroup;
      use(static_cast<uint64_t>(first + group), sample, row * count + at, begin, end);
    }
  }
}

template <typename Use>
void launch_for_each_group(
    const int64_t* samples, int64_t batch, int64_t start, int64_t count, Use use, cudaStream_t stream) {
  if (batch == 0 || count == 0) return;
  const dim3 grid(grid_of(count / kGroup / kGroupThreads + 1), grid_of(batch, 65535));
  for_each_group<<<grid, kGroupThreads, 0, stream>>>(samples, batch, start, count, use);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace megagpt2
