// Loss and gradient of the commitment of all modalities; the formulas are in unicode_fast/reference/commitment.py. All
// sums have a fixed order.

#include <cmath>

#include "../launch.cuh"
#include "commitment.h"

namespace unicode_fast::cuda {
namespace {

constexpr int kThreads = 32 * kCommitmentRows;

// Products are rounded before they are added, as in the reference, so that gradients are the same bits.
__device__ __forceinline__ float add_product(float sum, float a, float b) { return __fadd_rn(sum, __fmul_rn(a, b)); }
__device__ __forceinline__ double add_product(double sum, double a, double b) {
  return __dadd_rn(sum, __dmul_rn(a, b));
}

// The sum over the block, in thread 0.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  UNICODE_FAST_SHARED(T, sums, [kThreads]);
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Block (m, o) counts the rows that are valid in both.
template <typename T>
__global__ void __launch_bounds__(kThreads) count_kernel(const CommitmentArguments<T> a) {
  const uint8_t* own = a.valid + blockIdx.x * a.rows;
  const uint8_t* other = a.valid + blockIdx.y * a.rows;
  int64_t number = 0;
  for (int64_t row = threadIdx.x; row < a.rows; row += kThreads) number += own[row] && other[row];
  number = block_sum(number);
  if (threadIdx.x == 0) a.numbers[blockIdx.x * a.modalities + blockIdx.y] = number;
}

// Block (x, m) takes kCommitmentRows rows of modality m, one a warp; writes their gradient and their share of the loss.
template <typename T>
__global__ void __launch_bounds__(kThreads) commit_kernel(const CommitmentArguments<T> a) {
  UNICODE_FAST_SHARED(double, sums, [kCommitmentRows]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m = blockIdx.y;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCommitmentRows + warp;
  double total = 0;
  if (row < a.rows) {
    const int64_t place = m * a.rows + row;
    const bool counts = a.valid == nullptr || a.valid[place];
    const T* x = a.features + place * a.width;
    T* direction = a.direction + place * a.width;
    for (int d = lane; d < a.width; d += 32) direction[d] = 0;
    for (int o = 0; o < a.modalities && counts; ++o) {
      if (a.valid != nullptr && !a.valid[o * a.rows + row]) continue;
      if (a.weights[m * a.modalities + o] == 0) continue;
      const int64_t number = a.valid == nullptr ? a.rows : a.numbers[m * a.modalities + o];
      const T scale = static_cast<T>(a.weights[m * a.modalities + o]) / static_cast<T>(number);
      const int64_t codeword = a.index[o * a.rows + row];
      if (codeword < 0 || codeword >= a.codewords) {  // never read out of bounds; the loss becomes NaN
        total = nan("");
        break;
      }
      const T* code = a.codebook + codeword * a.width;
      double squares = 0;
      for (int d = lane; d < a.width; d += 32) {
        const T difference = x[d] - code[d];
        direction[d] = add_product(direction[d], 2 * scale, difference);
        squares += static_cast<double>(difference) * static_cast<double>(difference);
      }
      total += static_cast<double>(scale) * squares;
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
  if (lane == 0) sums[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (const double part : sums) sum += part;
    a.partial[static_cast<int64_t>(m) * gridDim.x + blockIdx.x] = sum;
  }
}

// Block m adds up the shares of modality m.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const CommitmentArguments<T> a, int64_t blocks) {
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) sum += a.partial[blockIdx.x * blocks + block];
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.loss[blockIdx.x] = static_cast<T>(sum);
}

template <typename T>
cudaError_t launch(const CommitmentArguments<T>& a, cudaStream_t stream) {
  const int64_t blocks = (a.rows + kCommitmentRows - 1) / kCommitmentRows;
  const unsigned modalities = a.modalities;
  if (a.valid != nullptr) UNICODE_FAST_LAUNCH(dim3(modalities, modalities), kThreads, 0, stream, count_kernel<T>)(a);
  if (blocks > 0)
    UNICODE_FAST_LAUNCH(dim3(static_cast<unsigned>(blocks), modalities), kThreads, 0, stream, commit_kernel<T>)(a);
  UNICODE_FAST_LAUNCH(modalities, kThreads, 0, stream, finish_kernel<T>)(a, blocks);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_commitment(const CommitmentArguments<float>& arguments, cudaStream_t stream) {
  return launch(arguments, stream);
}

cudaError_t launch_commitment(const CommitmentArguments<double>& arguments, cudaStream_t stream) {
  return launch(arguments, stream);
}

}  // namespace unicode_fast::cuda
