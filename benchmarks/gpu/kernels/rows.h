// Matrices of the four types on host and device.
#pragma once

#include <cstring>
#include <utility>

#include "../../../csrc/common/counter_random.h"
#include "../../../csrc/cuda/matrix.h"
#include "harness.h"

namespace unicode_fast::checks {

constexpr Number kDouble = Number::kFloat64, kSingle = Number::kFloat32, kHalf = Number::kFloat16,
                 kBrain = Number::kBFloat16;

size_t size_of(Number number);
void put(Number number, double value, void* to);
double get(Number number, const void* from);
double rounded(Number number, double value);

template <class T>
T bits_at(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// About normal, the same bits on host and device: a sum of twelve uniform numbers. The factor fills the mantissa.
UNICODE_FAST_BOTH double draw(uint64_t key, int64_t place) {
  int64_t sum = 0;
  for (int word = 0; word < 3; ++word) {
    for (uint64_t bits = counter_random::random_bits(key, place * 3 + word); bits != 0; bits >>= 16)
      sum += static_cast<int64_t>(bits & 0xffff);
  }
  return static_cast<double>(sum - 6 * 0xffff) * (0x1p-16 * 1.000030517578125123);
}

// A matrix on the host; element (i, d) is draw(key, i columns + d) where it holds no values.
struct Rows {
  Number number;
  int64_t rows, columns;
  uint64_t key;
  std::vector<double> values = {};

  double at(int64_t row, int64_t column) const {
    const int64_t place = row * columns + column;
    return values.empty() ? rounded(number, draw(key, place)) : values[place];
  }
  void set(int64_t row, int64_t column, double value) { values[row * columns + column] = rounded(number, value); }
};

Rows random_rows(Number number, int64_t rows, int64_t columns, int64_t stream);
// The same rows with their values held.
Rows kept(Rows rows);

// How a matrix lies in memory: elements before it and between its rows, and from one column to the next.
struct Layout {
  int64_t offset = 0, gap = 0, column_stride = 1;
};

class DeviceRows {
 public:
  explicit DeviceRows(const Rows& rows, Layout layout = {});

  void* data() const { return bytes_.get() + layout_.offset * size_of(number_); }
  Matrix view() const { return {data(), number_, rows_, columns_, row_stride_, layout_.column_stride}; }
  std::vector<double> host() const;

 private:
  // Offset in bytes.
  size_t place(int64_t row, int64_t column) const {
    return (layout_.offset + row * row_stride_ + column * layout_.column_stride) * size_of(number_);
  }

  Layout layout_;
  Number number_;
  int64_t rows_, columns_, row_stride_;
  Device<unsigned char> bytes_;
};

}  // namespace unicode_fast::checks
