// Sums over rows on the CPU, as those of a bias's gradient: their bits depend on the shape alone, and their error hardly
// on the number of rows. A few rows are added up as they come; that part is added to its block's sum, and the blocks'
// sums to one another, together with what each addition rounds away.
#pragma once

#include <algorithm>

#include "common/buffer.h"
#include "common/tensor.h"

namespace megagpt2 {

class SumsOverRows {
 public:
  SumsOverRows(int64_t rows, int64_t columns);

  // Calls add(task, row, count, part) on torch's threads for pieces of `count` rows from `row` on: it adds what they
  // are in each column to `part`. task: what make_task() gave the thread.
  template <typename MakeTask, typename Add>
  void run(const MakeTask& make_task, const Add& add) {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      auto task = make_task();
      Buffer<float> part(columns_);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t last = std::min(rows_, (block + 1) * step_);
        for (int64_t row = block * step_; row < last; row += kRowsTogether) {
          add(task, row, std::min(kRowsTogether, last - row), part.data());
          settle(part.data(), block);
        }
      }
    });
    add_blocks();
  }

  // After run(): the sums of columns first .. first + count - 1, as a vector of `like`'s type. in_pairs: whether add() put
  // them into the order of pairs of that type (pairs.h).
  Tensor of(int64_t first, int64_t count, const Tensor& like, bool in_pairs = false);

 private:
  static constexpr int64_t kRowsTogether = 16;

  void settle(float* part, int64_t block);
  void add_blocks();

  int64_t rows_, columns_, step_, blocks_;
  Buffer<float> sums_;
};

}  // namespace megagpt2
