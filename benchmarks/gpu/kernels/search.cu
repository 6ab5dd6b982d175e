#include "../../../csrc/cuda/nearest_codeword/forms.h"
#include "../../../csrc/cuda/nearest_codeword/hopper_tiles.h"
#include "search.h"

namespace unicode_fast::checks {
namespace {

// The most candidates that a random row may have on average.
constexpr double kMostCandidates = 1.5;
constexpr int64_t kSampledRows = 256;

constexpr Geometry kWgmma{"search_wgmma", MainLoop::kWgmma, kGroups * kGroupRows, kTileCodewords, kTileCodewords},
    kWide{"search_wide", MainLoop::kWide, 128, 256, 64}, kMiddle{"search_middle", MainLoop::kMiddle, 64, 128, 32},
    kNarrow{"search_narrow", MainLoop::kNarrow, 16, 64, 16}, kPlain{"search_plain", MainLoop::kPlain, 32, 64, 0},
    kDirect{"search_direct", MainLoop::kBest, 32, 64, 0};

struct Output {
  std::vector<int64_t> index;
  std::vector<unsigned char> distance;
  std::vector<int> compared;
};

void set_splits(SearchPlan& plan, const Search& given, int columns) {
  const auto tiles = static_cast<int>((given.codebook.rows + columns - 1) / columns);
  const int per_split = (tiles + given.splits - 1) / given.splits;
  plan.splits = {(tiles + per_split - 1) / per_split, per_split};
  const int64_t record_bytes = given.features.rows * plan.splits.count * static_cast<int64_t>(sizeof(Record));
  plan.bounds = round_to(static_cast<int64_t>(plan.records) + record_bytes, 256);
  plan.open_rows = round_to(plan.bounds + given.features.rows * static_cast<int64_t>(sizeof(float)), 256);
  plan.open_count = plan.open_rows + given.features.rows * sizeof(int64_t);
  plan.bytes = plan.open_count + sizeof(int);
}

// Compares rows with the reference: all of them, or samples at target size. Small sizes come with `codes`.
void check_rows(Result& result, const Search& given, const Geometry& shape, Splits splits, const Codes& codes,
                const Output& output) {
  const Rows codebook = kept(given.codebook);
  const Number number = given.features.number == kDouble ? kDouble : kSingle;
  const int64_t rows = given.features.rows, samples = target_size ? std::min(kSampledRows, rows) : rows;
  const bool lists = !output.compared.empty();
  const auto row_of = [&](int64_t sample) { return sample * (rows - 1) / std::max<int64_t>(samples - 1, 1); };
  const auto fault_of = [&](int64_t row) -> const char* {
    const double distance = get(number, &output.distance[row * size_of(number)]);
    if (!is_nearest(given.features, codebook, row, output.index[row], distance)) return "index or distance";
    if (!lists || target_size) return nullptr;
    const int compared = output.compared[row];
    if (!may_compare(compared, given, row, codes, shape, splits)) return "compared codewords";
    return given.compared.empty() || compared == given.compared[row] ? nullptr : "compared codewords by hand";
  };
  std::vector<const char*> faults(samples);
  in_threads(samples, [&](int64_t sample) { faults[sample] = fault_of(row_of(sample)); });
  for (int64_t sample = 0; sample < samples; ++sample) {
    if (faults[sample] == nullptr) continue;
    const int64_t row = row_of(sample);
    result.demand(false, std::string(faults[sample]) + " of row " + std::to_string(row) + ": index " +
                             std::to_string(output.index[row]) +
                             (lists ? ", compared with " + std::to_string(output.compared[row]) : std::string()));
  }
}

void count_candidates(Result& result, const std::vector<int>& compared, bool random) {
  result.fallback = std::count(compared.begin(), compared.end(), kComparedWithAll);
  double sum = 0;
  for (const int number : compared) sum += std::max(number, 0);
  result.candidates = sum / static_cast<double>(result.rows - result.fallback);
  if (!random) return;
  result.demand(result.fallback == 0, std::to_string(result.fallback) + " rows were compared with all codewords");
  result.demand(result.candidates <= kMostCandidates, "too many candidates");
}

Result search_case(const Search& given, const Geometry& shape) {
  const DeviceRows feature_rows(given.features, given.feature_layout),
      codebook_rows(given.codebook, given.codebook_layout);
  const Matrix features = feature_rows.view(), codebook = codebook_rows.view();
  const bool lists = shape.section > 0;
  SearchPlan plan;
  check(plan_nearest_codeword(features, codebook, shape.loop, plan), "plan_nearest_codeword");
  Result result;
  result.rows = features.rows;
  if (plan.tile_rows != (lists ? shape.rows : 0) || plan.wgmma != (shape.loop == MainLoop::kWgmma)) {
    result.demand(false, "another kernel was planned");
    return result;
  }
  if (lists && given.splits > 0) set_splits(plan, given, shape.columns);
  if (lists && !target_size) {
    // Each block of the second search does several tiles.
    plan.open_blocks = 1;
    plan.open_in_narrow |= shape.loop == MainLoop::kNarrow;
    // One block of the first does several tiles, where it can.
    make_persistent(features, result.rows > 4 * shape.rows ? 2 : 1, plan);
  }
  OperandsPlan made = operands_for(plan, codebook);
  // Target sizes take the operands of a prepared codebook.
  if (lists && target_size) check(plan_operands(codebook, made), "plan_operands");
  const Device<unsigned char> operands(made.bytes), workspace(plan.bytes),
      distance(result.rows * (features.number == kDouble ? 8 : 4));
  const Device<int64_t> index(result.rows);
  const Device<int> compared(lists ? result.rows : 0);
  finish_launch(launch_operands(made, codebook, operands.get(), nullptr), "launch_operands");
  Found found{index.get(), distance.get(), compared.get()};
  const auto launch = [&] {
    return launch_nearest_codeword(plan, made, features, codebook, operands.get(), workspace.get(), found, nullptr);
  };
  finish_launch(launch(), "launch_nearest_codeword");

  const Output output{index.host(), distance.host(), compared.host()};
  const Codes codes = lists && !target_size ? read_codes(made, operands.host(), plan.wgmma) : Codes{};
  check_rows(result, given, shape, plan.splits, codes, output);
  if (lists) count_candidates(result, output.compared, given.random);
  found.compared = nullptr;  // as training calls it
  result.median_ms = median_ms(launch);
  return result;
}

void add(std::vector<Case>& cases, const Geometry& shape, const char* text, const Search& given) {
  const std::string size = size_text({given.features.rows, given.codebook.rows, given.features.columns});
  cases.push_back({shape.kernel, *text ? size + ", " + text : size, [=] { return search_case(given, shape); }});
}

Search with_layouts(Search given, Layout features, Layout codebook) {
  given.feature_layout = features;
  given.codebook_layout = codebook;
  return given;
}

Search with_codebook(Search given, Number number) {
  given.codebook.number = number;
  return given;
}

// Searches of the half-precision kernels: rows and codewords around one tile and several, widths around one block of
// dimensions and several. Some have so many blocks that every stage of the ring is filled more than twice.
void add_tiled(std::vector<Case>& cases, const Geometry& shape) {
  const int64_t rows = shape.rows, columns = shape.columns;
  add(cases, shape, "", random_search(kSingle, rows - 1, columns - 1, 63));
  add(cases, shape, "", random_search(kSingle, rows, columns, 64));
  add(cases, shape, "unaligned", with_layouts(random_search(kSingle, rows + 1, columns + 1, 65), {1, 2, 1}, {1, 2, 1}));
  add(cases, shape, "aligned rows that begin between",
      with_layouts(random_search(kSingle, rows + 1, columns + 7, 63), {1, 1, 1}, {}));
  // A tile of width 64 is one block: the rings have 3 stages, that of wgmma 6.
  const int64_t tiles = shape.loop == MainLoop::kWgmma ? 13 : 7;
  add(cases, shape, "float16, one split", random_search(kHalf, 5, tiles * columns - 9, 64, 1));
  add(cases, shape, "bfloat16, one split", with_codebook(random_search(kBrain, rows + 3, 4 * columns, 192, 1), kBrain));
  if (shape.loop == MainLoop::kWgmma) {
    // More tiles of rows than both buffers hold twice.
    add(cases, shape, "two splits", random_search(kSingle, 5 * rows + 1, columns + 9, 120, 2));
    add(cases, shape, "bfloat16, strided rows",
        with_layouts(random_search(kBrain, 3 * rows - 70, columns, 64), {0, 8, 1}, {}));
  }
  // The widest rows that leave this shape its shared memory.
  const int64_t widest = shape.loop == MainLoop::kWide ? 383 : 575;
  add(cases, shape, "aligned with a gap",
      with_layouts(random_search(kSingle, rows + 1, columns + 7, widest), {0, 1, 1}, {}));
  add(cases, shape, "", random_search(kSingle, rows / 2, 5, 1, 0, false));
  add(cases, shape, "strided, three splits",
      with_layouts(random_search(kSingle, 2 * rows + 1, 5 * columns + 3, 64, 3), {0, 0, 2}, {3, 1, 2}));
  add(cases, shape, "float64 codebook", with_codebook(random_search(kSingle, 7, columns + 2, 65), kDouble));
  add(cases, shape, "NaN and infinity", spoilt_search(kSingle, rows + 9, 2 * columns - 5, 65));
  if (kExcludeDuplicates) add(cases, shape, "duplicates", repeated_search(rows + 1, 2 * columns + 1));
  add(cases, shape, "a collapsed codebook", collapsed_search(shape, 64));
  add(cases, shape, "a collapsed codebook", with_layouts(collapsed_search(shape, 131), {1, 1, 1}, {1, 1, 1}));
  add(cases, shape, "a collapsed codebook in float64", with_codebook(collapsed_search(shape, 40), kDouble));
  add(cases, shape, "clusters", clustered_search(shape, 150, 64));
  add(cases, shape, "clusters, spread 2e-4", clustered_search(shape, 150, 64, kSingle, 2e-4));
  add(cases, shape, "clusters, float16", with_layouts(clustered_search(shape, 70, 131, kHalf), {1, 1, 1}, {1, 1, 1}));
  add(cases, shape, "clusters of large numbers", large_search(shape));
  add(cases, shape, "a codeword beside a cluster", beside_search(shape));
  Search wide = with_codebook(clustered_search(shape, 30, 40), kDouble);
  wide.random = false;
  add(cases, shape, "clusters, float64 codebook", wide);
  if (shape.loop == MainLoop::kNarrow) add(cases, shape, "clusters, many rows", clustered_search(shape, 2100, 24));
  add(cases, shape, "clusters in a collapsed codebook", nested_search(shape, 40));
  add(cases, shape, "ties in a quad", tied_search(shape));
  add(cases, shape, "ties in clusters", tied_search(shape, 0x1p-23f));
  add(cases, shape, "candidates tile by tile", laddered_search(shape));
}

void add_direct(std::vector<Case>& cases, const Geometry& shape, Number number) {
  add(cases, shape, "", random_search(number, 33, 65, 17));
  add(cases, shape, "strided", with_layouts(random_search(number, 31, 64, 64), {1, 0, 2}, {1, 3, 1}));
  add(cases, shape, "NaN and infinity", spoilt_search(number, 40, 130, 65));
  Search tied = with_codebook(tied_search(kNarrow), number);
  tied.features.number = number;
  add(cases, shape, "ties", tied);
}

}  // namespace

std::vector<Case> search_cases() {
  std::vector<Case> cases;
  if (!target_size) {
    for (const Geometry& shape : {kWgmma, kWide, kMiddle, kNarrow}) add_tiled(cases, shape);
    add_direct(cases, kPlain, kSingle);
    add_direct(cases, kDirect, kDouble);
    add(cases, kPlain, "float64 codebook", with_codebook(random_search(kHalf, 33, 65, 17), kDouble));
    return cases;
  }
  if (collapsed_codebooks) {
    for (const Geometry& shape : {kWgmma, kWide, kMiddle, kNarrow}) {
      for (const Size size : {kTraining, kG3}) {
        add(cases, shape, "40 distinct", few_search(size, 40, 0));
        add(cases, shape, "40 tight clusters", few_search(size, 40, 1e-6));
      }
    }
    return cases;
  }
  for (const Geometry& shape : {kWgmma, kWide, kMiddle, kNarrow, kPlain, kDirect}) {
    const Number number = shape.loop == MainLoop::kBest ? kDouble : kSingle;
    for (const Size size : {kG1, kG2, kG3, kTraining}) {
      const bool is_large = size.rows > kG3.rows, takes_large = shape.rows == 128;
      if (is_large && !takes_large) continue;
      add(cases, shape, "", random_search(number, size.rows, size.codewords, size.width));
    }
  }
  return cases;
}

}  // namespace unicode_fast::checks
