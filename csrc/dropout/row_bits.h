// Random bits for the rows of an operator with dropout, on the CPU.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/buffer.h"
#include "dropout/dropout.h"
#include "dropout/row_dropout.h"
#include "philox/philox_cpu.h"

namespace megagpt2 {

// Room that draw_row needs for n elements: the first may be any of its counter's.
constexpr int64_t room_for_row(int64_t n) { return room_for_blocks<uint16_t>(n / kKeptPerCounter + 2); }

// The bits of elements `offset` .. offset + n - 1 of a row, which lie in `room`.
inline const uint16_t* draw_row(const RowDropout& dropout, int64_t row, int64_t offset, int64_t n, uint16_t* room) {
  const uint64_t first = dropout.first_element(row) + offset, block = first / kKeptPerCounter;
  const uint64_t end = (first + n + kKeptPerCounter - 1) / kKeptPerCounter;
  fill_bits(room, block, static_cast<int64_t>(end - block), dropout.sample(row), dropout.key);
  return room + first % kKeptPerCounter;
}

// Draws for one thread.
class RowBits {
 public:
  explicit RowBits(const RowDropout& dropout) : dropout_(dropout) {}

  // Calls piece(offset, drawn, n) for the pieces that make up a row of `width` elements; `drawn`, the bits of the n
  // elements at `offset`, are null where nothing is dropped. While a piece's bits are drawn, the piece of each of `rows`
  // that is not null is fetched: the rounds take about as long as the memory does.
  template <typename T, typename Piece>
  void for_each_piece(int64_t row, int64_t width, std::initializer_list<const T*> rows, const Piece& piece) {
    if (!dropout_.samples) return piece(int64_t{0}, static_cast<const uint16_t*>(nullptr), width);
    for (int64_t i = 0; i < width; i += kPiece) {
      const int64_t n = std::min(kPiece, width - i);
      for (const T* p : rows)
        for (int64_t j = 0; p && j < n; j += kCacheLine / sizeof(T)) __builtin_prefetch(p + i + j);
      piece(i, draw_row(dropout_, row, i, n, bits_), n);
    }
  }

 private:
  static constexpr int64_t kPiece = kTileBlocks * kKeptPerCounter;

  RowDropout dropout_;
  alignas(kCacheLine) uint16_t bits_[room_for_row(kPiece)];
};

}  // namespace megagpt2
