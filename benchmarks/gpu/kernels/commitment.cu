#include <type_traits>

#include "../../../csrc/cuda/commitment/commitment.h"
#include "rows.h"

namespace unicode_fast::checks {
namespace {

struct Problem {
  int modalities;
  int64_t rows, codewords, width;
  bool masks = false, out_of_range = false;

  int64_t all_rows() const { return modalities * rows; }
  // An index out of range belongs to this row of modality 1; modality 0 has no share of it.
  int64_t spoilt_row() const { return rows / 2; }
};

struct Inputs {
  Rows features, codebook;
  std::vector<int64_t> index = {};
  std::vector<unsigned char> valid = {};
  std::vector<double> weights = {};  // (modalities, modalities)
};

Inputs random_inputs(const Problem& given, Number number) {
  const uint64_t key = counter_random::key(19, 0, 0);
  Inputs inputs{kept(random_rows(number, given.all_rows(), given.width, 60)),
                kept(random_rows(number, given.codewords, given.width, 61))};
  for (int64_t i = 0; i < given.all_rows(); ++i) {
    const bool valid = !given.masks || counter_random::integer(key, i, 3) > 0;
    inputs.valid.push_back(valid);
    inputs.index.push_back(valid ? counter_random::integer(key + 1, i, given.codewords) : given.codewords + i);
  }
  if (given.out_of_range) {
    const int64_t row = given.spoilt_row();
    inputs.valid[row] = inputs.valid[given.rows + row] = 1;
    inputs.index[row] = 0;
    inputs.index[given.rows + row] = given.masks ? -1 : given.codewords;
  }
  for (int m = 0; m < given.modalities; ++m) {
    for (int o = 0; o < given.modalities; ++o)
      inputs.weights.push_back(m == 0 && o == 1 ? 0.0 : m == o ? 0.25 : 0.125 + 0.0625 * o);
  }
  return inputs;
}

struct Outputs {
  Expected loss, direction;
};

// Adds the directions from modality `m` to the codewords of modality `other`; returns their share of the loss.
double add_pair(Outputs& expected, const Problem& given, const Inputs& inputs, int m, int other) {
  const auto is_valid = [&](int64_t i) {
    return inputs.valid[m * given.rows + i] && inputs.valid[other * given.rows + i];
  };
  double number = 0, loss = 0;
  for (int64_t i = 0; i < given.rows; ++i) number += is_valid(i);
  const double weight = inputs.weights[m * given.modalities + other] / number;
  for (int64_t i = 0; i < given.rows && weight != 0; ++i) {
    if (!is_valid(i)) continue;
    const int64_t codeword = inputs.index[other * given.rows + i], row = m * given.rows + i;
    if (codeword < 0 || codeword >= given.codewords) {
      loss = kNaN;
      continue;
    }
    for (int64_t d = 0; d < given.width; ++d) {
      const double difference = inputs.features.at(row, d) - inputs.codebook.at(codeword, d);
      loss += weight * difference * difference;
      expected.direction.values[row * given.width + d] += 2 * weight * difference;
      expected.direction.tolerances[row * given.width + d] += 2 * weight * (std::abs(difference) + 1);
    }
  }
  return loss;
}

Outputs losses_and_directions(const Problem& given, const Inputs& inputs, double tolerance) {
  Outputs expected{Expected(given.modalities), Expected(given.all_rows() * given.width)};
  for (int m = 0; m < given.modalities; ++m) {
    double loss = 0;
    for (int other = 0; other < given.modalities; ++other) loss += add_pair(expected, given, inputs, m, other);
    expected.loss.set(m, loss, std::abs(loss) * tolerance);
  }
  for (double& each : expected.direction.tolerances) each *= tolerance;
  for (int m = 1; m < given.modalities && given.out_of_range; ++m) {
    const int64_t start = (m * given.rows + given.spoilt_row()) * given.width;
    std::fill_n(expected.direction.tolerances.begin() + start, given.width, kUnchecked);
  }
  return expected;
}

template <class T>
Result commitment_case(const Problem& given) {
  constexpr bool kIsDouble = std::is_same_v<T, double>;
  const Inputs inputs = random_inputs(given, kIsDouble ? kDouble : kSingle);
  const DeviceRows features(inputs.features), codebook(inputs.codebook);
  const Device<int64_t> index(inputs.index), numbers(given.masks ? inputs.weights.size() : 0);
  const Device<unsigned char> valid(inputs.valid);
  const int64_t blocks = (given.rows + kCommitmentRows - 1) / kCommitmentRows;
  const Device<double> weights(inputs.weights), partial(given.modalities * blocks);
  const Device<T> direction(given.all_rows() * given.width), loss(given.modalities);
  const CommitmentArguments<T> arguments{static_cast<const T*>(features.data()),
                                         index.get(),
                                         given.masks ? valid.get() : nullptr,
                                         static_cast<const T*>(codebook.data()),
                                         weights.get(),
                                         direction.get(),
                                         loss.get(),
                                         numbers.get(),
                                         partial.get(),
                                         given.rows,
                                         given.codewords,
                                         given.modalities,
                                         static_cast<int>(given.width)};
  const auto launch = [&] { return launch_commitment(arguments, nullptr); };
  finish_launch(launch(), "launch_commitment");

  Result result;
  result.rows = given.all_rows();
  const Outputs expected = losses_and_directions(given, inputs, kIsDouble ? kSumTolerance : 0x1p-19);
  demand_close(result, "loss", loss.host(), expected.loss);
  demand_close(result, "direction", direction.host(), expected.direction);
  result.median_ms = median_ms(launch);
  return result;
}

template <class T>
void add(std::vector<Case>& cases, const std::string& text, const Problem& given) {
  cases.push_back({"commitment", text, [=] { return commitment_case<T>(given); }});
}

}  // namespace

std::vector<Case> commitment_cases() {
  std::vector<Case> cases;
  if (target_size) {
    add<float>(cases, "3 x " + size_text({800, 400, 256}), {3, 800, 400, 256});
    return cases;
  }
  add<float>(cases, "float32", {3, 21, 10, 70});
  add<float>(cases, "float32, mask", {3, 2100, 10, 3, true});
  add<double>(cases, "float64, mask", {2, 16, 5, 33, true});
  add<float>(cases, "float32, an index out of range", {2, 9, 4, 32, false, true});
  add<double>(cases, "float64, an index out of range", {2, 9, 4, 5, true, true});
  return cases;
}

}  // namespace unicode_fast::checks
