// The launcher of the nearest codeword search.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../../common/tiles.h"
#include "../matrix.h"

namespace unicode_fast::cuda {

// The choice of a search: by GPU and sizes; no half precision; mma.sync in the tiles that suit the sizes. Or the tiles
// of one shape wherever the widths allow, whatever the other sizes; wgmma has a shape of its own.
enum class MainLoop { kBest, kPlain, kMma, kWide, kMiddle, kNarrow, kWgmma };

// The operands of a codebook for the half-precision search, with their offsets in one allocation of `bytes` bytes. A
// GPU without such a search has none.
struct OperandsPlan {
  int width = 0;          // padded D
  int64_t codewords = 0;  // padded M
  // With operands row by row, and in tiles, csrc/cuda/nearest_codeword/hopper_tiles.h.
  bool rows = false, tiles = false;
  int64_t entries = 0;  // of each table in which codewords meet
  // Offsets of: mean and largest difference from it of each column, float32; facts about the codebook; the tables of
  // equal and of near codewords; the clusters of near ones. The operands in half precision (codewords, width) and their
  // squared norms, float32; both in tiles.
  size_t mean = 0, spread = 0, facts = 0, table = 0, cells = 0, clusters = 0, operands = 0, norms = 0,
         tile_operands = 0, bytes = 0;
};

// The kernels of a search, with the offsets of their workspaces in one allocation of `bytes` bytes.
struct SearchPlan {
  // Rows of a tile, 128, 64 or 16, of the half-precision search; 0 for direct differences in float64. These serve
  // float64 features, a GPU without cp.async (before 8.0), and a tile of rows that does not fit into shared memory.
  int tile_rows = 0;
  bool wgmma = false;   // with operands in tiles
  int width = 0;        // padded D
  Splits splits{1, 0};  // of the codebook's tiles among blocks
  size_t shared_bytes = 0;
  // In the search with wgmma: blocks for each split, which do several tiles of rows; 0: one block for each tile.
  int64_t persistent_blocks = 0;
  // Of the second search, of rows whose lists overflow: tiles of 16 rows, not 64; blocks.
  bool open_in_narrow = false;
  int64_t open_blocks = 0;
  // Offsets of: differences of members of clusters from their representatives, and the squares of these, float32; the
  // candidates of each row and split; twice each row's bound, float32; the rows for the second search,
  // and their number; rows that a persistent grid prepares there.
  size_t differences = 0, squares = 0, records = 0, bounds = 0, open_rows = 0, open_count = 0, staged = 0, bytes = 0;
};

// Reads the sizes of the current device. cudaErrorNotSupported if wgmma is requested, but the GPU or the code compiled
// for it has none.
cudaError_t plan_nearest_codeword(const Matrix& features, const Matrix& codebook, MainLoop loop, SearchPlan& plan);

// Lets so many blocks for each split do all rows, several tiles each, in a search with wgmma of aligned rows of up to
// 256 columns, a multiple of eight. Changes nothing in other searches and in those of no more tiles.
void make_persistent(const Matrix& features, int64_t blocks, SearchPlan& plan);

// The operands that any search of this codebook on the current device may choose, or those that one plan reads.
cudaError_t plan_operands(const Matrix& codebook, OperandsPlan& plan);
OperandsPlan operands_for(const SearchPlan& plan, const Matrix& codebook);

// Two launches, three for both layouts; none where there are no operands.
cudaError_t launch_operands(const OperandsPlan& plan, const Matrix& codebook, void* operands, cudaStream_t stream);

// The entry in `compared` of a row whose candidates were not known: one with too many of them for a list, which a
// second search serves, or one that half precision cannot serve, which is compared with every codeword.
constexpr int kComparedWithAll = -1;

// Memory for the results of N rows.
struct Found {
  int64_t* index;
  void* distance;  // float64 for float64 features, else float32
  int* compared;   // number of candidates, a cluster counting as one, or kComparedWithAll; may be null
};

// At least one row. Three launches, one for direct differences; no synchronisation.
cudaError_t launch_nearest_codeword(const SearchPlan& plan, const OperandsPlan& made, const Matrix& features,
                                    const Matrix& codebook, const void* operands, void* workspace, const Found& found,
                                    cudaStream_t stream);

}  // namespace unicode_fast::cuda
