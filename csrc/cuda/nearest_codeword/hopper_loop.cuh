// The main loop of the search with wgmma: one thread fetches stages of the ring, warpgroups multiply them, barriers
// order both.
#pragma once

namespace unicode_fast::cuda {

// One thread fetches all stages of the block's tiles, each when the warpgroups have finished the former stage there.
__device__ __forceinline__ void fetch(const SearchArguments& a, uint32_t ring, uint32_t full, uint32_t empty,
                                      int first_tile, int last_tile) {
  const int chunks = a.width / kStepWidth, stages = ring_stages(a.width);
  const unsigned char* from = reinterpret_cast<const unsigned char*>(a.operands) + first_tile * tile_bytes(a.width);
  int stage = 0;
  uint32_t parity = 1;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int bytes = chunk + 1 == chunks ? kFullStageBytes : kBlockBytes;
      wait_for(empty + stage * 8, parity);
      arrive_expecting(full + stage * 8, bytes);
      copy_bulk(ring + stage * kFullStageBytes, from, bytes, full + stage * 8);
      from += bytes;
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// A warpgroup scores its rows against the block's tiles.
__device__ __forceinline__ void score(const SearchArguments& a, uint32_t rows, const unsigned char* ring, uint32_t full,
                                      uint32_t empty, int first_tile, int last_tile, const float* factors,
                                      const float* bounds, Candidate* lists, Minima<Warpgroup>& minima) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x % Warpgroup::kThreads / 32 * 16;
  const int chunks = a.width / kStepWidth, stages = ring_stages(a.width);
  const uint64_t row_operand = operand_descriptor(rows), ring_operand = operand_descriptor(shared_address(ring));
  float sums[1][Warpgroup::kTilesN][4] = {};
  int stage = 0, stage_before = 0;
  uint32_t parity = 0;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for(full + stage * 8, parity);
      pin(sums);
      begin_products();
#pragma unroll
      for (int k = 0; k < kStepWidth / 16; ++k)
        multiply(sums, row_operand + chunk * (kGroupRows * 2 * kStepWidth >> 4) + k * 2,
                 ring_operand + stage * (kFullStageBytes >> 4) + k * 2, k > 0 || chunk > 0);
      end_products();
      // Products of this stage continue while the stage before is released.
      wait_for_products<1>();
      pin(sums);
      if (chunk > 0 && lane == 0) arrive(empty + stage_before * 8);
      stage_before = stage;
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    wait_for_products<0>();
    pin(sums);
    const float* norms = reinterpret_cast<const float*>(ring + stage_before * kFullStageBytes + kBlockBytes);
    keep_candidates<Warpgroup>(sums, norms, tile * kTileCodewords, factors + warp_row, bounds + warp_row,
                               lists + warp_row * kCandidates, kCandidates, minima);
    // The norms are read before the copy engine may write there.
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(empty + stage_before * 8);
  }
}

}  // namespace unicode_fast::cuda
