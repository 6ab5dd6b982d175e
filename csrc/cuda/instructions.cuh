// Instructions without a name in CUDA C++, each in a function of one line of assembly.
//
// tests/cuda_on_host compiles the kernels with a C++ compiler; it has a twin of every function here.
#pragma once

#include <cstdint>

#ifdef UNICODE_FAST_ON_HOST
#include "instructions_on_host.h"
#else

namespace unicode_fast::cuda {

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same number, unknown to the compiler. So it computes what depends on it here, and keeps none of it from before.
__device__ __forceinline__ int fresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
__device__ __forceinline__ const T* fresh(const T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// gridDim.x and blockIdx.y * gridDim.x + blockIdx.x, read again, which saves registers meanwhile.
__device__ __forceinline__ int fresh_grid() {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}

__device__ __forceinline__ int fresh_block() {
  int x, y;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y * fresh_grid() + x;
}

// Begins to copy 16 bytes to shared memory, past the first cache; both addresses are multiples of 16.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
}

// Makes a group of the copies that this thread began since the last group.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until no more than the kLeft last groups of this thread's copies are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 x 8 halves for a warp: threads 8 i to 8 i + 7 address the rows of matrix i, 16 bytes each.
__device__ __forceinline__ void load_matrices(uint32_t (&part)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
}

// sums (16 x 8) += rows (16 x 16) times codewords (8 x 16) transposed, by a warp.
__device__ __forceinline__ void multiply(float (&sums)[4], const uint32_t (&rows)[4], uint32_t low, uint32_t high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "r"(low), "r"(high));
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A barrier of 8 bytes of shared memory whose phase ends with so many arrivals and with the bytes they expect.
__device__ __forceinline__ void start_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Arrives at the barrier's present phase.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives; the phase then also waits for so many bytes of the copy engine.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the barrier's phase of this parity; phase 1 of a new barrier counts as over.
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

// Starts a copy to shared memory by the copy engine, which signals the barrier; addresses and size are multiples of 16.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// Asks for bytes of global memory in the second cache; address and size are multiples of 16.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;\n" ::"l"(from), "r"(bytes) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before those of matrix units and the copy engine.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// The same for global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;\n" ::: "memory"); }

// Waits for the other threads of this warpgroup; barrier 0 is that of __syncthreads.
__device__ __forceinline__ void wait_for_group(int group) {
  asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory");
}

// Must precede the first of a group of products; ordinary instructions may have written their sums.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

// Makes a group of the products since begin_products.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Waits until no more than the kLeft last groups of products are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving accesses to the sums across; the matrix units change them without its notice.
template <int kTiles>
__device__ __forceinline__ void pin(float (&sums)[1][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[0][n][e])::"memory");
  }
}

// sums (64 x 256) = [sums +] rows (64 x 16) times codewords (256 x 16) transposed, by a warpgroup. Warp w holds rows
// 16 w to 16 w + 15, of each 8 columns what the product of a warp above would give it.
__device__ __forceinline__ void multiply(float (&sums)[1][32][4], uint64_t rows, uint64_t codewords, int add) {
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

// All warps of a warpgroup release registers, or wait for registers that others release, until each thread has so many.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

#endif

}  // namespace unicode_fast::cuda

#endif
