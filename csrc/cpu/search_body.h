// The search for the nearest codeword, in integers. kernels_body.h includes this file once for each instruction set.
// docs/exactness.md has the bound on the error of a score and the proof that no nearest codeword is missed.

using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = int16_t __attribute__((vector_size(2 * kLanes)));
// Float64 numbers in a vector of the processor. Compilers compare longer ones number by number.
constexpr int kDoubles = kLanes / 2, kParts = 8 / kDoubles;
using Doubles = double __attribute__((vector_size(8 * kDoubles)));
using HalfFloats = float __attribute__((vector_size(4 * kDoubles)));

UNICODE_FAST_TARGET inline Doubles load_doubles(const double* from) { return load<Doubles>(from); }
UNICODE_FAST_TARGET inline Doubles load_doubles(const float* from) {
  return __builtin_convertvector(load<HalfFloats>(from), Doubles);
}

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
UNICODE_FAST_TARGET inline Floats larger(const Floats& a, const Floats& b) { return a > b ? a : b; }

UNICODE_FAST_TARGET inline float least_of(const Floats& value) {
#if UNICODE_FAST_LANES == 16
  return _mm512_reduce_min_ps((__m512)value);
#else
  float least = value[0];
  for (int lane = 1; lane < kLanes; ++lane) least = std::min<float>(least, value[lane]);
  return least;
#endif
}

// Adds 1.5 2^23 and subtracts it again: the nearest integer, ties to even, of numbers below 2^22.
UNICODE_FAST_TARGET inline Floats nearest_integers(const Floats& value) {
  constexpr float kShift = 0x1.8p23f;
  return (value + kShift) - kShift;
}

// Rounds `steps` times the numbers to integers; returns at least the norm of the error. `numbers` and `integers` have a
// multiple of kLanes elements, `norm` is at least that of the numbers, each off by one rounding.
UNICODE_FAST_TARGET inline double round_to_integers(const float* numbers, int64_t padded, double norm, float steps,
                                                    int16_t* integers) {
  Floats lost = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Floats value = load<Floats>(numbers + d) * steps, kept = nearest_integers(value);
    lost += (value - kept) * (value - kept);
    const Shorts rounded = __builtin_convertvector(__builtin_convertvector(kept, Ints), Shorts);
    std::memcpy(integers + d, &rounded, sizeof(rounded));
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lost[lane];
  return std::sqrt(sum) * inflation(padded) + 2 * kUnit * norm * steps;
}

// Pointers to the codewords at `places`, or to all.
template <typename C>
struct Codewords {
  const C* data;
  int64_t width;
  const int32_t* places;
  const C* operator[](int64_t k) const { return data + (places == nullptr ? k : places[k]) * width; }
};

// Leaves out every codeword that holds the same numbers as an earlier one; returns the number kept. Equal codewords
// have equal squares.
template <typename C>
UNICODE_FAST_TARGET int64_t keep_distinct(const Codewords<C>& given, int64_t count, std::vector<double>& squares,
                                          int32_t* kept) {
  uint64_t slots = 2;
  while (slots < 2 * static_cast<uint64_t>(count)) slots *= 2;
  std::vector<int32_t> table(slots, -1);
  int64_t number = 0;
  for (int64_t k = 0; k < count; ++k) {
    uint64_t slot;
    std::memcpy(&slot, &squares[k], 8);
    slot = (slot * 0x9e3779b97f4a7c15u >> 20) % slots;
    const auto same = [&](int32_t other) UNICODE_FAST_TARGET {
      return squares[other] == squares[k] &&
             std::equal(given[k], given[k] + given.width, given.data + kept[other] * given.width);
    };
    while (table[slot] >= 0 && !same(table[slot])) slot = (slot + 1) % slots;
    if (table[slot] >= 0) continue;
    table[slot] = static_cast<int32_t>(number);
    squares[number] = squares[k];
    kept[number++] = static_cast<int32_t>(given.places == nullptr ? k : given.places[k]);
  }
  return number;
}

// Fills `codes`, whose arrays hold at least `count` codewords, with the codewords at `places`, or all.
template <typename C>
UNICODE_FAST_TARGET void prepare(PreparedCodebook& codes, const C* codebook, const int32_t* places, int64_t count,
                                 const Parallel& parallel) {
  const int64_t width = codes.width, depth = (width + 1) / 2;
  const Codewords<C> given{codebook, width, places};
  std::vector<double> sums(width, 0.0);
  parallel(width, 1 + (1 << 15) / count, [&](int64_t first, int64_t last) UNICODE_FAST_TARGET {
    for (int64_t k = 0; k < count; ++k)
      for (int64_t d = first; d < last; ++d) sums[d] += static_cast<double>(given[k][d]);
  });
  for (int64_t d = 0; d < width; ++d) {
    codes.finite = codes.finite && std::isfinite(sums[d]);
    const float mean = static_cast<float>(sums[d] / static_cast<double>(count));
    codes.mean[d] = std::isfinite(mean) ? mean : 0;
  }
  if (!codes.finite) return;

  std::vector<double> squares(count), tops(count);
  const int64_t grain = 1 + (1 << 14) / width;
  parallel(count, grain, [&](int64_t first, int64_t last) UNICODE_FAST_TARGET {
    for (int64_t k = first; k < last; ++k) {
      Doubles square[kParts] = {}, top[kParts] = {};
      int64_t d = 0;
      for (; d + 8 <= width; d += 8) {
        for (int part = 0; part < kParts; ++part) {
          const int64_t at = d + part * kDoubles;
          const Doubles centred = load_doubles(given[k] + at) - load_doubles(codes.mean + at);
          square[part] += centred * centred;
          const Doubles magnitude = centred < 0 ? -centred : centred;
          top[part] = magnitude > top[part] ? magnitude : top[part];
        }
      }
      double rest = 0, highest = 0;
      for (; d < width; ++d) {
        const double centred = static_cast<double>(given[k][d]) - codes.mean[d];
        rest += centred * centred;
        highest = std::max(highest, std::abs(centred));
      }
      squares[k] = sum_of(load<Eight>(square)) + rest;
      for (const Doubles& part : top)
        for (int lane = 0; lane < kDoubles; ++lane) highest = std::max<double>(highest, part[lane]);
      tops[k] = highest;
    }
  });
  const double largest = *std::max_element(tops.begin(), tops.end());
  // Smaller differences, of float64 codewords, could vanish in float32.
  codes.finite = largest == 0 || largest > 0x1p-200;
  if (!codes.finite) return;
  if (largest > 0) codes.scale = std::ldexp(1.0, -std::clamp(std::ilogb(largest), -100, 100));
  codes.kept = keep_distinct(given, count, squares, codes.places);
  codes.largest.squared = *std::max_element(squares.begin(), squares.begin() + codes.kept) * codes.scale * codes.scale;
  const double norm = std::sqrt(codes.largest.squared), top = largest * codes.scale;
  codes.steps = top > 0 ? static_cast<float>(std::min(largest_norm(width) / norm, kLargestInteger / top)) : 1;

  const int64_t panels = (codes.kept + kPanel - 1) / kPanel, padded = (width + kLanes - 1) / kLanes * kLanes;
  std::vector<double> residual(panels);
  parallel(panels, 1 + grain / kPanel, [&](int64_t first, int64_t last) UNICODE_FAST_TARGET {
    std::vector<float> centred(padded);
    std::vector<uint32_t> pairs((padded + 1) / 2);
    const C scale = static_cast<C>(codes.scale);
    for (int64_t panel = first; panel < last; ++panel) {
      uint32_t* operands = codes.operands + panel * depth * kPanel;
      std::fill_n(operands, depth * kPanel, 0);
      for (int64_t k = panel * kPanel; k < (panel + 1) * kPanel; ++k) {
        codes.norms[k] = std::numeric_limits<float>::infinity();
        if (k >= codes.kept) continue;
        codes.norms[k] = static_cast<float>(squares[k] * codes.scale * codes.scale);
        const C* codeword = codebook + codes.places[k] * width;
        for (int64_t d = 0; d < width; ++d) centred[d] = static_cast<float>((codeword[d] - codes.mean[d]) * scale);
        residual[panel] = std::max(residual[panel], round_to_integers(centred.data(), padded, norm, codes.steps,
                                                                      reinterpret_cast<int16_t*>(pairs.data())));
        for (int64_t d = 0; d < depth; ++d) operands[d * kPanel + k % kPanel] = pairs[d];
      }
    }
  });
  codes.largest.residual = *std::max_element(residual.begin(), residual.end());
  codes.largest.rounded = codes.steps * norm + codes.largest.residual;
}

// The integers of a row, zeros up to a multiple of kLanes; the factor of their products, and twice the bound.
UNICODE_FAST_TARGET inline void prepare_row(const PreparedCodebook& codes, const float* x, float* centred,
                                            int16_t* operands, float& factor, float& twice_the_error) {
  const int64_t width = codes.width, whole = width / kLanes * kLanes;
  const float scale = static_cast<float>(2 * codes.scale);
  for (int64_t d = 0; d < whole; d += kLanes) {
    const Floats value = (load<Floats>(x + d) - load<Floats>(codes.mean + d)) * scale;
    std::memcpy(centred + d, &value, sizeof(value));
  }
  for (int64_t d = whole; d < width; ++d) centred[d] = (x[d] - codes.mean[d]) * scale;
  const int64_t padded = (width + kLanes - 1) / kLanes * kLanes;
  std::fill(centred + width, centred + padded, 0.0f);
  Floats square = {}, top = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    const Floats value = load<Floats>(centred + d);
    square += value * value;
    top = larger(top, larger(value, -value));
  }
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += square[lane];
  double norm = std::sqrt(sum) * inflation(width);
  factor = 0;
  twice_the_error = std::numeric_limits<float>::infinity();
  if (!(norm < 1e30)) return;  // NaN too
  // Rows nearer to the mean have a bound that small anyway.
  const double least = std::max(norm, 0x1p-40);
  const float steps = static_cast<float>(
      std::min(largest_norm(width) / least, kLargestInteger / std::max<double>(-least_of(-top), 0x1p-40)));
  const double residual = round_to_integers(centred, padded, norm, steps, operands);
  norm *= steps;
  const double unit = 1 / (static_cast<double>(steps) * codes.steps);
  const double error = unit * (residual * codes.largest.rounded + norm * codes.largest.residual) +
                       2 * kUnit * (codes.largest.squared + unit * (norm + residual) * codes.largest.rounded) +
                       static_cast<double>(width) * 0x1p-60;
  factor = static_cast<float>(-unit);
  twice_the_error = static_cast<float>(2 * error * (1 + 1e-5));
}

// Scores of kGroup rows and the kPanel codewords of a panel: norm plus factor times the sum of products.
UNICODE_FAST_TARGET inline void score(const uint32_t* rows, int64_t stride, const float* factors,
                                      const uint32_t* operands, const float* norms, int64_t depth,
                                      float (&scores)[kGroup][kPanel]) {
  Ints sum[kGroup][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Ints code[kVectors];
    for (int n = 0; n < kVectors; ++n) code[n] = load<Ints>(operands + (d * kVectors + n) * kLanes);
    for (int r = 0; r < kGroup; ++r) {
      const int32_t pair = static_cast<int32_t>(rows[r * stride + d]);
      for (int n = 0; n < kVectors; ++n) sum[r][n] = UNICODE_FAST_MULTIPLY_ADD(sum[r][n], code[n], pair);
    }
  }
  for (int r = 0; r < kGroup; ++r) {
    for (int n = 0; n < kVectors; ++n) {
      const Floats found = load<Floats>(norms + n * kLanes) + factors[r] * __builtin_convertvector(sum[r][n], Floats);
      std::memcpy(scores[r] + n * kLanes, &found, sizeof(found));
    }
  }
}

// The numbers whose bits are set.
inline std::vector<int32_t> members(const uint64_t* set, int64_t words) {
  std::vector<int32_t> found;
  for (int64_t word = 0; word < words; ++word)
    for (uint64_t bits = set[word]; bits != 0; bits &= bits - 1)
      found.push_back(static_cast<int32_t>(word * 64 + __builtin_ctzll(bits)));
  return found;
}

// The cluster that holds all codewords of `set`, made or enlarged where there is none; null where its codewords are not
// much nearer to each other than those of `codes`.
template <typename C>
UNICODE_FAST_TARGET const Cluster* cluster_of(const PreparedCodebook& codes, const C* codebook, const uint64_t* set,
                                              int64_t words, Clusters& clusters) {
  int64_t word = 0;
  while (set[word] == 0) ++word;
  if (clusters.of.empty()) clusters.of.assign(words * 64, -1);
  const int32_t number = clusters.of[word * 64 + __builtin_ctzll(set[word])];
  const Cluster* before = number < 0 ? nullptr : clusters.all[number].get();
  if (before == nullptr && clusters.loose > 8 + 4 * clusters.all.size()) return nullptr;
  std::vector<uint64_t> missing(set, set + words);
  if (before != nullptr)
    for (int64_t n = 0; n < words; ++n) missing[n] &= ~before->set[n];
  const auto from_mean = [&](int64_t k) UNICODE_FAST_TARGET {
    return squared_distance(before->mean.data(), codebook + codes.places[k] * codes.width, codes.width);
  };
  double radius = before == nullptr ? 0 : before->codes.largest.squared / (before->codes.scale * before->codes.scale);
  const double limit = 4 * radius;
  bool whole = before != nullptr;
  for (const int32_t k : members(missing.data(), words)) {
    whole = false;
    if (before == nullptr) break;
    radius = std::max(radius, from_mean(k));
    if (radius > limit) return nullptr;  // between two clusters
  }
  if (whole) return before;

  auto cluster = std::make_unique<Cluster>();
  cluster->set.assign(set, set + words);
  if (before != nullptr) {
    // Codewords little farther from the mean than its own, so that the cluster need not grow again.
    for (int64_t k = 0; k < codes.kept; ++k)
      if (from_mean(k) <= 1.5 * radius) cluster->set[k / 64] |= uint64_t{1} << k % 64;
    for (int64_t n = 0; n < words; ++n) cluster->set[n] |= before->set[n];
  }
  const std::vector<int32_t> kept = members(cluster->set.data(), words);
  std::vector<int32_t> places;
  for (const int32_t k : kept) places.push_back(codes.places[k]);
  const int64_t count = static_cast<int64_t>(places.size()), padded = (count + kPanel - 1) / kPanel * kPanel;
  cluster->mean.resize(codes.width);
  cluster->norms.resize(padded);
  cluster->operands.resize(padded * ((codes.width + 1) / 2));
  cluster->places.resize(count);
  PreparedCodebook& own = cluster->codes;
  own.codewords = codes.codewords;
  own.width = codes.width;
  own.mean = cluster->mean.data();
  own.norms = cluster->norms.data();
  own.operands = cluster->operands.data();
  own.places = cluster->places.data();
  prepare(own, codebook, places.data(), count, run_here);
  if (!own.finite || std::sqrt(own.largest.squared) / own.scale > std::sqrt(codes.largest.squared) / codes.scale / 2) {
    ++clusters.loose;
    return nullptr;
  }
  for (const int32_t k : kept) clusters.of[k] = static_cast<int32_t>(clusters.all.size());
  clusters.all.push_back(std::move(cluster));
  return clusters.all.back().get();
}

// The nearest codeword of each row. Rows that leave more codewords than their list holds are searched again, among
// these codewords alone: these are near each other, so a mean and a scale of their own tell them apart.
template <typename C>
UNICODE_FAST_TARGET void search(const PreparedCodebook& codes, const C* codebook, const float* const* rows,
                                int64_t count, int64_t* index, float* distance, Scratch& scratch, Clusters& clusters) {
  const int64_t width = codes.width, depth = (width + 1) / 2, padded = (width + kLanes - 1) / kLanes * kLanes;
  const int64_t stride = (padded + 1) / 2, groups = (count + kGroup - 1) / kGroup;
  const int64_t panels = codes.finite ? (codes.kept + kPanel - 1) / kPanel : 0;
  const int64_t words = (panels * kPanel + 63) / 64;
  if (codes.finite) {
    scratch.operands.resize(std::max<size_t>(scratch.operands.size(), groups * kGroup * stride));
    scratch.centred.resize(padded);
  }
  scratch.factors.assign(groups * kGroup, 0.0f);
  std::vector<Candidates>& candidates = scratch.candidates;
  candidates.resize(count);
  scratch.sets.clear();
  for (int64_t i = 0; i < count; ++i) {
    float twice_the_error = std::numeric_limits<float>::infinity();
    if (codes.finite)
      prepare_row(codes, rows[i], scratch.centred.data(),
                  reinterpret_cast<int16_t*>(scratch.operands.data() + i * stride), scratch.factors[i],
                  twice_the_error);
    candidates[i].start(twice_the_error);
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t group = 0; group < groups; ++group) {
      float scores[kGroup][kPanel];
      score(scratch.operands.data() + group * kGroup * stride, stride, scratch.factors.data() + group * kGroup,
            codes.operands + panel * depth * kPanel, codes.norms + panel * kPanel, depth, scores);
      for (int64_t r = 0; r < kGroup && group * kGroup + r < count; ++r) {
        Candidates& row = candidates[group * kGroup + r];
        Floats low = load<Floats>(scores[r]);
        for (int n = 1; n < kVectors; ++n) low = smaller(low, load<Floats>(scores[r] + n * kLanes));
        if (at_most(low, row.limit) == 0) continue;
        row.lower(least_of(low));
        uint64_t hits = 0;
        for (int n = 0; n < kVectors; ++n)
          hits |= static_cast<uint64_t>(at_most(load<Floats>(scores[r] + n * kLanes), row.limit)) << n * kLanes;
        row.add(static_cast<int32_t>(panel * kPanel), hits, scores[r], words, scratch.sets);
      }
    }
  }

  std::vector<std::pair<const Cluster*, int64_t>> again;
  for (int64_t i = 0; i < count; ++i) {
    Candidates& row = candidates[i];
    double smallest = std::numeric_limits<double>::infinity();
    const auto compare = [&](int64_t j) UNICODE_FAST_TARGET {
      const double found = squared_distance(rows[i], codebook + j * width, width);
      if (found < smallest) smallest = found, index[i] = j;
    };
    if (row.set >= 0) {
      const uint64_t* set = scratch.sets.data() + row.set * words;
      if (const Cluster* cluster = cluster_of(codes, codebook, set, words, clusters)) {
        again.emplace_back(cluster, i);
        continue;
      }
      for (const int32_t k : members(set, words)) compare(codes.places[k]);
    } else if (row.count > 0) {
      row.forget();
      for (int32_t n = 0; n < row.count; ++n) compare(codes.places[row.place[n]]);
    }
    if (smallest == std::numeric_limits<double>::infinity())
      compare_all(rows[i], codebook, codes.codewords, width, index[i], smallest);
    distance[i] = static_cast<float>(smallest);
  }
  std::stable_sort(again.begin(), again.end());
  for (size_t first = 0, last = 0; first < again.size(); first = last) {
    const Cluster* cluster = again[first].first;
    std::vector<const float*> mine;
    for (; last < again.size() && again[last].first == cluster; ++last) mine.push_back(rows[again[last].second]);
    std::vector<int64_t> found(mine.size());
    std::vector<float> squared(mine.size());
    if (!scratch.next) scratch.next = std::make_unique<Scratch>();
    Clusters smaller_ones;
    search(cluster->codes, codebook, mine.data(), static_cast<int64_t>(mine.size()), found.data(), squared.data(),
           *scratch.next, smaller_ones);
    for (size_t n = 0; n < mine.size(); ++n) {
      index[again[first + n].second] = found[n];
      distance[again[first + n].second] = squared[n];
    }
  }
}
