// The rows that a second search serves. Those whose lists of candidates overflowed, as in a collapsed codebook, are
// scored again against the limit of the whole first search, and all codewords below it are compared at once.
#pragma once

#include "distances.cuh"
#include "half_search.cuh"
#include "members.cuh"

namespace unicode_fast::cuda {

struct AgainArguments {
  SearchArguments search;
  Matrix codebook;
  Found found;
  bool operands_in_tiles;
  ClusterLists clusters;
  Differences differences;
};

template <class S>
struct Again : S {
  static constexpr bool kAgain = true;
};

// The nearest codeword so far of each row, the limit of distances in float32 that may be smaller, and by row and column
// of warps a bit for each codeword of a tile below the row's limit. They take the memory of the lists.
template <class S>
struct Open {
  double* distance;
  int64_t* index;
  float* limit;
  unsigned* below;

  __device__ __forceinline__ explicit Open(Candidate* lists)
      : distance(reinterpret_cast<double*>(lists)),
        index(reinterpret_cast<int64_t*>(distance + S::kRows)),
        limit(reinterpret_cast<float*>(index + S::kRows)),
        below(reinterpret_cast<unsigned*>(limit + S::kRows)) {}
  static_assert(S::kRows * (8 + 8 + 4 + S::kWarpsN * 4) <= S::kListBytes && S::kTilesN <= 4);
};

// Block b does tiles b, b + gridDim.x, ... of the open rows, then a share of the marked rows.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) open_rows_kernel(const AgainArguments a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  UNICODE_FAST_DYNAMIC_SHARED(shared, 128);
  const Block<S> block(shared, a.search.width);
  const Open<S> open(block.lists);
  const int64_t rows = row_count<S>(a.search), stride = static_cast<int64_t>(gridDim.x) * S::kRows;
  for (int64_t first_row = static_cast<int64_t>(blockIdx.x) * S::kRows; first_row < rows; first_row += stride) {
    const auto last = static_cast<int>(rows - first_row < S::kRows ? rows - first_row : S::kRows);
    for (int r = threadIdx.x; r < S::kRows; r += S::kThreads) {
      open.distance[r] = not_a_number();
      open.index[r] = INT64_MAX;
      open.limit[r] = INFINITY;
    }
    score_tiles(
        a.search, block, 0, a.search.tiles * (a.search.width / kStepWidth), a.operands_in_tiles,
        [&]() { load_rows<S>(a.search, first_row, block.rows, block.factors, block.bounds); },
        [&](float (&sums)[S::kTilesM][S::kTilesN][4], const float* norms, int tile) {
          const int quad_lane = block.lane % 4;
#pragma unroll
          for (int slot = 0; slot < 2 * S::kTilesM; ++slot) {
            const int m = slot / 2, side = slot % 2 * 2, row = block.warp_row + m * 16 + slot % 2 * 8 + block.lane / 4;
            unsigned below = 0;
#pragma unroll
            for (int column = 0; column < 2 * S::kTilesN; ++column) {
              const int at = column / 2 * 8 + quad_lane * 2 + column % 2;
              const float score = fmaf(block.factors[row], sums[m][column / 2][side + column % 2], norms[at]);
              below |= score <= block.bounds[row] ? 1u << at : 0u;
            }
            below |= __shfl_xor_sync(~0u, below, 1);
            below |= __shfl_xor_sync(~0u, below, 2);
            if (quad_lane == 0) open.below[row * S::kWarpsN + block.warp_part] = below;
          }
          __syncthreads();
          for (int r = block.warp; r < last; r += S::kThreads / 32) {
            const int64_t row = a.search.open_rows[first_row + r];
            for (int part = 0; part < S::kWarpsN; ++part) {
              for (unsigned below = open.below[r * S::kWarpsN + part]; below != 0; below &= below - 1) {
                const int64_t candidate =
                    static_cast<int64_t>(tile) * S::kColumns + part * 8 * S::kTilesN + __ffs(below) - 1;
                if (candidate >= a.codebook.rows) continue;  // only where operands are not those of the codebook
                const Cluster cluster = kFindClusters ? a.clusters.of(candidate) : Cluster{0, 0};
                for (int i = 0; i < max(cluster.size, 1); ++i) {
                  const int64_t codeword = cluster.size > 0 ? a.clusters.member(cluster, i) : candidate;
                  const float rough = rough_distance(a.search.features, a.codebook, row, codeword);
                  if (rough > open.limit[r]) continue;
                  const double distance = exact_distance(a.search.features, a.codebook, row, codeword);
                  __syncwarp();
                  if (block.lane == 0) {
                    open.limit[r] = fminf(open.limit[r], direct_limit(rough, a.codebook.columns));
                    if (nearer(distance, codeword, open.distance[r], open.index[r])) {
                      open.distance[r] = distance;
                      open.index[r] = codeword;
                    }
                  }
                  __syncwarp();
                }
              }
            }
          }
        });
    __syncthreads();
    for (int r = threadIdx.x; r < last; r += S::kThreads) {
      const int64_t row = a.search.open_rows[first_row + r], index = open.index[r];
      a.found.index[row] = index < a.codebook.rows ? index : 0;
      static_cast<float*>(a.found.distance)[row] = static_cast<float>(open.distance[r]);
    }
  }
  static_assert(kSortedRows * sizeof(uint64_t) <= S::kStages * S::kStageBytes && kWarpRows <= S::kRows);
  if (kFindClusters) {
    const SearchArguments& search = a.search;
    compare_marked_rows({search.features, a.codebook, search.facts, a.clusters, a.differences, search.records,
                         search.splits.count, search.width, a.found},
                        shared, static_cast<int64_t>(S::kRows) * search.width * 2 + S::kStages * S::kStageBytes);
  }
#endif
}

}  // namespace unicode_fast::cuda
