// Where the tiles of the half-precision search lie.
#pragma once

#include "portable.h"

namespace unicode_fast {

// Dimensions in one step of the main loop, and the multiple that widths are padded to: 128 bytes of half precision.
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

UNICODE_FAST_BOTH Splits split_tiles(int64_t tiles, int64_t row_tiles, int64_t blocks_wanted, int most) {
  int64_t count = (blocks_wanted + row_tiles - 1) / row_tiles;
  if (count > most) count = most;
  if (count > tiles) count = tiles;
  if (count < 1) count = 1;
  const int64_t per_split = (tiles + count - 1) / count;
  return {static_cast<int>((tiles + per_split - 1) / per_split), static_cast<int>(per_split)};
}

}  // namespace unicode_fast
