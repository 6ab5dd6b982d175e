// Launches and shared memory, the only syntax of CUDA C++ that a C++ compiler cannot read. tests/cuda_on_host has
// macros of the same names.
#pragma once

#ifdef UNICODE_FAST_ON_HOST
#include "launch_on_host.h"
#else

// UNICODE_FAST_LAUNCH(grid, block, bytes, stream, kernel<X, Y>)(arguments);
#define UNICODE_FAST_LAUNCH(grid, block, shared_bytes, stream, ...) \
  __VA_ARGS__<<<(grid), (block), (shared_bytes), (stream)>>>

// Shared memory of a constant size: UNICODE_FAST_SHARED(double, sums, [8][32]);
#define UNICODE_FAST_SHARED(type, name, extent) __shared__ type name extent

// Shared memory of the size that the launch gives: unsigned char name[].
#define UNICODE_FAST_DYNAMIC_SHARED(name, alignment) \
  extern __shared__ __align__(alignment)             \
  unsigned char name[]

#endif
