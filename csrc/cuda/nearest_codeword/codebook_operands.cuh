// The codebook as the half-precision search reads it: centred, scaled, rounded, with the numbers for the bound.
#pragma once

#include "../../common/tiles.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "candidates.h"
#include "clusters.cuh"
#include "duplicates.cuh"
#include "facts.cuh"
#include "forms.h"
#include "hopper_tiles.h"

namespace unicode_fast::cuda {

constexpr int kColumnsPerBlock = 8, kColumnThreads = 1024;

// Mean of the finite elements of each column, as float32, and the largest difference from it, rounded up. One block
// does eight columns; columns of padding get zeros. Also resets `facts`. Searches use the rounded result itself, so its
// rounding does not matter; the order of its sums is fixed. Empties the tables of codeword_kernel too.
__global__ void __launch_bounds__(kColumnThreads) column_kernel(const Matrix codebook, float* mean, float* spread,
                                                                CodebookFacts* facts, Entry* table, int64_t entries) {
  constexpr int kWarps = kColumnThreads / 32;
  UNICODE_FAST_SHARED(double, sums, [kWarps][kColumnsPerBlock]);
  UNICODE_FAST_SHARED(double, lows, [kWarps][kColumnsPerBlock]);
  UNICODE_FAST_SHARED(double, highs, [kWarps][kColumnsPerBlock]);
  UNICODE_FAST_SHARED(int, counts, [kWarps][kColumnsPerBlock]);
  const int part = threadIdx.x % kColumnsPerBlock, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnsPerBlock + part;
  if (blockIdx.x == 0 && threadIdx.x == 0) *facts = {};
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x; i < entries;
       i += static_cast<int64_t>(gridDim.x) * kColumnThreads)
    table[i] = kNoEntry;
  double sum = 0, low = INFINITY, high = -INFINITY;
  int count = 0;
  if (column < codebook.columns) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / kColumnsPerBlock; row < codebook.rows; row += kColumnThreads / kColumnsPerBlock) {
      const double value = load(codebook, row, column);
      if (isfinite(value)) {
        sum += value;
        low = fmin(low, value);
        high = fmax(high, value);
        ++count;
      }
    }
  }
  for (int distance = kColumnsPerBlock; distance < 32; distance *= 2) {
    sum += __shfl_xor_sync(~0u, sum, distance);
    low = fmin(low, __shfl_xor_sync(~0u, low, distance));
    high = fmax(high, __shfl_xor_sync(~0u, high, distance));
    count += __shfl_xor_sync(~0u, count, distance);
  }
  if (lane < kColumnsPerBlock) {
    sums[warp][lane] = sum;
    lows[warp][lane] = low;
    highs[warp][lane] = high;
    counts[warp][lane] = count;
  }
  __syncthreads();
  if (threadIdx.x >= kColumnsPerBlock) return;
  for (int other = 1; other < kWarps; ++other) {
    sum += sums[other][part];
    low = fmin(low, lows[other][part]);
    high = fmax(high, highs[other][part]);
    count += counts[other][part];
  }
  float centre = count > 0 ? static_cast<float>(sum / count) : 0.0f;
  if (!isfinite(centre)) centre = 0;
  mean[column] = centre;
  spread[column] = count > 0 ? round_up(fmax(high - centre, centre - low)) : 0.0f;
}

// Offsets of operands and norms, in elements: row by row, and in the order of the search with wgmma.
struct RowLayout {
  static __device__ __forceinline__ int64_t operand(int64_t j, int d, int width) { return j * width + d; }
  static __device__ __forceinline__ int64_t norm(int64_t j, int) { return j; }
};

struct TileLayout {
  static __device__ __forceinline__ int64_t operand(int64_t j, int d, int width) {
    return operand_place(j, d, width) / static_cast<int>(sizeof(__half));
  }
  static __device__ __forceinline__ int64_t norm(int64_t j, int width) {
    return norm_place(j, width) / static_cast<int>(sizeof(float));
  }
};

constexpr int kCodewordThreads = 256;

// Operands and squared norms of the codewords, one warp each, and the largest norms. Codewords with NaN or infinity,
// and those of padding, get zeros and an infinite norm, and do not count for the largest norms. Codewords equal to one
// of lower index get an infinite norm. So do members of clusters other than the representative; the first of two
// launches joins the clusters. The blocks cover the padded number of codewords.
template <class Layout>
__global__ void __launch_bounds__(kCodewordThreads, 4)
    codeword_kernel(const Matrix codebook, const float* mean, const float* spread, int width, __half* operands,
                    float* norms, CodebookFacts* facts, Entry* table, int64_t entries, const Clusters clusters,
                    bool joins) {
  UNICODE_FAST_SHARED(float, largest_of, [kCodewordThreads / 32]);
  UNICODE_FAST_SHARED(unsigned, bits_of, [3][kCodewordThreads / 32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float largest = 0;
  for (int d = threadIdx.x; d < width; d += kCodewordThreads) largest = fmaxf(largest, spread[d]);
  for (int distance = 16; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  for (int other = 0; other < kCodewordThreads / 32; ++other) largest = fmaxf(largest, largest_of[other]);
  const int exponent = codebook_scale(largest);
  const double scale = ldexp(1.0, exponent);
  if (blockIdx.x == 0 && threadIdx.x == 0) facts->exponent = exponent;

  const int64_t j = static_cast<int64_t>(blockIdx.x) * (kCodewordThreads / 32) + warp;
  double exact = 0, rounded = 0, residual = 0;
  uint64_t hash = 0, cells[kGrids] = {};
  bool left_out = j >= codebook.rows;
  for (int d = lane; d < width; d += 32) {
    const double given = !left_out && d < codebook.columns ? load(codebook, j, d) : 0.0;
    const double value = d < codebook.columns ? (given - mean[d]) * scale : 0.0;
    left_out |= !isfinite(given);
    if (kExcludeDuplicates) hash += hash_of(given, d);
    for (int grid = 0; kFindClusters && grid < kGrids; ++grid)
      cells[grid] += hash_of(rint(value * (1 / kCellEdge) + grid * (1.0 / kGrids)), d);
    const __half half = __float2half_rn(static_cast<float>(value));
    const double kept = __half2float(half), lost = value - kept;
    operands[Layout::operand(j, d, width)] = half;
    exact += value * value;
    rounded += kept * kept;
    residual += lost * lost;
  }
  left_out = __any_sync(~0u, left_out);
  for (int distance = 16; distance > 0; distance /= 2) {
    exact += __shfl_xor_sync(~0u, exact, distance);
    rounded += __shfl_xor_sync(~0u, rounded, distance);
    residual += __shfl_xor_sync(~0u, residual, distance);
    if (kExcludeDuplicates) hash += __shfl_xor_sync(~0u, hash, distance);
    for (int grid = 0; kFindClusters && grid < kGrids; ++grid)
      cells[grid] += __shfl_xor_sync(~0u, cells[grid], distance);
  }
  if (left_out) {
    for (int d = lane; d < width; d += 32) operands[Layout::operand(j, d, width)] = __ushort_as_half(0);
  }
  if (lane == 0) {
    // Atomic, because the warp of an equal codeword may write there.
    const bool excluded = left_out || (kFindClusters && !joins && clusters.of[j].size < 0);
    atomicExch(norms + Layout::norm(j, width), excluded ? INFINITY : static_cast<float>(exact));
    if (kFindClusters && joins) {
      clusters.of[j] = {0, 0};
      for (int grid = 0; grid < kGrids; ++grid) atomicExch(clusters.lower + j * kGrids + grid, -1);
    }
    bits_of[0][warp] = left_out ? 0 : __float_as_uint(round_up(exact));
    bits_of[1][warp] = left_out ? 0 : __float_as_uint(round_up(sqrt(rounded)));
    bits_of[2][warp] = left_out ? 0 : __float_as_uint(round_up(sqrt(residual)));
  }
  if (kExcludeDuplicates && !left_out) exclude_later<Layout>(codebook, width, table, entries, hash, j, norms);
  // Differences of float64 numbers are no float32 numbers.
  const bool links = kFindClusters && joins && codebook.number != Number::kFloat64;
  if (links && !left_out) {
    // Two copies of the code would spill registers on sm_80.
    static_assert(kGrids == 2);
#pragma unroll 1
    for (int grid = 0; grid < kGrids; ++grid)
      link_later(codebook, clusters, entries, grid, grid == 0 ? cells[0] : cells[1], j, facts);
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    unsigned bits = 0;
    for (int other = 0; other < kCodewordThreads / 32; ++other) bits = max(bits, bits_of[threadIdx.x][other]);
    atomicMax(threadIdx.x == 0 ? &facts->squared : threadIdx.x == 1 ? &facts->rounded : &facts->residual, bits);
  }
  if (links) join_clusters<Layout>(clusters, codebook.rows, width, norms, facts);
}

}  // namespace unicode_fast::cuda
