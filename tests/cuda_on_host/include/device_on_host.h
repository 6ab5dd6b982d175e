// The names that nvcc defines without an include, for a C++ compiler; included before every .cu file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "cuda_fp16.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __CUDA_ARCH_FEAT_SM90_ALL 1

namespace on_host {

struct Index {
  unsigned x, y, z;
};
extern struct Indices {
  Index thread, block, grid, block_size;
} indices;
using Site = std::source_location;

constexpr unsigned kAllLanes = ~0u;

// A call that all lanes of a warp make together: `finish` runs once, after the last lane, with the values of all lanes.
struct Lanes {
  const void* of[32];
};
void collective(unsigned mask, const Site& site, const void* brought, void (*finish)(const Lanes&));
// All threads of the block that have not ended; `threads` of them for the barriers from 1 on.
void barrier(int number, int threads, const Site& site);
void sync_warp(unsigned mask, const Site& site);
int lane();
void check_atomic(void* at, size_t bytes);
// The number of the mistake to make, from 1 on; mutations.py sets it in UNICODE_FAST_MUTATION.
int mutation();

template <class T>
struct Brought {
  T value;
  int source;
  T result;
};

template <class T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  Brought<T> own{value, source & 31, value};
  collective(mask, site, &own, [](const Lanes& lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* const to = static_cast<Brought<T>*>(const_cast<void*>(lanes.of[i]));
      to->result = static_cast<const Brought<T>*>(lanes.of[to->source])->value;
    }
  });
  return own.result;
}

struct Vote {
  unsigned value, result;
};

}  // namespace on_host

#define threadIdx (::on_host::indices.thread)
#define blockIdx (::on_host::indices.block)
#define gridDim (::on_host::indices.grid)
#define blockDim (::on_host::indices.block_size)

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, on_host::Site site = on_host::Site::current()) {
  return on_host::shuffle(mask, value, on_host::lane() ^ other, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, on_host::Site site = on_host::Site::current()) {
  const int lane = on_host::lane();
  return on_host::shuffle(mask, value, lane % width >= distance ? lane - distance : lane, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, on_host::Site site = on_host::Site::current()) {
  const int lane = on_host::lane();
  return on_host::shuffle(mask, value, lane / width * width + source % width, site);
}

inline unsigned __ballot_sync(unsigned mask, bool vote, on_host::Site site = on_host::Site::current()) {
  on_host::Vote own{vote, 0};
  on_host::collective(mask, site, &own, [](const on_host::Lanes& lanes) {
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<const on_host::Vote*>(lanes.of[i])->value << i;
    for (const void* of : lanes.of) static_cast<on_host::Vote*>(const_cast<void*>(of))->result = all;
  });
  return own.result;
}

inline int __any_sync(unsigned mask, bool vote, on_host::Site site = on_host::Site::current()) {
  return __ballot_sync(mask, vote, site) != 0;
}

inline unsigned __match_any_sync(unsigned mask, int value, on_host::Site site = on_host::Site::current()) {
  on_host::Vote own{static_cast<unsigned>(value), 0};
  on_host::collective(mask, site, &own, [](const on_host::Lanes& lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* const to = static_cast<on_host::Vote*>(const_cast<void*>(lanes.of[i]));
      for (int j = 0; j < 32; ++j)
        to->result |= static_cast<unsigned>(static_cast<const on_host::Vote*>(lanes.of[j])->value == to->value) << j;
    }
  });
  return own.result;
}

inline void __syncwarp(unsigned mask = on_host::kAllLanes, on_host::Site site = on_host::Site::current()) {
  on_host::sync_warp(mask, site);
}
inline void __syncthreads(on_host::Site site = on_host::Site::current()) { on_host::barrier(0, 0, site); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline long long __double_as_longlong(double value) {
  long long bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <class T>
T __ldg(const T* from) {
  return *from;
}

// Atomic operations do not race with each other, but with ordinary accesses.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* at, T value) {
  on_host::check_atomic(at, sizeof(T));
  const T before = *at;
  *at += value;
  return before;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicMax(T* at, T value) {
  on_host::check_atomic(at, sizeof(T));
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

template <class T>
__attribute__((no_sanitize("thread"))) T atomicMin(T* at, std::type_identity_t<T> value) {
  on_host::check_atomic(at, sizeof(T));
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicExch(T* at, std::type_identity_t<T> value) {
  on_host::check_atomic(at, sizeof(T));
  const T before = *at;
  *at = value;
  return before;
}
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* at, std::type_identity_t<T> expected,
                                                   std::type_identity_t<T> value) {
  on_host::check_atomic(at, sizeof(T));
  const T before = *at;
  if (before == expected) *at = value;
  return before;
}
// Here blocks run one after the other, and a block's threads see all that was written.
inline void __threadfence() {}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::isfinite;

// Vectors of 16 bytes and less, read and written as one.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
