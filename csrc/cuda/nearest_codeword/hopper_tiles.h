// The layout of the operands of the search with wgmma, the same in global and in shared memory.
//
// A tile is kTileCodewords codewords: one block of kStepWidth dimensions after the other, with 128 bytes for each
// codeword. The squared norms follow the last block. The rows of a warpgroup lie in blocks in the same way. So one copy
// of contiguous bytes fills a stage: a block of a tile, the last one with the norms.
#pragma once

#include "../../common/tiles.h"
#include "candidates.h"

namespace unicode_fast {

constexpr int kTileCodewords = 256, kGroupRows = 64, kGroups = 2;
// Tiles of rows that a persistent grid keeps: two in shared memory; or, of wider rows, one there and two in global
// memory.
constexpr int kMostBuffers = 2, kStagedBuffers = 3;
// The threads that prepare rows there, eight to a row, and the widest of these rows. A warp reads its next rows ahead.
constexpr int kPreparers = 96, kWidestStaged = 256, kRowAheadBytes = kPreparers / 8 * 4 * kWidestStaged,
              kAheadBytes = kRowAheadBytes + 4 * kWidestStaged + 16 * kGroupRows;
constexpr int kBlockBytes = kTileCodewords * 2 * kStepWidth, kNormBytes = kTileCodewords * 4;
constexpr int kFullStageBytes = kBlockBytes + kNormBytes;
// The swizzle repeats after 1024 bytes, eight rows: the target of a descriptor begins at a multiple of that.
constexpr int kSwizzleBytes = 1024;
// Shared memory: the limit of a block (compute capability 9.0), and the barriers, the only static memory. Then the
// bytes beside rows and stages: slack for alignment, and by row a list of candidates and eight numbers.
constexpr int kMostSharedBytes = 227 * 1024, kMostStages = 6, kBarrierBytes = 256;
constexpr int kOtherBytes =
    kSwizzleBytes + kGroups * kGroupRows * (kCandidates * static_cast<int>(sizeof(Candidate)) + 8 * kStagedBuffers + 8);
static_assert(16 * (kMostStages + kMostBuffers * kGroups) + kPreparers / 4 <= kBarrierBytes &&
              kBlockBytes % kSwizzleBytes == 0 && kFullStageBytes % kSwizzleBytes == 0);

UNICODE_FAST_BOTH int64_t tile_bytes(int width) {
  return static_cast<int64_t>(kTileCodewords) * 2 * width + kNormBytes;
}

// Byte offset of the 16-byte piece `piece` of row `row` of `rows` rows in blocks. The swizzle is the one that the
// descriptor names: bits 4 to 6 of the address are exclusive-ored with bits 7 to 9.
UNICODE_FAST_BOTH uint32_t block_offset(int row, int piece, int rows) {
  return static_cast<uint32_t>(piece / 8) * rows * (2 * kStepWidth) + piece_offset(row, piece % 8, kStepWidth);
}

// Of codeword j, in bytes from the first tile.
UNICODE_FAST_BOTH int64_t operand_place(int64_t j, int d, int width) {
  const int row = static_cast<int>(j % kTileCodewords);
  return j / kTileCodewords * tile_bytes(width) + block_offset(row, d / 8, kTileCodewords) + d % 8 * 2;
}

UNICODE_FAST_BOTH int64_t norm_place(int64_t j, int width) {
  return (j / kTileCodewords + 1) * tile_bytes(width) - kNormBytes + j % kTileCodewords * 4;
}

// Shared memory of a block beside the stages. A persistent grid reads rows ahead, and keeps the codebook's mean and the
// sums of a warpgroup's rows.
UNICODE_FAST_BOTH int64_t row_bytes(int width, int buffers) {
  const int shared = buffers == kStagedBuffers ? 1 : buffers;
  return kOtherBytes + static_cast<int64_t>(shared) * kGroups * kGroupRows * 2 * width +
         (buffers > 1 ? kAheadBytes : 0);
}

// The number of stages that fit into shared memory beside so many buffers of rows; 0 if it is below two.
UNICODE_FAST_BOTH int ring_stages(int width, int buffers = 1) {
  const int64_t count = (kMostSharedBytes - kBarrierBytes - row_bytes(width, buffers)) / kFullStageBytes;
  return count < 2 ? 0 : count < kMostStages ? static_cast<int>(count) : kMostStages;
}

// Those of a persistent grid, which leave at least four stages; 1 for rows that are too wide for one.
UNICODE_FAST_BOTH int row_buffers(int width) {
  return width <= 128 ? kMostBuffers : width <= kWidestStaged ? kStagedBuffers : 1;
}

// Dynamic shared memory of a block.
UNICODE_FAST_BOTH int64_t ring_and_row_bytes(int width, int buffers = 1) {
  return row_bytes(width, buffers) + ring_stages(width, buffers) * kFullStageBytes;
}

// The descriptor of an operand of wgmma that begins at `address` of shared memory. Its fields, from the lowest bit, all
// but the last two in units of 16 bytes: 0 to 13 the address; 16 to 29 the leading offset, without meaning in this
// layout; 32 to 45 the stride, from eight rows to the next eight; 49 to 51 where in the swizzle's pattern the operand
// begins; 62 and 63 the kind of swizzle, 1 for 128 bytes. The next 16 dimensions begin 32 bytes later.
UNICODE_FAST_BOTH uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kStride = kSwizzleBytes >> 4, kLeading = 1, kSwizzle = 1;
  return (address & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle << 62;
}

}  // namespace unicode_fast
