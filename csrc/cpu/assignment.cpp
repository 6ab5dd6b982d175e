// Terms of the assignment loss on CPUs, each in few passes over its scores. unicode_fast/losses.py has the formulas.
// Sums have a fixed order, so results have the same bits with any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows whose columns are added up together; numbers that are worth a thread.
constexpr int64_t kBlock = 64, kGrain = int64_t{1} << 13;
// Below this sum a column's logarithm is computed from logarithms: exponentials near e^-87 and below are 0.
constexpr double kLeastSum = 1e-20;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void check_scores(const at::Tensor& scores, int64_t dimensions, const char* meaning) {
  check_float_on_cpu("scores", scores);
  TORCH_CHECK_VALUE(scores.dim() == dimensions && scores.size(-1) >= 1 && scores.numel() <= kMostNumbers,
                    "scores must have shape ", meaning, ", M at least 1, and at most 2^48 numbers, got ",
                    shape_name(scores.sizes()));
}

template <typename F>
void for_each_range(int64_t rows, int64_t numbers, const F& body) {
  at::parallel_for(0, rows, kGrain / numbers + 1, body);
}

// Log-sum-exps of the columns, from logarithms of all numbers of a column.
double exact_logsumexp(const float* logits, const std::vector<float>& log_weights, int64_t columns, int64_t column) {
  const auto number = [&](size_t row) {
    return static_cast<double>(logits[static_cast<int64_t>(row) * columns + column]) + log_weights[row];
  };
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (size_t row = 0; row < log_weights.size(); ++row) largest = std::max(largest, number(row));
  if (std::isinf(largest)) return largest;
  for (size_t row = 0; row < log_weights.size(); ++row) sum += std::exp(number(row) - largest);
  return largest + std::log(sum);
}

at::Tensor balanced_assignment(const at::Tensor& scores, const std::optional<at::Tensor>& weights,
                               const std::optional<at::Tensor>& totals, double sharpness, int64_t rounds) {
  check_scores(scores, 2, "(N, M)");
  const int64_t rows = scores.size(0), columns = scores.size(1), blocks = (rows + kBlock - 1) / kBlock;
  if (weights) check_like("weights", *weights, at::kFloat, {rows}, "(N) of scores", scores);
  if (totals) check_like("totals", *totals, at::kFloat, {columns}, "(M) of scores", scores);
  const at::Tensor given = scores.contiguous(), result = at::empty(given.sizes(), given.options());
  const float* from = given.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  std::vector<float> weight(rows, 1), log_weight(rows, 0), shift(columns, 0), total(columns, 0);
  if (weights) {
    const at::Tensor numbers = weights->contiguous();
    std::copy_n(numbers.const_data_ptr<float>(), rows, weight.begin());
    for (int64_t row = 0; row < rows; ++row) log_weight[row] = std::log(weight[row]);
  }
  if (totals) {
    const at::Tensor numbers = totals->clamp(1e-6).log().contiguous();
    std::copy_n(numbers.const_data_ptr<float>(), columns, total.begin());
  }
  const auto factor = static_cast<float>(sharpness);
  std::vector<float> largest(blocks * columns, -kInfinity), sums(blocks * columns, 0);
  // The columns of the scores.
  if (rounds > 0)
    for_each_range(blocks, kBlock * columns, [&](int64_t first, int64_t last) {
      std::vector<float> counted(kBlock * columns);
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kBlock, number = std::min(kBlock, rows - start);
        for (int64_t i = 0; i < number; ++i)
          for (int64_t j = 0; j < columns; ++j)
            counted[i * columns + j] = from[(start + i) * columns + j] * factor + log_weight[start + i];
        kernels().softmax_float.add_to_columns(counted.data(), columns, number, columns,
                                               largest.data() + block * columns, sums.data() + block * columns);
      }
    });
  for (int64_t round = 0; round < std::max<int64_t>(rounds, 1); ++round) {
    for (int64_t column = 0; column < columns && rounds > 0; ++column) {
      double most = round == 0 ? -kInfinity : 0, sum = 0;
      for (int64_t n = column; round == 0 && n < blocks * columns; n += columns)
        most = std::max<double>(most, largest[n]);
      for (int64_t n = column; n < blocks * columns; n += columns)
        sum += sums[n] * (round == 0 && largest[n] != most ? std::exp(largest[n] - most) : 1);
      double logsumexp = most + std::log(sum);
      if (round > 0 && sum < kLeastSum) logsumexp = exact_logsumexp(to, log_weight, columns, column);
      // As nan_to_num. If all weights are 0, a column adds up to 0.
      if (std::isnan(logsumexp) || logsumexp == -kInfinity) logsumexp = 0;
      if (logsumexp == kInfinity) logsumexp = std::numeric_limits<float>::max();
      shift[column] = total[column] - static_cast<float>(logsumexp);
    }
    std::fill(sums.begin(), sums.end(), 0.f);
    for_each_range(blocks, kBlock * columns, [&](int64_t first, int64_t last) {
      std::vector<float> scratch(columns);
      for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * kBlock;
        kernels().balance_rows((round == 0 ? from : to) + start * columns, round == 0 ? factor : 1, shift.data(),
                               weight.data() + start, std::min(kBlock, rows - start), columns, round + 1 >= rounds,
                               to + start * columns, sums.data() + block * columns, scratch.data());
      }
    });
  }
  return result;
}

class CrossEntropy : public torch::autograd::Function<CrossEntropy> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& scores, const at::Tensor& target) {
    const at::Tensor given = scores.contiguous(), aims = target.contiguous();
    const at::Tensor losses = at::empty({scores.size(0)}, scores.options()), softmax = at::empty_like(given);
    const int64_t number = scores.size(1);
    const float *from = given.const_data_ptr<float>(), *aim = aims.const_data_ptr<float>();
    float *loss = losses.mutable_data_ptr<float>(), *kept = softmax.mutable_data_ptr<float>();
    for_each_range(scores.size(0), number, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        loss[row] = kernels().cross_entropy(from + row * number, aim + row * number, number, kept + row * number);
    });
    context->save_for_backward({softmax, aims});
    return losses;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the assignment loss");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor gradient = gradients[0].contiguous(), in_scores = at::empty_like(saved[0]);
    const int64_t number = saved[0].size(1);
    const float *softmax = saved[0].const_data_ptr<float>(), *aim = saved[1].const_data_ptr<float>();
    const float* given = gradient.const_data_ptr<float>();
    float* to = in_scores.mutable_data_ptr<float>();
    for_each_range(saved[0].size(0), number, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        kernels().cross_entropy_slopes(softmax + row * number, aim + row * number, number, given[row],
                                       to + row * number);
    });
    return {in_scores, at::Tensor()};
  }
};

at::Tensor soft_cross_entropy(const at::Tensor& scores, const at::Tensor& target) {
  check_scores(scores, 2, "(N, M)");
  check_like("target", target, at::kFloat, scores.sizes(), "that of scores", scores);
  TORCH_CHECK_VALUE(!target.requires_grad(), "target must have requires_grad=False, as it gets no gradient, got True");
  return CrossEntropy::apply(scores, target);
}

class Presence : public torch::autograd::Function<Presence> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& used, const at::Tensor& scores,
                            const std::optional<at::Tensor>& valid) {
    const int64_t clips = scores.size(0), positions = scores.size(1), number = scores.size(2);
    const at::Tensor given = scores.contiguous(), uses = used.contiguous(), softmax = at::empty_like(given);
    const at::Tensor held = at::zeros_like(uses), missing = at::ones_like(uses),
                     mask = valid ? valid->contiguous() : at::Tensor();
    const at::Tensor losses = at::empty({clips}, scores.options());
    const float *from = given.const_data_ptr<float>(), *use = uses.const_data_ptr<float>();
    float *kept = softmax.mutable_data_ptr<float>(), *loss = losses.mutable_data_ptr<float>();
    float *found = held.mutable_data_ptr<float>(), *rest = missing.mutable_data_ptr<float>();
    for_each_range(clips, positions * number + 1, [&](int64_t first, int64_t last) {
      for (int64_t clip = first; clip < last; ++clip) {
        for (int64_t row = clip * positions; row < (clip + 1) * positions; ++row)
          if (counts(mask, row))
            kernels().hold(from + row * number, number, kept + row * number, found + clip * number,
                           rest + clip * number);
        float sum = 0;
        for (int64_t n = clip * number; n < (clip + 1) * number; ++n) {
          found[n] += kLeastPresent;
          sum -= use[n] * std::log(found[n]);
        }
        loss[clip] = sum;
      }
    });
    context->save_for_backward({softmax, missing.mul_(uses).div_(held), mask});
    return losses;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the assignment loss");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &softmax = saved[0], slopes = saved[1] * gradients[0].unsqueeze(1),
                     in_scores = at::empty_like(softmax);
    const int64_t positions = softmax.size(1), number = softmax.size(2);
    const float *kept = softmax.const_data_ptr<float>(), *slope = slopes.const_data_ptr<float>();
    float* to = in_scores.mutable_data_ptr<float>();
    for_each_range(softmax.size(0) * positions, number, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        if (counts(saved[2], row)) {
          kernels().presence_slopes(kept + row * number, slope + row / positions * number, number, to + row * number);
        } else {
          std::fill(to + row * number, to + (row + 1) * number, 0.f);
        }
      }
    });
    return {at::Tensor(), in_scores, at::Tensor()};
  }

 private:
  static bool counts(const at::Tensor& valid, int64_t row) {
    return !valid.defined() || static_cast<const uint8_t*>(valid.const_data_ptr())[row];
  }
};

at::Tensor presence(const at::Tensor& used, const at::Tensor& scores, const std::optional<at::Tensor>& valid) {
  check_scores(scores, 3, "(B, T, M)");
  check_like("used", used, at::kFloat, {scores.size(0), scores.size(2)}, "(B, M) of scores", scores);
  TORCH_CHECK_VALUE(!used.requires_grad(), "used must have requires_grad=False, as it gets no gradient, got True");
  if (valid) check_like("valid", *valid, kBoolOnly, {scores.size(0), scores.size(1)}, "(B, T) of scores", scores);
  return Presence::apply(used, scores, valid);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def(
      "balanced_assignment(Tensor scores, Tensor? weights, Tensor? totals, float sharpness, int rounds) -> Tensor",
      &balanced_assignment);
  library.def("soft_cross_entropy(Tensor scores, Tensor target) -> Tensor", &soft_cross_entropy);
  library.def("presence(Tensor used, Tensor scores, Tensor? valid) -> Tensor", &presence);
}

}  // namespace unicode_fast::cpu
