// The operator nearest_codeword on CPUs: rows go in blocks to the loops of kernels_body.h. docs/exactness.md has the
// proof that no codeword that could be the nearest is missed.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <tuple>

#include "kernels.h"
#include "subnormals.h"

namespace unicode_fast::cpu {
namespace {

constexpr int64_t kLargestBlock = 192;

// Rows that a thread takes at once: enough blocks to keep all threads busy to the end, a multiple of 6 rows.
int64_t block_rows(int64_t rows) {
  const int64_t even = rows / (8 * at::get_num_threads());
  return std::clamp<int64_t>((even + 5) / 6 * 6, 6, kLargestBlock);
}

PreparedCodebook prepare(const at::Tensor& codebook) {
  const KeepSubnormals keep;
  const at::Tensor given = codebook.to(at::kDouble).contiguous();
  const double* values = given.const_data_ptr<double>();
  PreparedCodebook codes;
  codes.codewords = codebook.size(0);
  codes.width = codebook.size(1);
  centre(codes, values);
  if (!codes.finite) return codes;
  const Kernels& use = kernels();
  const int64_t panels = (codes.codewords + use.panel - 1) / use.panel;
  const int64_t depth = (codes.width + use.pair - 1) / use.pair;
  codes.operands.assign(panels * depth * use.panel, 0);
  codes.norms.assign(panels * use.panel, std::numeric_limits<float>::infinity());
  std::mutex guard;
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    const KeepSubnormals keep_here;
    LargestNorms mine;
    use.prepare(codes, values, first, last, mine);
    const std::lock_guard<std::mutex> lock(guard);
    codes.largest.squared = std::max(codes.largest.squared, mine.squared);
    codes.largest.rounded = std::max(codes.largest.rounded, mine.rounded);
    codes.largest.residual = std::max(codes.largest.residual, mine.residual);
  });
  return codes;
}

void direct(const at::Tensor& rows, const at::Tensor& codebook, const at::Tensor& index, const at::Tensor& distance) {
  const int64_t width = rows.size(1), codewords = codebook.size(0), block = block_rows(rows.size(0));
  const double* x = rows.const_data_ptr<double>();
  int64_t* found = index.mutable_data_ptr<int64_t>();
  double* squared = distance.mutable_data_ptr<double>();
  at::parallel_for(0, rows.size(0), block, [&](int64_t first, int64_t last) {
    const KeepSubnormals keep;
    const Rows<double> mine{x + first * width, width};
    if (codebook.scalar_type() == at::kDouble) {
      kernels().direct_double(codebook.const_data_ptr<double>(), codewords, width, mine, last - first, found + first,
                              squared + first);
    } else {
      kernels().direct_float(codebook.const_data_ptr<float>(), codewords, width, mine, last - first, found + first,
                             squared + first);
    }
  });
}

void search(const at::Tensor& features, const at::Tensor& codebook, const at::Tensor& index,
            const at::Tensor& distance) {
  const PreparedCodebook codes = prepare(codebook);
  const int64_t rows = features.size(0), block = block_rows(rows);
  int64_t* found = index.mutable_data_ptr<int64_t>();
  float* squared = distance.mutable_data_ptr<float>();
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t first_block, int64_t last_block) {
    const KeepSubnormals keep;
    for (int64_t number = first_block; number < last_block; ++number) {
      const int64_t first = number * block, count = std::min(block, rows - first);
      // A view of float32 rows next to each other, a converted copy of all others.
      at::Tensor part = features.narrow(0, first, count).to(at::kFloat);
      if (part.stride(1) != 1) part = part.contiguous();
      const Rows<float> mine{part.const_data_ptr<float>(), part.stride(0)};
      if (codebook.scalar_type() == at::kDouble) {
        kernels().search_double(codes, codebook.const_data_ptr<double>(), mine, count, found + first, squared + first);
      } else {
        kernels().search_float(codes, codebook.const_data_ptr<float>(), mine, count, found + first, squared + first);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> nearest_codeword(const at::Tensor& features, const at::Tensor& codebook) {
  const bool wide = features.scalar_type() == at::kDouble;
  const at::Tensor index = at::empty({features.size(0)}, features.options().dtype(at::kLong));
  const at::Tensor distance = at::empty({features.size(0)}, features.options().dtype(wide ? at::kDouble : at::kFloat));
  // Half-precision codewords are exact in float32.
  const at::Tensor codes = (codebook.scalar_type() == at::kDouble ? codebook : codebook.to(at::kFloat)).contiguous();
  if (wide) {
    direct(features.contiguous(), codes, index, distance);
  } else {
    search(features, codes, index, distance);
  }
  return {index, distance};
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) { library.impl("nearest_codeword", &nearest_codeword); }

}  // namespace unicode_fast::cpu
