// Adam with clipped gradients on CPUs: one pass over the gradients for their norms, then one over all numbers.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace unicode_fast::cpu {
namespace {

// Numbers that a thread takes at a time, and blocks of them. Sums by block do not depend on the number of threads.
constexpr int64_t kBlock = 1 << 14, kGrain = 4;

struct Block {
  size_t tensor;
  int64_t first, count;
};

// The same numbers in the order of another tensor in memory.
at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& numbers) {
  return numbers.strides() == like.strides() ? numbers : at::empty_like(like).copy_(numbers);
}

void check_lists(at::TensorList parameters, at::TensorList gradients, at::TensorList means, at::TensorList squares,
                 at::TensorList steps, at::IntArrayRef sizes) {
  const std::pair<const char*, at::TensorList> lists[] = {
      {"gradients", gradients}, {"means", means}, {"squares", squares}, {"steps", steps}};
  for (const auto& [name, tensors] : lists)
    TORCH_CHECK_VALUE(tensors.size() == parameters.size(), name, " must have a tensor for each of ", parameters.size(),
                      " parameters, got ", tensors.size());
  for (size_t n = 0; n < parameters.size(); ++n) {
    const at::Tensor& parameter = parameters[n];
    const auto place = static_cast<int64_t>(n);
    check_tensor({"parameters", place}, parameter, at::kFloat);
    TORCH_CHECK_VALUE(parameter.device().is_cpu() && parameter.is_non_overlapping_and_dense(),
                      Name("parameters", place), " must be on a CPU without gaps in memory, got one on ",
                      parameter.device(), " with strides ", shape_name(parameter.strides()));
    for (const auto& [name, tensors] : lists) {
      const bool is_step = tensors.data() == steps.data();
      check_like({name, place}, tensors[n], at::kFloat, is_step ? at::IntArrayRef() : parameter.sizes(),
                 is_step ? "a number" : "that of its parameter", parameter);
    }
  }
  int64_t grouped = 0;
  bool counts = true;
  for (const int64_t size : sizes) {
    counts = counts && size >= 0 && size <= static_cast<int64_t>(parameters.size());
    grouped += counts ? size : 0;
  }
  TORCH_CHECK_VALUE(counts && grouped == static_cast<int64_t>(parameters.size()), "sizes must add up to the ",
                    parameters.size(), " parameters, got ", shape_name(sizes));
}

// Groups are consecutive parameters. The gradients of one whose norm is above `most_norm` are scaled to it; NaN in one
// makes them all NaN. This is torch.nn.utils.clip_grad_norm_, then torch.optim.Adam, but gradients stay as they are.
void clip_and_adam(at::TensorList parameters, at::TensorList gradients, at::TensorList means, at::TensorList squares,
                   at::TensorList steps, at::IntArrayRef sizes, double most_norm, double rate, double mean_decay,
                   double square_decay, double epsilon) {
  check_lists(parameters, gradients, means, squares, steps, sizes);
  std::vector<at::Tensor> given, mean, square;
  std::vector<Block> blocks;
  std::vector<size_t> ends;  // of each parameter's blocks
  for (size_t n = 0; n < parameters.size(); ++n) {
    given.push_back(in_order_of(parameters[n], gradients[n]));
    mean.push_back(in_order_of(parameters[n], means[n]));
    square.push_back(in_order_of(parameters[n], squares[n]));
    for (int64_t first = 0; first < given[n].numel(); first += kBlock)
      blocks.push_back({n, first, std::min(kBlock, given[n].numel() - first)});
    ends.push_back(blocks.size());
  }
  const auto in_blocks = [&](const auto& body) {
    at::parallel_for(0, static_cast<int64_t>(blocks.size()), kGrain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) body(n, blocks[n]);
    });
  };

  std::vector<double> sums(blocks.size());
  if (most_norm < std::numeric_limits<double>::infinity()) {
    in_blocks([&](int64_t n, const Block& block) {
      sums[n] = kernels().sum_of_squares(given[block.tensor].const_data_ptr<float>() + block.first, block.count);
    });
  }
  std::vector<AdamFactors> factors(parameters.size());
  size_t first = 0, block = 0;
  for (const int64_t size : sizes) {
    double sum = 0;
    const size_t last = first + size;
    for (; size > 0 && block < ends[last - 1]; ++block) sum += sums[block];
    const double clip = most_norm / (std::sqrt(sum) + 1e-6);
    for (; first < last; ++first) {
      const double step = *steps[first].mutable_data_ptr<float>() += 1;
      factors[first] = {static_cast<float>(clip > 1 ? 1 : clip),
                        static_cast<float>(mean_decay),
                        static_cast<float>(1 - mean_decay),
                        static_cast<float>(square_decay),
                        static_cast<float>(1 - square_decay),
                        static_cast<float>(rate / (1 - std::pow(mean_decay, step))),
                        static_cast<float>(1 / std::sqrt(1 - std::pow(square_decay, step))),
                        static_cast<float>(epsilon)};
    }
  }
  in_blocks([&](int64_t, const Block& block) {
    const size_t n = block.tensor;
    kernels().adam(factors[n], given[n].const_data_ptr<float>() + block.first, block.count,
                   parameters[n].mutable_data_ptr<float>() + block.first,
                   mean[n].mutable_data_ptr<float>() + block.first, square[n].mutable_data_ptr<float>() + block.first);
  });
  for (size_t n = 0; n < parameters.size(); ++n) {
    if (!mean[n].is_same(means[n])) means[n].copy_(mean[n]);
    if (!square[n].is_same(squares[n])) squares[n].copy_(square[n]);
    // A graph that holds the former numbers then refuses its backward pass.
    parameters[n].unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(unicode_fast_layers, library) {
  library.def(
      "clip_and_adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, "
      "Tensor(d!)[] steps, int[] sizes, float most_norm, float rate, float mean_decay, float square_decay, "
      "float epsilon) -> ()",
      &clip_and_adam);
}

}  // namespace unicode_fast::cpu
