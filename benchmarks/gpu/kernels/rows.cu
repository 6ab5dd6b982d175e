#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../../csrc/cuda/launch.cuh"
#include "rows.h"

namespace unicode_fast::checks {
namespace {

constexpr int kFillThreads = 256;

// values[i] = draw(key, i).
template <class T>
__global__ void __launch_bounds__(kFillThreads) fill_kernel(uint64_t key, int64_t number, T* values) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x;
  if (i < number) values[i] = static_cast<T>(draw(key, i));
}

template <class T>
void fill(uint64_t key, int64_t number, void* values) {
  const auto blocks = static_cast<unsigned>((number + kFillThreads - 1) / kFillThreads);
  UNICODE_FAST_LAUNCH(blocks, kFillThreads, 0, nullptr, fill_kernel<T>)(key, number, static_cast<T*>(values));
  finish_launch(cudaGetLastError(), "fill_kernel");
}

}  // namespace

size_t size_of(Number number) { return number == Number::kFloat64 ? 8 : number == Number::kFloat32 ? 4 : 2; }

void put(Number number, double value, void* to) {
  const auto single = static_cast<float>(value);
  const __half half = __float2half_rn(single);
  const __nv_bfloat16 brain = __float2bfloat16_rn(single);
  const void* from = number == Number::kFloat64   ? static_cast<const void*>(&value)
                     : number == Number::kFloat32 ? static_cast<const void*>(&single)
                     : number == Number::kFloat16 ? static_cast<const void*>(&half)
                                                  : static_cast<const void*>(&brain);
  std::memcpy(to, from, size_of(number));
}

double get(Number number, const void* from) {
  switch (number) {
    case Number::kFloat64:
      return bits_at<double>(from);
    case Number::kFloat32:
      return bits_at<float>(from);
    case Number::kFloat16:
      return __half2float(bits_at<__half>(from));
    default:
      return __bfloat162float(bits_at<__nv_bfloat16>(from));
  }
}

double rounded(Number number, double value) {
  unsigned char bytes[8];
  put(number, value, bytes);
  return get(number, bytes);
}

Rows random_rows(Number number, int64_t rows, int64_t columns, int64_t stream) {
  return {number, rows, columns, counter_random::key(7, 0, stream)};
}

Rows kept(Rows rows) {
  std::vector<double> all(rows.rows * rows.columns);
  in_threads(rows.rows, [&](int64_t i) {
    for (int64_t d = 0; d < rows.columns; ++d) all[i * rows.columns + d] = rows.at(i, d);
  });
  rows.values = std::move(all);
  return rows;
}

DeviceRows::DeviceRows(const Rows& rows, Layout layout)
    : layout_(layout),
      number_(rows.number),
      rows_(rows.rows),
      columns_(rows.columns),
      row_stride_(rows.columns * layout.column_stride + layout.gap),
      bytes_(place(rows.rows - 1, rows.columns - 1) + size_of(rows.number)) {
  const int64_t numbers = rows_ * columns_;
  if (rows.values.empty() && size_of(number_) >= sizeof(float) && bytes_.size() == numbers * size_of(number_)) {
    number_ == kSingle ? fill<float>(rows.key, numbers, data()) : fill<double>(rows.key, numbers, data());
    return;
  }
  std::vector<unsigned char> bytes(bytes_.size(), 0xff);
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t d = 0; d < columns_; ++d) put(number_, rows.at(i, d), &bytes[place(i, d)]);
  }
  bytes_.set(bytes);
}

std::vector<double> DeviceRows::host() const {
  const std::vector<unsigned char> bytes = bytes_.host();
  std::vector<double> values;
  for (int64_t i = 0; i < rows_; ++i) {
    for (int64_t d = 0; d < columns_; ++d) values.push_back(get(number_, &bytes[place(i, d)]));
  }
  return values;
}

}  // namespace unicode_fast::checks
