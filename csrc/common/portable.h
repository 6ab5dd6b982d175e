// The attribute with which one function compiles for the host and for CUDA devices.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define UNICODE_FAST_BOTH __host__ __device__ __forceinline__
#else
#define UNICODE_FAST_BOTH inline
#endif
