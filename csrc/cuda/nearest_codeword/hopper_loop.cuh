// The main loop of the search with wgmma: one thread fetches stages of the ring, warpgroups multiply them, barriers
// order both. In a persistent grid further warps prepare rows.
#pragma once

namespace unicode_fast::cuda {

// A block's next place in the ring, and the parity of the phase of the barrier that it waits for there.
struct RingPlace {
  int stage = 0;
  uint32_t parity;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One thread fetches all stages of the block's tiles, each when the warpgroups have finished the former stage there.
__device__ __forceinline__ void fetch(const SearchArguments& a, uint32_t ring, uint32_t full, uint32_t empty,
                                      int stages, int first_tile, int last_tile, RingPlace& place) {
  const int chunks = a.width / kStepWidth;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(a.operands) + first_tile * tile_bytes(a.width);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int bytes = chunk + 1 == chunks ? kFullStageBytes : kBlockBytes;
      wait_for(empty + place.stage * 8, place.parity);
      arrive_expecting(full + place.stage * 8, bytes);
      copy_bulk(ring + place.stage * kFullStageBytes, from, bytes, full + place.stage * 8);
      from += bytes;
      place.advance(stages);
    }
  }
}

// The warps beside the one that fetches prepare the rows of a warpgroup, and ask for those that follow in the second
// cache.
__device__ __forceinline__ void prepare_rows(const SearchArguments& a, int64_t first_row, unsigned char* rows,
                                             float* factors, float* bounds) {
  const int thread = threadIdx.x % Preparers::kThreads, number_bytes = a.features.number == Number::kFloat32 ? 4 : 2;
  const int64_t next = first_row + static_cast<int64_t>(gridDim.x) * HopperShape::kRows + thread;
  if (thread < kGroupRows && next < a.features.rows)
    prefetch_bulk(static_cast<const unsigned char*>(a.features.data) + next * a.features.row_stride * number_bytes,
                  static_cast<int>(a.features.columns) * number_bytes);
  load_rows<Preparers>(a, first_row, rows, factors, bounds);
}

// A warpgroup scores its rows against the block's tiles.
__device__ __forceinline__ void score(const SearchArguments& a, uint32_t rows, const unsigned char* ring, uint32_t full,
                                      uint32_t empty, int stages, int first_tile, int last_tile, const float* factors,
                                      const float* bounds, Candidate* lists, RingPlace& place,
                                      Minima<Warpgroup>& minima) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % Warpgroup::kThreads / 32 * 16;
  const int chunks = a.width / kStepWidth;
  const uint64_t row_operand = operand_descriptor(rows), ring_operand = operand_descriptor(shared_address(ring));
  float sums[1][Warpgroup::kTilesN][4] = {};
  int stage_before = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for(full + place.stage * 8, place.parity);
      pin(sums);
      begin_products();
#pragma unroll
      for (int k = 0; k < kStepWidth / 16; ++k)
        multiply(sums, row_operand + chunk * (kGroupRows * 2 * kStepWidth >> 4) + k * 2,
                 ring_operand + place.stage * (kFullStageBytes >> 4) + k * 2, k > 0 || chunk > 0);
      end_products();
      // Products of this stage continue while the stage before is released.
      wait_for_products<1>();
      pin(sums);
      if (chunk > 0 && lane == 0) arrive(empty + stage_before * 8);
      stage_before = place.stage;
      place.advance(stages);
    }
    wait_for_products<0>();
    pin(sums);
    const float* norms = reinterpret_cast<const float*>(ring + stage_before * kFullStageBytes + kBlockBytes);
    keep_candidates<Warpgroup>(sums, norms, tile * kTileCodewords, factors + warp_row, bounds + warp_row,
                               lists + warp_row * kCandidates, kCandidates, minima);
    if (kBranchFreeMinimum) pin(sums);
    // The norms are read before the copy engine may write there.
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(empty + stage_before * 8);
  }
}

}  // namespace unicode_fast::cuda
