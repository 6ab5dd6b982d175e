#include <deque>

#include "batches.h"

namespace unicode_fast::checks {
namespace {

constexpr double kOwnWeight = 0.625, kDecay = 0.75;
constexpr int64_t kSeed = 11, kStep = 5, kSampledCodewords = 16;

// One modality on the host.
struct Share {
  Rows features, partners;
  std::vector<int64_t> index;
  std::vector<unsigned char> valid;
  int64_t first_row, total_rows;
  double weight;
};

struct Inputs {
  std::vector<Share> shares;
  std::vector<double> choice;  // (M)
};

// Rows that are masked out hold NaN, and an index out of range.
void mask_out(Share& share, int64_t row, int64_t codewords) {
  share.valid[row] = 0;
  share.index[row] = row % 2 ? -7 : codewords + row;
  share.features.set(row, row % share.features.columns, kNaN);
  share.partners.set(row, row % share.features.columns, kNaN);
}

Share random_share(const BatchProblem& given, int modality) {
  const int64_t rows = given.rows;
  Share share{random_rows(given.numbers[modality], rows, given.width, 10 + modality),
              random_rows(given.numbers[modality], rows, given.width, 30 + modality),
              {},
              std::vector<unsigned char>(rows, 1),
              given.shard ? 5 + modality : 0,
              rows + (given.shard ? 9 : 0),
              given.sequential ? std::pow(kDecay, given.modalities() - 1 - modality) : 1.0};
  if (!target_size) {
    share.features = kept(share.features);
    share.partners = kept(share.partners);
  }
  const uint64_t key = counter_random::key(kSeed, 1, modality);
  for (int64_t i = 0; i < rows; ++i) {
    const bool popular = counter_random::integer(key, rows + i, 10) < given.popular;
    share.index.push_back(popular ? 1 : counter_random::integer(key, i, given.codewords));
    if (given.masks && counter_random::integer(key, 2 * rows + i, 16) >= given.valid)
      mask_out(share, i, given.codewords);
  }
  return share;
}

Inputs random_inputs(const BatchProblem& given) {
  Inputs inputs;
  for (int m = 0; m < given.modalities(); ++m) inputs.shares.push_back(random_share(given, m));
  // Outside, none, and the first row of the second of two modalities.
  inputs.choice = {-0.5, 1.5, kNaN, 0.5};
  for (int64_t k = 4; k < given.codewords; ++k) inputs.choice.push_back(counter_random::uniform(99, k));
  return inputs;
}

// One modality on the device.
struct DeviceShare {
  DeviceRows features;
  std::optional<DeviceRows> partners;
  Device<int64_t> index;
  Device<unsigned char> valid;

  DeviceShare(const BatchProblem& given, const Share& share, Layout layout)
      : features(share.features, layout),
        index(strided<int64_t>(share.index, layout.column_stride, -1)),
        valid(strided<unsigned char>(share.valid, layout.column_stride, 0)) {
    if (given.partners) partners.emplace(share.partners, layout);
  }
};

struct DeviceBatch : BatchOnDevice {
  Inputs inputs;
  std::deque<DeviceShare> shares;
  Device<int64_t> step;
  Device<double> choice;

  explicit DeviceBatch(const BatchProblem& given)
      : inputs(random_inputs(given)), step(std::vector<int64_t>{kStep}), choice(inputs.choice) {
    const Layout lies = given.strides ? Layout{1, 3, 2} : Layout{};
    const int64_t stride = lies.column_stride;
    for (const Share& share : inputs.shares) shares.emplace_back(given, share, lies);
    for (int m = 0; m < given.modalities(); ++m) {
      const DeviceShare& from = shares[m];
      const auto* valid = given.masks ? from.valid.get() : nullptr;
      const Share& share = inputs.shares[m];
      batch.modality[m] = {from.features.view(),
                           from.partners ? from.partners->view() : Matrix{},
                           from.index.get(),
                           stride,
                           valid,
                           stride,
                           share.first_row,
                           share.total_rows,
                           share.weight};
    }
    batch.modalities = given.modalities();
    batch.mixes = given.mixes;
    batch.given_partners = given.partners;
    batch.own_weight = kOwnWeight;
    batch.codewords = given.codewords;
    batch.width = given.width;
    batch.candidates = given.candidates;
    batch.seed = kSeed;
    batch.step = step.get();
    batch.choice = given.choice ? choice.get() : nullptr;
  }
};

void expect_counts(Expected& expected, const BatchProblem& given, const Inputs& inputs,
                   const StatisticsLayout& layout) {
  for (int m = 0; m < given.modalities(); ++m) {
    for (int64_t i = 0; i < given.rows; ++i) {
      if (!inputs.shares[m].valid[i]) continue;
      ++expected.values[layout.row_count + m];
      ++expected.values[layout.codeword_count + m * given.codewords + inputs.shares[m].index[i]];
    }
  }
}

// A feature mixed with its partner.
double mixed(const BatchProblem& given, const Inputs& inputs, int m, int64_t i, int64_t d) {
  const double value = inputs.shares[m].features.at(i, d);
  if (!given.mixes) return value;
  if (given.partners) return kOwnWeight * value + (1 - kOwnWeight) * inputs.shares[m].partners.at(i, d);
  double partner = 0;
  int number = 0;
  for (int other = 0; other < given.modalities(); ++other) {
    if (other == m || !inputs.shares[other].valid[i]) continue;
    partner += inputs.shares[other].features.at(i, d);
    ++number;
  }
  return number == 0 ? value : kOwnWeight * value + (1 - kOwnWeight) * (partner / number);
}

void expect_sums(Expected& expected, const BatchProblem& given, const Inputs& inputs, const StatisticsLayout& layout) {
  const int64_t every = target_size ? std::max<int64_t>(given.codewords / kSampledCodewords, 1) : 1;
  for (int64_t i = 0; i < given.codewords * given.width; ++i)
    if (i / given.width % every != 0) expected.tolerances[layout.mixed_sum + i] = kUnchecked;
  in_threads(given.width, [&](int64_t d) {
    for (int m = 0; m < given.modalities(); ++m) {
      const Share& share = inputs.shares[m];
      for (int64_t i = 0; i < given.rows; ++i) {
        if (!share.valid[i] || share.index[i] % every != 0) continue;
        const int64_t place = layout.mixed_sum + share.index[i] * given.width + d;
        const double term = share.weight * mixed(given, inputs, m, i, d);
        expected.values[place] += term;
        expected.tolerances[place] += std::abs(term) * kSumTolerance;
      }
    }
  });
}

// The row of the whole batch that an attempt draws for a codeword.
struct Drawn {
  const Share* share;
  int64_t row;  // of those held here
  bool is_here, is_valid;
};

Drawn draw_row(const BatchProblem& given, const Inputs& inputs, int64_t codeword, int attempt) {
  int64_t total = 0;
  for (const Share& share : inputs.shares) total += share.total_rows;
  int64_t drawn = attempt == 0 && given.choice ? counter_random::place(inputs.choice[codeword], total)
                                               : counter_random::integer(counter_random::key(kSeed, kStep, 2),
                                                                         codeword * kAttempts + attempt, total);
  const Share* share = inputs.shares.data();
  for (; drawn >= share->total_rows; ++share) drawn -= share->total_rows;
  const int64_t row = drawn - share->first_row;
  const bool is_here = row >= 0 && row < given.rows;
  return {share, row, is_here, is_here && share->valid[row]};
}

void expect_candidates(Expected& expected, const BatchProblem& given, const Inputs& inputs,
                       const StatisticsLayout& layout) {
  for (int64_t k = 0; k < given.codewords; ++k) {
    for (int candidate = 0; candidate < given.candidates; ++candidate) {
      Drawn drawn = draw_row(given, inputs, k, candidate);
      for (int attempt = 1; attempt < kAttempts && given.candidates == 1; ++attempt) {
        if (!drawn.is_here || drawn.is_valid) break;
        drawn = draw_row(given, inputs, k, attempt);
      }
      if (!drawn.is_valid) continue;
      const int64_t place = candidate * given.codewords + k;
      expected.values[layout.found + place] = 1;
      for (int64_t d = 0; d < given.width; ++d)
        expected.values[layout.candidate + place * given.width + d] = drawn.share->features.at(drawn.row, d);
    }
  }
}

Result statistics_case(const BatchProblem& given) {
  const DeviceBatch on_device(given);
  const Inputs& inputs = on_device.inputs;
  const StatisticsLayout layout = statistics_layout(given.modalities(), given.codewords, given.width, given.candidates);
  const Device<double> statistics(layout.size);
  Batch batch = on_device.batch;
  batch.statistics = statistics.get();
  StatisticsPlan plan = plan_statistics(batch);
  if (given.earlier) plan.few_launches = plan.wide_loads = false;
  const Device<unsigned char> workspace(plan.bytes);
  const auto launch = [&] { return launch_statistics(plan, batch, workspace.get(), nullptr); };
  finish_launch(launch(), "launch_statistics");
  const std::vector<double> got = statistics.host();

  Result result;
  result.rows = given.rows * given.modalities();
  result.demand(plan.sorted == given.sorted, "the other kind of sums was planned");
  Expected expected(layout.size);
  expect_counts(expected, given, inputs, layout);
  expect_sums(expected, given, inputs, layout);
  expect_candidates(expected, given, inputs, layout);
  demand_close(result, "row_count", got, expected, layout.row_count, layout.codeword_count);
  demand_close(result, "codeword_count", got, expected, layout.codeword_count, layout.mixed_sum);
  demand_close(result, "mixed_sum", got, expected, layout.mixed_sum, layout.found);
  demand_close(result, "found", got, expected, layout.found, layout.candidate);
  demand_close(result, "candidate", got, expected, layout.candidate, layout.size);
  result.median_ms = median_ms(launch);
  return result;
}

}  // namespace

std::unique_ptr<const BatchOnDevice> device_batch(const BatchProblem& given) {
  return std::make_unique<const DeviceBatch>(given);
}

namespace {

void add(std::vector<Case>& cases, const std::string& text, const BatchProblem& given) {
  const char* kernel = given.sorted ? "statistics_sorted" : "statistics_scan";
  cases.push_back({kernel, text, [=] { return statistics_case(given); }});
}

void add_small(std::vector<Case>& cases) {
  BatchProblem masked{.numbers = {kSingle, kSingle, kSingle}, .rows = 517, .codewords = 13, .width = 130};
  masked.masks = masked.mixes = true;
  masked.candidates = 1;
  add(cases, "masks, partners at the same place, reset", masked);

  BatchProblem sharded{.numbers = {kHalf, kSingle}, .rows = 301, .codewords = 11, .width = 9};
  sharded.masks = sharded.mixes = sharded.partners = sharded.sequential = true;
  sharded.candidates = kAttempts;
  sharded.choice = sharded.shard = sharded.strides = true;
  add(cases, "given partners, types, strides, a shard, every attempt", sharded);

  BatchProblem chunks{.numbers = {kDouble}, .rows = 4500, .codewords = 5, .width = 8, .candidates = 1, .choice = true};
  add(cases, "one modality, several chunks", chunks);

  BatchProblem brain{.numbers = {kBrain, kBrain}, .rows = 70, .codewords = 7, .width = 129};
  brain.mixes = brain.sequential = brain.strides = brain.choice = true;
  brain.candidates = 1;
  add(cases, "bfloat16, strides, chosen rows", brain);

  BatchProblem rare{.numbers = {kSingle}, .rows = 200, .codewords = 90, .width = 3, .masks = true};
  rare.candidates = 1;
  rare.valid = 2;
  add(cases, "few valid rows", rare);

  BatchProblem pieces{.numbers = {kSingle}, .rows = 17000, .codewords = 1000, .width = 8, .sorted = true, .popular = 2};
  add(cases, "one modality, several pieces", pieces);

  BatchProblem wide{.numbers = {kSingle}, .rows = 11200, .codewords = 1500, .width = 130, .sorted = true};
  add(cases, "several blocks of columns and codewords", wide);

  BatchProblem sorted{.numbers = {kHalf, kBrain, kSingle}, .rows = 5700, .codewords = 1000, .width = 5, .sorted = true};
  sorted.masks = sorted.mixes = sorted.sequential = sorted.strides = true;
  sorted.candidates = sorted.popular = 1;
  add(cases, "masks, partners at the same place, reset", sorted);
  sorted.earlier = true;
  add(cases, "the same with the earlier launches", sorted);
  wide.earlier = true;
  add(cases, "several blocks of columns and codewords, the earlier launches", wide);

  BatchProblem partners{.numbers = {kBrain, kBrain}, .rows = 8700, .codewords = 1000, .width = 136, .sorted = true};
  partners.mixes = partners.partners = partners.sequential = true;
  partners.popular = 1;
  add(cases, "given partners, loads of 16 bytes of bfloat16", partners);
}

}  // namespace

std::vector<Case> statistics_cases() {
  std::vector<Case> cases;
  if (!target_size) {
    add_small(cases);
    return cases;
  }
  add(cases, "3 x " + size_text({800, 400, 256}),
      {.numbers = {kSingle, kSingle, kSingle}, .rows = 800, .codewords = 400, .width = 256, .mixes = true});
  for (const Size size : {kG2, kG3}) {
    BatchProblem problem{.numbers = {kSingle}, .rows = size.rows, .codewords = size.codewords, .width = size.width};
    problem.sorted = true;
    const std::string text = size_text({size.rows, size.codewords, size.width});
    add(cases, text, problem);
    problem.earlier = true;
    add(cases, text + ", the earlier launches", problem);
  }
  return cases;
}

}  // namespace unicode_fast::checks
