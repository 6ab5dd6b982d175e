// Attention of transformer layers on CPUs, a thread for some clips and heads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "dropout.h"
#include "kernels.h"
#include "once.h"

namespace unicode_fast::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Clips and heads that are worth a thread.
constexpr int64_t kGrain = 16;

// Runs `body` on all clips and heads with the clip's inputs and scratch memory.
template <typename F>
void for_each_head(const at::Tensor& vectors, const std::optional<at::Tensor>& valid, const at::Tensor& factors,
                   int64_t heads, const F& body) {
  const int64_t length = vectors.size(1), across = vectors.size(2);
  const float* numbers = vectors.const_data_ptr<float>();
  const auto* mask = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  const float* dropout = factors.defined() ? factors.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, vectors.size(0) * heads, kGrain, [&](int64_t first, int64_t last) {
    Attention clip{};
    clip.length = length;
    clip.heads = heads;
    clip.width = across / (3 * heads);
    std::vector<float> scratch(attention_scratch(clip));
    for (int64_t place = first; place < last; ++place) {
      const int64_t number = place / heads;
      clip.vectors = numbers + number * length * across;
      clip.valid = mask == nullptr ? nullptr : mask + number * length;
      clip.factors = dropout == nullptr ? nullptr : dropout + number * heads * length * length;
      body(clip, number, place % heads, scratch.data());
    }
  });
}

class Attend : public torch::autograd::Function<Attend> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& vectors, const std::optional<at::Tensor>& valid,
                            int64_t heads, double p) {
    const int64_t clips = vectors.size(0), length = vectors.size(1), across = vectors.size(2) / 3;
    const at::Tensor given = vectors.contiguous();
    const at::Tensor mixed = at::empty({clips, length, across}, vectors.options());
    const at::Tensor probabilities = at::empty({clips, heads, length, length}, vectors.options());
    const at::Tensor factors = p > 0 ? dropout_factors(probabilities, p) : at::Tensor();
    float *to = mixed.mutable_data_ptr<float>(), *kept = probabilities.mutable_data_ptr<float>();
    for_each_head(given, valid ? std::optional(valid->contiguous()) : std::nullopt, factors, heads,
                  [&](const Attention& clip, int64_t number, int64_t head, float* scratch) {
                    kernels().attend(clip, head, kept + number * heads * length * length, to + number * length * across,
                                     scratch);
                  });
    context->save_for_backward({given, probabilities, factors});
    context->saved_data["heads"] = heads;
    return mixed;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    refuse_second_derivative("attention");
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &vectors = saved[0], &probabilities = saved[1], gradient = gradients[0].contiguous();
    const int64_t length = vectors.size(1), across = vectors.size(2) / 3;
    const int64_t heads = context->saved_data["heads"].toInt();
    const at::Tensor in_vectors = at::empty_like(vectors);
    const float *given = gradient.const_data_ptr<float>(), *kept = probabilities.const_data_ptr<float>();
    float* to = in_vectors.mutable_data_ptr<float>();
    for_each_head(vectors, std::nullopt, saved[2], heads,
                  [&](const Attention& clip, int64_t number, int64_t head, float* scratch) {
                    kernels().attend_backward(clip, head, kept + number * heads * length * length,
                                              given + number * length * across, to + number * length * 3 * across,
                                              scratch);
                  });
    return {in_vectors, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor attention(const at::Tensor& vectors, const std::optional<at::Tensor>& valid, int64_t heads, double p) {
  check_dropout("vectors", vectors, p);
  TORCH_CHECK_VALUE(vectors.dim() == 3 && vectors.size(1) >= 1 && vectors.size(2) >= 1 && vectors.size(2) % 3 == 0 &&
                        vectors.numel() <= kMostNumbers,
                    "vectors must have shape (B, T, 3 D), T and D at least 1, and at most 2^48 numbers, got ",
                    shape_name(vectors.sizes()));
  const int64_t width = vectors.size(2) / 3;
  TORCH_CHECK_VALUE(heads >= 1 && heads <= width && width % heads == 0, "heads must divide the width of ", width,
                    ", got ", heads);
  if (valid) check_like("valid", *valid, kBoolOnly, {vectors.size(0), vectors.size(1)}, "(B, T) of vectors", vectors);
  return Attend::apply(vectors, valid, heads, p);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def("attention(Tensor vectors, Tensor? valid, int heads, float p) -> Tensor", &attention);
}

}  // namespace unicode_fast::cpu
