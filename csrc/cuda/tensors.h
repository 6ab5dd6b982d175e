// Arguments of the launchers from torch's tensors, and the dispatch key of the operators on such tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "matrix.h"

// tests/cuda_on_host runs the kernels on CPU tensors.
#ifdef UNICODE_FAST_ON_HOST
#define UNICODE_FAST_KEY CPU
#else
#define UNICODE_FAST_KEY CUDA
#endif

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
  TORCH_CHECK(tensor.dim() == 2, "expected a matrix, got ", tensor.dim(), " dimensions");
  return {tensor.const_data_ptr(), number_of(tensor), tensor.size(0),
          tensor.size(1),          tensor.stride(0),  tensor.stride(1)};
}

}  // namespace unicode_fast::cuda
