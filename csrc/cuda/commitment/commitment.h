// The launcher of the commitment loss.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace unicode_fast::cuda {

// Rows that a block takes, one a warp.
constexpr int kCommitmentRows = 8;

// Features (modalities, rows, width) and codewords (codewords, width) lie without gaps.
template <typename T>
struct CommitmentArguments {
  const T* features;
  const int64_t* index;  // (modalities, rows)
  const uint8_t* valid;  // (modalities, rows), bytes as bools need not be 0 or 1, or null where every row is valid
  const T* codebook;
  const double* weights;  // (modalities, modalities)
  T* direction;           // like the features
  T* loss;                // (modalities)
  int64_t* numbers;       // workspace (modalities, modalities): rows valid in both; unused without `valid`
  double* partial;        // workspace (modalities, blocks of kCommitmentRows rows)
  int64_t rows, codewords;
  int modalities, width;
};

// Two launches, three with a mask; no synchronisation.
cudaError_t launch_commitment(const CommitmentArguments<float>& arguments, cudaStream_t stream);
cudaError_t launch_commitment(const CommitmentArguments<double>& arguments, cudaStream_t stream);

}  // namespace unicode_fast::cuda
