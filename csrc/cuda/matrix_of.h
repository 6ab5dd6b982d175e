// From torch's tensors to what the launchers take.
#pragma once

#include <ATen/core/Tensor.h>

#include "matrix.h"

namespace unicode_fast::cuda {

inline Number number_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Number::kFloat64;
    case at::kFloat:
      return Number::kFloat32;
    case at::kHalf:
      return Number::kFloat16;
    case at::kBFloat16:
      return Number::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating-point tensor, got ", tensor.scalar_type());
  }
}

inline Matrix matrix_of(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.dim() == 2 && tensor.is_cuda(), "expected a matrix on a CUDA device, got ", tensor.dim(),
              " dimensions on ", tensor.device());
  return {tensor.const_data_ptr(), number_of(tensor), tensor.size(0),
          tensor.size(1),          tensor.stride(0),  tensor.stride(1)};
}

}  // namespace unicode_fast::cuda
