#include "cross_entropy/cross_entropy.h"

#include <torch/csrc/stable/library.h>

#define MEGAGPT2_LOOPS "cross_entropy/cross_entropy_loops.h"
#include "common/variants.h"

namespace megagpt2 {

Tensor cross_entropy_statistics_cpu(Tensor logits, Tensor targets, int64_t first, int64_t words) {
  check_chunk(logits, targets, words);
  const Tensor from = packed(logits), wanted = packed(targets);
  const int64_t rows = logits.size(0), width = logits.size(1);
  Tensor statistics = empty_floats(logits, {3, rows});
  float* out = mutable_data<float>(statistics);
  with_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto run = MEGAGPT2_VARIANT(statistics_rows<T>);
    torch::stable::parallel_for(0, rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
      run(data<T>(from) + begin * width, data<int64_t>(wanted) + begin, out + begin, out + rows + begin,
          out + 2 * rows + begin, end - begin, width, first, words);
    });
  });
  return statistics;
}

void cross_entropy_gradient_cpu(
    Tensor logits, Tensor targets, Tensor maximum, Tensor normalizer, int64_t first, int64_t words, double factor) {
  check_gradient(logits, targets, maximum, normalizer, words);
  const Tensor wanted = packed(targets), peaks = packed(maximum), sums = packed(normalizer);
  const int64_t width = logits.size(1);
  with_type(logits.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto run = MEGAGPT2_VARIANT(gradient_rows<T>);
    T* rows = mutable_data<T>(logits);
    torch::stable::parallel_for(0, logits.size(0), rows_per_task(width), [&](int64_t begin, int64_t end) {
      run(rows + begin * width, data<int64_t>(wanted) + begin, data<float>(peaks) + begin, data<float>(sums) + begin,
          end - begin, width, first, words, static_cast<float>(factor));
    });
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("cross_entropy_statistics(Tensor logits, Tensor targets, SymInt first, SymInt words) -> Tensor");
  m.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, Tensor maximum, Tensor normalizer, SymInt first,"
      " SymInt words, float factor=1.0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics_cpu));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_cpu));
}

}  // namespace megagpt2
