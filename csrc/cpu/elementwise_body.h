// ReLU with the factors of dropout, and squared errors. kernels_body.h includes this file once for each instruction
// set.

// Selects of vectors have no branches, which random signs would mislead.
UNICODE_FAST_TARGET void rectify(const float* values, const float* factors, int64_t count, float* result) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const Floats value = load_some(values + n, count - n, 0.f), factor = load_some(factors + n, count - n, 0.f);
    store_some<float>(result + n, value <= 0 ? Floats{} : value * factor, count - n);
  }
}

UNICODE_FAST_TARGET void rectify_backward(const float* result, const float* gradient, float factor, int64_t count,
                                          float* in_values) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const Floats given = load_some(gradient + n, count - n, 0.f);
    const Floats own = load_some(result + n, count - n, 0.f);
    store_some<float>(in_values + n, own <= 0 ? Floats{} : given * factor, count - n);
  }
}

UNICODE_FAST_TARGET float squared_distance(const float* first, const float* second, int64_t count) {
  Floats sums = {};
  for (int64_t n = 0; n < count; n += kLanes) {
    const Floats error = load_some(first + n, count - n, 0.f) - load_some(second + n, count - n, 0.f);
    sums += error * error;
  }
  return sum_of_lanes<float>(sums);
}

UNICODE_FAST_TARGET void scaled_difference(const float* first, const float* second, float factor, int64_t count,
                                           float* result) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const Floats error = load_some(first + n, count - n, 0.f) - load_some(second + n, count - n, 0.f);
    store_some<float>(result + n, error * factor, count - n);
  }
}
