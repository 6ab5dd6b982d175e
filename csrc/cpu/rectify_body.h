// ReLU with the factors of dropout. kernels_body.h includes this file once for each instruction set. Selects of vectors
// have no branches, which random signs would mislead.

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
