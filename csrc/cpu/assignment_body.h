// The loops of the assignment loss over rows of scores. kernels_body.h includes this file once for each instruction
// set.

UNICODE_FAST_TARGET void balance_rows(const float* from, float factor, const float* shifts, const float* weights,
                                      int64_t rows, int64_t columns, bool last, float* to, float* sums,
                                      float* scratch) {
  for (int64_t i = 0; i < rows; ++i, from += columns, to += columns) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t count = columns - j;
      const Floats x = load_some(from + j, count, 0.f) * factor + load_some(shifts + j, count, 0.f);
      store_some<float>(to + j, x, count);
    }
    const auto [best, sum] = exponentials(to, columns, 1.f, scratch);
    // As in torch, a row with an infinite score is NaN at last, and before only at this score.
    const bool infinite = best == std::numeric_limits<float>::infinity();
    const float inverse = infinite && !last ? 1 : 1 / sum, logsumexp = infinite ? best : best + std::log(sum);
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t count = columns - j;
      const Floats probability = load_some(scratch + j, count, 0.f) * inverse;
      store_some<float>(to + j, last ? probability : load_some(to + j, count, 0.f) - logsumexp, count);
      if (!last) store_some<float>(sums + j, load_some(sums + j, count, 0.f) + weights[i] * probability, count);
    }
  }
}

UNICODE_FAST_TARGET inline void scale(float* numbers, int64_t number, float factor) {
  for (int64_t j = 0; j < number; j += kLanes)
    store_some<float>(numbers + j, load_some(numbers + j, number - j, 0.f) * factor, number - j);
}

UNICODE_FAST_TARGET float cross_entropy(const float* scores, const float* target, int64_t number, float* softmax) {
  const auto [best, sum] = exponentials(scores, number, 1.f, softmax);
  const float logarithm = std::log(sum);
  Floats terms = {};
  for (int64_t j = 0; j < number; j += kLanes) {
    const int64_t count = number - j;
    terms += load_some(target + j, count, 0.f) * (load_some(scores + j, count, best) - best - logarithm);
  }
  scale(softmax, number, 1 / sum);
  return -sum_of_lanes<float>(terms);
}

UNICODE_FAST_TARGET void cross_entropy_slopes(const float* softmax, const float* target, int64_t number, float gradient,
                                              float* to) {
  Floats total = {};
  for (int64_t j = 0; j < number; j += kLanes) total += load_some(target + j, number - j, 0.f);
  const float sum = sum_of_lanes<float>(total);
  for (int64_t j = 0; j < number; j += kLanes) {
    const int64_t count = number - j;
    const Floats slope = load_some(softmax + j, count, 0.f) * sum - load_some(target + j, count, 0.f);
    store_some<float>(to + j, slope * gradient, count);
  }
}

UNICODE_FAST_TARGET void hold(const float* scores, int64_t number, float* softmax, float* held, float* missing) {
  scale(softmax, number, 1 / exponentials(scores, number, 1.f, softmax).sum);
  for (int64_t j = 0; j < number; j += kLanes) {
    const int64_t count = number - j;
    Floats p = load_some(softmax + j, count, 0.f);
    p = p > kMostPresent ? Floats{} + kMostPresent : p;  // NaN stays
    const Floats before = load_some(held + j, count, 0.f);
    store_some<float>(held + j, before + p * (1 - before), count);
    store_some<float>(missing + j, load_some(missing + j, count, 0.f) * (1 - p), count);
  }
}

UNICODE_FAST_TARGET void presence_slopes(const float* softmax, const float* gradient, int64_t number, float* to) {
  Floats total = {};
  for (int64_t j = 0; j < number; j += kLanes) {
    const int64_t count = number - j;
    const Floats p = load_some(softmax + j, count, 0.f);
    Floats slope = -load_some(gradient + j, count, 0.f) / (1 - p);
    slope = p > kMostPresent ? Floats{} : slope;
    total += p * slope;
    store_some<float>(to + j, slope, count);
  }
  const float mean = sum_of_lanes<float>(total);
  for (int64_t j = 0; j < number; j += kLanes) {
    const int64_t count = number - j;
    store_some<float>(to + j, load_some(softmax + j, count, 0.f) * (load_some(to + j, count, 0.f) - mean), count);
  }
}
