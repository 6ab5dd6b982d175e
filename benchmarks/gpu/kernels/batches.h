// Batches of rows with their codewords, for statistics and updates.
#pragma once

#include <memory>

#include "../../../csrc/cuda/codebook_update/codebook_update.h"
#include "rows.h"

namespace unicode_fast::checks {

struct BatchProblem {
  std::vector<Number> numbers;  // of each modality
  int64_t rows, codewords, width;
  bool earlier = false;  // the earlier launches and loads of sorted sums
  bool sorted = false, masks = false, mixes = false, partners = false, sequential = false;
  int candidates = 0;
  bool choice = false, shard = false, strides = false;
  int64_t popular = 0;  // of 10 rows so many have codeword 1
  int64_t valid = 12;   // of 16 rows, where there are masks

  int modalities() const { return static_cast<int>(numbers.size()); }
};

// A random batch on the device, without statistics.
struct BatchOnDevice {
  Batch batch{};

  virtual ~BatchOnDevice() = default;
};

std::unique_ptr<const BatchOnDevice> device_batch(const BatchProblem& given);

}  // namespace unicode_fast::checks
