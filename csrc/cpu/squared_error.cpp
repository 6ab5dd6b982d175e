// The mean squared error of valid positions on CPUs.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Numbers that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

// Runs `body` on all positions, of `across` numbers each; the mask is null where every position is valid.
template <typename F>
void for_each_position(const at::Tensor& numbers, const at::Tensor& valid, const F& body) {
  const int64_t positions = numbers.size(0) * numbers.size(1), across = numbers.numel() / positions;
  const auto* mask = valid.defined() ? static_cast<const uint8_t*>(valid.const_data_ptr()) : nullptr;
  at::parallel_for(0, positions, std::max<int64_t>(1, kGrain / across), [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) body(n, n * across, across, mask == nullptr || mask[n]);
  });
}

class SquaredError : public torch::autograd::Function<SquaredError> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& decoded, const at::Tensor& target,
                            const std::optional<at::Tensor>& mask) {
    const at::Tensor valid = mask ? mask->contiguous() : at::Tensor();
    const at::Tensor one = decoded.contiguous(), other = target.contiguous();
    const float *from = one.const_data_ptr<float>(), *aim = other.const_data_ptr<float>();
    std::vector<float> errors(one.size(0) * one.size(1));
    std::vector<uint8_t> counted(errors.size());
    for_each_position(one, valid, [&](int64_t n, int64_t place, int64_t across, bool is_valid) {
      counted[n] = is_valid;
      errors[n] = is_valid ? kernels().squared_distance(from + place, aim + place, across) : 0;
    });
    const int64_t positions = std::max<int64_t>(1, std::count(counted.begin(), counted.end(), 1));
    const double across = static_cast<double>(one.numel()) / static_cast<double>(errors.size());
    const double share = 1 / (across * static_cast<double>(positions));
    context->save_for_backward({one, other, valid});
    context->saved_data["share"] = share;
    return at::scalar_tensor(std::accumulate(errors.begin(), errors.end(), 0.) * share, one.options());
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("the reconstruction error");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &one = saved[0], &other = saved[1], in_decoded = at::empty_like(one);
    const auto factor = static_cast<float>(2 * context->saved_data["share"].toDouble() * gradients[0].item<double>());
    const float *from = one.const_data_ptr<float>(), *aim = other.const_data_ptr<float>();
    float* to = in_decoded.mutable_data_ptr<float>();
    for_each_position(one, saved[2], [&](int64_t, int64_t place, int64_t across, bool is_valid) {
      if (is_valid) {
        kernels().scaled_difference(from + place, aim + place, factor, across, to + place);
      } else {
        std::fill(to + place, to + place + across, 0.f);
      }
    });
    return {in_decoded, context->needs_input_grad(1) ? in_decoded.neg() : at::Tensor(), at::Tensor()};
  }
};

at::Tensor squared_error(const at::Tensor& decoded, const at::Tensor& target, const std::optional<at::Tensor>& valid) {
  check_float_on_cpu("decoded", decoded);
  TORCH_CHECK_VALUE(decoded.dim() >= 2 && decoded.numel() > 0 && decoded.numel() <= kMostNumbers,
                    "decoded must have shape (B, T, ...), at least one and at most 2^48 numbers, got ",
                    shape_name(decoded.sizes()));
  check_like("target", target, at::kFloat, decoded.sizes(), "that of decoded", decoded);
  if (valid) check_like("valid", *valid, kBoolOnly, {decoded.size(0), decoded.size(1)}, "(B, T) of decoded", decoded);
  return SquaredError::apply(decoded, target, valid);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def("squared_error(Tensor decoded, Tensor target, Tensor? valid) -> Tensor", &squared_error);
}

}  // namespace unicode_fast::cpu
