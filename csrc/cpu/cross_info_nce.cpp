// The operators cross_info_nce and cross_info_nce_with_gradient on CPUs. Scores are products of matrices, of some rows
// at a time; one pass turns them into losses and slopes, whose products with the vectors are the gradient. Sums have a
// fixed order, so results repeat bit for bit if torch's products do. The formulas are in the reference's docstrings.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace unicode_fast::cpu {
namespace {

// Scores in memory at a time, unless as many rows as vectors are wide have more.
constexpr int64_t kChunk = int64_t{1} << 19;
// Scores that are worth a thread, and columns.
constexpr int64_t kGrain = int64_t{1} << 13, kTile = 64;

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ResultsAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct Inputs {
  const at::Tensor &targets, &predictions, &pair_weights;
  const std::optional<at::Tensor>& valid;
  const at::Tensor& temperature;
  std::string_view softmax_over;
  int64_t offset;
};

void check(const Inputs& inputs) {
  check_choice("softmax_over", inputs.softmax_over, {"predictions", "candidates", "both"});
  const at::Tensor &targets = inputs.targets, &predictions = inputs.predictions;
  const auto check_vectors = [](const char* name, const at::Tensor& vectors, Dtypes dtypes) {
    check_tensor(name, vectors, dtypes);
    TORCH_CHECK_VALUE(vectors.dim() == 4 && vectors.size(0) >= 1 && vectors.size(1) >= 1 && vectors.size(3) >= 1, name,
                      " must have shape (modalities, K, B, D), all but B at least 1, got ",
                      shape_name(vectors.sizes()));
  };
  check_vectors("targets", targets, kFeatureDtypes);
  check_vectors("predictions", predictions, targets.scalar_type());
  const int64_t modalities = targets.size(0), steps = targets.size(1);
  check_like("predictions", predictions, targets.scalar_type(),
             {modalities, steps, predictions.size(2), targets.size(3)}, "that of targets but for B", targets);
  int64_t queries = targets.size(2), keys = predictions.size(2);
  if (inputs.softmax_over == "candidates") std::swap(queries, keys);
  TORCH_CHECK_VALUE(
      inputs.offset >= 0 && inputs.offset <= keys - queries && (inputs.softmax_over != "both" || queries == keys),
      "offset must be the position of ", queries, " clips among ", keys, ", of all with softmax_over 'both', got ",
      inputs.offset, " with '", inputs.softmax_over, "'");
  constexpr const char* kMeaning = "to match targets and predictions";
  check_like("pair_weights", inputs.pair_weights, kFeatureDtypes, {modalities, modalities}, kMeaning, targets);
  check_like("temperature", inputs.temperature, kFeatureDtypes, {}, kMeaning, targets);
  if (inputs.valid) check_like("valid", *inputs.valid, kBoolOnly, {modalities, steps, keys}, kMeaning, targets);
}

// One call. Numbers of a target, a source and a step lie at place(); of their clips, at place() * queries_ + clip.
template <typename T>
class Contrast {
 public:
  Contrast(const Inputs& inputs, bool with_gradient)
      : candidates_(inputs.softmax_over == "candidates"),
        both_(inputs.softmax_over == "both"),
        with_gradient_(with_gradient),
        modalities_(inputs.targets.size(0)),
        steps_(inputs.targets.size(1)),
        width_(inputs.targets.size(3)),
        offset_(inputs.offset),
        inverse_temperature_(1 / inputs.temperature.to(at::kDouble).item<double>()),
        options_(inputs.targets.options().dtype(at::CppTypeToScalarType<T>::value)),
        all_queries_(candidates_ ? inputs.predictions : inputs.targets),
        all_keys_(candidates_ ? inputs.targets : inputs.predictions),
        queries_(all_queries_.size(2)),
        clips_(all_keys_.size(2)) {
    if constexpr (std::is_same_v<T, double>) {
      loops_ = kernels().softmax_double;
    } else {
      loops_ = kernels().softmax_float;
    }
    if (inputs.valid) valid_ = inputs.valid->contiguous();
    weigh(inputs.pair_weights);
    logsumexp_ = at::zeros({both_ ? 2 : 1, modalities_, modalities_, steps_, queries_}, options_);
    loss_.assign(weight_.size() * queries_, 0);
    hit_.assign(loss_.size(), 0);
    if (both_) largest_.resize(modalities_ * modalities_ * clips_);
    sums_ = factors_ = largest_;
  }

  void run() {
    const int64_t rows = modalities_ * queries_, columns = modalities_ * clips_;
    if (with_gradient_) {
      in_queries_ = at::empty_like(all_queries_, at::MemoryFormat::Contiguous);
      in_keys_ = at::empty_like(all_keys_, at::MemoryFormat::Contiguous);
      if (rows == 0) in_keys_.zero_();
    }
    if (rows == 0) return;
    const int64_t most = std::min(rows, std::max({kChunk / columns, width_, int64_t{1}}));
    const at::Tensor buffer = at::empty({most, columns}, options_);
    const at::Tensor in_queries = buffer_of(in_queries_);
    at::Tensor in_keys = buffer_of(in_keys_);
    for (int64_t step = 0; step < steps_; ++step) {
      queries_of_step_ = stacked(all_queries_, step, offset_);
      keys_of_step_ = stacked(all_keys_, step, 0);
      const auto each_block = [&](auto body) {
        for (int64_t row = 0; row < rows; row += most) {
          const int64_t number = std::min(most, rows - row);
          body(row, number, buffer.narrow(0, 0, number));
        }
      };
      if (both_) {
        std::fill(largest_.begin(), largest_.end(), -std::numeric_limits<T>::infinity());
        std::fill(sums_.begin(), sums_.end(), T{0});
        each_block([&](int64_t row, int64_t number, const at::Tensor& scores) {
          score(step, row, scores);
          read_columns(row, scores);
        });
        finish_columns(step);
      }
      each_block([&](int64_t row, int64_t number, at::Tensor scores) {
        // A single block still has its scores.
        if (!both_ || most < rows) score(step, row, scores);
        read_rows(step, row, scores);
        if (!with_gradient_) return;
        at::Tensor in_rows = in_queries.narrow(0, row, number);
        at::mm_out(in_rows, scores, keys_of_step_);
        in_keys.addmm_(scores.t(), queries_of_step_.narrow(0, row, number), row == 0 ? 0 : 1);
      });
      if (!with_gradient_) continue;
      // The slopes times the scores, added up over the keys first.
      slope_ += at::dot(queries_of_step_.view(-1), in_queries.view(-1)).template item<double>();
      keep_gradient(in_queries_, in_queries, step);
      keep_gradient(in_keys_, in_keys, step);
    }
  }

  Results results() const {
    const at::Tensor pair_loss = at::empty({modalities_, modalities_, steps_}, options_);
    const at::Tensor hits = at::empty(pair_loss.sizes(), options_.dtype(at::kLong));
    const at::Tensor clip_weights = at::empty_like(pair_loss);
    double loss = 0;
    for (size_t p = 0; p < weight_.size(); ++p) {
      double total = 0;
      int64_t hit = 0;
      for (int64_t n = p * queries_; n < static_cast<int64_t>(p + 1) * queries_; ++n) total += loss_[n], hit += hit_[n];
      pair_loss.mutable_data_ptr<T>()[p] = static_cast<T>(total / std::max<int64_t>(number_[p], 1));
      hits.mutable_data_ptr<int64_t>()[p] = hit;
      clip_weights.mutable_data_ptr<T>()[p] = static_cast<T>(weight_[p]);
      if (weight_[p] != 0) loss += weight_[p] * total;
    }
    return {at::scalar_tensor(loss, options_), pair_loss, hits, logsumexp_, clip_weights};
  }

  // In targets, predictions and temperature.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(at::ScalarType of_temperature) const {
    const at::Tensor in_temperature = at::scalar_tensor(-slope_ * inverse_temperature_, options_.dtype(of_temperature));
    return {candidates_ ? in_keys_ : in_queries_, candidates_ ? in_queries_ : in_keys_, in_temperature};
  }

 private:
  // Vectors of one step, (modalities * B, D), zeros where not valid; `first` is the first clip.
  at::Tensor stacked(const at::Tensor& vectors, int64_t step, int64_t first) const {
    at::Tensor numbers = vectors.select(1, step).to(options_.dtype());
    // where() and not a product: vectors that are not valid may hold NaN.
    if (valid_.defined())
      numbers = at::where(valid_.select(1, step).narrow(1, first, vectors.size(2)).unsqueeze(2), numbers, 0);
    return numbers.reshape({modalities_ * vectors.size(2), width_}).contiguous();
  }

  // For the gradient of one step: the results themselves if they have its layout.
  at::Tensor buffer_of(const at::Tensor& results) const {
    if (!with_gradient_) return {};
    const int64_t rows = modalities_ * results.size(2);
    if (steps_ == 1 && results.dtype() == options_.dtype()) return results.view({rows, width_});
    return at::empty({rows, width_}, options_);
  }

  static void keep_gradient(const at::Tensor& results, const at::Tensor& buffer, int64_t step) {
    const at::Tensor own = results.select(1, step);
    if (!buffer.is_alias_of(results)) own.copy_(buffer.view(own.sizes()));
  }

  int64_t place(int64_t query, int64_t key, int64_t step) const {
    return (candidates_ ? key * modalities_ + query : query * modalities_ + key) * steps_ + step;
  }

  // Whether both vectors of a clip are valid.
  bool counts(int64_t query, int64_t key, int64_t step, int64_t clip) const {
    if (!valid_.defined()) return true;
    const uint8_t* valid = static_cast<const uint8_t*>(valid_.const_data_ptr());
    return valid[(query * steps_ + step) * clips_ + clip] && valid[(key * steps_ + step) * clips_ + clip];
  }

  // The number of clips of the batch that count, and the weight of each in the loss.
  void weigh(const at::Tensor& pair_weights) {
    const at::Tensor given = pair_weights.to(at::kDouble).contiguous();
    for (int64_t pair = 0; pair < modalities_ * modalities_; ++pair) {
      int64_t used = 0;
      for (int64_t step = 0; step < steps_; ++step) {
        int64_t number = valid_.defined() ? 0 : clips_;
        for (int64_t clip = 0; valid_.defined() && clip < clips_; ++clip)
          number += counts(pair / modalities_, pair % modalities_, step, clip);
        number_.push_back(number);
        used += number > 0;
      }
      for (int64_t step = 0; step < steps_; ++step) {
        const int64_t number = number_[pair * steps_ + step];
        weight_.push_back(number == 0 ? 0 : given.const_data_ptr<double>()[pair] / used / number);
      }
    }
  }

  // The factor of a clip's slopes in one softmax.
  T factor(int64_t place) const { return static_cast<T>(weight_[place] * inverse_temperature_ / (both_ ? 2 : 1)); }

  // Scores of the queries from `row` on with all keys, -infinity where either is not valid.
  void score(int64_t step, int64_t row, at::Tensor scores) const {
    at::addmm_out(scores, scores, queries_of_step_.narrow(0, row, scores.size(0)), keys_of_step_.t(), 0,
                  static_cast<T>(inverse_temperature_));
    if (!valid_.defined()) return;
    const at::Tensor valid = valid_.select(1, step);
    const at::Tensor of_rows = valid.narrow(1, offset_, queries_).reshape(-1).narrow(0, row, scores.size(0));
    scores.masked_fill_((of_rows.unsqueeze(1) & valid.reshape(-1)).logical_not_(), -std::numeric_limits<T>::infinity());
  }

  // The columns' sums over the rows from `row` on, by query modality.
  void read_columns(int64_t row, const at::Tensor& scores) {
    const int64_t columns = scores.size(1), end = row + scores.size(0);
    const T* numbers = scores.const_data_ptr<T>();
    at::parallel_for(
        0, (columns + kTile - 1) / kTile, kGrain / (kTile * scores.size(0)) + 1, [&](int64_t first, int64_t last) {
          for (int64_t i = row; i < end;) {
            const int64_t query = i / queries_, next = std::min(end, (query + 1) * queries_);
            const int64_t start = first * kTile, number = std::min(columns, last * kTile) - start;
            loops_.add_to_columns(numbers + (i - row) * columns + start, columns, next - i, number,
                                  largest_.data() + query * columns + start, sums_.data() + query * columns + start);
            i = next;
          }
        });
  }

  void finish_columns(int64_t step) {
    for (int64_t query = 0, n = 0; query < modalities_; ++query) {
      for (int64_t key = 0; key < modalities_; ++key) {
        const int64_t p = place(query, key, step);
        for (int64_t clip = 0; clip < clips_; ++clip, ++n) {
          if (with_gradient_ && std::isinf(largest_[n])) sums_[n] = std::numeric_limits<T>::quiet_NaN();
          factors_[n] = counts(query, key, step, clip) && weight_[p] != 0 ? factor(p) / sums_[n] : 0;
        }
      }
    }
  }

  // Losses, hits and log-sum-exps of the queries from `row` on; with the gradient scores become slopes.
  void read_rows(int64_t step, int64_t row, const at::Tensor& scores) {
    const int64_t columns = scores.size(1);
    T* numbers = scores.mutable_data_ptr<T>();
    T* logsumexp = logsumexp_.mutable_data_ptr<T>();
    at::parallel_for(row, row + scores.size(0), kGrain / columns + 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t query = i / queries_, clip = i % queries_, own = offset_ + clip;
        for (int64_t key = 0; key < modalities_; ++key) {
          T* row_scores = numbers + (i - row) * columns + key * clips_;
          const int64_t p = place(query, key, step), n = p * queries_ + clip;
          const int64_t column = query * columns + key * clips_;
          const bool counted = counts(query, key, step, own);
          Softmax<T> found = loops_.softmax(row_scores, clips_, own);
          // A log-sum-exp is infinite here; a log softmax, which the gradient needs, is NaN.
          if (!with_gradient_ && std::isinf(found.largest) &&
              std::none_of(row_scores, row_scores + clips_, [](T x) { return std::isnan(x); }))
            found.sum = 1;
          if (counted) {
            const T log_sum = std::log(found.sum);
            loss_[n] = log_sum + (found.largest - found.own);
            logsumexp[n] = log_sum + found.largest;
            hit_[n] = found.hit;
          }
          if (counted && both_) {
            const T log_sum = std::log(sums_[column + own]), largest = largest_[column + own];
            loss_[n] = (loss_[n] + log_sum + (largest - found.own)) / 2;
            logsumexp[loss_.size() + n] = log_sum + largest;
          }
          if (!with_gradient_) continue;
          const T of_clip = counted ? factor(p) : 0;
          loops_.slopes(row_scores, clips_, found.largest, of_clip == 0 ? 0 : of_clip / found.sum,
                        both_ ? largest_.data() + column : nullptr, both_ ? factors_.data() + column : nullptr);
          row_scores[own] -= both_ ? 2 * of_clip : of_clip;
        }
      }
    });
  }

  SoftmaxLoops<T> loops_;
  bool candidates_, both_, with_gradient_;
  int64_t modalities_, steps_, width_, offset_;
  double inverse_temperature_, slope_ = 0;
  at::TensorOptions options_;
  at::Tensor all_queries_, all_keys_;
  int64_t queries_, clips_;
  at::Tensor queries_of_step_, keys_of_step_, in_queries_, in_keys_, valid_, logsumexp_;
  std::vector<int64_t> number_;
  std::vector<double> weight_;
  std::vector<T> loss_;
  std::vector<uint8_t> hit_;
  // Of one step, (query modality, key modality, clip).
  std::vector<T> largest_, sums_, factors_;
};

template <typename Body>
auto with_contrast(const Inputs& inputs, bool with_gradient, const Body& body) {
  check(inputs);
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(at::kCPU));
  const auto run = [&](auto contrast) {
    contrast.run();
    return body(contrast);
  };
  if (inputs.targets.scalar_type() == at::kDouble) return run(Contrast<double>(inputs, with_gradient));
  return run(Contrast<float>(inputs, with_gradient));
}

Results cross_info_nce(const at::Tensor& targets, const at::Tensor& predictions, const at::Tensor& pair_weights,
                       const std::optional<at::Tensor>& valid, const at::Tensor& temperature,
                       std::string_view softmax_over, int64_t offset) {
  return with_contrast({targets, predictions, pair_weights, valid, temperature, softmax_over, offset}, false,
                       [](const auto& contrast) { return contrast.results(); });
}

ResultsAndGradients cross_info_nce_with_gradient(const at::Tensor& targets, const at::Tensor& predictions,
                                                 const at::Tensor& pair_weights, const std::optional<at::Tensor>& valid,
                                                 const at::Tensor& temperature, std::string_view softmax_over,
                                                 int64_t offset) {
  return with_contrast({targets, predictions, pair_weights, valid, temperature, softmax_over, offset}, true,
                       [&](const auto& contrast) -> ResultsAndGradients {
                         const auto [loss, pair_loss, hits, logsumexp, clip_weights] = contrast.results();
                         return std::tuple_cat(std::tuple(loss, pair_loss, hits),
                                               contrast.gradients(temperature.scalar_type()));
                       });
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) {
  library.impl("cross_info_nce", &cross_info_nce);
  library.impl("cross_info_nce_with_gradient", &cross_info_nce_with_gradient);
}

}  // namespace unicode_fast::cpu
