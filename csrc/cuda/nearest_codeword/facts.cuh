// What a search knows about its whole codebook.
#pragma once

#include "candidates.h"

namespace unicode_fast::cuda {

// Bits of non-negative float32 numbers grow with the numbers, so atomicMax on them finds the largest in any order.
struct CodebookFacts {
  unsigned squared, rounded, residual, radius;  // CodebookNorms
  int exponent;                                 // of the scale
  int linked, arrived;                          // links of clusters, and blocks that have written theirs
  int members;                                  // of all clusters
};

__device__ __forceinline__ CodebookNorms norms_of(const CodebookFacts& facts) {
  return {__uint_as_float(facts.squared), __uint_as_float(facts.rounded), __uint_as_float(facts.residual),
          __uint_as_float(facts.radius)};
}

}  // namespace unicode_fast::cuda
