// The loops themselves. kernels.cpp includes this file once for each instruction set, in a namespace of its own. So it
// has no include guard. It needs definitions of UNICODE_FAST_TARGET (the attribute of the instruction set),
// UNICODE_FAST_LANES (32-bit numbers in a vector), UNICODE_FAST_VECTORS (vectors of codewords scored at once) and
// UNICODE_FAST_MULTIPLY_ADD(sum, code, pair): sum plus, in each lane, the products of the two 16-bit integers of `code`
// with those of `pair`.

constexpr int kLanes = UNICODE_FAST_LANES, kVectors = UNICODE_FAST_VECTORS;
constexpr int kPanel = kLanes * kVectors;
// Rows that share the codewords in registers.
constexpr int kGroup = 6;

using Floats = float __attribute__((vector_size(4 * kLanes)));
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

#include "search_body.h"
#include "softmax_body.h"

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

UNICODE_FAST_TARGET void prepare_float(PreparedCodebook& codes, const float* codebook, const Parallel& parallel) {
  prepare(codes, codebook, nullptr, codes.codewords, parallel);
}

UNICODE_FAST_TARGET void prepare_double(PreparedCodebook& codes, const double* codebook, const Parallel& parallel) {
  prepare(codes, codebook, nullptr, codes.codewords, parallel);
}

UNICODE_FAST_TARGET void search_float(const PreparedCodebook& codes, const float* codebook, const float* const* rows,
                                      int64_t count, int64_t* index, float* distance, Scratch& scratch) {
  search(codes, codebook, rows, count, index, distance, scratch, scratch.clusters);
}

UNICODE_FAST_TARGET void search_double(const PreparedCodebook& codes, const double* codebook, const float* const* rows,
                                       int64_t count, int64_t* index, float* distance, Scratch& scratch) {
  search(codes, codebook, rows, count, index, distance, scratch, scratch.clusters);
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

#include "adam_body.h"
#include "assignment_body.h"
#include "attention_body.h"
#include "club_body.h"
#include "distribution_body.h"
#include "elementwise_body.h"
#include "norm_body.h"
#include "random_body.h"

constexpr Kernels table(const char* name) {
  return {name,
          kPanel,
          prepare_float,
          prepare_double,
          search_float,
          search_double,
          direct_float,
          direct_double,
          add_float,
          add_double,
          commit_float,
          commit_double,
          {softmax<float>, add_to_columns<float>, slopes<float>},
          {softmax<double>, add_to_columns<double>, slopes<double>},
          {centre<float>, distances_of<float>, mix<float>, distance_slopes<float>},
          {centre<double>, distances_of<double>, mix<double>, distance_slopes<double>},
          attend,
          attend_backward,
          dense,
          dense_parameters,
          dense_inputs,
          club_likelihood,
          club_estimate,
          balance_rows,
          cross_entropy,
          cross_entropy_slopes,
          hold,
          presence_slopes,
          twist,
          temper,
          draw_factors,
          rectify,
          rectify_backward,
          squared_distance,
          scaled_difference,
          add_norm,
          add_norm_backward,
          batch_norm,
          batch_norm_backward,
          sum_of_squares,
          adam};
}
