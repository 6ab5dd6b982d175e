// Reading numbers of any of the four types on the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "matrix.h"

namespace unicode_fast::cuda {

__device__ __forceinline__ double to_double(double value) { return value; }
__device__ __forceinline__ double to_double(float value) { return value; }
__device__ __forceinline__ double to_double(__half value) { return __half2float(value); }
__device__ __forceinline__ double to_double(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Element `place`, counted in elements, of an array of numbers.
__device__ __forceinline__ double load(const void* data, Number number, int64_t place) {
  switch (number) {
    case Number::kFloat64:
      return static_cast<const double*>(data)[place];
    case Number::kFloat32:
      return static_cast<const float*>(data)[place];
    case Number::kFloat16:
      return to_double(static_cast<const __half*>(data)[place]);
    default:
      return to_double(static_cast<const __nv_bfloat16*>(data)[place]);
  }
}

__device__ __forceinline__ double load(const Matrix& matrix, int64_t row, int64_t column) {
  return load(matrix.data, matrix.number, row * matrix.row_stride + column * matrix.column_stride);
}

}  // namespace unicode_fast::cuda
