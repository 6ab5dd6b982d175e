// The harness of the native checks: errors of CUDA, device memory, times, and results of cases.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace unicode_fast::cuda {}

namespace unicode_fast::checks {

using namespace cuda;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
// Relative tolerances: of float64 sums in another order, and of numbers rounded once to float32.
constexpr double kSumTolerance = 0x1p-40, kFloatTolerance = 0x1p-22;
// The tolerance of a number that is not compared.
constexpr double kUnchecked = -1;

// Set by the arguments of the program.
inline bool target_size = false, collapsed_codebooks = false, measures_times = false;

struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t error, const char* what);
void finish_launch(cudaError_t error, const char* what);

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

// Device memory of exactly this many numbers, so that a checker detects reads beyond them; all bits are set at first.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    if (count == 0) return;
    check(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) { set(values); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t size() const { return count_; }
  void set(const std::vector<T>& values) const {
    if (count_ > 0) check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
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

// Values `stride` places apart, with `between` in the gaps.
template <class T>
std::vector<T> strided(const std::vector<T>& values, int64_t stride, T between) {
  std::vector<T> all((values.size() - 1) * stride + 1, between);
  for (size_t i = 0; i < values.size(); ++i) all[i * stride] = values[i];
  return all;
}

// Median time of `launch`, the second-level cache flushed before each at target size; none without --times.
std::optional<double> median_ms(const std::function<cudaError_t()>& launch);

struct Result {
  int64_t rows = 0, wrong = 0, fallback = -1;  // -1: the kernel has none
  double candidates = kNaN;                    // of a row that did not fall back, on average
  std::optional<double> median_ms = {};
  std::string message = {};

  void demand(bool condition, const std::string& otherwise);
};

// The reference's numbers of an output, and by how much each may differ.
struct Expected {
  std::vector<double> values, tolerances;

  explicit Expected(size_t count) : values(count, 0), tolerances(count, 0) {}
  void set(int64_t place, double value, double tolerance) {
    values[place] = value;
    tolerances[place] = tolerance;
  }
};

std::string text_of(double value);
bool is_close(double got, double expected, double tolerance);
void demand_close(Result& result, const char* name, int64_t place, double got, double expected, double tolerance);

// Compares places [first, last) of an output.
template <class T>
void demand_close(Result& result, const char* name, const std::vector<T>& got, const Expected& expected,
                  int64_t first = 0, int64_t last = -1) {
  for (int64_t i = first; i < (last < 0 ? static_cast<int64_t>(expected.values.size()) : last); ++i) {
    if (expected.tolerances[i] != kUnchecked)
      demand_close(result, name, i - first, static_cast<double>(got[i]), expected.values[i], expected.tolerances[i]);
  }
}

struct Case {
  std::string kernel, text;
  std::function<Result()> run;
};

// The sizes of benchmarks/shapes.py.
struct Size {
  int64_t rows, codewords, width;
};
constexpr Size kG1{1'000'000, 8192, 256}, kG2{1'000'000, 1024, 256}, kG3{65536, 1024, 64}, kTraining{2400, 400, 256};

// "A x B x C".
std::string size_text(std::initializer_list<int64_t> sizes);

// The cases of each operator at the size that the arguments name.
std::vector<Case> operands_cases();
std::vector<Case> search_cases();
std::vector<Case> statistics_cases();
std::vector<Case> apply_cases();
std::vector<Case> commitment_cases();

}  // namespace unicode_fast::checks
