// Finds codewords equal to one of lower index, which never are the nearest: a hash table with an entry for each
// different codeword.
#pragma once

#include "../../common/counter_random.h"
#include "../numbers.cuh"

namespace unicode_fast::cuda {

// The upper half of a codeword's hash, and the lowest index so far of the codewords that have it.
using Entry = unsigned long long;
constexpr Entry kNoEntry = ~0ull;
constexpr int kEntriesPerCodeword = 2;

// The share of element d in a codeword's hash. Both zeros have the same.
__device__ __forceinline__ uint64_t hash_of(double element, int d) {
  return counter_random::random_bits(static_cast<uint64_t>(__double_as_longlong(element + 0.0)), d);
}

// Enters codeword j and returns the index that its entry had before, j if there was none.
__device__ __forceinline__ int64_t enter(Entry* table, int64_t entries, uint64_t hash, int64_t j) {
  const Entry own = (hash >> 32 << 32) | static_cast<Entry>(j);
  int64_t place = static_cast<int64_t>((hash & 0xffffffffu) * static_cast<uint64_t>(entries) >> 32);
  for (;;) {
    const Entry before = atomicCAS(table + place, kNoEntry, own);
    if (before == kNoEntry) return j;
    if ((before ^ own) >> 32 == 0) return static_cast<int64_t>(atomicMin(table + place, own) & 0xffffffffu);
    place = place + 1 == entries ? 0 : place + 1;
  }
}

// Gives the later of two equal codewords an infinite norm. A warp must call it, after the store of the norm of codeword
// j. Of the entries for equal codewords each finds an earlier one, or replaces one: only the lowest index remains.
template <class Layout>
__device__ __forceinline__ void exclude_later(const Matrix& codebook, int width, Entry* table, int64_t entries,
                                              uint64_t hash, int64_t j, float* norms) {
  const int lane = threadIdx.x % 32;
  int64_t other = j;
  if (lane == 0) {
    // The thread that finds this entry writes the norm after this one.
    __threadfence();
    other = enter(table, entries, hash, j);
  }
  other = __shfl_sync(~0u, other, 0);
  if (other == j) return;
  bool differs = false;
  for (int64_t d = lane; d < codebook.columns; d += 32) differs |= load(codebook, j, d) != load(codebook, other, d);
  if (__any_sync(~0u, differs) || lane != 0) return;
  __threadfence();
  atomicExch(norms + Layout::norm(j < other ? other : j, width), INFINITY);
}

}  // namespace unicode_fast::cuda
