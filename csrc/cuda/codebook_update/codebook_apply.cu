// The update of a codebook from the statistics of a batch, in place.

#include "../../common/tiles.h"
#include "codebook_apply.cuh"

namespace unicode_fast::cuda {
namespace {

constexpr int kApplyThreads = 128;
constexpr int kMostPlanBlocks = 32, kLeastPlanShare = 16;

// Reads the state and writes workspaces only: counts, divisors, resets, and the vectors of codewords that are reset
// from codewords. Each block first computes values that depend on all codewords, then does an equal share of them.
template <class T>
__global__ void __launch_bounds__(kPlanThreads, 2) plan_kernel(const __grid_constant__ Update update) {
  const State& state = update.state;
  const auto [first, last] = share_of(update, blockIdx.x, gridDim.x);
  const double total = plan_codewords<T>(update, blockIdx.x, gridDim.x);
  if (!copies_codewords(update.rule)) return;
  const uint64_t noise_key = counter_random::key(update.rule.seed, *update.step, kNoiseStream);
  __syncthreads();
  for (int64_t k = first + threadIdx.x / 32; k < last; k += kPlanThreads / 32) {
    const int source = update.sources[k];
    if (source < 0) continue;
    const double divisor = decayed(update, source, ema_count_at<T>(state, source), total).divisor;
    for (int64_t d = threadIdx.x % 32; d < state.width; d += 32) {
      const double sum = decayed_sum<T>(update, source, d, mixed_sum(update, source, d));
      update.vectors[k * state.width + d] =
          updated<T>(update, source, d, sum, divisor) + noise_at(update, noise_key, k, d);
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
    double sum = decayed_sum<T>(update, k, d, mixed_sum(update, k, d));
    double value = updated<T>(update, k, d, sum, update.divisors[k]);
    if (reset) {
      const int64_t place = k * state.width + d;
      value = rule.from_features ? update.statistics[update.layout.candidate + place] : update.vectors[place];
      if (rule.reset_ema) sum = value;
    }
    codebook_at<T>(state, k, d) = static_cast<T>(value);
    ema_sum_at<T>(state, k, d) = static_cast<T>(sum);
  }
  if (blockIdx.y != 0) return;
  write_counters<T>(update, k, reset);
  if (threadIdx.x == 0 && k == 0) *state.step += 1;
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

}  // namespace

ApplyPlan plan_apply(const State& state, const Rule& rule, bool fused) {
  ApplyPlan plan;
  const int64_t codewords = state.codewords, most = (codewords + kLeastPlanShare - 1) / kLeastPlanShare;
  plan.fused = fused;
  plan.blocks = static_cast<int>(most < kMostPlanBlocks ? most : kMostPlanBlocks);
  const auto place = [&plan](size_t bytes) {
    const size_t start = plan.bytes;
    plan.bytes += static_cast<size_t>(round_to(static_cast<int64_t>(bytes), 256));
    return start;
  };
  plan.counts = place(codewords * sizeof(double));
  plan.divisors = place(codewords * sizeof(double));
  plan.reset = place(codewords * sizeof(int));
  plan.step = place(fused ? sizeof(int64_t) : 0);
  if (!copies_codewords(rule)) return plan;
  plan.sources = place(codewords * sizeof(int));
  plan.active = place(plan.blocks * codewords * sizeof(int));
  plan.vectors = place(codewords * state.width * sizeof(double));
  return plan;
}

Update update_of(const ApplyPlan& plan, const State& state, const Rule& rule, const double* choice, const double* noise,
                 void* workspace) {
  unsigned char* const base = static_cast<unsigned char*>(workspace);
  const auto ints = [base](size_t place) { return reinterpret_cast<int*>(base + place); };
  Update update{};
  update.state = state;
  update.rule = rule;
  update.kept = rule.joint ? rule.decay : std::pow(rule.decay, state.modalities);
  update.layout = statistics_layout(state.modalities, state.codewords, state.width, resets_from_features(rule) ? 1 : 0);
  update.step = plan.fused ? reinterpret_cast<int64_t*>(base + plan.step) : state.step;
  update.choice = choice;
  update.noise = noise;
  update.fused = plan.fused;
  update.counts = reinterpret_cast<double*>(base + plan.counts);
  update.divisors = reinterpret_cast<double*>(base + plan.divisors);
  update.reset = ints(plan.reset);
  if (copies_codewords(rule)) {
    (plan.fused ? update.next_reset : update.sources) = ints(plan.sources);
    update.active = ints(plan.active);
    update.vectors = reinterpret_cast<double*>(base + plan.vectors);
  }
  return update;
}

cudaError_t launch_apply(const ApplyPlan& plan, const State& state, const Rule& rule, const double* statistics,
                         const double* choice, const double* noise, void* workspace, cudaStream_t stream) {
  Update update = update_of(plan, state, rule, choice, noise, workspace);
  update.statistics = statistics;
  return state.number == Number::kFloat64 ? launch_for<double>(plan, update, stream)
                                          : launch_for<float>(plan, update, stream);
}

}  // namespace unicode_fast::cuda
