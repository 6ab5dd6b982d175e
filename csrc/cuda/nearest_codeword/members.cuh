// The second search in clusters: each row whose only candidate is a representative is scored against all members, by
// their differences from the representative. Their scores are of the size of these differences, and so is the bound.
#pragma once

#include <climits>

#include "clusters.cuh"
#include "distances.cuh"
#include "half_search.cuh"

namespace unicode_fast::cuda {

// Rows that a block sorts by cluster at once, rows that a warp scores at once, and members that they meet at once.
constexpr int kSortedRows = 2048, kWarpRows = 16, kWarpMembers = 32;
// A key holds a representative, below 2^30, and in its lower bits a row.
constexpr int kRowBits = 34;

struct MembersArguments {
  Matrix features, codebook;
  const CodebookFacts* facts;
  ClusterLists clusters;
  const Record* records;  // (N, splits)
  int splits;
  Found found;
};

// The count of a row's first record if the row is to be compared with the members of a representative.
__device__ __forceinline__ int mark_of(int64_t representative) { return -1 - static_cast<int>(representative); }

// As load_piece, in fewer registers, which this kernel needs.
template <class T>
__device__ __forceinline__ void load_eight(const Matrix& matrix, int64_t row, int first, bool aligned,
                                           float (&values)[8]) {
  const T* from = static_cast<const T*>(matrix.data) + row * matrix.row_stride + first * matrix.column_stride;
  if (aligned && first + 8 <= matrix.columns) {
    load_aligned(from, values);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      values[e] = first + e < matrix.columns ? to_float(*from) : 0.0f;
      from += matrix.column_stride;
    }
  }
}

// Of any type but float64.
__device__ __forceinline__ void load_eight(const Matrix& matrix, int64_t row, int first, bool aligned,
                                           float (&values)[8]) {
  if (matrix.number == Number::kFloat32) {
    load_eight<float>(matrix, row, first, aligned, values);
  } else if (matrix.number == Number::kFloat16) {
    load_eight<__half>(matrix, row, first, aligned, values);
  } else {
    load_eight<__nv_bfloat16>(matrix, row, first, aligned, values);
  }
}

__device__ __forceinline__ bool is_aligned(const Matrix& matrix) {
  return rows_are_aligned(matrix, matrix.number == Number::kFloat32 ? 4 : 2);
}

// A warp finds the nearest member of one cluster for the rows of `count` keys.
__device__ __forceinline__ void compare_members(const MembersArguments& a, const Cluster cluster, int representative,
                                                const uint64_t* keys, int count) {
  const int lane = threadIdx.x % 32, group = lane / 4, quad_lane = lane % 4;
  const bool rows_aligned = is_aligned(a.features), codes_aligned = is_aligned(a.codebook);
  const auto row_of = [&](int i) {
    return static_cast<int64_t>(keys[min(i, count - 1)] & ((uint64_t{1} << kRowBits) - 1));
  };
  const auto member_at = [&](int i) { return a.clusters.member(cluster, min(i, cluster.size - 1)); };
  const int64_t rows[2] = {row_of(group), row_of(group + 8)};
  float upper[2] = {INFINITY, INFINITY};  // no nearest member's score lies above
  // Of row `lane`.
  double best_distance = not_a_number();
  int best = INT_MAX;
  for (int start = 0; start < cluster.size; start += kWarpMembers) {
    int codes[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) codes[n] = member_at(start + n * 8 + group);
    float sums[4][4] = {}, row_square[2] = {}, square[4] = {};
#pragma unroll 1
    for (int step = 0; step < a.features.columns; step += 32) {
      const int column = step + quad_lane * 8;
      float origin[8], x[2][8];
      load_eight(a.codebook, representative, column, codes_aligned, origin);
#pragma unroll
      for (int side = 0; side < 2; ++side) load_eight(a.features, rows[side], column, rows_aligned, x[side]);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          x[side][e] -= origin[e];
          row_square[side] = fmaf(x[side][e], x[side][e], row_square[side]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float c[8];
        load_eight(a.codebook, codes[n], column, codes_aligned, c);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          c[e] -= origin[e];
          square[n] = fmaf(c[e], c[e], square[n]);
        }
        // Any order of the columns will do, the same for both.
#pragma unroll
        for (int e = 0; e < 8; e += 2)
          multiply_floats(sums[n], {x[0][e], x[1][e], x[0][e + 1], x[1][e + 1]}, c[e], c[e + 1]);
      }
    }
    float largest = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      square[n] += __shfl_xor_sync(~0u, square[n], 1);
      square[n] += __shfl_xor_sync(~0u, square[n], 2);
      largest = fmaxf(largest, square[n]);
    }
    for (int distance = 4; distance < 32; distance *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    float low[2] = {INFINITY, INFINITY};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // The threads of a quad hold the square of member `group`; scores are of members quad_lane * 2 + e % 2.
        const float own = __shfl_sync(~0u, square[n], (quad_lane * 2 + e % 2) * 4);
        sums[n][e] = fmaf(-2, sums[n][e], own);
        low[e / 2] = fminf(low[e / 2], sums[n][e]);
      }
    }
    unsigned open[2] = {};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      row_square[side] += __shfl_xor_sync(~0u, row_square[side], 1);
      row_square[side] += __shfl_xor_sync(~0u, row_square[side], 2);
      low[side] = fminf(low[side], __shfl_xor_sync(~0u, low[side], 1));
      low[side] = fminf(low[side], __shfl_xor_sync(~0u, low[side], 2));
      const float error = member_error(row_square[side], largest, a.features.columns);
      upper[side] = fminf(upper[side], add_up(low[side], error));
      const float limit = add_up(upper[side], error);
#pragma unroll
      for (int column = 0; column < 8; ++column) {
        const int at = column / 2 * 8 + quad_lane * 2 + column % 2;
        // NaN is open too.
        const bool is_open = start + at < cluster.size && !(sums[column / 2][side * 2 + column % 2] > limit);
        open[side] |= is_open ? 1u << at : 0u;
      }
      open[side] |= __shfl_xor_sync(~0u, open[side], 1);
      open[side] |= __shfl_xor_sync(~0u, open[side], 2);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t row = row_of(i);
      unsigned left = __shfl_sync(~0u, i < 8 ? open[0] : open[1], i % 8 * 4);
      for (; left != 0; left &= left - 1) {
        const int codeword = member_at(start + __ffs(left) - 1);
        const double distance = exact_distance(a.features, a.codebook, row, codeword);
        if (lane == i && nearer(distance, codeword, best_distance, best)) {
          best_distance = distance;
          best = codeword;
        }
      }
    }
  }
  if (lane < count) {
    const int64_t row = row_of(lane);
    a.found.index[row] = best;
    static_cast<float*>(a.found.distance)[row] = static_cast<float>(best_distance);
  }
}

// Sorts `size` numbers, a power of two of them, in shared memory. All threads of the block must call it.
__device__ __forceinline__ void sort_keys(uint64_t* keys, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const int low = i / distance * 2 * distance + i % distance, high = low + distance;
        const uint64_t first = keys[low], second = keys[high];
        if ((first > second) == ((low & run) == 0)) {
          keys[low] = second;
          keys[high] = first;
        }
      }
      __syncthreads();
    }
  }
}

// The marked rows among the block's share of all. `keys` is shared memory of kSortedRows numbers, which the block does
// not use otherwise.
__device__ __forceinline__ void compare_marked_rows(const MembersArguments& a, uint64_t* keys) {
  if (a.facts->radius == 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t share = (a.features.rows + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * share;
  const int64_t end = min(begin + share, a.features.rows);
  for (int64_t first = begin; first < end; first += kSortedRows) {
    const int number = static_cast<int>(min(end - first, static_cast<int64_t>(kSortedRows)));
    int size = 1;
    while (size < number) size *= 2;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const int mark = i < number ? a.records[(first + i) * a.splits].count : 0;
      keys[i] = mark < 0 ? static_cast<uint64_t>(-1 - mark) << kRowBits | static_cast<uint64_t>(first + i) : ~0ull;
    }
    __syncthreads();
    sort_keys(keys, size);
    // The warps take the clusters in turn, kWarpRows rows at most.
    int next = 0;
    for (int place = 0; place < number && keys[place] != ~0ull;) {
      const int representative = static_cast<int>(keys[place] >> kRowBits);
      const bool same = lane < kWarpRows && place + lane < number &&
                        static_cast<int>(keys[place + lane] >> kRowBits) == representative;
      const int count = __popc(__ballot_sync(~0u, same));
      if (next == warp) compare_members(a, a.clusters.of(representative), representative, keys + place, count);
      next = (next + 1) % (blockDim.x / 32);
      place += count;
    }
    __syncthreads();
  }
}

}  // namespace unicode_fast::cuda
