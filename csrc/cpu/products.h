// Products of matrices by the faster of torch's two libraries.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Version.h>

#include <optional>

namespace unicode_fast::cpu {

// rows (N, inputs) times the transpose of weight (outputs, inputs). Large products in float32 with AVX-512 are
// convolutions with kernels of one cell, as in unicode_fast/modules/linear.py.
inline at::Tensor product(const at::Tensor& rows, const at::Tensor& weight) {
  constexpr int64_t kLeastProduct = 8'000'000;
  const int64_t number = rows.size(0), inputs = rows.size(1), outputs = weight.size(0);
  if (rows.scalar_type() != at::kFloat || number * inputs * outputs < kLeastProduct ||
      at::get_cpu_capability() != "AVX512")
    return at::mm(rows, weight.t());
  const at::Tensor maps = rows.contiguous().view({1, number, 1, inputs}).permute({0, 3, 1, 2});
  // With one thread torch uses oneDNN for dilated kernels only.
  return at::conv2d(maps, weight.unsqueeze(-1).unsqueeze(-1), std::nullopt, at::IntArrayRef(1), at::IntArrayRef(0),
                    at::IntArrayRef({1, 2}))
      .permute({0, 2, 3, 1})
      .reshape({number, outputs})
      .contiguous();
}

}  // namespace unicode_fast::cpu
