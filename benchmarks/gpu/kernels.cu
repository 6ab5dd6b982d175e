// The kernels of csrc/cuda without torch: each launcher against plain float64 loops on the host, and its time.
//
//   kernels [--size small|target] [--only NAME,...] [--times]
//
// Prints a line of JSON for each case. Exits with 0 where all is well, 1 where a row was wrong, 2 where CUDA reported
// an error. UNICODE_FAST_FAULT=NAME:crash|hang|wrong,... makes a kernel fail, to try what reads the lines.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/common/counter_random.h"
#include "../../csrc/cuda/codebook_update/codebook_update.h"
#include "../../csrc/cuda/commitment/commitment.h"
#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/nearest_codeword/candidates.h"
#include "../../csrc/cuda/nearest_codeword/hopper_tiles.h"
#include "../../csrc/cuda/nearest_codeword/nearest_codeword.h"

namespace unicode_fast::cuda {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
// What float64 sums in another order, and numbers rounded once to float32, may differ by, relative to their terms.
constexpr double kSumTolerance = 0x1p-40, kFloatTolerance = 0x1p-22;
// Of random data: the most candidates of a row on average.
constexpr double kMostCandidates = 1.5;
constexpr int64_t kSampledRows = 256, kSampledCodewords = 16;
constexpr int kTargetRepeats = 25, kWarmUps = 3;
constexpr size_t kFlushBytes = size_t{256} << 20;  // several times the second cache

bool target_size = false, measures_times = false;

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw CudaError(std::string(what) + ": " + cudaGetErrorString(error));
}

void finish_launch(cudaError_t error, const char* what) {
  check(error, what);
  check(cudaGetLastError(), what);
  check(cudaDeviceSynchronize(), what);
}

// Runs f(i) for i in [0, number) on all cores.
template <class F>
void in_threads(int64_t number, const F& f) {
  const auto threads = std::min<int64_t>(number, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> running;
  for (int64_t t = 0; t < threads; ++t)
    running.emplace_back([=, &f] {
      for (int64_t i = t; i < number; i += threads) f(i);
    });
  for (std::thread& thread : running) thread.join();
}

// Device memory of exactly this many numbers, so that a checker sees reads beyond them; all bits are set at first.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    if (count > 0) check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    poison();
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    if (count_ > 0) check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* get() const { return data_; }
  void poison() {
    if (count_ > 0) check(cudaMemset(data_, 0xff, count_ * sizeof(T)), "cudaMemset");
  }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    if (count_ > 0) check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

// Median time of `launch`, the second cache flushed before each at target size; nothing where no times are wanted.
std::optional<double> median_ms(const std::function<cudaError_t()>& launch) {
  if (!measures_times) return std::nullopt;
  const int repeats = target_size ? kTargetRepeats : 1;
  const Device<unsigned char> flushed(target_size ? kFlushBytes : 1);
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<double> times;
  for (int i = -kWarmUps; i < repeats; ++i) {
    if (i < 0 && !target_size) continue;
    check(cudaMemsetAsync(flushed.get(), i & 1, target_size ? kFlushBytes : 1, nullptr), "cudaMemsetAsync");
    check(cudaEventRecord(start, nullptr), "cudaEventRecord");
    check(launch(), "launch");
    check(cudaEventRecord(end, nullptr), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds);
  }
  check(cudaEventDestroy(start), "cudaEventDestroy");
  check(cudaEventDestroy(end), "cudaEventDestroy");
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Numbers of the four types.

size_t size_of(Number number) { return number == Number::kFloat64 ? 8 : number == Number::kFloat32 ? 4 : 2; }

void put(Number number, double value, void* to) {
  const auto single = static_cast<float>(value);
  const __half half = __float2half_rn(single);
  const __nv_bfloat16 brain = __float2bfloat16_rn(single);
  const void* from = number == Number::kFloat64   ? static_cast<const void*>(&value)
                     : number == Number::kFloat32 ? static_cast<const void*>(&single)
                     : number == Number::kFloat16 ? static_cast<const void*>(&half)
                                                  : static_cast<const void*>(&brain);
  std::memcpy(to, from, size_of(number));
}

template <class T>
T bits_at(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

double get(Number number, const void* from) {
  switch (number) {
    case Number::kFloat64:
      return bits_at<double>(from);
    case Number::kFloat32:
      return bits_at<float>(from);
    case Number::kFloat16:
      return __half2float(bits_at<__half>(from));
    default:
      return __bfloat162float(bits_at<__nv_bfloat16>(from));
  }
}

double rounded(Number number, double value) {
  unsigned char bytes[8];
  put(number, value, bytes);
  return get(number, bytes);
}

// About normal, the same bits on host and device: a sum of twelve uniform numbers. The factor fills the mantissa.
UNICODE_FAST_BOTH double draw(uint64_t key, int64_t place) {
  int64_t sum = 0;
  for (int part = 0; part < 3; ++part) {
    for (uint64_t bits = counter_random::random_bits(key, place * 3 + part); bits != 0; bits >>= 16)
      sum += static_cast<int64_t>(bits & 0xffff);
  }
  return static_cast<double>(sum - 6 * 0xffff) * (0x1p-16 * 1.000030517578125123);
}

constexpr int kFillThreads = 256;

// values[i] = draw(key, i).
template <class T>
__global__ void __launch_bounds__(kFillThreads) fill_kernel(uint64_t key, int64_t number, T* values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (i < number) values[i] = static_cast<T>(draw(key, i));
}

// A matrix on the host; element (i, d) is draw(key, i columns + d) where it holds no values.
struct Rows {
  Number number;
  int64_t rows, columns;
  uint64_t key;
  std::vector<double> values = {};

  double at(int64_t row, int64_t column) const {
    const int64_t place = row * columns + column;
    return values.empty() ? rounded(number, draw(key, place)) : values[place];
  }
  void set(int64_t row, int64_t column, double value) { values[row * columns + column] = rounded(number, value); }
  void keep() {
    std::vector<double> all(rows * columns);
    in_threads(rows, [&](int64_t i) {
      for (int64_t d = 0; d < columns; ++d) all[i * columns + d] = at(i, d);
    });
    values = std::move(all);
  }
};

Rows random_rows(Number number, int64_t rows, int64_t columns, int64_t stream) {
  return {number, rows, columns, counter_random::key(7, 0, stream)};
}

Rows kept(Rows rows) {
  rows.keep();
  return rows;
}

// How a matrix lies in memory: elements before it and between its rows, and from one column to the next.
struct Layout {
  int64_t offset = 0, gap = 0, column_stride = 1;
};

class DeviceRows {
 public:
  DeviceRows(const Rows& rows, Layout layout)
      : layout_(layout),
        number_(rows.number),
        rows_(rows.rows),
        columns_(rows.columns),
        row_stride_(rows.columns * layout.column_stride + layout.gap),
        bytes_((rows.rows == 0 ? 0 : place(rows.rows - 1, rows.columns - 1) + 1) * size_of(rows.number)) {
    if (rows.values.empty() && bytes_size() == rows.rows * rows.columns * size_of(number_) &&
        size_of(number_) >= sizeof(float)) {
      number_ == Number::kFloat32 ? fill<float>(rows) : fill<double>(rows);
      return;
    }
    std::vector<unsigned char> bytes(bytes_size(), 0xff);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t d = 0; d < columns_; ++d) put(number_, rows.at(i, d), &bytes[place(i, d) * size_of(number_)]);
    }
    if (!bytes.empty())
      check(cudaMemcpy(bytes_.get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
  }

  Matrix view() const {
    return {
        bytes_.get() + layout_.offset * size_of(number_), number_, rows_, columns_, row_stride_, layout_.column_stride};
  }
  void* data() const { return bytes_.get() + layout_.offset * size_of(number_); }
  std::vector<double> host() const {
    const std::vector<unsigned char> bytes = bytes_.host();
    std::vector<double> values;
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t d = 0; d < columns_; ++d) values.push_back(get(number_, &bytes[place(i, d) * size_of(number_)]));
    }
    return values;
  }

 private:
  int64_t place(int64_t row, int64_t column) const {
    return layout_.offset + row * row_stride_ + column * layout_.column_stride;
  }
  size_t bytes_size() const { return rows_ == 0 ? 0 : (place(rows_ - 1, columns_ - 1) + 1) * size_of(number_); }
  template <class T>
  void fill(const Rows& rows) {
    const int64_t number = rows_ * columns_;
    if (number == 0) return;
    const auto blocks = static_cast<unsigned>((number + kFillThreads - 1) / kFillThreads);
    UNICODE_FAST_LAUNCH(blocks, kFillThreads, 0, nullptr, fill_kernel<T>)(rows.key, number,
                                                                          reinterpret_cast<T*>(bytes_.get()));
    finish_launch(cudaGetLastError(), "fill_kernel");
  }

  Layout layout_;
  Number number_;
  int64_t rows_, columns_, row_stride_;
  Device<unsigned char> bytes_;
};

// What became of a case.
struct Result {
  int64_t rows = 0, wrong = 0, fallback = -1;  // -1: the kernel has none
  double candidates = kNaN;                    // of the other rows, on average
  std::optional<double> median_ms = {};
  std::string message = {};

  void demand(bool condition, const std::string& otherwise) {
    if (condition) return;
    ++wrong;
    if (message.empty()) message = otherwise;
  }
};

bool is_close(double got, double wanted, double tolerance) {
  return got == wanted || (std::isnan(got) && std::isnan(wanted)) || std::abs(got - wanted) <= tolerance;
}

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

void demand_close(Result& result, const char* name, int64_t place, double got, double wanted, double tolerance) {
  if (!is_close(got, wanted, tolerance))
    result.demand(
        false, std::string(name) + "[" + std::to_string(place) + "] is " + text_of(got) + ", not " + text_of(wanted));
}

// The operands of a codebook as the device wrote them.
struct Codes {
  int width = 0;
  int64_t padded = 0;
  std::vector<float> mean, spread;
  unsigned facts[3];  // CodebookNorms
  int exponent = 0;
  std::vector<double> operands, norms;  // (padded, width), (padded)

  CodebookNorms largest() const {
    return {bits_at<float>(&facts[0]), bits_at<float>(&facts[1]), bits_at<float>(&facts[2])};
  }
};

Codes read_codes(const OperandsPlan& plan, const std::vector<unsigned char>& bytes, bool tiles) {
  Codes codes;
  codes.width = plan.width;
  codes.padded = plan.codewords;
  for (int d = 0; d < plan.width; ++d) {
    codes.mean.push_back(bits_at<float>(&bytes[plan.mean + d * 4]));
    codes.spread.push_back(bits_at<float>(&bytes[plan.spread + d * 4]));
  }
  std::memcpy(codes.facts, &bytes[plan.facts], sizeof codes.facts);
  codes.exponent = bits_at<int>(&bytes[plan.facts + sizeof codes.facts]);
  for (int64_t j = 0; j < plan.codewords; ++j) {
    for (int d = 0; d < plan.width; ++d) {
      const size_t place =
          tiles ? plan.tile_operands + operand_place(j, d, plan.width) : plan.operands + (j * plan.width + d) * 2;
      codes.operands.push_back(get(Number::kFloat16, &bytes[place]));
    }
    const size_t place = tiles ? plan.tile_operands + norm_place(j, plan.width) : plan.norms + j * 4;
    codes.norms.push_back(bits_at<float>(&bytes[place]));
  }
  return codes;
}

// operands

void check_codes(Result& result, const Rows& codebook, const Codes& codes) {
  double largest = 0;
  for (int d = 0; d < codes.width; ++d) {
    double sum = 0, size = 0, low = kInfinity, high = -kInfinity;
    int64_t count = 0;
    for (int64_t j = 0; d < codebook.columns && j < codebook.rows; ++j) {
      const double value = codebook.at(j, d);
      if (!std::isfinite(value)) continue;
      sum += value;
      size += std::abs(value);
      low = std::min(low, value);
      high = std::max(high, value);
      ++count;
    }
    const double mean = count > 0 ? sum / static_cast<double>(count) : 0, centre = codes.mean[d];
    const double slack = count > 0 ? size / static_cast<double>(count) * kSumTolerance : 0;
    demand_close(result, "mean", d, centre, mean, std::abs(mean) * 0x1p-24 + slack);
    const float spread = count > 0 ? round_up(std::max(high - centre, centre - low)) : 0.0f;
    demand_close(result, "spread", d, codes.spread[d], spread, 0);
    largest = std::max<double>(largest, codes.spread[d]);
  }
  demand_close(result, "exponent", 0, codes.exponent, codebook_scale(largest), 0);
  const double scale = std::ldexp(1.0, codes.exponent);
  double most[3] = {0, 0, 0};
  for (int64_t j = 0; j < codes.padded; ++j) {
    bool left_out = j >= codebook.rows;
    for (int64_t d = 0; !left_out && d < codebook.columns; ++d) left_out = !std::isfinite(codebook.at(j, d));
    double exact = 0, kept = 0, residual = 0;
    for (int d = 0; d < codes.width; ++d) {
      const double value = !left_out && d < codebook.columns ? (codebook.at(j, d) - codes.mean[d]) * scale : 0.0;
      const double half = rounded(Number::kFloat16, value);
      demand_close(result, "operands", j * codes.width + d, codes.operands[j * codes.width + d], half, 0);
      exact += value * value;
      kept += half * half;
      residual += (value - half) * (value - half);
    }
    demand_close(result, "norms", j, codes.norms[j], left_out ? kInfinity : exact, exact * 0x1p-23);
    if (left_out) continue;
    most[0] = std::max(most[0], exact);
    most[1] = std::max(most[1], std::sqrt(kept));
    most[2] = std::max(most[2], std::sqrt(residual));
  }
  for (int i = 0; i < 3; ++i)
    demand_close(result, "facts", i, bits_at<float>(&codes.facts[i]), most[i], most[i] * 0x1p-22);
}

Result operands_case(const Rows& codebook, Layout layout) {
  const DeviceRows given(codebook, layout);
  OperandsPlan plan;
  check(plan_operands(given.view(), plan), "plan_operands");
  Result result;
  result.rows = codebook.rows;
  result.demand(plan.rows && plan.tiles, "this GPU has not both layouts of operands");
  const Device<unsigned char> operands(plan.bytes);
  const auto launch = [&] { return launch_operands(plan, given.view(), operands.get(), nullptr); };
  finish_launch(launch(), "launch_operands");
  const std::vector<unsigned char> bytes = operands.host();
  const Rows truth = kept(codebook);
  if (plan.rows) check_codes(result, truth, read_codes(plan, bytes, false));
  if (plan.tiles) check_codes(result, truth, read_codes(plan, bytes, true));
  result.median_ms = median_ms(launch);
  return result;
}

// search

// A kernel's tile, and the columns of it that a warp keeps a list of.
struct Geometry {
  const char* kernel;
  MainLoop loop;
  int rows, columns, part;
};

// The same as comparable() and nearer() say, by the reference.
double key_of(double distance) { return std::isnan(distance) ? kInfinity : std::min(distance, DBL_MAX); }

double squared_distance(const double* x, const double* c, int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; ++d) sum += (x[d] - c[d]) * (x[d] - c[d]);
  return sum;
}

// Whether the index is right and the distance belongs to it; `codebook` holds its values.
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
  const bool wide = features.number == Number::kFloat64;
  const double wanted = wide ? own : static_cast<float>(own);
  return is_close(distance, wanted, wide ? own * 4 * static_cast<double>(width) * 0x1p-53 : own * 0x1p-23 + 0x1p-149);
}

// How many codewords finish_kernel should compare with a row, from scores and the width of the bound on them: what each
// list keeps is followed tile by tile.
int count_compared(const std::vector<double>& scores, double twice_bound, const Geometry& shape, Splits splits) {
  const auto codewords = static_cast<int64_t>(scores.size());
  const int64_t tiles = (codewords + shape.columns - 1) / shape.columns;
  const int parts = shape.columns / shape.part;
  std::vector<double> lowest_of(splits.count, kInfinity);
  std::vector<int> count_of(splits.count, 0);
  for (int split = 0; split < splits.count; ++split) {
    std::vector<double> lowest(parts, kInfinity);
    std::vector<char> overflows(parts, 0);
    const int64_t first = static_cast<int64_t>(split) * splits.per_split;
    const int64_t last = std::min(first + splits.per_split, tiles);
    const auto within = [&](int part, int64_t end, double limit) {
      int number = 0;
      for (int64_t tile = first; tile < end; ++tile) {
        const int64_t start = tile * shape.columns + part * shape.part;
        for (int64_t j = start; j < std::min<int64_t>(start + shape.part, codewords); ++j) number += scores[j] <= limit;
      }
      return number;
    };
    for (int part = 0; part < parts; ++part) {
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t start = tile * shape.columns + part * shape.part;
        double low = kInfinity;
        for (int64_t j = start; j < std::min<int64_t>(start + shape.part, codewords); ++j)
          low = std::min(low, scores[j]);
        if (low == kInfinity || low > lowest[part] + twice_bound) continue;
        const double before = lowest[part];
        lowest[part] = std::min(before, low);
        const double limit = lowest[part] + twice_bound;
        if (before > limit) overflows[part] = 0;
        if (within(part, tile + 1, limit) > kCandidates) overflows[part] = 1;
      }
      lowest_of[split] = std::min(lowest_of[split], lowest[part]);
    }
    const double limit = lowest_of[split] + twice_bound;
    for (int part = 0; part < parts; ++part) {
      if (lowest[part] <= limit) count_of[split] += overflows[part] ? kOverflow : within(part, last, limit);
    }
  }
  const double limit = *std::min_element(lowest_of.begin(), lowest_of.end()) + twice_bound;
  int compared = 0;
  for (int split = 0; split < splits.count; ++split) {
    if (!(lowest_of[split] <= limit)) continue;
    if (count_of[split] > kCandidates) return kComparedWithAll;
    compared += count_of[split];
  }
  return limit < kInfinity ? compared : kComparedWithAll;
}

struct RowScores {
  std::vector<double> scores;
  double twice_bound, slack;  // by as much a sum in float32 may move the bound
};

RowScores scores_of(const Rows& features, int64_t row, int64_t codewords, const Codes& codes) {
  const CodebookNorms largest = codes.largest();
  float most = 0;
  for (int d = 0; d < codes.width; ++d) {
    const auto value = static_cast<float>(d < features.columns ? features.at(row, d) : 0.0);
    most = std::fmax(most, std::abs(value - codes.mean[d]));
  }
  const int exponent = row_scale(most, codes.exponent), shift = codes.exponent - exponent;
  std::vector<double> halves(codes.width);
  RowNorms norms{0, 0, 0};
  for (int d = 0; d < codes.width; ++d) {
    const double value =
        ((d < features.columns ? features.at(row, d) : 0.0) - codes.mean[d]) * std::ldexp(1.0, exponent);
    halves[d] = rounded(Number::kFloat16, value);
    norms.exact += value * value;
    norms.rounded += halves[d] * halves[d];
    norms.residual += (value - halves[d]) * (value - halves[d]);
  }
  norms = {std::sqrt(norms.exact), std::sqrt(norms.rounded), std::sqrt(norms.residual)};
  RowScores result{std::vector<double>(codewords), twice_bound(norms, largest, shift, codes.width), 0};
  result.slack = 2 * (0x1p-22 * largest.squared +
                      2 * std::ldexp(1.0, shift) * (codes.width + 16) * 0x1p-22 * norms.rounded * largest.rounded);
  for (int64_t j = 0; j < codewords; ++j) {
    double product = 0;
    for (int d = 0; d < codes.width; ++d) product += halves[d] * codes.operands[j * codes.width + d];
    result.scores[j] = codes.norms[j] == kInfinity ? kInfinity : codes.norms[j] + std::ldexp(-2.0, shift) * product;
  }
  return result;
}

bool may_compare(int compared, const RowScores& row, const Geometry& shape, Splits splits) {
  if (std::isnan(row.twice_bound)) return compared == kComparedWithAll;
  for (const double slack : {-row.slack, 0.0, row.slack}) {
    if (compared == count_compared(row.scores, row.twice_bound + slack, shape, splits)) return true;
  }
  return false;
}

// A problem of the search. `splits` 0 leaves their number to the plan.
struct Search {
  Rows features, codebook;
  Layout feature_layout = {}, codebook_layout = {};
  int splits = 0;
  bool random = false;             // few candidates, and none unknown
  std::vector<int> compared = {};  // of each row, where that is known by hand
};

Result search_case(const Search& given, const Geometry& shape) {
  const DeviceRows feature_rows(given.features, given.feature_layout),
      codebook_rows(given.codebook, given.codebook_layout);
  const Matrix features = feature_rows.view(), codebook = codebook_rows.view();
  const int64_t rows = features.rows, codewords = codebook.rows;
  SearchPlan plan;
  check(plan_nearest_codeword(features, codebook, shape.loop, plan), "plan_nearest_codeword");
  Result result;
  result.rows = rows;
  const bool lists = shape.part > 0;
  if (plan.tile_rows != (lists ? shape.rows : 0) || plan.wgmma != (shape.loop == MainLoop::kWgmma)) {
    result.demand(false, "another kernel was planned");
    return result;
  }
  if (lists && given.splits > 0) {
    const auto tiles = static_cast<int>((codewords + shape.columns - 1) / shape.columns);
    const int per_split = (tiles + given.splits - 1) / given.splits;
    plan.splits = {(tiles + per_split - 1) / per_split, per_split};
    plan.records = 0;
    plan.bounds = round_to(rows * plan.splits.count * static_cast<int64_t>(sizeof(Record)), 256);
    plan.bytes = plan.bounds + rows * sizeof(float);
  }
  OperandsPlan made = operands_for(plan, codebook);
  // What a prepared codebook holds is read at target size.
  if (lists && target_size) check(plan_operands(codebook, made), "plan_operands");
  const bool wide = features.number == Number::kFloat64;
  const Device<unsigned char> operands(made.bytes), workspace(plan.bytes), distance(rows * (wide ? 8 : 4));
  const Device<int64_t> index(rows);
  const Device<int> compared(lists ? rows : 0);
  finish_launch(launch_operands(made, codebook, operands.get(), nullptr), "launch_operands");
  Found found{index.get(), distance.get(), compared.get()};
  const auto launch = [&] {
    return launch_nearest_codeword(plan, made, features, codebook, operands.get(), workspace.get(), found, nullptr);
  };
  finish_launch(launch(), "launch_nearest_codeword");

  const std::vector<int64_t> indices = index.host();
  const std::vector<unsigned char> distances = distance.host();
  const std::vector<int> numbers = compared.host();
  const Rows codes = kept(given.codebook);
  const Codes operand_codes = lists && !target_size ? read_codes(made, operands.host(), plan.wgmma) : Codes{};
  const int64_t samples = target_size ? std::min(kSampledRows, rows) : rows;
  std::vector<const char*> faults(samples, nullptr);
  in_threads(samples, [&](int64_t sample) {
    const int64_t row = sample * (rows - 1) / std::max<int64_t>(samples - 1, 1);
    const Number number = wide ? Number::kFloat64 : Number::kFloat32;
    const double own = get(number, &distances[row * size_of(number)]);
    if (!is_nearest(given.features, codes, row, indices[row], own)) faults[sample] = "index or distance";
    if (!lists || target_size || faults[sample] != nullptr) return;
    const RowScores scores = scores_of(given.features, row, codewords, operand_codes);
    if (!may_compare(numbers[row], scores, shape, plan.splits)) faults[sample] = "compared codewords";
    if (!given.compared.empty() && numbers[row] != given.compared[row]) faults[sample] = "compared codewords by hand";
  });
  for (int64_t sample = 0; sample < samples; ++sample) {
    if (faults[sample] == nullptr) continue;
    const int64_t row = sample * (rows - 1) / std::max<int64_t>(samples - 1, 1);
    result.demand(false, std::string(faults[sample]) + " of row " + std::to_string(row) + ": index " +
                             std::to_string(indices[row]) +
                             (lists ? ", compared with " + std::to_string(numbers[row]) : std::string()));
  }
  if (lists) {
    result.fallback = std::count(numbers.begin(), numbers.end(), kComparedWithAll);
    double sum = 0;
    for (const int number : numbers) sum += std::max(number, 0);
    result.candidates = sum / static_cast<double>(rows - result.fallback);
    if (given.random) {
      result.demand(result.fallback == 0, std::to_string(result.fallback) + " rows were compared with all codewords");
      result.demand(result.candidates <= kMostCandidates, "too many candidates");
    }
  }
  found.compared = nullptr;  // as training calls it
  result.median_ms = median_ms(launch);
  return result;
}

Search random_search(Number number, int64_t rows, int64_t codewords, int64_t width, int splits = 0,
                     bool random = true) {
  const Number codes = number == Number::kFloat64 ? number : Number::kFloat32;
  return {random_rows(number, rows, width, 1), random_rows(codes, codewords, width, 2), {}, {}, splits, random};
}

// Rows and codewords that hold NaN or infinities.
Search spoilt_search(Number number, int64_t rows, int64_t codewords, int64_t width) {
  Search given = random_search(number, rows, codewords, width, 0, false);
  given.features.keep();
  given.codebook.keep();
  for (int64_t i = 0; i < rows; ++i) {
    if (i % 7 == 3) given.features.set(i, i % width, kNaN);
    if (i % 11 == 5) given.features.set(i, i % width, i % 2 ? kInfinity : -kInfinity);
  }
  for (int64_t j = 0; j < codewords; ++j) {
    if (j % 13 == 2 || j == codewords - 1) given.codebook.set(j, j % width, kNaN);
    if (j % 17 == 0) given.codebook.set(j, j % width, j % 2 ? kInfinity : -kInfinity);
  }
  return given;
}

// Columns of a part in an order that goes from one thread of a quad to the next.
std::vector<int> quad_order(int part) {
  std::vector<int> columns;
  const int tiles = part / 8;
  for (int i = 0; i < part; ++i) columns.push_back(i / 4 * 3 % tiles * 8 + i % 4 * 2 + (i / 4 / tiles + i) % 2);
  // Both sides of a column once each: the second round takes those that the first left.
  std::vector<char> taken(part, 0);
  for (int& column : columns) {
    if (taken[column]) column ^= 1;
    taken[column] = 1;
  }
  return columns;
}

// Rows whose nearest codewords are 2 to 9 that are the same or one bit apart, in one part of a tile. The nearest stands
// first or last among them. More than a list holds makes the row unknown.
Search tied_search(const Geometry& shape) {
  constexpr int kHits[] = {2, 3, 4, 5, 6, 7, 9}, kKinds = 4, kWidth = 64, kPatterns = 7 * kKinds;
  const std::vector<int> order = quad_order(shape.part);
  std::vector<std::vector<int64_t>> places;
  int64_t start = 0;
  int used = 0;
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const int hits = kHits[pattern / kKinds];
    if (used + hits > shape.part) {
      start += shape.part;
      used = 0;
    }
    std::vector<int64_t> own;
    for (int i = 0; i < hits; ++i) own.push_back(start + order[used++]);
    std::sort(own.begin(), own.end());
    places.push_back(own);
  }
  const int64_t codewords = round_to(start + shape.part, shape.columns), rows = std::max(shape.rows + 1, 65);
  Search given = random_search(Number::kFloat32, rows, codewords, kWidth, 1, false);
  given.features.keep();
  given.codebook.keep();
  const Rows bases = random_rows(Number::kFloat32, kPatterns, kWidth, 3);
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const int hits = kHits[pattern / kKinds], kind = pattern % kKinds;
    for (int i = 0; i < hits; ++i) {
      // Kinds: all the same; the nearest first; last; the last two.
      const bool nearest =
          kind == 0 || (kind == 1 && i == 0) || (kind == 2 && i == hits - 1) || (kind == 3 && i >= hits - 2);
      for (int d = 0; d < kWidth; ++d) {
        const auto value = static_cast<float>(bases.at(pattern, d));
        given.codebook.set(places[pattern][i], d, !nearest && d == i * 5 + 1 ? std::nextafter(value, 9.0f) : value);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t pattern = i * 5 % kPatterns;
    const int hits = kHits[pattern / kKinds];
    for (int d = 0; d < kWidth; ++d) given.features.set(i, d, bases.at(pattern, d));
    given.compared.push_back(hits > kCandidates ? kComparedWithAll : hits);
  }
  return given;
}

double square_of(const Rows& rows, int64_t row) {
  double square = 0;
  for (int64_t d = 0; d < rows.columns; ++d) square += rows.at(row, d) * rows.at(row, d);
  return square;
}

// Rows whose candidates come tile by tile at chosen scores above the lowest, in units of the bound: lists are thinned,
// emptied, or overflow on the way.
Search laddered_search(const Geometry& shape) {
  struct Rung {
    int tile;
    double score;
  };
  static const std::vector<Rung> kLadders[] = {
      {{0, 1.9}, {0, 1.65}, {0, 1.25}, {1, 0.8}, {1, 0.73}, {1, 0.66}, {2, 0.45}, {2, 0.35}, {3, 0}},
      {{0, 3.00}, {0, 3.01}, {0, 3.02}, {0, 3.03}, {0, 3.04}, {0, 3.05}, {0, 3.06}, {2, 0.1}, {3, 0}},
      {{0, 0.80}, {0, 0.81}, {0, 0.82}, {0, 0.83}, {0, 0.84}, {0, 0.85}, {0, 0.86}, {2, 0}},
      {{0, 1.30}, {0, 1.31}, {0, 1.32}, {0, 1.33}, {0, 1.34}, {0, 1.35}, {0, 1.36}, {1, 0.5}, {3, 0}},
      {{0, 0}, {1, 0.7}, {2, 0.6}, {2, 0.3}, {3, 0.5}, {3, 1.5}}};
  constexpr int kWidth = 64, kTiles = 4, kLadderCount = 5;
  constexpr int kCompared[] = {6, 2, kComparedWithAll, kComparedWithAll, 5};
  const int64_t rows = shape.rows + 1, codewords = static_cast<int64_t>(kTiles) * shape.columns;
  const int parts = shape.columns / shape.part;
  Search given = random_search(Number::kFloat32, rows, codewords, kWidth, 1, false);
  given.features.keep();
  given.codebook.keep();
  const Rows bases = random_rows(Number::kFloat32, kLadderCount, kWidth, 3);
  const Rows directions = random_rows(Number::kFloat64, kLadderCount, kWidth, 4);
  const std::vector<int> order = quad_order(shape.part);
  double largest = 0;
  for (int64_t j = 0; j < codewords; ++j) largest = std::max(largest, square_of(given.codebook, j));
  for (int ladder = 0; ladder < kLadderCount; ++ladder) {
    // About twice the bound, as a squared distance: rounding to half precision takes kLost of a norm.
    constexpr double kLost = 0x1.bp-12;
    const double unit = 4 * kLost * std::sqrt(square_of(bases, ladder) * largest) / square_of(directions, ladder);
    int number = ladder / parts * 9;
    for (const Rung rung : kLadders[ladder]) {
      const int64_t j =
          static_cast<int64_t>(rung.tile) * shape.columns + ladder % parts * shape.part + order[number++ % shape.part];
      for (int d = 0; d < kWidth; ++d)
        given.codebook.set(j, d, bases.at(ladder, d) + std::sqrt(rung.score * unit) * directions.at(ladder, d));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int d = 0; d < kWidth; ++d) given.features.set(i, d, bases.at(i % kLadderCount, d));
    given.compared.push_back(kCompared[i % kLadderCount]);
  }
  return given;
}

// codebook_statistics

struct StatisticsProblem {
  std::vector<Number> numbers;  // of each modality
  int64_t rows, codewords, width;
  bool sorted = false, masks = false, mixes = false, partners = false, sequential = false;
  int candidates = 0;
  bool choice = false, shard = false, strides = false;
  int64_t popular = 0;  // of 10 rows so many have codeword 1
};

Result statistics_case(const StatisticsProblem& given) {
  constexpr double kOwnWeight = 0.625, kDecay = 0.75;
  const auto modalities = static_cast<int>(given.numbers.size());
  const int64_t rows = given.rows, codewords = given.codewords, width = given.width, seed = 11, step = 5;
  struct Own {
    Rows features, partners;
    std::vector<int64_t> index;
    std::vector<unsigned char> valid;
    int64_t first_row, total_rows;
    double weight;
  };
  std::vector<Own> all;
  for (int m = 0; m < modalities; ++m) {
    Own own{random_rows(given.numbers[m], rows, width, 10 + m), random_rows(given.numbers[m], rows, width, 30 + m)};
    if (!target_size) {
      own.features.keep();
      own.partners.keep();
    }
    const uint64_t key = counter_random::key(seed, 1, m);
    for (int64_t i = 0; i < rows; ++i) {
      const bool valid = !given.masks || counter_random::integer(key, 2 * rows + i, 4) > 0;
      own.valid.push_back(valid);
      own.index.push_back(
          counter_random::integer(key, rows + i, 10) < given.popular ? 1 : counter_random::integer(key, i, codewords));
      if (valid) continue;
      own.index.back() = i % 2 ? -7 : codewords + i;
      own.features.set(i, i % width, kNaN);
      own.partners.set(i, i % width, kNaN);
    }
    own.first_row = given.shard ? 5 + m : 0;
    own.total_rows = rows + (given.shard ? 9 : 0);
    own.weight = given.sequential ? std::pow(kDecay, modalities - 1 - m) : 1.0;
    all.push_back(std::move(own));
  }
  std::vector<double> choices;
  for (int64_t k = 0; k < codewords; ++k)
    choices.push_back(k == 0 ? -0.5 : k == 1 ? 1.5 : k == 2 ? kNaN : counter_random::uniform(99, k));

  std::vector<std::unique_ptr<DeviceRows>> matrices;
  std::vector<std::unique_ptr<Device<int64_t>>> indices;
  std::vector<std::unique_ptr<Device<unsigned char>>> masks;
  const StatisticsLayout layout = statistics_layout(modalities, codewords, width, given.candidates);
  const Device<int64_t> device_step(std::vector<int64_t>{step});
  const Device<double> statistics(layout.size), device_choices(choices);
  const int64_t stride = given.strides ? 2 : 1;
  Batch batch{};
  for (int m = 0; m < modalities; ++m) {
    const Own& own = all[m];
    std::vector<int64_t> spread(rows == 0 ? 0 : (rows - 1) * stride + 1, -1);
    std::vector<unsigned char> mask(spread.size(), 0);
    for (int64_t i = 0; i < rows; ++i) {
      spread[i * stride] = own.index[i];
      mask[i * stride] = own.valid[i];
    }
    const Layout lies = given.strides ? Layout{1, 3, 2} : Layout{};
    matrices.push_back(std::make_unique<DeviceRows>(own.features, lies));
    Modality& to = batch.modality[m];
    to.features = matrices.back()->view();
    if (given.partners) {
      matrices.push_back(std::make_unique<DeviceRows>(own.partners, lies));
      to.partners = matrices.back()->view();
    }
    indices.push_back(std::make_unique<Device<int64_t>>(spread));
    masks.push_back(std::make_unique<Device<unsigned char>>(mask));
    to.index = indices.back()->get();
    to.index_stride = stride;
    to.valid = given.masks ? reinterpret_cast<const bool*>(masks.back()->get()) : nullptr;
    to.valid_stride = stride;
    to.first_row = own.first_row;
    to.total_rows = own.total_rows;
    to.weight = own.weight;
  }
  batch.modalities = modalities;
  batch.mixes = given.mixes;
  batch.given_partners = given.partners;
  batch.own_weight = kOwnWeight;
  batch.codewords = codewords;
  batch.width = width;
  batch.candidates = given.candidates;
  batch.seed = seed;
  batch.step = device_step.get();
  batch.choice = given.choice ? device_choices.get() : nullptr;
  batch.statistics = statistics.get();
  const StatisticsPlan plan = plan_statistics(batch);
  const Device<unsigned char> workspace(plan.bytes);
  const auto launch = [&] { return launch_statistics(plan, batch, workspace.get(), nullptr); };
  finish_launch(launch(), "launch_statistics");
  const std::vector<double> got = statistics.host();

  Result result;
  result.rows = rows * modalities;
  result.demand(plan.sorted == given.sorted, "the other kind of sums was planned");
  std::vector<double> count(modalities * codewords, 0), total(modalities, 0);
  for (int m = 0; m < modalities; ++m) {
    for (int64_t i = 0; i < rows; ++i) {
      if (!all[m].valid[i]) continue;
      ++count[m * codewords + all[m].index[i]];
      ++total[m];
    }
    demand_close(result, "row_count", m, got[layout.row_count + m], total[m], 0);
  }
  for (size_t i = 0; i < count.size(); ++i)
    demand_close(result, "codeword_count", static_cast<int64_t>(i), got[layout.codeword_count + i], count[i], 0);

  const auto mixed = [&](int m, int64_t i, int64_t d) {
    const double value = all[m].features.at(i, d);
    if (!given.mixes) return value;
    double partner = 0;
    int number = 0;
    if (given.partners) {
      partner = all[m].partners.at(i, d);
      number = 1;
    } else {
      for (int other = 0; other < modalities; ++other) {
        if (other == m || !all[other].valid[i]) continue;
        partner += all[other].features.at(i, d);
        ++number;
      }
    }
    return number == 0 ? value : kOwnWeight * value + (1 - kOwnWeight) * (partner / number);
  };
  const int64_t every = target_size ? std::max<int64_t>(codewords / kSampledCodewords, 1) : 1;
  std::vector<double> sums(codewords * width, 0), sizes(codewords * width, 0);
  in_threads(width, [&](int64_t d) {
    for (int m = 0; m < modalities; ++m) {
      for (int64_t i = 0; i < rows; ++i) {
        if (!all[m].valid[i] || all[m].index[i] % every != 0) continue;
        const double term = all[m].weight * mixed(m, i, d);
        sums[all[m].index[i] * width + d] += term;
        sizes[all[m].index[i] * width + d] += std::abs(term);
      }
    }
  });
  for (int64_t k = 0; k < codewords; k += every) {
    for (int64_t i = k * width; i < (k + 1) * width; ++i)
      demand_close(result, "mixed_sum", i, got[layout.mixed_sum + i], sums[i], sizes[i] * kSumTolerance);
  }

  const uint64_t key = counter_random::key(seed, step, 2);
  int64_t of_all = 0;
  for (const Own& own : all) of_all += own.total_rows;
  for (int64_t k = 0; k < codewords; ++k) {
    for (int place = 0, attempt = 0; place < given.candidates; ++place) {
      bool here = false, found = false;
      int m = 0;
      int64_t local = 0;
      do {
        int64_t drawn = counter_random::integer(key, k * kAttempts + attempt, of_all);
        if (attempt == 0 && given.choice) drawn = counter_random::place(choices[k], of_all);
        for (m = 0; drawn >= all[m].total_rows; ++m) drawn -= all[m].total_rows;
        local = drawn - all[m].first_row;
        here = local >= 0 && local < rows;
        found = here && all[m].valid[local];
        ++attempt;
      } while (given.candidates == 1 && here && !found && attempt < kAttempts);
      const int64_t written = place * codewords + k;
      demand_close(result, "found", written, got[layout.found + written], found, 0);
      for (int64_t d = 0; d < width; ++d)
        demand_close(result, "candidate", written * width + d, got[layout.candidate + written * width + d],
                     found ? all[m].features.at(local, d) : 0.0, 0);
    }
  }
  result.median_ms = median_ms(launch);
  return result;
}

// codebook_apply

enum class Revival { kNone, kCodewords, kFeatures };

struct ApplyProblem {
  Number number;
  int modalities;
  int64_t codewords, width;
  bool joint;
  Smoothing smoothing;
  Revival revival;
  bool unless_any = true, draws = false, revive_ema = true, strides = false;
};

Result apply_case(const ApplyProblem& given) {
  const int modalities = given.modalities;
  const int64_t codewords = given.codewords, width = given.width, step = 3;
  const Rule rule{0.875,
                  1e-5,
                  0.5,
                  given.joint,
                  given.smoothing,
                  given.revival == Revival::kNone ? 0 : 6,
                  given.unless_any,
                  given.revival == Revival::kFeatures,
                  0.25,
                  3,
                  given.revive_ema,
                  23};
  const uint64_t key = counter_random::key(17, 0, 0);
  const bool features = revives_from_features(rule);
  const StatisticsLayout layout = statistics_layout(modalities, codewords, width, features ? 1 : 0);
  std::vector<double> statistics(layout.size);
  for (int64_t i = 0; i < layout.size; ++i) statistics[i] = draw(key, i);
  for (int m = 0; m < modalities; ++m) {
    double total = 0;
    for (int64_t k = 0; k < codewords; ++k) {
      const double number = std::max<int64_t>(counter_random::integer(key + 1, m * codewords + k, 9) - 5, 0);
      statistics[layout.codeword_count + m * codewords + k] = number;
      total += number;
    }
    statistics[layout.row_count + m] = total;
  }
  for (int64_t k = 0; features && k < codewords; ++k)
    statistics[layout.found + k] = counter_random::integer(key + 2, k, 4) > 0;
  std::vector<double> choice, noise;
  for (int64_t k = 0; k < codewords; ++k)
    choice.push_back(k % 31 == 0 ? 1.5 : k % 29 == 0 ? kNaN : counter_random::uniform(key + 3, k));
  for (int64_t i = 0; i < codewords * width; ++i) noise.push_back(2 * counter_random::uniform(key + 4, i) - 1);

  const Rows codebook = kept(random_rows(given.number, codewords, width, 50));
  const Rows ema_sum = kept(random_rows(given.number, codewords, width, 51));
  Rows ema_count = kept(random_rows(given.number, codewords, 1, 52));
  for (int64_t k = 0; k < codewords; ++k) {
    // Sequential updates divide by any count; in joint ones a count of zero leaves its codeword alone.
    ema_count.set(k, 0, given.joint && k % 3 == 0 ? 0.0 : std::abs(ema_count.at(k, 0)) + 0.5);
  }
  std::vector<int64_t> idle;
  for (int64_t i = 0; i < modalities * codewords; ++i) idle.push_back(counter_random::integer(key + 5, i, 12));

  const Layout lies = given.strides ? Layout{1, 3, 2} : Layout{};
  const DeviceRows device_codebook(codebook, lies), device_sum(ema_sum, given.strides ? Layout{0, 5, 1} : Layout{}),
      device_count(ema_count, given.strides ? Layout{0, 1, 1} : Layout{});
  std::vector<int64_t> idle_as_it_lies = idle;
  const int64_t idle_strides[2] = {given.strides ? 1 : codewords, given.strides ? modalities : 1};
  for (int m = 0; m < modalities; ++m) {
    for (int64_t k = 0; k < codewords; ++k)
      idle_as_it_lies[m * idle_strides[0] + k * idle_strides[1]] = idle[m * codewords + k];
  }
  const Device<int64_t> device_idle(idle_as_it_lies), device_step(std::vector<int64_t>{step});
  const Device<double> device_statistics(statistics), device_choice(choice), device_noise(noise);
  const State state{given.number,
                    device_codebook.data(),
                    device_count.data(),
                    device_sum.data(),
                    device_idle.get(),
                    device_step.get(),
                    {device_codebook.view().row_stride, device_codebook.view().column_stride},
                    {device_sum.view().row_stride, device_sum.view().column_stride},
                    device_count.view().row_stride,
                    {idle_strides[0], idle_strides[1]},
                    modalities,
                    codewords,
                    width};
  const ApplyPlan plan = plan_apply(state, rule);
  const Device<unsigned char> workspace(plan.bytes);
  const auto launch = [&] {
    return launch_apply(plan, state, rule, device_statistics.get(), given.draws ? device_choice.get() : nullptr,
                        given.draws ? device_noise.get() : nullptr, workspace.get(), nullptr);
  };
  finish_launch(launch(), "launch_apply");

  const auto batch_count = [&](int m, int64_t k) { return statistics[layout.codeword_count + m * codewords + k]; };
  const int steps = given.joint ? 1 : modalities;
  double all = 0;
  for (int64_t k = 0; k < codewords; ++k) all += ema_count.at(k, 0);
  std::vector<double> counts, sums, vectors, sizes;
  std::vector<int64_t> idle_after, idle_for_rule;
  for (int64_t k = 0; k < codewords; ++k) {
    double count = ema_count.at(k, 0), total = all, divisor = count;
    for (int first = 0; first < steps; ++first) {
      double step_count = 0, step_total = 0;
      for (int m = given.joint ? 0 : first; m < (given.joint ? modalities : first + 1); ++m) {
        step_count += batch_count(m, k);
        step_total += statistics[layout.row_count + m];
      }
      count = divisor = rule.decay * count + (1 - rule.decay) * step_count;
      total = rule.decay * total + (1 - rule.decay) * step_total;
      if (given.smoothing != Smoothing::kNone)
        divisor = (count + rule.epsilon) * (total / (total + static_cast<double>(codewords) * rule.epsilon));
      if (given.smoothing == Smoothing::kCompounding) count = divisor;
    }
    counts.push_back(count);
    for (int64_t d = 0; d < width; ++d) {
      const double before = std::pow(rule.decay, steps) * ema_sum.at(k, d);
      const double more = (1 - rule.decay) * statistics[layout.mixed_sum + k * width + d];
      const bool stays = given.joint && !(divisor > 0);
      sums.push_back(before + more);
      vectors.push_back(stays ? codebook.at(k, d) : (before + more) / divisor);
      sizes.push_back(stays ? 0 : (std::abs(before) + std::abs(more)) / std::min(divisor, 1.0));
    }
    int64_t least = INT64_MAX, most = 0;
    for (int m = 0; m < modalities; ++m) {
      const int64_t now = batch_count(m, k) > 0 ? 0 : idle[m * codewords + k] + 1;
      idle_after.push_back(now);
      least = std::min(least, now);
      most = std::max(most, now);
    }
    idle_for_rule.push_back(given.unless_any ? least : most);
  }
  std::vector<int64_t> active;
  for (int64_t k = 0; k < codewords; ++k)
    if (idle_for_rule[k] < rule.active_within) active.push_back(k);
  const std::vector<double> before_revival = vectors;
  const uint64_t choice_key = counter_random::key(rule.seed, step, 0),
                 noise_key = counter_random::key(rule.seed, step, 1);
  int64_t revived_codewords = 0;
  for (int64_t k = 0; k < codewords; ++k) {
    const bool dead = rule.revive_after > 0 && idle_for_rule[k] > rule.revive_after;
    if (!dead || (features ? statistics[layout.found + k] == 0 : active.empty())) continue;
    ++revived_codewords;
    const double picks = given.draws ? choice[k] : counter_random::uniform(choice_key, k);
    for (int64_t d = 0; d < width; ++d) {
      const int64_t place = k * width + d;
      const double moves = given.draws ? noise[place] : 2 * counter_random::uniform(noise_key, place) - 1;
      if (features) {
        vectors[place] = statistics[layout.candidate + place];
      } else {
        const int64_t source = active[counter_random::place(picks, static_cast<int64_t>(active.size()))];
        vectors[place] = before_revival[source * width + d] + rule.revive_noise * moves;
        sizes[place] += sizes[source * width + d] + 1;
      }
      if (rule.revive_ema) sums[place] = vectors[place];
    }
    for (int m = 0; m < modalities; ++m) idle_after[k * modalities + m] = 0;
    if (rule.revive_ema) counts[k] = 1;
  }

  Result result;
  result.rows = codewords;
  result.demand((revived_codewords > 0) == (given.revival != Revival::kNone), "no codeword was to be revived");
  const bool wide = given.number == Number::kFloat64;
  const auto tolerance = [&](double wanted, double size) {
    return wide ? (std::abs(wanted) + size) * kSumTolerance : std::abs(wanted) * kFloatTolerance + size * kSumTolerance;
  };
  const std::vector<double> codebook_after = device_codebook.host(), sum_after = device_sum.host(),
                            count_after = device_count.host();
  for (int64_t k = 0; k < codewords; ++k) {
    demand_close(result, "ema_count", k, count_after[k], counts[k], tolerance(counts[k], 0));
    for (int64_t i = k * width; i < (k + 1) * width; ++i) {
      demand_close(result, "codebook", i, codebook_after[i], vectors[i], tolerance(vectors[i], sizes[i]));
      demand_close(result, "ema_sum", i, sum_after[i], sums[i], tolerance(sums[i], sizes[i] + 1));
    }
  }
  const std::vector<int64_t> device_idle_after = device_idle.host();
  for (int64_t i = 0; i < modalities * codewords; ++i)
    demand_close(
        result, "idle", i,
        static_cast<double>(device_idle_after[i % modalities * idle_strides[0] + i / modalities * idle_strides[1]]),
        static_cast<double>(idle_after[i]), 0);
  demand_close(result, "step", 0, static_cast<double>(device_step.host()[0]), step + 1, 0);
  result.median_ms = median_ms(launch);
  return result;
}

// commitment

template <class T>
Result commitment_case(int modalities, int64_t rows, int64_t codewords, int64_t width, bool masks, bool out_of_range) {
  constexpr double kTolerance = std::is_same_v<T, double> ? kSumTolerance : 0x1p-19;
  const Number number = std::is_same_v<T, double> ? Number::kFloat64 : Number::kFloat32;
  const Rows features = kept(random_rows(number, modalities * rows, width, 60));
  const Rows codebook = kept(random_rows(number, codewords, width, 61));
  const uint64_t key = counter_random::key(19, 0, 0);
  std::vector<int64_t> index;
  std::vector<unsigned char> valid;
  for (int64_t i = 0; i < modalities * rows; ++i) {
    valid.push_back(!masks || counter_random::integer(key, i, 3) > 0);
    index.push_back(valid.back() ? counter_random::integer(key + 1, i, codewords) : codewords + i);
  }
  // Of modality 1, which modality 0 has no share of.
  const int64_t spoilt_row = rows / 2, spoilt = rows + spoilt_row;
  if (out_of_range) {
    valid[spoilt] = valid[spoilt_row] = 1;
    index[spoilt] = codewords;
  }
  std::vector<double> weights;
  for (int m = 0; m < modalities; ++m) {
    for (int o = 0; o < modalities; ++o) weights.push_back(m == 0 && o == 1 ? 0.0 : m == o ? 0.25 : 0.125 + 0.0625 * o);
  }
  const DeviceRows device_features(features, {}), device_codebook(codebook, {});
  const Device<int64_t> device_index(index), numbers(masks ? modalities * modalities : 0);
  const Device<unsigned char> device_valid(valid);
  const Device<double> device_weights(weights), partial(modalities * ((rows + kCommitmentRows - 1) / kCommitmentRows));
  const Device<T> direction(modalities * rows * width), loss(modalities);
  const CommitmentArguments<T> arguments{static_cast<const T*>(device_features.data()),
                                         device_index.get(),
                                         masks ? reinterpret_cast<const bool*>(device_valid.get()) : nullptr,
                                         static_cast<const T*>(device_codebook.data()),
                                         device_weights.get(),
                                         direction.get(),
                                         loss.get(),
                                         numbers.get(),
                                         partial.get(),
                                         rows,
                                         codewords,
                                         modalities,
                                         static_cast<int>(width)};
  const auto launch = [&] { return launch_commitment(arguments, nullptr); };
  finish_launch(launch(), "launch_commitment");
  const std::vector<T> got = direction.host(), losses = loss.host();
  Result result;
  result.rows = modalities * rows;
  for (int m = 0; m < modalities; ++m) {
    double wanted_loss = 0;
    std::vector<double> wanted(rows * width, 0), sizes(rows * width, 0);
    for (int o = 0; o < modalities; ++o) {
      const double weight = weights[m * modalities + o];
      double number = 0;
      for (int64_t i = 0; i < rows; ++i) number += valid[m * rows + i] && valid[o * rows + i];
      for (int64_t i = 0; i < rows && weight != 0; ++i) {
        if (!valid[m * rows + i] || !valid[o * rows + i]) continue;
        const int64_t codeword = index[o * rows + i];
        if (codeword >= codewords) {
          wanted_loss = kNaN;
          continue;
        }
        for (int64_t d = 0; d < width; ++d) {
          const double difference = features.at(m * rows + i, d) - codebook.at(codeword, d);
          wanted_loss += weight / number * difference * difference;
          wanted[i * width + d] += 2 * weight / number * difference;
          sizes[i * width + d] += 2 * weight / number * (std::abs(difference) + 1);
        }
      }
    }
    demand_close(result, "loss", m, losses[m], wanted_loss, std::abs(wanted_loss) * kTolerance);
    for (int64_t i = 0; i < rows; ++i) {
      if (out_of_range && i == spoilt_row && m != 0) continue;
      for (int64_t d = i * width; d < (i + 1) * width; ++d)
        demand_close(result, "direction", m * rows * width + d, got[m * rows * width + d], wanted[d],
                     sizes[d] * kTolerance);
    }
  }
  result.median_ms = median_ms(launch);
  return result;
}

// The cases.

struct Case {
  std::string kernel, text;
  std::function<Result()> run;
};

constexpr Number kDouble = Number::kFloat64, kSingle = Number::kFloat32, kHalf = Number::kFloat16,
                 kBrain = Number::kBFloat16;
constexpr Geometry kWgmmaShape{"search_wgmma", MainLoop::kWgmma, kGroups * kGroupRows, kTileCodewords, kTileCodewords},
    kWide{"search_wide", MainLoop::kWide, 128, 256, 64}, kMiddle{"search_middle", MainLoop::kMiddle, 64, 128, 32},
    kNarrow{"search_narrow", MainLoop::kNarrow, 16, 64, 16}, kPlain{"search_plain", MainLoop::kPlain, 32, 64, 0},
    kDirect{"search_direct", MainLoop::kBest, 32, 64, 0};

std::string size_text(int64_t rows, int64_t codewords, int64_t width) {
  return std::to_string(rows) + " x " + std::to_string(codewords) + " x " + std::to_string(width);
}

void add_search(std::vector<Case>& cases, const Geometry& shape, const std::string& text, const Search& given) {
  const std::string size = size_text(given.features.rows, given.codebook.rows, given.features.columns);
  cases.push_back({shape.kernel, text.empty() ? size : size + ", " + text, [=] { return search_case(given, shape); }});
}

// A search of the half-precision kernels: rows and codewords around one tile and several, widths around one step and
// several, so many steps that every stage of the ring is filled more than twice.
void add_tiled_searches(std::vector<Case>& cases, const Geometry& shape) {
  const int64_t rows = shape.rows, columns = shape.columns;
  const bool wgmma = shape.loop == MainLoop::kWgmma, wide = shape.loop == MainLoop::kWide;
  add_search(cases, shape, "", random_search(kSingle, rows - 1, columns - 1, 63));
  add_search(cases, shape, "", random_search(kSingle, rows, columns, 64));
  Search unaligned = random_search(kSingle, rows + 1, columns + 1, 65);
  unaligned.feature_layout = unaligned.codebook_layout = {1, 2, 1};
  add_search(cases, shape, "unaligned", unaligned);
  // 64 wide a tile is one step: the rings have 3 stages, that of wgmma 6.
  add_search(cases, shape, "float16, one split", random_search(kHalf, 5, (wgmma ? 13 : 7) * columns - 9, 64, 1));
  Search brain = random_search(kBrain, rows + 3, 4 * columns, 192, 1);
  brain.codebook.number = kBrain;
  add_search(cases, shape, "bfloat16, one split", brain);
  // The widest rows that leave this shape its shared memory.
  Search widest = random_search(kSingle, rows + 1, columns + 7, wide ? 383 : 575);
  widest.feature_layout = {0, 1, 1};
  add_search(cases, shape, "aligned with a gap", widest);
  add_search(cases, shape, "", random_search(kSingle, rows / 2, 5, 1, 0, false));
  Search strided = random_search(kSingle, 2 * rows + 1, 5 * columns + 3, 64, 3);
  strided.feature_layout = {0, 0, 2};
  strided.codebook_layout = {3, 1, 2};
  add_search(cases, shape, "strided, three splits", strided);
  Search codes_wide = random_search(kSingle, 7, columns + 2, 65);
  codes_wide.codebook.number = kDouble;
  add_search(cases, shape, "float64 codebook", codes_wide);
  add_search(cases, shape, "NaN and infinity", spoilt_search(kSingle, rows + 9, 2 * columns - 5, 65));
  add_search(cases, shape, "ties in a quad", tied_search(shape));
  add_search(cases, shape, "candidates tile by tile", laddered_search(shape));
}

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  const auto add_operands = [&](const char* text, Rows codebook, Layout layout) {
    cases.push_back({"operands", std::to_string(codebook.rows) + " x " + std::to_string(codebook.columns) + text,
                     [=] { return operands_case(codebook, layout); }});
  };
  add_operands("", random_rows(kSingle, 257, 65, 2), {});
  add_operands(", float64, strided", random_rows(kDouble, 40, 63, 2), {1, 3, 2});
  add_operands(", NaN and infinity", spoilt_search(kSingle, 1, 256, 64).codebook, {});
  add_operands(", bfloat16", random_rows(kBrain, 1, 192, 2), {});
  for (const Geometry& shape : {kWgmmaShape, kWide, kMiddle, kNarrow}) add_tiled_searches(cases, shape);
  for (const Geometry& shape : {kPlain, kDirect}) {
    const Number number = shape.loop == MainLoop::kPlain ? kSingle : kDouble;
    add_search(cases, shape, "", random_search(number, 33, 65, 17));
    Search strided = random_search(number, 31, 64, 64);
    strided.feature_layout = {1, 0, 2};
    strided.codebook_layout = {1, 3, 1};
    add_search(cases, shape, "strided", strided);
    add_search(cases, shape, "NaN and infinity", spoilt_search(number, 40, 130, 65));
    Search tied = tied_search(kNarrow);
    tied.features.number = tied.codebook.number = number;
    add_search(cases, shape, "ties", tied);
  }
  Search codes_wide = random_search(kHalf, 33, 65, 17);
  codes_wide.codebook.number = kDouble;
  add_search(cases, kPlain, "float64 codebook", codes_wide);

  const auto add_statistics = [&](const char* kernel, const char* text, const StatisticsProblem& given) {
    cases.push_back({kernel, text, [=] { return statistics_case(given); }});
  };
  add_statistics("statistics_scan", "masks, partners at the same place, revival",
                 {.numbers = {kSingle, kSingle, kSingle},
                  .rows = 517,
                  .codewords = 13,
                  .width = 130,
                  .masks = true,
                  .mixes = true,
                  .candidates = 1});
  add_statistics("statistics_scan", "given partners, types, strides, a shard, every attempt",
                 {.numbers = {kHalf, kSingle},
                  .rows = 301,
                  .codewords = 11,
                  .width = 9,
                  .masks = true,
                  .mixes = true,
                  .partners = true,
                  .sequential = true,
                  .candidates = kAttempts,
                  .choice = true,
                  .shard = true,
                  .strides = true});
  add_statistics("statistics_scan", "one modality, several chunks",
                 {.numbers = {kDouble}, .rows = 4500, .codewords = 5, .width = 8, .candidates = 1, .choice = true});
  add_statistics("statistics_scan", "bfloat16, strides",
                 {.numbers = {kBrain, kBrain},
                  .rows = 70,
                  .codewords = 7,
                  .width = 129,
                  .mixes = true,
                  .sequential = true,
                  .strides = true});
  add_statistics("statistics_sorted", "one modality, several pieces",
                 {.numbers = {kSingle}, .rows = 17000, .codewords = 1000, .width = 8, .sorted = true, .popular = 2});
  add_statistics("statistics_sorted", "masks, partners at the same place, revival",
                 {.numbers = {kHalf, kBrain, kSingle},
                  .rows = 5700,
                  .codewords = 1000,
                  .width = 5,
                  .sorted = true,
                  .masks = true,
                  .mixes = true,
                  .sequential = true,
                  .candidates = 1,
                  .strides = true,
                  .popular = 1});

  const auto add_apply = [&](const char* text, const ApplyProblem& given) {
    cases.push_back({"apply", text, [=] { return apply_case(given); }});
  };
  add_apply("joint", {kSingle, 3, 37, 130, true, Smoothing::kNone, Revival::kNone});
  add_apply("sequential, transient, from codewords",
            {kDouble, 3, 50, 20, false, Smoothing::kTransient, Revival::kCodewords});
  add_apply("sequential, compounding, from codewords, draws, strides",
            {kSingle, 2, 61, 33, false, Smoothing::kCompounding, Revival::kCodewords, false, true, true, true});
  add_apply("joint, transient, from features", {kDouble, 2, 40, 9, true, Smoothing::kTransient, Revival::kFeatures});
  add_apply("joint, compounding, from features, counts kept",
            {kSingle, 3, 70, 5, true, Smoothing::kCompounding, Revival::kFeatures, false, false, false, true});
  add_apply("sequential, many codewords, from codewords",
            {kSingle, 2, 600, 3, false, Smoothing::kNone, Revival::kCodewords, true, false, false});

  cases.push_back({"commitment", "float32", [] { return commitment_case<float>(3, 21, 10, 70, false, false); }});
  cases.push_back({"commitment", "float32, mask", [] { return commitment_case<float>(3, 2100, 10, 3, true, false); }});
  cases.push_back({"commitment", "float64, mask", [] { return commitment_case<double>(2, 16, 5, 33, true, false); }});
  cases.push_back({"commitment", "float32, an index out of range",
                   [] { return commitment_case<float>(2, 9, 4, 32, false, true); }});
  cases.push_back(
      {"commitment", "float64, an index out of range", [] { return commitment_case<double>(2, 9, 4, 5, true, true); }});
  return cases;
}

std::vector<Case> target_cases() {
  struct Size {
    int64_t rows, codewords, width;
  };
  constexpr Size kG1{1'000'000, 8192, 256}, kG2{1'000'000, 1024, 256}, kG3{65536, 1024, 64}, kTraining{2400, 400, 256};
  std::vector<Case> cases;
  for (const Size size : {kG1, kG2, kG3, kTraining})
    cases.push_back({"operands", std::to_string(size.codewords) + " x " + std::to_string(size.width),
                     [=] { return operands_case(random_rows(kSingle, size.codewords, size.width, 2), {}); }});
  const auto add = [&](const Geometry& shape, std::initializer_list<Size> sizes) {
    const Number number = shape.loop == MainLoop::kBest ? kDouble : kSingle;
    for (const Size size : sizes)
      add_search(cases, shape, "", random_search(number, size.rows, size.codewords, size.width));
  };
  add(kWgmmaShape, {kG1, kG2, kG3, kTraining});
  add(kWide, {kG1, kG2, kG3, kTraining});
  for (const Geometry& shape : {kMiddle, kNarrow, kPlain, kDirect}) add(shape, {kG3, kTraining});
  cases.push_back(
      {"statistics_scan", "3 x " + size_text(800, 400, 256), [] {
         return statistics_case(
             {.numbers = {kSingle, kSingle, kSingle}, .rows = 800, .codewords = 400, .width = 256, .mixes = true});
       }});
  for (const Size size : {kG2, kG3})
    cases.push_back({"statistics_sorted", size_text(size.rows, size.codewords, size.width), [=] {
                       return statistics_case({.numbers = {kSingle},
                                               .rows = size.rows,
                                               .codewords = size.codewords,
                                               .width = size.width,
                                               .sorted = true});
                     }});
  for (const Size size : {kG2, kG3, kTraining})
    cases.push_back({"apply", std::to_string(size.codewords) + " x " + std::to_string(size.width), [=] {
                       return apply_case({kSingle, size.rows == kTraining.rows ? 3 : 1, size.codewords, size.width,
                                          true, Smoothing::kNone, Revival::kCodewords});
                     }});
  cases.push_back({"commitment", "3 x " + size_text(800, 400, 256),
                   [] { return commitment_case<float>(3, 800, 400, 256, false, false); }});
  return cases;
}

// Lines and arguments.

std::string in_json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return quoted + '"';
}

void print(const Case& of, const Result& result, bool ok) {
  std::printf(
      "{\"kernel\": %s, \"case\": %s, \"rows\": %lld, \"wrong\": %lld, \"fallback\": %s, \"candidates\": %s, "
      "\"median_ms\": %s, \"ok\": %s, \"message\": %s}\n",
      in_json(of.kernel).c_str(), in_json(of.text).c_str(), static_cast<long long>(result.rows),
      static_cast<long long>(result.wrong), result.fallback < 0 ? "null" : std::to_string(result.fallback).c_str(),
      std::isfinite(result.candidates) ? text_of(result.candidates).c_str() : "null",
      result.median_ms ? text_of(*result.median_ms).c_str() : "null", ok ? "true" : "false",
      in_json(result.message).c_str());
  std::fflush(stdout);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

bool contains(const std::vector<std::string>& parts, const std::string& wanted) {
  return std::find(parts.begin(), parts.end(), wanted) != parts.end();
}

int run(const std::vector<std::string>& only) {
  const char* wish = std::getenv("UNICODE_FAST_FAULT");
  const std::vector<std::string> faults = split(wish == nullptr ? "" : wish);
  std::string kernel;
  bool wrong = false, failed = false;
  for (const Case& each : target_size ? target_cases() : small_cases()) {
    if (!only.empty() && !contains(only, each.kernel)) continue;
    const bool first = each.kernel != kernel;
    kernel = each.kernel;
    if (first && contains(faults, kernel + ":crash")) std::abort();
    while (first && contains(faults, kernel + ":hang")) std::this_thread::sleep_for(std::chrono::hours(1));
    try {
      Result result = each.run();
      if (first && contains(faults, kernel + ":wrong")) result.demand(false, "UNICODE_FAST_FAULT");
      print(each, result, result.wrong == 0);
      wrong |= result.wrong > 0;
    } catch (const CudaError& error) {
      Result result;
      result.message = error.what();
      print(each, result, false);
      // After an illegal access no later call works; a kernel that the GPU has not does no harm.
      if (cudaDeviceSynchronize() != cudaSuccess) return 2;
      failed = true;
    }
  }
  return failed ? 2 : wrong ? 1 : 0;
}

}  // namespace
}  // namespace unicode_fast::cuda

int main(int count, char** arguments) {
  using unicode_fast::cuda::measures_times, unicode_fast::cuda::target_size;
  std::vector<std::string> only;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--times") {
      measures_times = true;
    } else if (name == "--size" && (value == "small" || value == "target")) {
      target_size = value == "target";
      ++i;
    } else if (name == "--only" && !value.empty()) {
      only = unicode_fast::cuda::split(value);
      ++i;
    } else {
      std::fprintf(stderr, "usage: kernels [--size small|target] [--only NAME,...] [--times]\n");
      return 64;
    }
  }
  return unicode_fast::cuda::run(only);
}
