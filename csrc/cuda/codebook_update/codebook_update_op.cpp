// The operators codebook_statistics, codebook_apply and codebook_update on CUDA tensors.

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../../common/checks.h"
#include "../tensors.h"
#include "codebook_update.h"

namespace unicode_fast::cuda {
namespace {

using c10::string_view;

Smoothing smoothing_named(string_view value) {
  if (value == "transient") return Smoothing::kTransient;
  return value == "compounding" ? Smoothing::kCompounding : Smoothing::kNone;
}

Rule rule_of(double decay, double epsilon, double own_weight, string_view update, string_view smoothing,
             int64_t reset_after, string_view reset_unless, string_view reset_source, double reset_noise,
             int64_t reset_active_within, bool reset_ema, int64_t seed) {
  check_rule(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source, reset_noise,
             reset_active_within);
  return {decay,
          epsilon,
          own_weight,
          update == "joint",
          smoothing_named(smoothing),
          reset_after,
          reset_unless == "any",
          reset_source == "feature",
          reset_noise,
          reset_active_within,
          reset_ema,
          seed};
}

// A contiguous tensor's numbers; `keep` holds a copy where one is needed. Null for no tensor.
template <class T>
const T* contiguous_data(const std::optional<at::Tensor>& tensor, at::Tensor& keep) {
  if (!tensor) return nullptr;
  keep = tensor->contiguous();
  return keep.const_data_ptr<T>();
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

// Everything but the statistics, the choice and the number of candidates.
Batch batch_of(const Rule& rule, const at::Tensor& codebook, const at::Tensor& step, at::TensorList features,
               at::TensorList index, at::TensorList partners, at::TensorList valid, at::IntArrayRef first_row,
               at::IntArrayRef total_rows) {
  const size_t modalities = features.size();
  TORCH_CHECK_VALUE(modalities <= kMostModalities, "features must have 1 to ", kMostModalities,
                    " entries on CUDA, got ", modalities);
  Batch batch{};
  batch.modalities = static_cast<int>(modalities);
  batch.given_partners = !partners.empty();
  batch.mixes = rule.own_weight != 1 && (modalities > 1 || batch.given_partners);
  batch.own_weight = rule.own_weight;
  batch.codewords = codebook.size(0);
  batch.width = codebook.size(1);
  batch.seed = rule.seed;
  batch.step = step.const_data_ptr<int64_t>();
  int64_t rows = 0;
  for (size_t m = 0; m < modalities; ++m) {
    Modality& own = batch.modality[m];
    own.features = matrix_of(features[m]);
    own.index = index[m].const_data_ptr<int64_t>();
    own.index_stride = index[m].stride(0);
    if (!partners.empty()) own.partners = matrix_of(partners[m]);
    if (!valid.empty()) {
      own.valid = static_cast<const uint8_t*>(valid[m].const_data_ptr());
      own.valid_stride = valid[m].stride(0);
    }
    own.first_row = first_row[m];
    own.total_rows = total_rows[m];
    own.weight = rule.joint ? 1.0 : std::pow(rule.decay, static_cast<double>(modalities - 1 - m));
    rows += own.features.rows;
  }
  TORCH_CHECK_VALUE(rows < INT32_MAX, "features must have fewer than 2^31 - 1 rows, got ", rows);
  return batch;
}

State state_of(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
               const at::Tensor& idle, const at::Tensor& step) {
  const int64_t modalities = idle.size(0);
  TORCH_CHECK_VALUE(modalities <= kMostModalities, "idle must have 1 to ", kMostModalities, " rows on CUDA, got ",
                    modalities);
  return {number_of(codebook),
          codebook.mutable_data_ptr(),
          ema_count.mutable_data_ptr(),
          ema_sum.mutable_data_ptr(),
          idle.mutable_data_ptr<int64_t>(),
          step.mutable_data_ptr<int64_t>(),
          {codebook.stride(0), codebook.stride(1)},
          {ema_sum.stride(0), ema_sum.stride(1)},
          ema_count.stride(0),
          {idle.stride(0), idle.stride(1)},
          static_cast<int>(modalities),
          codebook.size(0),
          codebook.size(1)};
}

// Autograd must detect that saved tensors have changed.
void mark_changed(at::ArrayRef<at::Tensor> tensors) {
  for (const at::Tensor& changed : tensors)
    if (!changed.is_inference()) changed.unsafeGetTensorImpl()->bump_version();
}

at::Tensor codebook_statistics_cuda(const at::Tensor& codebook, const at::Tensor& step, at::TensorList features,
                                    at::TensorList index, at::TensorList partners, at::TensorList valid,
                                    const std::optional<at::Tensor>& choice, at::IntArrayRef first_row,
                                    at::IntArrayRef total_rows, bool every_attempt, double decay, double epsilon,
                                    double own_weight, string_view update, string_view smoothing, int64_t reset_after,
                                    string_view reset_unless, string_view reset_source, double reset_noise,
                                    int64_t reset_active_within, bool reset_ema, int64_t seed) {
  const Rule rule = rule_of(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source,
                            reset_noise, reset_active_within, reset_ema, seed);
  check_statistics(codebook, step, features, index, partners, valid, choice, first_row, total_rows, own_weight);
  const c10::cuda::CUDAGuard guard(codebook.device());
  Batch batch = batch_of(rule, codebook, step, features, index, partners, valid, first_row, total_rows);
  batch.candidates = !resets_from_features(rule) ? 0 : every_attempt ? kAttempts : 1;
  at::Tensor kept_choice;
  if (batch.candidates > 0) batch.choice = contiguous_data<double>(choice, kept_choice);
  const StatisticsLayout layout = statistics_layout(batch.modalities, batch.codewords, batch.width, batch.candidates);
  const at::Tensor statistics = at::empty({layout.size}, codebook.options().dtype(at::kDouble));
  batch.statistics = statistics.mutable_data_ptr<double>();
  const StatisticsPlan plan = plan_statistics(batch);
  const at::Tensor workspace = workspace_of(plan.bytes, codebook);
  C10_CUDA_CHECK(launch_statistics(plan, batch, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return statistics;
}

void codebook_apply_cuda(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                         const at::Tensor& idle, const at::Tensor& step, const at::Tensor& statistics,
                         const std::optional<at::Tensor>& choice, const std::optional<at::Tensor>& noise, double decay,
                         double epsilon, double own_weight, string_view update, string_view smoothing,
                         int64_t reset_after, string_view reset_unless, string_view reset_source, double reset_noise,
                         int64_t reset_active_within, bool reset_ema, int64_t seed) {
  const Rule rule = rule_of(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source,
                            reset_noise, reset_active_within, reset_ema, seed);
  check_apply(codebook, ema_count, ema_sum, idle, step, statistics, choice, noise, resets_from_features(rule));
  const c10::cuda::CUDAGuard guard(codebook.device());
  const State state = state_of(codebook, ema_count, ema_sum, idle, step);
  at::Tensor kept_statistics, kept_choice, kept_noise;
  const double* numbers = contiguous_data<double>(statistics, kept_statistics);
  const double* choices = contiguous_data<double>(choice, kept_choice);
  const double* noises = contiguous_data<double>(noise, kept_noise);
  const ApplyPlan plan = plan_apply(state, rule);
  const at::Tensor workspace = workspace_of(plan.bytes, codebook);
  C10_CUDA_CHECK(launch_apply(plan, state, rule, numbers, choices, noises, workspace.mutable_data_ptr(),
                              c10::cuda::getCurrentCUDAStream()));
  mark_changed({codebook, ema_count, ema_sum, idle, step});
}

// Whether a tensor that is read may share memory with the state.
bool shares_memory(at::TensorList read, at::TensorList state) {
  for (const at::Tensor& one : read)
    for (const at::Tensor& other : state)
      if (one.is_alias_of(other)) return true;
  return false;
}

void codebook_update_cuda(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                          const at::Tensor& idle, const at::Tensor& step, at::TensorList features, at::TensorList index,
                          at::TensorList partners, at::TensorList valid, const std::optional<at::Tensor>& choice,
                          const std::optional<at::Tensor>& noise, at::IntArrayRef first_row, at::IntArrayRef total_rows,
                          double decay, double epsilon, double own_weight, string_view update, string_view smoothing,
                          int64_t reset_after, string_view reset_unless, string_view reset_source, double reset_noise,
                          int64_t reset_active_within, bool reset_ema, int64_t seed) {
  const Rule rule = rule_of(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source,
                            reset_noise, reset_active_within, reset_ema, seed);
  check_statistics(codebook, step, features, index, partners, valid, choice, first_row, total_rows, own_weight);
  check_update(codebook, ema_count, ema_sum, idle, step, features, choice, noise);
  const c10::cuda::CUDAGuard guard(codebook.device());
  Batch batch = batch_of(rule, codebook, step, features, index, partners, valid, first_row, total_rows);
  batch.candidates = resets_from_features(rule);
  const State state = state_of(codebook, ema_count, ema_sum, idle, step);
  at::Tensor kept_choice, kept_noise;
  const double* choices = contiguous_data<double>(choice, kept_choice);
  const double* noises = contiguous_data<double>(noise, kept_noise);
  // A fused update writes the state while other blocks still read the rows.
  const std::vector<at::Tensor> written{codebook, ema_count, ema_sum, idle, step};
  bool apart = true;
  for (const at::TensorList read : {features, index, partners, valid}) apart = apart && !shares_memory(read, written);
  for (const std::optional<at::Tensor>& read : {choice, noise})
    apart = apart && !(read && shares_memory(*read, written));
  const UpdatePlan plan = plan_update(batch, state, rule, kFused && apart);
  const at::Tensor workspace = workspace_of(plan.bytes, codebook);
  C10_CUDA_CHECK(launch_update(plan, batch, state, rule, choices, noises, workspace.mutable_data_ptr(),
                               c10::cuda::getCurrentCUDAStream()));
  mark_changed({codebook, ema_count, ema_sum, idle, step});
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, UNICODE_FAST_KEY, library) {
  library.impl("codebook_statistics", &codebook_statistics_cuda);
  library.impl("codebook_apply", &codebook_apply_cuda);
  library.impl("codebook_update", &codebook_update_cuda);
}

}  // namespace unicode_fast::cuda
