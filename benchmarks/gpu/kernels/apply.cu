#include <optional>

#include "batches.h"

namespace unicode_fast::checks {
namespace {

constexpr int64_t kStep = 3;

enum class Reset { kNone, kCodewords, kFeatures };

struct Problem {
  Number number;
  int modalities;
  int64_t codewords, width;
  bool joint;
  Smoothing smoothing;
  Reset reset;
  bool unless_any = true, draws = false, reset_ema = true, strides = false;
  int64_t active_within = 3;
  // Statistics and their application in one call, from rows: whether the launch that makes the sums writes the state.
  bool from_rows = false, fused = false;
  BatchProblem rows = {};

  Rule rule() const {
    const bool from_features = reset == Reset::kFeatures;
    return {.decay = 0.875,
            .epsilon = 1e-5,
            .own_weight = 0.5,
            .joint = joint,
            .smoothing = smoothing,
            .reset_after = reset == Reset::kNone ? 0 : 6,
            .unless_any = unless_any,
            .from_features = from_features,
            .reset_noise = 0.25,
            .active_within = active_within,
            .reset_ema = reset_ema,
            .seed = 23};
  }
};

struct Inputs {
  Rows codebook, ema_sum, ema_count;
  std::vector<int64_t> idle;  // (modalities, M)
  StatisticsLayout layout;
  std::vector<double> statistics = {}, choice = {}, noise = {};

  double count(int m, int64_t k) const { return statistics[layout.codeword_count + m * codebook.rows + k]; }
};

void set_statistics(Inputs& inputs, const Problem& given, uint64_t key) {
  const StatisticsLayout& layout = inputs.layout;
  for (int64_t i = 0; i < layout.size; ++i) inputs.statistics.push_back(draw(key, i));
  for (int m = 0; m < given.modalities; ++m) {
    double& total = inputs.statistics[layout.row_count + m] = 0;
    for (int64_t k = m * given.codewords; k < (m + 1) * given.codewords; ++k) {
      double& count = inputs.statistics[layout.codeword_count + k];
      count = std::max<int64_t>(counter_random::integer(key + 1, k, 9) - 5, 0);
      total += count;
    }
  }
  for (int64_t i = layout.found; i < layout.candidate; ++i)
    inputs.statistics[i] = counter_random::integer(key + 2, i - layout.found, 4) > 0;
}

Inputs random_inputs(const Problem& given) {
  const uint64_t key = counter_random::key(17, 0, 0);
  const int64_t codewords = given.codewords, width = given.width;
  const int candidates = given.reset == Reset::kFeatures ? 1 : 0;
  Inputs inputs{kept(random_rows(given.number, codewords, width, 50)),
                kept(random_rows(given.number, codewords, width, 51)),
                kept(random_rows(given.number, codewords, 1, 52)),
                {},
                statistics_layout(given.modalities, codewords, width, candidates)};
  set_statistics(inputs, given, key);
  for (int64_t k = 0; k < codewords; ++k) {
    inputs.choice.push_back(k % 31 == 0 ? 1.5 : k % 29 == 0 ? kNaN : counter_random::uniform(key + 3, k));
    // Sequential updates divide by any count; in joint ones a count of zero leaves its codeword alone.
    const double count = given.joint && k % 3 == 0 ? 0.0 : std::abs(inputs.ema_count.at(k, 0)) + 0.5;
    inputs.ema_count.set(k, 0, count);
  }
  for (int64_t i = 0; i < codewords * width; ++i) inputs.noise.push_back(2 * counter_random::uniform(key + 4, i) - 1);
  for (int64_t i = 0; i < given.modalities * codewords; ++i)
    inputs.idle.push_back(counter_random::integer(key + 5, i, 12));
  return inputs;
}

// The state after an update. Tolerances are sizes of terms until rounding is added.
struct Updated {
  Expected codebook, ema_sum, ema_count, idle;
  int64_t reset = 0;
};

// The exponential moving averages of one codeword, and the vector that follows from them.
void average(Updated& expected, const Problem& given, const Inputs& inputs, double ema_total, int64_t k) {
  const Rule rule = given.rule();
  double count = inputs.ema_count.at(k, 0), total = ema_total, divisor = count;
  const int steps = given.joint ? 1 : given.modalities, shares = given.modalities / steps;
  for (int step = 0; step < steps; ++step) {
    double step_count = 0, step_total = 0;
    for (int m = step * shares; m < (step + 1) * shares; ++m) {
      step_count += inputs.count(m, k);
      step_total += inputs.statistics[inputs.layout.row_count + m];
    }
    count = divisor = rule.decay * count + (1 - rule.decay) * step_count;
    total = rule.decay * total + (1 - rule.decay) * step_total;
    if (given.smoothing != Smoothing::kNone)
      divisor = (count + rule.epsilon) * (total / (total + static_cast<double>(given.codewords) * rule.epsilon));
    if (given.smoothing == Smoothing::kCompounding) count = divisor;
  }
  expected.ema_count.set(k, count, 0);
  const bool stays = given.joint && !(divisor > 0);
  for (int64_t d = 0; d < given.width; ++d) {
    const int64_t place = k * given.width + d;
    const double before = std::pow(rule.decay, steps) * inputs.ema_sum.at(k, d);
    const double more = (1 - rule.decay) * inputs.statistics[inputs.layout.mixed_sum + place];
    const double size = (std::abs(before) + std::abs(more)) / std::min(divisor, 1.0);
    expected.ema_sum.set(place, before + more, 1);
    expected.codebook.set(place, stays ? inputs.codebook.at(k, d) : (before + more) / divisor, stays ? 0 : size);
  }
}

// Ages codewords; returns for each the updates that count for the rule of reset.
std::vector<int64_t> age(Updated& expected, const Problem& given, const Inputs& inputs) {
  std::vector<int64_t> ages;
  for (int64_t k = 0; k < given.codewords; ++k) {
    int64_t least = INT64_MAX, most = 0;
    for (int m = 0; m < given.modalities; ++m) {
      const int64_t place = m * given.codewords + k, now = inputs.count(m, k) > 0 ? 0 : inputs.idle[place] + 1;
      expected.idle.values[place] = static_cast<double>(now);
      least = std::min(least, now);
      most = std::max(most, now);
    }
    ages.push_back(given.unless_any ? least : most);
  }
  return ages;
}

void reset(Updated& expected, const Problem& given, const Inputs& inputs, const std::vector<int64_t>& ages) {
  const Rule rule = given.rule();
  const bool features = given.reset == Reset::kFeatures;
  const uint64_t choice_key = counter_random::key(rule.seed, kStep, 0),
                 noise_key = counter_random::key(rule.seed, kStep, 1);
  const Expected before = expected.codebook;
  std::vector<int64_t> active;
  for (int64_t k = 0; k < given.codewords; ++k)
    if (ages[k] < rule.active_within) active.push_back(k);
  for (int64_t k = 0; k < given.codewords; ++k) {
    const bool has_source = features ? inputs.statistics[inputs.layout.found + k] != 0 : !active.empty();
    if (ages[k] <= rule.reset_after || !has_source) continue;
    ++expected.reset;
    const double choice = given.draws ? inputs.choice[k] : counter_random::uniform(choice_key, k);
    for (int64_t place = k * given.width; place < (k + 1) * given.width; ++place) {
      if (features) {
        expected.codebook.values[place] = inputs.statistics[inputs.layout.candidate + place];
      } else {
        const double noise = given.draws ? inputs.noise[place] : 2 * counter_random::uniform(noise_key, place) - 1;
        const int64_t source = active[counter_random::place(choice, static_cast<int64_t>(active.size()))];
        const int64_t from = source * given.width + place % given.width;
        expected.codebook.set(place, before.values[from] + rule.reset_noise * noise,
                              before.tolerances[place] + before.tolerances[from] + 1);
      }
      if (rule.reset_ema) expected.ema_sum.values[place] = expected.codebook.values[place];
    }
    for (int m = 0; m < given.modalities; ++m) expected.idle.values[m * given.codewords + k] = 0;
    if (rule.reset_ema) expected.ema_count.values[k] = 1;
  }
}

Updated update(const Problem& given, const Inputs& inputs) {
  const size_t numbers = given.codewords * given.width;
  Updated expected{Expected(numbers), Expected(numbers), Expected(given.codewords), Expected(inputs.idle.size())};
  double ema_total = 0;
  for (int64_t k = 0; k < given.codewords; ++k) ema_total += inputs.ema_count.at(k, 0);
  for (int64_t k = 0; k < given.codewords; ++k) average(expected, given, inputs, ema_total, k);
  const std::vector<int64_t> ages = age(expected, given, inputs);
  if (given.reset != Reset::kNone) reset(expected, given, inputs, ages);
  const double rounding = given.number == kDouble ? kSumTolerance : kFloatTolerance;
  for (Expected* output : {&expected.codebook, &expected.ema_sum, &expected.ema_count}) {
    for (size_t i = 0; i < output->values.size(); ++i)
      output->tolerances[i] = std::abs(output->values[i]) * rounding + output->tolerances[i] * kSumTolerance;
  }
  return expected;
}

// (modalities, M) numbers in the other order.
template <class T>
std::vector<T> transposed(const std::vector<T>& values, int64_t columns) {
  const auto rows = static_cast<int64_t>(values.size()) / columns;
  std::vector<T> turned;
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) turned.push_back(values[i * columns + j]);
  }
  return turned;
}

// The statistics of a batch, from launches that the cases of statistics check.
std::vector<double> statistics_of(Batch batch, const int64_t* step, const double* choice) {
  const Device<double> statistics(
      statistics_layout(batch.modalities, batch.codewords, batch.width, batch.candidates).size);
  batch.step = step;
  batch.choice = choice;
  batch.statistics = statistics.get();
  const StatisticsPlan plan = plan_statistics(batch);
  const Device<unsigned char> workspace(plan.bytes);
  finish_launch(launch_statistics(plan, batch, workspace.get(), nullptr), "launch_statistics");
  return statistics.host();
}

Result apply_case(const Problem& given) {
  Inputs inputs = random_inputs(given);
  const Rule rule = given.rule();
  const int modalities = given.modalities;
  const DeviceRows codebook(inputs.codebook, given.strides ? Layout{1, 3, 2} : Layout{}),
      ema_sum(inputs.ema_sum, given.strides ? Layout{0, 5, 1} : Layout{}),
      ema_count(inputs.ema_count, given.strides ? Layout{0, 1, 1} : Layout{});
  const Device<int64_t> idle(given.strides ? transposed(inputs.idle, given.codewords) : inputs.idle),
      step(std::vector<int64_t>{kStep});
  const Device<double> statistics(inputs.statistics), choice(inputs.choice), noise(inputs.noise);
  const State state{given.number,
                    codebook.data(),
                    ema_count.data(),
                    ema_sum.data(),
                    idle.get(),
                    step.get(),
                    {codebook.view().row_stride, codebook.view().column_stride},
                    {ema_sum.view().row_stride, ema_sum.view().column_stride},
                    ema_count.view().row_stride,
                    {given.strides ? 1 : given.codewords, given.strides ? modalities : 1},
                    modalities,
                    given.codewords,
                    given.width};
  const double *const choices = given.draws ? choice.get() : nullptr, *const noises =
                                                                          given.draws ? noise.get() : nullptr;
  const auto rows = given.from_rows ? device_batch(given.rows) : nullptr;
  if (rows) inputs.statistics = statistics_of(rows->batch, step.get(), choices);
  const ApplyPlan plan = plan_apply(state, rule);
  const UpdatePlan whole = rows ? plan_update(rows->batch, state, rule, given.fused) : UpdatePlan{};
  const Device<unsigned char> workspace(rows ? whole.bytes : plan.bytes);
  const auto launch = [&] {
    if (rows) return launch_update(whole, rows->batch, state, rule, choices, noises, workspace.get(), nullptr);
    return launch_apply(plan, state, rule, statistics.get(), choices, noises, workspace.get(), nullptr);
  };
  finish_launch(launch(), "launch_apply");

  Result result;
  result.rows = given.codewords;
  if (rows) {
    result.demand(whole.statistics.sorted == given.rows.sorted, "the other kind of sums was planned");
    result.demand(whole.fused == given.fused, "the other form was planned");
  }
  const Updated expected = update(given, inputs);
  result.demand((expected.reset > 0) == (given.reset != Reset::kNone), "no codeword was to be reset");
  demand_close(result, "ema_count", ema_count.host(), expected.ema_count);
  demand_close(result, "codebook", codebook.host(), expected.codebook);
  demand_close(result, "ema_sum", ema_sum.host(), expected.ema_sum);
  demand_close(result, "idle", given.strides ? transposed(idle.host(), modalities) : idle.host(), expected.idle);
  demand_close(result, "step", 0, static_cast<double>(step.host()[0]), kStep + 1, 0);
  result.median_ms = median_ms(launch);
  return result;
}

void add(std::vector<Case>& cases, const std::string& text, const Problem& given) {
  cases.push_back({"apply", text, [=] { return apply_case(given); }});
}

// A state and the rows that update it.
void add_from_rows(std::vector<Case>& cases, const std::string& text, Problem given, BatchProblem rows) {
  rows.numbers.resize(given.modalities, rows.numbers[0]);
  rows.codewords = given.codewords;
  rows.width = given.width;
  rows.candidates = given.reset == Reset::kFeatures;
  rows.sequential = !given.joint;
  given.from_rows = true;
  given.rows = rows;
  add(cases, text, given);
  given.fused = true;
  add(cases, text + ", fused", given);
}

void add_small_from_rows(std::vector<Case>& cases) {
  BatchProblem few{.numbers = {kSingle}, .rows = 90};
  few.masks = few.mixes = true;
  Problem chains{kSingle, 3, 61, 130, true, Smoothing::kTransient, Reset::kCodewords};
  chains.active_within = 20;
  chains.unless_any = false;
  add_from_rows(cases, "few rows, resets from codewords that are reset", chains, few);
  Problem kept{kDouble, 2, 70, 9, false, Smoothing::kCompounding, Reset::kCodewords, false, true, false, true};
  add_from_rows(cases, "few rows, from codewords, draws, sums kept", kept, few);
  add_from_rows(cases, "few rows, from features",
                {kDouble, 2, 75, 133, true, Smoothing::kNone, Reset::kFeatures, false}, few);
  few.masks = few.mixes = false;
  few.rows = 4500;
  add_from_rows(cases, "several chunks", {kSingle, 2, 40, 5, true, Smoothing::kTransient, Reset::kNone}, few);

  BatchProblem many{.numbers = {kSingle}, .rows = 17000, .sorted = true, .popular = 8};
  Problem sorted{kSingle, 1, 1000, 132, true, Smoothing::kTransient, Reset::kCodewords};
  sorted.active_within = 20;
  add_from_rows(cases, "sorted rows, resets from codewords that are reset", sorted, many);
  many.rows = 8500;
  many.numbers = {kHalf};
  many.mixes = true;
  Problem features{kDouble, 2, 1000, 8, false, Smoothing::kCompounding, Reset::kFeatures, false, true, false, true};
  add_from_rows(cases, "sorted rows, from features, sums kept", features, many);
}

}  // namespace

std::vector<Case> apply_cases() {
  std::vector<Case> cases;
  if (target_size) {
    for (const Size size : {kG2, kG3, kTraining})
      add(cases, size_text({size.codewords, size.width}),
          {kSingle, size.rows == kTraining.rows ? 3 : 1, size.codewords, size.width, true, Smoothing::kNone,
           Reset::kCodewords});
    for (const Size size : {kG2, kG3, kTraining}) {
      const int modalities = size.rows == kTraining.rows ? 3 : 1;
      const Problem given{kSingle, modalities, size.codewords, size.width, true, Smoothing::kNone, Reset::kCodewords};
      BatchProblem rows{.numbers = {kSingle}, .rows = size.rows / modalities, .sorted = modalities == 1};
      rows.mixes = modalities > 1;
      add_from_rows(cases, size_text({size.rows, size.codewords, size.width}), given, rows);
    }
    return cases;
  }
  add(cases, "joint", {kSingle, 3, 37, 130, true, Smoothing::kNone, Reset::kNone});
  add(cases, "sequential, transient, from codewords",
      {kDouble, 3, 50, 20, false, Smoothing::kTransient, Reset::kCodewords});
  add(cases, "sequential, compounding, from codewords, draws, strides",
      {kSingle, 2, 61, 33, false, Smoothing::kCompounding, Reset::kCodewords, false, true, true, true});
  add(cases, "joint, transient, from features", {kDouble, 2, 40, 9, true, Smoothing::kTransient, Reset::kFeatures});
  add(cases, "joint, compounding, from features, counts kept",
      {kSingle, 3, 70, 5, true, Smoothing::kCompounding, Reset::kFeatures, false, false, false, true});
  add(cases, "sequential, many codewords, from codewords",
      {kSingle, 2, 600, 3, false, Smoothing::kNone, Reset::kCodewords, true, false, false});
  add_small_from_rows(cases);
  return cases;
}

}  // namespace unicode_fast::checks
