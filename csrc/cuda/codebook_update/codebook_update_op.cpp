// The operators codebook_statistics and codebook_apply on CUDA tensors.

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "../tensors.h"
#include "codebook_update.h"

namespace unicode_fast::cuda {
namespace {

using c10::string_view;

bool is_one_of(string_view name, string_view value, string_view yes, string_view no) {
  TORCH_CHECK_VALUE(value == yes || value == no, name, " must be '", yes, "' or '", no, "', got '", value, "'");
  return value == yes;
}

Smoothing smoothing_named(string_view value) {
  if (value == "transient") return Smoothing::kTransient;
  if (value == "compounding") return Smoothing::kCompounding;
  TORCH_CHECK_VALUE(value == "none", "smoothing must be 'none', 'transient' or 'compounding', got '", value, "'");
  return Smoothing::kNone;
}

Rule rule_of(double decay, double epsilon, double own_weight, string_view update, string_view smoothing,
             int64_t revive_after, string_view revive_unless, string_view revive_source, double revive_noise,
             int64_t revive_active_within, bool revive_ema, int64_t seed) {
  return {decay,
          epsilon,
          own_weight,
          is_one_of("update", update, "joint", "sequential"),
          smoothing_named(smoothing),
          revive_after,
          is_one_of("revive_unless", revive_unless, "any", "all"),
          is_one_of("revive_source", revive_source, "feature", "codeword"),
          revive_noise,
          revive_active_within,
          revive_ema,
          seed};
}

// Checks what protects memory; messages for users come from Python.
void check(const at::Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape,
           const at::Tensor& like) {
  TORCH_CHECK(tensor.scalar_type() == dtype && tensor.sizes() == shape && tensor.device() == like.device(), name,
              " must be ", dtype, " of shape ", shape, " on ", like.device(), ", got ", tensor.scalar_type(), " ",
              tensor.sizes(), " on ", tensor.device());
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

at::Tensor codebook_statistics_cuda(const at::Tensor& codebook, const at::Tensor& step, at::TensorList features,
                                    at::TensorList index, at::TensorList partners, at::TensorList valid,
                                    const std::optional<at::Tensor>& choice, at::IntArrayRef first_row,
                                    at::IntArrayRef total_rows, bool every_attempt, double decay, double epsilon,
                                    double own_weight, string_view update, string_view smoothing, int64_t revive_after,
                                    string_view revive_unless, string_view revive_source, double revive_noise,
                                    int64_t revive_active_within, bool revive_ema, int64_t seed) {
  const c10::cuda::CUDAGuard guard(codebook.device());
  const Rule rule = rule_of(decay, epsilon, own_weight, update, smoothing, revive_after, revive_unless, revive_source,
                            revive_noise, revive_active_within, revive_ema, seed);
  const size_t modalities = features.size();
  TORCH_CHECK_VALUE(modalities >= 1 && modalities <= kMostModalities, "features must have 1 to ", kMostModalities,
                    " entries on CUDA, got ", modalities);
  TORCH_CHECK_VALUE(
      index.size() == modalities && first_row.size() == modalities && total_rows.size() == modalities &&
          (partners.empty() || partners.size() == modalities) && (valid.empty() || valid.size() == modalities),
      "index, partners, valid, first_row and total_rows must have one entry for each of ", modalities, " modalities");
  TORCH_CHECK(codebook.dim() == 2 && codebook.numel() > 0, "codebook must have shape (M, D), M and D at least 1, got ",
              codebook.sizes());
  check(step, "step", at::kLong, {}, codebook);

  Batch batch{};
  batch.modalities = static_cast<int>(modalities);
  batch.given_partners = !partners.empty();
  batch.mixes = own_weight != 1 && (modalities > 1 || batch.given_partners);
  batch.own_weight = own_weight;
  batch.codewords = codebook.size(0);
  batch.width = codebook.size(1);
  batch.candidates = !revives_from_features(rule) ? 0 : every_attempt ? kAttempts : 1;
  batch.seed = seed;
  batch.step = step.const_data_ptr<int64_t>();
  int64_t rows = 0;
  for (size_t m = 0; m < modalities; ++m) {
    Modality& own = batch.modality[m];
    const int64_t own_rows = features[m].dim() == 2 ? features[m].size(0) : -1;
    check(features[m], "features", features[m].scalar_type(), {own_rows, batch.width}, codebook);
    check(index[m], "index", at::kLong, {own_rows}, codebook);
    own.features = matrix_of(features[m]);
    own.index = index[m].const_data_ptr<int64_t>();
    own.index_stride = index[m].stride(0);
    if (!partners.empty()) {
      check(partners[m], "partners", partners[m].scalar_type(), {own_rows, batch.width}, codebook);
      own.partners = matrix_of(partners[m]);
    }
    if (!valid.empty()) {
      check(valid[m], "valid", at::kBool, {own_rows}, codebook);
      own.valid = valid[m].const_data_ptr<bool>();
      own.valid_stride = valid[m].stride(0);
    }
    own.first_row = first_row[m];
    own.total_rows = total_rows[m];
    own.weight = rule.joint ? 1.0 : std::pow(decay, static_cast<double>(modalities - 1 - m));
    TORCH_CHECK_VALUE(!batch.mixes || batch.given_partners || own_rows == batch.modality[0].features.rows,
                      "features must have equal numbers of rows where partners are not given");
    TORCH_CHECK_VALUE(own.first_row >= 0 && own.first_row + own_rows <= own.total_rows, "total_rows must hold the ",
                      own_rows, " rows from first_row ", own.first_row, " on, got ", own.total_rows);
    rows += own_rows;
  }
  TORCH_CHECK_VALUE(rows < INT32_MAX, "features must have fewer than 2^31 - 1 rows, got ", rows);
  at::Tensor kept_choice;
  if (batch.candidates > 0) {
    if (choice) check(*choice, "choice", at::kDouble, {batch.codewords}, codebook);
    batch.choice = contiguous_data<double>(choice, kept_choice);
  }
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
                         int64_t revive_after, string_view revive_unless, string_view revive_source,
                         double revive_noise, int64_t revive_active_within, bool revive_ema, int64_t seed) {
  const c10::cuda::CUDAGuard guard(codebook.device());
  const Rule rule = rule_of(decay, epsilon, own_weight, update, smoothing, revive_after, revive_unless, revive_source,
                            revive_noise, revive_active_within, revive_ema, seed);
  TORCH_CHECK(codebook.dim() == 2 && codebook.numel() > 0 && idle.dim() == 2,
              "codebook and idle must be matrices, got ", codebook.sizes(), " and ", idle.sizes());
  const int64_t modalities = idle.size(0), codewords = codebook.size(0), width = codebook.size(1);
  TORCH_CHECK_VALUE(modalities >= 1 && modalities <= kMostModalities, "idle must have 1 to ", kMostModalities,
                    " rows on CUDA, got ", modalities);
  TORCH_CHECK_TYPE(codebook.scalar_type() == at::kDouble || codebook.scalar_type() == at::kFloat,
                   "codebook must be float64 or float32, got ", codebook.scalar_type());
  TORCH_CHECK_VALUE(codewords < INT32_MAX, "codebook must have fewer than 2^31 - 1 codewords, got ", codewords);
  check(ema_count, "ema_count", codebook.scalar_type(), {codewords}, codebook);
  check(ema_sum, "ema_sum", codebook.scalar_type(), {codewords, width}, codebook);
  check(idle, "idle", at::kLong, {modalities, codewords}, codebook);
  check(step, "step", at::kLong, {}, codebook);
  const StatisticsLayout layout = statistics_layout(modalities, codewords, width, revives_from_features(rule) ? 1 : 0);
  check(statistics, "statistics", at::kDouble, {layout.size}, codebook);
  if (choice) check(*choice, "choice", at::kDouble, {codewords}, codebook);
  if (noise) check(*noise, "noise", at::kDouble, {codewords, width}, codebook);

  const State state{number_of(codebook),
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
                    codewords,
                    width};
  at::Tensor kept_statistics, kept_choice, kept_noise;
  const double* numbers = contiguous_data<double>(statistics, kept_statistics);
  const double* choices = contiguous_data<double>(choice, kept_choice);
  const double* noises = contiguous_data<double>(noise, kept_noise);
  const ApplyPlan plan = plan_apply(state, rule);
  const at::Tensor workspace = workspace_of(plan.bytes, codebook);
  C10_CUDA_CHECK(launch_apply(plan, state, rule, numbers, choices, noises, workspace.mutable_data_ptr(),
                              c10::cuda::getCurrentCUDAStream()));
  // Autograd has to know that saved tensors are not what they were.
  for (const at::Tensor& changed : {codebook, ema_count, ema_sum, idle, step})
    if (!changed.is_inference()) changed.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, UNICODE_FAST_KEY, library) {
  library.impl("codebook_statistics", &codebook_statistics_cuda);
  library.impl("codebook_apply", &codebook_apply_cuda);
}

}  // namespace unicode_fast::cuda
