#include "common/sums_over_rows.h"

#include "common/pairs.h"

#define MEGAGPT2_LOOPS "common/sums_over_rows_loops.h"
#include "common/variants.h"

namespace megagpt2 {
namespace {

// Sums are made in blocks that depend on the shape alone, and the blocks are added in order: their bits depend on
// neither the number of threads nor their timing.
constexpr int64_t kMostBlocks = 64, kFewestRows = 8;

}  // namespace

SumsOverRows::SumsOverRows(int64_t rows, int64_t columns)
    : rows_(rows),
      columns_(columns),
      step_(std::max((rows + kMostBlocks - 1) / kMostBlocks, kFewestRows)),
      blocks_(std::max<int64_t>((rows + step_ - 1) / step_, 1)),
      sums_(2 * blocks_ * columns) {}

void SumsOverRows::settle(float* part, int64_t block) {
  float* sum = sums_.data() + 2 * block * columns_;
  MEGAGPT2_VARIANT(settle)(part, sum, sum + columns_, columns_);
}

void SumsOverRows::add_blocks() { MEGAGPT2_VARIANT(add_blocks)(sums_.data(), blocks_, columns_); }

Tensor SumsOverRows::of(int64_t first, int64_t count, const Tensor& like, bool in_pairs) {
  Tensor total = empty_floats(like, {count});
  std::copy_n(sums_.data() + first, count, mutable_data<float>(total));
  if (in_pairs) total = in_order_of_elements(total, like.scalar_type());
  return torch::stable::to(total, like.scalar_type());
}

}  // namespace megagpt2
