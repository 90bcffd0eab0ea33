#include "philox/philox.cuh"

namespace megagpt2 {
namespace {

struct StoreBits {
  Key key;
  int64_t* out;

  __device__ __forceinline__ void operator()(
      uint64_t group, uint64_t sample, int64_t offset, int begin, int end) const {
#pragma unroll
    for (int block = 0; block < kGroup / 4; ++block) {
      const Words drawn = philox(group * (kGroup / 4) + block, sample, key);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int i = 4 * block + word;
        if (i >= begin && i < end) out[offset + i] = drawn.w[word];
      }
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
  const StoreBits use{make_key(key0, key1), mutable_data<int64_t>(bits)};
  launch_for_each_group(data<int64_t>(rows), rows.numel(), start, count, use, stream_of(samples));
  return bits;
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) { m.impl("random_bits", TORCH_BOX(&random_bits_cuda)); }

}  // namespace megagpt2
