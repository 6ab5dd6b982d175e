// The operator nearest_codeword on CPUs: blocks of rows go to the loops of kernels_body.h. docs/exactness.md proves
// that the nearest codeword is never missed.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>

#include "../common/checks.h"
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

// Half-precision codewords are exact in float32.
bool is_half(const at::Tensor& codebook) {
  return codebook.scalar_type() == at::kHalf || codebook.scalar_type() == at::kBFloat16;
}

// Offsets of the arrays of the operands, in bytes: facts, mean, norms, operands, and, for a codebook in half precision,
// the codewords in float32.
struct OperandsLayout {
  int64_t mean, norms, operands, values, bytes;
};

OperandsLayout layout_of(const at::Tensor& codebook) {
  const Kernels& use = kernels();
  const int64_t codewords = codebook.size(0), width = codebook.size(1);
  const int64_t padded = (codewords + use.panel - 1) / use.panel * use.panel;
  OperandsLayout layout{};
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end += (bytes + 63) / 64 * 64;
    return start;
  };
  place(sizeof(CodebookFacts));
  layout.mean = place(width * 4);
  layout.norms = place(padded * 4);
  layout.operands = place(padded * ((width + use.pair - 1) / use.pair) * 4);
  layout.values = place(is_half(codebook) ? codewords * width * 4 : 0);
  layout.bytes = end;
  return layout;
}

// The codebook whose arrays lie in `memory`; its facts are those of a codebook not yet prepared.
PreparedCodebook parts_of(unsigned char* memory, const at::Tensor& codebook, const OperandsLayout& layout) {
  PreparedCodebook codes;
  codes.codewords = codebook.size(0);
  codes.width = codebook.size(1);
  codes.dtype = static_cast<int32_t>(codebook.scalar_type());
  codes.mean = reinterpret_cast<float*>(memory + layout.mean);
  codes.norms = reinterpret_cast<float*>(memory + layout.norms);
  codes.operands = reinterpret_cast<uint32_t*>(memory + layout.operands);
  return codes;
}

void codebook_operands(const at::Tensor& codebook, const at::Tensor& operands) {
  const KeepSubnormals keep;
  check_codebook(codebook, kFeatureDtypes);
  const OperandsLayout layout = layout_of(codebook);
  check_operands(operands, codebook, layout.bytes, alignof(CodebookFacts));
  check_apart({{"operands", operands}, {"codebook", codebook}}, 1);
  unsigned char* memory = operands.mutable_data_ptr<unsigned char>();
  PreparedCodebook codes = parts_of(memory, codebook, layout);
  const at::Tensor given = codebook.to(at::kDouble).contiguous();
  const double* values = given.const_data_ptr<double>();
  centre(codes, values);
  const Kernels& use = kernels();
  const int64_t panels = (codes.codewords + use.panel - 1) / use.panel;
  const int64_t depth = (codes.width + use.pair - 1) / use.pair;
  if (codes.finite) {
    std::fill_n(codes.operands, panels * depth * use.panel, 0);
    std::fill_n(codes.norms, panels * use.panel, std::numeric_limits<float>::infinity());
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
  }
  if (is_half(codebook)) std::copy_n(values, given.numel(), reinterpret_cast<float*>(memory + layout.values));
  std::memcpy(memory, static_cast<CodebookFacts*>(&codes), sizeof(CodebookFacts));
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

void search(const at::Tensor& features, const at::Tensor& codebook, const PreparedCodebook& codes,
            const at::Tensor& index, const at::Tensor& distance) {
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

std::tuple<at::Tensor, at::Tensor> nearest_codeword(const at::Tensor& features, const at::Tensor& codebook,
                                                    const std::optional<at::Tensor>& operands) {
  check_search(features, codebook);
  const bool wide = features.scalar_type() == at::kDouble;
  const at::Tensor index = at::empty({features.size(0)}, features.options().dtype(at::kLong));
  const at::Tensor distance = at::empty({features.size(0)}, features.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) {
    direct(features.contiguous(), codebook.contiguous(), index, distance);
    return {index, distance};
  }
  const OperandsLayout layout = layout_of(codebook);
  if (operands) check_operands(*operands, codebook, layout.bytes, alignof(CodebookFacts));
  const at::Tensor made = operands ? *operands : at::empty({layout.bytes}, codebook.options().dtype(at::kByte));
  if (!operands) codebook_operands(codebook, made);
  unsigned char* memory = const_cast<unsigned char*>(made.const_data_ptr<unsigned char>());
  PreparedCodebook codes = parts_of(memory, codebook, layout);
  std::memcpy(static_cast<CodebookFacts*>(&codes), memory, sizeof(CodebookFacts));
  TORCH_CHECK_VALUE(codes.codewords == codebook.size(0) && codes.width == codebook.size(1) &&
                        codes.dtype == static_cast<int32_t>(codebook.scalar_type()),
                    "operands must be what codebook_operands made of a codebook of shape ",
                    shape_name(codebook.sizes()), " and ", dtype_name(codebook.scalar_type()), ", got others");
  const at::Tensor values =
      is_half(codebook) ? at::from_blob(memory + layout.values, codebook.sizes(), codebook.options().dtype(at::kFloat))
                        : codebook.contiguous();
  search(features, values, codes, index, distance);
  return {index, distance};
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) {
  library.impl("codebook_operands", &codebook_operands);
  library.impl("nearest_codeword", &nearest_codeword);
}

}  // namespace unicode_fast::cpu
