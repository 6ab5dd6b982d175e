// The operator commitment_loss on CPUs: loss and gradient in one pass over the features. Sums over blocks of rows are
// added in the order of the blocks, so results repeat bit for bit with any number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "kernels.h"

namespace unicode_fast::cpu {
namespace {

constexpr int64_t kBlock = 64;

template <typename T>
void commit_all(const at::Tensor& features, const at::Tensor& index, const std::optional<at::Tensor>& valid,
                const at::Tensor& codebook, const at::Tensor& weights, double* loss, T* direction) {
  const int64_t modalities = features.size(0), rows = features.size(1), width = features.size(2);
  const uint8_t* mask = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  const double* weight = weights.const_data_ptr<double>();
  const int64_t* codes = index.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < modalities * rows; ++n) {
    if (mask != nullptr && !mask[n]) continue;
    TORCH_CHECK_INDEX(codes[n] >= 0 && codes[n] < codebook.size(0), "index must be in [0, ", codebook.size(0),
                      ") at valid rows, got ", codes[n], " at row ", n % rows, " of modality ", n / rows);
  }
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  for (int64_t m = 0; m < modalities; ++m) {
    Commitment<T> batch;
    batch.features = features.const_data_ptr<T>() + m * rows * width;
    batch.codebook = codebook.const_data_ptr<T>();
    batch.own_valid = mask == nullptr ? nullptr : mask + m * rows;
    batch.width = width;
    for (int64_t o = 0; o < modalities; ++o) {
      int64_t number = rows;
      if (mask != nullptr) {
        batch.valid.push_back(mask + o * rows);
        number = 0;
        for (int64_t i = 0; i < rows; ++i) number += batch.own_valid[i] && batch.valid[o][i];
      }
      batch.index.push_back(codes + o * rows);
      batch.scale.push_back(static_cast<T>(weight[m * modalities + o]) / static_cast<T>(std::max<int64_t>(number, 1)));
    }
    std::vector<double> sums(blocks, 0.0);
    T* gradient = direction + m * rows * width;
    at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kBlock, end = std::min(begin + kBlock, rows);
        if constexpr (std::is_same_v<T, double>) {
          sums[block] = kernels().commit_double(batch, begin, end, gradient);
        } else {
          sums[block] = kernels().commit_float(batch, begin, end, gradient);
        }
      }
    });
    loss[m] = 0;
    for (const double sum : sums) loss[m] += sum;
  }
}

std::tuple<at::Tensor, at::Tensor> commitment_loss(const at::Tensor& features, const at::Tensor& index,
                                                   const std::optional<at::Tensor>& valid, const at::Tensor& codebook,
                                                   const at::Tensor& weights) {
  check_commitment(features, index, valid, codebook, weights);
  const at::ScalarType dtype = features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor rows = features.to(dtype).contiguous(), codes = codebook.to(dtype).contiguous();
  const at::Tensor direction = at::empty(rows.sizes(), rows.options());
  const at::Tensor loss = at::empty({rows.size(0)}, rows.options().dtype(at::kDouble));
  const std::optional<at::Tensor> mask = valid ? std::optional(valid->contiguous()) : std::nullopt;
  if (dtype == at::kDouble) {
    commit_all<double>(rows, index.contiguous(), mask, codes, weights.contiguous(), loss.mutable_data_ptr<double>(),
                       direction.mutable_data_ptr<double>());
  } else {
    commit_all<float>(rows, index.contiguous(), mask, codes, weights.contiguous(), loss.mutable_data_ptr<double>(),
                      direction.mutable_data_ptr<float>());
  }
  return {loss.to(dtype), direction.to(features.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(unicode_fast, CPU, library) { library.impl("commitment_loss", &commitment_loss); }

}  // namespace unicode_fast::cpu
