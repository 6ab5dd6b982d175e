// The kernels of csrc/cuda without torch: each launcher is compared with plain float64 loops on the host, then timed.
//
//   kernels [--size small|target|collapsed] [--only NAME,...] [--times]
//
// "collapsed" has two target sizes of a search, with few codewords that are far apart. The program prints a line of
// JSON for each case. Its status is 0 if all rows are right, 1 if a row is wrong, 2 if CUDA reported an error.
// UNICODE_FAST_FAULT=NAME:crash|hang|wrong,... makes a kernel fail, for tests of the reader of these lines.

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "harness.h"

namespace unicode_fast::checks {
namespace {

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
  std::vector<std::string> names;
  for (size_t start = 0; start < text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    names.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return names;
}

bool contains(const std::vector<std::string>& names, const std::string& expected) {
  return std::find(names.begin(), names.end(), expected) != names.end();
}

std::vector<Case> all_cases() {
  std::vector<Case> all;
  for (const auto cases : {operands_cases, search_cases, statistics_cases, apply_cases, commitment_cases}) {
    for (const Case& each : cases()) all.push_back(each);
  }
  return all;
}

// Whether every name is that of a kernel; if one is not, prints the names of all kernels.
bool are_kernels(const std::vector<std::string>& names) {
  std::vector<std::string> known;
  for (const Case& each : all_cases())
    if (!contains(known, each.kernel)) known.push_back(each.kernel);
  for (const std::string& name : names) {
    if (contains(known, name)) continue;
    std::fprintf(stderr, "--only must name some of");
    for (const std::string& kernel : known) std::fprintf(stderr, " %s", kernel.c_str());
    std::fprintf(stderr, ", got %s\n", name.c_str());
    return false;
  }
  return true;
}

int run(const std::vector<std::string>& only) {
  const char* wish = std::getenv("UNICODE_FAST_FAULT");
  const std::vector<std::string> faults = split(wish == nullptr ? "" : wish);
  std::string kernel;
  bool wrong = false, failed = false;
  for (const Case& each : all_cases()) {
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
      // After an illegal access every later call fails; a kernel that the GPU lacks does no harm.
      if (cudaDeviceSynchronize() != cudaSuccess) return 2;
      failed = true;
    }
  }
  return failed ? 2 : wrong ? 1 : 0;
}

}  // namespace
}  // namespace unicode_fast::checks

int main(int count, char** arguments) {
  using namespace unicode_fast::checks;
  std::vector<std::string> only;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--times") {
      measures_times = true;
    } else if (name == "--size" && (value == "small" || value == "target" || value == "collapsed")) {
      target_size = value != "small";
      collapsed_codebooks = value == "collapsed";
      ++i;
    } else if (name == "--only" && !value.empty()) {
      only = split(value);
      ++i;
    } else {
      std::fprintf(stderr, "usage: kernels [--size small|target|collapsed] [--only NAME,...] [--times]\n");
      return 64;
    }
  }
  return are_kernels(only) ? run(only) : 64;
}
