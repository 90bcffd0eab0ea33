#include "split_sum/split_sum.h"

#include <torch/csrc/stable/library.h>

#define MEGAGPT2_LOOPS "split_sum/split_sum_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

constexpr int64_t kPerTask = 32768;  // what is worth waking a thread for

}  // namespace

void split_sum_add_cpu(Tensor high, Tensor low, Tensor x) {
  check_halves(high, low);
  check_term(x, high);
  const Tensor terms = packed(x);
  with_type(x.scalar_type(), [&](auto element) {
    using X = decltype(element);
    const auto add = MEGAGPT2_VARIANT(add_terms<X>);
    uint16_t *upper = mutable_data<uint16_t>(high), *lower = mutable_data<uint16_t>(low);
    torch::stable::parallel_for(0, high.numel(), kPerTask, [&](int64_t begin, int64_t end) {
      add(upper + begin, lower + begin, data<X>(terms) + begin, end - begin);
    });
  });
}

void split_sum_round_cpu(Tensor high, Tensor low, Tensor scale) {
  check_halves(high, low);
  check_scale(scale);
  const float factor = *data<float>(scale);
  const auto round = high.scalar_type() == ScalarType::Half ? MEGAGPT2_VARIANT(round_sums<Half>)
                                                            : MEGAGPT2_VARIANT(round_sums<BFloat16>);
  uint16_t* upper = mutable_data<uint16_t>(high);
  torch::stable::parallel_for(0, high.numel(), kPerTask, [&](int64_t begin, int64_t end) {
    round(upper + begin, data<uint16_t>(low) + begin, factor, end - begin);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(megagpt2, m) {
  m.def("split_sum_add_(Tensor(a!) high, Tensor(b!) low, Tensor x) -> ()");
  m.def("split_sum_round_(Tensor(a!) high, Tensor low, Tensor scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megagpt2, CPU, m) {
  m.impl("split_sum_add_", TORCH_BOX(&split_sum_add_cpu));
  m.impl("split_sum_round_", TORCH_BOX(&split_sum_round_cpu));
}

}  // namespace megagpt2
