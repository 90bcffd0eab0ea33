// Random words on the CPU, tile by tile: a tile's words stay in the first cache level.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/instructions.h"
#include "common/tensor.h"
#include "philox/arguments.h"
#include "philox/philox.h"

namespace megagpt2 {

constexpr int64_t kTileBlocks = 64;     // counters, 1 KiB of words: small, so that loads overlap the next tile's rounds
constexpr int64_t kTileWords = 4 * kTileBlocks;
constexpr int64_t kTilesPerTask = 128;  // what is worth waking a thread for: 32,768 elements

// Room for the words of this many counters: the last vector of fill_words may write past them.
constexpr int64_t words_of_blocks(int64_t blocks) { return (blocks + 7) / 8 * 32; }
static_assert(words_of_blocks(kTileBlocks) == kTileWords);

// words[0 .. 4 * blocks) of counters block, block + 1, ...: see words_of_blocks.
void fill_words(uint32_t* words, uint64_t block, int64_t blocks, uint64_t sample, Key key);

// Calls tile(offset, words, n) for pieces that make up [0, batch * count): words are the bits of the n elements at
// `offset` of a contiguous [batch, count], whose rows hold elements start, start + 1, ... of their samples.
// Runs on torch's threads; which thread draws a tile decides nothing.
template <typename Tile>
void for_each_tile(const int64_t* samples, int64_t batch, int64_t start, int64_t count, Key key, const Tile& tile) {
  if (batch == 0 || count == 0) return;
  instructions();  // what it throws is lost on another thread
  const int64_t first = start / 4, last = (start + count - 1) / 4 + 1;  // counters that cover a row
  const int64_t tiles = (last - first + kTileBlocks - 1) / kTileBlocks;
  torch::stable::parallel_for(0, batch * tiles, kTilesPerTask, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t words[kTileWords];
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / tiles, block = first + number % tiles * kTileBlocks;
      const int64_t blocks = std::min(kTileBlocks, last - block);
      fill_words(words, block, blocks, static_cast<uint64_t>(samples[row]), key);
      const int64_t skip = std::max<int64_t>(start - 4 * block, 0);  // of the first counter, before `start`
      const int64_t n = std::min(4 * blocks, start + count - 4 * block) - skip;
      tile(row * count + 4 * block + skip - start, words + skip, n);
    }
  });
}

// int64 [batch, count] with values in [0, 2**32): the bits of elements start .. start + count - 1 of each sample.
Tensor random_bits_cpu(int64_t key0, int64_t key1, Tensor samples, int64_t start, int64_t count);

}  // namespace megagpt2
