// Sums over the threads of a block, in a fixed order.
#pragma once

namespace unicode_fast::cuda {

// The sum of the values of all threads before this one; `total` becomes the sum over all threads. `warp_sums` holds a
// number for each warp and may be used again after the caller's next barrier.
template <int kThreads, class T>
__device__ __forceinline__ T sum_before(T value, T* warp_sums, T& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T up_to = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T before = __shfl_up_sync(~0u, up_to, distance);
    if (lane >= distance) up_to += before;
  }
  if (lane == 31) warp_sums[warp] = up_to;
  __syncthreads();
  T before_warp = 0;
  total = 0;
#pragma unroll
  for (int other = 0; other < kThreads / 32; ++other) {
    if (other == warp) before_warp = total;
    total += warp_sums[other];
  }
  return before_warp + up_to - value;
}

}  // namespace unicode_fast::cuda
