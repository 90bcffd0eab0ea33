#include "dropout/row_dropout.h"

#include <algorithm>

#include "dropout/dropout.h"
#include "philox/arguments.h"

namespace megagpt2 {

DropoutArguments dropout_arguments(
    const Tensor& x, const std::optional<Tensor>& samples, int64_t key0, int64_t key1, double probability,
    int64_t start) {
  if (!samples) return {};
  check_dropout(x, *samples, probability, start);
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [batch, ..., width] where samples are given");
  const Tensor numbers = packed(*samples);
  RowDropout rows;
  rows.samples = data<int64_t>(numbers);
  rows.key = make_key(key0, key1);
  rows.start = start;
  rows.width = x.size(x.dim() - 1);
  for (int64_t i = 1; i + 1 < x.dim(); ++i) rows.rows_per_sample *= std::max<int64_t>(x.size(i), 1);
  const Kept rounded = kept(probability);
  rows.threshold = rounded.threshold;
  rows.scale = static_cast<float>(rounded.scale);
  return {numbers, rows};
}

}  // namespace megagpt2
