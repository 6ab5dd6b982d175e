// Problems of the search, and the reference that says what it should find.
#pragma once

#include "operands.h"

namespace unicode_fast::checks {

// A kernel's tile. A warp keeps a list of `part` columns; 0 where the kernel keeps no lists.
struct Geometry {
  const char* kernel;
  MainLoop loop;
  int rows, columns, part;
};

// `splits` 0 leaves their number to the plan.
struct Search {
  Rows features, codebook;
  Layout feature_layout = {}, codebook_layout = {};
  int splits = 0;
  bool random = false;             // few candidates, and none unknown
  std::vector<int> compared = {};  // of each row, where that is known by hand
};

Search random_search(Number number, int64_t rows, int64_t codewords, int64_t width, int splits = 0, bool random = true);
// Rows and codewords that hold NaN or infinities.
Search spoilt_search(Number number, int64_t rows, int64_t codewords, int64_t width);
// Rows whose nearest codewords are 2 to 9 that are the same or one bit apart, in one part of a tile. The nearest stands
// first or last among them. More than a list holds makes the row unknown.
Search tied_search(const Geometry& shape);
// Rows whose candidates come tile by tile at chosen scores above the lowest, in units of the bound: lists are thinned,
// emptied, or overflow on the way.
Search laddered_search(const Geometry& shape);

// Whether the index is right and the distance belongs to it; `codebook` holds its values.
bool is_nearest(const Rows& features, const Rows& codebook, int64_t row, int64_t index, double distance);
// Whether the kernel may have compared so many codewords with this row.
bool may_compare(int compared, const Search& given, int64_t row, const Codes& codes, const Geometry& shape,
                 Splits splits);

}  // namespace unicode_fast::checks
