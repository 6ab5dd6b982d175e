// Problems of the search, and the reference with their results.
#pragma once

#include "operands.h"

namespace unicode_fast::checks {

// A kernel's tile. A warp keeps a list for `section` of its columns; 0 where the kernel keeps no lists.
struct Geometry {
  const char* kernel;
  MainLoop loop;
  int rows, columns, section;
};

// `splits` 0 leaves their number to the plan.
struct Search {
  Rows features, codebook;
  Layout feature_layout = {}, codebook_layout = {};
  int splits = 0;
  bool random = false;             // few candidates, and none unknown
  std::vector<int> compared = {};  // of each row, where that is known by hand
};

// The codebook holds copies of a few codewords; no row may have more candidates for that.
Search repeated_search(int64_t rows, int64_t codewords);
// Three tight clusters of codewords: each row has more candidates than a list holds, or holds NaN.
Search collapsed_search(const Geometry& shape, int64_t width);

// The codebook holds so many random codewords, and others equal to these, or near if `spread` is not 0.
Search few_search(const Size& size, int64_t distinct, double spread);

Search random_search(Number number, int64_t rows, int64_t codewords, int64_t width, int splits = 0, bool random = true);
// Rows and codewords that hold NaN or infinities.
Search spoilt_search(Number number, int64_t rows, int64_t codewords, int64_t width);
// Three clusters so tight that one codeword can stand for each. Rows far from all, between two, and equal to a
// codeword.
Search clustered_search(const Geometry& shape, int64_t rows, int64_t width, Number number = kSingle,
                        double spread = 1e-6);
// The same for numbers so large that float32 holds no squared distance.
Search large_search(const Geometry& shape);
// And a codeword so near to one of the clusters that rows near to it have both as candidates. Some rows are equal to
// it, some are nearer to it than to the cluster's representative, and nearest to a member.
Search beside_search(const Geometry& shape);
// As collapsed_search, and half of the codewords are so near to the first of a cluster that this can stand for them.
// Some rows are equal to these.
Search nested_search(const Geometry& shape, int64_t width);
// Rows with 2 to 9 near codewords at this distance or at twice that, in one section of a tile. The nearest one is the
// first or the last of them. A row with more of them than a list holds is compared with all codewords, if the distance
// is too large for a cluster.
Search tied_search(const Geometry& shape, float distance = 0x1p-6f);
// Rows whose candidates come tile by tile, at chosen scores above the lowest, in units of the bound. On the way lists
// are thinned, are emptied, or overflow.
Search laddered_search(const Geometry& shape);

// Whether the index is right and the distance belongs to it; `codebook` holds its values.
bool is_nearest(const Rows& features, const Rows& codebook, int64_t row, int64_t index, double distance);
// Whether the kernel may have compared so many codewords with this row.
bool may_compare(int compared, const Search& given, int64_t row, const Codes& codes, const Geometry& shape,
                 Splits splits);

}  // namespace unicode_fast::checks
