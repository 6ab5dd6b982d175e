// The layout of the tiles of the half-precision search.
#pragma once

#include "portable.h"

namespace unicode_fast {

// Dimensions in one pass of the main loop: 128 bytes of half precision. Widths are padded to a multiple of this.
constexpr int kStepWidth = 64;

UNICODE_FAST_BOTH int64_t round_to(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Byte offset of the 16-byte piece `piece` of row `row` in a tile of `width` halves a row. Eight rows at the same piece
// lie in different banks.
UNICODE_FAST_BOTH uint32_t piece_offset(int row, int piece, int width) {
  return static_cast<uint32_t>(row) * width * 2 + (static_cast<uint32_t>(piece ^ (row & 7)) << 4);
}

// How the tiles of the codebook are dealt out to blocks.
struct Splits {
  int count;      // splits
  int per_split;  // tiles in each but the last
};

// The number of splits, at most `most`, with the least work for a multiprocessor. Its work is rounds of `blocks` blocks
// that run at once. A block has per_split tiles, and reading its rows counts as one tile more.
UNICODE_FAST_BOTH Splits split_tiles(int64_t tiles, int64_t row_tiles, int64_t blocks, int most) {
  Splits best{1, static_cast<int>(tiles)};
  int64_t least = INT64_MAX;
  for (int64_t wanted = 1; wanted <= most && wanted <= tiles; ++wanted) {
    const int64_t per_split = (tiles + wanted - 1) / wanted, count = (tiles + per_split - 1) / per_split;
    const int64_t work = (row_tiles * count + blocks - 1) / blocks * (per_split + 1);
    if (work >= least) continue;
    least = work;
    best = {static_cast<int>(count), static_cast<int>(per_split)};
  }
  return best;
}

}  // namespace unicode_fast
