// Self-attention within one clip, for short sequences. kernels_body.h includes this file once for each instruction set.

// Products of kRows rows with a matrix whose rows are padded to whole registers; element (i, k) of the rows lies at
// rows[i * row_stride + k * stride].
template <int kRows>
UNICODE_FAST_TARGET inline void multiply_some(const float* rows, int64_t row_stride, int64_t stride,
                                              const float* matrix, int64_t inner, int64_t columns, float* products,
                                              int64_t product_stride) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Floats sums[kRows] = {};
    for (int64_t k = 0; k < inner; ++k) {
      const Floats values = load<Floats>(matrix + k * padded(columns) + j);
      for (int row = 0; row < kRows; ++row) sums[row] += rows[row * row_stride + k * stride] * values;
    }
    for (int row = 0; row < kRows; ++row)
      store_some<float>(products + row * product_stride + j, sums[row], columns - j);
  }
}

UNICODE_FAST_TARGET inline void multiply(const float* rows, int64_t row_stride, int64_t stride, const float* matrix,
                                         int64_t number, int64_t inner, int64_t columns, float* products,
                                         int64_t product_stride) {
  int64_t row = 0;
  for (; row + 4 <= number; row += 4)
    multiply_some<4>(rows + row * row_stride, row_stride, stride, matrix, inner, columns,
                     products + row * product_stride, product_stride);
  for (; row < number; ++row)
    multiply_some<1>(rows + row * row_stride, row_stride, stride, matrix, inner, columns,
                     products + row * product_stride, product_stride);
}

// Copies a matrix with `stride` numbers from row to row, times a factor, to padded rows.
UNICODE_FAST_TARGET inline void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t columns,
                                          float factor, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const Floats values = load_some(from + i * stride + j, columns - j, 0.f) * factor;
      std::memcpy(to + i * padded(columns) + j, &values, sizeof(values));
    }
}

// The same of its transpose.
UNICODE_FAST_TARGET inline void transpose_rows(const float* from, int64_t stride, int64_t rows, int64_t columns,
                                               float factor, float* to) {
  std::fill(to, to + columns * padded(rows), 0.f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * padded(rows) + i] = from[i * stride + j] * factor;
}

// Scores of one query become probabilities; those of keys that are not valid, and of padding, 0.
UNICODE_FAST_TARGET inline void normalise(float* scores, const uint8_t* valid, int64_t length, int64_t columns) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < columns; ++j)
    if (j >= length || (valid != nullptr && !valid[j])) scores[j] = kLeast;
  Floats most = Floats{} + kLeast, sums = {};
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats x = load<Floats>(scores + j);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  if (largest == kLeast) largest = 0;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats x = exponential<float>(load<Floats>(scores + j) - largest);
    sums += x;
    std::memcpy(scores + j, &x, sizeof(x));
  }
  const float sum = sum_of_lanes<float>(sums), inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const Floats x = load<Floats>(scores + j) * inverse;
    std::memcpy(scores + j, &x, sizeof(x));
  }
}

// Weights of the values: probabilities, with dropout times their factors, in padded rows.
UNICODE_FAST_TARGET inline void weigh(const Attention& clip, int64_t head, const float* probabilities, float* weights) {
  const int64_t length = clip.length, columns = padded(length);
  for (int64_t i = 0; i < length; ++i)
    for (int64_t j = 0; j < length; ++j) {
      const int64_t place = (head * length + i) * length + j;
      weights[i * columns + j] = probabilities[place] * (clip.factors == nullptr ? 1 : clip.factors[place]);
    }
}

UNICODE_FAST_TARGET void attend(const Attention& clip, int64_t head, float* probabilities, float* mixed,
                                float* scratch) {
  const int64_t length = clip.length, width = clip.width, stride = 3 * clip.heads * width, columns = padded(length);
  const float* queries = clip.vectors + head * width;
  float *keys = scratch, *values = keys + width * columns, *scores = values + length * padded(width);
  transpose_rows(queries + clip.heads * width, stride, length, width, 1 / std::sqrt(static_cast<float>(width)), keys);
  copy_rows(queries + 2 * clip.heads * width, stride, length, width, 1, values);
  multiply(queries, stride, 1, keys, length, width, columns, scores, columns);
  for (int64_t i = 0; i < length; ++i) {
    normalise(scores + i * columns, clip.valid, length, columns);
    std::memcpy(probabilities + (head * length + i) * length, scores + i * columns, length * sizeof(float));
  }
  if (clip.factors != nullptr) weigh(clip, head, probabilities, scores);
  multiply(scores, columns, 1, values, length, length, width, mixed + head * width, clip.heads * width);
}

UNICODE_FAST_TARGET void attend_backward(const Attention& clip, int64_t head, const float* probabilities,
                                         const float* gradient, float* in_vectors, float* scratch) {
  const int64_t length = clip.length, width = clip.width, across = clip.heads * width, stride = 3 * across;
  const int64_t columns = padded(length), rows = length * padded(width);
  const float *queries = clip.vectors + head * width, *in_mixed = gradient + head * width;
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  float *values = scratch, *padded_rows = values + width * columns, *slopes = padded_rows + rows;
  float* weights = slopes + length * columns;
  float* in_queries = in_vectors + head * width;
  // Values.
  std::fill(weights, weights + length * columns, 0.f);
  weigh(clip, head, probabilities, weights);
  copy_rows(in_mixed, across, length, width, 1, padded_rows);
  multiply(weights, 1, columns, padded_rows, length, length, width, in_queries + 2 * across, stride);
  // Scores.
  transpose_rows(queries + 2 * across, stride, length, width, 1, values);
  multiply(in_mixed, across, 1, values, length, width, columns, slopes, columns);
  for (int64_t i = 0; i < length; ++i) {
    const int64_t place = (head * length + i) * length;
    float mean = 0;
    for (int64_t j = 0; j < length; ++j) mean += weights[i * columns + j] * slopes[i * columns + j];
    for (int64_t j = 0; j < length; ++j) {
      const float factor = clip.factors == nullptr ? 1 : clip.factors[place + j];
      slopes[i * columns + j] = probabilities[place + j] * (slopes[i * columns + j] * factor - mean);
    }
  }
  // Queries and keys.
  copy_rows(queries + across, stride, length, width, scale, padded_rows);
  multiply(slopes, columns, 1, padded_rows, length, length, width, in_queries, stride);
  copy_rows(queries, stride, length, width, scale, padded_rows);
  multiply(slopes, 1, columns, padded_rows, length, length, width, in_queries + across, stride);
}
