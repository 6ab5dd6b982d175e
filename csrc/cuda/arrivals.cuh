// Order between the blocks of a launch. A thread counts its block after a barrier. A thread that has seen the count,
// and after another barrier its whole block, sees all that the counted block wrote before.
//
// tests/cuda_on_host compiles the kernels with a C++ compiler; it has a twin of every function here.
#pragma once

#ifdef UNICODE_FAST_ON_HOST
#include "arrivals_on_host.h"
#else

namespace unicode_fast::cuda {

// Counts this block; returns how many were counted before.
__device__ __forceinline__ int count_block(int* count) {
  int before;
  asm volatile("atom.acq_rel.gpu.add.s32 %0, [%1], 1;\n" : "=r"(before) : "l"(count) : "memory");
  return before;
}

// Waits until at least so many blocks are counted. These must have begun already, or this may wait forever.
__device__ __forceinline__ void wait_for_count(const int* count, int least) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.s32 %0, [%1];\n" : "=r"(now) : "l"(count) : "memory");
  } while (now < least);
}

}  // namespace unicode_fast::cuda

#endif
