// Checks of an operator's arguments before it reads or writes their memory, the same on every device. The references
// are checked in unicode_fast/ops. Each message has the argument, what it must be and what it was.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>

namespace unicode_fast {

using Dtypes = at::ArrayRef<at::ScalarType>;

inline constexpr at::ScalarType kFeatureDtypes[] = {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16};
inline constexpr at::ScalarType kStateDtypes[] = {at::kDouble, at::kFloat};
inline constexpr at::ScalarType kDoubleOnly[] = {at::kDouble}, kLongOnly[] = {at::kLong}, kBoolOnly[] = {at::kBool};
// Limit of a tensor's numbers: the bytes of the tensor, of its padding and of the results can be counted in 64 bits.
inline constexpr int64_t kMostNumbers = int64_t{1} << 48;

// An argument, or tensor `place` of a list of them.
struct Name {
  Name(const char* text, int64_t place = -1) : text(text), place(place) {}

  const char* text;
  int64_t place;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.text;
  return name.place < 0 ? out : out << '[' << name.place << ']';
}

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    default:
      return c10::toString(dtype);
  }
}

inline std::string one_of(Dtypes dtypes) {
  std::string text;
  for (size_t n = 0; n < dtypes.size(); ++n)
    text += (n == 0 ? "" : n + 1 < dtypes.size() ? ", " : " or ") + dtype_name(dtypes[n]);
  return text;
}

// Sizes as Python writes them; for many dimensions their number.
inline std::string shape_name(at::IntArrayRef sizes) {
  if (sizes.size() > 8) return std::to_string(sizes.size()) + " dimensions";
  std::string text = "(";
  for (size_t n = 0; n < sizes.size(); ++n) text += (n == 0 ? "" : ", ") + std::to_string(sizes[n]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline void check_tensor(const Name& name, const at::Tensor& tensor, Dtypes dtypes) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " must be a tensor, got None");
  bool among = false;
  for (const at::ScalarType dtype : dtypes) among = among || tensor.scalar_type() == dtype;
  TORCH_CHECK_TYPE(among, name, " must be ", one_of(dtypes), ", got ", dtype_name(tensor.scalar_type()));
}

// For operators with one kernel, of float32 on a CPU.
inline void check_float_on_cpu(const Name& name, const at::Tensor& tensor) {
  check_tensor(name, tensor, at::kFloat);
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on a CPU, got ", tensor.device());
}

// `meaning` describes the shape; the tensor must be on the device of `like`.
inline void check_like(const Name& name, const at::Tensor& tensor, Dtypes dtypes, at::IntArrayRef shape,
                       const char* meaning, const at::Tensor& like) {
  check_tensor(name, tensor, dtypes);
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape_name(shape), ", ", meaning, ", got ",
                    shape_name(tensor.sizes()));
  TORCH_CHECK_VALUE(tensor.device() == like.device(), name, " must be on ", like.device(), " like the others, got ",
                    tensor.device());
}

inline void check_codebook(const at::Tensor& codebook, Dtypes dtypes) {
  check_tensor("codebook", codebook, dtypes);
  TORCH_CHECK_VALUE(codebook.dim() == 2 && codebook.numel() > 0,
                    "codebook must have shape (M, D), M and D at least 1, ", "got ", shape_name(codebook.sizes()));
  TORCH_CHECK_VALUE(codebook.size(0) < INT32_MAX && codebook.size(1) < INT32_MAX && codebook.numel() <= kMostNumbers,
                    "codebook must have fewer than 2^31 - 1 rows and columns and at most 2^48 numbers, got ",
                    shape_name(codebook.sizes()));
}

// A codebook for features of this width, which is their last dimension.
inline void check_codebook_of(const at::Tensor& features, const at::Tensor& codebook) {
  check_codebook(codebook, kFeatureDtypes);
  TORCH_CHECK_TYPE(codebook.scalar_type() == at::kDouble || codebook.scalar_type() == at::kFloat ||
                       codebook.scalar_type() == features.scalar_type(),
                   "codebook must be float64, float32 or, like features, ", dtype_name(features.scalar_type()),
                   ", got ", dtype_name(codebook.scalar_type()));
  TORCH_CHECK_VALUE(codebook.size(1) == features.size(-1), "codebook must have shape (M, ", features.size(-1),
                    ") to match features, got ", shape_name(codebook.sizes()));
  TORCH_CHECK_VALUE(codebook.device() == features.device(), "codebook must be on ", features.device(),
                    " like features, got ", codebook.device());
}

inline void check_search(const at::Tensor& features, const at::Tensor& codebook) {
  check_tensor("features", features, kFeatureDtypes);
  TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) > 0, "features must have shape (N, D), D at least 1, got ",
                    shape_name(features.sizes()));
  check_codebook_of(features, codebook);
}

// The operands that codebook_operands writes and searches read: at least `bytes` bytes, from a multiple of `alignment`.
inline void check_operands(const at::Tensor& operands, const at::Tensor& codebook, int64_t bytes, size_t alignment) {
  TORCH_CHECK_TYPE(operands.defined(), "operands must be a tensor, got None");
  TORCH_CHECK_VALUE(operands.scalar_type() == at::kByte && operands.is_contiguous() &&
                        operands.device() == codebook.device() && operands.numel() >= bytes &&
                        reinterpret_cast<uintptr_t>(operands.const_data_ptr()) % alignment == 0,
                    "operands must be at least ", bytes, " aligned bytes beside the codebook, got ", operands.numel(),
                    " numbers of ", dtype_name(operands.scalar_type()), " on ", operands.device());
}

// A written tensor must have a place in memory for each number, and share none with another argument.
inline void check_apart(at::ArrayRef<std::pair<const char*, at::Tensor>> arguments, size_t written) {
  for (size_t n = 0; n < written; ++n) {
    const auto& [name, tensor] = arguments[n];
    TORCH_CHECK_VALUE(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, name,
                      " must have a place in memory for each number, got strides ", shape_name(tensor.strides()));
    for (size_t other = n + 1; other < arguments.size(); ++other) {
      const auto status = at::get_overlap_status(tensor, arguments[other].second);
      TORCH_CHECK_VALUE(status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial, name,
                        " must not share memory with other arguments, got that of ", arguments[other].first);
    }
  }
}

inline void check_choice(const char* name, std::string_view value, at::ArrayRef<std::string_view> choices) {
  for (const std::string_view choice : choices)
    if (value == choice) return;
  std::string text;
  for (const std::string_view choice : choices)
    text.append(text.empty() ? "'" : ", '").append(choice.data(), choice.size()).append("'");
  TORCH_CHECK_VALUE(false, name, " must be one of ", text, ", got '", value.substr(0, 40), "'");
}

// The ranges of EmaConfig, unicode_fast/reference/codebook_update.py. NaN is in no range.
inline void check_rule(double decay, double epsilon, double own_weight, std::string_view update,
                       std::string_view smoothing, int64_t reset_after, std::string_view reset_unless,
                       std::string_view reset_source, double reset_noise, int64_t reset_active_within) {
  check_choice("update", update, {"joint", "sequential"});
  check_choice("smoothing", smoothing, {"none", "transient", "compounding"});
  check_choice("reset_unless", reset_unless, {"any", "all"});
  check_choice("reset_source", reset_source, {"codeword", "feature"});
  TORCH_CHECK_VALUE(decay >= 0 && decay <= 1, "decay must be in [0, 1], got ", decay);
  TORCH_CHECK_VALUE(own_weight >= 0 && own_weight <= 1, "own_weight must be in [0, 1], got ", own_weight);
  TORCH_CHECK_VALUE(epsilon >= 0, "epsilon must be 0 or greater, got ", epsilon);
  TORCH_CHECK_VALUE(epsilon > 0 || smoothing == "none", "epsilon must be greater than 0 for smoothing '", smoothing,
                    "', got ", epsilon);
  TORCH_CHECK_VALUE(reset_after >= 0, "reset_after must be 0 or greater, got ", reset_after);
  TORCH_CHECK_VALUE(reset_noise >= 0, "reset_noise must be 0 or greater, got ", reset_noise);
  TORCH_CHECK_VALUE(reset_active_within >= 0, "reset_active_within must be 0 or greater, got ", reset_active_within);
}

// All arguments of codebook_statistics except the rule, from which it takes the own weight. Indices are checked at
// their use.
inline void check_statistics(const at::Tensor& codebook, const at::Tensor& step, at::TensorList features,
                             at::TensorList index, at::TensorList partners, at::TensorList valid,
                             const std::optional<at::Tensor>& choice, at::IntArrayRef first_row,
                             at::IntArrayRef total_rows, double own_weight) {
  check_codebook(codebook, kStateDtypes);
  check_like("step", step, kLongOnly, {}, "one number", codebook);
  const size_t modalities = features.size();
  TORCH_CHECK_VALUE(modalities >= 1, "features must have at least one entry, got none");
  const auto check_length = [modalities](const char* name, size_t length, bool optional) {
    TORCH_CHECK_VALUE(length == modalities || (optional && length == 0), name, " must have ", modalities,
                      " entries, one for each of features, got ", length);
  };
  check_length("index", index.size(), false);
  check_length("partners", partners.size(), true);
  check_length("valid", valid.size(), true);
  check_length("first_row", first_row.size(), false);
  check_length("total_rows", total_rows.size(), false);
  const int64_t width = codebook.size(1);
  int64_t rows_left = INT64_MAX;
  for (size_t m = 0; m < modalities; ++m) {
    const int64_t place = static_cast<int64_t>(m);
    check_tensor({"features", place}, features[m], kFeatureDtypes);
    const int64_t rows = features[m].dim() == 2 ? features[m].size(0) : 1;
    check_like({"features", place}, features[m], kFeatureDtypes, {rows, width}, "(N, D)", codebook);
    check_like({"index", place}, index[m], kLongOnly, {rows}, "the rows of features", codebook);
    if (!partners.empty())
      check_like({"partners", place}, partners[m], kFeatureDtypes, {rows, width}, "that of features", codebook);
    if (!valid.empty()) check_like({"valid", place}, valid[m], kBoolOnly, {rows}, "the rows of features", codebook);
    TORCH_CHECK_VALUE(own_weight == 1 || !partners.empty() || rows == features[0].size(0), "features[", m,
                      "] must have ", features[0].size(0), " rows like features[0] where partners are not given, got ",
                      rows);
    TORCH_CHECK_VALUE(first_row[m] >= 0 && total_rows[m] >= rows && first_row[m] <= total_rows[m] - rows, "total_rows[",
                      m, "] must hold the ", rows, " rows of features[", m, "] from first_row ", first_row[m],
                      " on, got ", total_rows[m]);
    TORCH_CHECK_VALUE(total_rows[m] <= rows_left, "total_rows must add up to less than 2^63, got ", total_rows[m],
                      " for features[", m, "]");
    rows_left -= total_rows[m];
  }
  if (choice) check_like("choice", *choice, kDoubleOnly, {codebook.size(0)}, "(M,)", codebook);
}

// The state of a codebook; returns its number of modalities.
inline int64_t check_state(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                           const at::Tensor& idle, const at::Tensor& step) {
  check_codebook(codebook, kStateDtypes);
  const int64_t codewords = codebook.size(0), width = codebook.size(1);
  const at::ScalarType dtype = codebook.scalar_type();
  check_like("ema_count", ema_count, dtype, {codewords}, "(M,)", codebook);
  check_like("ema_sum", ema_sum, dtype, {codewords, width}, "(M, D)", codebook);
  check_tensor("idle", idle, kLongOnly);
  const int64_t modalities = idle.dim() == 2 ? idle.size(0) : 1;
  check_like("idle", idle, kLongOnly, {modalities, codewords}, "(modalities, M)", codebook);
  TORCH_CHECK_VALUE(modalities >= 1 && idle.numel() <= kMostNumbers, "idle must have at least one row and at most ",
                    "2^48 numbers, got ", shape_name(idle.sizes()));
  check_like("step", step, kLongOnly, {}, "one number", codebook);
  return modalities;
}

inline void check_draws(const at::Tensor& codebook, const std::optional<at::Tensor>& choice,
                        const std::optional<at::Tensor>& noise) {
  TORCH_CHECK_VALUE(choice.has_value() == noise.has_value(),
                    "noise must be given where choice is, and only there, got ", noise ? "noise" : "choice", " alone");
  const int64_t codewords = codebook.size(0), width = codebook.size(1);
  if (choice) check_like("choice", *choice, kDoubleOnly, {codewords}, "(M,)", codebook);
  if (noise) check_like("noise", *noise, kDoubleOnly, {codewords, width}, "(M, D)", codebook);
}

// All arguments of codebook_apply except the rule, from which it takes whether codewords are reset from features.
inline void check_apply(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                        const at::Tensor& idle, const at::Tensor& step, const at::Tensor& statistics,
                        const std::optional<at::Tensor>& choice, const std::optional<at::Tensor>& noise,
                        bool from_features) {
  const int64_t modalities = check_state(codebook, ema_count, ema_sum, idle, step);
  const int64_t codewords = codebook.size(0), width = codebook.size(1);
  const int64_t size = modalities * (1 + codewords) + codewords * width + (from_features ? codewords * (1 + width) : 0);
  check_like("statistics", statistics, kDoubleOnly, {size}, "all its parts", codebook);
  check_draws(codebook, choice, noise);
  check_apart({{"codebook", codebook},
               {"ema_count", ema_count},
               {"ema_sum", ema_sum},
               {"idle", idle},
               {"step", step},
               {"statistics", statistics}},
              5);
}

// Arguments of codebook_update that check_statistics does not check, except the rule.
inline void check_update(const at::Tensor& codebook, const at::Tensor& ema_count, const at::Tensor& ema_sum,
                         const at::Tensor& idle, const at::Tensor& step, at::TensorList features,
                         const std::optional<at::Tensor>& choice, const std::optional<at::Tensor>& noise) {
  const int64_t modalities = check_state(codebook, ema_count, ema_sum, idle, step);
  TORCH_CHECK_VALUE(modalities == static_cast<int64_t>(features.size()), "idle must have ", features.size(),
                    " rows, one for each of features, got ", modalities);
  check_draws(codebook, choice, noise);
  check_apart({{"codebook", codebook}, {"ema_count", ema_count}, {"ema_sum", ema_sum}, {"idle", idle}, {"step", step}},
              5);
}

inline void check_commitment(const at::Tensor& features, const at::Tensor& index,
                             const std::optional<at::Tensor>& valid, const at::Tensor& codebook,
                             const at::Tensor& weights) {
  check_tensor("features", features, kFeatureDtypes);
  TORCH_CHECK_VALUE(features.dim() == 3 && features.size(0) > 0 && features.size(2) > 0,
                    "features must have shape (modalities, N, D), modalities and D at least 1, got ",
                    shape_name(features.sizes()));
  check_codebook_of(features, codebook);
  const int64_t modalities = features.size(0), rows = features.size(1);
  check_like("index", index, kLongOnly, {modalities, rows}, "(modalities, N) of features", features);
  if (valid) check_like("valid", *valid, kBoolOnly, {modalities, rows}, "(modalities, N) of features", features);
  check_like("weights", weights, kDoubleOnly, {modalities, modalities}, "(modalities, modalities)", features);
}

}  // namespace unicode_fast
