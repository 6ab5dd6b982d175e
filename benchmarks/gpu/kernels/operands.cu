#include "../../../csrc/cuda/nearest_codeword/forms.h"
#include "../../../csrc/cuda/nearest_codeword/hopper_tiles.h"
#include "operands.h"

namespace unicode_fast::checks {
namespace {

// Mean and spread of each column, and the scale that follows from them.
void check_columns(Result& result, const Rows& codebook, const Codes& codes) {
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
}

// Whether an earlier codeword has the same elements.
bool is_repeated(const Rows& codebook, int64_t j) {
  for (int64_t i = 0; i < j; ++i) {
    int64_t d = 0;
    while (d < codebook.columns && codebook.at(i, d) == codebook.at(j, d)) ++d;
    if (d == codebook.columns) return true;
  }
  return false;
}

// Whether an earlier codeword that takes part in searches lies within the radius of clusters.
bool is_represented(const Rows& codebook, const Codes& codes, int64_t j) {
  const double radius = codes.largest.radius * std::ldexp(1.0, -codes.exponent);
  for (int64_t i = 0; i < j; ++i) {
    double square = 0;
    for (int64_t d = 0; d < codebook.columns; ++d)
      square += (codebook.at(i, d) - codebook.at(j, d)) * (codebook.at(i, d) - codebook.at(j, d));
    if (codes.norms[i] < kInfinity && std::sqrt(square) <= radius) return true;
  }
  return false;
}

// Operands and norm of each codeword, and the largest norms.
void check_codewords(Result& result, const Rows& codebook, const Codes& codes) {
  const double scale = std::ldexp(1.0, codes.exponent);
  double most[3] = {0, 0, 0};
  bool members = false;
  for (int64_t j = 0; j < codes.padded; ++j) {
    bool left_out = j >= codebook.rows;
    for (int64_t d = 0; !left_out && d < codebook.columns; ++d) left_out = !std::isfinite(codebook.at(j, d));
    double exact = 0, kept = 0, residual = 0;
    for (int d = 0; d < codes.width; ++d) {
      const double value = !left_out && d < codebook.columns ? (codebook.at(j, d) - codes.mean[d]) * scale : 0.0;
      const double half = rounded(kHalf, value);
      demand_close(result, "operands", j * codes.width + d, codes.operands[j * codes.width + d], half, 0);
      exact += value * value;
      kept += half * half;
      residual += (value - half) * (value - half);
    }
    const bool excluded = left_out || (kExcludeDuplicates && !target_size && is_repeated(codebook, j));
    const bool member = !excluded && codes.norms[j] == kInfinity;
    members |= member;
    if (member) result.demand(is_represented(codebook, codes, j), "codeword " + std::to_string(j) + " is represented");
    demand_close(result, "norms", j, codes.norms[j], excluded || member ? kInfinity : exact, exact * 0x1p-23);
    if (left_out) continue;
    most[0] = std::max(most[0], exact);
    most[1] = std::max(most[1], std::sqrt(kept));
    most[2] = std::max(most[2], std::sqrt(residual));
  }
  result.demand(members == (codes.largest.radius > 0), "a radius without members");
  const float got[] = {codes.largest.squared, codes.largest.rounded, codes.largest.residual};
  for (int i = 0; i < 3; ++i) demand_close(result, "facts", i, got[i], most[i], most[i] * kFloatTolerance);
}

Result operands_case(const Rows& codebook, Layout layout, int64_t taking_part) {
  const DeviceRows given(codebook, layout);
  OperandsPlan plan;
  check(plan_operands(given.view(), plan), "plan_operands");
  Result result;
  result.rows = codebook.rows;
  result.demand(plan.rows && plan.tiles, "this GPU lacks one of the two layouts of operands");
  const Device<unsigned char> operands(plan.bytes);
  const auto launch = [&] { return launch_operands(plan, given.view(), operands.get(), nullptr); };
  finish_launch(launch(), "launch_operands");
  const std::vector<unsigned char> bytes = operands.host();
  const Rows truth = kept(codebook);
  std::vector<double> first_norms;
  for (const bool tiles : {false, true}) {
    if (!(tiles ? plan.tiles : plan.rows)) continue;
    const Codes codes = read_codes(plan, bytes, tiles);
    check_columns(result, truth, codes);
    check_codewords(result, truth, codes);
    if (kFindClusters && taking_part > 0)
      result.demand(std::count_if(codes.norms.begin(), codes.norms.end(),
                                  [](double norm) { return norm < kInfinity; }) == taking_part,
                    "another number of codewords takes part");
    for (size_t j = 0; j < first_norms.size(); ++j)
      result.demand(first_norms[j] == codes.norms[j], "the layouts have different norms");
    first_norms = codes.norms;
  }
  result.median_ms = median_ms(launch);
  return result;
}

// `taking_part` codewords take part in searches, where that is known by hand.
void add(std::vector<Case>& cases, const char* text, const Rows& codebook, Layout layout = {},
         int64_t taking_part = 0) {
  cases.push_back({"operands", size_text({codebook.rows, codebook.columns}) + text,
                   [=] { return operands_case(codebook, layout, taking_part); }});
}

}  // namespace

Codes read_codes(const OperandsPlan& plan, const std::vector<unsigned char>& bytes, bool tiles) {
  Codes codes;
  codes.width = plan.width;
  codes.padded = plan.codewords;
  for (int d = 0; d < plan.width; ++d) {
    codes.mean.push_back(bits_at<float>(&bytes[plan.mean + d * 4]));
    codes.spread.push_back(bits_at<float>(&bytes[plan.spread + d * 4]));
  }
  codes.largest = bits_at<CodebookNorms>(&bytes[plan.facts]);
  codes.exponent = bits_at<int>(&bytes[plan.facts + sizeof codes.largest]);
  for (int64_t j = 0; j < plan.codewords; ++j) {
    for (int d = 0; d < plan.width; ++d) {
      const size_t place =
          tiles ? plan.tile_operands + operand_place(j, d, plan.width) : plan.operands + (j * plan.width + d) * 2;
      codes.operands.push_back(get(kHalf, &bytes[place]));
    }
    const size_t place = tiles ? plan.tile_operands + norm_place(j, plan.width) : plan.norms + j * 4;
    codes.norms.push_back(bits_at<float>(&bytes[place]));
  }
  return codes;
}

Rows spoilt_codebook(const Rows& codebook) {
  Rows spoilt = kept(codebook);
  for (int64_t j = 0; j < spoilt.rows; ++j) {
    if (j % 13 == 2 || j == spoilt.rows - 1) spoilt.set(j, j % spoilt.columns, kNaN);
    if (j % 17 == 0) spoilt.set(j, j % spoilt.columns, j % 2 ? kInfinity : -kInfinity);
  }
  return spoilt;
}

Rows repeated_codebook(const Rows& codebook, int64_t different) {
  Rows repeated = kept(codebook);
  for (int64_t j = 0; j < repeated.rows; ++j) {
    for (int64_t d = 0; d < repeated.columns; ++d) repeated.set(j, d, codebook.at(j * j % different, d));
    repeated.set(j, 0, j % 2 == 0 ? 0.0 : -0.0);
  }
  return repeated;
}

// Codewords near to one of the first `clusters`.
Rows clustered_codebook(const Rows& codebook, int64_t clusters, double spread = 1e-6) {
  Rows clustered = kept(codebook);
  for (int64_t j = clusters; j < clustered.rows; ++j) {
    for (int64_t d = 0; d < clustered.columns; ++d)
      clustered.set(j, d, codebook.at(j % clusters, d) + spread * codebook.at(j, d));
  }
  return clustered;
}

std::vector<Case> operands_cases() {
  std::vector<Case> cases;
  if (target_size) {
    for (const Size size : {kG1, kG2, kG3, kTraining})
      add(cases, "", random_rows(kSingle, size.codewords, size.width, 2));
    return cases;
  }
  add(cases, "", random_rows(kSingle, 257, 65, 2));
  add(cases, ", float64, strided", random_rows(kDouble, 40, 63, 2), {1, 3, 2});
  add(cases, ", NaN and infinity", spoilt_codebook(random_rows(kSingle, 256, 64, 2)));
  add(cases, ", duplicates", repeated_codebook(random_rows(kSingle, 300, 70, 2), 40));
  add(cases, ", all the same", repeated_codebook(random_rows(kSingle, 260, 3, 2), 1));
  add(cases, ", clusters", clustered_codebook(random_rows(kSingle, 300, 70, 2), 40), {}, 40);
  add(cases, ", clusters beyond the edges of cells", clustered_codebook(random_rows(kSingle, 300, 70, 2), 40, 2e-4), {},
      40);
  add(cases, ", clusters, float64", clustered_codebook(random_rows(kDouble, 70, 70, 2), 40), {}, 70);
  add(cases, ", bfloat16", random_rows(kBrain, 1, 192, 2));
  return cases;
}

}  // namespace unicode_fast::checks
