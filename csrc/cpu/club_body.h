// Perceptrons of CLUB networks, for rows that fit into the caches. kernels_body.h includes this file once for each
// instruction set.

// Element (i, k) of the first factor of a product lies at numbers[i * row_stride + k * stride].
struct Factor {
  const float* numbers;
  int64_t row_stride, stride;
};

// Where a product goes, plus a bias (columns) unless it is null.
struct Target {
  float* numbers;
  int64_t stride, columns;
  Onto onto;
  const float* bias;
};

UNICODE_FAST_TARGET inline void put(const Target& target, int64_t i, int64_t j, Floats value) {
  float* to = target.numbers + i * target.stride + j;
  if (target.bias != nullptr) value += load_some(target.bias + j, target.columns - j, 0.f);
  if (target.onto == Onto::kRectify) value = value <= 0 ? Floats{} : value;
  if (target.onto == Onto::kAdd) value += load<Floats>(to);
  if (target.onto == Onto::kMask) value = load<Floats>(to) <= 0 ? Floats{} : value;
  std::memcpy(to, &value, sizeof(value));
}

// kRows rows and kWide registers of columns, from row i and column j on.
template <int kRows, int kWide>
UNICODE_FAST_TARGET inline void product_block(const Factor& left, const float* right, int64_t right_stride,
                                              int64_t inner, const Target& target, int64_t i, int64_t j) {
  Floats sums[kRows][kWide] = {};
  const float* rows = left.numbers + i * left.row_stride;
  for (int64_t k = 0; k < inner; ++k) {
    Floats values[kWide];
    for (int n = 0; n < kWide; ++n) values[n] = load<Floats>(right + k * right_stride + j + n * kLanes);
    for (int row = 0; row < kRows; ++row) {
      const float x = rows[row * left.row_stride + k * left.stride];
      for (int n = 0; n < kWide; ++n) sums[row][n] += x * values[n];
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int n = 0; n < kWide; ++n) put(target, i + row, j + n * kLanes, sums[row][n]);
}

template <int kWide>
UNICODE_FAST_TARGET inline void product_columns(const Factor& left, const float* right, int64_t right_stride,
                                                int64_t rows, int64_t inner, const Target& target, int64_t j) {
  int64_t i = 0;
  for (; i + kGroup <= rows; i += kGroup) product_block<kGroup, kWide>(left, right, right_stride, inner, target, i, j);
  for (; i + 2 <= rows; i += 2) product_block<2, kWide>(left, right, right_stride, inner, target, i, j);
  if (i < rows) product_block<1, kWide>(left, right, right_stride, inner, target, i, j);
}

// The product of (rows, inner) and (inner, columns); the second factor and the product have padded columns.
UNICODE_FAST_TARGET inline void product(const Factor& left, const float* right, int64_t rows, int64_t inner,
                                        const Target& target) {
  const int64_t stride = padded(target.columns);
  int64_t j = 0;
  for (; j + (kVectors - 1) * kLanes < target.columns; j += kVectors * kLanes)
    product_columns<kVectors>(left, right, stride, rows, inner, target, j);
  for (; j < target.columns; j += kLanes) product_columns<1>(left, right, stride, rows, inner, target, j);
}

UNICODE_FAST_TARGET void dense(const Dense& layer, const float* inputs, int64_t rows, Onto onto, float* results) {
  product({inputs, padded(layer.inputs), 1}, layer.transposed, rows, layer.inputs,
          {results, padded(layer.outputs), layer.outputs, onto, layer.bias});
}

UNICODE_FAST_TARGET void dense_parameters(const Dense& layer, const float* inputs, const float* gradient, int64_t rows,
                                          float* in_weight, float* in_bias) {
  const int64_t stride = padded(layer.outputs);
  product({gradient, 1, stride}, inputs, layer.outputs, rows,
          {in_weight, padded(layer.inputs), layer.inputs, Onto::kAdd, nullptr});
  for (int64_t j = 0; j < layer.outputs; j += kLanes) {
    Floats sum = load<Floats>(in_bias + j);
    for (int64_t i = 0; i < rows; ++i) sum += load<Floats>(gradient + i * stride + j);
    std::memcpy(in_bias + j, &sum, sizeof(sum));
  }
}

UNICODE_FAST_TARGET void dense_inputs(const Dense& layer, const float* gradient, int64_t rows, Onto onto,
                                      float* in_inputs) {
  product({gradient, padded(layer.outputs), 1}, layer.weight, rows, layer.outputs,
          {in_inputs, padded(layer.inputs), layer.inputs, onto, nullptr});
}

// tanh(x): near 0 the series of Cephes' tanhf.
UNICODE_FAST_TARGET inline Floats hyperbolic_tangent(const Floats& x) {
  constexpr float kSeries[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                               -3.33332819422e-1f};
  const Floats size = x < 0 ? -x : x, below = exponential<float>(-2 * size), square = x * x;
  const Floats far = (1 - below) / (1 + below);
  Floats sum = {};
  for (const float term : kSeries) sum = sum * square + term;
  return size < 0.625f ? x + x * square * sum : x < 0 ? -far : far;
}

UNICODE_FAST_TARGET void club_likelihood(const ClubRows& batch) {
  for (int64_t i = 0; i < batch.rows; ++i) {
    const float* specific = batch.specific + batch.places[i] * batch.width;
    float *means = batch.mean + i * padded(batch.width), *logarithms = batch.log_variance + i * padded(batch.width);
    for (int64_t j = 0; j < batch.width; j += kLanes) {
      const Floats logarithm = hyperbolic_tangent(load<Floats>(logarithms + j));
      const Floats error = load<Floats>(means + j) - load_some(specific + j, batch.width - j, 0.f);
      const Floats in_mean = batch.share * error * exponential<float>(-logarithm);
      const Floats in_logarithm = (batch.share - in_mean * error) / 2 * (1 - logarithm * logarithm);
      std::memcpy(means + j, &in_mean, sizeof(in_mean));
      std::memcpy(logarithms + j, &in_logarithm, sizeof(in_logarithm));
    }
  }
}

UNICODE_FAST_TARGET inline void add_to(float* to, const Floats& values) {
  const Floats sum = load<Floats>(to) + values;
  std::memcpy(to, &sum, sizeof(sum));
}

UNICODE_FAST_TARGET double club_estimate(const ClubRows& batch, const ClubMoments& moments) {
  double total = 0;
  for (int64_t i = 0; i < batch.rows; ++i) {
    const int64_t place = batch.places[i] * batch.width;
    float *means = batch.mean + i * padded(batch.width), *logarithms = batch.log_variance + i * padded(batch.width);
    Floats sum = {};
    for (int64_t j = 0; j < batch.width; j += kLanes) {
      const int64_t count = batch.width - j;
      const Floats centre = load<Floats>(moments.centre + j), mean = load<Floats>(means + j);
      const Floats specific = load_some(batch.specific + place + j, count, 0.f);
      const Floats logarithm = hyperbolic_tangent(load<Floats>(logarithms + j));
      const Floats precision = exponential<float>(-logarithm), from_mean = specific - mean;
      const Floats from_centre = mean - centre;
      const Floats gap = from_centre * from_centre + load<Floats>(moments.spread + j) - from_mean * from_mean;
      const Floats term = gap * precision / 2;
      sum += term;
      if (moments.in_specific == nullptr) continue;
      const Floats in_mean = batch.share * precision * (specific - centre);
      const Floats in_logarithm = batch.share * term * (logarithm * logarithm - 1);
      std::memcpy(means + j, &in_mean, sizeof(in_mean));
      std::memcpy(logarithms + j, &in_logarithm, sizeof(in_logarithm));
      store_some<float>(moments.in_specific + place + j, -batch.share * precision * from_mean, count);
      add_to(moments.precisions + j, precision);
      add_to(moments.differences + j, from_centre * precision);
    }
    total += sum_of_lanes<float>(sum);
  }
  return total * batch.share;
}
