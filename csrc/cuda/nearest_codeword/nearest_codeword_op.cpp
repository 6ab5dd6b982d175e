// The operator nearest_codeword on CUDA tensors.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "../../common/checks.h"
#include "../tensors.h"
#include "nearest_codeword.h"

namespace unicode_fast::cuda {
namespace {

// For tests and measurements: UNICODE_FAST_MAIN_LOOP forces one.
MainLoop wanted_loop() {
  constexpr std::pair<std::string_view, MainLoop> kLoops[] = {
      {"", MainLoop::kBest},      {"plain", MainLoop::kPlain},   {"mma", MainLoop::kMma},
      {"wide", MainLoop::kWide},  {"middle", MainLoop::kMiddle}, {"narrow", MainLoop::kNarrow},
      {"wgmma", MainLoop::kWgmma}};
  const char* wish = std::getenv("UNICODE_FAST_MAIN_LOOP");
  const std::string_view wanted = wish == nullptr ? "" : wish;
  for (const auto& [name, loop] : kLoops)
    if (name == wanted) return loop;
  TORCH_CHECK_VALUE(false, "UNICODE_FAST_MAIN_LOOP must be plain, mma, wide, middle, narrow or wgmma, got ", wanted);
}

at::Tensor bytes_beside(const at::Tensor& tensor, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, tensor.options().dtype(at::kByte));
}

// The copies of the search with wgmma begin at multiples of 16 bytes.
constexpr size_t kOperandsAlignment = 16;

void codebook_operands_cuda(const at::Tensor& codebook, const at::Tensor& operands) {
  check_codebook(codebook, kFeatureDtypes);
  const c10::cuda::CUDAGuard guard(codebook.device());
  const Matrix codewords = matrix_of(codebook);
  OperandsPlan plan;
  C10_CUDA_CHECK(plan_operands(codewords, plan));
  check_operands(operands, codebook, static_cast<int64_t>(plan.bytes), kOperandsAlignment);
  check_apart({{"operands", operands}, {"codebook", codebook}}, 1);
  C10_CUDA_CHECK(launch_operands(plan, codewords, operands.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

// `compared` as in Found, or undefined.
std::tuple<at::Tensor, at::Tensor> search(const at::Tensor& features, const at::Tensor& codebook,
                                          const std::optional<at::Tensor>& operands, const at::Tensor& compared) {
  check_search(features, codebook);
  const c10::cuda::CUDAGuard guard(features.device());
  const Matrix rows = matrix_of(features), codewords = matrix_of(codebook);
  const bool wide = rows.number == Number::kFloat64;
  const at::Tensor index = at::empty({rows.rows}, features.options().dtype(at::kLong));
  const at::Tensor distance = at::empty({rows.rows}, features.options().dtype(wide ? at::kDouble : at::kFloat));
  if (rows.rows == 0) return {index, distance};
  SearchPlan plan;
  C10_CUDA_CHECK(plan_nearest_codeword(rows, codewords, wanted_loop(), plan));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  OperandsPlan made = operands_for(plan, codewords);
  at::Tensor codes;
  if (operands && plan.tile_rows > 0) {
    C10_CUDA_CHECK(plan_operands(codewords, made));
    check_operands(*operands, codebook, static_cast<int64_t>(made.bytes), kOperandsAlignment);
    codes = *operands;
  } else {
    codes = bytes_beside(codebook, made.bytes);
    C10_CUDA_CHECK(launch_operands(made, codewords, codes.mutable_data_ptr(), stream));
  }
  const at::Tensor workspace = bytes_beside(features, plan.bytes);
  const Found found{index.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr(),
                    compared.defined() && plan.tile_rows > 0 ? compared.mutable_data_ptr<int>() : nullptr};
  C10_CUDA_CHECK(launch_nearest_codeword(plan, made, rows, codewords, codes.const_data_ptr(),
                                         workspace.mutable_data_ptr(), found, stream));
  return {index, distance};
}

std::tuple<at::Tensor, at::Tensor> nearest_codeword_cuda(const at::Tensor& features, const at::Tensor& codebook,
                                                         const std::optional<at::Tensor>& operands) {
  return search(features, codebook, operands, {});
}

at::Tensor compared_codewords_cuda(const at::Tensor& features, const at::Tensor& codebook,
                                   const std::optional<at::Tensor>& operands) {
  check_search(features, codebook);
  const at::Tensor compared = at::full({features.size(0)}, kComparedWithAll, features.options().dtype(at::kInt));
  search(features, codebook, operands, compared);
  return compared;
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, UNICODE_FAST_KEY, library) {
  library.impl("codebook_operands", &codebook_operands_cuda);
  library.impl("nearest_codeword", &nearest_codeword_cuda);
  library.impl("compared_codewords", &compared_codewords_cuda);
}

}  // namespace unicode_fast::cuda
