#include "dropout/dropout.h"

#include <torch/csrc/stable/library.h>

#include "philox/philox_cpu.h"

#define MEGAGPT2_LOOPS "dropout/dropout_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

template <typename T>
void drop(
    const Tensor& x, const Tensor& y, const Tensor& samples, int64_t start, Key key, double probability) {
  const auto keep = MEGAGPT2_VARIANT(keep_tile<T>);
  const auto [threshold, scale] = kept(probability);
  const T* source = data<T>(x);
  T* target = mutable_data<T>(y);
  const int64_t batch = x.size(0), count = batch == 0 ? 0 : x.numel() / batch;
  for_each_tile<uint16_t>(
      data<int64_t>(samples), batch, start, count, key,
      [=, threshold = threshold, scale = scale](int64_t offset, const uint16_t* drawn, int64_t n) {
        keep(source + offset, target + offset, drawn, n, threshold, scale);
      });
}

}  // namespace

Tensor dropout_cpu(Tensor x, Tensor samples, int64_t key0, int64_t key1, double probability, int64_t start) {
  check_dropout(x, samples, probability, start);
  const Tensor rows = packed(samples), from = packed(x);
  Tensor y = empty_contiguous_like(x);
  const Key key = make_key(key0, key1);
  if (x.scalar_type() == ScalarType::Double) {
    drop<double>(from, y, rows, start, key, probability);
  } else {
    with_type(x.scalar_type(), [&](auto element) {
      drop<decltype(element)>(from, y, rows, start, key, probability);
    });
  }
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("dropout(Tensor x, Tensor samples, int key0, int key1, float probability, SymInt start) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout_cpu)); }

}  // namespace megagpt2
