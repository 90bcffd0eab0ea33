// Random words on the CPU, tile by tile: a tile's words stay in the first cache level.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/instructions.h"
#include "common/tensor.h"
#include "philox/arguments.h"
#include "philox/philox.h"

namespace megagpt2 {

constexpr int64_t kTileBlocks = 64;     // counters, 1 KiB of bits: small, so that loads overlap the next tile's rounds
constexpr int64_t kTilesPerTask = 128;  // what is worth waking a thread for: 32,768 words

// Random bits for one element each: words of 32 or, two in a word, of 16.
template <typename Bits>
constexpr int64_t kPerBlock = sizeof(Words) / sizeof(Bits);

// Room for the bits of this many counters: the last vector of fill_bits may write past them.
template <typename Bits>
constexpr int64_t room_for_blocks(int64_t blocks) {
  return (blocks + 7) / 8 * 8 * kPerBlock<Bits>;
}

// The words of the counters block, block + 1, ...: see room_for_blocks. As memory of 16-bit numbers a word begins with its
// lower half: processors are little-endian.
void fill_bits(void* bits, uint64_t block, int64_t blocks, uint64_t sample, Key key);

// Calls tile(offset, bits, n) for pieces that make up [0, batch * count): bits are those of the n elements at `offset` of
// a contiguous [batch, count], whose rows hold elements start, start + 1, ... of their samples. Runs on torch's threads;
// which thread draws a tile decides nothing.
template <typename Bits, typename Tile>
void for_each_tile(const int64_t* samples, int64_t batch, int64_t start, int64_t count, Key key, const Tile& tile) {
  if (batch == 0 || count == 0) return;
  instructions();  // what it throws is lost on another thread
  constexpr int64_t kPer = kPerBlock<Bits>;
  const int64_t first = start / kPer, last = (start + count - 1) / kPer + 1;  // counters that cover a row
  const int64_t tiles = (last - first + kTileBlocks - 1) / kTileBlocks;
  torch::stable::parallel_for(0, batch * tiles, kTilesPerTask, [&](int64_t begin, int64_t end) {
    alignas(64) Bits bits[room_for_blocks<Bits>(kTileBlocks)];
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / tiles, block = first + number % tiles * kTileBlocks;
      const int64_t blocks = std::min(kTileBlocks, last - block);
      fill_bits(bits, block, blocks, static_cast<uint64_t>(samples[row]), key);
      const int64_t skip = std::max<int64_t>(start - kPer * block, 0);  // of the first counter, before `start`
      const int64_t n = std::min(kPer * blocks, start + count - kPer * block) - skip;
      tile(row * count + (kPer * block + skip - start), bits + skip, n);
    }
  });
}

// int64 [batch, count] with values in [0, 2**32): the bits of elements start .. start + count - 1 of each sample.
Tensor random_bits_cpu(int64_t key0, int64_t key1, Tensor samples, int64_t start, int64_t count);

}  // namespace megagpt2
