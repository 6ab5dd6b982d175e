// The statistics of a batch for a codebook update: counts of each codeword, sums of mixed rows, and rows for the resets
// of idle codewords. Fused with their application, the launch that makes the sums writes the state. Every sum has a
// fixed order, so results repeat bit for bit.

#include <cstring>

#include "../../common/counter_random.h"
#include "../../common/tiles.h"
#include "../arrivals.cuh"
#include "../launch.cuh"
#include "../numbers.cuh"
#include "../reduce.cuh"
#include "codebook_apply.cuh"

namespace unicode_fast::cuda {
namespace {

// A block sums kColumns columns; its threads form kGroups groups that take rows in turn.
constexpr int kColumns = 128, kGroups = 2, kThreads = kColumns * kGroups;
// Blocks on a multiprocessor; more would leave too few registers for the sums.
constexpr int kBlocks = 4;
constexpr int kRowsPerThread = 8, kChunkRows = kThreads * kRowsPerThread;
constexpr int64_t kMostComparisons = 1 << 24;  // rows times codewords, for the unsorted sums
constexpr int64_t kPieceRows = 512, kLeastTileRows = 512, kMostTileCounts = 1 << 23;
constexpr int64_t kMostPlanned = 1 << 13;  // codewords that one block plans, for a fused update without sorting
constexpr int64_t kRowStream = 2;

// The number type of all features and partners, or Any if it is tested at each read.
struct Any {};

template <class T>
struct Type {
  using Of = T;
};

// What a launch over rows ends with: sums of pieces, sums of codewords, or the state, of either type.
enum class End { kPieces, kSums, kFloat32, kFloat64 };

template <End kEnd>
constexpr bool kWritesState = kEnd == End::kFloat32 || kEnd == End::kFloat64;
template <End kEnd>
using StateNumber = std::conditional_t<kEnd == End::kFloat64, double, float>;

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

// kNumbers consecutive elements of a row: one, or the 16 bytes at an aligned address.
template <class T, int kNumbers>
struct Elements {
  std::conditional_t<std::is_same_v<T, Any>, double, T> of[kNumbers];

  __device__ __forceinline__ Elements(const Matrix& matrix, int64_t row, int64_t column) {
    if constexpr (std::is_same_v<T, Any>) {
      of[0] = read<T>(matrix, row, column);
    } else {
      const T* const from =
          static_cast<const T*>(matrix.data) + row * matrix.row_stride + column * matrix.column_stride;
      if constexpr (kNumbers == 1) {
        of[0] = *from;
      } else {
        const uint4 bits = *reinterpret_cast<const uint4*>(from);
        std::memcpy(of, &bits, sizeof bits);
      }
    }
  }
};

// Adds elements of a valid row, mixed with its partner and weighted, to sums. If no partner is given, it is the mean of
// the other modalities' valid rows at the same position.
template <class T, int kNumbers>
__device__ __forceinline__ void add_mixed(const Batch& batch, int m, int64_t row, int64_t column,
                                          double (&sums)[kNumbers]) {
  const Modality& own = batch.modality[m];
  const Elements<T, kNumbers> values(own.features, row, column);
  double partner[kNumbers] = {};
  int number = 0;
  if (batch.mixes && batch.given_partners) {
    const Elements<T, kNumbers> given(own.partners, row, column);
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) partner[i] = to_double(given.of[i]);
    number = 1;
  } else if (batch.mixes) {
    for (int other = 0; other < batch.modalities; ++other) {
      if (other == m || !is_valid(batch.modality[other], row)) continue;
      const Elements<T, kNumbers> others(batch.modality[other].features, row, column);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) partner[i] += to_double(others.of[i]);
      ++number;
    }
  }
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) {
    double value = to_double(values.of[i]);
    if (number > 0) value = batch.own_weight * value + (1 - batch.own_weight) * (partner[i] / number);
    sums[i] += own.weight * value;
  }
}

int64_t column_blocks(const Batch& batch) { return (batch.width + kColumns - 1) / kColumns; }

// Adds up the groups' sums of each column. A group has a thread for kNumbers columns; the first kColumns threads get
// the result of a column each.
template <int kNumbers>
__device__ __forceinline__ double add_groups(const double (&own)[kNumbers]) {
  constexpr int kAll = kGroups * kNumbers, kOfGroup = kColumns / kNumbers;
  UNICODE_FAST_SHARED(double, sums, [kAll][kColumns]);
#pragma unroll
  for (int i = 0; i < kNumbers; ++i) sums[threadIdx.x / kOfGroup][threadIdx.x % kOfGroup * kNumbers + i] = own[i];
  __syncthreads();
  double total = 0;
#pragma unroll
  for (int group = 0; group < kAll; ++group) total += sums[group][threadIdx.x % kColumns];
  return total;
}

// A row drawn for the reset of a codeword, and whether it is valid and held here.
struct Drawn {
  int modality;
  int64_t row;
  bool found;
};

// Candidate `place` of codeword k; a single one is the first valid row of several attempts.
__device__ __forceinline__ Drawn draw_row(const Batch& batch, int64_t k, int place) {
  int64_t total = 0;
  for (int m = 0; m < batch.modalities; ++m) total += batch.modality[m].total_rows;
  const uint64_t key = counter_random::key(batch.seed, *batch.step, kRowStream);
  int m = 0, attempt = place;
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
  return {m, local, found};
}

template <class T>
__device__ __forceinline__ double candidate_at(const Batch& batch, const Drawn& drawn, int64_t column) {
  return drawn.found ? read<T>(batch.modality[drawn.modality].features, drawn.row, column) : 0.0;
}

// Writes which of the rows drawn for codeword k are valid and held here, and this block's columns of them.
template <class T>
__device__ __forceinline__ void write_candidates(const Batch& batch, const StatisticsLayout& layout, int64_t k,
                                                 int64_t column) {
  for (int place = 0; place < batch.candidates; ++place) {
    const Drawn drawn = draw_row(batch, k, place);
    const int64_t written = place * batch.codewords + k;
    if (threadIdx.x == 0 && blockIdx.y == 0) batch.statistics[layout.found + written] = drawn.found ? 1.0 : 0.0;
    if (threadIdx.x < kColumns && column < batch.width)
      batch.statistics[layout.candidate + written * batch.width + column] = candidate_at<T>(batch, drawn, column);
  }
}

// Ends the update of codeword k in this block's columns; `mixed` is the column's sum, in the threads that write.
template <class T, End kEnd>
__device__ __forceinline__ void write_state(const Batch& batch, const Update& update, int64_t k, int64_t column,
                                            double mixed) {
  const bool writes = threadIdx.x < kColumns && column < batch.width;
  bool found = false;
  double candidate = 0;
  if (update.rule.from_features && update.reset[k] != 0) {
    const Drawn drawn = draw_row(batch, k, 0);
    found = drawn.found;
    if (writes) candidate = candidate_at<T>(batch, drawn, column);
  }
  finish_codeword<StateNumber<kEnd>>(update, k, column, writes, mixed, found, candidate);
}

// What the first launch of a fused update does beside its counts: `zeros` int32 are set to 0, and the step advances
// after a copy for this update's draws. The pointers are null without a fused update.
struct Start {
  int* zeros;
  int64_t number;
  int64_t *step, *drawn_step;
};

__device__ __forceinline__ void start_update(const Start& start) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < start.number;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    start.zeros[i] = 0;
  if (start.step == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  *start.drawn_step = *start.step;
  *start.step += 1;
}

// The codeword of a row, or -1 where the row does not count.
__device__ __forceinline__ int codeword_at(const Batch& batch, const Modality& own, int64_t row) {
  if (!is_valid(own, row)) return -1;
  const int64_t code = own.index[row * own.index_stride];
  return code >= 0 && code < batch.codewords ? static_cast<int>(code) : -1;
}

// Block (k, y) scans all indices for codeword k and sums columns y of its mixed rows. It reads the indices in chunks,
// eight consecutive rows a thread, and lists the rows of the codeword in their order. Where it writes the state, the
// counts are there already.
template <class T, End kEnd>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scan_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                const __grid_constant__ Update update) {
  UNICODE_FAST_SHARED(int64_t, found, [kChunkRows]);
  UNICODE_FAST_SHARED(int, warp_sums, [kThreads / 32]);
  const int64_t k = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x % kColumns;
  const int group = threadIdx.x / kColumns;
  const bool reports = blockIdx.y == 0 && threadIdx.x == 0;
  double sum[1] = {};
  for (int m = 0; m < batch.modalities; ++m) {
    const Modality& own = batch.modality[m];
    const int64_t rows = own.features.rows;
    if (kWritesState<kEnd> && !(batch_count(update, m, k) > 0)) continue;
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
        for (int i = group; i < number; i += kGroups) add_mixed<T>(batch, m, found[i], column, sum);
      }
      matches += number;
      valid_rows += both >> 16;
    }
    if (kWritesState<kEnd>) continue;
    if (reports) batch.statistics[layout.codeword_count + m * batch.codewords + k] = static_cast<double>(matches);
    if (reports && k == 0) batch.statistics[layout.row_count + m] = static_cast<double>(valid_rows);
  }
  const double total = add_groups(sum);
  if constexpr (kWritesState<kEnd>) {
    write_state<T, kEnd>(batch, update, k, column, total);
    return;
  }
  if (group == 0 && column < batch.width) batch.statistics[layout.mixed_sum + k * batch.width + column] = total;
  write_candidates<T>(batch, layout, k, column);
}

// The first launch of a fused update without sorting, one block: counts the rows of each codeword, then plans the
// update.
template <End kEnd>
__global__ void __launch_bounds__(kPlanThreads, 1)
    count_batch_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Update update,
                       const __grid_constant__ Start start) {
  constexpr int kAtOnce = 8;
  UNICODE_FAST_SHARED(int64_t, warp_sums, [kPlanThreads / 32]);
  double* const counts = batch.statistics + update.layout.codeword_count;
  start_update(start);
  for (int64_t i = threadIdx.x; i < batch.modalities * batch.codewords; i += kPlanThreads) counts[i] = 0;
  __syncthreads();
  for (int m = 0; m < batch.modalities; ++m) {
    const Modality& own = batch.modality[m];
    int64_t valid_rows = 0, all;
    for (int64_t first = threadIdx.x; first < own.features.rows; first += kPlanThreads * kAtOnce) {
      int codes[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = first + i * kPlanThreads;
        codes[i] = row < own.features.rows ? codeword_at(batch, own, row) : -1;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (codes[i] < 0) continue;
        atomicAdd(&counts[m * batch.codewords + codes[i]], 1.0);
        ++valid_rows;
      }
    }
    sum_before<kPlanThreads>(valid_rows, warp_sums, all);
    if (threadIdx.x == 0) batch.statistics[update.layout.row_count + m] = static_cast<double>(all);
    __syncthreads();
  }
  plan_codewords<StateNumber<kEnd>>(update, 0, 1);
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

// By one block: the starts of each codeword's rows and of the pieces of its sum, and the rows of each modality. Ends
// with a barrier.
template <int kBlock>
__device__ __forceinline__ void write_starts(const Batch& batch, const StatisticsLayout& layout, const int* totals,
                                             int* starts, int* piece_starts) {
  UNICODE_FAST_SHARED(long long, warp_sums, [kBlock / 32]);
  const int64_t codewords = batch.codewords;
  long long before = 0;  // rows in the lower half, pieces in the upper
  for (int64_t first = 0; first < codewords; first += kBlock) {
    const int64_t k = first + threadIdx.x;
    const long long rows = k < codewords ? totals[k] : 0;
    const long long pieces = (rows + kPieceRows - 1) / kPieceRows;
    long long all;
    const long long own = before + sum_before<kBlock>(rows + (pieces << 32), warp_sums, all);
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
    for (int64_t k = threadIdx.x; k < codewords; k += kBlock)
      rows += static_cast<long long>(batch.statistics[layout.codeword_count + m * codewords + k]);
    long long all;
    sum_before<kBlock>(rows, warp_sums, all);
    if (threadIdx.x == 0) batch.statistics[layout.row_count + m] = static_cast<double>(all);
    __syncthreads();
  }
}

constexpr int kStartThreads = 1024;

__global__ void __launch_bounds__(kStartThreads)
    start_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                 const int* totals, int* starts, int* piece_starts) {
  write_starts<kStartThreads>(batch, layout, totals, starts, piece_starts);
}

// Sorts the rows of a tile by codeword, by one warp: equal codewords keep the order of their rows. Rows are numbered
// over all modalities. `counts` holds the place of each codeword's next row of the tile.
__device__ __forceinline__ void sort_tile(const Batch& batch, int tile_rows, int64_t number, int* counts,
                                          const int* starts, int* order) {
  constexpr int kAtOnce = 8;  // 32 rows each
  const int lane = threadIdx.x % 32;
  const Tile tile = tile_at(batch, tile_rows, number);
  const Modality& own = batch.modality[tile.modality];
  int64_t offset = 0;
  for (int m = 0; m < tile.modality; ++m) offset += batch.modality[m].features.rows;
  int* const next = counts + number * batch.codewords;
  for (int64_t start = tile.first; start < tile.last; start += 32 * kAtOnce) {
    int codes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t row = start + i * 32 + lane;
      codes[i] = row < tile.last ? codeword_at(batch, own, row) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const unsigned equal = __match_any_sync(~0u, codes[i]);
      const int leader = __ffs(equal) - 1;
      int place = 0;
      if (lane == leader && codes[i] >= 0) {
        place = next[codes[i]];
        next[codes[i]] = place + __popc(equal);
      }
      place = __shfl_sync(~0u, place, leader) + __popc(equal & ((1u << lane) - 1));
      if (codes[i] >= 0) order[starts[codes[i]] + place] = static_cast<int>(offset + start + i * 32 + lane);
      // The next leader of these codewords may be another thread.
      __syncwarp();
    }
  }
}

// One warp a tile.
__global__ void __launch_bounds__(kThreads) sort_kernel(const __grid_constant__ Batch batch, int tile_rows,
                                                        int64_t tiles, int* counts, const int* starts, int* order) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (number < tiles) sort_tile(batch, tile_rows, number, counts, starts, order);
}

// Workspaces of the sorted sums; StatisticsPlan describes them.
struct Sorted {
  int tile_rows;
  int64_t tiles, pieces;
  int *counts, *totals, *starts, *piece_starts, *order, *arrived;
  double* sums;
};

// In `arrived`: blocks of order_kernel that have begun, blocks whose prefixes are written, 1 after the starts. Then for
// each block of columns and codeword its pieces that are summed.
constexpr int kBegun = 0, kPrefixes = 1, kStarted = 2, kJoined = 3;

// Counts the rows of each codeword in each tile, one block a tile.
__global__ void __launch_bounds__(kThreads)
    tile_kernel(const __grid_constant__ Batch batch, const __grid_constant__ Sorted sorted,
                const __grid_constant__ Start start) {
  const Tile tile = tile_at(batch, sorted.tile_rows, blockIdx.x);
  const Modality& own = batch.modality[tile.modality];
  int* const counts = sorted.counts + blockIdx.x * batch.codewords;
  for (int64_t k = threadIdx.x; k < batch.codewords; k += kThreads) counts[k] = 0;
  start_update(start);
  __syncthreads();
  for (int64_t row = tile.first + threadIdx.x; row < tile.last; row += kThreads) {
    const int code = codeword_at(batch, own, row);
    if (code >= 0) atomicAdd(&counts[code], 1);
  }
}

constexpr int kOrderThreads = 512, kOrderWarps = kOrderThreads / 32;

// As prefix_kernel, for 32 codewords. Each warp does a part of a modality's tiles: it adds them up, then writes.
__device__ __forceinline__ void write_prefixes(const Batch& batch, const StatisticsLayout& layout, const Sorted& sorted,
                                               int64_t block) {
  constexpr int kAtOnce = 16;
  UNICODE_FAST_SHARED(int, part_sums, [kOrderWarps][32]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t k = block * 32 + lane, codewords = batch.codewords;
  int before_modality = 0;
  int64_t first_tile = 0;
  for (int m = 0; m < batch.modalities; ++m) {
    const int tiles = static_cast<int>(tiles_of(batch.modality[m], sorted.tile_rows));
    const int share = (tiles + kOrderWarps - 1) / kOrderWarps;
    const int first = min(warp * share, tiles), last = min(first + share, tiles);
    int* const counts = sorted.counts + first_tile * codewords + k;
    int sum = 0;
    if (k < codewords) {
#pragma unroll 16
      for (int tile = first; tile < last; ++tile) sum += counts[tile * codewords];
    }
    part_sums[warp][lane] = sum;
    __syncthreads();
    int running = before_modality, total = 0;
#pragma unroll
    for (int other = 0; other < kOrderWarps; ++other) {
      if (other < warp) running += part_sums[other][lane];
      total += part_sums[other][lane];
    }
    for (int tile = first; tile < last && k < codewords; tile += kAtOnce) {
      int* const at = counts + tile * codewords;
      const int number = min(kAtOnce, last - tile);
      int values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) values[i] = i < number ? at[i * codewords] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < number) at[i * codewords] = running;
        running += values[i];
      }
    }
    if (warp == 0 && k < codewords)
      batch.statistics[layout.codeword_count + m * codewords + k] = static_cast<double>(total);
    before_modality += total;
    first_tile += tiles;
    __syncthreads();
  }
  if (warp == 0 && k < codewords) sorted.totals[k] = before_modality;
}

static_assert(kOrderThreads == kPlanThreads);

// Prefixes, starts and sorting in one launch, and the plan of an update that `plan_blocks` blocks make. A block takes
// its work by the order in which blocks begin. So a block that sorts or plans waits only for blocks that have begun
// before it, and these wait for none.
template <End kEnd>
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                 const __grid_constant__ Sorted sorted, const __grid_constant__ Update update, int plan_blocks) {
  UNICODE_FAST_SHARED(int, shared_number, [1]);
  int& number = shared_number[0];
  const int prefix_blocks = static_cast<int>((batch.codewords + 31) / 32);
  if (threadIdx.x == 0) number = count_block(sorted.arrived + kBegun);
  __syncthreads();
  const int begun = number;
  if (begun >= prefix_blocks) {
    if (threadIdx.x == 0) wait_for_count(sorted.arrived + kStarted, 1);
    __syncthreads();
    if constexpr (kWritesState<kEnd>) {
      if (begun < prefix_blocks + plan_blocks) {
        plan_codewords<StateNumber<kEnd>>(update, begun - prefix_blocks, plan_blocks);
        return;
      }
    }
    const int64_t tile = static_cast<int64_t>(begun - prefix_blocks - plan_blocks) * kOrderWarps + threadIdx.x / 32;
    if (tile < sorted.tiles) sort_tile(batch, sorted.tile_rows, tile, sorted.counts, sorted.starts, sorted.order);
    return;
  }
  write_prefixes(batch, layout, sorted, begun);
  __syncthreads();
  if (threadIdx.x == 0) number = count_block(sorted.arrived + kPrefixes);
  __syncthreads();
  if (number != prefix_blocks - 1) return;
  write_starts<kOrderThreads>(batch, layout, sorted.totals, sorted.starts, sorted.piece_starts);
  if (threadIdx.x == 0) count_block(sorted.arrived + kStarted);
}

// The sum of a column over codeword k's pieces.
__device__ __forceinline__ double join_pieces(const Batch& batch, const int* piece_starts, const double* sums,
                                              int64_t k, int64_t column) {
  double sum = 0;
  for (int64_t piece = piece_starts[k]; piece < piece_starts[k + 1]; ++piece) sum += sums[piece * batch.width + column];
  return sum;
}

// The last codeword whose pieces start at or before this one; codewords without rows have none.
__device__ __forceinline__ int64_t codeword_of(const Batch& batch, const int* piece_starts, int64_t piece) {
  int64_t low = 0, high = batch.codewords;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (piece_starts[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sums a block's columns of a piece of codeword k, up to kPieceRows rows; a thread reads kNumbers columns of a row at
// once. The first kColumns threads get the sum of a column each.
template <class T, int kNumbers>
__device__ __forceinline__ double sum_piece(const Batch& batch, const Sorted& sorted, int64_t k, int64_t piece,
                                            int64_t first_column) {
  constexpr int kOfGroup = kColumns / kNumbers;
  const int64_t first = sorted.starts[k] + (piece - sorted.piece_starts[k]) * kPieceRows;
  const int64_t last = min(first + kPieceRows, static_cast<int64_t>(sorted.starts[k + 1]));
  const int64_t read_column = first_column + threadIdx.x % kOfGroup * kNumbers;
  double sum[kNumbers] = {};
  if (read_column < batch.width) {
#pragma unroll(kNumbers > 4 ? 2 : 4)
    for (int64_t i = first + threadIdx.x / kOfGroup; i < last; i += kGroups * kNumbers) {
      int64_t row = sorted.order[i];
      int m = 0;
      while (row >= batch.modality[m].features.rows) row -= batch.modality[m++].features.rows;
      add_mixed<T>(batch, m, row, read_column, sum);
    }
  }
  return add_groups(sum);
}

// Block (p, y) sums columns y of piece p. Unless it ends with the pieces, the last block of a codeword adds them up,
// and each codeword has one more block: for its candidates, and for its columns where it has no rows.
template <class T, int kNumbers, End kEnd>
__global__ void __launch_bounds__(kThreads, kNumbers > 4 ? kBlocks - 1 : kBlocks)
    piece_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                 const __grid_constant__ Sorted sorted, const __grid_constant__ Update update) {
  const int* const piece_starts = sorted.piece_starts;
  const int64_t piece = blockIdx.x, first_column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t column = first_column + threadIdx.x % kColumns;  // of the results
  const bool writes = threadIdx.x < kColumns && column < batch.width;
  int64_t k = piece - sorted.pieces;
  double mixed = 0;
  if (kEnd != End::kPieces && k >= 0) {
    if (kEnd == End::kSums) write_candidates<T>(batch, layout, k, column);
    if (sorted.starts[k] != sorted.starts[k + 1]) return;
  } else {
    if (piece >= piece_starts[batch.codewords]) return;
    k = codeword_of(batch, piece_starts, piece);
    mixed = sum_piece<T, kNumbers>(batch, sorted, k, piece, first_column);
    const int pieces = piece_starts[k + 1] - piece_starts[k];
    if (!kWritesState<kEnd> || pieces > 1) {
      if (writes) sorted.sums[piece * batch.width + column] = mixed;
      if constexpr (kEnd == End::kPieces) return;
      UNICODE_FAST_SHARED(int, joined, [1]);
      __syncthreads();
      if (threadIdx.x == 0) joined[0] = count_block(sorted.arrived + kJoined + blockIdx.y * batch.codewords + k);
      __syncthreads();
      if (joined[0] != pieces - 1) return;
      if (writes) mixed = join_pieces(batch, piece_starts, sorted.sums, k, column);
    }
  }
  if constexpr (kWritesState<kEnd>) {
    write_state<T, kEnd>(batch, update, k, column, mixed);
  } else if (writes) {
    batch.statistics[layout.mixed_sum + k * batch.width + column] = mixed;
  }
}

// Block (k, y) adds up columns y of codeword k's pieces, and finds its candidates.
template <class T>
__global__ void __launch_bounds__(kColumns)
    join_kernel(const __grid_constant__ Batch batch, const __grid_constant__ StatisticsLayout layout,
                const int* piece_starts, const double* sums) {
  const int64_t k = blockIdx.x, column = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  if (column < batch.width)
    batch.statistics[layout.mixed_sum + k * batch.width + column] = join_pieces(batch, piece_starts, sums, k, column);
  write_candidates<T>(batch, layout, k, column);
}

// Numbers in 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);
template <>
constexpr int kWide<Any> = 1;

// Whether all rows that are summed begin at addresses for loads of 16 bytes, and have whole ones.
template <class T>
bool loads_are_wide(const Batch& batch) {
  if (kWide<T> == 1 || batch.width % kWide<T> != 0) return false;
  const auto aligned = [](const Matrix& matrix) {
    return matrix.column_stride == 1 && matrix.row_stride % kWide<T> == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  };
  for (int m = 0; m < batch.modalities; ++m) {
    const Modality& own = batch.modality[m];
    if (!aligned(own.features) || (batch.given_partners && !aligned(own.partners))) return false;
  }
  return true;
}

template <class T, End kEnd>
cudaError_t launch_pieces(const StatisticsPlan& plan, const Batch& batch, const StatisticsLayout& layout,
                          const Sorted& sorted, const Update& update, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.pieces + (kEnd == End::kPieces ? 0 : batch.codewords));
  const dim3 grid(blocks, static_cast<unsigned>(column_blocks(batch)));
  if (plan.wide_loads && loads_are_wide<T>(batch)) {
    UNICODE_FAST_LAUNCH(grid, kThreads, 0, stream, piece_kernel<T, kWide<T>, kEnd>)(batch, layout, sorted, update);
  } else {
    UNICODE_FAST_LAUNCH(grid, kThreads, 0, stream, piece_kernel<T, 1, kEnd>)(batch, layout, sorted, update);
  }
  return cudaGetLastError();
}

// Three launches. The plan of an update has no blocks without one.
template <class T, End kEnd>
cudaError_t launch_sorted(const StatisticsPlan& plan, const Batch& batch, const StatisticsLayout& layout,
                          const Sorted& sorted, const Start& start, const Update& update, int plan_blocks,
                          cudaStream_t stream) {
  UNICODE_FAST_LAUNCH(static_cast<unsigned>(plan.tiles), kThreads, 0, stream, tile_kernel)(batch, sorted, start);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const int64_t blocks = (batch.codewords + 31) / 32 + plan_blocks + (plan.tiles + kOrderWarps - 1) / kOrderWarps;
  UNICODE_FAST_LAUNCH(static_cast<unsigned>(blocks), kOrderThreads, 0, stream, order_kernel<kEnd>)(
      batch, layout, sorted, update, plan_blocks);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  return launch_pieces<T, kEnd>(plan, batch, layout, sorted, update, stream);
}

dim3 codeword_grid(const Batch& batch) {
  return dim3(static_cast<unsigned>(batch.codewords), static_cast<unsigned>(column_blocks(batch)));
}

Sorted sorted_at(const StatisticsPlan& plan, unsigned char* base) {
  const auto at = [base](size_t place) { return reinterpret_cast<int*>(base + place); };
  return {plan.tile_rows,        plan.tiles,
          plan.pieces,           at(plan.counts),
          at(plan.totals),       at(plan.starts),
          at(plan.piece_starts), at(plan.order),
          at(plan.arrived),      reinterpret_cast<double*>(base + plan.sums)};
}

int64_t arrivals(const Batch& batch) { return kJoined + column_blocks(batch) * batch.codewords; }

template <class T>
cudaError_t launch_for(const StatisticsPlan& plan, const Batch& batch, void* workspace, cudaStream_t stream) {
  const StatisticsLayout layout = statistics_layout(batch.modalities, batch.codewords, batch.width, batch.candidates);
  if (!plan.sorted) {
    UNICODE_FAST_LAUNCH(codeword_grid(batch), kThreads, 0, stream, scan_kernel<T, End::kSums>)(batch, layout, Update{});
    return cudaGetLastError();
  }
  const Sorted sorted = sorted_at(plan, static_cast<unsigned char*>(workspace));
  if (plan.few_launches)
    return launch_sorted<T, End::kSums>(plan, batch, layout, sorted, {sorted.arrived, arrivals(batch)}, {}, 0, stream);
  cudaError_t error = cudaMemsetAsync(sorted.counts, 0, plan.tiles * batch.codewords * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(static_cast<unsigned>(plan.tiles), kThreads, 0, stream, count_kernel)(batch, plan.tile_rows,
                                                                                            sorted.counts);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const auto codeword_blocks = static_cast<unsigned>((batch.codewords + kThreads - 1) / kThreads);
  UNICODE_FAST_LAUNCH(codeword_blocks, kThreads, 0, stream, prefix_kernel)(batch, layout, plan.tile_rows, sorted.counts,
                                                                           sorted.totals);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(1, kStartThreads, 0, stream, start_kernel)(batch, layout, sorted.totals, sorted.starts,
                                                                 sorted.piece_starts);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  const auto warp_blocks = static_cast<unsigned>((plan.tiles + kThreads / 32 - 1) / (kThreads / 32));
  UNICODE_FAST_LAUNCH(warp_blocks, kThreads, 0, stream, sort_kernel)(batch, plan.tile_rows, plan.tiles, sorted.counts,
                                                                     sorted.starts, sorted.order);
  if ((error = cudaGetLastError()) != cudaSuccess) return error;
  if ((error = launch_pieces<T, End::kPieces>(plan, batch, layout, sorted, {}, stream)) != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(codeword_grid(batch), kColumns, 0, stream, join_kernel<T>)(batch, layout, sorted.piece_starts,
                                                                                 sorted.sums);
  return cudaGetLastError();
}

// The launches of a fused update; `update` has its workspaces, `space` is that of the statistics.
template <class T, End kEnd>
cudaError_t launch_fused_for(const UpdatePlan& plan, const Batch& batch, const Update& update, const Start& start,
                             unsigned char* space, cudaStream_t stream) {
  if (plan.statistics.sorted) {
    Sorted sorted = sorted_at(plan.statistics, space);
    sorted.arrived = start.zeros;
    return launch_sorted<T, kEnd>(plan.statistics, batch, update.layout, sorted, start, update, plan.apply.blocks,
                                  stream);
  }
  UNICODE_FAST_LAUNCH(1, kPlanThreads, 0, stream, count_batch_kernel<kEnd>)(batch, update, start);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  UNICODE_FAST_LAUNCH(codeword_grid(batch), kThreads, 0, stream, scan_kernel<T, kEnd>)(batch, update.layout, update);
  return cudaGetLastError();
}

// Calls `launch` with the number type of all features and partners.
template <class F>
cudaError_t with_type(const Batch& batch, const F& launch) {
  const Number number = batch.modality[0].features.number;
  bool same = true;
  for (int m = 0; m < batch.modalities; ++m) {
    same = same && batch.modality[m].features.number == number;
    same = same && (!batch.given_partners || batch.modality[m].partners.number == number);
  }
  if (!same) return launch(Type<Any>{});
  switch (number) {
    case Number::kFloat64:
      return launch(Type<double>{});
    case Number::kFloat32:
      return launch(Type<float>{});
    case Number::kFloat16:
      return launch(Type<__half>{});
    default:
      return launch(Type<__nv_bfloat16>{});
  }
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
  plan.arrived = place((kJoined + column_blocks(batch) * batch.codewords) * sizeof(int));
  plan.sums = place(plan.pieces * batch.width * sizeof(double));
  return plan;
}

cudaError_t launch_statistics(const StatisticsPlan& plan, const Batch& batch, void* workspace, cudaStream_t stream) {
  return with_type(batch,
                   [&](auto type) { return launch_for<typename decltype(type)::Of>(plan, batch, workspace, stream); });
}

UpdatePlan plan_update(const Batch& batch, const State& state, const Rule& rule, bool fused) {
  UpdatePlan plan;
  plan.statistics = plan_statistics(batch);
  fused = fused && (plan.statistics.sorted ? plan.statistics.few_launches : batch.codewords <= kMostPlanned);
  plan.fused = fused;
  plan.apply = plan_apply(state, rule, fused);
  const StatisticsLayout layout = statistics_layout(batch.modalities, batch.codewords, batch.width, batch.candidates);
  const auto place = [&plan](size_t bytes) {
    const size_t start = plan.bytes;
    plan.bytes += static_cast<size_t>(round_to(static_cast<int64_t>(bytes), 256));
    return start;
  };
  plan.buffer = place((fused ? layout.mixed_sum : layout.size) * sizeof(double));
  plan.statistics_space = place(plan.statistics.bytes);
  plan.apply_space = place(plan.apply.bytes);
  plan.zeros = place(fused ? (arrivals(batch) + (1 + column_blocks(batch)) * batch.codewords) * sizeof(int) : 0);
  return plan;
}

cudaError_t launch_update(const UpdatePlan& plan, Batch batch, const State& state, const Rule& rule,
                          const double* choice, const double* noise, void* workspace, cudaStream_t stream) {
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  unsigned char *const space = base + plan.statistics_space, *const apply_space = base + plan.apply_space;
  batch.statistics = reinterpret_cast<double*>(base + plan.buffer);
  batch.choice = batch.candidates > 0 ? choice : nullptr;
  batch.step = state.step;
  if (!plan.fused) {
    const cudaError_t error = launch_statistics(plan.statistics, batch, space, stream);
    if (error != cudaSuccess) return error;
    return launch_apply(plan.apply, state, rule, batch.statistics, choice, noise, apply_space, stream);
  }
  Update update = update_of(plan.apply, state, rule, choice, noise, apply_space);
  update.statistics = batch.statistics;
  batch.step = update.step;
  // Arrivals of the sorted sums come first.
  int* const zeros = reinterpret_cast<int*>(base + plan.zeros);
  const int64_t before = plan.statistics.sorted ? arrivals(batch) : 0;
  int64_t number = before;
  if (copies_codewords(rule)) {
    update.first_reset = zeros + before;
    update.delivered = update.first_reset + batch.codewords;
    number += (1 + column_blocks(batch)) * batch.codewords;
  }
  const Start start{zeros, number, state.step, reinterpret_cast<int64_t*>(apply_space + plan.apply.step)};
  return with_type(batch, [&](auto type) {
    using T = typename decltype(type)::Of;
    return state.number == Number::kFloat64
               ? launch_fused_for<T, End::kFloat64>(plan, batch, update, start, space, stream)
               : launch_fused_for<T, End::kFloat32>(plan, batch, update, start, space, stream);
  });
}

}  // namespace unicode_fast::cuda
