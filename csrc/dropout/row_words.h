// Random words for the rows of an operator with dropout, on the CPU.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/buffer.h"
#include "dropout/row_dropout.h"
#include "philox/philox_cpu.h"

namespace megagpt2 {

// Draws for one thread.
class RowWords {
 public:
  explicit RowWords(const RowDropout& dropout) : dropout_(dropout) {}

  // Calls piece(offset, words, n) for the pieces that make up a row of `width` elements; `words`, one for each of the n
  // elements at `offset`, are null where nothing is dropped. While a piece's words are drawn, the piece of each of `rows`
  // is fetched: the rounds take about as long as the memory does.
  template <typename T, typename Piece>
  void for_each_piece(int64_t row, int64_t width, std::initializer_list<const T*> rows, const Piece& piece) {
    if (!dropout_.samples) return piece(int64_t{0}, static_cast<const uint32_t*>(nullptr), width);
    for (int64_t i = 0; i < width; i += kTileWords) {
      const int64_t n = std::min(kTileWords, width - i);
      for (const T* p : rows)
        for (int64_t j = 0; j < n; j += kCacheLine / sizeof(T)) __builtin_prefetch(p + i + j);
      const uint64_t first = dropout_.first_element(row) + i, block = first / 4, last = (first + n + 3) / 4;
      fill_words(words_, block, static_cast<int64_t>(last - block), dropout_.sample(row), dropout_.key);
      piece(i, words_ + first % 4, n);
    }
  }

 private:
  RowDropout dropout_;
  alignas(kCacheLine) uint32_t words_[words_of_blocks(kTileBlocks + 1)];
};

}  // namespace megagpt2
