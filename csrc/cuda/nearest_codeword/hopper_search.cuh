// The half-precision search with wgmma and the bulk copy engine, for GPUs of compute capability 9.0.
#pragma once

#include "../instructions.cuh"
#include "half_search.cuh"
#include "hopper_tiles.h"

namespace unicode_fast::cuda {

// The share of a warpgroup: four warps of 16 rows each score its rows against all codewords of a tile. Each warp works
// as in a Shape of one column of warps.
struct Warpgroup {
  static constexpr int kWarpsN = 1, kTilesM = 1, kTilesN = kTileCodewords / 8;
  static constexpr int kThreads = 128, kRows = kGroupRows, kKeptPieces = 4;
  static constexpr bool kAgain = false;
  static __device__ __forceinline__ uint32_t row_offset(int row, int piece, int) {
    return block_offset(row, piece, kGroupRows);
  }
};

// Of a kernel with so many tiles of rows at once.
template <int kBuffers>
struct Scorers : Warpgroup {
  static constexpr bool kReadsNormsAgain = kBuffers == kStagedBuffers;
};

// A block: kGroups warpgroups that compute, then one whose first thread fetches.
struct HopperShape {
  static constexpr int kBlocks = 1, kThreads = (kGroups + 1) * Warpgroup::kThreads;
  static constexpr int kRows = kGroups * kGroupRows, kColumns = kTileCodewords;
  // Registers of a thread: at launch as many as 384 threads can have; then the last warpgroup releases part of its own,
  // most of them if it prepares no rows.
  static constexpr int kLaunchRegisters = 168;
  template <int kBuffers>
  static constexpr int kFewRegisters = kBuffers == 1              ? 24
                                       : kBuffers == kMostBuffers ? 56
                                                                  : 72;
  template <int kBuffers>
  static constexpr int kManyRegisters = ((kGroups + 1) * kLaunchRegisters - kFewRegisters<kBuffers>) / kGroups;

  static int64_t shared_bytes(int width) { return ring_and_row_bytes(width); }
};

}  // namespace unicode_fast::cuda

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "hopper_loop.cuh"
#endif

namespace unicode_fast::cuda {

// The arrays of a warpgroup's rows in shared memory, in this order for the whole block: buffers of rows, the ring,
// lists of candidates, factors and bounds by buffer, minima and counts of the candidates; what preparers read ahead,
// and the mean. The rows of several turns lie in turn in the buffers.
template <int kBuffers>
struct HopperBlock {
  static constexpr int kRows = HopperShape::kRows, kRowBuffers = kBuffers == kStagedBuffers ? 1 : kBuffers;
  int stages;
  unsigned char *rows, *ring;
  Candidate* lists;
  float *factors, *bounds, *lowest;
  int* counts;
  unsigned char* ahead;

  __device__ __forceinline__ HopperBlock(unsigned char* shared, int width, int turn, int group)
      : stages(ring_stages(width, kBuffers)),
        rows(shared + (turn % kRowBuffers * kGroups + group) * kGroupRows * 2 * width),
        ring(shared + kRowBuffers * kRows * 2 * width),
        lists(reinterpret_cast<Candidate*>(ring + stages * kFullStageBytes) + group * kGroupRows * kCandidates),
        factors(reinterpret_cast<float*>(ring + stages * kFullStageBytes + kRows * kCandidates * sizeof(Candidate)) +
                turn % kBuffers * kRows + group * kGroupRows),
        bounds(factors + kBuffers * kRows),
        lowest(factors + (2 * kBuffers - turn % kBuffers) * kRows),
        counts(reinterpret_cast<int*>(lowest + kRows)),
        ahead(reinterpret_cast<unsigned char*>(factors + (2 * kBuffers + 2 - turn % kBuffers) * kRows -
                                               group * kGroupRows)) {}
};

// As search_kernel: block (x, y) finds the candidates of tile x of the rows among split y of the codebook. Each of its
// warpgroups keeps the operands of its own rows in shared memory; the stages of the ring are for all. With two buffers
// of rows or more it does tiles x, x + gridDim.x, ... of the rows, and prepares each while it scores the one before.
// Compiled for sm_90a; in the images for other architectures it is empty.
template <int kBuffers>
__global__ void __launch_bounds__(HopperShape::kThreads, HopperShape::kBlocks)
    hopper_search_kernel(const SearchArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kRows = HopperShape::kRows, kComputing = kGroups * Warpgroup::kThreads;
  UNICODE_FAST_DYNAMIC_SHARED(unaligned, 16);
  UNICODE_FAST_SHARED(uint64_t, barriers, [kBarrierBytes / 8]);
  unsigned char* const shared = unaligned + (kSwizzleBytes - shared_address(unaligned) % kSwizzleBytes) % kSwizzleBytes;
  const uint32_t full = shared_address(barriers), empty = full + 8 * kMostStages;
  // Of each buffer, for the rows of each warpgroup.
  const uint32_t rows_full = empty + 8 * kMostStages, rows_empty = rows_full + 8 * kMostBuffers * kGroups;
  const uint32_t ahead_full = rows_empty + 8 * kMostBuffers * kGroups;
  const int first_tile = blockIdx.y * a.splits.per_split;
  const int last_tile = min(first_tile + a.splits.per_split, a.tiles);
  // The same for all threads of a warp; the shuffle makes this visible to the compiler.
  const int group = __shfl_sync(~0u, threadIdx.x / Warpgroup::kThreads, 0);

  if (threadIdx.x == 0) {
    if (blockIdx.x == 0 && blockIdx.y == 0) *a.open_count = 0;
    for (int stage = 0; stage < kMostStages; ++stage) {
      start_barrier(full + stage * 8, 1);
      start_barrier(empty + stage * 8, kComputing / 32);
    }
    for (int i = 0; i < kMostBuffers * kGroups && kBuffers > 1; ++i) {
      start_barrier(rows_full + i * 8, kPreparers);
      start_barrier(rows_empty + i * 8, Warpgroup::kThreads);
    }
    for (int i = 0; i < kPreparers / 32 && kBuffers > 1; ++i) start_barrier(ahead_full + i * 8, 4);
    // The copy engine uses them too.
    fence_async();
  }
  if (kBuffers > 1) {
    // Columns beyond the last are zeros.
    float* const ahead = reinterpret_cast<float*>(HopperBlock<kBuffers>(shared, a.width, 0, 0).ahead);
    for (int i = threadIdx.x; i < kRowAheadBytes / 4; i += HopperShape::kThreads) ahead[i] = 0;
    for (int d = threadIdx.x; d < kWidestStaged; d += HopperShape::kThreads)
      ahead[kRowAheadBytes / 4 + d] = d < a.width ? a.mean[d] : 0;
    fence_async();
  }
  __syncthreads();

  // Tiles of rows in preparation.
  constexpr bool kStaged = kBuffers == kStagedBuffers;
  constexpr int kPrepared = kBuffers < kMostBuffers ? kBuffers : kMostBuffers;
  const auto staged = [&](int turn, int width) {
    const int block = fresh_block();
    return a.staged + static_cast<int64_t>(block * kPrepared + turn % kPrepared) * (kRows * 2 * width);
  };
  const auto first_row = [](int turn) { return static_cast<int64_t>(blockIdx.x + turn * fresh_grid()) * kRows; };
  const auto more = [&](int turn) { return kBuffers > 1 && first_row(turn) < a.features.rows; };
  if (group == kGroups) {
    give_registers<HopperShape::kFewRegisters<kBuffers>>();
    if (threadIdx.x == kComputing) {
      RingPlace place{0, 1};
      int turn = 0;
      do {
        const HopperBlock<kBuffers> block(shared, a.width, 0, 0);
        for (int group = 0; group < kGroups && kStaged; ++group)
          wait_for(rows_full + (turn % kPrepared * kGroups + group) * 8, turn / kPrepared % 2);
        fetch<kStaged>(a, shared_address(block.rows), shared_address(block.ring), full, empty, block.stages, first_tile,
                       last_tile, kStaged ? staged(turn, a.width) : nullptr, place);
      } while (more(++turn));
    } else if (kBuffers > 1 && threadIdx.x >= kComputing + 32) {
      // Of the rows of a warpgroup.
      int part = 0;
      const auto ahead_block = [&](int width) {
        return AheadBlock(HopperBlock<kBuffers>(shared, width, 0, 0).ahead, ahead_full);
      };
      Ahead ahead{0, first_row(0) + threadIdx.x % kPreparers / 8};
      ahead_block(a.width).read(a, ahead);
      do {
        {
          const int now = fresh(part), turn = now / kGroups, group = now % kGroups, width = fresh(a.width);
          wait_for(rows_empty + now % (kPrepared * kGroups) * 8, turn / kPrepared % 2 ^ 1);
          unsigned char* const tile = kStaged ? staged(turn, width) + group * kGroupRows * 2 * width
                                              : HopperBlock<kBuffers>(shared, width, turn, group).rows;
          const int following = group + 1 < kGroups ? kGroupRows : fresh_grid() * kRows - group * kGroupRows;
          prepare_rows<kStaged ? 4 : 2>(a, tile, following, ahead_block(width), ahead);
        }
        __syncwarp();
        // Once more, which needs no registers meanwhile.
        const int now = fresh(part), turn = now / kGroups, group = now % kGroups;
        SearchArguments again = a;
        again.width = fresh(a.width);
        const AheadBlock own = ahead_block(again.width);
        if (const int r = own.thread % 8 * (kPreparers / 8) + own.thread / 8; r < kGroupRows) {
          const HopperBlock<kBuffers> block(shared, again.width, turn, group);
          const float4 sums = own.sums[r];
          const RowNorms norms = norms_of_sums(sums.x, sums.y, sums.z, again.width);
          write_bound<Warpgroup>(again, first_row(turn) + group * kGroupRows + r, norms,
                                 static_cast<int>(__float_as_uint(sums.w)), block.factors + r, block.bounds + r);
        }
        if (kStaged) {
          fence_async_global();
        } else {
          fence_async();
        }
        arrive(rows_full + now % (kPrepared * kGroups) * 8);
      } while (more(++part / kGroups));
    }
  } else {
    take_registers<HopperShape::kManyRegisters<kBuffers>>();
    RingPlace place{0, 0};
    int turn = 0;
    do {
      const HopperBlock<kBuffers> block(shared, fresh(a.width), turn, group);
      if (kBuffers == kMostBuffers) {
        wait_for(rows_full + (turn % kPrepared * kGroups + group) * 8, turn / kPrepared % 2);
      } else if (!kStaged) {
        load_rows<Warpgroup>(a, first_row(turn) + group * kGroupRows, block.rows, block.factors, block.bounds);
        fence_async();
        wait_for_group(group);
      }

      Minima<Scorers<kBuffers>> minima;
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        minima.lowest[slot] = kNoScore;
        minima.count[slot] = 0;
      }
      score<Scorers<kBuffers>>(a, shared_address(block.rows), block.ring, full, empty, block.stages, first_tile,
                               last_tile, block.factors, block.bounds, block.lists, place, minima, [&]() {
                                 if (kStaged) arrive(rows_empty + (fresh(turn) % kPrepared * kGroups + group) * 8);
                               });
      // Once more, which needs no registers meanwhile.
      const int now = fresh(turn);
      const HopperBlock<kBuffers> scored(shared, fresh(a.width), now, group);
      const int lane = threadIdx.x % 32;
      if (lane % 4 == 0) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          const int row = threadIdx.x % Warpgroup::kThreads / 32 * 16 + slot * 8 + lane / 4;
          scored.lowest[row] = minima.lowest[slot];
          scored.counts[row] = minima.count[slot];
        }
      }
      wait_for_group(group);
      write_records<Warpgroup>(a, first_row(now) + group * kGroupRows, scored.lists, scored.lowest, scored.counts,
                               scored.bounds);
      if (kBuffers > 1) {
        if (!kStaged) arrive(rows_empty + (now % kPrepared * kGroups + group) * 8);
        // The lists are read before the next rows' candidates go there.
        wait_for_group(group);
      }
    } while (more(++turn));
  }
#endif
}

}  // namespace unicode_fast::cuda
