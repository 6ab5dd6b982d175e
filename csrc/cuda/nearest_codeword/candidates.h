// The half-precision search of one row: the bound on the error of a score, and the codewords that could be the nearest.
//
// Scores are s_j = |c_j|^2 - 2 x.c_j of the centred row x and codewords c_j, in units of the codebook's scale. With the
// computed s^_j off by at most E, the nearest codeword is among those with s^_j <= min_k s^_k + 2 E.
#pragma once

#include <cfloat>
#include <cstring>

#include "../../common/portable.h"
#include "forms.h"

namespace unicode_fast {

// Candidates kept for one row by one quad of threads, and for one row of one split of the codebook.
constexpr int kCandidates = 6;
// The count of a list that has no room for all its candidates.
constexpr int kOverflow = kCandidates + 1;
// Operands are scaled by powers of two so that the largest lies in [2^kOperandExponent, 2^(kOperandExponent + 1)).
constexpr int kOperandExponent = 7;
// Limits of the codebook's scale. Within them distances between float32 numbers never overflow float64. Codewords that
// only float64 can hold overflow half precision, and their rows are compared directly.
constexpr int kSmallestScale = -130, kLargestScale = 160;
// A row's scale may exceed the codebook's by this power of two, so that score factors stay normal numbers.
constexpr int kLargestRowScale = 40;
// Scores of rows that half precision serves stay below the first number. The second is the minimum of no score at all.
// It lies far enough below infinity, the score of an excluded codeword.
constexpr double kLargestScore = 0x1p100;
constexpr float kNoScore = 0x1p126f;

// Largest over the codewords that hold finite numbers only: squared norm, norm after rounding to half precision, norm
// of the rounding error, distance of a member of a cluster from its representative. Rounded up.
struct CodebookNorms {
  float squared, rounded, residual, radius;
};

// Norms of one row: before rounding, after it, and of the rounding error.
struct RowNorms {
  double exact, rounded, residual;
};

// The lowest bits of a score that hold its place among a thread's scores, with kBranchFreeMinimum.
constexpr unsigned kPlaceBits = 63;

// The norms from sums of squares in float32, rounded up. The row's numbers are float32 differences, each off by at most
// 2^-24 of itself, times a power of two; squares that vanish are below 2^-149.
UNICODE_FAST_BOTH RowNorms norms_of_sums(float exact, float rounded, float residual, int width) {
  const double factor = 1 + (width + 16) * 0x1p-23, vanished = width * 0x1p-149;
  const double size = factor * sqrt(exact + vanished);
  return {size, factor * sqrt(rounded + vanished), factor * sqrt(residual + vanished) + 0x1p-23 * size};
}

UNICODE_FAST_BOTH float not_a_number() {
#ifdef __CUDA_ARCH__
  return __int_as_float(0x7fffffff);
#else
  return std::nanf("");
#endif
}

UNICODE_FAST_BOTH unsigned bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

UNICODE_FAST_BOTH float round_up(double value) {
#ifdef __CUDA_ARCH__
  return __double2float_ru(value);
#else
  const float rounded = static_cast<float>(value);
  return rounded < value ? std::nextafterf(rounded, INFINITY) : rounded;
#endif
}

// The sum, or the next larger number where float32 cannot hold it.
UNICODE_FAST_BOTH float add_up(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_ru(a, b);
#else
  const float sum = a + b;
  // The rounding error of a sum is itself a float32 number (Knuth's two-sum).
  const float part = sum - a;
  const float error = (a - (sum - part)) + (b - part);
  return error > 0 ? std::nextafterf(sum, INFINITY) : sum;
#endif
}

// The power of two that scales `largest` into the range of operands; 0 for zero and for numbers that are not finite.
UNICODE_FAST_BOTH int scale_exponent(double largest) {
  if (!(largest > 0) || !(largest <= DBL_MAX)) return 0;
  int exponent;
  frexp(largest, &exponent);  // largest < 2^exponent
  return kOperandExponent + 1 - exponent;
}

// The same of a float32 number, without float64.
UNICODE_FAST_BOTH int scale_exponent(float largest) {
  if (!(largest > 0) || !(largest <= FLT_MAX)) return 0;
  const bool subnormal = largest < FLT_MIN;
  const auto biased = static_cast<int>(bits_of(subnormal ? largest * 0x1p32f : largest) >> 23);
  return kOperandExponent + 127 - biased + (subnormal ? 32 : 0);
}

UNICODE_FAST_BOTH int codebook_scale(double largest) {
  const int exponent = scale_exponent(largest);
  return exponent < kSmallestScale ? kSmallestScale : exponent > kLargestScale ? kLargestScale : exponent;
}

template <class T>
UNICODE_FAST_BOTH int row_scale(T largest, int codebook_exponent) {
  const int exponent = scale_exponent(largest), most = codebook_exponent + kLargestRowScale;
  return largest == 0 ? codebook_exponent : exponent < most ? exponent : most;
}

// 2 E for a row, rounded up; NaN where half precision cannot serve the row. `norms` in units of the row's scale, which
// is 2^-shift times the codebook's. `width` counts the padding too.
//
//   E = 2^-22 C2 + 2 (r Cn + |x| Rc) + 2 g |x~| Cn + (D + 16) 2^-124 + q (|x| + C + q),  g = (D + 16) 2^-22
//
// The first term holds the rounding of |c|^2 and of the last addition. r and Rc are the rounding errors of row and
// codewords. g is twice the error of a float32 sum that truncates. q is the radius of the clusters. A place in the
// lowest bits of a score adds at most 2^-17 of the score.
UNICODE_FAST_BOTH float twice_bound(const RowNorms& row, const CodebookNorms& codes, int shift, int width) {
  // The factor makes up for the rounding of these lines and of the norms.
  constexpr double kRoundedUp = 1 + 0x1p-20;
  const double unit = ldexp(1.0, shift), growth = (width + 16) * 0x1p-22;
  const double size = codes.squared + 2 * unit * row.rounded * codes.rounded;
  const double bound = 0x1p-22 * codes.squared + (cuda::kBranchFreeMinimum ? 0x1.01p-17 * size : 0) +
                       2 * unit * (row.residual * codes.rounded + row.exact * codes.residual) +
                       2 * unit * growth * row.rounded * codes.rounded + (width + 16) * 0x1p-124 +
                       codes.radius * (unit * row.exact + codes.rounded + codes.residual + codes.radius);
  if (shift > 100 || !(size <= kLargestScore) || !(bound <= kLargestScore)) return not_a_number();
  return round_up(2 * kRoundedUp * bound);
}

struct Candidate {
  float score;
  int index;
};

// Lowers the running minimum to that of a new tile and returns the limit of candidates' scores. If the old minimum lies
// above the limit, every candidate so far does, including those without a place in the list.
UNICODE_FAST_BOTH float lower_minimum(float& lowest, int& count, float tile_lowest, float twice_bound) {
  const float before = lowest;
  lowest = fminf(before, tile_lowest);
  const float limit = add_up(lowest, twice_bound);
  if (before > limit) count = 0;
  return limit;
}

// Makes room for `more` candidates, if necessary by dropping those above the limit. Returns the number that stays, or
// kOverflow.
UNICODE_FAST_BOTH int make_room(Candidate* list, int count, int more, float limit) {
  if (count + more <= kCandidates || count > kCandidates) return count;
  int kept = 0;
  for (int place = 0; place < count; ++place) {
    const Candidate candidate = list[place];
    if (candidate.score <= limit) list[kept++] = candidate;
  }
  return kept + more <= kCandidates ? kept : kOverflow;
}

// The candidates of one row in one split of the codebook: 32 bytes in global memory.
struct alignas(16) Record {
  float lowest;
  int count;               // kOverflow where there are more
  int index[kCandidates];  // the first `count` are set
};

// Joins the lists of one row into `record`. `lowest` and `count` belong to the lists; list i starts at
// list + i kCandidates.
UNICODE_FAST_BOTH void merge(const Candidate* list, const float* lowest, const int* count, int lists, float twice_bound,
                             Record& record) {
  float smallest = kNoScore;
  for (int i = 0; i < lists; ++i) smallest = fminf(smallest, lowest[i]);
  const float limit = add_up(smallest, twice_bound);
  int joined = limit == limit ? 0 : kOverflow;
  for (int i = 0; i < lists; ++i) {
    if (!(lowest[i] <= limit)) continue;
    if (count[i] > kCandidates) joined = kOverflow;
    for (int place = 0; place < count[i] && joined <= kCandidates; ++place) {
      const Candidate candidate = list[i * kCandidates + place];
      if (candidate.score > limit) continue;
      if (joined < kCandidates) record.index[joined] = candidate.index;
      ++joined;
    }
  }
  record.lowest = smallest;
  record.count = joined;
}

// The key by which distances are compared: NaN counts as infinite, an infinite distance as the largest number.
UNICODE_FAST_BOTH double comparable(double distance) {
  if (distance != distance) return INFINITY;
  return distance < DBL_MAX ? distance : DBL_MAX;
}

// Whether codeword j at this distance comes before the best one so far.
UNICODE_FAST_BOTH bool nearer(double distance, int64_t j, double best_distance, int64_t best) {
  const double own = comparable(distance), other = comparable(best_distance);
  return own < other || (own == other && j < best);
}

// The limit of squared distances, summed in float32 from differences of float32 numbers, that may belong to the nearest
// codeword; `lowest` is the smallest of them. Each is off by at most g d + width 2^-149, g = (width + 4) 2^-23.
UNICODE_FAST_BOTH float direct_limit(float lowest, int64_t width) {
  const double growth = static_cast<double>(width + 4) * 0x1p-23;
  if (growth > 0.125 || !(lowest <= FLT_MAX)) return INFINITY;
  // (1 + g) / (1 - g) <= 1 + 2.5 g
  return round_up(static_cast<double>(lowest) * (1 + 2.5 * growth) + static_cast<double>(width) * 0x1p-120);
}

// The power of two that scales differences of members from their representative so that none exceeds 2^15 in norm.
// `radius` is in units of the codebook's scale, whose exponent is given.
UNICODE_FAST_BOTH int member_scale(float radius, int codebook_exponent) {
  return codebook_exponent + scale_exponent(radius) + 14 - kOperandExponent;
}

// At least the error of |d|^2 - 2 u y.d, with y = x - r and d = c - r for a row x, a codeword c of its cluster and the
// representative r, each scaled and then rounded to half precision in the product; u = 2^shift is their scales' ratio.
// The squares of y and d are sums in float32 of numbers that are not rounded to half. Infinite where it could overflow.
//
//   2 u (p |d| + q |y| + p q + g (|y| + p) (|d| + q)) + g |d|^2 + (D + 16) 2^-52 (u^2 |y|^2 + |d|^2)
//
// p = (2^-11 + 2^-19) |y| + 2^-24 sqrt(D) holds the rounding of y, q that of d alike; g = (D + 16) 2^-22, as in
// twice_bound. The last term is the error of the distances in float64.
UNICODE_FAST_BOTH float member_error(float row_square, float member_square, int shift, int width) {
  constexpr float kRounded = 0x1.01p-11f;
  const float columns = static_cast<float>(width), growth = (columns + 16) * 0x1p-22f, larger = 1 + growth;
  const float vanished = columns * 0x1p-149f, tiny = sqrtf(columns) * 0x1p-24f, unit = ldexpf(1, shift);
  const float y = sqrtf(row_square + vanished) * larger, d = sqrtf(member_square + vanished) * larger;
  const float p = kRounded * y + tiny, q = kRounded * d + tiny, far = unit * y, direct = (columns + 16) * 0x1p-52f;
  const float error = 2 * unit * (p * d + q * y + p * q + growth * (y + p) * (d + q)) + growth * d * d +
                      direct * far * far + direct * d * d;
  return shift <= 100 && far * d <= 0x1p100f ? error : INFINITY;
}

}  // namespace unicode_fast
