// The operator commitment_loss on CUDA tensors.

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../../common/checks.h"
#include "../tensors.h"
#include "commitment.h"

namespace unicode_fast::cuda {
namespace {

template <typename T>
std::tuple<at::Tensor, at::Tensor> commit(const at::Tensor& features, const at::Tensor& index,
                                          const std::optional<at::Tensor>& valid, const at::Tensor& codebook,
                                          const at::Tensor& weights) {
  const int64_t modalities = features.size(0), rows = features.size(1);
  const int64_t blocks = (rows + kCommitmentRows - 1) / kCommitmentRows;
  const at::Tensor direction = at::empty(features.sizes(), features.options());
  const at::Tensor loss = at::empty({modalities}, features.options());
  const at::Tensor partial = at::empty({modalities * blocks}, features.options().dtype(at::kDouble));
  const at::Tensor numbers = at::empty({modalities * modalities}, features.options().dtype(at::kLong));
  CommitmentArguments<T> arguments;
  arguments.features = features.const_data_ptr<T>();
  arguments.index = index.const_data_ptr<int64_t>();
  arguments.valid = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  arguments.codebook = codebook.const_data_ptr<T>();
  arguments.weights = weights.const_data_ptr<double>();
  arguments.direction = direction.mutable_data_ptr<T>();
  arguments.loss = loss.mutable_data_ptr<T>();
  arguments.numbers = numbers.mutable_data_ptr<int64_t>();
  arguments.partial = partial.mutable_data_ptr<double>();
  arguments.rows = rows;
  arguments.codewords = codebook.size(0);
  arguments.modalities = static_cast<int>(modalities);
  arguments.width = static_cast<int>(features.size(2));
  C10_CUDA_CHECK(launch_commitment(arguments, c10::cuda::getCurrentCUDAStream()));
  return {loss, direction};
}

std::tuple<at::Tensor, at::Tensor> commitment_loss(const at::Tensor& features, const at::Tensor& index,
                                                   const std::optional<at::Tensor>& valid, const at::Tensor& codebook,
                                                   const at::Tensor& weights) {
  check_commitment(features, index, valid, codebook, weights);
  // Modalities are the second dimension of a grid.
  TORCH_CHECK_VALUE(features.size(0) < 65536 && features.size(1) < INT32_MAX,
                    "features must have fewer than 2^16 modalities and 2^31 - 1 rows on CUDA, got ",
                    shape_name(features.sizes()));
  const c10::cuda::CUDAGuard guard(features.device());
  const at::ScalarType dtype = features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor rows = features.to(dtype).contiguous(), codes = codebook.to(dtype).contiguous();
  const std::optional<at::Tensor> mask = valid ? std::optional(valid->contiguous()) : std::nullopt;
  const auto [loss, direction] = dtype == at::kDouble
                                     ? commit<double>(rows, index.contiguous(), mask, codes, weights.contiguous())
                                     : commit<float>(rows, index.contiguous(), mask, codes, weights.contiguous());
  return {loss, direction.to(features.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, UNICODE_FAST_KEY, library) { library.impl("commitment_loss", &commitment_loss); }

}  // namespace unicode_fast::cuda
