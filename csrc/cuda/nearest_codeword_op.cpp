// The operator nearest_codeword on CUDA tensors.

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdlib>
#include <string_view>
#include <tuple>

#include "matrix_of.h"
#include "nearest_codeword.h"

namespace unicode_fast::cuda {
namespace {

// For tests and measurements: UNICODE_FAST_MAIN_LOOP forces one.
MainLoop wanted_loop() {
  const char* wish = std::getenv("UNICODE_FAST_MAIN_LOOP");
  const std::string_view wanted = wish == nullptr ? "" : wish;
  TORCH_CHECK_VALUE(wanted.empty() || wanted == "plain" || wanted == "mma" || wanted == "wgmma",
                    "UNICODE_FAST_MAIN_LOOP must be plain, mma or wgmma, got ", wanted);
  if (wanted.empty()) return MainLoop::kBest;
  return wanted == "plain" ? MainLoop::kPlain : wanted == "mma" ? MainLoop::kMma : MainLoop::kWgmma;
}

std::tuple<at::Tensor, at::Tensor> nearest_codeword_cuda(const at::Tensor& features, const at::Tensor& codebook) {
  const c10::cuda::CUDAGuard guard(features.device());
  const Matrix rows = matrix_of(features), codewords = matrix_of(codebook);
  TORCH_CHECK_VALUE(features.device() == codebook.device(), "codebook must be on the device of features, ",
                    features.device(), ", got ", codebook.device());
  TORCH_CHECK_VALUE(codewords.columns == rows.columns && codewords.rows > 0 && rows.columns > 0,
                    "codebook must have shape (M, ", rows.columns, "), M at least 1, got (", codewords.rows, ", ",
                    codewords.columns, ")");
  TORCH_CHECK_TYPE(
      codewords.number == rows.number || codewords.number == Number::kFloat32 || codewords.number == Number::kFloat64,
      "codebook must be float64, float32 or of the dtype of features, got ", codebook.scalar_type());
  const bool wide = rows.number == Number::kFloat64;
  const at::Tensor index = at::empty({rows.rows}, features.options().dtype(at::kLong));
  const at::Tensor distance = at::empty({rows.rows}, features.options().dtype(wide ? at::kDouble : at::kFloat));
  if (rows.rows == 0) return {index, distance};
  SearchPlan plan;
  C10_CUDA_CHECK(plan_nearest_codeword(rows, codewords, wanted_loop(), plan));
  const at::Tensor workspace = at::empty({static_cast<int64_t>(plan.bytes)}, features.options().dtype(at::kByte));
  C10_CUDA_CHECK(launch_nearest_codeword(plan, rows, codewords, workspace.mutable_data_ptr(),
                                         index.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr(),
                                         c10::cuda::getCurrentCUDAStream()));
  return {index, distance};
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CUDA, library) { library.impl("nearest_codeword", &nearest_codeword_cuda); }

}  // namespace unicode_fast::cuda
