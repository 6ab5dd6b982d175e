// The second search in clusters: each row that is near to one cluster alone is scored against all of its members, by
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

// Differences of members from their representatives, by place in the list of members, and scaled by
// 2^member_scale(radius): rounded, (places, width), and their squared norms.
struct Differences {
  __half* rounded;
  float* squares;
};

struct MembersArguments {
  Matrix features, codebook;
  const CodebookFacts* facts;
  ClusterLists clusters;
  Differences differences;
  const Record* records;  // (N, splits)
  int splits, width;
  Found found;
};

// The count of a row's first record if the row is to be compared with the members of a representative.
__device__ __forceinline__ int mark_of(int64_t representative) { return -1 - static_cast<int>(representative); }

// Writes the differences of a member. A warp must call it.
template <class C>
__device__ __forceinline__ void write_differences(const Matrix& codebook, const ClusterLists& clusters, int64_t place,
                                                  int exponent, int width, const Differences& differences) {
  const int lane = threadIdx.x % 32, member = clusters.at(place), representative = clusters.representative_of(member);
  const C* const data = static_cast<const C*>(codebook.data);
  const C *c = data + member * codebook.row_stride, *r = data + representative * codebook.row_stride;
  const int part = exponent / 2;
  float square = 0;
  for (int d = lane; d < width; d += 32) {
    float difference = 0;
    if (d < codebook.columns)
      difference = to_float(c[d * codebook.column_stride]) - to_float(r[d * codebook.column_stride]);
    difference = difference * power_of_two(part) * power_of_two(exponent - part);
    differences.rounded[place * width + d] = __float2half_rn(difference);
    square = fmaf(difference, difference, square);
  }
  for (int distance = 16; distance > 0; distance /= 2) square += __shfl_xor_sync(~0u, square, distance);
  if (lane == 0) differences.squares[place] = square;
}

// The differences of a warp's rows from their representative: scaled row by row, and rounded into `to`, in the order of
// the thread's first operands. Of two rows of the thread the squared norms and the exponents of the scales.
template <class X, class C>
__device__ __forceinline__ void prepare_differences(const MembersArguments& a, int64_t representative, int exponent,
                                                    const int64_t (&rows)[2], unsigned char* to, float (&squares)[2],
                                                    int (&exponents)[2]) {
  const int quad_lane = threadIdx.x % 4;
  const bool rows_aligned = rows_are_aligned(a.features, sizeof(X)),
             codes_aligned = rows_are_aligned(a.codebook, sizeof(C));
  const auto load_step = [&](int step, float (&y)[2][8]) {
    const int column = step + quad_lane * 8;
    float origin[8];
    load_eight<C>(a.codebook, representative, column, codes_aligned, origin);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load_eight<X>(a.features, rows[side], column, rows_aligned, y[side]);
#pragma unroll
      for (int e = 0; e < 8; ++e) y[side][e] -= origin[e];
    }
  };
  float largest[2] = {};
#pragma unroll 1
  for (int step = 0; step < a.features.columns; step += 32) {
    float y[2][8];
    load_step(step, y);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int e = 0; e < 8; ++e) largest[side] = fmaxf(largest[side], fabsf(y[side][e]));
    }
  }
  float first_scale[2], second_scale[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    largest[side] = fmaxf(largest[side], __shfl_xor_sync(~0u, largest[side], 1));
    largest[side] = fmaxf(largest[side], __shfl_xor_sync(~0u, largest[side], 2));
    exponents[side] = row_scale(largest[side], exponent);
    first_scale[side] = power_of_two(exponents[side] / 2);
    second_scale[side] = power_of_two(exponents[side] - exponents[side] / 2);
  }
  Squares sums[2];
#pragma unroll 1
  for (int step = 0; step < a.width; step += 32) {
    float y[2][8];
    load_step(step, y);
    const uint4 first = rounded(y[0], first_scale[0], second_scale[0], sums[0]);
    const uint4 second = rounded(y[1], first_scale[1], second_scale[1], sums[1]);
    // Any order of the columns will do, the same as for members.
    uint4* const operands = reinterpret_cast<uint4*>(to + step * 32);
    operands[0] = {first.x, second.x, first.y, second.y};
    operands[32] = {first.z, second.z, first.w, second.w};
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    squares[side] = sums[side].exact + __shfl_xor_sync(~0u, sums[side].exact, 1);
    squares[side] += __shfl_xor_sync(~0u, squares[side], 2);
  }
}

// A warp finds the nearest member of one cluster for the rows of `count` keys. `rows_in_half` is memory of the warp for
// their differences.
__device__ __forceinline__ void compare_members(const MembersArguments& a, const Cluster cluster, int representative,
                                                const uint64_t* keys, int count, unsigned char* rows_in_half) {
  const int lane = threadIdx.x % 32, group = lane / 4, quad_lane = lane % 4;
  const auto row_of = [&](int i) {
    return static_cast<int64_t>(keys[min(i, count - 1)] & ((uint64_t{1} << kRowBits) - 1));
  };
  const int64_t rows[2] = {row_of(group), row_of(group + 8)};
  const int exponent = member_scale(__uint_as_float(a.facts->radius), a.facts->exponent);
  // Written and read by one thread.
  unsigned char* const own = rows_in_half + lane * 16;
  float row_square[2];
  int exponents[2];
  const auto prepare = [&]<class X, class C>(X, C) {
    prepare_differences<X, C>(a, representative, exponent, rows, own, row_square, exponents);
  };
  const bool of_float = a.codebook.number == Number::kFloat32;
  if (a.features.number == Number::kFloat32) {
    prepare(float{}, float{});
  } else if (a.features.number == Number::kFloat16) {
    of_float ? prepare(__half{}, float{}) : prepare(__half{}, __half{});
  } else {
    of_float ? prepare(__nv_bfloat16{}, float{}) : prepare(__nv_bfloat16{}, __nv_bfloat16{});
  }
  float largest = 0;
  for (int i = lane; i < cluster.size; i += 32) largest = fmaxf(largest, a.differences.squares[cluster.start + i]);
  for (int distance = 16; distance > 0; distance /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  float factor[2], error[2];
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int shift = exponent - exponents[side];
    factor[side] = static_cast<float>(ldexp(-2.0, shift));
    error[side] = member_error(row_square[side], largest, shift, a.width);
  }

  // scores[n][e] is of member n * 8 + quad_lane * 2 + e % 2 from `start` on; those beyond the last repeat it. Returns
  // the smallest of each row in the thread.
  const unsigned char* const codes = reinterpret_cast<const unsigned char*>(a.differences.rounded) + quad_lane * 16;
  const int last = cluster.start + cluster.size - 1;
  const auto score = [&](int start, float (&scores)[4][4], float (&low)[2]) {
    const unsigned char* code_of[4];
    float square[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const auto place = static_cast<unsigned>(min(cluster.start + start + n * 8 + group, last));
      square[n] = a.differences.squares[place];
      code_of[n] = codes + static_cast<uint64_t>(place) * static_cast<unsigned>(2 * a.width);
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = 0;
    }
#pragma unroll 1
    for (int step = 0; step < a.width * 32; step += 2048) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 first = *reinterpret_cast<const uint4*>(own + step + half * 1024);
        const uint4 second = *reinterpret_cast<const uint4*>(own + step + half * 1024 + 512);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint4 code = __ldg(reinterpret_cast<const uint4*>(code_of[n] + half * 64));
          multiply(scores[n], {first.x, first.y, first.z, first.w}, code.x, code.y);
          multiply(scores[n], {second.x, second.y, second.z, second.w}, code.z, code.w);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) code_of[n] += 128;
    }
    low[0] = low[1] = INFINITY;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float left = __shfl_sync(~0u, square[n], quad_lane * 8);
      const float right = __shfl_sync(~0u, square[n], quad_lane * 8 + 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[n][e] = fmaf(factor[e / 2], scores[n][e], e % 2 == 0 ? left : right);
        low[e / 2] = fminf(low[e / 2], scores[n][e]);
      }
    }
  };

  // The first scores find the limit of those that may belong to the nearest member, the second the members below it.
  // The representative's is zero.
  float scores[4][4], low[2], limit[2] = {};
  for (int start = 0; start < cluster.size; start += kWarpMembers) {
    score(start, scores, low);
#pragma unroll
    for (int side = 0; side < 2; ++side) limit[side] = fminf(limit[side], low[side]);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    limit[side] = fminf(limit[side], __shfl_xor_sync(~0u, limit[side], 1));
    limit[side] = fminf(limit[side], __shfl_xor_sync(~0u, limit[side], 2));
    limit[side] = add_up(add_up(limit[side], error[side]), error[side]);
  }
  // Of row `lane`.
  double best_distance = not_a_number();
  int best = INT_MAX;
  const bool one_tile = cluster.size <= kWarpMembers;
  for (int start = 0; start < cluster.size; start += kWarpMembers) {
    if (!one_tile) score(start, scores, low);
    // A score that is NaN has no finite limit.
    if (!__any_sync(~0u, !(low[0] > limit[0]) || !(low[1] > limit[1]))) continue;
    unsigned open[2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = n * 8 + quad_lane * 2 + e % 2;
        open[e / 2] |= !(scores[n][e] > limit[e / 2]) && start + at < cluster.size ? 1u << at : 0u;
      }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      open[side] |= __shfl_xor_sync(~0u, open[side], 1);
      open[side] |= __shfl_xor_sync(~0u, open[side], 2);
    }
    // Bit 4 i of the first and bit 4 i + 1 of the second stand for rows i and i + 8.
    const unsigned first = __ballot_sync(~0u, open[0] != 0) & 0x11111111u;
    const unsigned second = __ballot_sync(~0u, open[1] != 0) & 0x11111111u;
    for (unsigned open_rows = first | second << 1; open_rows != 0; open_rows &= open_rows - 1) {
      const int bit = __ffs(open_rows) - 1, i = bit / 4 + bit % 4 * 8;
      if (i >= count) continue;
      const int64_t row = row_of(i);
      unsigned left = __shfl_sync(~0u, bit % 4 == 0 ? open[0] : open[1], bit);
      for (; left != 0; left &= left - 1) {
        const int codeword = a.clusters.member(cluster, start + __ffs(left) - 1);
        const double distance = exact_distance(a.features, a.codebook, row, codeword);
        if (lane == i && nearer(distance, codeword, best_distance, best)) {
          best_distance = distance;
          best = codeword;
        }
      }
    }
    if (one_tile) break;
  }
  if (lane < count) {
    const int64_t row = row_of(lane);
    // None is open only where operands are not those of the codebook.
    a.found.index[row] = best < a.codebook.rows ? best : representative;
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

// The marked rows among the block's share of all. `shared` is memory of so many bytes, which the block does not use
// otherwise: at least for kSortedRows keys and the rows of a warp.
__device__ __forceinline__ void compare_marked_rows(const MembersArguments& a, unsigned char* shared,
                                                    int64_t shared_bytes) {
  if (a.facts->radius == 0) return;
  uint64_t* const keys = reinterpret_cast<uint64_t*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row_bytes = kWarpRows * 2 * a.width;
  unsigned char* const rows_in_half = shared + kSortedRows * sizeof(uint64_t) + warp * row_bytes;
  // As many warps as have memory for their rows.
  const int warps = static_cast<int>(
      min((shared_bytes - kSortedRows * sizeof(uint64_t)) / row_bytes, static_cast<int64_t>(blockDim.x / 32)));
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
      if (next == warp)
        compare_members(a, a.clusters.of(representative), representative, keys + place, count, rows_in_half);
      next = (next + 1) % warps;
      place += count;
    }
    __syncthreads();
  }
}

}  // namespace unicode_fast::cuda
