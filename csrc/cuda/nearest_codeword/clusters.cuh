// Finds codewords so near to one of lower index that this one, their representative, takes part in the search for all
// of them. They meet in hash tables of cells. Two grids of cells are half an edge apart: codewords that an edge of one
// separates share a cell of the other.
#pragma once

#include "../arrivals.cuh"
#include "duplicates.cuh"
#include "facts.cuh"

namespace unicode_fast::cuda {

// Edge of a cell in units of the operands, and the largest distance from a representative, by the largest norm.
constexpr double kCellEdge = 32, kNear = 0x1p-10;
constexpr int kGrids = 2;
// Of a codeword, without its entries.
constexpr int64_t kClusterBytes = 12 + 8 * kGrids;

// The members of a representative in the list of members, itself included; size 0 for a codeword in no cluster. A
// member that represents none has size -1, and its representative in place of the start.
struct Cluster {
  int start, size;
};

// What a search reads of the clusters. No number in operands of another codebook leads outside of this one.
struct ClusterLists {
  const Cluster* clusters;
  const int* members;
  int64_t codewords;

  __device__ __forceinline__ Cluster of(int64_t codeword) const {
    const Cluster found = clusters[codeword];
    return found.start >= 0 && found.size <= codewords - found.start ? found : Cluster{0, 0};
  }
  __device__ __forceinline__ int at(int64_t place) const { return inside(members[place]); }
  __device__ __forceinline__ int member(const Cluster& cluster, int i) const { return at(cluster.start + i); }
  __device__ __forceinline__ int representative_of(int member) const {
    const Cluster found = of(member);
    return found.size < 0 ? inside(found.start) : member;
  }
  __device__ __forceinline__ int inside(int codeword) const {
    return codeword >= 0 && codeword < codewords ? codeword : 0;
  }
};

// By codeword, but for the tables, one after the other. The links are those of each grid.
struct Clusters {
  Entry* cells;
  int* lower;    // the codeword of lower index that it met in its cell, or -1
  float* apart;  // the distance of the two, rounded up
  Cluster* of;
  int* members;
};

// Enters a codeword and notes which of the two that meet in a cell is the later. A warp must call it.
__device__ __forceinline__ void link_later(const Matrix& codebook, const Clusters& clusters, int64_t entries, int grid,
                                           uint64_t cell, int64_t j, CodebookFacts* facts) {
  const int lane = threadIdx.x % 32;
  int64_t other = j;
  if (lane == 0) {
    // The thread that finds this entry writes its link after this one.
    __threadfence();
    other = enter(clusters.cells + grid * entries, entries, cell, j);
  }
  other = __shfl_sync(~0u, other, 0);
  if (other == j) return;
  double sum = 0;
  for (int64_t d = lane; d < codebook.columns; d += 32) {
    const double difference = load(codebook, j, d) - load(codebook, other, d);
    sum += difference * difference;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane != 0) return;
  const int64_t later = (j < other ? other : j) * kGrids + grid;
  atomicExch(clusters.lower + later, static_cast<int>(j < other ? j : other));
  atomicExch(clusters.apart + later, round_up(sqrt(sum) * (1 + 0x1p-20)));
  atomicAdd(&facts->linked, 1);
}

// The last block to get here makes the clusters; their members get an infinite norm. A codeword's representative is the
// end of its chain of near links, which lead to ever lower indices. All threads of all blocks must call it, after a
// barrier behind the block's links; thread 0 has entered the block's largest squared norm.
template <class Layout>
__device__ __forceinline__ void join_clusters(const Clusters& clusters, int64_t codewords, int width, float* norms,
                                              CodebookFacts* facts) {
  UNICODE_FAST_SHARED(int, shared, [2]);  // whether this is the last block, and the members so far
  if (threadIdx.x == 0) {
    shared[0] = count_block(&facts->arrived) == static_cast<int>(gridDim.x) - 1;
    shared[1] = 0;
  }
  __syncthreads();
  if (shared[0] == 0 || facts->linked == 0) return;
  const double limit = ldexp(kNear * sqrt(__uint_as_float(facts->squared)), -facts->exponent);
  const auto representative_of = [&](int j, double& apart) {
    apart = 0;
    for (int grid = 0; grid < kGrids; ++grid) {
      for (int link; link = j * kGrids + grid, clusters.lower[link] >= 0 && clusters.apart[link] <= limit; grid = 0) {
        apart += clusters.apart[link];
        j = clusters.lower[link];
      }
    }
    return j;
  };
  double apart;
  for (int j = threadIdx.x; j < codewords; j += blockDim.x) {
    const int representative = representative_of(j, apart);
    // Copies of an earlier codeword have an infinite norm already.
    if (representative == j || norms[Layout::norm(j, width)] == INFINITY ||
        norms[Layout::norm(representative, width)] == INFINITY)
      continue;
    norms[Layout::norm(j, width)] = INFINITY;
    clusters.of[j].size = -1;
    atomicAdd(&clusters.of[representative].size, 1);
    // More than zero, which stands for no clusters.
    atomicMax(&facts->radius, __float_as_uint(round_up(ldexp(apart, facts->exponent) + 0x1p-126)));
  }
  __syncthreads();
  for (int j = threadIdx.x; j < codewords; j += blockDim.x) {
    Cluster& own = clusters.of[j];
    if (own.size > 0) own.start = atomicAdd(&shared[1], ++own.size) + own.size;
  }
  __syncthreads();
  if (threadIdx.x == 0) facts->members = shared[1];
  for (int j = threadIdx.x; j < codewords; j += blockDim.x) {
    if (clusters.of[j].size == 0) continue;
    const int representative = clusters.of[j].size > 0 ? j : representative_of(j, apart);
    clusters.members[atomicAdd(&clusters.of[representative].start, -1) - 1] = j;
    if (representative != j) clusters.of[j].start = representative;
  }
}

}  // namespace unicode_fast::cuda
