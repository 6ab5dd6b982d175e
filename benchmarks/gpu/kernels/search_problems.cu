#include "../../../csrc/cuda/nearest_codeword/forms.h"
#include "search.h"

namespace unicode_fast::checks {
namespace {

constexpr int kClusters = 3;  // of a collapsed codebook
constexpr int kWidth = 64;    // of tied and laddered searches

// Columns of a section in an order that goes from one thread of a quad to the next.
std::vector<int> quad_order(int section) {
  std::vector<int> columns;
  const int tiles = section / 8;
  for (int i = 0; i < section; ++i) columns.push_back(i / 4 * 3 % tiles * 8 + i % 4 * 2 + (i / 4 / tiles + i) % 2);
  // Both sides of a column once each: the second round takes those that the first left.
  std::vector<char> taken(section, 0);
  for (int& column : columns) {
    if (taken[column]) column ^= 1;
    taken[column] = 1;
  }
  return columns;
}

double square_of(const Rows& rows, int64_t row) {
  double square = 0;
  for (int64_t d = 0; d < rows.columns; ++d) square += rows.at(row, d) * rows.at(row, d);
  return square;
}

// Random rows in one split, with values that can be set.
Search settable_search(int64_t rows, int64_t codewords) {
  Search given = random_search(kSingle, rows, codewords, kWidth, 1, false);
  given.features = kept(given.features);
  given.codebook = kept(given.codebook);
  return given;
}

// The first codewords, and others near to them.
Rows in_clusters(const Rows& given, int64_t clusters, double spread) {
  Rows codebook = kept(given);
  const Rows apart = random_rows(kSingle, codebook.rows, codebook.columns, 3);
  for (int64_t j = clusters; j < codebook.rows; ++j) {
    for (int64_t d = 0; d < codebook.columns; ++d)
      codebook.set(j, d, codebook.at(j % clusters, d) + spread * apart.at(j, d));
  }
  return codebook;
}

// Random rows, and a codebook of kClusters random codewords and others near to them.
Search search_in_clusters(const Geometry& shape, Number number, int64_t rows, int64_t width, double spread) {
  const int64_t codewords = 3 * shape.columns / 2 + 5;
  Search given = random_search(number, rows, codewords, width, 0, false);
  given.features = kept(given.features);
  given.codebook = in_clusters(given.codebook, kClusters, spread);
  return given;
}

// Patterns of tied codewords: each number of them in each kind.
constexpr int kHits[] = {2, 3, 4, 5, 6, 7, 9}, kKinds = 4, kPatterns = 7 * kKinds;

// Kinds: all the same; the nearest first; last; the last two.
bool is_tied(int kind, int i, int hits) {
  return kind == 0 || (kind == 1 && i == 0) || (kind == 2 && i == hits - 1) || (kind == 3 && i >= hits - 2);
}

// The codewords of each pattern, in one section each.
std::vector<std::vector<int64_t>> tied_places(int section) {
  const std::vector<int> order = quad_order(section);
  std::vector<std::vector<int64_t>> places(kPatterns);
  int64_t start = 0;
  int used = 0;
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const int hits = kHits[pattern / kKinds];
    if (used + hits > section) {
      start += section;
      used = 0;
    }
    for (int i = 0; i < hits; ++i) places[pattern].push_back(start + order[used++]);
    std::sort(places[pattern].begin(), places[pattern].end());
  }
  return places;
}

// A candidate: its tile, and its score in units of the bound.
struct Rung {
  int tile;
  double score;
};

struct Ladder {
  int compared;
  std::vector<Rung> rungs;
};

const Ladder kLadders[] = {
    {6, {{0, 1.9}, {0, 1.65}, {0, 1.25}, {1, 0.8}, {1, 0.73}, {1, 0.66}, {2, 0.45}, {2, 0.35}, {3, 0}}},
    {2, {{0, 3.00}, {0, 3.01}, {0, 3.02}, {0, 3.03}, {0, 3.04}, {0, 3.05}, {0, 3.06}, {2, 0.1}, {3, 0}}},
    {kComparedWithAll, {{0, 0.80}, {0, 0.81}, {0, 0.82}, {0, 0.83}, {0, 0.84}, {0, 0.85}, {0, 0.86}, {2, 0}}},
    {kComparedWithAll, {{0, 1.30}, {0, 1.31}, {0, 1.32}, {0, 1.33}, {0, 1.34}, {0, 1.35}, {0, 1.36}, {1, 0.5}, {3, 0}}},
    {5, {{0, 0}, {1, 0.7}, {2, 0.6}, {2, 0.3}, {3, 0.5}, {3, 1.5}}}};
constexpr int kLadderCount = 5, kLadderTiles = 4, kLongestLadder = 9;

}  // namespace

Search random_search(Number number, int64_t rows, int64_t codewords, int64_t width, int splits, bool random) {
  const Number codes = number == kDouble ? kDouble : kSingle;
  return {random_rows(number, rows, width, 1), random_rows(codes, codewords, width, 2), {}, {}, splits, random};
}

Search spoilt_search(Number number, int64_t rows, int64_t codewords, int64_t width) {
  Search given = random_search(number, rows, codewords, width, 0, false);
  given.features = kept(given.features);
  given.codebook = spoilt_codebook(given.codebook);
  for (int64_t i = 0; i < rows; ++i) {
    if (i % 7 == 3) given.features.set(i, i % width, kNaN);
    if (i % 11 == 5) given.features.set(i, i % width, i % 2 ? kInfinity : -kInfinity);
  }
  return given;
}

Search few_search(const Size& size, int64_t distinct, double spread) {
  Search given = random_search(kSingle, size.rows, size.codewords, size.width, 0, false);
  given.codebook = in_clusters(given.codebook, distinct, spread);
  return given;
}

Search repeated_search(int64_t rows, int64_t codewords) {
  Search given = random_search(kSingle, rows, codewords, kWidth);
  given.codebook = repeated_codebook(given.codebook, 20);
  return given;
}

Search collapsed_search(const Geometry& shape, int64_t width) {
  const int64_t rows = 150;
  Search given = search_in_clusters(shape, kSingle, rows, width, 1.5e-3);
  for (int64_t i = 0; i < rows; i += 9) given.features.set(i, 0, kNaN);
  return given;
}

Search clustered_search(const Geometry& shape, int64_t rows, int64_t width, Number number, double spread) {
  Search given = search_in_clusters(shape, number, rows, width, spread);
  given.random = kFindClusters;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < width && i % 9 < 2; ++d) {
      const double near = given.codebook.at(i % given.codebook.rows, d);
      given.features.set(i, d, i % 9 == 0 ? near : (near + given.codebook.at((i + 1) % given.codebook.rows, d)) / 2);
    }
  }
  return given;
}

Search large_search(const Geometry& shape) {
  Search given = clustered_search(shape, 60, 40);
  for (Rows* rows : {&given.features, &given.codebook}) {
    for (int64_t i = 0; i < rows->rows; ++i) {
      for (int64_t d = 0; d < rows->columns; ++d) rows->set(i, d, 0x1p64 * rows->at(i, d));
    }
  }
  return given;
}

Search beside_search(const Geometry& shape) {
  Search given = clustered_search(shape, 90, 40, kSingle, 6.4e-5);
  given.random = false;
  Rows& codebook = given.codebook;
  const int64_t last = codebook.rows - 1;
  for (int64_t d = 0; d < codebook.columns; ++d) {
    const double beside = codebook.at(0, d) * (d % 2 == 0 ? 1 + 0x1p-8 : 1 - 0x1p-8);
    codebook.set(last, d, beside);
    for (int64_t i = 2; i < given.features.rows; i += 9) given.features.set(i, d, beside);
    for (int64_t i = 3; i < given.features.rows; i += 3) {
      const double member = codebook.at(i % (last / kClusters * kClusters), d);
      given.features.set(i, d, member * (0.5 + 0x1p-12) + beside * (0.5 - 0x1p-12));
    }
  }
  return given;
}

Search nested_search(const Geometry& shape, int64_t width) {
  Search given = collapsed_search(shape, width);
  const Rows apart = random_rows(kSingle, given.codebook.rows, width, 5);
  const int64_t half = given.codebook.rows / 2;
  for (int64_t j = half; j < given.codebook.rows; ++j) {
    for (int64_t d = 0; d < width; ++d)
      given.codebook.set(j, d, given.codebook.at(j % kClusters, d) + 1e-6 * apart.at(j, d));
  }
  for (int64_t i = 1; i < given.features.rows; i += 3) {
    for (int64_t d = 0; d < width; ++d) given.features.set(i, d, given.codebook.at(half + i % half, d));
  }
  return given;
}

Search tied_search(const Geometry& shape, float distance) {
  const std::vector<std::vector<int64_t>> places = tied_places(shape.section);
  const int64_t rows = std::max(shape.rows + 1, 65);
  Search given =
      settable_search(rows, round_to(places.back().back() / shape.section * shape.section + 1, shape.columns));
  const Rows bases = random_rows(kSingle, kPatterns, kWidth, 3);
  const auto base_of = [&](int pattern, int d) { return d % 5 == 1 && d < 45 ? 1.0 : bases.at(pattern, d); };
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const int hits = kHits[pattern / kKinds];
    for (int i = 0; i < hits; ++i) {
      for (int d = 0; d < kWidth; ++d) {
        // Each is apart in an element of its own, those that are not tied twice as far.
        const float next = 1 + (is_tied(pattern % kKinds, i, hits) ? distance : 2 * distance);
        given.codebook.set(places[pattern][i], d, d == i * 5 + 1 ? next : base_of(pattern, d));
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pattern = i * 5 % kPatterns;
    const int hits = kHits[pattern / kKinds];
    for (int d = 0; d < kWidth; ++d) given.features.set(i, d, base_of(pattern, d));
    if (distance > 0x1p-12f) given.compared.push_back(hits > kCandidates ? kComparedWithAll : hits);
  }
  return given;
}

Search laddered_search(const Geometry& shape) {
  const int64_t rows = shape.rows + 1, codewords = static_cast<int64_t>(kLadderTiles) * shape.columns;
  const int sections = shape.columns / shape.section;
  Search given = settable_search(rows, codewords);
  const Rows bases = random_rows(kSingle, kLadderCount, kWidth, 3);
  // One for each rung: no codeword is near to another.
  const Rows directions = random_rows(kDouble, kLongestLadder, kWidth, 5);
  const std::vector<int> order = quad_order(shape.section);
  double largest = 0;
  for (int64_t j = 0; j < codewords; ++j) largest = std::max(largest, square_of(given.codebook, j));
  for (int ladder = 0; ladder < kLadderCount; ++ladder) {
    // About twice the bound, as a squared distance: rounding to half precision takes kLost of a norm.
    constexpr double kLost = 0x1.bp-12;
    const double unit = 4 * kLost * std::sqrt(square_of(bases, ladder) * largest);
    int number = ladder / sections * kLongestLadder, direction = 0;
    for (const Rung rung : kLadders[ladder].rungs) {
      const int64_t j = static_cast<int64_t>(rung.tile) * shape.columns + ladder % sections * shape.section +
                        order[number++ % shape.section];
      const double distance = std::sqrt(rung.score * unit / square_of(directions, direction));
      for (int d = 0; d < kWidth; ++d)
        given.codebook.set(j, d, bases.at(ladder, d) + distance * directions.at(direction, d));
      ++direction;
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int d = 0; d < kWidth; ++d) given.features.set(i, d, bases.at(i % kLadderCount, d));
    given.compared.push_back(kLadders[i % kLadderCount].compared);
  }
  return given;
}

}  // namespace unicode_fast::checks
