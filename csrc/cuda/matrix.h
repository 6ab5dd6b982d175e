// Tensors as the CUDA launchers take them: plain pointers with sizes and strides, nothing of torch.
#pragma once

#include <cstdint>

namespace unicode_fast::cuda {

enum class Number : int { kFloat64, kFloat32, kFloat16, kBFloat16 };

// Element (i, d) lies at data[i * row_stride + d * column_stride]; strides count elements.
struct Matrix {
  const void* data;
  Number number;
  int64_t rows, columns, row_stride, column_stride;
};

}  // namespace unicode_fast::cuda
