// The operator codeword_distribution on CPUs and its gradient. torch multiplies features and codewords; one pass turns
// the products into probabilities or slopes. The formulas are in the reference's docstrings.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "products.h"

namespace unicode_fast::cpu {
namespace {

// Assignments in memory at a time, unless one clip has more; numbers that are worth a thread.
constexpr int64_t kChunk = int64_t{1} << 19, kGrain = int64_t{1} << 13;

at::ScalarType check(const at::Tensor& features, const at::Tensor& codebook, const std::optional<at::Tensor>& valid,
                     double temperature) {
  check_tensor("features", features, kFeatureDtypes);
  TORCH_CHECK_VALUE(features.dim() == 3 && features.size(2) >= 1 && features.numel() <= kMostNumbers,
                    "features must have shape (B, T, D), D at least 1, and at most 2^48 numbers, got ",
                    shape_name(features.sizes()));
  check_codebook_of(features, codebook);
  if (valid)
    check_like("valid", *valid, kBoolOnly, {features.size(0), features.size(1)}, "(B, T) of features", features);
  const bool wide = features.scalar_type() == at::kDouble || codebook.scalar_type() == at::kDouble;
  const double least = wide ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const double most = wide ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  TORCH_CHECK_VALUE(temperature >= least && temperature <= most, "temperature must be finite and at least ", least,
                    ", the smallest normal number, in ", wide ? "float64" : "float32", ", got ", temperature);
  return wide ? at::kDouble : at::kFloat;
}

// Features of some clips and the codewords, both relative to the mean codeword, and their products.
template <typename T>
class Assignment {
 public:
  Assignment(const at::Tensor& features, const at::Tensor& codebook, const std::optional<at::Tensor>& valid,
             double temperature)
      : factor(static_cast<T>(-1 / temperature)), features_(features), positions_(features.size(1)) {
    if constexpr (std::is_same_v<T, double>) {
      loops = kernels().distribution_double;
    } else {
      loops = kernels().distribution_float;
    }
    if (valid) valid_ = valid->contiguous();
    const at::Tensor numbers = codebook.to(at::CppTypeToScalarType<T>::value);
    middle_ = numbers.mean(0);
    codewords = numbers - middle_;
    norms_ = codewords.square().sum(1);
  }

  // Runs `body` on each chunk of clips, its first clip and their number.
  template <typename F>
  void for_each_chunk(const F& body) {
    const int64_t clips = features_.size(0);
    if (positions_ == 0) return;
    const int64_t most = std::max<int64_t>(kChunk / positions_ / codewords.size(0), 1);
    for (int64_t first = 0; first < clips; first += most) {
      multiply(first, std::min(most, clips - first));
      body(first, std::min(most, clips - first));
    }
  }

  // Runs `body` on the rows of the chunk, with the clip, the row, the row's distances and its weight in the clip's
  // mean.
  template <typename F>
  void for_each_row(int64_t first, int64_t clips, const F& body) {
    const int64_t number = codewords.size(0);
    T* distances = products.template mutable_data_ptr<T>();
    const T* norms = norms_.template const_data_ptr<T>();
    at::parallel_for(0, clips, kGrain / (positions_ * number) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t clip = begin; clip < end; ++clip) {
        const T share = T{1} / static_cast<T>(std::max<int64_t>(count(first + clip), 1));
        for (int64_t row = clip * positions_; row < (clip + 1) * positions_; ++row) {
          T* own = distances + row * number;
          loops.distances(own, number, norms, row_norms_[row]);
          body(first + clip, row, own, counts(first * positions_ + row) ? share : T{0});
        }
      }
    });
  }

  DistributionLoops<T> loops;
  T factor;                              // of the distances in the softmax
  at::Tensor codewords, rows, products;  // (M, D), and of a chunk (positions, D) and (positions, M)

 private:
  bool counts(int64_t row) const {
    return !valid_.defined() || static_cast<const uint8_t*>(valid_.const_data_ptr())[row];
  }

  int64_t count(int64_t clip) const {
    int64_t found = 0;
    for (int64_t row = clip * positions_; row < (clip + 1) * positions_; ++row) found += counts(row);
    return found;
  }

  void multiply(int64_t first, int64_t clips) {
    const int64_t width = features_.size(2), number = clips * positions_;
    const at::Tensor given = features_.narrow(0, first, clips).to(codewords.scalar_type()).contiguous();
    rows = at::empty({number, width}, given.options());
    row_norms_.resize(number);
    const T *from = given.const_data_ptr<T>(), *middle = middle_.const_data_ptr<T>();
    T* to = rows.mutable_data_ptr<T>();
    at::parallel_for(0, number, kGrain / width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* own = to + row * width;
        if (counts(first * positions_ + row)) {
          row_norms_[row] = loops.centre(from + row * width, middle, width, own);
        } else {
          std::fill(own, own + width, T{0});
          row_norms_[row] = 0;
        }
      }
    });
    products = product(rows, codewords);
  }

  at::Tensor features_, valid_, middle_, norms_;
  int64_t positions_;
  std::vector<T> row_norms_;
};

template <typename T>
at::Tensor forward(Assignment<T>& assignment, const at::Tensor& features) {
  const int64_t number = assignment.codewords.size(0);
  const at::Tensor result = at::zeros({features.size(0), number}, assignment.codewords.options());
  T* sums = result.mutable_data_ptr<T>();
  assignment.for_each_chunk([&](int64_t first, int64_t clips) {
    assignment.for_each_row(first, clips, [&](int64_t clip, int64_t, T* distances, T share) {
      assignment.loops.mix(distances, number, assignment.factor, share, sums + clip * number);
    });
  });
  return result;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward(Assignment<T>& assignment, const at::Tensor& gradient,
                                            const at::Tensor& features, const at::Tensor& codebook, bool in_codebook) {
  const at::Tensor& codewords = assignment.codewords;
  const int64_t number = codewords.size(0), width = codewords.size(1), positions = features.size(1);
  const at::Tensor arriving = gradient.to(codewords.scalar_type()).contiguous();
  const at::Tensor in_features = at::empty(features.sizes(), features.options());
  at::Tensor in_codewords = in_codebook ? at::zeros_like(codewords) : at::empty({0, width}, codewords.options());
  const T* given = arriving.const_data_ptr<T>();
  assignment.for_each_chunk([&](int64_t first, int64_t clips) {
    const at::Tensor sums = at::empty({clips * positions}, codewords.options());
    T* slope_sums = sums.mutable_data_ptr<T>();
    assignment.for_each_row(first, clips, [&](int64_t clip, int64_t row, T* distances, T share) {
      thread_local std::vector<T> scratch;
      scratch.resize(number);
      slope_sums[row] =
          assignment.loops.slopes(distances, number, assignment.factor, share, given + clip * number, scratch.data());
    });
    const at::Tensor &slopes = assignment.products, &rows = assignment.rows;
    at::Tensor own = in_features.narrow(0, first, clips).view({clips * positions, width});
    at::addcmul_out(own, product(slopes, codewords.t()), rows, sums.unsqueeze(1), -1);
    if (in_codebook) in_codewords.addmm_(slopes.t(), rows).sub_(codewords * slopes.sum(0).unsqueeze(1));
  });
  return {in_features, in_codewords.to(codebook.scalar_type())};
}

template <typename Body>
auto with_assignment(const at::Tensor& features, const at::Tensor& codebook, const std::optional<at::Tensor>& valid,
                     double temperature, const Body& body) {
  const bool wide = check(features, codebook, valid, temperature) == at::kDouble;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(at::kCPU));
  const auto run = [&](auto assignment) { return body(assignment); };
  if (wide) return run(Assignment<double>(features, codebook, valid, temperature));
  return run(Assignment<float>(features, codebook, valid, temperature));
}

at::Tensor codeword_distribution(const at::Tensor& features, const at::Tensor& codebook,
                                 const std::optional<at::Tensor>& valid, double temperature) {
  return with_assignment(features, codebook, valid, temperature,
                         [&](auto& assignment) { return forward(assignment, features); });
}

std::tuple<at::Tensor, at::Tensor> codeword_distribution_backward(const at::Tensor& gradient,
                                                                  const at::Tensor& features,
                                                                  const at::Tensor& codebook,
                                                                  const std::optional<at::Tensor>& valid,
                                                                  double temperature, bool in_codebook) {
  return with_assignment(features, codebook, valid, temperature, [&](auto& assignment) {
    check_like("gradient", gradient, kFeatureDtypes, {features.size(0), codebook.size(0)}, "(B, M)", features);
    return backward(assignment, gradient, features, codebook, in_codebook);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) {
  library.impl("codeword_distribution", &codeword_distribution);
  library.impl("codeword_distribution_backward", &codeword_distribution_backward);
}

}  // namespace unicode_fast::cpu
