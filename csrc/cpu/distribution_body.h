// The loops of codeword_distribution. kernels_body.h includes this file once for each instruction set.

template <typename T>
UNICODE_FAST_TARGET T centre(const T* row, const T* middle, int64_t width, T* centred) {
  Values<T> squares = {};
  for (int64_t d = 0; d < width; d += kNumbers<T>) {
    const Values<T> x = load_some(row + d, width - d, T{0}) - load_some(middle + d, width - d, T{0});
    squares += x * x;
    store_some<T>(centred + d, x, width - d);
  }
  return sum_of_lanes<T>(squares);
}

// The square root of numbers that are normal, infinite or NaN, but not below 0. Newton's steps for its inverse start
// from half the exponent; the last step is one of the root itself.
template <typename T>
UNICODE_FAST_TARGET inline Values<T> root(const Values<T>& x) {
  typename Register<T>::Bits bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = Register<T>::kRoot - (bits >> 1);
  Values<T> inverse;
  std::memcpy(&inverse, &bits, sizeof(inverse));
  for (int step = 0; step < (std::is_same_v<T, float> ? 2 : 3); ++step)
    inverse *= static_cast<T>(1.5) - x * static_cast<T>(0.5) * inverse * inverse;
  Values<T> result = x * inverse;
  result += inverse * static_cast<T>(0.5) * (x - result * result);
  return x <= std::numeric_limits<T>::max() ? result : x;
}

template <typename T>
UNICODE_FAST_TARGET void distances_of(T* products, int64_t codewords, const T* norms, T norm) {
  constexpr T kLeast = static_cast<T>(kSmallestSquaredDistance);
  for (int64_t j = 0; j < codewords; j += kNumbers<T>) {
    const int64_t count = codewords - j;
    const Values<T> both = load_some(norms + j, count, T{0}) - 2 * load_some(products + j, count, T{0}) + norm;
    store_some<T>(products + j, root<T>(both < kLeast ? Values<T>{} + kLeast : both), count);  // NaN stays
  }
}

template <typename T>
UNICODE_FAST_TARGET void mix(T* scores, int64_t number, T factor, T weight, T* sums) {
  const T share = weight / exponentials(scores, number, factor, scores).sum;
  for (int64_t j = 0; j < number; j += kNumbers<T>) {
    const Values<T> x = load_some(scores + j, number - j, T{0});
    store_some<T>(sums + j, load_some(sums + j, number - j, T{0}) + share * x, number - j);
  }
}

template <typename T>
UNICODE_FAST_TARGET T distance_slopes(T* distances, int64_t codewords, T factor, T weight, const T* gradient,
                                      T* scratch) {
  const T inverse = 1 / exponentials(distances, codewords, factor, scratch).sum;
  Values<T> sums = {};
  for (int64_t j = 0; j < codewords; j += kNumbers<T>)
    sums += load_some(scratch + j, codewords - j, T{0}) * load_some(gradient + j, codewords - j, T{0});
  const T mean = sum_of_lanes<T>(sums) * inverse, share = -weight * factor * inverse;
  // At the smallest distance the slope counts as 0.
  const T least = root<T>(Values<T>{} + static_cast<T>(kSmallestSquaredDistance))[0];
  sums = Values<T>{};
  for (int64_t j = 0; j < codewords; j += kNumbers<T>) {
    const Values<T> distance = load_some(distances + j, codewords - j, T{1});
    Values<T> slope = load_some(scratch + j, codewords - j, T{0}) * share;
    slope *= (load_some(gradient + j, codewords - j, T{0}) - mean) / distance;
    slope = distance <= least ? Values<T>{} : slope;
    sums += slope;
    store_some<T>(distances + j, slope, codewords - j);
  }
  return sum_of_lanes<T>(sums);
}
