#include "dropout.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <optional>

#include "../common/checks.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Numbers that are drawn at a time.
constexpr int64_t kBatch = 1024;

void draw(at::CPUGeneratorImpl& generator, double keep, float* factors, int64_t count) {
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(keep, 53)));
  const float factor = 1 / static_cast<float>(keep);
  const std::lock_guard<std::mutex> lock(generator.mutex_);
  at::mt19937 engine = generator.engine();
  at::mt19937_data_pod data = engine.data();
  uint32_t numbers[2 * kBatch];
  for (int64_t done = 0; done < count; done += kBatch) {
    const int64_t some = std::min(kBatch, count - done);
    for (int64_t drawn = 0; drawn < 2 * some;) {
      if (data.left_ == 1) {
        kernels().twist(data.state_.data());
        data.left_ = at::MERSENNE_STATE_N + 1;
        data.next_ = 0;
      }
      const int64_t next = std::min<int64_t>(2 * some - drawn, data.left_ - 1);
      kernels().temper(data.state_.data() + data.next_, next, numbers + drawn);
      data.left_ -= static_cast<int>(next);
      data.next_ += static_cast<uint32_t>(next);
      drawn += next;
    }
    kernels().draw_factors(numbers, some, threshold, factor, factors + done);
  }
  engine.set_data(data);
  generator.set_engine(engine);
}

at::Tensor draw_by_torch(const at::Tensor& like, double keep, const std::optional<at::Generator>& generator) {
  return at::empty_like(like, at::MemoryFormat::Contiguous).bernoulli_(keep, generator).div_(keep);
}

// torch draws other numbers with MKL on Intel's processors.
bool draws_as_torch() {
  constexpr double kKeep = 0.9;
  at::Generator ours = at::make_generator<at::CPUGeneratorImpl>(1), theirs = ours.clone();
  const at::Tensor factors = at::empty({2000}, at::kFloat);
  draw(*ours.get<at::CPUGeneratorImpl>(), kKeep, factors.mutable_data_ptr<float>(), factors.numel());
  return at::equal(factors, draw_by_torch(factors, kKeep, theirs)) && at::equal(ours.get_state(), theirs.get_state());
}

}  // namespace

void check_dropout(const char* name, const at::Tensor& tensor, double p) {
  check_float_on_cpu(name, tensor);
  TORCH_CHECK_VALUE(p >= 0 && p < 1, "p must be at least 0 and less than 1, got ", p);
}

at::Tensor dropout_factors(const at::Tensor& like, double p) {
  check_dropout("like", like, p);
  static const bool same = draws_as_torch();
  if (!same) return draw_by_torch(like, 1 - p, std::nullopt);
  const at::Tensor factors = at::empty_like(like, at::MemoryFormat::Contiguous);
  auto* generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(std::nullopt, at::detail::getDefaultCPUGenerator());
  draw(*generator, 1 - p, factors.mutable_data_ptr<float>(), factors.numel());
  return factors;
}

namespace {

// Numbers that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

// dropout(relu(x)). The result also tells where the gradient passes: it is positive there.
class ReluDropout : public torch::autograd::Function<ReluDropout> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& values, double p) {
    const at::Tensor given = values.contiguous(), kept = dropout_factors(given, p);
    const float* from = given.const_data_ptr<float>();
    float* to = kept.mutable_data_ptr<float>();
    at::parallel_for(0, given.numel(), kGrain, [&](int64_t first, int64_t last) {
      kernels().rectify(from + first, to + first, last - first, to + first);
    });
    context->save_for_backward({kept});
    context->saved_data["keep"] = 1 - p;
    return kept;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("relu_dropout");
    const at::Tensor kept = context->get_saved_variables()[0], gradient = gradients[0].contiguous();
    const at::Tensor in_values = at::empty_like(kept);
    const float *result = kept.const_data_ptr<float>(), *from = gradient.const_data_ptr<float>();
    const float factor = 1 / static_cast<float>(context->saved_data["keep"].toDouble());
    float* to = in_values.mutable_data_ptr<float>();
    at::parallel_for(0, kept.numel(), kGrain, [&](int64_t first, int64_t last) {
      kernels().rectify_backward(result + first, from + first, factor, last - first, to + first);
    });
    return {in_values, at::Tensor()};
  }
};

at::Tensor relu_dropout(const at::Tensor& values, double p) {
  check_dropout("values", values, p);
  return ReluDropout::apply(values, p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def("relu_dropout(Tensor values, float p) -> Tensor", &relu_dropout);
  library.def("dropout_factors(Tensor like, float p) -> Tensor", &dropout_factors);
}

}  // namespace unicode_fast::cpu
