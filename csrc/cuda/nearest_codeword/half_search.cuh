// The half-precision search with mma.sync, for GPUs from 8.0 on: for each row the codewords that could be the nearest.
//
// load_rows, keep_candidates and write_records do not depend on the computation of scores: hopper_search.cuh calls them
// too.
#pragma once

#include "../../common/tiles.h"
#include "../instructions.cuh"
#include "../launch.cuh"
#include "candidates.h"
#include "codebook_operands.cuh"
#include "forms.h"

namespace unicode_fast::cuda {

struct SearchArguments {
  Matrix features;
  const float* mean;  // (width)
  const CodebookFacts* facts;
  const __half* operands;  // (padded M, width), or tiles with their norms
  const float* norms;      // (padded M)
  Record* records;         // (N, splits)
  float* bounds;           // (N)
  int width, tiles;
  Splits splits;
  // Rows whose lists overflowed, and their number, which a search sets to zero.
  int64_t* open_rows;
  int* open_count;
  // Rows that the search with wgmma prepares in global memory.
  unsigned char* staged;
};

// A block of kWarpsM x kWarpsN warps scores kRows rows against kColumns codewords at a time. A warp does kTilesM x
// kTilesN tiles of 16 rows and 8 codewords.
template <int kWarpsM_, int kWarpsN_, int kTilesM_, int kTilesN_, int kBlocks_>
struct Shape {
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kTilesM = kTilesM_, kTilesN = kTilesN_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kWarpsM * kTilesM, kColumns = 8 * kWarpsN * kTilesN;
  static constexpr int kStages = 3;
  static constexpr int kKeptPieces = 4;            // of a row by a thread of load_rows
  static constexpr bool kAgain = false;            // of open rows
  static constexpr bool kReadsNormsAgain = false;  // for each row, which saves registers
  static constexpr int kStageBytes = kColumns * (2 * kStepWidth + static_cast<int>(sizeof(float)));
  static constexpr int kListBytes = kRows * kWarpsN * kCandidates * static_cast<int>(sizeof(Candidate));
  static constexpr int kRowBytes = kRows * (8 + kWarpsN * 8);
  static_assert(kTilesN % 2 == 0 && kThreads >= kRows && kRows % (kThreads / 8) == 0);

  // Shared memory, in this order: the rows; stages, each with operands and then norms of kColumns codewords. Candidates
  // by row and column of warps. By row the factor of its scores and twice its bound. Minima and counts of the
  // candidates.
  static constexpr int64_t shared_bytes(int width) {
    return static_cast<int64_t>(kRows) * width * 2 + kStages * kStageBytes + kListBytes + kRowBytes;
  }
  static __device__ __forceinline__ uint32_t row_offset(int row, int piece, int width) {
    return piece_offset(row, piece, width);
  }
};

using WideShape = Shape<2, 4, 4, 8, 1>;    // 128 rows, 256 codewords
using MiddleShape = Shape<2, 4, 2, 4, 2>;  // 64 rows, 128 codewords
using NarrowShape = Shape<1, 4, 1, 2, 2>;  // 16 rows, 64 codewords

// A row's list of one column of warps, kept by a quad of threads.
template <class S>
struct Minima {
  float lowest[2 * S::kTilesM];
  int count[2 * S::kTilesM];
};

// Eight numbers from an address that is a multiple of 16.
template <class T>
__device__ __forceinline__ void load_aligned(const T* from, float (&values)[8]) {
  alignas(16) T pieces[8];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / 2; ++i)
    reinterpret_cast<uint4*>(pieces)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
#pragma unroll
  for (int e = 0; e < 8; ++e) values[e] = to_float(pieces[e]);
}

// Eight numbers of a row from column `first` on; zeros beyond the last.
template <class T>
__device__ __forceinline__ void load_piece(const Matrix& features, int64_t row, int first, bool aligned,
                                           float (&values)[8]) {
  const T* from = static_cast<const T*>(features.data) + row * features.row_stride + first * features.column_stride;
  if (aligned && first + 8 <= features.columns) {
    load_aligned(from, values);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      values[e] = first + e < features.columns ? to_float(from[e * features.column_stride]) : 0.0f;
  }
}

// The number of rows of a search, and the row at a place; those of a search of open rows are chosen by `open_rows`.
template <class S>
__device__ __forceinline__ int64_t row_count(const SearchArguments& a) {
  return S::kAgain ? static_cast<int64_t>(*a.open_count) : a.features.rows;
}

template <class S>
__device__ __forceinline__ int64_t row_at(const SearchArguments& a, int64_t place, bool inside) {
  return S::kAgain && inside ? a.open_rows[place] : place;
}

// Writes the factor that turns a row's products with codewords into scores, and twice its bound; NaN beyond the last
// row. An open row has the limit of its scores in place of the latter.
template <class S>
__device__ __forceinline__ void write_bound(const SearchArguments& a, int64_t place, const RowNorms& norms,
                                            int exponent, float* factor, float* bound) {
  const int shift = a.facts->exponent - exponent;
  const bool inside = place < row_count<S>(a);
  *factor = static_cast<float>(ldexp(-2.0, shift));
  if (S::kAgain) {
    *bound = inside ? a.bounds[a.open_rows[place]] : not_a_number();
  } else {
    *bound = inside ? twice_bound(norms, norms_of(*a.facts), shift, a.width) : not_a_number();
    if (inside && blockIdx.y == 0) a.bounds[place] = *bound;
  }
}

// Takes the mean of eight columns from `first` on away.
__device__ __forceinline__ void centre(const SearchArguments& a, int first, float (&values)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 mean = __ldg(reinterpret_cast<const float4*>(a.mean + first) + half);
    values[half * 4] -= mean.x;
    values[half * 4 + 1] -= mean.y;
    values[half * 4 + 2] -= mean.z;
    values[half * 4 + 3] -= mean.w;
  }
}

// Sums of squares: of the scaled numbers, of what half precision keeps of them, of what it loses.
struct Squares {
  float exact = 0, rounded = 0, residual = 0;
};

// 2^exponent, from 2^-126 to 2^127.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// Scales eight numbers by two powers of two and rounds them.
__device__ __forceinline__ uint4 rounded(const float (&values)[8], float first_scale, float second_scale,
                                         Squares& squares) {
  alignas(16) __half2 halves[4];
  float scaled[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) scaled[e] = values[e] * first_scale * second_scale;
#pragma unroll
  for (int e = 0; e < 8; e += 2) halves[e / 2] = __floats2half2_rn(scaled[e], scaled[e + 1]);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    // The rounding error of a rounding is a float32 number.
    const float value = scaled[e], kept = e % 2 == 0 ? __low2float(halves[e / 2]) : __high2float(halves[e / 2]);
    const float lost = value - kept;
    squares.exact = fmaf(value, value, squares.exact);
    squares.rounded = fmaf(kept, kept, squares.rounded);
    squares.residual = fmaf(lost, lost, squares.residual);
  }
  return *reinterpret_cast<const uint4*>(halves);
}

__device__ __forceinline__ void store_rounded(const float (&values)[8], float first_scale, float second_scale,
                                              unsigned char* to, Squares& squares) {
  *reinterpret_cast<uint4*>(to) = rounded(values, first_scale, second_scale, squares);
}

// As load_rows, by two reads and in float64.
template <class S, class T>
__device__ __forceinline__ void load_rows_twice(const SearchArguments& a, int64_t first_row, bool aligned,
                                                unsigned char* tile, float* factors, float* bounds) {
  const int thread = threadIdx.x % S::kThreads, lane = thread % 8, pieces = a.width / 8;
  for (int r = thread / 8; r < S::kRows; r += S::kThreads / 8) {
    const bool inside = first_row + r < row_count<S>(a);
    const int64_t row = row_at<S>(a, first_row + r, inside);
    float largest = 0;
#pragma unroll 2
    for (int piece = lane; piece < pieces && inside; piece += 8) {
      float values[8];
      load_piece<T>(a.features, row, piece * 8, aligned, values);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(values[e] - a.mean[piece * 8 + e]));
    }
    for (int distance = 4; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    const int exponent = row_scale(largest, a.facts->exponent);
    const double scale = ldexp(1.0, exponent);
    RowNorms norms{0, 0, 0};
    for (int piece = lane; piece < pieces; piece += 8) {
      float values[8] = {};
      if (inside) load_piece<T>(a.features, row, piece * 8, aligned, values);
      alignas(16) __half halves[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const double centred = static_cast<double>(values[e]) - a.mean[piece * 8 + e];
        const double value = inside ? centred * scale : 0.0;
        halves[e] = __float2half_rn(static_cast<float>(value));
        const double kept = __half2float(halves[e]), lost = value - kept;
        norms.exact += value * value;
        norms.rounded += kept * kept;
        norms.residual += lost * lost;
      }
      *reinterpret_cast<uint4*>(tile + S::row_offset(r, piece, a.width)) = *reinterpret_cast<const uint4*>(halves);
    }
    for (int distance = 4; distance > 0; distance /= 2) {
      norms.exact += __shfl_xor_sync(~0u, norms.exact, distance);
      norms.rounded += __shfl_xor_sync(~0u, norms.rounded, distance);
      norms.residual += __shfl_xor_sync(~0u, norms.residual, distance);
    }
    if (lane == 0) {
      const RowNorms roots{sqrt(norms.exact), sqrt(norms.rounded), sqrt(norms.residual)};
      write_bound<S>(a, first_row + r, roots, exponent, factors + r, bounds + r);
    }
  }
}

// As load_rows, in float32. Of aligned rows whose number of columns is a multiple of eight a thread keeps the first
// kKeptPieces pieces in registers; others are read again.
template <class S, class T>
__device__ __forceinline__ void load_rows_once(const SearchArguments& a, int64_t first_row, bool aligned,
                                               unsigned char* tile, float* factors, float* bounds) {
  constexpr int kKeptPieces = S::kKeptPieces, kRowsAtOnce = S::kThreads / 8;
  constexpr int kRounds = (S::kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kRounds <= 8 && S::kRows % 4 == 0);
  const int thread = threadIdx.x % S::kThreads, lane = thread % 8, pieces = a.width / 8;
  // Of the row whose bound this thread computes.
  Squares own_squares;
  int own_exponent = 0;
  const bool keeps = aligned && a.features.columns % 8 == 0;
  const int first_read = keeps ? lane + kKeptPieces * 8 : lane;
#pragma unroll 1
  for (int r = thread / 8, round = 0; r < S::kRows; r += kRowsAtOnce, ++round) {
    const bool inside = first_row + r < row_count<S>(a);
    const int64_t row = row_at<S>(a, first_row + r, inside);
    float kept[kKeptPieces][8] = {};
    float largest = 0;
    if (keeps && inside) {
      const T* const from = static_cast<const T*>(a.features.data) + row * a.features.row_stride;
#pragma unroll
      for (int i = 0; i < kKeptPieces; ++i) {
        const int first = (lane + i * 8) * 8;
        if (first < a.features.columns) load_aligned(from + first, kept[i]);
      }
#pragma unroll
      for (int i = 0; i < kKeptPieces; ++i) {
        const int first = (lane + i * 8) * 8;
        if (first < a.features.columns) centre(a, first, kept[i]);
#pragma unroll
        for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(kept[i][e]));
      }
    }
    for (int piece = first_read; piece < pieces && inside; piece += 8) {
      float values[8];
      load_piece<T>(a.features, row, piece * 8, aligned, values);
      centre(a, piece * 8, values);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = fmaxf(largest, fabsf(values[e]));
    }
    for (int distance = 4; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    // float32 holds both factors of the scale.
    const int exponent = row_scale(largest, a.facts->exponent), part = exponent / 2;
    const float first_scale = power_of_two(part);
    const float second_scale = power_of_two(exponent - part);
    Squares squares;
#pragma unroll
    for (int i = 0; i < kKeptPieces; ++i) {
      const int piece = lane + i * 8;
      if (keeps && piece < pieces)
        store_rounded(kept[i], first_scale, second_scale, tile + S::row_offset(r, piece, a.width), squares);
    }
    for (int piece = first_read; piece < pieces; piece += 8) {
      float values[8] = {};
      if (inside) {
        load_piece<T>(a.features, row, piece * 8, aligned, values);
        centre(a, piece * 8, values);
      }
      store_rounded(values, first_scale, second_scale, tile + S::row_offset(r, piece, a.width), squares);
    }
    for (int distance = 4; distance > 0; distance /= 2) {
      squares.exact += __shfl_xor_sync(~0u, squares.exact, distance);
      squares.rounded += __shfl_xor_sync(~0u, squares.rounded, distance);
      squares.residual += __shfl_xor_sync(~0u, squares.residual, distance);
    }
    if (lane == round) {
      own_squares = squares;
      own_exponent = exponent;
    }
  }
  if (const int r = lane * kRowsAtOnce + thread / 8; r < S::kRows) {
    const RowNorms norms = norms_of_sums(own_squares.exact, own_squares.rounded, own_squares.residual, a.width);
    write_bound<S>(a, first_row + r, norms, own_exponent, factors + r, bounds + r);
  }
}

// Whether 16 bytes of any row can be read at once, from its first number on.
UNICODE_FAST_BOTH bool rows_are_aligned(const Matrix& features, int number_bytes) {
  return features.column_stride == 1 && reinterpret_cast<uintptr_t>(features.data) % 16 == 0 &&
         features.row_stride * number_bytes % 16 == 0;
}

// Centres, scales and rounds S::kRows rows into `tile`, eight threads to a row. Computes the factor that turns their
// products with codewords into scores, and twice their bound. Rows beyond the last get zeros and NaN. S::kThreads
// consecutive threads of the block must call it.
template <class S, class T>
__device__ __forceinline__ void load_rows(const SearchArguments& a, int64_t first_row, unsigned char* tile,
                                          float* factors, float* bounds) {
  const bool aligned = rows_are_aligned(a.features, sizeof(T));
  if constexpr (kReadRowsOnce) {
    load_rows_once<S, T>(a, first_row, aligned, tile, factors, bounds);
  } else {
    load_rows_twice<S, T>(a, first_row, aligned, tile, factors, bounds);
  }
}

template <class S>
__device__ __forceinline__ void load_rows(const SearchArguments& a, int64_t first_row, unsigned char* tile,
                                          float* factors, float* bounds) {
  if (a.features.number == Number::kFloat32) {
    load_rows<S, float>(a, first_row, tile, factors, bounds);
  } else if (a.features.number == Number::kFloat16) {
    load_rows<S, __half>(a, first_row, tile, factors, bounds);
  } else {
    load_rows<S, __nv_bfloat16>(a, first_row, tile, factors, bounds);
  }
}

// The score with its place in the lowest bits. An infinite score may become NaN, which no minimum and no limit takes.
__device__ __forceinline__ float with_place(float score, unsigned place) {
  return __uint_as_float((__float_as_uint(score) & ~kPlaceBits) | place);
}

// Turns a warp's products with the codewords of a tile into scores and keeps those that could be the smallest. `norms`
// and `first` belong to the first codeword of the warp's columns, `factors`, `bounds` and `lists` to the first of its
// rows. Lists of neighbouring rows lie `list_stride` candidates apart. All threads of the warp must call it, with a
// barrier between calls, because one thread reads the results of its whole quad.
template <class S>
__device__ __forceinline__ void keep_candidates(float (&scores)[S::kTilesM][S::kTilesN][4], const float* norms,
                                                int first, const float* factors, const float* bounds, Candidate* lists,
                                                int list_stride, Minima<S>& minima) {
  constexpr int kGroupTiles = kSkipGroups && S::kTilesN > 4 ? 4 : S::kTilesN, kGroups = S::kTilesN / kGroupTiles;
  constexpr int kWords = (2 * S::kTilesN + 31) / 32;
  const int lane = threadIdx.x % 32, quad_lane = lane % 4;
  float2 norm[S::kTilesN];
#pragma unroll
  for (int slot = 0; slot < 2 * S::kTilesM; ++slot) {
    if (slot == 0 || S::kReadsNormsAgain) {
      const float* const own = S::kReadsNormsAgain ? fresh(norms + quad_lane * 2) : norms + quad_lane * 2;
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) norm[n] = *reinterpret_cast<const float2*>(own + n * 8);
    }
    const int m = slot / 2, side = slot % 2 * 2, row = m * 16 + slot % 2 * 8 + lane / 4;
    const float factor = factors[row], bound = bounds[row];
    float group_low[kGroups];
    float own_low = INFINITY;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      group_low[group] = INFINITY;
#pragma unroll
      for (int n = group * kGroupTiles; n < (group + 1) * kGroupTiles; ++n) {
        float& left = scores[m][n][side];
        float& right = scores[m][n][side + 1];
        left = fmaf(factor, left, norm[n].x);
        right = fmaf(factor, right, norm[n].y);
        if (kBranchFreeMinimum) {
          left = with_place(left, 2 * n);
          right = with_place(right, 2 * n + 1);
        }
        group_low[group] = fminf(group_low[group], fminf(left, right));
      }
      own_low = fminf(own_low, group_low[group]);
    }
    if (!__any_sync(~0u, own_low <= add_up(minima.lowest[slot], bound))) continue;

    // The code from here on runs in most of the first tiles, and rarely later. The four threads of a quad hold equal
    // `minima`.
    float low = fminf(own_low, __shfl_xor_sync(~0u, own_low, 1));
    low = fminf(low, __shfl_xor_sync(~0u, low, 2));
    const float limit = lower_minimum(minima.lowest[slot], minima.count[slot], low, bound);
    // Bit i of a word stands for the i-th of 32 scores.
    unsigned hit_bits[kWords] = {};
    int hits = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (kGroups > 1 && !__any_sync(~0u, group_low[group] <= limit)) continue;
#pragma unroll
      for (int column = group * kGroupTiles * 2; column < (group + 1) * kGroupTiles * 2; ++column) {
        const bool hit = scores[m][column / 2][side + column % 2] <= limit;
        if (kSkipGroups) {
          hit_bits[column / 32] |= hit ? 1u << column % 32 : 0u;
        } else {
          hits += hit;
        }
      }
    }
    if (kSkipGroups) {
#pragma unroll
      for (int word = 0; word < kWords; ++word) hits += __popc(hit_bits[word]);
    }
    int up_to = hits;
    const int one_before = __shfl_up_sync(~0u, up_to, 1, 4);
    if (quad_lane >= 1) up_to += one_before;
    const int two_before = __shfl_up_sync(~0u, up_to, 2, 4);
    if (quad_lane >= 2) up_to += two_before;
    const int more = __shfl_sync(~0u, up_to, 3, 4);
    Candidate* list = lists + row * list_stride;
    if (__any_sync(~0u, minima.count[slot] + more > kCandidates)) {
      if (quad_lane == 0) minima.count[slot] = make_room(list, minima.count[slot], more, limit);
      minima.count[slot] = __shfl_sync(~0u, minima.count[slot], 0, 4);
      __syncwarp();
    }
    if (minima.count[slot] > kCandidates) continue;
    int place = minima.count[slot] + up_to - hits;
    minima.count[slot] += more;
    if ((kSkipGroups || kBranchFreeMinimum) && hits <= 1) {
      int column = kBranchFreeMinimum ? static_cast<int>(__float_as_uint(own_low) & kPlaceBits) : 0;
#pragma unroll
      for (int word = 0; word < kWords; ++word)
        if (!kBranchFreeMinimum && hit_bits[word] != 0) column = word * 32 + __ffs(hit_bits[word]) - 1;
      if (hits == 1) list[place] = {own_low, first + column / 2 * 8 + quad_lane * 2 + column % 2};
      continue;
    }
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
      for (int side_column = 0; side_column < 2; ++side_column) {
        const float score = scores[m][n][side + side_column];
        if (score <= limit) list[place++] = {score, first + n * 8 + quad_lane * 2 + side_column};
      }
    }
  }
}

// Joins the lists of S::kRows rows, one thread a row, and writes their records.
template <class S>
__device__ __forceinline__ void write_records(const SearchArguments& a, int64_t first_row, const Candidate* lists,
                                              const float* lowest, const int* counts, const float* bounds) {
  const int r = threadIdx.x % S::kThreads;
  if (r >= S::kRows || first_row + r >= a.features.rows) return;
  Record* to = a.records + (first_row + r) * a.splits.count + blockIdx.y;
  merge(lists + r * S::kWarpsN * kCandidates, lowest + r * S::kWarpsN, counts + r * S::kWarpsN, S::kWarpsN, bounds[r],
        *to);
}

// Where a warp of a block stands in a tile, and the arrays of the block in shared memory.
template <class S>
struct Block {
  unsigned char *rows, *stages;
  Candidate* lists;
  float *factors, *bounds, *lowest;
  int *counts, lane, warp, warp_row, warp_part, warp_column;

  __device__ __forceinline__ Block(unsigned char* shared, int width)
      : rows(shared),
        stages(rows + static_cast<size_t>(S::kRows) * width * 2),
        lists(reinterpret_cast<Candidate*>(stages + S::kStages * S::kStageBytes)),
        factors(reinterpret_cast<float*>(lists + S::kRows * S::kWarpsN * kCandidates)),
        bounds(factors + S::kRows),
        lowest(bounds + S::kRows),
        counts(reinterpret_cast<int*>(lowest + S::kRows * S::kWarpsN)),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        warp_row(warp / S::kWarpsN * (16 * S::kTilesM)),
        warp_part(warp % S::kWarpsN),
        warp_column(warp_part * (8 * S::kTilesN)) {}
};

// Calls finish(products of the warp, norms of its columns, tile) for each tile of codewords. Its operands go through a
// ring of stages in shared memory; `read_rows` fills `rows` meanwhile.
template <class S, class ReadRows, class Finish>
__device__ __forceinline__ void score_tiles(const SearchArguments& a, const Block<S>& block, int first_tile, int steps,
                                            bool operands_in_tiles, ReadRows read_rows, Finish finish) {
  const int lane = block.lane, chunks = a.width / kStepWidth;
  unsigned char* const stages = block.stages;

  // The source of the next copy, and the stage that it fills.
  int copy_tile = first_tile, copy_chunk = 0, copy_stage = 0;
  const auto copy_step = [&]() {
    const uint32_t stage = shared_address(stages + copy_stage * S::kStageBytes);
    const int64_t codeword = static_cast<int64_t>(copy_tile) * S::kColumns;
    const float* norms = a.norms + codeword;
    if (S::kAgain && operands_in_tiles) {
      // The order of pieces is that of a stage.
      const unsigned char* const tiles = reinterpret_cast<const unsigned char*>(a.operands);
      const unsigned char* from = tiles + operand_place(codeword, copy_chunk * kStepWidth, a.width);
#pragma unroll
      for (int i = 0; i < S::kColumns * 8 / S::kThreads; ++i) {
        const int number = i * S::kThreads + threadIdx.x;
        copy_16_bytes(stage + number * 16, from + number * 16);
      }
      norms = reinterpret_cast<const float*>(tiles + norm_place(codeword, a.width));
    } else {
      const __half* from = a.operands + codeword * a.width + copy_chunk * kStepWidth;
#pragma unroll
      for (int i = 0; i < S::kColumns * 8 / S::kThreads; ++i) {
        const int number = i * S::kThreads + threadIdx.x, column = number / 8, piece = number % 8;
        copy_16_bytes(stage + piece_offset(column, piece, kStepWidth),
                      from + static_cast<int64_t>(column) * a.width + piece * 8);
      }
    }
    if (++copy_chunk == chunks) {
      if (threadIdx.x < S::kColumns / 4)
        copy_16_bytes(stage + S::kColumns * 2 * kStepWidth + threadIdx.x * 16, norms + threadIdx.x * 4);
      copy_chunk = 0;
      ++copy_tile;
    }
    copy_stage = copy_stage + 1 == S::kStages ? 0 : copy_stage + 1;
  };
#pragma unroll
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) copy_step();
    end_copies();
  }
  read_rows();

  float sums[S::kTilesM][S::kTilesN][4] = {};
  // Rows: threads 0 to 15 have the addresses of the lower 8 dimensions of 16, threads 16 to 31 those of the upper 8.
  // Codewords: threads 0 to 7 and 8 to 15 have 8 codewords' lower and upper dimensions, threads 16 to 31 the next 8.
  const uint32_t row_address = shared_address(block.rows) + (block.warp_row + lane % 16) * a.width * 2;
  const uint32_t column_offset = (block.warp_column + lane % 8 + lane / 16 * 8) * (2 * kStepWidth);
  int tile = first_tile, chunk = 0, stage_number = 0;
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<S::kStages - 2>();
    // Now this stage is filled for all threads, and all have finished the stage before.
    __syncthreads();
    if (step + S::kStages - 1 < steps) copy_step();
    end_copies();
    const unsigned char* const stage = stages + stage_number * S::kStageBytes;
    const uint32_t column_address = shared_address(stage) + column_offset;
#pragma unroll
    for (int k = 0; k < kStepWidth / 16; ++k) {
      uint32_t row_part[S::kTilesM][4];
      const uint32_t row_piece = (chunk * 8 + ((k * 2 + lane / 16) ^ (lane % 8))) << 4;
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) load_matrices(row_part[m], row_address + m * 16 * a.width * 2 + row_piece);
      const uint32_t column_piece = ((k * 2 + lane / 8 % 2) ^ (lane % 8)) << 4;
#pragma unroll
      for (int n = 0; n < S::kTilesN; n += 2) {
        uint32_t column_part[4];
        load_matrices(column_part, column_address + n * 8 * (2 * kStepWidth) + column_piece);
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
          multiply(sums[m][n], row_part[m], column_part[0], column_part[1]);
          multiply(sums[m][n + 1], row_part[m], column_part[2], column_part[3]);
        }
      }
    }
    if (++chunk == chunks) {
      finish(sums, reinterpret_cast<const float*>(stage + S::kColumns * 2 * kStepWidth) + block.warp_column, tile);
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
        for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
        }
      }
      chunk = 0;
      ++tile;
    }
    stage_number = stage_number + 1 == S::kStages ? 0 : stage_number + 1;
  }
}

// Block (x, y) finds the candidates of tile x of the rows among split y of the codebook. Reads each row at most twice
// and the split's operands once. Writes a record for each row, and in split 0 twice its bound.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) search_kernel(const SearchArguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  UNICODE_FAST_DYNAMIC_SHARED(shared, 128);
  const Block<S> block(shared, a.width);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * S::kRows;
  const int first_tile = blockIdx.y * a.splits.per_split;
  const int steps = (min(first_tile + a.splits.per_split, a.tiles) - first_tile) * (a.width / kStepWidth);
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *a.open_count = 0;

  Minima<S> minima;
#pragma unroll
  for (int slot = 0; slot < 2 * S::kTilesM; ++slot) {
    minima.lowest[slot] = kNoScore;
    minima.count[slot] = 0;
  }
  score_tiles(
      a, block, first_tile, steps, false,
      [&]() { load_rows<S>(a, first_row, block.rows, block.factors, block.bounds); },
      [&](float (&sums)[S::kTilesM][S::kTilesN][4], const float* norms, int tile) {
        keep_candidates<S>(sums, norms, tile * S::kColumns + block.warp_column, block.factors + block.warp_row,
                           block.bounds + block.warp_row,
                           block.lists + (block.warp_row * S::kWarpsN + block.warp_part) * kCandidates,
                           S::kWarpsN * kCandidates, minima);
      });

  if (block.lane % 4 == 0) {
#pragma unroll
    for (int slot = 0; slot < 2 * S::kTilesM; ++slot) {
      const int row = block.warp_row + slot / 2 * 16 + slot % 2 * 8 + block.lane / 4;
      block.lowest[row * S::kWarpsN + block.warp_part] = minima.lowest[slot];
      block.counts[row * S::kWarpsN + block.warp_part] = minima.count[slot];
    }
  }
  __syncthreads();
  write_records<S>(a, first_row, block.lists, block.lowest, block.counts, block.bounds);
#endif
}

}  // namespace unicode_fast::cuda
