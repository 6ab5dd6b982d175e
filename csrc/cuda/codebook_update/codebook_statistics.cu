// The statistics of a batch for a codebook update: counts of each codeword, sums of mixed rows, and rows for the resets
// of idle codewords. Every sum has a fixed order, so results repeat bit for bit.

#include "../../common/counter_random.h"
#include "../../common/tiles.h"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"
#include "codebook_update.h"

namespace unicode_fast::cuda {
namespace {

// A block sums kColumns columns; its threads form kGroups groups that take rows in turn.
constexpr int kColumns = 128, kGroups = 2, kThreads = kColumns * kGroups;
// Blocks on a multiprocessor; more would leave too few registers for the sums.
constexpr int kBlocks = 4;
constexpr int kRowsPerThread = 8, kChunkRows = kThreads * kRowsPerThread;
constexpr int64_t kMostComparisons = 1 << 24;  // rows times codewords, for the unsorted sums
constexpr int64_t kPieceRows = 512, kLeastTileRows = 512, kMostTileCounts = 1 << 23;
constexpr int64_t kRowStream = 2;

// The number type of all features and partners, or Any if it is tested at each read.
struct Any {};

template <class T>
__device__ __forceinline__ double read(const Matrix& matrix, int64_t row, int64_t column) {
  const int64_t place = row * matrix.row_stride + column * matrix.column_stride;
  if constexpr (std::is_same_v<T, Any>) {
    return load(matrix.data, matrix.number, place);
  } else {
    return to_double(static_cast<const T*>(matrix.data)[place]);
  }
}

__device__ __forceinline__ bool is_valid(const Modality& modality, int64_t row) {
  return modality.valid == nullptr || modality.valid[row * modality.valid_stride];
}

// One element of a valid row mixed with its partner. If no partner is given, it is the mean of the other modalities'
// valid rows at the same position.
template <class T>
__device__ __forceinline__ double mixed(const Batch& batch, int m, int64_t row, int64_t column) {
  const Modality& own = batch.modality[m];
  const double value = read<T>(own.features, row, column);
  if (!batch.mixes) return value;
  double partner = 0;
  int number = 1;
  if (batch.given_partners) {
    partner = read<T>(own.partners, row, column);
  } else {
    number = 0;
    for (int other = 0; other < batch.modalities; ++other) {
      if (other == m || !is_valid(batch.modality[other], row)) continue;
      partner += read<T>(batch.modality[other].features, row, column);
      ++number;
    }
    if (number == 0) return value;
  }
  return batch.own_weight * value + (1 - batch.own_weight) * (partner / number);
}

// Adds up the groups' sums of a column; the threads of the first group get the result.
__device__ __forceinline__ double add_groups(double sum) {
  UNICODE_FAST_SHARED(double, sums, [kGroups][kColumns]);
  sums[threadIdx.x / kColumns][threadIdx.x % kColumns] = sum;
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) total += sums[group][threadIdx.x % kColumns];
  return total;
}

// Writes which of the rows drawn for codeword k are valid and held here, and this block's columns of them.
template <class T>
__device__ __forceinline__ void write_candidates(const Batch& batch, const StatisticsLayout& layout, int64_t k,
                                                 int64_t column) {
  int64_t total = 0;
  for (int m = 0; m < batch.modalities; ++m) total += batch.modality[m].total_rows;
  const uint64_t key = counter_random::key(batch.seed, *batch.step, kRowStream);
  for (int place = 0, attempt = 0; place < batch.candidates; ++place) {
    int m = 0;
    int64_t local = 0;
    bool here = false, found = false;
    do {
      int64_t drawn = total > 0 ? counter_random::integer(key, k * kAttempts + attempt, total) : -1;
      if (total > 0 && attempt == 0 && batch.choice != nullptr) drawn = counter_random::place(batch.choice[k], total);
      for (m = 0; drawn >= batch.modality[m].total_rows; ++m) drawn -= batch.modality[m].total_rows;
      local = drawn - batch.modality[m].first_row;
      here = drawn >= 0 && local >= 0 && local < batch.modality[m].features.rows;
      found = here && is_valid(batch.modality[m], local);
      ++attempt;
    } while (batch.candidates == 1 && here && !found && attempt < kAttempts);
    const int64_t written = place * batch.codewords + k;
    if (threadIdx.x == 0 && blockIdx.y == 0) batch.statistics[layout.found + written] = found ? 1.0 : 0.0;
    if (threadIdx.x < kColumns && column < batch.width)
      batch.statistics[layout.candidate + written * batch.width + column] =
          found ? read<T>(batch.modality[m].features, local, column) : 0.0;
  }
}

// The codeword of a row, or -1 where the row does not count.
__device__ __forceinline__ int codeword_at(const Batch& batch, const Modality& own, int64_t row) {
  if (!is_valid(own, row)) return -1;
  const int64_t code = own.index[row * own.index_stride];
  return code >= 0 && code < batch.codewords ? static_cast<int>(code) : -1;
}

// Block (k, y) scans all indices for codeword k and sums columns y of its mixed rows. It reads the indices in chunks,
// eight consecutive rows a thread, and lists the rows of the codeword in their order.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scan_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout) {
  UNICODE_FAST_SHARED(int64_t, found, [kChunkRows]);
  UNICODE_FAST_SHARED(int, warp_sums, [kThreads / 32]);
  const int64_t k = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  const int group = threadIdx.x / kColumns;
  const bool reports = blockIdx.y == 0 && threadIdx.x == 0;
  double sum = 0;
  for (int m = 0; m < batch.modalities; ++m) {
    const Modality& own = batch.modality[m];
    const int64_t rows = own.features.rows;
    int64_t matches = 0, valid_rows = 0;
    for (int64_t start = 0; start < rows; start += kChunkRows) {
      const int64_t first = start + threadIdx.x * kRowsPerThread;
      unsigned bits = 0, valid_bits = 0;
#pragma unroll
      for (int e = 0; e < kRowsPerThread; ++e) {
        const int code = first + e < rows ? codeword_at(batch, own, first + e) : -1;
        valid_bits |= static_cast<unsigned>(code >= 0) << e;
        bits |= static_cast<unsigned>(code == k) << e;
      }
      // Two counts in one number: neither reaches 2^16 in a chunk.
      int both;
      int place = sum_before<kThreads>(__popc(bits) + (__popc(valid_bits) << 16), warp_sums, both) & 0xffff;
      const int number = both & 0xffff;
      for (; bits != 0; bits &= bits - 1) found[place++] = first + __ffs(bits) - 1;
      __syncthreads();
      if (column < batch.width) {
#pragma unroll 4
        for (int i = group; i < number; i += kGroups) sum += own.weight * mixed<T>(batch, m, found[i], column);
      }
      matches += number;
      valid_rows += both >> 16;
    }
    if (reports) batch.statistics[layout.codeword_count + m * batch.codewords + k] = static_cast<double>(matches);
    if (reports && k == 0) batch.statistics[layout.row_count + m] = static_cast<double>(valid_rows);
  }
  const double total = add_groups(sum);
  if (group == 0 && column < batch.width) batch.statistics[layout.mixed_sum + k * batch.width + column] = total;
  write_candidates<T>(batch, layout, k, column);
}

// The tiles of rows: consecutive rows of one modality each, the modalities one after the other.
struct Tile {
  int modality;
  int64_t first, last;  // rows
};

__device__ __forceinline__ int64_t tiles_of(const Modality& modality, int tile_rows) {
  return (modality.features.rows + tile_rows - 1) / tile_rows;
}

__device__ __forceinline__ Tile tile_at(const Batch& batch, int tile_rows, int64_t number) {
  int m = 0;
  while (number >= tiles_of(batch.modality[m], tile_rows)) number -= tiles_of(batch.modality[m++], tile_rows);
  const int64_t first = number * tile_rows;
  return {m, first, min(first + tile_rows, batch.modality[m].features.rows)};
}

// Counts the rows of each codeword in each tile, one block a tile; `counts` (tiles, M) must be zero.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ Batch batch, int tile_rows, int* counts) {
  const Tile tile = tile_at(batch, tile_rows, blockIdx.x);
  const Modality& own = batch.modality[tile.modality];
  for (int64_t row = tile.first + threadIdx.x; row < tile.last; row += kThreads) {
    const int code = codeword_at(batch, own, row);
    if (code >= 0) atomicAdd(&counts[blockIdx.x * batch.codewords + code], 1);
  }
}

// One thread for each codeword: turns its count in each tile into the place of the tile's first row among the
// codeword's rows. Writes its count in each modality and its total.
__global__ void __launch_bounds__(kThreads)
    prefix_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout, int tile_rows,
                  int* counts, int* totals) {
  constexpr int kAtOnce = 8;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k >= batch.codewords) return;
  int running = 0;
  int64_t tile = 0;
  for (int m = 0; m < batch.modalities; ++m) {
    const int before = running;
    const int64_t last = tile + tiles_of(batch.modality[m], tile_rows);
    while (tile < last) {
      int* const at = counts + tile * batch.codewords + k;
      const int number = static_cast<int>(min(static_cast<int64_t>(kAtOnce), last - tile));
      int values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) values[i] = i < number ? at[i * batch.codewords] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < number) at[i * batch.codewords] = running;
        running += values[i];
      }
      tile += number;
    }
    batch.statistics[layout.codeword_count + m * batch.codewords + k] = static_cast<double>(running - before);
  }
  totals[k] = running;
}

constexpr int kStartThreads = 1024;

// In one block: the starts of each codeword's rows and of the pieces of its sum, and the rows of each modality.
__global__ void __launch_bounds__(kStartThreads)
    start_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                 const int* totals, int* starts, int* piece_starts) {
  UNICODE_FAST_SHARED(long long, warp_sums, [kStartThreads / 32]);
  const int64_t codewords = batch.codewords;
  long long before = 0;  // rows in the lower half, pieces in the upper
  for (int64_t first = 0; first < codewords; first += kStartThreads) {
    const int64_t k = first + threadIdx.x;
    const long long rows = k < codewords ? totals[k] : 0;
    const long long pieces = (rows + kPieceRows - 1) / kPieceRows;
    long long all;
    const long long own = before + sum_before<kStartThreads>(rows + (pieces << 32), warp_sums, all);
    if (k < codewords) {
      starts[k] = static_cast<int>(own & 0xffffffff);
      piece_starts[k] = static_cast<int>(own >> 32);
    }
    before += all;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    starts[codewords] = static_cast<int>(before & 0xffffffff);
    piece_starts[codewords] = static_cast<int>(before >> 32);
  }
  for (int m = 0; m < batch.modalities; ++m) {
    long long rows = 0;
    for (int64_t k = threadIdx.x; k < codewords; k += kStartThreads)
      rows += static_cast<long long>(batch.statistics[layout.codeword_count + m * codewords + k]);
    long long all;
    sum_before<kStartThreads>(rows, warp_sums, all);
    if (threadIdx.x == 0) batch.statistics[layout.row_count + m] = static_cast<double>(all);
    __syncthreads();
  }
}

// Sorts the rows of a tile by codeword, one warp a tile: equal codewords keep the order of their rows. Rows are
// numbered over all modalities. `counts` holds the place of each codeword's next row of the tile.
__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ Batch batch, int tile_rows,
                                                        int64_t tiles, int* counts, const int* starts, int* order) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (number >= tiles) return;
  const int lane = threadIdx.x % 32;
  const Tile tile = tile_at(batch, tile_rows, number);
  const Modality& own = batch.modality[tile.modality];
  int64_t offset = 0;
  for (int m = 0; m < tile.modality; ++m) offset += batch.modality[m].features.rows;
  int* const next = counts + number * batch.codewords;
  for (int64_t start = tile.first; start < tile.last; start += 32) {
    const int64_t row = start + lane;
    const int code = row < tile.last ? codeword_at(batch, own, row) : -1;
    const unsigned equal = __match_any_sync(~0u, code);
    const int leader = __ffs(equal) - 1;
    int place = 0;
    if (lane == leader && code >= 0) {
      place = next[code];
      next[code] = place + __popc(equal);
    }
    place = __shfl_sync(~0u, place, leader) + __popc(equal & ((1u << lane) - 1));
    if (code >= 0) order[starts[code] + place] = static_cast<int>(offset + row);
    // The next leader of these codewords may be another thread.
    __syncwarp();
  }
}

// Block (p, y) sums columns y of piece p, up to kPieceRows rows of one codeword.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    piece_kernel(const __grid_constant__ Batch batch, const int* starts, const int* piece_starts, const int* order,
                 double* sums) {
  const int64_t piece = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  if (piece >= piece_starts[batch.codewords]) return;
  // The last codeword whose pieces start at or before this one; codewords without rows have none.
  int64_t low = 0, high = batch.codewords;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (piece_starts[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t first = starts[low] + (piece - piece_starts[low]) * kPieceRows;
  const int64_t last = min(first + kPieceRows, static_cast<int64_t>(starts[low + 1]));
  double sum = 0;
  if (column < batch.width) {
#pragma unroll 4
    for (int64_t i = first + threadIdx.x / kColumns; i < last; i += kGroups) {
      int64_t row = order[i];
      int m = 0;
      while (row >= batch.modality[m].features.rows) row -= batch.modality[m++].features.rows;
      sum += batch.modality[m].weight * mixed<T>(batch, m, row, column);
    }
  }
  const double total = add_groups(sum);
  if (threadIdx.x < kColumns && column < batch.width) sums[piece * batch.width + column] = total;
}

// Block (k, y) adds up columns y of codeword k's pieces, and finds its candidates.
template <class T>
__global__ void __launch_bounds__(kColumns)
    join_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                const int* piece_starts, const double* sums) {
  const int64_t k = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  if (column < batch.width) {
    double sum = 0;
    for (int64_t piece = piece_starts[k]; piece < piece_starts[k + 1]; ++piece)
      sum += sums[piece * batch.width + column];
    batch.statistics[layout.mixed_sum + k * batch.width + column] = sum;
  }
  write_candidates<T>(batch, layout, k, column);
}

template <class T>
cudaError_t launch_for(const StatisticsPlan& plan, const Batch& batch, void* workspace, cudaStream_t stream) {
  const StatisticsLayout layout = statistics_layout(batch.modalities, batch.codewords, batch.width, batch.candidates);
  const auto column_blocks = static_cast<unsigned>((batch.width + kColumns - 1) / kColumns);
  const dim3 codeword_grid(static_cast<unsigned>(batch.codewords), column_blocks);
  if (!plan.sorted) {
    UNICODE_FAST_LAUNCH(codeword_grid, kThreads, 0, stream, scan_kernel<T>)(batch, layout);
    return cudaGetLastError();
  }
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  int* const counts = reinterpret_cast<int*>(base + plan.counts);
  int* const totals = reinterpret_cast<int*>(base + plan.totals);
  int* const starts = reinterpret_cast<int*>(base + plan.starts);
  int* const piece_starts = reinterpret_cast<int*>(base + plan.piece_starts);
  int* const order = reinterpret_cast<int*>(base + plan.order);
  double* const sums = reinterpret_cast<double*>(base + plan.sums);
  cudaError_t error = cudaMemsetAsync(counts, 0, plan.tiles * batch.codewords * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(static_cast<unsigned>(plan.tiles), kThreads, 0, stream, count_kernel)(batch, plan.tile_rows,
                                                                                            counts);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const auto codeword_blocks = static_cast<unsigned>((batch.codewords + kThreads - 1) / kThreads);
  UNICODE_FAST_LAUNCH(codeword_blocks, kThreads, 0, stream, prefix_kernel)(batch, layout, plan.tile_rows, counts,
                                                                           totals);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(1, kStartThreads, 0, stream, start_kernel)(batch, layout, totals, starts, piece_starts);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const auto warp_blocks = static_cast<unsigned>((plan.tiles + kThreads / 32 - 1) / (kThreads / 32));
  UNICODE_FAST_LAUNCH(warp_blocks, kThreads, 0, stream, sort_kernel)(batch, plan.tile_rows, plan.tiles, counts, starts,
                                                                     order);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const dim3 piece_grid(static_cast<unsigned>(plan.pieces), column_blocks);
  UNICODE_FAST_LAUNCH(piece_grid, kThreads, 0, stream, piece_kernel<T>)(batch, starts, piece_starts, order, sums);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(codeword_grid, kColumns, 0, stream, join_kernel<T>)(batch, layout, piece_starts, sums);
  return cudaGetLastError();
}

}  // namespace

StatisticsPlan plan_statistics(const Batch& batch) {
  StatisticsPlan plan;
  for (int m = 0; m < batch.modalities; ++m) plan.rows += batch.modality[m].features.rows;
  plan.sorted = plan.rows > kMostComparisons / batch.codewords;
  if (!plan.sorted) return plan;
  // Short tiles are sorted faster, but all of them together count every codeword.
  int64_t tile_rows = kLeastTileRows;
  while (plan.rows / tile_rows > kMostTileCounts / batch.codewords && tile_rows < plan.rows) tile_rows *= 2;
  plan.tile_rows = static_cast<int>(tile_rows);
  for (int m = 0; m < batch.modalities; ++m)
    plan.tiles += (batch.modality[m].features.rows + tile_rows - 1) / tile_rows;
  plan.pieces = plan.rows / kPieceRows + batch.codewords;
  const auto place = [&plan](size_t bytes) {
    const size_t start = plan.bytes;
    plan.bytes += static_cast<size_t>(round_to(static_cast<int64_t>(bytes), 256));
    return start;
  };
  plan.counts = place(plan.tiles * batch.codewords * sizeof(int));
  plan.totals = place(batch.codewords * sizeof(int));
  plan.starts = place((batch.codewords + 1) * sizeof(int));
  plan.piece_starts = place((batch.codewords + 1) * sizeof(int));
  plan.order = place(plan.rows * sizeof(int));
  plan.sums = place(plan.pieces * batch.width * sizeof(double));
  return plan;
}

cudaError_t launch_statistics(const StatisticsPlan& plan, const Batch& batch, void* workspace, cudaStream_t stream) {
  const Number number = batch.modality[0].features.number;
  bool same = true;
  for (int m = 0; m < batch.modalities; ++m) {
    same = same && batch.modality[m].features.number == number;
    same = same && (!batch.given_partners || batch.modality[m].partners.number == number);
  }
  if (!same) return launch_for<Any>(plan, batch, workspace, stream);
  switch (number) {
    case Number::kFloat64:
      return launch_for<double>(plan, batch, workspace, stream);
    case Number::kFloat32:
      return launch_for<float>(plan, batch, workspace, stream);
    case Number::kFloat16:
      return launch_for<__half>(plan, batch, workspace, stream);
    default:
      return launch_for<__nv_bfloat16>(plan, batch, workspace, stream);
  }
}

}  // namespace unicode_fast::cuda
