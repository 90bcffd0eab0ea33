#include "philox/philox.cuh"

namespace megagpt2 {
namespace {

struct StoreBits {
  int64_t* out;

  __device__ __forceinline__ void operator()(
      int64_t offset, const uint32_t (&words)[kGroup], int begin, int end) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i >= begin && i < end) out[offset + i] = words[i];
    }
  }
};

}  // namespace

// As random_bits_cpu.
Tensor random_bits_cuda(int64_t key0, int64_t key1, Tensor samples, int64_t start, int64_t count) {
  check_place(samples, start, count);
  const Tensor rows = packed(samples);
  Tensor bits = empty(samples, {rows.numel(), count});
  const DeviceGuard guard(samples.get_device_index());
  launch_for_each_group(
      data<int64_t>(rows), rows.numel(), start, count, make_key(key0, key1), StoreBits{mutable_data<int64_t>(bits)},
      stream_of(samples));
  return bits;
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) { m.impl("random_bits", TORCH_BOX(&random_bits_cuda)); }

}  // namespace megagpt2
