// The scores and bounds that csrc/cpu/search_body.h computes, for tests/test_exactness.py.
#include <string_view>

#include "../csrc/cpu/kernels.cpp"

namespace unicode_fast::cpu::twin {
// The loops in the form for processors without vectors of their own, with vectors of four lanes.
#undef UNICODE_FAST_TARGET
#undef UNICODE_FAST_LANES
#undef UNICODE_FAST_VECTORS
#undef UNICODE_FAST_MULTIPLY_ADD
#define UNICODE_FAST_TARGET
#define UNICODE_FAST_LANES 4
#define UNICODE_FAST_VECTORS 4
#define UNICODE_FAST_MULTIPLY_ADD UNICODE_FAST_PLAIN_MULTIPLY_ADD
#include "../csrc/cpu/kernels_body.h"
}  // namespace unicode_fast::cpu::twin

using namespace unicode_fast::cpu;

// Scores (N, M) of rows (N, D) and codewords (M, D), and twice the bound (N) on their error. Mean (D) and scale come
// back too; a scale of zero where codewords are equal.
#define SCORES(name)                                                                                                \
  extern "C" void scores_##name(int64_t rows, int64_t codewords, int64_t width, const float* x, const double* e,    \
                                float* scores, float* bounds, float* mean, double* scale) {                         \
    constexpr int64_t panel = name::kPanel, group = name::kGroup, lanes = name::kLanes;                             \
    PreparedCodebook codes;                                                                                         \
    codes.codewords = codewords;                                                                                    \
    codes.width = width;                                                                                            \
    codes.mean = mean;                                                                                              \
    const int64_t panels = (codewords + panel - 1) / panel, depth = (width + 1) / 2;                                \
    const int64_t padded = (width + lanes - 1) / lanes * lanes, stride = (padded + 1) / 2;                          \
    std::vector<uint32_t> code_operands(panels * depth * panel);                                                    \
    std::vector<float> norms(panels * panel), centred(padded);                                                      \
    std::vector<int32_t> places(codewords);                                                                         \
    codes.operands = code_operands.data();                                                                          \
    codes.norms = norms.data();                                                                                     \
    codes.places = places.data();                                                                                   \
    name::prepare_double(codes, e, run_here);                                                                       \
    *scale = codes.kept == codewords ? codes.scale : 0;                                                             \
    std::vector<uint32_t> operands(group * stride);                                                                 \
    for (int64_t first = 0; first < rows; first += group) {                                                         \
      float factors[group] = {};                                                                                    \
      for (int64_t r = 0; r < group && first + r < rows; ++r)                                                       \
        name::prepare_row(codes, x + (first + r) * width, centred.data(),                                           \
                          reinterpret_cast<int16_t*>(operands.data() + r * stride), factors[r], bounds[first + r]); \
      for (int64_t p = 0; p < panels; ++p) {                                                                        \
        float found[group][panel];                                                                                  \
        name::score(operands.data(), stride, factors, codes.operands + p * depth * panel, codes.norms + p * panel,  \
                    depth, found);                                                                                  \
        for (int64_t r = 0; r < group && first + r < rows; ++r)                                                     \
          for (int64_t j = p * panel; j < std::min((p + 1) * panel, codewords); ++j)                                \
            scores[(first + r) * codewords + j] = found[r][j % panel];                                              \
      }                                                                                                             \
    }                                                                                                               \
  }

SCORES(portable)
SCORES(twin)
#if defined(__x86_64__)
SCORES(avx2)
#if UNICODE_FAST_HAS_AVX_VNNI
SCORES(avx_vnni)
#endif
SCORES(avx512)
SCORES(avx512_vnni)
#endif

extern "C" int usable(const char* name) {
  if (std::string_view(name) == "twin") return 1;
  setenv("UNICODE_FAST_CPU", name, 1);
  try {
    return std::string_view(choose().name) == name;
  } catch (const std::runtime_error&) {
    return 0;
  }
}
