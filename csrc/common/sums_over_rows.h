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
  // What column_sums.h has, for the instructions in use.
  struct Loops {
    void (*settle)(float* part, float* sum, float* rest, int64_t n);
    void (*add_blocks)(float* sums, int64_t blocks, int64_t n);
  };

  SumsOverRows(int64_t rows, int64_t columns, Loops loops)
      : rows_(rows),
        columns_(columns),
        step_(rows_per_block(rows)),
        blocks_((rows + step_ - 1) / step_),
        loops_(loops),
        sums_(2 * blocks_ * columns) {}

  // Calls add(task, row, count, part) on torch's threads for pieces of `count` rows from `row` on: it adds what they
  // are in each column to `part`. task: what make_task() gave the thread.
  template <typename MakeTask, typename Add>
  void run(const MakeTask& make_task, const Add& add) {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      auto task = make_task();
      Buffer<float> part(columns_);
      for (int64_t block = begin; block < end; ++block) {
        float* sum = sums_.data() + 2 * block * columns_;
        const int64_t last = std::min(rows_, (block + 1) * step_);
        for (int64_t row = block * step_; row < last; row += kRowsTogether) {
          add(task, row, std::min(kRowsTogether, last - row), part.data());
          loops_.settle(part.data(), sum, sum + columns_, columns_);
        }
      }
    });
    loops_.add_blocks(sums_.data(), blocks_, columns_);
  }

  // After run(): the sums of columns first .. first + count - 1, as a vector of `like`'s type.
  Tensor of(int64_t first, int64_t count, const Tensor& like) {
    Tensor total = empty(like, {count}, ScalarType::Float);
    float* to = mutable_data<float>(total);
    if (blocks_ > 0) {
      std::copy_n(sums_.data() + first, count, to);
    } else {
      std::fill_n(to, count, 0.0f);
    }
    return torch::stable::to(total, like.scalar_type());
  }

 private:
  static constexpr int64_t kRowsTogether = 16;
  int64_t rows_, columns_, step_, blocks_;
  Loops loops_;
  Buffer<float> sums_;
};

}  // namespace megagpt2
