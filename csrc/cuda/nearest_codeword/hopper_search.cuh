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
  static constexpr int kThreads = 128, kRows = kGroupRows;
  static constexpr bool kAgain = false;
  static __device__ __forceinline__ uint32_t row_offset(int row, int piece, int) {
    return block_offset(row, piece, kGroupRows);
  }
};

// A block: kGroups warpgroups that compute, then one whose first thread fetches.
struct HopperShape {
  static constexpr int kBlocks = 1, kThreads = (kGroups + 1) * Warpgroup::kThreads;
  static constexpr int kRows = kGroups * kGroupRows, kColumns = kTileCodewords;
  // Registers of a thread: at launch as many as 384 threads can have; then the last warpgroup releases most of its own.
  static constexpr int kLaunchRegisters = 168, kFewRegisters = 24, kManyRegisters = 240;
  static_assert(kGroups * kManyRegisters + kFewRegisters == (kGroups + 1) * kLaunchRegisters);

  static int64_t shared_bytes(int width) { return ring_and_row_bytes(width); }
};

}  // namespace unicode_fast::cuda

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "hopper_loop.cuh"
#endif

namespace unicode_fast::cuda {

// As search_kernel: block (x, y) finds the candidates of tile x of the rows among split y of the codebook. Each of its
// warpgroups keeps the operands of its own rows in shared memory; the stages of the ring are for all.
// Compiled for sm_90a; in the images for other architectures it is empty.
__global__ void __launch_bounds__(HopperShape::kThreads, HopperShape::kBlocks)
    hopper_search_kernel(const SearchArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kRows = HopperShape::kRows;
  UNICODE_FAST_DYNAMIC_SHARED(unaligned, 16);
  UNICODE_FAST_SHARED(uint64_t, barriers, [kBarrierBytes / 8]);
  unsigned char* const shared = unaligned + (kSwizzleBytes - shared_address(unaligned) % kSwizzleBytes) % kSwizzleBytes;
  unsigned char* const ring = shared + static_cast<size_t>(kRows) * 2 * a.width;
  Candidate* const all_lists = reinterpret_cast<Candidate*>(ring + ring_stages(a.width) * kFullStageBytes);
  const uint32_t full = shared_address(barriers), empty = full + 8 * kMostStages;
  const int first_tile = blockIdx.y * a.splits.per_split;
  const int last_tile = min(first_tile + a.splits.per_split, a.tiles);
  // The same for all threads of a warp; the shuffle makes this visible to the compiler.
  const int group = __shfl_sync(~0u, threadIdx.x / Warpgroup::kThreads, 0);

  if (threadIdx.x == 0) {
    if (blockIdx.x == 0 && blockIdx.y == 0) *a.open_count = 0;
    for (int stage = 0; stage < kMostStages; ++stage) {
      start_barrier(full + stage * 8, 1);
      start_barrier(empty + stage * 8, kGroups * Warpgroup::kThreads / 32);
    }
    // The copy engine uses them too.
    fence_async();
  }
  __syncthreads();

  if (group == kGroups) {
    give_registers<HopperShape::kFewRegisters>();
    if (threadIdx.x == kGroups * Warpgroup::kThreads)
      fetch(a, shared_address(ring), full, empty, first_tile, last_tile);
  } else {
    take_registers<HopperShape::kManyRegisters>();
    unsigned char* const rows = shared + static_cast<size_t>(group) * kGroupRows * 2 * a.width;
    Candidate* const lists = all_lists + group * kGroupRows * kCandidates;
    float* const factors = reinterpret_cast<float*>(all_lists + kRows * kCandidates) + group * kGroupRows;
    float* const bounds = factors + kRows;
    float* const lowest = bounds + kRows;
    int* const counts = reinterpret_cast<int*>(lowest + kRows);
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows + group * kGroupRows;
    load_rows<Warpgroup>(a, first_row, rows, factors, bounds);
    fence_async();
    wait_for_group(group);

    Minima<Warpgroup> minima;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      minima.lowest[slot] = kNoScore;
      minima.count[slot] = 0;
    }
    score(a, shared_address(rows), ring, full, empty, first_tile, last_tile, factors, bounds, lists, minima);
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int row = threadIdx.x % Warpgroup::kThreads / 32 * 16 + slot * 8 + lane / 4;
        lowest[row] = minima.lowest[slot];
        counts[row] = minima.count[slot];
      }
    }
    wait_for_group(group);
    write_records<Warpgroup>(a, first_row, lists, lowest, counts, bounds);
  }
#endif
}

}  // namespace unicode_fast::cuda
