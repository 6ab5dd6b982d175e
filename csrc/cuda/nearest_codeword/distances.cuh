// Squared distances of a row and a codeword by a warp, in a fixed order of sums; all threads get them.
#pragma once

#include <type_traits>

#include "../numbers.cuh"

namespace unicode_fast::cuda {

// In float64, or in float32 where that holds the differences' terms.
template <class Sum, class X, class C>
__device__ __forceinline__ Sum squared_distance(const Matrix& features, const Matrix& codebook, int64_t row,
                                                int64_t codeword) {
  const X* x = static_cast<const X*>(features.data) + row * features.row_stride;
  const C* c = static_cast<const C*>(codebook.data) + codeword * codebook.row_stride;
  Sum sum = 0;
#pragma unroll 4
  for (int64_t d = threadIdx.x % 32; d < features.columns; d += 32) {
    Sum difference;
    if constexpr (std::is_same_v<Sum, float>) {
      difference = to_float(x[d * features.column_stride]) - to_float(c[d * codebook.column_stride]);
    } else {
      difference = to_double(x[d * features.column_stride]) - to_double(c[d * codebook.column_stride]);
    }
    sum += difference * difference;
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  return sum;
}

template <class Sum, class X>
__device__ __forceinline__ Sum squared_distance_to(const Matrix& features, const Matrix& codebook, int64_t row,
                                                   int64_t codeword) {
  if (codebook.number == Number::kFloat32) return squared_distance<Sum, X, float>(features, codebook, row, codeword);
  if constexpr (std::is_same_v<Sum, double>) {
    if (codebook.number == Number::kFloat64) return squared_distance<Sum, X, double>(features, codebook, row, codeword);
  }
  return squared_distance<Sum, X, X>(features, codebook, row, codeword);
}

// For features of any type but float64.
template <class Sum>
__device__ __forceinline__ Sum squared_distance_of(const Matrix& features, const Matrix& codebook, int64_t row,
                                                   int64_t codeword) {
  if (features.number == Number::kFloat32) return squared_distance_to<Sum, float>(features, codebook, row, codeword);
  if (features.number == Number::kFloat16) return squared_distance_to<Sum, __half>(features, codebook, row, codeword);
  return squared_distance_to<Sum, __nv_bfloat16>(features, codebook, row, codeword);
}

__device__ __forceinline__ double exact_distance(const Matrix& features, const Matrix& codebook, int64_t row,
                                                 int64_t codeword) {
  return squared_distance_of<double>(features, codebook, row, codeword);
}

// Zero for codewords in float64, which leaves all of them open.
__device__ __forceinline__ float rough_distance(const Matrix& features, const Matrix& codebook, int64_t row,
                                                int64_t codeword) {
  if (codebook.number == Number::kFloat64) return 0;
  return squared_distance_of<float>(features, codebook, row, codeword);
}

}  // namespace unicode_fast::cuda
