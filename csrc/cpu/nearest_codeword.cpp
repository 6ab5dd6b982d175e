// The operator nearest_codeword on CPUs: blocks of rows go to the loops of kernels_body.h. docs/exactness.md proves
// that the nearest codeword is never missed.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"
#include "subnormals.h"

namespace unicode_fast::cpu {
namespace {

constexpr int64_t kLargestBlock = 192;
// Differences of coordinates, and rows, of the calls that compare directly.
constexpr int64_t kSmallCall = 1 << 14, kFewRows = 4;

// Rows that a thread takes at once: enough blocks to keep all threads busy to the end, a multiple of 6 rows.
int64_t block_rows(int64_t rows) {
  const int64_t even = rows / (8 * at::get_num_threads());
  return std::clamp<int64_t>((even + 5) / 6 * 6, 6, kLargestBlock);
}

// Half-precision codewords are exact in float32.
bool is_half(const at::Tensor& codebook) {
  return codebook.scalar_type() == at::kHalf || codebook.scalar_type() == at::kBFloat16;
}

// Offsets of the arrays of the operands, in bytes: facts, mean, norms, operands, places, and, for a codebook in half
// precision, the codewords in float32.
struct OperandsLayout {
  int64_t mean, norms, operands, places, values, bytes;
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
  layout.operands = place(padded * ((width + 1) / 2) * 4);
  layout.places = place(codewords * 4);
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
  codes.places = reinterpret_cast<int32_t*>(memory + layout.places);
  return codes;
}

// Whether the operands can be those of the codebook: no number in them leads outside of it.
bool belongs_to(const PreparedCodebook& codes, const at::Tensor& codebook) {
  if (codes.codewords != codebook.size(0) || codes.width != codebook.size(1) ||
      codes.dtype != static_cast<int32_t>(codebook.scalar_type()))
    return false;
  if (!codes.finite) return true;
  const int64_t panel = kernels().panel, padded = (codes.kept + panel - 1) / panel * panel;
  return codes.kept > 0 && codes.kept <= codes.codewords &&
         std::all_of(codes.places, codes.places + codes.kept,
                     [&](int32_t place) { return place >= 0 && place < codes.codewords; }) &&
         std::all_of(codes.norms + codes.kept, codes.norms + padded,
                     [](float norm) { return norm == std::numeric_limits<float>::infinity(); });
}

void on_threads(int64_t count, int64_t grain, const Body& body) {
  at::parallel_for(0, count, grain, [&body](int64_t first, int64_t last) {
    const KeepSubnormals keep;
    body(first, last);
  });
}

void codebook_operands(const at::Tensor& codebook, const at::Tensor& operands) {
  const KeepSubnormals keep;
  check_codebook(codebook, kFeatureDtypes);
  const OperandsLayout layout = layout_of(codebook);
  check_operands(operands, codebook, layout.bytes, alignof(CodebookFacts));
  check_apart({{"operands", operands}, {"codebook", codebook}}, 1);
  unsigned char* memory = operands.mutable_data_ptr<unsigned char>();
  PreparedCodebook codes = parts_of(memory, codebook, layout);
  if (codebook.scalar_type() == at::kDouble) {
    kernels().prepare_double(codes, codebook.contiguous().const_data_ptr<double>(), on_threads);
  } else {
    const at::Tensor values = codebook.to(at::kFloat).contiguous();
    kernels().prepare_float(codes, values.const_data_ptr<float>(), on_threads);
    if (is_half(codebook))
      std::copy_n(values.const_data_ptr<float>(), values.numel(), reinterpret_cast<float*>(memory + layout.values));
  }
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

void search_rows(const PreparedCodebook& codes, const at::Tensor& codebook, const at::Tensor& features, int64_t first,
                 const at::Tensor& index, const at::Tensor& distance, Scratch& scratch) {
  // A view of float32 rows, a converted copy of all others.
  at::Tensor part = features.to(at::kFloat);
  if (part.stride(1) != 1) part = part.contiguous();
  std::vector<const float*> rows(part.size(0));
  for (int64_t i = 0; i < part.size(0); ++i) rows[i] = part.const_data_ptr<float>() + i * part.stride(0);
  int64_t* found = index.mutable_data_ptr<int64_t>() + first;
  float* squared = distance.mutable_data_ptr<float>() + first;
  if (codebook.scalar_type() == at::kDouble) {
    kernels().search_double(codes, codebook.const_data_ptr<double>(), rows.data(), part.size(0), found, squared,
                            scratch);
  } else {
    kernels().search_float(codes, codebook.const_data_ptr<float>(), rows.data(), part.size(0), found, squared, scratch);
  }
}

void search(const at::Tensor& features, const at::Tensor& codebook, const PreparedCodebook& codes,
            const at::Tensor& index, const at::Tensor& distance) {
  const int64_t rows = features.size(0), block = block_rows(rows);
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t first_block, int64_t last_block) {
    const KeepSubnormals keep;
    Scratch scratch;
    for (int64_t first = first_block * block; first < std::min(last_block * block, rows); first += block)
      search_rows(codes, codebook, features.narrow(0, first, std::min(block, rows - first)), first, index, distance,
                  scratch);
  });
}

// Whether a direct comparison with every codeword takes less time than the codebook's operands, or than the threads.
bool is_small(int64_t rows, const at::Tensor& codebook, bool prepared) {
  return rows * codebook.numel() <= kSmallCall || (!prepared && rows <= kFewRows);
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
  if (is_small(features.size(0), codebook, operands.has_value())) {
    PreparedCodebook codes;
    codes.codewords = codebook.size(0);
    codes.width = codebook.size(1);
    codes.finite = 0;
    const KeepSubnormals keep;
    Scratch scratch;
    const at::Tensor values = (is_half(codebook) ? codebook.to(at::kFloat) : codebook).contiguous();
    search_rows(codes, values, features, 0, index, distance, scratch);
    return {index, distance};
  }
  const at::Tensor made = operands ? *operands : at::empty({layout.bytes}, codebook.options().dtype(at::kByte));
  if (!operands) codebook_operands(codebook, made);
  unsigned char* memory = const_cast<unsigned char*>(made.const_data_ptr<unsigned char>());
  PreparedCodebook codes = parts_of(memory, codebook, layout);
  std::memcpy(static_cast<CodebookFacts*>(&codes), memory, sizeof(CodebookFacts));
  TORCH_CHECK_VALUE(belongs_to(codes, codebook), "operands must be what codebook_operands made of a codebook of shape ",
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
