// The nearest codeword of every row: the half-precision search, its exact end, and direct differences for other rows.

#include <algorithm>
#include <cfloat>
#include <climits>

#include "half_search.cuh"
#include "hopper_search.cuh"
#include "nearest_codeword.h"
#include "open_rows.cuh"

namespace unicode_fast::cuda {
namespace {

constexpr int kMostSplits = 32;  // one thread of a warp handles each
constexpr int kFinishWarps = 8;
// Of a split of so many numbers of codewords the products hide about half of the preparation of the next rows.
constexpr int64_t kPersistentNumbers = 1 << 17;

struct FinishArguments {
  Matrix features, codebook;
  Record* records;  // (N, splits)
  float* bounds;    // (N)
  int splits;
  Found found;
  int64_t* open_rows;  // (N)
  int* open_count;
  const CodebookFacts* facts;
  ClusterLists clusters;
  Differences differences;
  int width;
  int64_t least_blocks;  // where there are so many codewords, a warp each
};

template <class X>
__device__ __forceinline__ bool holds_nan(const FinishArguments& a, int64_t row) {
  const X* x = static_cast<const X*>(a.features.data) + row * a.features.row_stride;
  bool found = false;
  for (int64_t d = threadIdx.x % 32; d < a.features.columns; d += 32) {
    const float value = to_float(x[d * a.features.column_stride]);
    found |= value != value;
  }
  return __any_sync(~0u, found);
}

// One warp a row: compares the row's candidates by their squared distances in float64 and writes the nearest. A row
// whose list overflowed, or that lies between a cluster and another candidate, joins the open rows, with the limit of
// its scores in place of its bound. A row near to one cluster alone is marked for the comparison with its members; the
// differences of members are written too. Any other row is compared with every codeword by the whole block.
template <class X, class C>
__global__ void __launch_bounds__(32 * kFinishWarps) finish_kernel(const FinishArguments a) {
  UNICODE_FAST_SHARED(bool, unknown, [kFinishWarps]);
  UNICODE_FAST_SHARED(double, distances, [kFinishWarps]);
  UNICODE_FAST_SHARED(int64_t, indices, [kFinishWarps]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kFinishWarps, row = first_row + warp;
  if constexpr (kFindClusters && !std::is_same_v<C, double>) {
    if (a.facts->radius != 0) {
      const int exponent = member_scale(__uint_as_float(a.facts->radius), a.facts->exponent);
      const int64_t places = min(static_cast<int64_t>(a.facts->members), a.codebook.rows);
      const int64_t stride = static_cast<int64_t>(gridDim.x) * kFinishWarps;
      for (int64_t place = row; place < places; place += stride)
        write_differences<C>(a.codebook, a.clusters, place, exponent, a.width, a.differences);
    }
  }
  bool compare_all = false;
  if (row < a.features.rows) {
    Record* records = a.records + row * a.splits;
    const float lowest = lane < a.splits ? records[lane].lowest : kNoScore;
    const int count = lane < a.splits ? records[lane].count : 0;
    float smallest = lowest;
    for (int distance = 16; distance > 0; distance /= 2)
      smallest = fminf(smallest, __shfl_xor_sync(~0u, smallest, distance));
    const float limit = add_up(smallest, a.bounds[row]);
    // A bound that is NaN makes the comparison false.
    const bool served = limit < kNoScore;
    const bool known = served && !__any_sync(~0u, lowest <= limit && count > kCandidates);
    // The whole warp has read the bound.
    __syncwarp();
    compare_all = kSearchAgain ? !served : !known;
    unsigned taken = known ? __ballot_sync(~0u, lowest <= limit) : 0u;
    const bool in_one_split = (taken & (taken - 1)) == 0, clustered = kFindClusters && a.facts->radius != 0;
    double best_distance = not_a_number();
    float second = INFINITY;  // distance of the second candidate, rounded down, where there are clusters
    int best = INT_MAX, compared = 0;
    bool near_members = false, open = kSearchAgain && served && !known;
    while (taken != 0) {
      const int split = __ffs(taken) - 1;
      taken &= taken - 1;
      const int candidates = __shfl_sync(~0u, count, split);
      compared += candidates;
      for (int place = 0; place < candidates; ++place) {
        const int candidate = records[split].index[place];
        if (candidate >= a.codebook.rows) continue;  // only where operands are not those of the codebook
        if (clustered && a.clusters.of(candidate).size > 0) {
          near_members = true;
          if (in_one_split && candidates == 1) {
            best = candidate;
            continue;
          }
        }
        const double distance = squared_distance<double, X, C>(a.features, a.codebook, row, candidate);
        const bool is_nearer = nearer(distance, candidate, best_distance, best);
        if (clustered) second = fminf(second, -round_up(-comparable(is_nearer ? best_distance : distance)));
        if (is_nearer) {
          best_distance = distance;
          best = candidate;
        }
      }
    }
    if (kFindClusters && near_members && best_distance == best_distance) {
      // A member lies nearer than its representative by the radius at most. The factor makes up for rounding.
      const int exponent = -a.facts->exponent, part = exponent / 2;
      const float radius = __uint_as_float(a.facts->radius) * power_of_two(part) * power_of_two(exponent - part);
      const float nearest = sqrtf(round_up(best_distance));
      open = !(sqrtf(second) > (nearest + radius) * (1 + 0x1p-20f));
      near_members = a.clusters.of(best).size > 0;
    }
    if (open && lane == 0) {
      a.bounds[row] = limit;
      a.open_rows[atomicAdd(a.open_count, 1)] = row;
    }
    if (known && !open && lane == 0) {
      if (near_members) {
        records->count = mark_of(best);
      } else {
        a.found.index[row] = best < a.codebook.rows ? best : 0;
        static_cast<float*>(a.found.distance)[row] = static_cast<float>(best_distance);
      }
    }
    if (a.found.compared != nullptr && lane == 0) a.found.compared[row] = known ? compared : kComparedWithAll;
  }
  if (lane == 0) unknown[warp] = compare_all;
  __syncthreads();
  for (int other = 0; other < kFinishWarps; ++other) {
    if (!unknown[other]) continue;
    const int64_t hard_row = first_row + other;
    double best_distance = not_a_number();
    int64_t best = 0;
    if (!holds_nan<X>(a, hard_row)) {
      for (int64_t codeword = warp; codeword < a.codebook.rows; codeword += kFinishWarps) {
        const double distance = squared_distance<double, X, C>(a.features, a.codebook, hard_row, codeword);
        if (nearer(distance, codeword, best_distance, best)) {
          best_distance = distance;
          best = codeword;
        }
      }
    }
    if (lane == 0) {
      distances[warp] = best_distance;
      indices[warp] = best;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int part = 1; part < kFinishWarps; ++part) {
        if (nearer(distances[part], indices[part], best_distance, best)) {
          best_distance = distances[part];
          best = indices[part];
        }
      }
      a.found.index[hard_row] = best;
      static_cast<float*>(a.found.distance)[hard_row] = static_cast<float>(best_distance);
    }
    __syncthreads();
  }
}

constexpr int kDirectRows = 32, kDirectColumns = 64, kDirectDepth = 16, kDirectThreads = 256;

// Adds the squared differences of two rows and four codewords a thread, of tiles that start at first_row and first. All
// threads of the block must call it.
template <class T>
__device__ __forceinline__ void add_squares(const Matrix& features, const Matrix& codebook, int64_t first_row,
                                            int64_t first, T (&x)[kDirectDepth][kDirectRows + 1],
                                            T (&c)[kDirectDepth][kDirectColumns + 1], T (&sums)[2][4]) {
  const int column = threadIdx.x % 16, pair = threadIdx.x / 16;
  for (int64_t start = 0; start < features.columns; start += kDirectDepth) {
    __syncthreads();
    for (int i = threadIdx.x; i < kDirectRows * kDirectDepth; i += kDirectThreads) {
      const int64_t row = first_row + i / kDirectDepth, d = start + i % kDirectDepth;
      x[i % kDirectDepth][i / kDirectDepth] =
          row < features.rows && d < features.columns ? static_cast<T>(load(features, row, d)) : T(0);
    }
    for (int i = threadIdx.x; i < kDirectColumns * kDirectDepth; i += kDirectThreads) {
      const int64_t row = first + i / kDirectDepth, d = start + i % kDirectDepth;
      c[i % kDirectDepth][i / kDirectDepth] =
          row < codebook.rows && d < codebook.columns ? static_cast<T>(load(codebook, row, d)) : T(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kDirectDepth; ++d) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const T difference = x[d][pair * 2 + r] - c[d][column + k * 16];
          sums[r][k] += difference * difference;
        }
      }
    }
  }
}

// The nearest of the codewords that the 16 threads of a row found; the first thread writes it.
template <class D>
__device__ __forceinline__ void write_nearest(int64_t row, int64_t rows, double best_distance, int64_t best,
                                              int64_t* index, D* distance) {
  for (int step = 8; step > 0; step /= 2) {
    const double other_distance = __shfl_xor_sync(~0u, best_distance, step);
    const int64_t other = __shfl_xor_sync(~0u, best, step);
    if (nearer(other_distance, other, best_distance, best)) {
      best_distance = other_distance;
      best = other;
    }
  }
  if (threadIdx.x % 16 == 0 && row < rows) {
    index[row] = best;
    distance[row] = static_cast<D>(best_distance);
  }
}

// Direct differences in float64: a block compares 32 rows with all codewords, 64 at a time. Each thread keeps the best
// of its 4 codewords of 64 for 2 rows.
template <class D>
__global__ void __launch_bounds__(kDirectThreads)
    direct_kernel(const Matrix features, const Matrix codebook, int64_t* index, D* distance) {
  UNICODE_FAST_SHARED(double, x, [kDirectDepth][kDirectRows + 1]);
  UNICODE_FAST_SHARED(double, c, [kDirectDepth][kDirectColumns + 1]);
  const int column = threadIdx.x % 16, pair = threadIdx.x / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kDirectRows;
  double best_distance[2] = {not_a_number(), not_a_number()};
  int64_t best[2] = {0, 0};
  for (int64_t first = 0; first < codebook.rows; first += kDirectColumns) {
    double sums[2][4] = {};
    add_squares(features, codebook, first_row, first, x, c, sums);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t codeword = first + column + k * 16;
        if (codeword < codebook.rows && nearer(sums[r][k], codeword, best_distance[r], best[r])) {
          best_distance[r] = sums[r][k];
          best[r] = codeword;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    write_nearest(first_row + pair * 2 + r, features.rows, best_distance[r], best[r], index, distance);
}

// The same for numbers that float32 holds: distances in float32 first. Those that their rounding leaves open follow in
// float64.
__global__ void __launch_bounds__(kDirectThreads)
    plain_kernel(const Matrix features, const Matrix codebook, int64_t* index, float* distance) {
  UNICODE_FAST_SHARED(float, x, [kDirectDepth][kDirectRows + 1]);
  UNICODE_FAST_SHARED(float, c, [kDirectDepth][kDirectColumns + 1]);
  const int column = threadIdx.x % 16, pair = threadIdx.x / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kDirectRows;
  float lowest[2] = {INFINITY, INFINITY}, limit[2];
  for (int64_t first = 0; first < codebook.rows; first += kDirectColumns) {
    float sums[2][4] = {};
    add_squares(features, codebook, first_row, first, x, c, sums);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // fminf ignores NaN.
        if (first + column + k * 16 < codebook.rows) lowest[r] = fminf(lowest[r], sums[r][k]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    for (int step = 8; step > 0; step /= 2) lowest[r] = fminf(lowest[r], __shfl_xor_sync(~0u, lowest[r], step));
    limit[r] = direct_limit(lowest[r], features.columns);
  }
  double best_distance[2] = {not_a_number(), not_a_number()};
  int64_t best[2] = {0, 0};
  for (int64_t first = 0; first < codebook.rows; first += kDirectColumns) {
    float sums[2][4] = {};
    add_squares(features, codebook, first_row, first, x, c, sums);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_row + pair * 2 + r;
      unsigned open = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // NaN is open too.
        const bool there = first + column + k * 16 < codebook.rows && row < features.rows;
        open |= static_cast<unsigned>(there && !(sums[r][k] > limit[r])) << k;
      }
      for (; open != 0; open &= open - 1) {
        const int64_t codeword = first + column + (__ffs(open) - 1) * 16;
        double exact = 0;
#pragma unroll 1
        for (int64_t d = 0; d < features.columns; ++d) {
          const double difference = load(features, row, d) - load(codebook, codeword, d);
          exact += difference * difference;
        }
        if (nearer(exact, codeword, best_distance[r], best[r])) {
          best_distance[r] = exact;
          best[r] = codeword;
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    write_nearest(first_row + pair * 2 + r, features.rows, best_distance[r], best[r], index, distance);
}

template <class S>
cudaError_t launch_search(void (*kernel)(SearchArguments), const SearchPlan& plan, SearchArguments arguments,
                          int64_t codewords, cudaStream_t stream) {
  arguments.tiles = static_cast<int>((codewords + S::kColumns - 1) / S::kColumns);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
  if (error != cudaSuccess) return error;
  const int64_t row_tiles = (arguments.features.rows + S::kRows - 1) / S::kRows;
  const dim3 grid(static_cast<unsigned>(plan.persistent_blocks > 0 ? plan.persistent_blocks : row_tiles),
                  plan.splits.count);
  UNICODE_FAST_LAUNCH(grid, S::kThreads, plan.shared_bytes, stream, kernel)(arguments);
  return cudaGetLastError();
}

template <class X, class C>
cudaError_t launch_finish_for(const FinishArguments& arguments, cudaStream_t stream) {
  const auto blocks_for = [](int64_t warps) { return (warps + kFinishWarps - 1) / kFinishWarps; };
  const int64_t least = std::min(arguments.least_blocks, blocks_for(arguments.codebook.rows));
  const int64_t blocks = std::max(blocks_for(arguments.features.rows), least);
  UNICODE_FAST_LAUNCH(static_cast<unsigned>(blocks), 32 * kFinishWarps, 0, stream, finish_kernel<X, C>)(arguments);
  return cudaGetLastError();
}

template <class X>
cudaError_t launch_finish(const FinishArguments& arguments, cudaStream_t stream) {
  switch (arguments.codebook.number) {
    case Number::kFloat64:
      return launch_finish_for<X, double>(arguments, stream);
    case Number::kFloat32:
      return launch_finish_for<X, float>(arguments, stream);
    default:
      return launch_finish_for<X, X>(arguments, stream);
  }
}

template <class S>
cudaError_t launch_open_rows(const SearchPlan& plan, AgainArguments arguments, cudaStream_t stream) {
  using Shape = Again<S>;
  const int64_t bytes = Shape::shared_bytes(plan.width), columns = Shape::kColumns;
  arguments.search.tiles = static_cast<int>((arguments.codebook.rows + columns - 1) / columns);
  const cudaError_t error = cudaFuncSetAttribute(open_rows_kernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  // Of few rows each warp does one.
  const int64_t warps = Shape::kThreads / 32, most = (arguments.search.features.rows + warps - 1) / warps;
  const auto blocks = static_cast<unsigned>(most < plan.open_blocks ? most : plan.open_blocks);
  UNICODE_FAST_LAUNCH(blocks, Shape::kThreads, bytes, stream, open_rows_kernel<Shape>)(arguments);
  return cudaGetLastError();
}

template <class S>
bool take(SearchPlan& plan, int64_t rows, int64_t codewords, int multiprocessors, int most_shared_bytes) {
  const int64_t bytes = S::shared_bytes(plan.width);
  if (bytes > most_shared_bytes) return false;
  const int64_t tiles = (codewords + S::kColumns - 1) / S::kColumns, row_tiles = (rows + S::kRows - 1) / S::kRows;
  plan.tile_rows = S::kRows;
  plan.shared_bytes = bytes;
  plan.splits = split_tiles(tiles, row_tiles, static_cast<int64_t>(S::kBlocks) * multiprocessors, kMostSplits);
  return true;
}

// Whether the GPU has wgmma and the kernel was compiled for it. In an image for another architecture the kernel is
// empty and needs fewer registers. The registers that it moves between warpgroups must exist.
cudaError_t find_wgmma(int major, int minor, bool& found) {
  found = false;
  if (major != 9 || minor != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, hopper_search_kernel<1>);
  found = error == cudaSuccess && attributes.numRegs == HopperShape::kLaunchRegisters;
  return error;
}

// The current device.
struct Gpu {
  int major = 0, minor = 0, multiprocessors = 0, most_shared_bytes = 0;
  bool has_wgmma = false;
};

cudaError_t look_at(Gpu& gpu) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu.minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&gpu.most_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = find_wgmma(gpu.major, gpu.minor, gpu.has_wgmma);
  return error;
}

// Whether the half-precision search can serve a codebook, where a tile of rows fits into shared memory.
bool serves(const Gpu& gpu, const Matrix& codebook) {
  return gpu.major >= 8 && round_to(codebook.columns, kStepWidth) <= (1 << 20) && codebook.rows < (1LL << 30);
}

// Whether the tiles of the search with wgmma, larger than the others, are enough to give each multiprocessor two.
bool enough_tiles(int64_t rows, int64_t codewords, int multiprocessors) {
  const int64_t tiles = (codewords + HopperShape::kColumns - 1) / HopperShape::kColumns;
  return (rows + HopperShape::kRows - 1) / HopperShape::kRows * tiles >= 2 * multiprocessors;
}

// The next array of an allocation that is `bytes` bytes long so far.
size_t place(size_t& bytes, int64_t more) {
  const auto start = static_cast<size_t>(round_to(static_cast<int64_t>(bytes), 256));
  bytes = start + static_cast<size_t>(round_to(more, 256));
  return start;
}

OperandsPlan lay_out(const Matrix& codebook, bool rows, bool tiles) {
  OperandsPlan plan;
  plan.width = static_cast<int>(round_to(codebook.columns, kStepWidth));
  plan.codewords = round_to(codebook.rows, WideShape::kColumns);
  static_assert(WideShape::kColumns == kTileCodewords);
  plan.rows = rows;
  plan.tiles = tiles;
  plan.mean = place(plan.bytes, plan.width * sizeof(float));
  plan.spread = place(plan.bytes, plan.width * sizeof(float));
  plan.facts = place(plan.bytes, sizeof(CodebookFacts));
  plan.entries = kEntriesPerCodeword * plan.codewords;
  const int64_t table_bytes = plan.entries * static_cast<int64_t>(sizeof(Entry));
  plan.table = place(plan.bytes, kExcludeDuplicates ? table_bytes : 0);
  plan.cells = place(plan.bytes, kFindClusters ? kGrids * table_bytes : 0);
  plan.clusters = place(plan.bytes, kFindClusters ? plan.codewords * kClusterBytes : 0);
  if (rows) {
    plan.operands = place(plan.bytes, plan.codewords * plan.width * sizeof(__half));
    plan.norms = place(plan.bytes, plan.codewords * sizeof(float));
  }
  if (tiles) plan.tile_operands = place(plan.bytes, plan.codewords / kTileCodewords * tile_bytes(plan.width));
  return plan;
}

Clusters clusters_in(unsigned char* operands, const OperandsPlan& plan) {
  static_assert(kClusterBytes == sizeof(Cluster) + (2 * kGrids + 1) * sizeof(int));
  Cluster* const of = reinterpret_cast<Cluster*>(operands + plan.clusters);
  int* const lower = reinterpret_cast<int*>(of + plan.codewords);
  return {reinterpret_cast<Entry*>(operands + plan.cells), lower,
          reinterpret_cast<float*>(lower + kGrids * plan.codewords), of, lower + 2 * kGrids * plan.codewords};
}

}  // namespace

cudaError_t plan_operands(const Matrix& codebook, OperandsPlan& plan) {
  Gpu gpu;
  const cudaError_t error = look_at(gpu);
  if (error != cudaSuccess) return error;
  plan = OperandsPlan{};
  if (!serves(gpu, codebook)) return cudaSuccess;
  const auto width = static_cast<int>(round_to(codebook.columns, kStepWidth));
  plan = lay_out(codebook, true, gpu.has_wgmma && ring_stages(width) > 0);
  return cudaSuccess;
}

OperandsPlan operands_for(const SearchPlan& plan, const Matrix& codebook) {
  return plan.tile_rows == 0 ? OperandsPlan{} : lay_out(codebook, !plan.wgmma, plan.wgmma);
}

cudaError_t launch_operands(const OperandsPlan& plan, const Matrix& codebook, void* operands, cudaStream_t stream) {
  if (plan.bytes == 0) return cudaSuccess;
  unsigned char* const base = static_cast<unsigned char*>(operands);
  float* const mean = reinterpret_cast<float*>(base + plan.mean);
  float* const spread = reinterpret_cast<float*>(base + plan.spread);
  CodebookFacts* const facts = reinterpret_cast<CodebookFacts*>(base + plan.facts);
  Entry* const table = reinterpret_cast<Entry*>(base + plan.table);
  const Clusters clusters = clusters_in(base, plan);
  // One behind the other.
  const int64_t all_entries = plan.entries * (kExcludeDuplicates + kGrids * kFindClusters);
  UNICODE_FAST_LAUNCH(plan.width / kColumnsPerBlock, kColumnThreads, 0, stream, column_kernel)(
      codebook, mean, spread, facts, table, all_entries);
  cudaError_t error = cudaGetLastError();
  const auto blocks = static_cast<unsigned>(plan.codewords / (kCodewordThreads / 32));
  // Both layouts find the same facts.
  if (error == cudaSuccess && plan.rows) {
    UNICODE_FAST_LAUNCH(blocks, kCodewordThreads, 0, stream, codeword_kernel<RowLayout>)(
        codebook, mean, spread, plan.width, reinterpret_cast<__half*>(base + plan.operands),
        reinterpret_cast<float*>(base + plan.norms), facts, table, plan.entries, clusters, true);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess && plan.tiles) {
    UNICODE_FAST_LAUNCH(blocks, kCodewordThreads, 0, stream, codeword_kernel<TileLayout>)(
        codebook, mean, spread, plan.width, reinterpret_cast<__half*>(base + plan.tile_operands),
        reinterpret_cast<float*>(base + plan.tile_operands), facts, table, plan.entries, clusters, !plan.rows);
    error = cudaGetLastError();
  }
  return error;
}

void make_persistent(const Matrix& features, int64_t blocks, SearchPlan& plan) {
  const bool aligned = rows_are_aligned(features, features.number == Number::kFloat32 ? 4 : 2);
  const int buffers = row_buffers(plan.width);
  if (!kPersistentGrid || !plan.wgmma || buffers == 1 || !aligned || features.columns % 8 != 0) return;
  if (blocks < 1) blocks = 1;
  if (features.rows <= blocks * HopperShape::kRows) return;
  plan.persistent_blocks = blocks;
  plan.shared_bytes = ring_and_row_bytes(plan.width, buffers);
  const int64_t staged_rows = blocks * plan.splits.count * kMostBuffers * HopperShape::kRows;
  if (buffers == kStagedBuffers) plan.staged = place(plan.bytes, staged_rows * 2 * plan.width);
}

cudaError_t plan_nearest_codeword(const Matrix& features, const Matrix& codebook, MainLoop loop, SearchPlan& plan) {
  Gpu gpu;
  cudaError_t error = look_at(gpu);
  if (error == cudaSuccess && loop == MainLoop::kWgmma && !gpu.has_wgmma) error = cudaErrorNotSupported;
  if (error != cudaSuccess) return error;
  plan = SearchPlan{};
  if (features.number == Number::kFloat64 || loop == MainLoop::kPlain || !serves(gpu, codebook)) return cudaSuccess;
  const int64_t rows = features.rows;
  const int multiprocessors = gpu.multiprocessors, most_shared_bytes = gpu.most_shared_bytes;
  plan.width = static_cast<int>(round_to(features.columns, kStepWidth));
  // Large tiles reuse more of their reads, small ones keep all multiprocessors busy.
  const bool many = rows >= static_cast<int64_t>(2 * WideShape::kRows) * multiprocessors && plan.width >= 128;
  const bool any = loop == MainLoop::kBest || loop == MainLoop::kMma;
  plan.wgmma =
      gpu.has_wgmma && ring_stages(plan.width) > 0 &&
      (loop == MainLoop::kWgmma || (loop == MainLoop::kBest && enough_tiles(rows, codebook.rows, multiprocessors))) &&
      take<HopperShape>(plan, rows, codebook.rows, multiprocessors, most_shared_bytes - kBarrierBytes);
  const bool taken =
      plan.wgmma ||
      ((loop == MainLoop::kWide || (any && many)) &&
       take<WideShape>(plan, rows, codebook.rows, multiprocessors, most_shared_bytes)) ||
      (loop != MainLoop::kNarrow && take<MiddleShape>(plan, rows, codebook.rows, multiprocessors, most_shared_bytes)) ||
      take<NarrowShape>(plan, rows, codebook.rows, multiprocessors, most_shared_bytes);
  if (!taken) return cudaSuccess;
  const int64_t numbers = static_cast<int64_t>(plan.splits.per_split) * kTileCodewords * plan.width;
  if (loop == MainLoop::kWgmma || numbers >= kPersistentNumbers)
    make_persistent(features, multiprocessors / plan.splits.count, plan);
  plan.open_in_narrow = MiddleShape::shared_bytes(plan.width) > most_shared_bytes;
  plan.open_blocks = MiddleShape::kBlocks * multiprocessors;
  static_assert(MiddleShape::kBlocks == NarrowShape::kBlocks);
  const bool differs = kFindClusters && codebook.number != Number::kFloat64;
  plan.differences = place(plan.bytes, differs ? codebook.rows * plan.width * sizeof(__half) : 0);
  plan.squares = place(plan.bytes, differs ? codebook.rows * sizeof(float) : 0);
  plan.records = place(plan.bytes, rows * plan.splits.count * sizeof(Record));
  plan.bounds = place(plan.bytes, rows * sizeof(float));
  plan.open_rows = place(plan.bytes, rows * sizeof(int64_t));
  plan.open_count = place(plan.bytes, sizeof(int));
  return cudaSuccess;
}

cudaError_t launch_nearest_codeword(const SearchPlan& plan, const OperandsPlan& made, const Matrix& features,
                                    const Matrix& codebook, const void* operands, void* workspace, const Found& found,
                                    cudaStream_t stream) {
  if (plan.tile_rows == 0) {
    const auto blocks = static_cast<unsigned>((features.rows + kDirectRows - 1) / kDirectRows);
    if (features.number == Number::kFloat64) {
      UNICODE_FAST_LAUNCH(blocks, kDirectThreads, 0, stream, direct_kernel<double>)(
          features, codebook, found.index, static_cast<double*>(found.distance));
    } else if (codebook.number == Number::kFloat64) {
      UNICODE_FAST_LAUNCH(blocks, kDirectThreads, 0, stream, direct_kernel<float>)(features, codebook, found.index,
                                                                                   static_cast<float*>(found.distance));
    } else {
      UNICODE_FAST_LAUNCH(blocks, kDirectThreads, 0, stream, plain_kernel)(features, codebook, found.index,
                                                                           static_cast<float*>(found.distance));
    }
    return cudaGetLastError();
  }
  const unsigned char* const codes = static_cast<const unsigned char*>(operands);
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  Record* const records = reinterpret_cast<Record*>(base + plan.records);
  float* const bounds = reinterpret_cast<float*>(base + plan.bounds);
  int64_t* const open_rows = reinterpret_cast<int64_t*>(base + plan.open_rows);
  int* const open_count = reinterpret_cast<int*>(base + plan.open_count);
  const SearchArguments search{
      features,
      reinterpret_cast<const float*>(codes + made.mean),
      reinterpret_cast<const CodebookFacts*>(codes + made.facts),
      reinterpret_cast<const __half*>(codes + (plan.wgmma ? made.tile_operands : made.operands)),
      reinterpret_cast<const float*>(codes + (plan.wgmma ? made.tile_operands : made.norms)),
      records,
      bounds,
      plan.width,
      0,
      plan.splits,
      open_rows,
      open_count,
      base + plan.staged};
  cudaError_t error = cudaSuccess;
  const auto launch = [&]<class S>(S, void (*kernel)(SearchArguments)) {
    return launch_search<S>(kernel, plan, search, codebook.rows, stream);
  };
  if (plan.wgmma) {
    error = launch(HopperShape{}, plan.persistent_blocks == 0                 ? hopper_search_kernel<1>
                                  : row_buffers(plan.width) == kStagedBuffers ? hopper_search_kernel<kStagedBuffers>
                                                                              : hopper_search_kernel<kMostBuffers>);
  } else if (plan.tile_rows == WideShape::kRows) {
    error = launch(WideShape{}, search_kernel<WideShape>);
  } else if (plan.tile_rows == MiddleShape::kRows) {
    error = launch(MiddleShape{}, search_kernel<MiddleShape>);
  } else {
    error = launch(NarrowShape{}, search_kernel<NarrowShape>);
  }
  if (error != cudaSuccess) return error;

  // Only the launcher of the operands writes them.
  const Clusters clusters = clusters_in(const_cast<unsigned char*>(codes), made);
  const ClusterLists lists{clusters.of, clusters.members, codebook.rows};
  const Differences differences{reinterpret_cast<__half*>(base + plan.differences),
                                reinterpret_cast<float*>(base + plan.squares)};
  const FinishArguments finish{features,  codebook,   records,      bounds, plan.splits.count, found,
                               open_rows, open_count, search.facts, lists,  differences,       plan.width};
  if (features.number == Number::kFloat32) {
    error = launch_finish<float>(finish, stream);
  } else if (features.number == Number::kFloat16) {
    error = launch_finish<__half>(finish, stream);
  } else {
    error = launch_finish<__nv_bfloat16>(finish, stream);
  }
  if (error != cudaSuccess || !kSearchAgain) return error;
  const AgainArguments again{search, codebook, found, plan.wgmma, lists, differences};
  return plan.open_in_narrow ? launch_open_rows<NarrowShape>(plan, again, stream)
                             : launch_open_rows<MiddleShape>(plan, again, stream);
}

}  // namespace unicode_fast::cuda
