#include <cfloat>
#include <span>

#include "../../../csrc/cuda/nearest_codeword/forms.h"
#include "search.h"

namespace unicode_fast::checks {
namespace {

// The order of comparable() and nearer(), by the reference.
double key_of(double distance) { return std::isnan(distance) ? kInfinity : std::min(distance, DBL_MAX); }

double squared_distance(const double* x, const double* c, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += (x[d] - c[d]) * (x[d] - c[d]);
  return sum;
}

// The scores of one list: those of a section of each tile in [first, last).
struct Scored {
  const std::vector<double>& scores;
  const Geometry& shape;
  int64_t section, first, last;

  std::span<const double> tile(int64_t number) const {
    const auto all = static_cast<int64_t>(scores.size());
    const int64_t start = std::min(number * shape.columns + section * shape.section, all);
    return std::span(scores).subspan(start, std::min<int64_t>(shape.section, all - start));
  }
  int within(int64_t end, double limit) const {
    int number = 0;
    for (int64_t i = first; i < end; ++i) {
      for (const double score : tile(i)) number += score <= limit;
    }
    return number;
  }
};

struct List {
  double lowest = kInfinity;
  bool overflows = false;
};

// The list after the last tile.
List follow(const Scored& scored, double twice_bound) {
  List list;
  for (int64_t tile = scored.first; tile < scored.last; ++tile) {
    double low = kInfinity;
    for (const double score : scored.tile(tile)) low = std::min(low, score);
    if (low == kInfinity || low > list.lowest + twice_bound) continue;
    const double before = list.lowest;
    list.lowest = std::min(before, low);
    const double limit = list.lowest + twice_bound;
    if (before > limit) list.overflows = false;
    if (scored.within(tile + 1, limit) > kCandidates) list.overflows = true;
  }
  return list;
}

struct SplitRecord {
  double lowest = kInfinity;
  int count = 0;
};

SplitRecord join_lists(const std::vector<Scored>& sections, double twice_bound) {
  std::vector<List> lists;
  SplitRecord record;
  for (const Scored& scored : sections) {
    lists.push_back(follow(scored, twice_bound));
    record.lowest = std::min(record.lowest, lists.back().lowest);
  }
  const double limit = record.lowest + twice_bound;
  for (size_t section = 0; section < lists.size(); ++section) {
    if (lists[section].lowest > limit) continue;
    record.count += lists[section].overflows ? kOverflow : sections[section].within(sections[section].last, limit);
  }
  return record;
}

// How many codewords finish_kernel should compare with a row, from scores and the width of the bound on them.
int count_compared(const std::vector<double>& scores, double twice_bound, const Geometry& shape, Splits splits) {
  const int64_t tiles = (static_cast<int64_t>(scores.size()) + shape.columns - 1) / shape.columns;
  std::vector<SplitRecord> records;
  double lowest = kInfinity;
  for (int split = 0; split < splits.count; ++split) {
    const int64_t first = static_cast<int64_t>(split) * splits.per_split;
    std::vector<Scored> sections;
    for (int section = 0; section < shape.columns / shape.section; ++section)
      sections.push_back({scores, shape, section, first, std::min(first + splits.per_split, tiles)});
    records.push_back(join_lists(sections, twice_bound));
    lowest = std::min(lowest, records.back().lowest);
  }
  const double limit = lowest + twice_bound;
  int compared = 0;
  for (const SplitRecord& record : records) {
    if (!(record.lowest <= limit)) continue;
    if (record.count > kCandidates) return kComparedWithAll;
    compared += record.count;
  }
  return limit < kInfinity ? compared : kComparedWithAll;
}

// A row as the kernel rounds it.
struct HalfRow {
  int shift;  // from the row's scale to the codebook's
  std::vector<double> values = {};
  RowNorms norms{0, 0, 0};
};

HalfRow half_row(const Rows& features, int64_t row, const Codes& codes) {
  const auto value = [&](int d) { return d < features.columns ? features.at(row, d) : 0.0; };
  float most = 0;
  for (int d = 0; d < codes.width; ++d) most = std::fmax(most, std::abs(static_cast<float>(value(d)) - codes.mean[d]));
  const int exponent = row_scale(most, codes.exponent);
  HalfRow half{codes.exponent - exponent};
  for (int d = 0; d < codes.width; ++d) {
    const double exact = (value(d) - codes.mean[d]) * std::ldexp(1.0, exponent);
    half.values.push_back(rounded(kHalf, exact));
    half.norms.exact += exact * exact;
    half.norms.rounded += half.values[d] * half.values[d];
    half.norms.residual += (exact - half.values[d]) * (exact - half.values[d]);
  }
  if (kReadRowsOnce) {
    const auto sums = half.norms;
    half.norms = norms_of_sums(static_cast<float>(sums.exact), static_cast<float>(sums.rounded),
                               static_cast<float>(sums.residual), codes.width);
  } else {
    half.norms = {std::sqrt(half.norms.exact), std::sqrt(half.norms.rounded), std::sqrt(half.norms.residual)};
  }
  return half;
}

}  // namespace

bool is_nearest(const Rows& features, const Rows& codebook, int64_t row, int64_t index, double distance) {
  const int64_t width = features.columns;
  if (index < 0 || index >= codebook.rows) return false;
  std::vector<double> x(width);
  for (int64_t d = 0; d < width; ++d) x[d] = features.at(row, d);
  const auto codeword = [&](int64_t j) { return &codebook.values[j * width]; };
  int64_t best = 0;
  double best_key = kInfinity;
  for (int64_t j = 0; j < codebook.rows; ++j) {
    const double key = key_of(squared_distance(x.data(), codeword(j), width));
    if (key < best_key) {
      best_key = key;
      best = j;
    }
  }
  const double own = squared_distance(x.data(), codeword(index), width);
  if (!(key_of(own) <= best_key * (1 + 4 * static_cast<double>(width) * 0x1p-53))) return false;
  if (index != best && key_of(own) == kInfinity) return false;
  for (int64_t j = 0; j < index; ++j) {
    if (std::equal(codeword(j), codeword(j) + width, codeword(index))) return false;
  }
  const bool wide = features.number == kDouble;
  const double expected = wide ? own : static_cast<float>(own);
  return is_close(distance, expected, wide ? own * 4 * static_cast<double>(width) * 0x1p-53 : own * 0x1p-23 + 0x1p-149);
}

bool may_compare(int compared, const Search& given, int64_t row, const Codes& codes, const Geometry& shape,
                 Splits splits) {
  const HalfRow half = half_row(given.features, row, codes);
  const double bound = twice_bound(half.norms, codes.largest, half.shift, codes.width);
  if (std::isnan(bound)) return compared == kComparedWithAll;
  const double unit = std::ldexp(2.0, half.shift);
  std::vector<double> scores(given.codebook.rows);
  for (size_t j = 0; j < scores.size(); ++j) {
    double product = 0;
    for (int d = 0; d < codes.width; ++d) product += half.values[d] * codes.operands[j * codes.width + d];
    scores[j] = codes.norms[j] == kInfinity ? kInfinity : codes.norms[j] - unit * product;
  }
  // The kernel sums norms in float32, which moves the bound by at most the slack.
  const double slack =
      2 * 0x1p-22 * (codes.largest.squared + unit * (codes.width + 16) * half.norms.rounded * codes.largest.rounded);
  for (const double moved : {bound - slack, bound, bound + slack}) {
    if (compared == count_compared(scores, moved, shape, splits)) return true;
  }
  return false;
}

}  // namespace unicode_fast::checks
