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
// With the first tile come rows from `staged`, which need no barrier of their own. A block of them replaces that of the
// rows before. The last product that reads that block has ended: it released an earlier stage of the ring.
template <bool kStaged>
__device__ __forceinline__ void fetch(const SearchArguments& a, uint32_t rows, uint32_t ring, uint32_t full,
                                      uint32_t empty, int stages, int first_tile, int last_tile,
                                      const unsigned char* staged, RingPlace& place) {
  constexpr int kRowBlockBytes = kGroupRows * 2 * kStepWidth;
  const int chunks = a.width / kStepWidth;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(a.operands) + first_tile * tile_bytes(a.width);
  for (int tile = first_tile; tile < last_tile; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int bytes = chunk + 1 == chunks ? kFullStageBytes : kBlockBytes;
      wait_for(empty + place.stage * 8, place.parity);
      const bool with_rows = kStaged && tile == first_tile;
      arrive_expecting(full + place.stage * 8, with_rows ? bytes + kGroups * kRowBlockBytes : bytes);
      copy_bulk(ring + place.stage * kFullStageBytes, from, bytes, full + place.stage * 8);
      if (with_rows) {
        const int before = place.stage - chunks;
        wait_for(empty + (before < 0 ? before + stages : before) * 8, before < 0 ? place.parity : place.parity ^ 1);
        for (int group = 0; group < kGroups; ++group) {
          const int block = (group * chunks + chunk) * kRowBlockBytes;
          copy_bulk(rows + block, staged + block, kRowBlockBytes, full + place.stage * 8);
        }
      }
      from += bytes;
      place.advance(stages);
    }
  }
}

// The rows that a warp reads ahead, four at once, eight threads to a row, by the copy engine. A thread has the parity
// of the phase of its row's copy, and the row's place among all.
struct Ahead {
  uint32_t parity = 0;
  int64_t place;
};

// Where a thread reads them; behind them the codebook's mean, and the squares of the rows of a warpgroup with the
// exponents of their scales.
struct AheadBlock {
  int thread;
  const unsigned char* row;
  const float4* mean;  // from the thread's first column on
  float4* sums;
  uint32_t full;

  __device__ __forceinline__ AheadBlock(unsigned char* rows, uint32_t barriers)
      : thread(fresh(static_cast<int>(threadIdx.x)) % kPreparers),
        row(rows + thread / 8 * (4 * kWidestStaged)),
        mean(reinterpret_cast<const float4*>(rows + kRowAheadBytes) + thread % 8 * 2),
        sums(reinterpret_cast<float4*>(rows + kRowAheadBytes + 4 * kWidestStaged)),
        full(barriers + thread / 32 * 8) {}

  __device__ __forceinline__ void read(const SearchArguments& a, const Ahead& ahead) const {
    if (thread % 8 != 0) return;
    if (ahead.place >= a.features.rows) return arrive(full);
    const int number_bytes = a.features.number == Number::kFloat32 ? 4 : 2;
    const int bytes = static_cast<int>(a.features.columns) * number_bytes;
    arrive_expecting(full, bytes);
    copy_bulk(shared_address(row),
              static_cast<const unsigned char*>(a.features.data) + ahead.place * a.features.row_stride * number_bytes,
              bytes, full);
  }
};

// The part of load_rows before the bounds, for the rows of a warpgroup, by the warps beside the one that fetches. A
// thread keeps kPieces pieces of a row. The rows that follow begin so many rows after these.
template <int kPieces, class T>
__device__ __forceinline__ void prepare_rows(const SearchArguments& a, unsigned char* tile, int following,
                                             const AheadBlock& block, Ahead& ahead) {
  constexpr int kRowsAtOnce = kPreparers / 8;
  static_assert(kGroupRows % 4 == 0);
  const int thread = block.thread, lane = thread % 8, codebook_exponent = a.facts->exponent;
#pragma unroll 1
  for (int r = thread / 8; r < kGroupRows; r += kRowsAtOnce) {
    wait_for(block.full, ahead.parity);
    ahead.parity ^= 1;
    // Of a row beyond the last these are the numbers of another.
    float kept[kPieces][8];
    float of_piece[kPieces] = {};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      alignas(16) T numbers[8];
      alignas(16) float mean[8];
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T)) / 2; ++part)
        reinterpret_cast<uint4*>(numbers)[part] =
            reinterpret_cast<const uint4*>(block.row)[(lane + i * 8) * (sizeof(T) / 2) + part];
#pragma unroll
      for (int part = 0; part < 2; ++part) reinterpret_cast<float4*>(mean)[part] = block.mean[i * 16 + part];
#pragma unroll
      for (int e = 0; e < 8; ++e) kept[i][e] = to_float(numbers[e]) - mean[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) of_piece[i] = fmaxf(of_piece[i], fabsf(kept[i][e]));
    }
    float largest = of_piece[0];
#pragma unroll
    for (int i = 1; i < kPieces; ++i) largest = fmaxf(largest, of_piece[i]);
    // All have read their rows.
    fence_async();
    __syncwarp();
    ahead.place += r + kRowsAtOnce < kGroupRows ? kRowsAtOnce : following + thread / 8 - r;
    block.read(a, ahead);
    for (int distance = 4; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    // float32 holds both factors of the scale.
    const int exponent = row_scale(largest, codebook_exponent), part = exponent / 2;
    const float first_scale = power_of_two(part);
    const float second_scale = power_of_two(exponent - part);
    Squares squares;
    unsigned char* const to = tile + block_offset(r, lane, kGroupRows);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (i * kStepWidth < a.width)
        store_rounded(kept[i], first_scale, second_scale, to + i * kGroupRows * 2 * kStepWidth, squares);
    for (int distance = 4; distance > 0; distance /= 2) {
      squares.exact += __shfl_xor_sync(~0u, squares.exact, distance);
      squares.rounded += __shfl_xor_sync(~0u, squares.rounded, distance);
      squares.residual += __shfl_xor_sync(~0u, squares.residual, distance);
    }
    if (lane == 0)
      block.sums[r] = {squares.exact, squares.rounded, squares.residual,
                       __uint_as_float(static_cast<unsigned>(exponent))};
  }
}

// Asks for the rows of the next turn in the second cache, too.
template <int kPieces>
__device__ __forceinline__ void prepare_rows(const SearchArguments& a, unsigned char* tile, int following,
                                             const AheadBlock& block, Ahead& ahead) {
  const int thread = block.thread, number_bytes = a.features.number == Number::kFloat32 ? 4 : 2;
  const int64_t next = ahead.place + static_cast<int64_t>(fresh_grid()) * HopperShape::kRows + thread - thread / 8;
  if (thread < kGroupRows && next < a.features.rows)
    prefetch_bulk(static_cast<const unsigned char*>(a.features.data) + next * a.features.row_stride * number_bytes,
                  static_cast<int>(a.features.columns) * number_bytes);
  if (a.features.number == Number::kFloat32) {
    prepare_rows<kPieces, float>(a, tile, following, block, ahead);
  } else if (a.features.number == Number::kFloat16) {
    prepare_rows<kPieces, __half>(a, tile, following, block, ahead);
  } else {
    prepare_rows<kPieces, __nv_bfloat16>(a, tile, following, block, ahead);
  }
}

// A warpgroup scores its rows against the block's tiles. With the first tile it calls read_first(): then all its rows
// are in shared memory.
template <class S, class ReadFirst>
__device__ __forceinline__ void score(const SearchArguments& a, uint32_t rows, const unsigned char* ring, uint32_t full,
                                      uint32_t empty, int stages, int first_tile, int last_tile, const float* factors,
                                      const float* bounds, Candidate* lists, RingPlace& place, Minima<S>& minima,
                                      ReadFirst read_first) {
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
    if (tile == first_tile) read_first();
    const float* norms = reinterpret_cast<const float*>(ring + stage_before * kFullStageBytes + kBlockBytes);
    keep_candidates<S>(sums, norms, tile * kTileCodewords, factors + warp_row, bounds + warp_row,
                       lists + warp_row * kCandidates, kCandidates, minima);
    if (kBranchFreeMinimum) pin(sums);
    // The norms are read before the copy engine may write there.
    fence_async();
    __syncwarp();
    if (lane == 0) arrive(empty + stage_before * 8);
  }
}

}  // namespace unicode_fast::cuda
