// Dropout inside operators that work on rows: what is drawn for the rows of x [batch, ..., width], whose x[i] holds
// elements start, start + 1, ... of sample samples[i].
#pragma once

#include <cstdint>
#include <optional>

#include "common/tensor.h"
#include "philox/philox.h"

namespace megagpt2 {

// Plain values, for the device too.
struct RowDropout {
  const int64_t* samples = nullptr;  // null: nothing is dropped
  Key key = {};
  int64_t start = 0, width = 0, rows_per_sample = 1;
  uint32_t threshold = 0;
  float scale = 1.0f;

  // The number of the row's first element, in its sample.
  MEGAGPT2_HOST_DEVICE uint64_t first_element(int64_t row) const {
    return static_cast<uint64_t>(start + row % rows_per_sample * width);
  }
  MEGAGPT2_HOST_DEVICE uint64_t sample(int64_t row) const {
    return static_cast<uint64_t>(samples[row / rows_per_sample]);
  }
};

// The arguments of an operator with dropout, checked: std::runtime_error tells what is wrong. Without samples there is
// no dropout, whatever the probability.
struct DropoutArguments {
  std::optional<Tensor> samples;  // contiguous: `rows` points into it
  RowDropout rows;
};
DropoutArguments dropout_arguments(
    const Tensor& x, const std::optional<Tensor>& samples, int64_t key0, int64_t key1, double probability,
    int64_t start);

}  // namespace megagpt2
