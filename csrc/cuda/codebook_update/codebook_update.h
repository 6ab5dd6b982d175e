// The launchers of the codebook update: statistics of a batch, and their application. The formulas are in the
// docstrings of unicode_fast/reference/codebook_update.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../matrix.h"

namespace unicode_fast::cuda {

constexpr int kMostModalities = 16;
// Rows tried for a codeword that is reset from features.
constexpr int kAttempts = 8;

enum class Smoothing : int { kNone, kTransient, kCompounding };

struct Rule {
  double decay, epsilon, own_weight;
  bool joint;
  Smoothing smoothing;
  int64_t reset_after;
  bool unless_any, from_features;
  double reset_noise;
  int64_t active_within;
  bool reset_ema;
  int64_t seed;
};

inline bool resets_from_features(const Rule& rule) { return rule.reset_after > 0 && rule.from_features; }

// Offsets of the arrays in the flat buffer of statistics; the arrays of candidates hold so many for each codeword.
struct StatisticsLayout {
  int64_t row_count, codeword_count, mixed_sum, found, candidate, size;
};

inline StatisticsLayout statistics_layout(int64_t modalities, int64_t codewords, int64_t width, int candidates) {
  StatisticsLayout layout{};
  layout.codeword_count = layout.row_count + modalities;
  layout.mixed_sum = layout.codeword_count + modalities * codewords;
  layout.found = layout.mixed_sum + codewords * width;
  layout.candidate = layout.found + candidates * codewords;
  layout.size = layout.candidate + candidates * codewords * width;
  return layout;
}

// Rows of one modality that this rank holds.
struct Modality {
  Matrix features, partners;  // partners without data where none are given
  const int64_t* index;
  int64_t index_stride;
  const uint8_t* valid;  // bytes, as bools need not be 0 or 1; null where all rows are valid
  int64_t valid_stride;
  int64_t first_row, total_rows;  // of the whole batch
  double weight;                  // of its mixed rows
};

struct Batch {
  Modality modality[kMostModalities];
  int modalities;
  bool mixes, given_partners;  // whether a row has a share of its partner, and whether the partner is given
  double own_weight;
  int64_t codewords, width;
  // Number of candidates kept for each codeword: kAttempts, or 1 for the first valid one. Rows of other ranks then
  // count as valid. It is 0 without reset from features. `choice` may be null; else it is contiguous.
  int candidates;
  int64_t seed;
  const int64_t* step;
  const double* choice;
  double* statistics;
};

// Whether rows are sorted and summed in three launches, not seven, and read 16 bytes at a time; whether the launch that
// makes the sums also writes the state. No GPU has timed these forms and the earlier ones yet; a plan may choose the
// earlier ones.
constexpr bool kFewLaunches = true, kWideLoads = true, kFused = true;

// The kind of sums, and its workspace.
struct StatisticsPlan {
  bool sorted = false;  // rows sorted by codeword first
  bool few_launches = kFewLaunches, wide_loads = kWideLoads;
  int tile_rows = 0;  // that a warp sorts
  int64_t rows = 0, tiles = 0, pieces = 0;
  // Offsets of: rows of each codeword in each tile, later the place of the next row, int32 (tiles, M). Rows of each
  // codeword, their start, and the start of their pieces, int32 (M + 1). The rows in order, int32. Blocks that have
  // arrived, int32 (3 + M for each block of columns). A sum for each piece, float64 (pieces, D).
  size_t counts = 0, totals = 0, starts = 0, piece_starts = 0, order = 0, arrived = 0, sums = 0, bytes = 0;
};

// Batches of up to 2^31 - 1 rows. One launch where N M <= 2^24, three for more.
StatisticsPlan plan_statistics(const Batch& batch);
cudaError_t launch_statistics(const StatisticsPlan& plan, const Batch& batch, void* workspace, cudaStream_t stream);

// The state of a codebook, float64 or float32 by `number`, with strides in elements.
struct State {
  Number number;
  void *codebook, *ema_count, *ema_sum;
  int64_t *idle, *step;
  int64_t codebook_strides[2], ema_sum_strides[2], ema_count_stride, idle_strides[2];
  int modalities;
  int64_t codewords, width;
};

// float64 (M) twice, int32 (M) three times, float64 (M, D) where codewords are reset from codewords.
struct ApplyPlan {
  bool fused = false;
  int blocks = 0;
  // `step` is that of the draws where a fused update has advanced the state's; `sources` then holds lists of resets.
  size_t counts = 0, divisors = 0, reset = 0, step = 0, sources = 0, active = 0, vectors = 0, bytes = 0;
};

// `statistics`, `choice` and `noise` are contiguous float64; the last two may be null. Two launches.
ApplyPlan plan_apply(const State& state, const Rule& rule, bool fused = false);
cudaError_t launch_apply(const ApplyPlan& plan, const State& state, const Rule& rule, const double* statistics,
                         const double* choice, const double* noise, void* workspace, cudaStream_t stream);

// Statistics and their application for a rank that holds the whole batch. Ranks that share one cannot fuse them: they
// add up their sums in between. Counts, resets and divisors depend on all codewords, so a launch before the sums
// computes them: it counts the rows, of all modalities. The block that has a codeword's sum then writes the codeword;
// of several blocks the last. A codeword that is reset from another one waits for the vector of that one. Fused are
// two launches where N M <= 2^24, three for more; not fused, two more than the statistics alone. The first of the two
// launches is one block, so more than 2^13 codewords are not fused there. Fused launches need rows, indices and draws
// that share no memory with the state.
struct UpdatePlan {
  bool fused = kFused;
  StatisticsPlan statistics;
  ApplyPlan apply;
  // Offsets of: the flat buffer, when fused its counts alone. The workspaces of statistics and apply. int32 that the
  // first fused launch sets to 0.
  size_t buffer = 0, statistics_space = 0, apply_space = 0, zeros = 0, bytes = 0;
};

// The batch needs no `statistics`, `choice` or `step`, and keeps at most one candidate.
UpdatePlan plan_update(const Batch& batch, const State& state, const Rule& rule, bool fused = kFused);
cudaError_t launch_update(const UpdatePlan& plan, Batch batch, const State& state, const Rule& rule,
                          const double* choice, const double* noise, void* workspace, cudaStream_t stream);

}  // namespace unicode_fast::cuda
