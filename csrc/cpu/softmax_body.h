// Exponentials, and the loops of cross_info_nce over scores. kernels_body.h includes this file once for each
// instruction set.

// A register of numbers, and what their exponential needs: bits of the mantissa; 1.5 times the first number without a
// fraction; a number whose exponential is normal; log 2 as a sum, whose first part has so few bits that its product
// with an exponent is exact; the series of exp from its last term above the unit roundoff on. Half a number's bits,
// taken from kRoot, are those of the inverse of its square root to some percent.
template <typename T>
struct Register;

template <>
struct Register<float> {
  using Values = Floats;
  using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kRoot = 0x5f375a86;
  static constexpr float kRound = 0x1.8p23f, kLowest = -87, kHigh = 0x1.63p-1f, kLow = -2.12194440e-4f;
  static constexpr float kSeries[] = {1 / 5040.f, 1 / 720.f, 1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1, 1};
};

template <>
struct Register<double> {
  using Values = double __attribute__((vector_size(4 * kLanes)));
  using Bits = uint64_t __attribute__((vector_size(4 * kLanes)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kRoot = 0x5fe6eb50c7b537a9;
  static constexpr double kRound = 0x1.8p52, kLowest = -708, kHigh = 0x1.62e42feep-1, kLow = 1.90821492927058770002e-10;
  static constexpr double kSeries[] = {
      1 / 6227020800., 1 / 479001600., 1 / 39916800., 1 / 3628800., 1 / 362880., 1 / 40320., 1 / 5040.,
      1 / 720.,        1 / 120.,       1 / 24.,       1 / 6.,       1 / 2.,      1,          1};
};

template <typename T>
using Values = typename Register<T>::Values;

template <typename T>
constexpr int64_t kNumbers = sizeof(Values<T>) / sizeof(T);

// `count` numbers, but at most a register; `filler` in the others.
template <typename T>
UNICODE_FAST_TARGET inline Values<T> load_some(const T* from, int64_t count, T filler) {
  if (count >= kNumbers<T>) return load<Values<T>>(from);
  Values<T> values = Values<T>{} + filler;
  std::memcpy(&values, from, count * sizeof(T));
  return values;
}

template <typename T>
UNICODE_FAST_TARGET inline void store_some(T* to, const Values<T>& values, int64_t count) {
  if (count >= kNumbers<T>) {
    std::memcpy(to, &values, sizeof(values));
  } else {
    std::memcpy(to, &values, count * sizeof(T));
  }
}

template <typename T>
UNICODE_FAST_TARGET inline T sum_of_lanes(const Values<T>& values) {
  T sum = 0;
  for (int64_t lane = 0; lane < kNumbers<T>; ++lane) sum += values[lane];
  return sum;
}

// exp(x) for x that is not far above 0; 0 where that is no normal number; NaN for NaN.
template <typename T>
UNICODE_FAST_TARGET inline Values<T> exponential(const Values<T>& x) {
  using R = Register<T>;
  // x = k log 2 + rest, |rest| at most log(2) / 2. The lowest bits of k + kRound are those of the integer k.
  const Values<T> shifted = x * static_cast<T>(1.4426950408889634074) + R::kRound, k = shifted - R::kRound;
  const Values<T> rest = (x - k * R::kHigh) - k * R::kLow;
  Values<T> sum = {};
  for (const T term : R::kSeries) sum = sum * rest + term;
  typename R::Bits bits, exponent;
  std::memcpy(&bits, &sum, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << R::kMantissa;
  std::memcpy(&sum, &bits, sizeof(sum));
  return x >= R::kLowest ? sum : x < R::kLowest ? Values<T>{} : x;
}

// exp(x - most); 1 where both are the same infinity.
template <typename T>
UNICODE_FAST_TARGET inline Values<T> exponential_below(const Values<T>& x, const Values<T>& most) {
  return exponential<T>(x == most ? Values<T>{} : x - most);
}

template <typename T>
UNICODE_FAST_TARGET Softmax<T> softmax(const T* scores, int64_t number, int64_t own) {
  constexpr T kLeast = -std::numeric_limits<T>::infinity();
  constexpr int64_t step = kNumbers<T>;
  Values<T> most = Values<T>{} + kLeast, sums = {};
  for (int64_t j = 0; j < number; j += step) {
    const Values<T> x = load_some(scores + j, number - j, kLeast);
    most = x > most ? x : most;
  }
  Softmax<T> found{most[0], 0, scores[own], false};
  for (int64_t lane = 1; lane < step; ++lane) found.largest = std::max<T>(found.largest, most[lane]);
  for (int64_t j = 0; j < number; j += step)
    sums += exponential<T>(load_some(scores + j, number - j, kLeast) - found.largest);
  for (int64_t lane = 0; lane < step; ++lane) found.sum += sums[lane];
  // In argmax NaN is larger than every number.
  const T* first =
      found.sum == found.sum ? scores + number : std::find_if(scores, scores + number, [](T x) { return x != x; });
  if (first == scores + number && found.own == found.largest) first = std::find(scores, scores + own, found.largest);
  found.hit = first == scores + own;
  return found;
}

template <typename T>
UNICODE_FAST_TARGET void add_to_columns(const T* scores, int64_t stride, int64_t rows, int64_t columns, T* largest,
                                        T* sums) {
  constexpr T kLeast = -std::numeric_limits<T>::infinity();
  for (int64_t j = 0; j < columns; j += kNumbers<T>) {
    const int64_t count = columns - j;
    const Values<T> before = load_some(largest + j, count, kLeast);
    Values<T> most = before;
    for (int64_t i = 0; i < rows; ++i) {
      const Values<T> x = load_some(scores + i * stride + j, count, kLeast);
      most = x > most ? x : most;
    }
    store_some<T>(largest + j, most, count);
    // Columns without a valid row so far keep a sum of 0.
    most = most == kLeast ? Values<T>{} : most;
    Values<T> sum = load_some(sums + j, count, T{0}) * exponential_below<T>(before, most);
    for (int64_t i = 0; i < rows; ++i)
      sum += exponential_below<T>(load_some(scores + i * stride + j, count, kLeast), most);
    store_some<T>(sums + j, sum, count);
  }
}

template <typename T>
UNICODE_FAST_TARGET void slopes(T* scores, int64_t number, T largest, T factor, const T* column_largest,
                                const T* column_factor) {
  for (int64_t j = 0; j < number; j += kNumbers<T>) {
    const int64_t count = number - j;
    const Values<T> x = load_some(scores + j, count, T{0});
    Values<T> slope = {};
    if (factor != 0) slope = exponential<T>(x - largest) * factor;
    if (column_factor != nullptr) {
      const Values<T> factors = load_some(column_factor + j, count, T{0});
      const Values<T> column = exponential<T>(x - load_some(column_largest + j, count, T{0})) * factors;
      slope += factors == 0 ? Values<T>{} : column;
    }
    store_some<T>(scores + j, slope, count);
  }
}

template <typename T>
struct Exponentials {
  T best, sum;
};

// exp((score - best) * factor), at most 1, of the scores; their best, the largest for a positive factor, and the sum.
template <typename T>
UNICODE_FAST_TARGET inline Exponentials<T> exponentials(const T* scores, int64_t number, T factor, T* to) {
  constexpr T kLeast = -std::numeric_limits<T>::infinity();
  const T sign = factor < 0 ? -1 : 1, filler = sign * kLeast;
  Values<T> most = Values<T>{} + kLeast, sums = {};
  for (int64_t j = 0; j < number; j += kNumbers<T>) {
    const Values<T> x = sign * load_some(scores + j, number - j, filler);
    most = x > most ? x : most;
  }
  T largest = most[0];
  for (int64_t lane = 1; lane < kNumbers<T>; ++lane) largest = std::max<T>(largest, most[lane]);
  const T best = sign * largest;
  for (int64_t j = 0; j < number; j += kNumbers<T>) {
    const Values<T> x = exponential<T>((load_some(scores + j, number - j, filler) - best) * factor);
    sums += x;
    store_some<T>(to + j, x, number - j);
  }
  return {best, sum_of_lanes<T>(sums)};
}
