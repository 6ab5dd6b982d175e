// The operators codebook_statistics, codebook_apply and codebook_update on CPUs. The formulas are in the docstrings of
// unicode_fast/reference/codebook_update.py. All arithmetic is float64. One thread sums each number in the order of the
// rows, so results repeat bit for bit with any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <vector>

#include "../common/checks.h"
#include "../common/counter_random.h"
#include "kernels.h"

namespace unicode_fast::cpu {
namespace {

using c10::string_view;

constexpr int64_t kAttempts = 8;
constexpr int64_t kChoiceStream = 0, kNoiseStream = 1, kRowStream = 2;
// Least number of columns for a thread.
constexpr int64_t kColumns = 32;

const uint8_t* bytes_of(const at::Tensor& mask) { return static_cast<const uint8_t*>(mask.const_data_ptr()); }

template <typename T>
void add(const at::TensorList& features, const at::TensorList& index, const at::TensorList& partners,
         const at::TensorList& valid, const std::vector<double>& weight, double own_weight, double* sums) {
  RowSums<T> batch;
  for (const at::Tensor& rows : features) {
    batch.features.push_back(rows.const_data_ptr<T>());
    batch.rows.push_back(rows.size(0));
  }
  for (const at::Tensor& rows : partners) batch.partners.push_back(rows.const_data_ptr<T>());
  for (const at::Tensor& codes : index) batch.index.push_back(codes.const_data_ptr<int64_t>());
  for (const at::Tensor& mask : valid) batch.valid.push_back(bytes_of(mask));
  batch.weight = weight;
  batch.own_weight = own_weight;
  batch.width = features[0].size(1);
  at::parallel_for(0, batch.width, kColumns, [&](int64_t first, int64_t last) {
    if constexpr (std::is_same_v<T, double>) {
      kernels().add_double(batch, first, last, sums);
    } else {
      kernels().add_float(batch, first, last, sums);
    }
  });
}

std::vector<at::Tensor> all_as(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> copies;
  for (const at::Tensor& tensor : tensors) copies.push_back(tensor.to(dtype).contiguous());
  return copies;
}

std::vector<double> doubles(const at::Tensor& tensor) {
  const at::Tensor given = tensor.to(at::kDouble).contiguous();
  return {given.const_data_ptr<double>(), given.const_data_ptr<double>() + given.numel()};
}

// A flag and the row for each codeword and attempt: the drawn row of the whole batch, if it is valid and held here.
// Without every attempt, only the first valid row of each codeword; rows of other ranks count as valid.
void find_candidates(const std::vector<at::Tensor>& rows, const std::vector<at::Tensor>& valid,
                     at::IntArrayRef first_row, at::IntArrayRef total_rows, bool every_attempt, uint64_t key,
                     const std::optional<at::Tensor>& choice, int64_t codewords, double* flags, double* candidates) {
  int64_t total = 0;
  for (const int64_t number : total_rows) total += number;
  if (total == 0) return;
  const std::vector<double> given = choice ? doubles(*choice) : std::vector<double>();
  for (int64_t k = 0; k < codewords; ++k) {
    for (int64_t attempt = 0; attempt < kAttempts; ++attempt) {
      const bool injected = attempt == 0 && choice;
      const int64_t global = injected ? counter_random::place(given[k], total)
                                      : counter_random::integer(key, k * kAttempts + attempt, total);
      size_t modality = 0;
      int64_t place = global;
      while (place >= total_rows[modality]) place -= total_rows[modality++];
      const int64_t local = place - first_row[modality];
      if (local >= 0 && local < rows[modality].size(0)) {
        if (!valid.empty() && !bytes_of(valid[modality])[local]) continue;
        const int64_t width = rows[modality].size(1), written = every_attempt ? attempt * codewords + k : k;
        flags[written] = 1;
        if (rows[modality].scalar_type() == at::kDouble) {
          std::copy_n(rows[modality].const_data_ptr<double>() + local * width, width, candidates + written * width);
        } else {
          std::copy_n(rows[modality].const_data_ptr<float>() + local * width, width, candidates + written * width);
        }
      }
      if (!every_attempt) break;
    }
  }
}

at::Tensor codebook_statistics(const at::Tensor& codebook, const at::Tensor& step, at::TensorList features,
                               at::TensorList index, at::TensorList partners, at::TensorList valid,
                               const std::optional<at::Tensor>& choice, at::IntArrayRef first_row,
                               at::IntArrayRef total_rows, bool every_attempt, double decay, double epsilon,
                               double own_weight, string_view update, string_view smoothing, int64_t reset_after,
                               string_view reset_unless, string_view reset_source, double reset_noise,
                               int64_t reset_active_within, bool /*reset_ema*/, int64_t seed) {
  check_rule(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source, reset_noise,
             reset_active_within);
  check_statistics(codebook, step, features, index, partners, valid, choice, first_row, total_rows, own_weight);
  const int64_t modalities = features.size(), codewords = codebook.size(0), width = codebook.size(1);
  const bool resets = reset_after > 0 && reset_source == "feature";
  const int64_t candidates = resets ? codewords * (every_attempt ? kAttempts : 1) : 0;
  const int64_t size = modalities + modalities * codewords + codewords * width;
  const at::Tensor buffer = at::zeros({size + candidates * (1 + width)}, codebook.options().dtype(at::kDouble));
  double* row_count = buffer.mutable_data_ptr<double>();
  double* codeword_count = row_count + modalities;
  double* sums = codeword_count + modalities * codewords;

  bool wide = false;
  for (const at::TensorList list : {features, partners})
    for (const at::Tensor& rows : list) wide = wide || rows.scalar_type() == at::kDouble;
  const at::ScalarType dtype = wide ? at::kDouble : at::kFloat;
  const std::vector<at::Tensor> rows = all_as(features, dtype), others = all_as(partners, dtype);
  const std::vector<at::Tensor> codes = all_as(index, at::kLong), masks = all_as(valid, at::kBool);

  std::vector<double> weight(modalities, 1.0);
  for (int64_t m = 0; m < modalities; ++m) {
    if (update == "sequential") weight[m] = std::pow(decay, static_cast<double>(modalities - 1 - m));
    const int64_t* chosen = codes[m].const_data_ptr<int64_t>();
    const uint8_t* mask = masks.empty() ? nullptr : bytes_of(masks[m]);
    for (int64_t i = 0; i < rows[m].size(0); ++i) {
      if (mask != nullptr && !mask[i]) continue;
      TORCH_CHECK_INDEX(chosen[i] >= 0 && chosen[i] < codewords, "index[", m, "] must be in [0, ", codewords,
                        ") at valid rows, got ", chosen[i], " at row ", i);
      row_count[m] += 1;
      codeword_count[m * codewords + chosen[i]] += 1;
    }
  }
  if (wide) {
    add<double>(rows, codes, others, masks, weight, own_weight, sums);
  } else {
    add<float>(rows, codes, others, masks, weight, own_weight, sums);
  }
  if (resets) {
    const uint64_t key = counter_random::key(seed, *step.const_data_ptr<int64_t>(), kRowStream);
    double* flags = sums + codewords * width;
    find_candidates(rows, masks, first_row, total_rows, every_attempt, key, choice, codewords, flags,
                    flags + candidates);
  }
  return buffer;
}

// Wraps around, as torch's tensors do.
int64_t one_more(int64_t number) { return static_cast<int64_t>(static_cast<uint64_t>(number) + 1); }

// The new counts, and the divisors of the sums.
struct Counts {
  std::vector<double> count, divisor;
};

Counts decayed_counts(std::vector<double> count, const double* row_count, const double* codeword_count,
                      int64_t modalities, double decay, double epsilon, bool joint, string_view smoothing) {
  const int64_t codewords = count.size();
  double total = 0;
  for (const double number : count) total += number;
  std::vector<double> divisor = count;
  for (int64_t part = 0; part < (joint ? 1 : modalities); ++part) {
    double rows = 0;
    for (int64_t m = 0; m < modalities; ++m)
      if (joint || m == part) rows += row_count[m];
    total = decay * total + (1 - decay) * rows;
    for (int64_t k = 0; k < codewords; ++k) {
      double chosen = 0;
      for (int64_t m = 0; m < modalities; ++m)
        if (joint || m == part) chosen += codeword_count[m * codewords + k];
      count[k] = divisor[k] = decay * count[k] + (1 - decay) * chosen;
      if (smoothing != "none") divisor[k] = (count[k] + epsilon) * (total / (total + codewords * epsilon));
      if (smoothing == "compounding") count[k] = divisor[k];
    }
  }
  return {std::move(count), std::move(divisor)};
}

template <typename T>
void store(const at::Tensor& into, const std::vector<double>& values) {
  std::copy(values.begin(), values.end(), into.mutable_data_ptr<T>());
}

// Autograd must detect that saved tensors have changed.
void mark_changed(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void write(const at::Tensor& into, const std::vector<double>& values) {
  mark_changed(into);
  if (!into.is_contiguous()) {
    into.copy_(at::from_blob(const_cast<double*>(values.data()), into.sizes(), at::kDouble));
  } else if (into.scalar_type() == at::kDouble) {
    store<double>(into, values);
  } else {
    store<float>(into, values);
  }
}

void codebook_apply(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                    const at::Tensor& idle, const at::Tensor& step, const at::Tensor& statistics,
                    const std::optional<at::Tensor>& choice, const std::optional<at::Tensor>& noise, double decay,
                    double epsilon, double own_weight, string_view update, string_view smoothing, int64_t reset_after,
                    string_view reset_unless, string_view reset_source, double reset_noise, int64_t reset_active_within,
                    bool reset_ema, int64_t seed) {
  check_rule(decay, epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source, reset_noise,
             reset_active_within);
  const bool from_features = reset_source == "feature";
  check_apply(codebook, ema_count, ema_sum, idle, step, statistics, choice, noise, reset_after > 0 && from_features);
  const int64_t modalities = idle.size(0), codewords = codebook.size(0), width = codebook.size(1);
  const at::Tensor buffer = statistics.contiguous();
  const double* row_count = buffer.const_data_ptr<double>();
  const double* codeword_count = row_count + modalities;
  const double* mixed_sum = codeword_count + modalities * codewords;
  const double* found = mixed_sum + codewords * width;
  const double* candidate = found + codewords;

  const bool joint = update == "joint";
  auto [count, divisor] =
      decayed_counts(doubles(ema_count), row_count, codeword_count, modalities, decay, epsilon, joint, smoothing);
  std::vector<double> sum = doubles(ema_sum), codes = doubles(codebook);
  const double kept = std::pow(decay, joint ? 1.0 : static_cast<double>(modalities));
  at::parallel_for(0, codewords, 1 + 16384 / width, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      for (int64_t d = k * width; d < (k + 1) * width; ++d) {
        sum[d] = kept * sum[d] + (1 - decay) * mixed_sum[d];
        if (!joint || divisor[k] > 0) codes[d] = sum[d] / divisor[k];
      }
    }
  });

  const at::Tensor idle_now = idle.contiguous();
  std::vector<int64_t> waited(idle_now.const_data_ptr<int64_t>(), idle_now.const_data_ptr<int64_t>() + idle.numel());
  for (int64_t n = 0; n < modalities * codewords; ++n) waited[n] = codeword_count[n] > 0 ? 0 : one_more(waited[n]);

  if (reset_after > 0) {
    const bool any = reset_unless == "any";
    std::vector<int64_t> by_rule(codewords), active;
    for (int64_t k = 0; k < codewords; ++k) {
      by_rule[k] = waited[k];
      for (int64_t m = 1; m < modalities; ++m)
        by_rule[k] =
            any ? std::min(by_rule[k], waited[m * codewords + k]) : std::max(by_rule[k], waited[m * codewords + k]);
      if (by_rule[k] >= 0 && by_rule[k] < reset_active_within) active.push_back(k);
    }
    const int64_t now = *step.const_data_ptr<int64_t>();
    const uint64_t choice_key = counter_random::key(seed, now, kChoiceStream),
                   noise_key = counter_random::key(seed, now, kNoiseStream);
    const std::vector<double> given = choice ? doubles(*choice) : std::vector<double>();
    const std::vector<double> given_noise = noise ? doubles(*noise) : std::vector<double>();
    // Copies are made of codewords as they were before any reset.
    const std::vector<double> before = from_features ? std::vector<double>() : codes;
    for (int64_t k = 0; k < codewords; ++k) {
      if (by_rule[k] <= reset_after || (from_features ? !(found[k] > 0) : active.empty())) continue;
      const double drawn = choice ? given[k] : counter_random::uniform(choice_key, k);
      const double* source =
          from_features
              ? candidate + k * width
              : before.data() + active[counter_random::place(drawn, static_cast<int64_t>(active.size()))] * width;
      for (int64_t d = 0; d < width; ++d) {
        double value = source[d];
        if (!from_features) {
          value += reset_noise *
                   (noise ? given_noise[k * width + d] : 2 * counter_random::uniform(noise_key, k * width + d) - 1);
        }
        codes[k * width + d] = value;
        if (reset_ema) sum[k * width + d] = value;
      }
      if (reset_ema) count[k] = 1;
      for (int64_t m = 0; m < modalities; ++m) waited[m * codewords + k] = 0;
    }
  }
  write(codebook, codes);
  write(ema_count, count);
  write(ema_sum, sum);
  idle.copy_(at::from_blob(waited.data(), idle.sizes(), at::kLong));
  int64_t& now = *step.mutable_data_ptr<int64_t>();
  now = one_more(now);
  mark_changed(idle);
  mark_changed(step);
}

void codebook_update(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                     const at::Tensor& idle, const at::Tensor& step, at::TensorList features, at::TensorList index,
                     at::TensorList partners, at::TensorList valid, const std::optional<at::Tensor>& choice,
                     const std::optional<at::Tensor>& noise, at::IntArrayRef first_row, at::IntArrayRef total_rows,
                     double decay, double epsilon, double own_weight, string_view update, string_view smoothing,
                     int64_t reset_after, string_view reset_unless, string_view reset_source, double reset_noise,
                     int64_t reset_active_within, bool reset_ema, int64_t seed) {
  check_update(codebook, ema_count, ema_sum, idle, step, features, choice, noise);
  const at::Tensor statistics =
      codebook_statistics(codebook, step, features, index, partners, valid, choice, first_row, total_rows, false, decay,
                          epsilon, own_weight, update, smoothing, reset_after, reset_unless, reset_source, reset_noise,
                          reset_active_within, reset_ema, seed);
  codebook_apply(codebook, ema_count, ema_sum, idle, step, statistics, choice, noise, decay, epsilon, own_weight,
                 update, smoothing, reset_after, reset_unless, reset_source, reset_noise, reset_active_within,
                 reset_ema, seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) {
  library.impl("codebook_statistics", &codebook_statistics);
  library.impl("codebook_apply", &codebook_apply);
  library.impl("codebook_update", &codebook_update);
}

}  // namespace unicode_fast::cpu
