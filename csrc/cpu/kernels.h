// The inner loops of the CPU operators, compiled for several instruction sets; `kernels()` picks at run time.
#pragma once

#include <cstdint>
#include <vector>

namespace unicode_fast::cpu {

// Largest over the codewords: squared norm before rounding, norm after it, norm of what it took away.
struct LargestNorms {
  double squared = 0, rounded = 0, residual = 0;
};

// Facts that all codewords share. Centred means minus the mean codeword. Scaled means times `scale`, a power of two
// that brings the largest element near one.
struct CodebookFacts {
  int64_t codewords = 0, width = 0;
  int32_t dtype = 0;   // of torch, of the codebook
  int32_t finite = 1;  // 0 where a codeword holds NaN or infinity: then every row is compared directly
  double scale = 1;
  LargestNorms largest;
};

// A codebook prepared for searches; docs/exactness.md has the bound that uses its numbers. Its arrays lie in memory of
// its owner.
struct PreparedCodebook : CodebookFacts {
  float* mean = nullptr;  // (width)
  // Panels of as many codewords as a kernel scores at once. Operands are rounded, dimension before codeword; norms are
  // squared, of the centred and scaled codewords before rounding. Codewords that only fill a panel have infinite norms.
  uint32_t* operands = nullptr;
  float* norms = nullptr;
};

// Rows in memory: element (i, d) at data[i * stride + d].
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;
};

// Sums over the rows of one modality; rows that are not valid are left out. Masks are bytes, because a bool that is
// neither 0 nor 1 may be read as both.
template <typename T>
struct RowSums {
  std::vector<const T*> features;     // (rows, width) by modality, contiguous
  std::vector<const T*> partners;     // the same, or empty for the rows of the other modalities at the same place
  std::vector<const int64_t*> index;  // (rows) by modality
  std::vector<const uint8_t*> valid;  // (rows) by modality, or empty for all
  std::vector<int64_t> rows;          // by modality
  std::vector<double> weight;         // of each modality's mixed rows
  double own_weight;
  int64_t width;
};

// Weighted squared distances of one modality's rows to the codewords of all modalities at the same positions.
template <typename T>
struct Commitment {
  const T* features;                  // (rows, width), contiguous
  const T* codebook;                  // (codewords, width)
  std::vector<const int64_t*> index;  // (rows) by modality
  const uint8_t* own_valid;           // (rows), or null where every row is
  std::vector<const uint8_t*> valid;  // the same by modality, or empty
  std::vector<T> scale;               // of each modality's distances
  int64_t width;
};

struct Kernels {
  const char* name;
  // Codewords in a panel, and dimensions in one of its 32-bit operands.
  int64_t panel, pair;
  // Fills the panels [first, last) of operands and norms, which have their sizes already, and raises `largest`.
  void (*prepare)(PreparedCodebook& codes, const double* codebook, int64_t first, int64_t last, LargestNorms& largest);
  // The search over `count` rows.
  void (*search_float)(const PreparedCodebook& codes, const float* codebook, Rows<float> rows, int64_t count,
                       int64_t* index, float* distance);
  void (*search_double)(const PreparedCodebook& codes, const double* codebook, Rows<float> rows, int64_t count,
                        int64_t* index, float* distance);
  // Every distance by direct differences.
  void (*direct_float)(const float* codebook, int64_t codewords, int64_t width, Rows<double> rows, int64_t count,
                       int64_t* index, double* distance);
  void (*direct_double)(const double* codebook, int64_t codewords, int64_t width, Rows<double> rows, int64_t count,
                        int64_t* index, double* distance);
  // Adds the columns [first, last) of all mixed rows to `sums` (codewords, width), in the order of the rows.
  void (*add_float)(const RowSums<float>& batch, int64_t first, int64_t last, double* sums);
  void (*add_double)(const RowSums<double>& batch, int64_t first, int64_t last, double* sums);
  // The weighted sum over the rows [first, last); the gradient goes to `direction` (rows, width).
  double (*commit_float)(const Commitment<float>& batch, int64_t first, int64_t last, float* direction);
  double (*commit_double)(const Commitment<double>& batch, int64_t first, int64_t last, double* direction);
};

// Mean, scale and finiteness of a codebook; `codes` has its size already.
void centre(PreparedCodebook& codes, const double* values);

// Kernels for the best instruction set of this processor, or for that of UNICODE_FAST_CPU (portable, avx2, avx512,
// avx512_bf16) if the processor has it.
const Kernels& kernels();

}  // namespace unicode_fast::cpu
