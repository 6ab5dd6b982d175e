// The loops themselves. kernels.cpp includes this file once for each instruction set, in a namespace of its own. So it
// has no include guard. It needs definitions of UNICODE_FAST_TARGET (the attribute of the instruction set),
// UNICODE_FAST_LANES (floats in a vector) and UNICODE_FAST_VECTORS (vectors of codewords scored at once). With
// UNICODE_FAST_BFLOAT16 1, operands are pairs of bfloat16.

constexpr int kLanes = UNICODE_FAST_LANES, kVectors = UNICODE_FAST_VECTORS;
constexpr int kPanel = kLanes * kVectors;
// Rows that share the codewords in registers.
constexpr int kGroup = 6;
// Candidates kept for a row before it is compared directly with every codeword.
constexpr int kCandidates = 24;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
// Sums of squares in float64 have 8 partial sums on every machine.
using Eight = double __attribute__((vector_size(64)));
using EightFloats = float __attribute__((vector_size(32)));

template <typename V, typename T>
UNICODE_FAST_TARGET inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

UNICODE_FAST_TARGET inline Eight load_double(const double* from) { return load<Eight>(from); }
UNICODE_FAST_TARGET inline Eight load_double(const float* from) {
  return __builtin_convertvector(load<EightFloats>(from), Eight);
}

UNICODE_FAST_TARGET inline double sum_of(const Eight& value) {
  return ((value[0] + value[4]) + (value[2] + value[6])) + ((value[1] + value[5]) + (value[3] + value[7]));
}

template <typename X, typename C>
UNICODE_FAST_TARGET inline double squared_distance(const X* x, const C* c, int64_t width) {
  Eight first = {}, second = {};
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) {
    const Eight a = load_double(x + d) - load_double(c + d), b = load_double(x + d + 8) - load_double(c + d + 8);
    first += a * a;
    second += b * b;
  }
  double rest = 0;
  for (; d < width; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(c[d]);
    rest += difference * difference;
  }
  return sum_of(first + second) + rest;
}

// The key of argmin: NaN is larger than everything, an overflow larger than everything except NaN.
UNICODE_FAST_TARGET inline double order_key(double distance) {
  if (distance != distance) return std::numeric_limits<double>::infinity();
  return std::min(distance, std::numeric_limits<double>::max());
}

template <typename X, typename C>
UNICODE_FAST_TARGET inline void compare_all(const X* x, const C* codebook, int64_t codewords, int64_t width,
                                            int64_t& index, double& distance) {
  double smallest = std::numeric_limits<double>::infinity();
  index = 0;
  for (int64_t j = 0; j < codewords; ++j) {
    const double key = order_key(squared_distance(x, codebook + j * width, width));
    if (key < smallest) smallest = key, index = j;
  }
  distance = squared_distance(x, codebook + index * width, width);
}

template <typename C>
UNICODE_FAST_TARGET void direct(const C* codebook, int64_t codewords, int64_t width, Rows<double> rows, int64_t count,
                                int64_t* index, double* distance) {
  for (int64_t i = 0; i < count; ++i)
    compare_all(rows.data + i * rows.stride, codebook, codewords, width, index[i], distance[i]);
}

#if UNICODE_FAST_BFLOAT16
constexpr int kPair = 2;
using Operand = uint16_t;

// The nearest bfloat16, ties to even. A number too small for a normal bfloat16 becomes zero, as in the processor.
UNICODE_FAST_TARGET inline uint16_t round_operand(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000u) == 0) return 0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

UNICODE_FAST_TARGET inline float value_of(uint16_t operand) {
  const uint32_t bits = static_cast<uint32_t>(operand) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
#else
constexpr int kPair = 1;
using Operand = float;
UNICODE_FAST_TARGET inline float round_operand(float value) { return value; }
UNICODE_FAST_TARGET inline float value_of(float operand) { return operand; }
#endif

// Bits of the lanes that are at most `limit`.
UNICODE_FAST_TARGET inline uint32_t at_most(const Floats& value, float limit) {
#if UNICODE_FAST_LANES == 16
  return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(limit), _CMP_LE_OQ);
#elif UNICODE_FAST_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_set1_ps(limit), _CMP_LE_OQ));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(value[lane] <= limit) << lane;
  return bits;
#endif
}

UNICODE_FAST_TARGET inline Floats smaller(const Floats& a, const Floats& b) { return a < b ? a : b; }

// Scores of kGroup rows and the kPanel codewords of a panel: norm plus product with the rows, which hold -2 x.
UNICODE_FAST_TARGET inline void score(const uint32_t* rows, int64_t row_stride, const uint32_t* operands,
                                      const float* norms, int64_t depth, Floats (&scores)[kGroup][kVectors]) {
  Floats sum[kGroup][kVectors];
  for (int n = 0; n < kVectors; ++n) {
    const Floats norm = load<Floats>(norms + n * kLanes);
    for (int r = 0; r < kGroup; ++r) sum[r][n] = norm;
  }
  for (int64_t d = 0; d < depth; ++d) {
    Floats code[kVectors];
    for (int n = 0; n < kVectors; ++n) code[n] = load<Floats>(operands + (d * kVectors + n) * kLanes);
    for (int r = 0; r < kGroup; ++r) {
#if UNICODE_FAST_BFLOAT16
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(rows[r * row_stride + d]));
      for (int n = 0; n < kVectors; ++n)
        sum[r][n] = (Floats)_mm512_dpbf16_ps((__m512)sum[r][n], (__m512bh)code[n], pair);
#else
      float element;
      std::memcpy(&element, rows + r * row_stride + d, 4);
      for (int n = 0; n < kVectors; ++n) sum[r][n] += element * code[n];
#endif
    }
  }
  for (int r = 0; r < kGroup; ++r)
    for (int n = 0; n < kVectors; ++n) scores[r][n] = sum[r][n];
}

UNICODE_FAST_TARGET void prepare(PreparedCodebook& codes, const double* codebook, int64_t first, int64_t last,
                                 LargestNorms& largest) {
  const int64_t width = codes.width, depth = (width + kPair - 1) / kPair;
  std::vector<Operand> operands(width);
  for (int64_t j = first * kPanel; j < std::min(last * kPanel, codes.codewords); ++j) {
    double squared[kLanes] = {}, rounded[kLanes] = {}, residual[kLanes] = {};
    const auto round = [&](int64_t d, int lane) UNICODE_FAST_TARGET {
      const double centred = (codebook[j * width + d] - codes.mean[d]) * codes.scale;
      operands[d] = round_operand(static_cast<float>(centred));
      const double kept = value_of(operands[d]);
      squared[lane] += centred * centred;
      rounded[lane] += kept * kept;
      residual[lane] += (centred - kept) * (centred - kept);
    };
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) round(d + lane, lane);
    for (; d < width; ++d) round(d, 0);
    for (int lane = 1; lane < kLanes; ++lane) {
      squared[0] += squared[lane];
      rounded[0] += rounded[lane];
      residual[0] += residual[lane];
    }
    codes.norms[j] = static_cast<float>(squared[0]);
    largest.squared = std::max(largest.squared, squared[0]);
    largest.rounded = std::max(largest.rounded, std::sqrt(rounded[0]));
    largest.residual = std::max(largest.residual, std::sqrt(residual[0]));
    Operand* panel = reinterpret_cast<Operand*>(codes.operands + (j / kPanel) * depth * kPanel + j % kPanel);
    for (d = 0; d < width; ++d) panel[(d / kPair) * kPanel * kPair + d % kPair] = operands[d];
  }
}

// The centred, scaled and rounded operands of a row, times -2, and twice the bound on the error of its scores.
UNICODE_FAST_TARGET inline float prepare_row(const PreparedCodebook& codes, const float* x, Operand* operands) {
  const int64_t width = codes.width;
  const float* mean = codes.mean;
  const float scale = static_cast<float>(-2 * codes.scale);
  float squared[kLanes] = {}, rounded[kLanes] = {}, residual[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float centred = (x[d + lane] - mean[d + lane]) * scale;
      operands[d + lane] = round_operand(centred);
      const float kept = value_of(operands[d + lane]);
      squared[lane] += centred * centred;
      rounded[lane] += kept * kept;
      residual[lane] += (centred - kept) * (centred - kept);
    }
  }
  for (; d < width; ++d) {
    const float centred = (x[d] - mean[d]) * scale;
    operands[d] = round_operand(centred);
    const float kept = value_of(operands[d]);
    squared[0] += centred * centred;
    rounded[0] += kept * kept;
    residual[0] += (centred - kept) * (centred - kept);
  }
  double sums[3] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    sums[0] += squared[lane];
    sums[1] += rounded[lane];
    sums[2] += residual[lane];
  }
  constexpr double kUnit = 1.0 / (1 << 23);
  const double inflate = 1 + (width + 16) * kUnit;
  const double norm = std::sqrt(sums[0]) * inflate, rounded_norm = std::sqrt(sums[1]) * inflate;
  const double residual_norm = std::sqrt(sums[2]) * inflate + kUnit * norm;
  const double error = kUnit * codes.largest.squared + residual_norm * codes.largest.rounded +
                       norm * codes.largest.residual +
                       (width + 16) * kUnit * (codes.largest.squared + rounded_norm * codes.largest.rounded) +
                       width * std::ldexp(1.0, -60);
  return static_cast<float>(2 * error * (1 + 1e-5));
}

struct Candidates {
  float smallest, margin, limit;
  int32_t count;  // -1: compare with every codeword
  int32_t index[kCandidates];
  float score[kCandidates];

  UNICODE_FAST_TARGET void start(float twice_the_error) {
    smallest = limit = std::numeric_limits<float>::infinity();
    margin = twice_the_error;
    // Beyond this limit scores could overflow. The comparison is false for NaN.
    count = twice_the_error < 1e30f ? 0 : -1;
    if (count < 0) limit = -std::numeric_limits<float>::infinity();
  }

  UNICODE_FAST_TARGET void lower(float score) {
    if (score >= smallest) return;
    smallest = score;
    const float sum = smallest + margin;
    limit = sum + std::abs(sum) * 1e-6f + std::numeric_limits<float>::min();
  }

  UNICODE_FAST_TARGET void add(int32_t codeword, float value) {
    if (count == kCandidates) forget();
    if (count == kCandidates) {
      count = -1;
      limit = -std::numeric_limits<float>::infinity();
    }
    if (count < 0) return;
    index[count] = codeword;
    score[count++] = value;
  }

  // Drops the candidates that a smaller score has ruled out.
  UNICODE_FAST_TARGET void forget() {
    int32_t kept = 0;
    for (int32_t n = 0; n < count; ++n) {
      if (score[n] > limit) continue;
      index[kept] = index[n];
      score[kept++] = score[n];
    }
    count = kept;
  }
};

template <typename C>
UNICODE_FAST_TARGET void search(const PreparedCodebook& codes, const C* codebook, Rows<float> rows, int64_t count,
                                int64_t* index, float* distance) {
  const int64_t width = codes.width, depth = (width + kPair - 1) / kPair;
  const int64_t groups = (count + kGroup - 1) / kGroup;
  std::vector<uint32_t> operands(codes.finite ? groups * kGroup * depth : 0, 0);
  std::vector<Candidates> candidates(count);
  for (int64_t i = 0; i < count && codes.finite; ++i) {
    Operand* mine = reinterpret_cast<Operand*>(operands.data() + i * depth);
    candidates[i].start(prepare_row(codes, rows.data + i * rows.stride, mine));
  }
  const int64_t panels = codes.finite ? (codes.codewords + kPanel - 1) / kPanel : 0;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t group = 0; group < groups; ++group) {
      Floats scores[kGroup][kVectors];
      score(operands.data() + group * kGroup * depth, depth, codes.operands + panel * depth * kPanel,
            codes.norms + panel * kPanel, depth, scores);
      for (int64_t r = 0; r < kGroup && group * kGroup + r < count; ++r) {
        Candidates& row = candidates[group * kGroup + r];
        Floats low = scores[r][0];
        for (int n = 1; n < kVectors; ++n) low = smaller(low, scores[r][n]);
        if (at_most(low, row.limit) == 0) continue;
        float least = low[0];
        for (int lane = 1; lane < kLanes; ++lane) least = std::min<float>(least, low[lane]);
        row.lower(least);
        for (int n = 0; n < kVectors; ++n) {
          for (uint32_t bits = at_most(scores[r][n], row.limit); bits != 0; bits &= bits - 1) {
            const int lane = __builtin_ctz(bits);
            row.add(static_cast<int32_t>(panel * kPanel + n * kLanes + lane), scores[r][n][lane]);
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float* x = rows.data + i * rows.stride;
    Candidates& row = candidates[i];
    double smallest = std::numeric_limits<double>::infinity();
    if (codes.finite && row.count >= 0) {
      row.forget();
      for (int32_t n = 0; n < row.count; ++n) {
        if (row.index[n] >= codes.codewords) continue;  // only where operands are not those of the codebook
        const double found = squared_distance(x, codebook + row.index[n] * width, width);
        if (found < smallest) smallest = found, index[i] = row.index[n];
      }
    }
    if (smallest == std::numeric_limits<double>::infinity())
      compare_all(x, codebook, codes.codewords, width, index[i], smallest);
    distance[i] = static_cast<float>(smallest);
  }
}

template <typename T>
UNICODE_FAST_TARGET void add_rows(const RowSums<T>& batch, int64_t first, int64_t last, double* sums) {
  const size_t modalities = batch.features.size();
  const int64_t width = batch.width, columns = last - first;
  const double own = batch.own_weight;
  const bool alone = own == 1 || (modalities == 1 && batch.partners.empty());
  std::vector<double> others(columns);
  for (size_t m = 0; m < modalities; ++m) {
    const double weight = batch.weight[m];
    for (int64_t i = 0; i < batch.rows[m]; ++i) {
      if (!batch.valid.empty() && !batch.valid[m][i]) continue;
      const T* x = batch.features[m] + i * width + first;
      double* sum = sums + batch.index[m][i] * width + first;
      double number = 0;
      if (!alone && batch.partners.empty()) {
        std::fill(others.begin(), others.end(), 0.0);
        for (size_t o = 0; o < modalities; ++o) {
          if (o == m || (!batch.valid.empty() && !batch.valid[o][i])) continue;
          const T* other = batch.features[o] + i * width + first;
          number += 1;
          for (int64_t d = 0; d < columns; ++d) others[d] += static_cast<double>(other[d]);
        }
      }
      if (!alone && !batch.partners.empty()) {
        const T* partner = batch.partners[m] + i * width + first;
        for (int64_t d = 0; d < columns; ++d)
          sum[d] += weight * (own * static_cast<double>(x[d]) + (1 - own) * static_cast<double>(partner[d]));
      } else if (number > 0) {
        const double share = (1 - own) / number;
        for (int64_t d = 0; d < columns; ++d) sum[d] += weight * (own * static_cast<double>(x[d]) + share * others[d]);
      } else {
        for (int64_t d = 0; d < columns; ++d) sum[d] += weight * static_cast<double>(x[d]);
      }
    }
  }
}

// Products are rounded before they are added, as in the reference. So gradients have the same bits, and training gives
// the same result on both.
template <typename T>
UNICODE_FAST_TARGET UNICODE_FAST_ROUND_PRODUCTS double commit(const Commitment<T>& batch, int64_t first, int64_t last,
                                                              T* direction) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  const int64_t width = batch.width;
  double total = 0;
  for (int64_t i = first; i < last; ++i) {
    const T* x = batch.features + i * width;
    T* gradient = direction + i * width;
    std::fill(gradient, gradient + width, T(0));
    if (batch.own_valid != nullptr && !batch.own_valid[i]) continue;
    for (size_t o = 0; o < batch.index.size(); ++o) {
      if (batch.scale[o] == 0 || (!batch.valid.empty() && !batch.valid[o][i])) continue;
      const T* code = batch.codebook + batch.index[o][i] * width;
      const T twice = 2 * batch.scale[o];
      T squares[kLanes] = {};
      int64_t d = 0;
      for (; d + kLanes <= width; d += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          const T difference = x[d + lane] - code[d + lane];
          gradient[d + lane] += twice * difference;
          squares[lane] += difference * difference;
        }
      }
      for (; d < width; ++d) {
        const T difference = x[d] - code[d];
        gradient[d] += twice * difference;
        squares[0] += difference * difference;
      }
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += squares[lane];
      total += static_cast<double>(batch.scale[o]) * sum;
    }
  }
  return total;
}

UNICODE_FAST_TARGET double commit_float(const Commitment<float>& batch, int64_t first, int64_t last, float* direction) {
  return commit(batch, first, last, direction);
}

UNICODE_FAST_TARGET double commit_double(const Commitment<double>& batch, int64_t first, int64_t last,
                                         double* direction) {
  return commit(batch, first, last, direction);
}

UNICODE_FAST_TARGET void search_float(const PreparedCodebook& codes, const float* codebook, Rows<float> rows,
                                      int64_t count, int64_t* index, float* distance) {
  search(codes, codebook, rows, count, index, distance);
}

UNICODE_FAST_TARGET void search_double(const PreparedCodebook& codes, const double* codebook, Rows<float> rows,
                                       int64_t count, int64_t* index, float* distance) {
  search(codes, codebook, rows, count, index, distance);
}

UNICODE_FAST_TARGET void direct_float(const float* codebook, int64_t codewords, int64_t width, Rows<double> rows,
                                      int64_t count, int64_t* index, double* distance) {
  direct(codebook, codewords, width, rows, count, index, distance);
}

UNICODE_FAST_TARGET void direct_double(const double* codebook, int64_t codewords, int64_t width, Rows<double> rows,
                                       int64_t count, int64_t* index, double* distance) {
  direct(codebook, codewords, width, rows, count, index, distance);
}

UNICODE_FAST_TARGET void add_float(const RowSums<float>& batch, int64_t first, int64_t last, double* sums) {
  add_rows(batch, first, last, sums);
}

UNICODE_FAST_TARGET void add_double(const RowSums<double>& batch, int64_t first, int64_t last, double* sums) {
  add_rows(batch, first, last, sums);
}

constexpr Kernels table(const char* name) {
  return {name,         kPanel,        kPair,     prepare,    search_float, search_double,
          direct_float, direct_double, add_float, add_double, commit_float, commit_double};
}
