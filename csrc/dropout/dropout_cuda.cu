#include "dropout/dropout.h"

#include "dropout/row_dropout.cuh"
#include "philox/philox.cuh"

namespace megagpt2 {
namespace {

// The product is made in float for the 16-bit types and rounded once.
template <typename T>
__device__ __forceinline__ T scaled(T x, double scale) {
  return from_float<T>(to_float(x) * static_cast<float>(scale));
}
template <>
__device__ __forceinline__ double scaled(double x, double scale) {
  return x * scale;
}

template <typename T>
struct Drop {
  const T* x;
  T* y;
  Key key;
  Kept kept;

  // A group's elements share a counter.
  __device__ __forceinline__ void operator()(
      uint64_t group, uint64_t sample, int64_t offset, int begin, int end) const {
    static_assert(kGroup == kKeptPerCounter);
    constexpr int V = kPackOf<T>;
    const unsigned bits = kept_bits<kGroup>(group * kGroup, sample, key, kept.threshold);
    const bool whole = begin == 0 && end == kGroup;
    if (whole && (reinterpret_cast<uintptr_t>(x + offset) | reinterpret_cast<uintptr_t>(y + offset)) % 16 == 0) {
#pragma unroll
      for (int k = 0; k < kGroup; k += V) {
        Pack<T, V> part = load_pack<V>(x + offset + k);
#pragma unroll
        for (int v = 0; v < V; ++v) part.value[v] = bits >> (k + v) & 1u ? scaled(part.value[v], kept.scale) : T{};
        store_pack<V>(y + offset + k, part);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i >= begin && i < end) y[offset + i] = bits >> i & 1u ? scaled(x[offset + i], kept.scale) : T{};
    }
  }
};

template <typename T>
void drop(const Tensor& x, const Tensor& y, const Tensor& samples, int64_t start, Key key, double probability) {
  const int64_t batch = x.size(0), count = batch == 0 ? 0 : x.numel() / batch;
  const Drop<T> use{data<T>(x), mutable_data<T>(y), key, kept(probability)};
  launch_for_each_group(data<int64_t>(samples), batch, start, count, use, stream_of(x));
}

}  // namespace

Tensor dropout_cuda(Tensor x, Tensor samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  check_dropout(x, samples, probability, start);
  const Tensor rows = packed(samples), from = packed(x);
  Tensor y = empty_contiguous_like(x);
  const Key key = make_key(key0, key1);
  const DeviceGuard guard(x.get_device_index());
  if (x.scalar_type() == ScalarType::Double) {
    drop<double>(from, y, rows, start, key, probability);
  } else {
    with_type(x.scalar_type(), [&](auto element) {
      drop<decltype(element)>(from, y, rows, start, key, probability);
    });
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CUDA, m) { m.impl("dropout", TORCH_BOX(&dropout_cuda)); }

}  // namespace megagpt2
