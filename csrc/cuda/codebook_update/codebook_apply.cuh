// Device functions of the update of a codebook: new counts, resets, and new vectors of codewords.
#pragma once

#include <cstdint>

#include "../../common/counter_random.h"
#include "../../common/portable.h"
#include "../arrivals.cuh"
#include "../launch.cuh"
#include "../reduce.cuh"
#include "codebook_update.h"

namespace unicode_fast::cuda {

constexpr int kPlanThreads = 512;
constexpr int64_t kChoiceStream = 0, kNoiseStream = 1;

struct Update {
  State state;
  Rule rule;
  double kept;  // decay to the number of steps, of the sums
  StatisticsLayout layout;
  const int64_t* step;  // of the draws
  const double *statistics, *choice, *noise;
  // Workspaces by codeword: new count, divisor of its sum, whether it is reset. By block of plan_codewords and
  // codeword: scratch. By codeword: the codeword it is reset from, or -1, and its new vector.
  double *counts, *divisors;
  int *reset, *active, *sources;
  double* vectors;
  // Whether the launch that makes the sums writes the state; only then are there the next three workspaces. By
  // codeword, 1 more than the first codeword reset from it, and 1 more than the next one with the same source; 0 for
  // none. By block of columns and codeword, a count of two blocks: the one that has read its old values, and that of
  // its source.
  bool fused;
  int *first_reset, *next_reset, *delivered;
};

UNICODE_FAST_BOTH bool copies_codewords(const Rule& rule) { return rule.reset_after > 0 && !rule.from_features; }

// Draws, workspaces and `fused` are set; the statistics are not.
Update update_of(const ApplyPlan& plan, const State& state, const Rule& rule, const double* choice, const double* noise,
                 void* workspace);

template <class T>
__device__ __forceinline__ T& codebook_at(const State& state, int64_t k, int64_t d) {
  return static_cast<T*>(state.codebook)[k * state.codebook_strides[0] + d * state.codebook_strides[1]];
}

template <class T>
__device__ __forceinline__ T& ema_sum_at(const State& state, int64_t k, int64_t d) {
  return static_cast<T*>(state.ema_sum)[k * state.ema_sum_strides[0] + d * state.ema_sum_strides[1]];
}

template <class T>
__device__ __forceinline__ T& ema_count_at(const State& state, int64_t k) {
  return static_cast<T*>(state.ema_count)[k * state.ema_count_stride];
}

__device__ __forceinline__ double batch_count(const Update& update, int m, int64_t k) {
  return update.statistics[update.layout.codeword_count + m * update.state.codewords + k];
}

struct Decayed {
  double count, divisor;
};

// A codeword's count after the update, and the divisor of its sum; `total` is the sum of all counts before the update.
__device__ __forceinline__ Decayed decayed(const Update& update, int64_t k, double count, double total) {
  const Rule& rule = update.rule;
  const int modalities = update.state.modalities, steps = rule.joint ? 1 : modalities;
  double divisor = count;
  for (int step = 0; step < steps; ++step) {
    double step_count = 0, step_total = 0;
    for (int m = rule.joint ? 0 : step; m < (rule.joint ? modalities : step + 1); ++m) {
      step_count += batch_count(update, m, k);
      step_total += update.statistics[update.layout.row_count + m];
    }
    count = divisor = rule.decay * count + (1 - rule.decay) * step_count;
    total = rule.decay * total + (1 - rule.decay) * step_total;
    if (rule.smoothing != Smoothing::kNone)
      divisor = (count + rule.epsilon) * (total / (total + update.state.codewords * rule.epsilon));
    if (rule.smoothing == Smoothing::kCompounding) count = divisor;
  }
  return {count, divisor};
}

// A codeword's sum after the update; `mixed` is that of its mixed rows.
template <class T>
__device__ __forceinline__ double decayed_sum(const Update& update, int64_t k, int64_t d, double mixed) {
  return update.kept * ema_sum_at<T>(update.state, k, d) + (1 - update.rule.decay) * mixed;
}

__device__ __forceinline__ double mixed_sum(const Update& update, int64_t k, int64_t d) {
  return update.statistics[update.layout.mixed_sum + k * update.state.width + d];
}

// The noise on a copied codeword.
__device__ __forceinline__ double noise_at(const Update& update, uint64_t key, int64_t k, int64_t d) {
  const int64_t place = k * update.state.width + d;
  const double noise = update.noise != nullptr ? update.noise[place] : 2 * counter_random::uniform(key, place) - 1;
  return update.rule.reset_noise * noise;
}

// A codeword's vector after the update and before any reset.
template <class T>
__device__ __forceinline__ double updated(const Update& update, int64_t k, int64_t d, double sum, double divisor) {
  return update.rule.joint && !(divisor > 0) ? codebook_at<T>(update.state, k, d) : sum / divisor;
}

// Batches since a codeword was last chosen, by any or by all modalities according to the rule, this batch included.
__device__ __forceinline__ int64_t idle_for_rule(const Update& update, int64_t k) {
  const State& state = update.state;
  int64_t result = 0;
  for (int m = 0; m < state.modalities; ++m) {
    const int64_t before = state.idle[m * state.idle_strides[0] + k * state.idle_strides[1]];
    const int64_t idle = batch_count(update, m, k) > 0 ? 0 : before + 1;
    if (m == 0) {
      result = idle;
    } else {
      result = update.rule.unless_any ? min(result, idle) : max(result, idle);
    }
  }
  return result;
}

// The sum of all counts before the update; the same for all threads of all blocks.
template <class T>
__device__ __forceinline__ double total_count(const State& state) {
  UNICODE_FAST_SHARED(double, sums, [kPlanThreads / 32]);
  double sum = 0;
  for (int64_t k = threadIdx.x; k < state.codewords; k += kPlanThreads) sum += ema_count_at<T>(state, k);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kPlanThreads / 32; ++warp) total += sums[warp];
  return total;
}

// Lists the active codewords in ascending order; returns their number.
__device__ __forceinline__ int list_active(const Update& update, int* list) {
  UNICODE_FAST_SHARED(int, warp_sums, [kPlanThreads / 32]);
  int number = 0;
  for (int64_t first = 0; first < update.state.codewords; first += kPlanThreads) {
    const int64_t k = first + threadIdx.x;
    bool active = false;
    if (k < update.state.codewords) {
      const int64_t idle = idle_for_rule(update, k);
      active = idle >= 0 && idle < update.rule.active_within;
    }
    int all;
    const int place = number + sum_before<kPlanThreads>(active ? 1 : 0, warp_sums, all);
    if (active) list[place] = static_cast<int>(k);
    number += all;
    __syncthreads();
  }
  return number;
}

struct Share {
  int64_t first, last;  // codewords
};

__device__ __forceinline__ Share share_of(const Update& update, int64_t block, int64_t blocks) {
  const int64_t share = (update.state.codewords + blocks - 1) / blocks, first = block * share;
  return {first, min(first + share, update.state.codewords)};
}

// Writes counts, divisors and resets of a block's share of the codewords. Returns the sum of all counts before the
// update, where the rule needs it.
template <class T>
__device__ __forceinline__ double plan_codewords(const Update& update, int64_t block, int64_t blocks) {
  const State& state = update.state;
  const auto [first, last] = share_of(update, block, blocks);
  const Rule& rule = update.rule;
  const bool copies = copies_codewords(rule);
  const double total = rule.smoothing == Smoothing::kNone ? 0.0 : total_count<T>(state);
  int* const list = update.active + block * state.codewords;
  const int active = copies ? list_active(update, list) : 0;
  const uint64_t choice_key = counter_random::key(rule.seed, *update.step, kChoiceStream);
  for (int64_t k = first + threadIdx.x; k < last; k += kPlanThreads) {
    const Decayed now = decayed(update, k, ema_count_at<T>(state, k), total);
    const bool dead = rule.reset_after > 0 && idle_for_rule(update, k) > rule.reset_after;
    // A launch that makes sums finds the rows for resets itself.
    const bool found = copies ? active > 0 : dead && (update.fused || update.statistics[update.layout.found + k] > 0);
    update.counts[k] = now.count;
    update.divisors[k] = now.divisor;
    update.reset[k] = dead && found;
    if (!copies) continue;
    int source = -1;
    if (dead && found) {
      const double choice = update.choice != nullptr ? update.choice[k] : counter_random::uniform(choice_key, k);
      source = list[counter_random::place(choice, active)];
    }
    if (!update.fused) {
      update.sources[k] = source;
    } else if (source >= 0) {
      update.next_reset[k] = atomicExch(update.first_reset + source, static_cast<int>(k) + 1);
    }
  }
  return total;
}

// Writes a codeword's counters.
template <class T>
__device__ __forceinline__ void write_counters(const Update& update, int64_t k, bool reset) {
  const State& state = update.state;
  if (static_cast<int>(threadIdx.x) < state.modalities) {
    int64_t& idle = state.idle[threadIdx.x * state.idle_strides[0] + k * state.idle_strides[1]];
    idle = reset || batch_count(update, threadIdx.x, k) > 0 ? 0 : idle + 1;
  }
  if (threadIdx.x == 0)
    ema_count_at<T>(state, k) = static_cast<T>(reset && update.rule.reset_ema ? 1.0 : update.counts[k]);
}

// Counts one of the two blocks that a codeword reset from a codeword waits for; the second writes the new vector.
template <class T>
__device__ __forceinline__ void deliver(const Update& update, int64_t k, int64_t column, bool writes) {
  UNICODE_FAST_SHARED(int, counted, [1]);
  __syncthreads();
  if (threadIdx.x == 0) counted[0] = count_block(update.delivered + blockIdx.y * update.state.codewords + k);
  __syncthreads();
  if (!writes || counted[0] == 0) return;
  const T value = static_cast<T>(update.vectors[k * update.state.width + column]);
  codebook_at<T>(update.state, k, column) = value;
  if (update.rule.reset_ema) ema_sum_at<T>(update.state, k, column) = value;
}

// Ends the update of a codeword in a block of columns, by all threads of a block; those that write have a column each.
// `mixed` is the column's sum of mixed rows, `found` and `candidate` belong to the row for a reset from features.
template <class T>
__device__ __forceinline__ void finish_codeword(const Update& update, int64_t k, int64_t column, bool writes,
                                                double mixed, bool found, double candidate) {
  const State& state = update.state;
  const Rule& rule = update.rule;
  const bool copies = copies_codewords(rule), reset = update.reset[k] != 0 && (copies || found);
  double vector = 0;
  if (writes) {
    double sum = decayed_sum<T>(update, k, column, mixed);
    vector = updated<T>(update, k, column, sum, update.divisors[k]);
    // Those of a codeword that is reset from another are written again on delivery.
    if (reset && !copies && rule.reset_ema) sum = candidate;
    codebook_at<T>(state, k, column) = static_cast<T>(reset && !copies ? candidate : vector);
    ema_sum_at<T>(state, k, column) = static_cast<T>(sum);
  }
  if (blockIdx.y == 0) write_counters<T>(update, k, reset);
  if (!copies) return;
  for (int next = update.first_reset[k]; next != 0; next = update.next_reset[next - 1]) {
    const uint64_t key = counter_random::key(rule.seed, *update.step, kNoiseStream);
    if (writes) update.vectors[(next - 1) * state.width + column] = vector + noise_at(update, key, next - 1, column);
    deliver<T>(update, next - 1, column, writes);
  }
  if (reset) deliver<T>(update, k, column, writes);
}

}  // namespace unicode_fast::cuda
