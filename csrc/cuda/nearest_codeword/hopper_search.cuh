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
  static constexpr bool kAgain = false, kKeepsRows = false;
  static __device__ __forceinline__ uint32_t row_offset(int row, int piece, int) {
    return block_offset(row, piece, kGroupRows);
  }
};

// The warps that prepare rows in a persistent grid: those of the last warpgroup but its first. They lay out the rows of
// one warpgroup after the other, and read whole rows at once, which needs the fewest registers.
struct Preparers : Warpgroup {
  static constexpr int kThreads = 96, kKeptPieces = 2;
  static constexpr bool kKeepsRows = true;
};

// A block: kGroups warpgroups that compute, then one whose first thread fetches.
struct HopperShape {
  static constexpr int kBlocks = 1, kThreads = (kGroups + 1) * Warpgroup::kThreads;
  static constexpr int kRows = kGroups * kGroupRows, kColumns = kTileCodewords;
  // Registers of a thread: at launch as many as 384 threads can have; then the last warpgroup releases part of its own,
  // most of them if it prepares no rows.
  static constexpr int kLaunchRegisters = 168;
  template <int kBuffers>
  static constexpr int kFewRegisters = kBuffers == 1 ? 24 : 72;
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
// lists of candidates, factors and bounds by buffer, minima and counts of the candidates.
template <int kBuffers>
struct HopperBlock {
  static constexpr int kRows = HopperShape::kRows;
  int stages;
  unsigned char *rows, *ring;
  Candidate* lists;
  float *factors, *bounds, *lowest;
  int* counts;

  __device__ __forceinline__ HopperBlock(unsigned char* shared, int width, int buffer, int group)
      : stages(ring_stages(width, kBuffers)),
        rows(shared + (buffer * kGroups + group) * kGroupRows * 2 * width),
        ring(shared + kBuffers * kRows * 2 * width),
        lists(reinterpret_cast<Candidate*>(ring + stages * kFullStageBytes) + group * kGroupRows * kCandidates),
        factors(reinterpret_cast<float*>(ring + stages * kFullStageBytes + kRows * kCandidates * sizeof(Candidate)) +
                buffer * kRows + group * kGroupRows),
        bounds(factors + kBuffers * kRows),
        lowest(factors + (2 * kBuffers - buffer) * kRows),
        counts(reinterpret_cast<int*>(lowest + kRows)) {}
};

// As search_kernel: block (x, y) finds the candidates of tile x of the rows among split y of the codebook. Each of its
// warpgroups keeps the operands of its own rows in shared memory; the stages of the ring are for all. With two buffers
// of rows it does tiles x, x + gridDim.x, ... of the rows, and prepares each while it scores the one before.
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
    for (int i = 0; i < kBuffers * kGroups && kBuffers > 1; ++i) {
      start_barrier(rows_full + i * 8, Preparers::kThreads);
      start_barrier(rows_empty + i * 8, Warpgroup::kThreads);
    }
    // The copy engine uses them too.
    fence_async();
  }
  __syncthreads();

  const auto first_row = [](int turn) { return (blockIdx.x + static_cast<int64_t>(turn) * gridDim.x) * kRows; };
  const auto more = [&](int turn) { return kBuffers > 1 && first_row(turn) < a.features.rows; };
  if (group == kGroups) {
    give_registers<HopperShape::kFewRegisters<kBuffers>>();
    if (threadIdx.x == kComputing) {
      RingPlace place{0, 1};
      int turn = 0;
      do {
        const HopperBlock<kBuffers> block(shared, a.width, 0, 0);
        fetch(a, shared_address(block.ring), full, empty, block.stages, first_tile, last_tile, place);
      } while (more(++turn));
    } else if (kBuffers > 1 && threadIdx.x >= kComputing + 32) {
      // Of the rows of a warpgroup.
      int part = 0;
      do {
        const int turn = part / kGroups, group = part % kGroups, barrier = part % (kBuffers * kGroups) * 8;
        wait_for(rows_empty + barrier, turn / kBuffers % 2 ^ 1);
        const HopperBlock<kBuffers> block(shared, fresh(a.width), turn % kBuffers, group);
        prepare_rows(a, first_row(turn) + group * kGroupRows, block.rows, block.factors, block.bounds);
        fence_async();
        arrive(rows_full + barrier);
      } while (more(++part / kGroups));
    }
  } else {
    take_registers<HopperShape::kManyRegisters<kBuffers>>();
    RingPlace place{0, 0};
    int turn = 0;
    do {
      const int buffer = turn % kBuffers, barrier = (buffer * kGroups + group) * 8;
      const HopperBlock<kBuffers> block(shared, fresh(a.width), buffer, group);
      const int64_t group_row = first_row(turn) + group * kGroupRows;
      if (kBuffers > 1) {
        wait_for(rows_full + barrier, turn / kBuffers % 2);
      } else {
        load_rows<Warpgroup>(a, group_row, block.rows, block.factors, block.bounds);
        fence_async();
        wait_for_group(group);
      }

      Minima<Warpgroup> minima;
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        minima.lowest[slot] = kNoScore;
        minima.count[slot] = 0;
      }
      score(a, shared_address(block.rows), block.ring, full, empty, block.stages, first_tile, last_tile, block.factors,
            block.bounds, block.lists, place, minima);
      const int lane = threadIdx.x % 32;
      if (lane % 4 == 0) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
          const int row = threadIdx.x % Warpgroup::kThreads / 32 * 16 + slot * 8 + lane / 4;
          block.lowest[row] = minima.lowest[slot];
          block.counts[row] = minima.count[slot];
        }
      }
      wait_for_group(group);
      write_records<Warpgroup>(a, group_row, block.lists, block.lowest, block.counts, block.bounds);
      if (kBuffers > 1) {
        arrive(rows_empty + barrier);
        // The lists are read before the next rows' candidates go there.
        wait_for_group(group);
      }
    } while (more(++turn));
  }
#endif
}

}  // namespace unicode_fast::cuda
