// Random numbers as a pure function of (seed, step, stream, position): SplitMix64, bit for bit as
// unicode_fast/reference/counter_random.py.
#pragma once

#include <cstdint>

namespace unicode_fast::cpu {

constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15u;

constexpr uint64_t mix(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
  return bits ^ (bits >> 31);
}

constexpr uint64_t stream_key(int64_t seed, int64_t step, int64_t stream) {
  uint64_t key = mix(static_cast<uint64_t>(seed) + kIncrement);
  key = mix(key + static_cast<uint64_t>(step) + kIncrement);
  return mix(key + static_cast<uint64_t>(stream) + kIncrement);
}

constexpr uint64_t random_bits(uint64_t key, int64_t position) {
  return mix(key + (static_cast<uint64_t>(position) + 1) * kIncrement);
}

// In [0, 1), a multiple of 2^-53.
constexpr double uniform(uint64_t key, int64_t position) {
  return static_cast<double>(random_bits(key, position) >> 11) * 0x1p-53;
}

}  // namespace unicode_fast::cpu
