#include <cstdio>

#include "harness.h"

namespace unicode_fast::checks {
namespace {

constexpr int kTargetRepeats = 25, kTargetWarmUps = 3;
constexpr size_t kFlushBytes = size_t{256} << 20;  // several times the second-level cache

struct Event {
  cudaEvent_t event;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  Event(const Event&) = delete;
  ~Event() { cudaEventDestroy(event); }
  void record() const { check(cudaEventRecord(event, nullptr), "cudaEventRecord"); }
};

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw CudaError(std::string(what) + ": " + cudaGetErrorString(error));
}

void finish_launch(cudaError_t error, const char* what) {
  check(error, what);
  check(cudaGetLastError(), what);
  check(cudaDeviceSynchronize(), what);
}

std::optional<double> median_ms(const std::function<cudaError_t()>& launch) {
  if (!measures_times) return std::nullopt;
  const int repeats = target_size ? kTargetRepeats : 1, warm_ups = target_size ? kTargetWarmUps : 0;
  const Device<unsigned char> flushed(target_size ? kFlushBytes : 1);
  const Event start, end;
  std::vector<double> times;
  for (int i = -warm_ups; i < repeats; ++i) {
    check(cudaMemsetAsync(flushed.get(), i & 1, flushed.size(), nullptr), "cudaMemsetAsync");
    start.record();
    check(launch(), "launch");
    end.record();
    check(cudaEventSynchronize(end.event), "cudaEventSynchronize");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start.event, end.event), "cudaEventElapsedTime");
    if (i >= 0) times.push_back(milliseconds);
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void Result::demand(bool condition, const std::string& otherwise) {
  if (condition) return;
  ++wrong;
  if (message.empty()) message = otherwise;
}

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", value);
  return text;
}

bool is_close(double got, double expected, double tolerance) {
  return got == expected || (std::isnan(got) && std::isnan(expected)) || std::abs(got - expected) <= tolerance;
}

void demand_close(Result& result, const char* name, int64_t place, double got, double expected, double tolerance) {
  if (is_close(got, expected, tolerance)) return;
  result.demand(
      false, std::string(name) + "[" + std::to_string(place) + "] is " + text_of(got) + ", not " + text_of(expected));
}

std::string size_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : " x ") + std::to_string(size);
  return text;
}

}  // namespace unicode_fast::checks
