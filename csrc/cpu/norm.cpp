// Norms on CPUs: layer norm of a sum, whose second tensor may have gone through dropout, and batch norm of features.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows of a block. Sums by block do not depend on the number of threads.
constexpr int64_t kBlock = 64;
// Columns that are worth a thread.
constexpr int64_t kColumns = 64;

// Where the factors of row i begin; null without factors. They are (B, T, D) in any order of B and T.
class Factors {
 public:
  Factors(const at::Tensor& factors, int64_t length) : factors_(factors), length_(length) {}

  const float* row(int64_t i) const {
    if (!factors_.defined()) return nullptr;
    return factors_.const_data_ptr<float>() + i / length_ * factors_.stride(0) + i % length_ * factors_.stride(1);
  }

 private:
  at::Tensor factors_;
  int64_t length_;
};

class SumNorm : public torch::autograd::Function<SumNorm> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& first, const at::Tensor& second,
                            const std::optional<at::Tensor>& drawn, const at::Tensor& weight, const at::Tensor& bias,
                            double epsilon) {
    const at::Tensor factors = drawn.value_or(at::Tensor());
    const at::Tensor one = first.contiguous(), other = second.contiguous();
    const at::Tensor weights = weight.contiguous(), biases = bias.contiguous();
    const at::Tensor normal = at::empty_like(one), scales = at::empty({one.size(0), one.size(1)}, one.options());
    const at::Tensor result = at::empty_like(one);
    const AddNorm layer{weights.const_data_ptr<float>(), biases.const_data_ptr<float>(), one.size(2),
                        static_cast<float>(epsilon)};
    const Factors by_row(factors, one.size(1));
    const float *from = one.const_data_ptr<float>(), *added = other.const_data_ptr<float>();
    float *kept = normal.mutable_data_ptr<float>(), *scale = scales.mutable_data_ptr<float>();
    float* to = result.mutable_data_ptr<float>();
    at::parallel_for(0, scales.numel(), kBlock, [&](int64_t start, int64_t end) {
      for (int64_t i = start; i < end; ++i) {
        const int64_t place = i * layer.width;
        kernels().add_norm(layer, from + place, added + place, by_row.row(i), kept + place, scale + i, to + place);
      }
    });
    context->save_for_backward({normal, scales, factors, weights});
    return result;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the norm of a sum");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &normal = saved[0], &scales = saved[1], &factors = saved[2], &weights = saved[3];
    const at::Tensor gradient = gradients[0].contiguous();
    const int64_t rows = scales.numel(), width = normal.size(2), blocks = (rows + kBlock - 1) / kBlock;
    const at::Tensor in_first = at::empty_like(normal);
    const at::Tensor in_second = factors.defined() ? at::empty_like(normal) : in_first;
    const at::Tensor sums = at::zeros({2, blocks, width}, normal.options());
    const AddNorm layer{weights.const_data_ptr<float>(), nullptr, width, 0};
    const Factors by_row(factors, normal.size(1));
    const float *given = gradient.const_data_ptr<float>(), *own = normal.const_data_ptr<float>();
    const float* scale = scales.const_data_ptr<float>();
    float *to = in_first.mutable_data_ptr<float>(), *to_second = in_second.mutable_data_ptr<float>();
    float *in_weight = sums.mutable_data_ptr<float>(), *in_bias = in_weight + blocks * width;
    at::parallel_for(0, blocks, 1, [&](int64_t start, int64_t end) {
      for (int64_t i = start * kBlock; i < std::min(end * kBlock, rows); ++i) {
        const int64_t place = i * width, block = i / kBlock * width;
        kernels().add_norm_backward(layer, given + place, own + place, scale[i], by_row.row(i), to + place,
                                    to_second + place, in_weight + block, in_bias + block);
      }
    });
    const at::Tensor in_parameters = sums.sum(1);
    return {in_first, in_second, at::Tensor(), in_parameters[0], in_parameters[1], at::Tensor()};
  }
};

at::Tensor add_norm(const at::Tensor& first, const at::Tensor& second, const std::optional<at::Tensor>& factors,
                    const at::Tensor& weight, const at::Tensor& bias, double epsilon) {
  check_float_on_cpu("first", first);
  TORCH_CHECK_VALUE(first.dim() == 3 && first.size(2) >= 1 && first.numel() <= kMostNumbers,
                    "first must have shape (B, T, D), D at least 1, and at most 2^48 numbers, got ",
                    shape_name(first.sizes()));
  check_like("second", second, at::kFloat, first.sizes(), "that of first", first);
  for (const auto& [name, parameter] : {std::pair("weight", weight), std::pair("bias", bias)})
    check_like(name, parameter, at::kFloat, {first.size(2)}, "the width of first", first);
  std::optional<at::Tensor> given;
  if (factors) {
    check_like("factors", *factors, at::kFloat, first.sizes(), "that of first", first);
    given = factors->stride(2) == 1 ? *factors : factors->contiguous();
  }
  return SumNorm::apply(first, second, given, weight, bias, epsilon);
}

class FeatureNorm : public torch::autograd::Function<FeatureNorm> {
 public:
  static variable_list forward(AutogradContext* context, const at::Tensor& features,
                               const std::optional<at::Tensor>& valid, double epsilon) {
    const at::Tensor given = features.contiguous(), result = at::empty_like(given);
    const at::Tensor mask = valid ? valid->contiguous() : at::Tensor();
    const at::Tensor moments = at::empty({2, given.size(2)}, given.options());
    const BatchNorm batch = batch_of(given, mask, epsilon);
    float *mean = moments.mutable_data_ptr<float>(), *to = result.mutable_data_ptr<float>();
    at::parallel_for(0, batch.width, kColumns, [&](int64_t first, int64_t last) {
      std::vector<double> sums(last - first);
      kernels().batch_norm(batch, first, last, mean, mean + batch.width, to, sums.data());
    });
    const at::Tensor means = moments[0], variances = moments[1];
    context->save_for_backward({result, mask, variances});
    context->saved_data["epsilon"] = epsilon;
    context->mark_non_differentiable({means, variances});
    return {result, means, variances};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the norm of features");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &result = saved[0], gradient = gradients[0].contiguous(), in_features = at::empty_like(result);
    const BatchNorm batch = batch_of(result, saved[1], context->saved_data["epsilon"].toDouble());
    const float *variance = saved[2].const_data_ptr<float>(), *given = gradient.const_data_ptr<float>();
    float* to = in_features.mutable_data_ptr<float>();
    at::parallel_for(0, batch.width, kColumns, [&](int64_t first, int64_t last) {
      std::vector<double> sums(2 * (last - first));
      kernels().batch_norm_backward(batch, first, last, variance, given, to, sums.data());
    });
    return {in_features, at::Tensor(), at::Tensor()};
  }

 private:
  static BatchNorm batch_of(const at::Tensor& values, const at::Tensor& mask, double epsilon) {
    const int64_t rows = values.size(0) * values.size(1);
    const auto* valid = mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
    const int64_t count = valid == nullptr ? rows : rows - std::count(valid, valid + rows, uint8_t{0});
    return {values.const_data_ptr<float>(), valid, rows, values.size(2), std::max<int64_t>(count, 1),
            static_cast<float>(epsilon)};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> feature_norm(const at::Tensor& features,
                                                            const std::optional<at::Tensor>& valid, double epsilon) {
  check_float_on_cpu("features", features);
  TORCH_CHECK_VALUE(features.dim() == 3 && features.numel() <= kMostNumbers,
                    "features must have shape (B, T, D) and at most 2^48 numbers, got ", shape_name(features.sizes()));
  if (valid)
    check_like("valid", *valid, kBoolOnly, {features.size(0), features.size(1)}, "(B, T) of features", features);
  const variable_list found = FeatureNorm::apply(features, valid, epsilon);
  return {found[0], found[1], found[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def(
      "add_norm(Tensor first, Tensor second, Tensor? factors, Tensor weight, Tensor bias, float epsilon) -> Tensor",
      &add_norm);
  library.def("feature_norm(Tensor features, Tensor? valid, float epsilon) -> (Tensor, Tensor, Tensor)", &feature_norm);
}

}  // namespace unicode_fast::cpu
