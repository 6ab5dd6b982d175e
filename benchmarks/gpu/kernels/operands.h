// The operands of a codebook as the device wrote them; the checks of the search use them.
#pragma once

#include "../../../csrc/cuda/nearest_codeword/candidates.h"
#include "../../../csrc/cuda/nearest_codeword/nearest_codeword.h"
#include "rows.h"

namespace unicode_fast::checks {

struct Codes {
  int width = 0;
  int64_t padded = 0;  // codewords
  std::vector<float> mean, spread;
  CodebookNorms largest{};
  int exponent = 0;
  std::vector<double> operands, norms;  // (padded, width), (padded)
};

// The operands row by row, or those in tiles.
Codes read_codes(const OperandsPlan& plan, const std::vector<unsigned char>& bytes, bool tiles);

// The codebook with some codewords that hold NaN or infinities.
Rows spoilt_codebook(const Rows& codebook);

// Copies of some of the first `different` codewords; their first element is a zero of either sign.
Rows repeated_codebook(const Rows& codebook, int64_t different);

}  // namespace unicode_fast::checks
