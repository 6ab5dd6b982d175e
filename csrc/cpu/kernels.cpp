#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors are passed in memory or inlined, so calling conventions do not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#if defined(__clang__)
#define UNICODE_FAST_ROUND_PRODUCTS
#else
#define UNICODE_FAST_ROUND_PRODUCTS __attribute__((optimize("fp-contract=off")))
#endif

namespace unicode_fast::cpu {

namespace portable {
#define UNICODE_FAST_TARGET
#define UNICODE_FAST_LANES 4
#define UNICODE_FAST_BFLOAT16 0
#if defined(__x86_64__)
#define UNICODE_FAST_VECTORS 2
#else
#define UNICODE_FAST_VECTORS 4
#endif
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_LANES
#undef UNICODE_FAST_VECTORS
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma")))
#define UNICODE_FAST_LANES 8
#define UNICODE_FAST_VECTORS 2
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_LANES
#undef UNICODE_FAST_VECTORS
}  // namespace avx2

namespace avx512 {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
#define UNICODE_FAST_LANES 16
#define UNICODE_FAST_VECTORS 4
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_BFLOAT16
}  // namespace avx512

namespace avx512_bf16 {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define UNICODE_FAST_BFLOAT16 1
#include "kernels_body.h"
}  // namespace avx512_bf16

#endif

namespace {

const Kernels& choose() {
  static const Kernels plain = portable::table("portable");
#if defined(__x86_64__)
  static const Kernels two = avx2::table("avx2"), five = avx512::table("avx512"),
                       bfloat = avx512_bf16::table("avx512_bf16");
  const char* wish = std::getenv("UNICODE_FAST_CPU");
  const std::string_view wanted = wish == nullptr ? "" : wish;
  __builtin_cpu_init();
  const bool has_two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_five = has_two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_bfloat = has_five && __builtin_cpu_supports("avx512bf16");
  if (has_bfloat && (wanted.empty() || wanted == "avx512_bf16")) return bfloat;
  if (has_five && (wanted.empty() || wanted == "avx512")) return five;
  if (has_two && (wanted.empty() || wanted == "avx2")) return two;
#endif
  if (!wanted.empty() && wanted != "portable")
    throw std::runtime_error(
        "UNICODE_FAST_CPU must be portable, avx2, avx512 or avx512_bf16, and one that this "
        "processor has, got " +
        std::string(wanted));
  return plain;
}

}  // namespace

void centre(PreparedCodebook& codes, const double* values) {
  std::vector<double> mean(codes.width, 0.0);
  for (int64_t j = 0; j < codes.codewords; ++j)
    for (int64_t d = 0; d < codes.width; ++d) mean[d] += values[j * codes.width + d];
  for (int64_t d = 0; d < codes.width; ++d) {
    codes.finite = codes.finite && std::isfinite(mean[d]);
    const float rounded = static_cast<float>(mean[d] / codes.codewords);
    codes.mean[d] = std::isfinite(rounded) ? rounded : 0;
  }
  if (!codes.finite) return;
  double largest = 0;
  for (int64_t j = 0; j < codes.codewords; ++j)
    for (int64_t d = 0; d < codes.width; ++d)
      largest = std::max(largest, std::abs(values[j * codes.width + d] - codes.mean[d]));
  if (largest > 0) codes.scale = std::ldexp(1.0, -std::clamp(std::ilogb(largest), -100, 100));
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace unicode_fast::cpu
