// The inner loops of the CPU operators, compiled for several instruction sets; `kernels()` picks at run time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

namespace unicode_fast::cpu {

// The largest integer of an operand. The products of a row and a codeword whose norms are at most `largest_norm` add up
// to less than 2^31.
constexpr double kLargestInteger = 32767;
inline double largest_norm(int64_t width) {
  // Rounding lengthens a vector by at most sqrt(width) / 2.
  const double rounding = std::sqrt(static_cast<double>(width)) / 2;
  return std::max(46000 - rounding, 1000.0);
}

// The last place of a float32 number near one; a float32 sum of `width` squares, times this factor, is not too small.
constexpr double kUnit = 0x1p-23;
inline double inflation(int64_t width) { return 1 + static_cast<double>(width + 16) * kUnit; }

// Largest over the codewords: squared norm in scaled units; norm of the integers, and of what rounding took away.
struct LargestNorms {
  double squared = 0, rounded = 0, residual = 0;
};

// Facts that all codewords share. Centred means minus the mean codeword. Scaled means times `scale`, a power of two
// that brings the largest element near one. Operands are integers: scaled numbers times `steps`, rounded.
struct CodebookFacts {
  int64_t codewords = 0, width = 0;
  int64_t kept = 0;    // codewords without those that equal an earlier one
  int32_t dtype = 0;   // of torch, of the codebook
  int32_t finite = 1;  // 0 where integers do not serve, as with NaN: then every row is compared directly
  double scale = 1;
  float steps = 1;
  LargestNorms largest;
};

// A codebook prepared for searches; docs/exactness.md has the bound that uses its numbers. Its arrays lie in memory of
// its owner.
struct PreparedCodebook : CodebookFacts {
  float* mean = nullptr;  // (width)
  // Panels of as many codewords as a kernel scores at once. Operands are pairs of 16-bit integers, dimension before
  // codeword; norms are squared, of the centred and scaled codewords before rounding. Codewords that only fill a panel
  // have infinite norms.
  uint32_t* operands = nullptr;
  float* norms = nullptr;
  int32_t* places = nullptr;  // in the codebook, of the codewords kept, ascending
};

// Runs `body` on ranges that make up [0, count), of at least `grain`, perhaps on several threads.
using Body = std::function<void(int64_t first, int64_t last)>;
using Parallel = std::function<void(int64_t count, int64_t grain, const Body& body)>;
inline void run_here(int64_t count, int64_t /*grain*/, const Body& body) { body(0, count); }

// Codewords that rows could not tell apart, prepared by themselves.
struct Cluster {
  std::vector<uint64_t> set;  // a bit for each codeword kept of the whole codebook
  PreparedCodebook codes;
  std::vector<float> mean, norms;
  std::vector<uint32_t> operands;
  std::vector<int32_t> places;
};

struct Clusters {
  std::vector<int32_t> of;  // the cluster of each codeword kept, or -1
  std::vector<std::unique_ptr<Cluster>> all;
  size_t loose = 0;  // sets that were no cluster
};

// The codewords that may be the nearest to a row: a list, or where it is too short a set of bits.
struct Candidates {
  static constexpr int kRoom = 12;
  float smallest, margin, limit;
  int32_t count, set;  // codewords in the list; number of the set, or -1
  int32_t place[kRoom];
  float score[kRoom];

  void start(float twice_the_error) {
    smallest = std::numeric_limits<float>::infinity();
    margin = twice_the_error;
    count = 0;
    set = -1;
    // Beyond 1e30 scores could overflow, so there are no candidates. The comparison is false for NaN.
    limit = twice_the_error < 1e30f ? std::numeric_limits<float>::max() : -std::numeric_limits<float>::infinity();
  }

  void lower(float value) {
    if (value >= smallest) return;
    const float before = smallest, sum = value + margin;
    smallest = value;
    limit = sum + std::abs(sum) * 1e-6f + std::numeric_limits<float>::min();
    if (before > limit) count = 0, set = -1;
  }

  // Adds the codewords of a panel whose bits are set in `hits`; `first` is the panel's first codeword. `sets` holds
  // `words` words for each set.
  void add(int32_t first, uint64_t hits, const float* values, int64_t words, std::vector<uint64_t>& sets) {
    if (set < 0 && count + __builtin_popcountll(hits) > kRoom) forget();
    if (set < 0 && count + __builtin_popcountll(hits) > kRoom) {
      set = static_cast<int32_t>(sets.size() / words);
      sets.resize(sets.size() + words, 0);
      for (int32_t n = 0; n < count; ++n) sets[set * words + place[n] / 64] |= uint64_t{1} << place[n] % 64;
    }
    if (set >= 0) {
      sets[set * words + first / 64] |= hits << first % 64;
      return;
    }
    for (; hits != 0; hits &= hits - 1) {
      const int lane = __builtin_ctzll(hits);
      place[count] = first + lane;
      score[count++] = values[lane];
    }
  }

  // Drops the candidates that a smaller score has ruled out.
  void forget() {
    int32_t kept = 0;
    for (int32_t n = 0; n < count; ++n) {
      if (score[n] > limit) continue;
      place[kept] = place[n];
      score[kept++] = score[n];
    }
    count = kept;
  }
};

// Memory of one thread, used again by its next rows, and the clusters found so far.
struct Scratch {
  std::vector<uint32_t> operands;
  std::vector<float> centred, factors;
  std::vector<Candidates> candidates;
  std::vector<uint64_t> sets;
  Clusters clusters;
  std::unique_ptr<Scratch> next;  // of a search among the codewords of a cluster
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

// Of a row of scores: the largest, the sum of exponentials of scores minus the largest, the own score, and whether that
// is the first of the largest.
template <typename T>
struct Softmax {
  T largest, sum, own;
  bool hit;
};

// Loops of cross_info_nce over scores, which may be infinite or NaN.
template <typename T>
struct SoftmaxLoops {
  Softmax<T> (*softmax)(const T* scores, int64_t number, int64_t own);
  // Adds rows of scores to the largest score and the sum of exponentials of each column, at first -infinity and 0.
  void (*add_to_columns)(const T* scores, int64_t stride, int64_t rows, int64_t columns, T* largest, T* sums);
  // Scores become exp(score - largest) * factor; with columns, plus the same for each score's column. A factor of 0
  // gives 0 whatever the score.
  void (*slopes)(T* scores, int64_t number, T largest, T factor, const T* column_largest, const T* column_factor);
};

// Below this squared distance the slope of the square root counts as 0; at distance 0 it would be infinite.
constexpr double kSmallestSquaredDistance = 1e-12;

// Loops of codeword_distribution over one position. Numbers may be infinite or NaN.
template <typename T>
struct DistributionLoops {
  // row - middle; returns its squared norm.
  T (*centre)(const T* row, const T* middle, int64_t width, T* centred);
  // Products with the codewords become distances, from the squared norms of the codewords and of the position.
  void (*distances)(T* products, int64_t codewords, const T* norms, T norm);
  // Adds weight * softmax(scores * factor) to `sums`. The scores are overwritten.
  void (*mix)(T* scores, int64_t number, T factor, T weight, T* sums);
  // Distances become minus the slopes in half their squares, for a gradient in the weighted probabilities; returns
  // their sum. The factor is that of the distances in the softmax.
  T (*slopes)(T* distances, int64_t codewords, T factor, T weight, const T* gradient, T* scratch);
};

// Bounds of the loss for codewords to occur: a position has a codeword at most with this probability, and a logarithm
// is that of a number above this one.
constexpr float kMostPresent = 1 - 1e-4, kLeastPresent = 1e-6;

// Queries, keys and values of one clip, (length, 3, heads, width), and what scales and masks their products.
struct Attention {
  const float* vectors;
  const uint8_t* valid;  // (length) of the keys, or null where every one is
  const float* factors;  // (heads, length, length) of the probabilities, from dropout; or null
  int64_t length, heads, width;
};

// Layer norm of a sum of two tensors, by row.
struct AddNorm {
  const float *weight, *bias;  // (width)
  int64_t width;
  float epsilon;
};

// Rows whose columns are normalised by their mean and variance over the valid rows.
struct BatchNorm {
  const float* values;   // (rows, width)
  const uint8_t* valid;  // (rows), or null where every row is
  int64_t rows, width;
  int64_t count;  // of valid rows, at least 1
  float epsilon;
};

// What Adam multiplies and adds: the factor of clipped gradients; the moments' decay and the new number's share of
// them; the rate and the factor of the squares' root, both with their correction of early steps; epsilon.
struct AdamFactors {
  float clip, mean_decay, mean_share, square_decay, square_share, rate, root, epsilon;
};

// A number of columns up to whole registers of every instruction set.
constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// Numbers of scratch memory that the attention of a clip needs.
constexpr int64_t attention_scratch(const Attention& clip) {
  const int64_t columns = padded(clip.length);
  return clip.width * columns + clip.length * (padded(clip.width) + 2 * columns);
}

// A linear layer. Columns of its matrices are padded, and 0 there.
struct Dense {
  int64_t inputs, outputs;
  const float* weight;      // (outputs, inputs)
  const float* transposed;  // (inputs, outputs)
  const float* bias;        // (outputs), not padded
};

// What becomes of a product: it is stored; its ReLU is; it is added; it is stored where the number there is positive,
// and 0 elsewhere, which is the gradient of a ReLU's result.
enum class Onto { kStore, kRectify, kAdd, kMask };

// Some rows of a CLUB network's results, (rows, width) with padded columns. Kernels replace them by their gradients.
struct ClubRows {
  int64_t rows, width;
  float *mean, *log_variance;  // a log variance is the hyperbolic tangent of the number here
  const float* specific;       // (all rows, width)
  const int64_t* places;       // (rows) in `specific`
  float share;                 // of a row in the mean
};

// What the estimate of mutual information takes beside: moments of `specific` over clips, (width) with padded columns.
// It adds sums over rows to the others unless `in_specific` is null.
struct ClubMoments {
  const float *centre, *spread;
  float* in_specific;               // (all rows, width), without the gradient through the moments
  float *precisions, *differences;  // (width): of 1 / variance, and of (mean - centre) / variance
};

struct Kernels {
  const char* name;
  int64_t panel;  // codewords in a panel
  // Fills `codes`: its sizes are set, its arrays have room for every codeword.
  void (*prepare_float)(PreparedCodebook& codes, const float* codebook, const Parallel& parallel);
  void (*prepare_double)(PreparedCodebook& codes, const double* codebook, const Parallel& parallel);
  // The search of `count` rows, each contiguous.
  void (*search_float)(const PreparedCodebook& codes, const float* codebook, const float* const* rows, int64_t count,
                       int64_t* index, float* distance, Scratch& scratch);
  void (*search_double)(const PreparedCodebook& codes, const double* codebook, const float* const* rows, int64_t count,
                        int64_t* index, float* distance, Scratch& scratch);
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
  SoftmaxLoops<float> softmax_float;
  SoftmaxLoops<double> softmax_double;
  DistributionLoops<float> distribution_float;
  DistributionLoops<double> distribution_double;
  // One head of the attention in a clip. `probabilities` is (heads, length, length), `mixed` (length, heads, width).
  void (*attend)(const Attention& clip, int64_t head, float* probabilities, float* mixed, float* scratch);
  // The gradient in the clip's vectors, from that in `mixed`.
  void (*attend_backward)(const Attention& clip, int64_t head, const float* probabilities, const float* gradient,
                          float* in_vectors, float* scratch);
  // Rows through a linear layer, all with padded columns: results, gradients in parameters and in inputs. Gradients in
  // parameters are added.
  void (*dense)(const Dense& layer, const float* inputs, int64_t rows, Onto onto, float* results);
  void (*dense_parameters)(const Dense& layer, const float* inputs, const float* gradient, int64_t rows,
                           float* in_weight, float* in_bias);
  void (*dense_inputs)(const Dense& layer, const float* gradient, int64_t rows, Onto onto, float* in_inputs);
  // Gradients of the mean over rows of the negative log likelihood.
  void (*club_likelihood)(const ClubRows& batch);
  // Gradients of the CLUB estimate; returns its sum over rows.
  double (*club_estimate)(const ClubRows& batch, const ClubMoments& moments);
  // Rows of logits, factor * from + shifts, become logits whose exponentials add up to 1, or at last these. Each row's
  // exponentials, times its weight, are added to `sums`. The scratch memory has a number for each column.
  void (*balance_rows)(const float* from, float factor, const float* shifts, const float* weights, int64_t rows,
                       int64_t columns, bool last, float* to, float* sums, float* scratch);
  // -sum target * log softmax(scores) of a row, and its softmax; then the gradient in the scores from that in the loss.
  float (*cross_entropy)(const float* scores, const float* target, int64_t number, float* softmax);
  void (*cross_entropy_slopes)(const float* softmax, const float* target, int64_t number, float gradient, float* to);
  // The softmax of a position's scores. It is added to the probabilities that the clip has each codeword, and those
  // that it has not are multiplied by the rest.
  void (*hold)(const float* scores, int64_t number, float* softmax, float* held, float* missing);
  // The gradient in the scores of a position. That in the probability p of a codeword is -gradient / (1 - p).
  void (*presence_slopes)(const float* softmax, const float* gradient, int64_t number, float* to);
  // The generator MT19937: the next state of 624 numbers, and the numbers it gives.
  void (*twist)(uint32_t* state);
  void (*temper)(const uint32_t* state, int64_t count, uint32_t* numbers);
  // From two numbers each, the higher one first: `factor` if their lowest 53 bits are below `threshold`, else 0.
  void (*draw_factors)(const uint32_t* numbers, int64_t count, uint64_t threshold, float factor, float* factors);
  // max(values, 0) * factors, also where a factor is not finite; the gradient in the values.
  void (*rectify)(const float* values, const float* factors, int64_t count, float* result);
  void (*rectify_backward)(const float* result, const float* gradient, float factor, int64_t count, float* in_values);
  float (*squared_distance)(const float* first, const float* second, int64_t count);
  void (*scaled_difference)(const float* first, const float* second, float factor, int64_t count, float* result);
  // Of a row first + second * factors, or without factors if they are null: the row normalised, its scale, the result.
  void (*add_norm)(const AddNorm& layer, const float* first, const float* second, const float* factors, float* normal,
                   float* scale, float* result);
  // Adds to the gradients in weight and bias; without factors that in `second` is that in `first`, and is not written.
  void (*add_norm_backward)(const AddNorm& layer, const float* gradient, const float* normal, float scale,
                            const float* factors, float* in_first, float* in_second, float* in_weight, float* in_bias);
  // The columns [first, last). `sums` is scratch memory of as many numbers; in the gradient, whose `batch` has the
  // normalised rows, of twice as many.
  void (*batch_norm)(const BatchNorm& batch, int64_t first, int64_t last, float* mean, float* variance, float* result,
                     double* sums);
  void (*batch_norm_backward)(const BatchNorm& batch, int64_t first, int64_t last, const float* variance,
                              const float* gradient, float* in_values, double* sums);
  double (*sum_of_squares)(const float* numbers, int64_t count);
  // A step of Adam for numbers of one parameter.
  void (*adam)(const AdamFactors& factors, const float* gradients, int64_t count, float* parameters, float* means,
               float* squares);
};

// Kernels for the best instruction set of this processor, or for that of UNICODE_FAST_CPU (portable, avx2, avx_vnni,
// avx512, avx512_vnni) if the processor has it.
const Kernels& kernels();

}  // namespace unicode_fast::cpu
