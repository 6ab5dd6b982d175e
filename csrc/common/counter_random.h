// The counter-based generator of unicode_fast/reference/counter_random.py, bit for bit.
#pragma once

#include "portable.h"

namespace unicode_fast::counter_random {

constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15u;

// The finishing function of SplitMix64.
UNICODE_FAST_BOTH uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

UNICODE_FAST_BOTH uint64_t key(int64_t seed, int64_t step, int64_t stream) {
  uint64_t bits = mix(static_cast<uint64_t>(seed) + kIncrement);
  bits = mix(bits + static_cast<uint64_t>(step) + kIncrement);
  return mix(bits + static_cast<uint64_t>(stream) + kIncrement);
}

UNICODE_FAST_BOTH uint64_t random_bits(uint64_t key, int64_t position) {
  return mix(key + (static_cast<uint64_t>(position) + 1) * kIncrement);
}

// In [0, 1), a multiple of 2^-53.
UNICODE_FAST_BOTH double uniform(uint64_t key, int64_t position) {
  return static_cast<double>(static_cast<int64_t>(random_bits(key, position) >> 11)) * 0x1p-53;
}

// In [0, bound).
UNICODE_FAST_BOTH int64_t integer(uint64_t key, int64_t position, int64_t bound) {
  return static_cast<int64_t>((random_bits(key, position) >> 1) % static_cast<uint64_t>(bound));
}

// The place in [0, number) that a draw from [0, 1) picks; draws outside pick the first or the last, NaN the first.
UNICODE_FAST_BOTH int64_t place(double draw, int64_t number) {
  const double scaled = draw * static_cast<double>(number);
  if (!(scaled >= 1)) return 0;
  return scaled < static_cast<double>(number) ? static_cast<int64_t>(scaled) : number - 1;
}

}  // namespace unicode_fast::counter_random
