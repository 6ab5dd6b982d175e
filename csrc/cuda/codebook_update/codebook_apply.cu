// The update of a codebook from the statistics of a batch, in place.

#include <cstdint>

#include "../../common/counter_random.h"
#include "../../common/tiles.h"
#include "../launch.cuh"
#include "../reduce.cuh"
#include "codebook_update.h"

namespace unicode_fast::cuda {
namespace {

constexpr int kPlanThreads = 512, kApplyThreads = 128;
constexpr int kMostPlanBlocks = 32, kLeastPlanShare = 16;
constexpr int64_t kChoiceStream = 0, kNoiseStream = 1;

struct Update {
  State state;
  Rule rule;
  double kept;  // decay to the number of steps, of the sums
  StatisticsLayout layout;
  const double *statistics, *choice, *noise;
  // Workspaces by codeword: new count, divisor of its sum, whether it is reset. By block of plan_kernel and codeword:
  // scratch. By codeword: the codeword it is reset from, or -1, and its new vector.
  double *counts, *divisors;
  int *reset, *active, *sources;
  double* vectors;
};

template <class T>
__device__ __forceinline__ double codebook_at(const State& state, int64_t k, int64_t d) {
  return static_cast<const T*>(state.codebook)[k * state.codebook_strides[0] + d * state.codebook_strides[1]];
}

template <class T>
__device__ __forceinline__ double ema_sum_at(const State& state, int64_t k, int64_t d) {
  return static_cast<const T*>(state.ema_sum)[k * state.ema_sum_strides[0] + d * state.ema_sum_strides[1]];
}

template <class T>
__device__ __forceinline__ double ema_count_at(const State& state, int64_t k) {
  return static_cast<const T*>(state.ema_count)[k * state.ema_count_stride];
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

template <class T>
__device__ __forceinline__ double decayed_sum(const Update& update, int64_t k, int64_t d) {
  return update.kept * ema_sum_at<T>(update.state, k, d) +
         (1 - update.rule.decay) * update.statistics[update.layout.mixed_sum + k * update.state.width + d];
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

// Reads the state and writes workspaces only: counts, divisors, resets, and the vectors of codewords that are reset
// from codewords. Each block first computes values that depend on all codewords, then does an equal share of them.
template <class T>
__global__ void __launch_bounds__(kPlanThreads, 2) plan_kernel(const __grid_constant__ Update update) {
  const State& state = update.state;
  const Rule& rule = update.rule;
  const int64_t share = (state.codewords + gridDim.x - 1) / gridDim.x;
  const int64_t first = blockIdx.x * share, last = min(first + share, state.codewords);
  const bool copies = rule.reset_after > 0 && !rule.from_features;
  const double total = rule.smoothing == Smoothing::kNone ? 0.0 : total_count<T>(state);
  int* const list = update.active + blockIdx.x * state.codewords;
  const int active = copies ? list_active(update, list) : 0;
  const int64_t step = *state.step;
  const uint64_t choice_key = counter_random::key(rule.seed, step, kChoiceStream);
  const uint64_t noise_key = counter_random::key(rule.seed, step, kNoiseStream);
  for (int64_t k = first + threadIdx.x; k < last; k += kPlanThreads) {
    const Decayed now = decayed(update, k, ema_count_at<T>(state, k), total);
    const bool dead = rule.reset_after > 0 && idle_for_rule(update, k) > rule.reset_after;
    const bool found = copies ? active > 0 : dead && update.statistics[update.layout.found + k] > 0;
    update.counts[k] = now.count;
    update.divisors[k] = now.divisor;
    update.reset[k] = dead && found;
    int source = -1;
    if (copies && dead && found) {
      const double choice = update.choice != nullptr ? update.choice[k] : counter_random::uniform(choice_key, k);
      source = list[counter_random::place(choice, active)];
    }
    if (copies) update.sources[k] = source;
  }
  if (!copies) return;
  __syncthreads();
  for (int64_t k = first + threadIdx.x / 32; k < last; k += kPlanThreads / 32) {
    const int source = update.sources[k];
    if (source < 0) continue;
    const double divisor = decayed(update, source, ema_count_at<T>(state, source), total).divisor;
    for (int64_t d = threadIdx.x % 32; d < state.width; d += 32) {
      const int64_t place = k * state.width + d;
      const double noise =
          update.noise != nullptr ? update.noise[place] : 2 * counter_random::uniform(noise_key, place) - 1;
      update.vectors[place] =
          updated<T>(update, source, d, decayed_sum<T>(update, source, d), divisor) + rule.reset_noise * noise;
    }
  }
}

// Block (k, y) writes columns y of codeword k and, for y = 0, its counters. It reads no value of the state that another
// block writes.
template <class T>
__global__ void __launch_bounds__(kApplyThreads) apply_kernel(const __grid_constant__ Update update) {
  const State& state = update.state;
  const Rule& rule = update.rule;
  const int64_t k = blockIdx.x, d = static_cast<int64_t>(blockIdx.y) * kApplyThreads + threadIdx.x;
  const bool reset = update.reset[k] != 0;
  if (d < state.width) {
    double sum = decayed_sum<T>(update, k, d);
    double value = updated<T>(update, k, d, sum, update.divisors[k]);
    if (reset) {
      const int64_t place = k * state.width + d;
      value = rule.from_features ? update.statistics[update.layout.candidate + place] : update.vectors[place];
      if (rule.reset_ema) sum = value;
    }
    static_cast<T*>(state.codebook)[k * state.codebook_strides[0] + d * state.codebook_strides[1]] =
        static_cast<T>(value);
    static_cast<T*>(state.ema_sum)[k * state.ema_sum_strides[0] + d * state.ema_sum_strides[1]] = static_cast<T>(sum);
  }
  if (blockIdx.y != 0) return;
  if (static_cast<int>(threadIdx.x) < state.modalities) {
    int64_t& idle = state.idle[threadIdx.x * state.idle_strides[0] + k * state.idle_strides[1]];
    idle = reset || batch_count(update, threadIdx.x, k) > 0 ? 0 : idle + 1;
  }
  if (threadIdx.x == 0) {
    static_cast<T*>(state.ema_count)[k * state.ema_count_stride] =
        static_cast<T>(reset && rule.reset_ema ? 1.0 : update.counts[k]);
    if (k == 0) *state.step += 1;
  }
}

template <class T>
cudaError_t launch_for(const ApplyPlan& plan, const Update& update, cudaStream_t stream) {
  UNICODE_FAST_LAUNCH(plan.blocks, kPlanThreads, 0, stream, plan_kernel<T>)(update);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(update.state.codewords),
                  static_cast<unsigned>((update.state.width + kApplyThreads - 1) / kApplyThreads));
  UNICODE_FAST_LAUNCH(grid, kApplyThreads, 0, stream, apply_kernel<T>)(update);
  return cudaGetLastError();
}

bool copies_codewords(const Rule& rule) { return rule.reset_after > 0 && !rule.from_features; }

}  // namespace

ApplyPlan plan_apply(const State& state, const Rule& rule) {
  ApplyPlan plan;
  const int64_t codewords = state.codewords, most = (codewords + kLeastPlanShare - 1) / kLeastPlanShare;
  plan.blocks = static_cast<int>(most < kMostPlanBlocks ? most : kMostPlanBlocks);
  const auto place = [&plan](size_t bytes) {
    const size_t start = plan.bytes;
    plan.bytes += static_cast<size_t>(round_to(static_cast<int64_t>(bytes), 256));
    return start;
  };
  plan.counts = place(codewords * sizeof(double));
  plan.divisors = place(codewords * sizeof(double));
  plan.reset = place(codewords * sizeof(int));
  if (!copies_codewords(rule)) return plan;
  plan.sources = place(codewords * sizeof(int));
  plan.active = place(plan.blocks * codewords * sizeof(int));
  plan.vectors = place(codewords * state.width * sizeof(double));
  return plan;
}

cudaError_t launch_apply(const ApplyPlan& plan, const State& state, const Rule& rule, const double* statistics,
                         const double* choice, const double* noise, void* workspace, cudaStream_t stream) {
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  Update update{};
  update.state = state;
  update.rule = rule;
  update.kept = rule.joint ? rule.decay : std::pow(rule.decay, state.modalities);
  update.layout = statistics_layout(state.modalities, state.codewords, state.width, resets_from_features(rule) ? 1 : 0);
  update.statistics = statistics;
  update.choice = choice;
  update.noise = noise;
  update.counts = reinterpret_cast<double*>(base + plan.counts);
  update.divisors = reinterpret_cast<double*>(base + plan.divisors);
  update.reset = reinterpret_cast<int*>(base + plan.reset);
  if (copies_codewords(rule)) {
    update.sources = reinterpret_cast<int*>(base + plan.sources);
    update.active = reinterpret_cast<int*>(base + plan.active);
    update.vectors = reinterpret_cast<double*>(base + plan.vectors);
  }
  return state.number == Number::kFloat64 ? launch_for<double>(plan, update, stream)
                                          : launch_for<float>(plan, update, stream);
}

}  // namespace unicode_fast::cuda
