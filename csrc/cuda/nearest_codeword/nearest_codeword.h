// The launcher of the nearest codeword search.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../../common/tiles.h"
#include "../matrix.h"

namespace unicode_fast::cuda {

// Which search is taken: the one that suits the GPU and the sizes, no half precision, mma.sync in the tiles that suit
// the sizes, or the tiles of one shape wherever the widths allow, however small the rest; wgmma has a shape of its own.
enum class MainLoop { kBest, kPlain, kMma, kWide, kMiddle, kNarrow, kWgmma };

// What the half-precision search reads of a codebook, and where it lies in one allocation of `bytes` bytes; none where
// the GPU has no such search.
struct OperandsPlan {
  int width = 0;          // padded D
  int64_t codewords = 0;  // padded M
  // With operands row by row, and in tiles, csrc/cuda/nearest_codeword/hopper_tiles.h.
  bool rows = false, tiles = false;
  // Offsets: mean and largest difference from it of each column, float32; facts about the codebook; its operands in
  // half precision (codewords, width) and their squared norms, float32; both in tiles.
  size_t mean = 0, spread = 0, facts = 0, operands = 0, norms = 0, tile_operands = 0, bytes = 0;
};

// Which kernels search, and where their workspaces lie in one allocation of `bytes` bytes.
struct SearchPlan {
  // Rows of a tile, 128, 64 or 16, of the half-precision search; 0 for direct differences in float64, where the
  // features are float64, the GPU has no cp.async (before 8.0), or a tile of rows does not fit into its shared memory.
  int tile_rows = 0;
  bool wgmma = false;   // with operands in tiles
  int width = 0;        // padded D
  Splits splits{1, 0};  // of the codebook's tiles among blocks
  size_t shared_bytes = 0;
  // Offsets: per row and split the candidates; twice each row's bound, float32.
  size_t records = 0, bounds = 0, bytes = 0;
};

// Asks the current device for its size. cudaErrorNotSupported where wgmma is wanted, and the GPU, or what was compiled
// for it, has none.
cudaError_t plan_nearest_codeword(const Matrix& features, const Matrix& codebook, MainLoop loop, SearchPlan& plan);

// The operands that any search of this codebook on the current device may choose, or those that one plan reads.
cudaError_t plan_operands(const Matrix& codebook, OperandsPlan& plan);
OperandsPlan operands_for(const SearchPlan& plan, const Matrix& codebook);

// Two launches, three for both layouts; none where there are no operands.
cudaError_t launch_operands(const OperandsPlan& plan, const Matrix& codebook, void* operands, cudaStream_t stream);

// What `compared` holds of a row that was compared with every codeword as its candidates were not known.
constexpr int kComparedWithAll = -1;

// Where the results of N rows go.
struct Found {
  int64_t* index;
  void* distance;  // float64 for float64 features, else float32
  int* compared;   // how many candidates were compared in float64, or kComparedWithAll; may be null
};

// At least one row. Two launches, one for direct differences; no synchronisation.
cudaError_t launch_nearest_codeword(const SearchPlan& plan, const OperandsPlan& made, const Matrix& features,
                                    const Matrix& codebook, const void* operands, void* workspace, const Found& found,
                                    cudaStream_t stream);

}  // namespace unicode_fast::cuda
