// The functions of csrc/cuda/instructions.cuh on the host. tests/cuda_on_host/emulator.cpp delays asynchronous work as
// a GPU may do, and checks the order of accesses.
#pragma once

#include <cstdint>

#include "device_on_host.h"

namespace on_host {

uint32_t shared_address(const void* pointer);
void copy_16_bytes(uint32_t to, const void* from, const Site& site);
void end_copies();
void wait_for_copies(int left);
void load_matrices(uint32_t* part, uint32_t address, const Site& site);
void multiply(float* sums, const uint32_t* rows, uint32_t low, uint32_t high, const Site& site);
void start_barrier(uint32_t barrier, int arrivals);
void arrive(uint32_t barrier, int bytes, const Site& site);
void wait_for(uint32_t barrier, uint32_t parity, const Site& site);
void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, const Site& site);
void prefetch_bulk(const void* from, int bytes, const Site& site);
void fence_async(bool global);
void begin_products(const Site& site);
void multiply_later(float (*sums)[4], uint64_t rows, uint64_t codewords, bool add, const Site& site);
void end_products(const Site& site);
void wait_for_products(int left, const Site& site);

}  // namespace on_host

namespace unicode_fast::cuda {

using on_host::Site;

inline uint32_t shared_address(const void* pointer) { return on_host::shared_address(pointer); }
inline int fresh(int value) { return value; }
template <class T>
const T* fresh(const T* pointer) {
  return pointer;
}
inline int fresh_grid() { return static_cast<int>(gridDim.x); }
inline int fresh_block() { return static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x); }
// As on the GPU, a signaling NaN counts as missing too.
inline float fminf(float a, float b) { return a < b || b != b ? a : b; }
inline void copy_16_bytes(uint32_t to, const void* from, Site site = Site::current()) {
  on_host::copy_16_bytes(to, from, site);
}
inline void end_copies() { on_host::end_copies(); }
template <int kLeft>
void wait_for_copies() {
  on_host::wait_for_copies(kLeft);
}
inline void load_matrices(uint32_t (&part)[4], uint32_t address, Site site = Site::current()) {
  on_host::load_matrices(part, address, site);
}
inline void multiply(float (&sums)[4], const uint32_t (&rows)[4], uint32_t low, uint32_t high,
                     Site site = Site::current()) {
  on_host::multiply(sums, rows, low, high, site);
}
inline void start_barrier(uint32_t barrier, int arrivals) { on_host::start_barrier(barrier, arrivals); }
inline void arrive(uint32_t barrier, Site site = Site::current()) { on_host::arrive(barrier, 0, site); }
inline void arrive_expecting(uint32_t barrier, int bytes, Site site = Site::current()) {
  on_host::arrive(barrier, bytes, site);
}
inline void wait_for(uint32_t barrier, uint32_t parity, Site site = Site::current()) {
  on_host::wait_for(barrier, parity, site);
}
inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, Site site = Site::current()) {
  on_host::copy_bulk(to, from, bytes, barrier, site);
}
inline void prefetch_bulk(const void* from, int bytes, Site site = Site::current()) {
  on_host::prefetch_bulk(from, bytes, site);
}
inline void fence_async() { on_host::fence_async(false); }
inline void fence_async_global() { on_host::fence_async(true); }
inline void wait_for_group(int group, Site site = Site::current()) { on_host::barrier(group + 1, 128, site); }
inline void begin_products(Site site = Site::current()) { on_host::begin_products(site); }
inline void end_products(Site site = Site::current()) { on_host::end_products(site); }
template <int kLeft>
void wait_for_products(Site site = Site::current()) {
  on_host::wait_for_products(kLeft, site);
}
template <int kTiles>
void pin(float (&)[1][kTiles][4]) {}
inline void multiply(float (&sums)[1][32][4], uint64_t rows, uint64_t codewords, int add, Site site = Site::current()) {
  on_host::multiply_later(sums[0], rows, codewords, add != 0, site);
}
template <int kRegisters>
void give_registers(Site site = Site::current()) {
  on_host::collective(on_host::kAllLanes, site, nullptr, [](const on_host::Lanes&) {});
}
template <int kRegisters>
void take_registers(Site site = Site::current()) {
  on_host::collective(on_host::kAllLanes, site, nullptr, [](const on_host::Lanes&) {});
}

}  // namespace unicode_fast::cuda
