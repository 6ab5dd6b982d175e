// The half-precision search with wgmma and the bulk copy engine, for GPUs of compute capability 9.0.
#pragma once

#include "../common/hopper_tiles.h"
#include "half_search.cuh"

namespace unicode_fast::cuda {

// A warpgroup's part: four warps of 16 rows each score its rows against all codewords of a tile, each warp as in a
// Shape of one column of warps.
struct Warpgroup {
  static constexpr int kWarpsN = 1, kTilesM = 1, kTilesN = kTileCodewords / 8;
  static constexpr int kThreads = 128, kRows = kGroupRows;
  static __device__ __forceinline__ uint32_t row_offset(int row, int piece, int) {
    return block_offset(row, piece, kGroupRows);
  }
};

// A block: kGroups warpgroups that compute, then one whose first thread fetches.
struct HopperShape {
  static constexpr int kBlocks = 1, kThreads = (kGroups + 1) * Warpgroup::kThreads;
  static constexpr int kRows = kGroups * kGroupRows, kColumns = kTileCodewords;
  // Registers of a thread: at launch as many as 384 threads can have, then the last warpgroup gives most of its own
  // away.
  static constexpr int kLaunchRegisters = 168, kFewRegisters = 24, kManyRegisters = 240;
  static_assert(kGroups * kManyRegisters + kFewRegisters == (kGroups + 1) * kLaunchRegisters);

  static int64_t shared_bytes(int width) { return ring_and_row_bytes(width); }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity; of a new barrier phase 1 counts as over.
__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Source, destination and size are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Orders this thread's ordinary accesses to shared memory before those of matrix units and the copy engine.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

__device__ __forceinline__ void wait_for_group(int group) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(group + 1), "n"(Warpgroup::kThreads) : "memory");
}

// Before the first of a group of products, whose sums ordinary instructions may have written.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
}

using Sums = float[1][Warpgroup::kTilesN][4];

// Keeps the compiler from moving accesses to the sums across; the matrix units change them behind its back.
__device__ __forceinline__ void pin(Sums& sums) {
#pragma unroll
  for (int n = 0; n < Warpgroup::kTilesN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[0][n][e])::"memory");
  }
}

// sums (64 x 256) = [sums +] rows (64 x 16) times codewords (256 x 16) transposed, by a warpgroup. Warp w holds rows
// 16 w to 16 w + 15, of each 8 columns what mma.sync.m16n8k16 would give it.
__device__ __forceinline__ void multiply(Sums& sums, uint64_t rows, uint64_t codewords, int add) {
#define UNICODE_FAST_SUMS(n) "+f"(sums[0][n][0]), "+f"(sums[0][n][1]), "+f"(sums[0][n][2]), "+f"(sums[0][n][3])
  asm volatile(
      "{\n"
      ".reg .pred more;\n"
      "setp.ne.b32 more, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, "
      "more, 1, 1, 0, 0;\n"
      "}\n"
      : UNICODE_FAST_SUMS(0), UNICODE_FAST_SUMS(1), UNICODE_FAST_SUMS(2), UNICODE_FAST_SUMS(3), UNICODE_FAST_SUMS(4),
        UNICODE_FAST_SUMS(5), UNICODE_FAST_SUMS(6), UNICODE_FAST_SUMS(7), UNICODE_FAST_SUMS(8), UNICODE_FAST_SUMS(9),
        UNICODE_FAST_SUMS(10), UNICODE_FAST_SUMS(11), UNICODE_FAST_SUMS(12), UNICODE_FAST_SUMS(13),
        UNICODE_FAST_SUMS(14), UNICODE_FAST_SUMS(15), UNICODE_FAST_SUMS(16), UNICODE_FAST_SUMS(17),
        UNICODE_FAST_SUMS(18), UNICODE_FAST_SUMS(19), UNICODE_FAST_SUMS(20), UNICODE_FAST_SUMS(21),
        UNICODE_FAST_SUMS(22), UNICODE_FAST_SUMS(23), UNICODE_FAST_SUMS(24), UNICODE_FAST_SUMS(25),
        UNICODE_FAST_SUMS(26), UNICODE_FAST_SUMS(27), UNICODE_FAST_SUMS(28), UNICODE_FAST_SUMS(29),
        UNICODE_FAST_SUMS(30), UNICODE_FAST_SUMS(31)
      : "l"(rows), "l"(codewords), "r"(add));
#undef UNICODE_FAST_SUMS
}

#endif

}  // namespace unicode_fast::cuda

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "hopper_loop.cuh"
#endif

namespace unicode_fast::cuda {

// As search_kernel: block (x, y) finds the candidates of tile x of the rows among split y of the codebook. Each of its
// warpgroups keeps the operands of its own rows in shared memory; the stages of the ring are for all.
// Compiled for sm_90a; in the images for other architectures it is empty.
__global__ void __launch_bounds__(HopperShape::kThreads, HopperShape::kBlocks)
    hopper_search_kernel(const SearchArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kRows = HopperShape::kRows;
  extern __shared__ unsigned char unaligned[];
  __shared__ __align__(8) unsigned char barriers[kBarrierBytes];
  unsigned char* const shared = unaligned + (kSwizzleBytes - shared_address(unaligned) % kSwizzleBytes) % kSwizzleBytes;
  unsigned char* const ring = shared + static_cast<size_t>(kRows) * 2 * a.width;
  Candidate* const all_lists = reinterpret_cast<Candidate*>(ring + ring_stages(a.width) * kFullStageBytes);
  const uint32_t full = shared_address(barriers), empty = full + 8 * kMostStages;
  const int first_tile = blockIdx.y * a.splits.per_split;
  const int last_tile = min(first_tile + a.splits.per_split, a.tiles);
  // The same for all threads of a warp, which the compiler must see.
  const int group = __shfl_sync(~0u, threadIdx.x / Warpgroup::kThreads, 0);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kMostStages; ++stage) {
      start_barrier(full + stage * 8, 1);
      start_barrier(empty + stage * 8, kGroups * Warpgroup::kThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    fence_async();
  }
  __syncthreads();

  if (group == kGroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(HopperShape::kFewRegisters));
    if (threadIdx.x == kGroups * Warpgroup::kThreads)
      fetch(a, shared_address(ring), full, empty, first_tile, last_tile);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(HopperShape::kManyRegisters));
    unsigned char* const rows = shared + static_cast<size_t>(group) * kGroupRows * 2 * a.width;
    Candidate* const lists = all_lists + group * kGroupRows * kCandidates;
    float* const factors = reinterpret_cast<float*>(all_lists + kRows * kCandidates) + group * kGroupRows;
    float* const bounds = factors + kRows;
    float* const lowest = bounds + kRows;
    int* const counts = reinterpret_cast<int*>(lowest + kRows);
    const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows + group * kGroupRows;
    if (a.features.number == Number::kFloat32) {
      load_rows<Warpgroup, float>(a, first_row, rows, factors, bounds);
    } else if (a.features.number == Number::kFloat16) {
      load_rows<Warpgroup, __half>(a, first_row, rows, factors, bounds);
    } else {
      load_rows<Warpgroup, __nv_bfloat16>(a, first_row, rows, factors, bounds);
    }
    fence_async();
    wait_for_group(group);

    Minima<Warpgroup> minima;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      minima.lowest[slot] = kNoScore;
      minima.count[slot] = 0;
    }
    score(a, shared_address(rows), ring, full, empty, first_tile, last_tile, factors, bounds, lists, minima);
    const int lane = threadIdx.x % 32;
    if (lane % 4 == 0) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const int row = threadIdx.x % Warpgroup::kThreads / 32 * 16 + slot * 8 + lane / 4;
        lowest[row] = minima.lowest[slot];
        counts[row] = minima.count[slot];
      }
    }
    wait_for_group(group);
    write_records<Warpgroup>(a, first_row, lists, lowest, counts, bounds);
  }
#endif
}

}  // namespace unicode_fast::cuda
