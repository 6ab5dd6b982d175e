// The launcher of the nearest codeword search.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/tiles.h"
#include "matrix.h"

namespace unicode_fast::cuda {

// Which matrix instructions the half-precision search may use: those that suit the GPU and the sizes, mma.sync alone,
// or wgmma wherever the widths allow, however small the rest.
enum class MainLoop { kBest, kPlain, kMma, kWgmma };

// Which kernels search, and where their workspaces lie in one allocation of `bytes` bytes.
struct SearchPlan {
  // Rows of a tile, 128, 64 or 16, of the half-precision search; 0 for direct differences in float64, where the
  // features are float64, the GPU has no cp.async (before 8.0), or a tile of rows does not fit into its shared memory.
  int tile_rows = 0;
  bool wgmma = false;     // with operands in tiles, csrc/common/hopper_tiles.h
  int width = 0;          // padded D
  int64_t codewords = 0;  // padded M
  Splits splits{1, 0};    // of the codebook's tiles among blocks
  size_t shared_bytes = 0;
  // Offsets: mean and largest difference from it of each column, float32; facts about the codebook; its operands in
  // half precision (codewords, width); their squared norms, float32, with wgmma among the operands; per row and split
  // the candidates; twice each row's bound, float32.
  size_t mean = 0, spread = 0, facts = 0, operands = 0, norms = 0, records = 0, bounds = 0, bytes = 0;
};

// Asks the current device for its size. cudaErrorNotSupported where wgmma is wanted, and the GPU, or what was compiled
// for it, has none.
cudaError_t plan_nearest_codeword(const Matrix& features, const Matrix& codebook, MainLoop loop, SearchPlan& plan);

// Writes `index` (N) and `distance` (N), float64 for float64 features, else float32. At least one row. Four launches,
// one for direct differences; no synchronisation.
cudaError_t launch_nearest_codeword(const SearchPlan& plan, const Matrix& features, const Matrix& codebook,
                                    void* workspace, int64_t* index, void* distance, cudaStream_t stream);

}  // namespace unicode_fast::cuda
