#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Vectors are passed in memory or inlined, so calling conventions do not matter.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// Compilers that know the instructions of AVX-VNNI.
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11)
#define UNICODE_FAST_HAS_AVX_VNNI 1
#else
#define UNICODE_FAST_HAS_AVX_VNNI 0
#endif

// The sum of products for any processor. The shifts extend the signs of the two integers.
#define UNICODE_FAST_PLAIN_MULTIPLY_ADD(sum, code, pair) \
  ((sum) + (((code) << 16) >> 16) * static_cast<int32_t>(static_cast<int16_t>(pair)) + ((code) >> 16) * ((pair) >> 16))

#if defined(__clang__)
#define UNICODE_FAST_ROUND_PRODUCTS
#else
#define UNICODE_FAST_ROUND_PRODUCTS __attribute__((optimize("fp-contract=off")))
#endif

namespace unicode_fast::cpu {

namespace portable {
#define UNICODE_FAST_TARGET
#define UNICODE_FAST_LANES 4
#if defined(__x86_64__)
#define UNICODE_FAST_VECTORS 2
#define UNICODE_FAST_MULTIPLY_ADD(sum, code, pair) \
  (Ints) _mm_add_epi32((__m128i)(sum), _mm_madd_epi16((__m128i)(code), _mm_set1_epi32(pair)))
#else
#define UNICODE_FAST_VECTORS 4
#define UNICODE_FAST_MULTIPLY_ADD UNICODE_FAST_PLAIN_MULTIPLY_ADD
#endif
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_LANES
#undef UNICODE_FAST_VECTORS
#undef UNICODE_FAST_MULTIPLY_ADD
}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma")))
#define UNICODE_FAST_LANES 8
#define UNICODE_FAST_VECTORS 2
#define UNICODE_FAST_MULTIPLY_ADD(sum, code, pair) \
  (Ints) _mm256_add_epi32((__m256i)(sum), _mm256_madd_epi16((__m256i)(code), _mm256_set1_epi32(pair)))
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_MULTIPLY_ADD
}  // namespace avx2

#if UNICODE_FAST_HAS_AVX_VNNI
namespace avx_vnni {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma,avxvnni")))
#define UNICODE_FAST_MULTIPLY_ADD(sum, code, pair) \
  (Ints) _mm256_dpwssd_avx_epi32((__m256i)(sum), (__m256i)(code), _mm256_set1_epi32(pair))
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_MULTIPLY_ADD
}  // namespace avx_vnni
#endif
#undef UNICODE_FAST_LANES
#undef UNICODE_FAST_VECTORS

namespace avx512 {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")))
#define UNICODE_FAST_LANES 16
#define UNICODE_FAST_VECTORS 4
#define UNICODE_FAST_MULTIPLY_ADD(sum, code, pair) \
  (Ints) _mm512_add_epi32((__m512i)(sum), _mm512_madd_epi16((__m512i)(code), _mm512_set1_epi32(pair)))
#include "kernels_body.h"
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_MULTIPLY_ADD
}  // namespace avx512

namespace avx512_vnni {
#define UNICODE_FAST_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define UNICODE_FAST_MULTIPLY_ADD(sum, code, pair) \
  (Ints) _mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(code), _mm512_set1_epi32(pair))
#include "kernels_body.h"
}  // namespace avx512_vnni

#endif

namespace {

const Kernels& choose() {
  static const Kernels plain = portable::table("portable");
  // Sets that this processor has, the best first.
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  static const Kernels two = avx2::table("avx2"), five = avx512::table("avx512"),
                       five_vnni = avx512_vnni::table("avx512_vnni");
  __builtin_cpu_init();
  const bool has_two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_five = has_two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_five && __builtin_cpu_supports("avx512vnni")) sets.push_back(&five_vnni);
  if (has_five) sets.push_back(&five);
#if UNICODE_FAST_HAS_AVX_VNNI
  static const Kernels two_vnni = avx_vnni::table("avx_vnni");
  if (has_two && __builtin_cpu_supports("avxvnni")) sets.push_back(&two_vnni);
#endif
  if (has_two) sets.push_back(&two);
#endif
  sets.push_back(&plain);
  const char* wish = std::getenv("UNICODE_FAST_CPU");
  const std::string wanted = wish == nullptr ? "" : wish;
  std::string names;
  for (const Kernels* set : sets) {
    if (wanted.empty() || wanted == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::runtime_error(
      "UNICODE_FAST_CPU must be portable, avx2, avx_vnni, avx512 or avx512_vnni, and one that this processor has (" +
      names + "), got " + wanted);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace unicode_fast::cpu
