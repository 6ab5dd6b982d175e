// Numbers of the Mersenne Twister MT19937. kernels_body.h includes this file once for each instruction set.

UNICODE_FAST_TARGET inline uint32_t twisted(uint32_t high, uint32_t low) {
  return ((high & 0x80000000) | (low & 0x7fffffff)) >> 1 ^ (low & 1) * 0x9908b0df;
}

// The next state of the generator.
UNICODE_FAST_TARGET void twist(uint32_t* state) {
  constexpr int kLength = 624, kShift = 397;
  for (int n = 0; n < kLength - kShift; ++n) state[n] = state[n + kShift] ^ twisted(state[n], state[n + 1]);
  for (int n = kLength - kShift; n < kLength - 1; ++n)
    state[n] = state[n + kShift - kLength] ^ twisted(state[n], state[n + 1]);
  state[kLength - 1] = state[kShift - 1] ^ twisted(state[kLength - 1], state[0]);
}

// The generator's next numbers, from those of its state.
UNICODE_FAST_TARGET void temper(const uint32_t* state, int64_t count, uint32_t* numbers) {
  for (int64_t n = 0; n < count; ++n) {
    uint32_t number = state[n];
    number ^= number >> 11;
    number ^= number << 7 & 0x9d2c5680;
    number ^= number << 15 & 0xefc60000;
    numbers[n] = number ^ number >> 18;
  }
}

UNICODE_FAST_TARGET void draw_factors(const uint32_t* numbers, int64_t count, uint64_t threshold, float factor,
                                      float* factors) {
  const auto high = static_cast<uint32_t>(threshold >> 32), low = static_cast<uint32_t>(threshold);
  for (int64_t n = 0; n < count; ++n) {
    const uint32_t above = numbers[2 * n] & 0x1fffff;
    factors[n] = (above < high) | ((above == high) & (numbers[2 * n + 1] < low)) ? factor : 0.f;
  }
}
