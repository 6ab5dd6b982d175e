// The scores and bounds that csrc/cpu/kernels_body.h computes, for tests/test_exactness.py.
#include "../csrc/cpu/kernels.cpp"

using namespace unicode_fast::cpu;

// Scores (N, M) of rows (N, D) and codewords (M, D), and twice the bound (N) on their error. Mean (D) and scale come back
// too.
#define SCORES(name)                                                                                               \
  extern "C" void scores_##name(int64_t rows, int64_t codewords, int64_t width, const float* x, const double* e,   \
                                float* scores, float* bounds, float* mean, double* scale) {                        \
    constexpr int64_t panel = name::kPanel, pair = name::kPair, group = name::kGroup;                              \
    PreparedCodebook codes;                                                                                        \
    codes.codewords = codewords;                                                                                   \
    codes.width = width;                                                                                           \
    codes.mean = mean;                                                                                             \
    centre(codes, e);                                                                                              \
    *scale = codes.scale;                                                                                          \
    const int64_t panels = (codewords + panel - 1) / panel, depth = (width + pair - 1) / pair;                     \
    std::vector<uint32_t> code_operands(panels * depth * panel);                                                   \
    std::vector<float> norms(panels * panel);                                                                      \
    codes.operands = code_operands.data();                                                                         \
    codes.norms = norms.data();                                                                                    \
    name::prepare(codes, e, 0, panels, codes.largest);                                                             \
    std::vector<uint32_t> operands(group * depth);                                                                 \
    for (int64_t first = 0; first < rows; first += group) {                                                        \
      std::fill(operands.begin(), operands.end(), 0);                                                              \
      for (int64_t r = 0; r < group && first + r < rows; ++r)                                                      \
        bounds[first + r] = name::prepare_row(codes, x + (first + r) * width,                                      \
                                              reinterpret_cast<name::Operand*>(operands.data() + r * depth));      \
      for (int64_t p = 0; p < panels; ++p) {                                                                       \
        name::Floats found[name::kGroup][name::kVectors];                                                          \
        name::score(operands.data(), depth, codes.operands + p * depth * panel,                                    \
                    codes.norms + p * panel, depth, found);                                                        \
        for (int64_t r = 0; r < group && first + r < rows; ++r)                                                    \
          for (int64_t j = p * panel; j < std::min((p + 1) * panel, codewords); ++j)                               \
            scores[(first + r) * codewords + j] =                                                                  \
                found[r][j % panel / name::kLanes][j % panel % name::kLanes];                                      \
      }                                                                                                            \
    }                                                                                                              \
  }

SCORES(portable)
#if defined(__x86_64__)
SCORES(avx2)
SCORES(avx512)
SCORES(avx512_bf16)
#endif

extern "C" int usable(const char* name) {
  setenv("UNICODE_FAST_CPU", name, 1);
  try {
    return std::string_view(choose().name) == name;
  } catch (const std::runtime_error&) {
    return 0;
  }
}
