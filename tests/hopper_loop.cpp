// Runs csrc/cuda/hopper_loop.cuh on the host: a thread of the host for each of a block's, barriers and copies of bytes
// in the place of the machine's, and products made as late as their waits allow, of integers, so that they are exact.
// A copy destroys what it will write at once and completes later, in two parts.
//
// Arguments: the width, and how many tiles. Prints how many scores were made and how many of them were wrong.

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "common/hopper_tiles.h"

#define __device__
#define __forceinline__ inline

namespace unicode_fast::cuda {
namespace {

using std::chrono::microseconds;

constexpr int kComputing = kGroups * 128;

struct Index {
  unsigned x;
};
thread_local Index threadIdx;
thread_local std::mt19937 generator;

struct SearchArguments {
  const void* operands;
  int width;
};
struct Warpgroup {
  static constexpr int kThreads = 128, kTilesN = kTileCodewords / 8;
};
template <class>
struct Minima {};
using Sums = float[1][Warpgroup::kTilesN][4];

alignas(kSwizzleBytes) unsigned char shared[kMostSharedBytes];
std::vector<float> norms_of, truth;  // (codewords), (rows, codewords)
int all_codewords;
std::mutex lock;
std::condition_variable changed;
std::vector<std::thread> copies;
long made = 0, wrong = 0;

[[noreturn]] void give_up(const char* reason) {
  std::puts(reason);
  std::fflush(stdout);
  std::_Exit(1);
}

void pause_at_random() {
  if (generator() % 4 == 0) std::this_thread::sleep_for(microseconds(generator() % 30));
}

struct Barrier {
  int arrivals, pending;
  int64_t bytes;
  unsigned phase;

  void settle() {
    if (pending < 0) give_up("too many arrivals");
    if (pending > 0 || bytes != 0) return;
    phase ^= 1;
    pending = arrivals;
    changed.notify_all();
  }
} barriers[2 * kMostStages];

void arrive_expecting(uint32_t barrier, int bytes) {
  pause_at_random();
  const std::lock_guard guard(lock);
  --barriers[barrier / 8].pending;
  barriers[barrier / 8].bytes += bytes;
  barriers[barrier / 8].settle();
}

void arrive(uint32_t barrier) { arrive_expecting(barrier, 0); }

void wait_for(uint32_t barrier, uint32_t parity) {
  pause_at_random();
  std::unique_lock guard(lock);
  const auto over = [&] { return barriers[barrier / 8].phase != parity; };
  if (!changed.wait_for(guard, std::chrono::seconds(30), over)) give_up("nothing moves");
}

void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) give_up("not aligned");
  std::memset(shared + to, 0x55, bytes);
  const int half = bytes / 2, waits = generator() % 300;
  copies.emplace_back([=] {
    for (const int part : {0, 1}) {
      std::this_thread::sleep_for(microseconds(waits));
      const int begin = part * half, size = part == 0 ? half : bytes - half;
      std::memcpy(shared + to + begin, static_cast<const unsigned char*>(from) + begin, size);
      const std::lock_guard guard(lock);
      barriers[barrier / 8].bytes -= size;
      barriers[barrier / 8].settle();
    }
  });
}

// Where some threads wait for each other.
struct Meeting {
  unsigned threads, here = 0, round = 0;

  void meet() {
    std::unique_lock guard(lock);
    const unsigned own = round;
    if (++here == threads) {
      here = 0;
      ++round;
      changed.notify_all();
    }
    changed.wait(guard, [&] { return round != own; });
  }
};
std::vector<Meeting> warps(kComputing / 32, Meeting{32}), groups(kGroups, Meeting{128});

void __syncwarp() { warps[threadIdx.x / 32].meet(); }
uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared);
}
void fence_async() {}
void pin(Sums&) {}

using Product = std::function<void()>;
thread_local std::vector<Product> begun;
thread_local std::deque<std::vector<Product>> waiting;

void begin_products() { groups[threadIdx.x / 128].meet(); }

void end_products() {
  waiting.push_back(begun);
  begun.clear();
}

template <int kLeft>
void wait_for_products() {
  for (; waiting.size() > kLeft; waiting.pop_front()) {
    pause_at_random();
    for (const Product& product : waiting.front()) product();
  }
  __syncwarp();
}

int16_t element(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * 2;
  int16_t value;
  std::memcpy(&value, shared + (address ^ (address >> 7 & 7) << 4), 2);
  return value;
}

// The row and column, among 64 and kTileCodewords, of a thread's sum [n][e].
int row_of(int e) { return threadIdx.x % 128 / 32 * 16 + e / 2 * 8 + threadIdx.x % 32 / 4; }
int column_of(int n, int e) { return n * 8 + threadIdx.x % 4 * 2 + e % 2; }

void multiply(Sums& sums, uint64_t rows, uint64_t codewords, int add) {
  begun.push_back([&sums, rows, codewords, add] {
    for (int n = 0; n < Warpgroup::kTilesN; ++n) {
      for (int e = 0; e < 4; ++e) {
        float sum = add != 0 ? sums[0][n][e] : 0;
        for (int k = 0; k < 16; ++k) sum += element(rows, row_of(e), k) * element(codewords, column_of(n, e), k);
        sums[0][n][e] = sum;
      }
    }
  });
}

template <class>
void keep_candidates(Sums& scores, const float* norms, int first, const float* factors, const float*, Candidate*, int,
                     Minima<Warpgroup>&) {
  pause_at_random();
  const int warp_row = threadIdx.x % 128 / 32 * 16, first_row = static_cast<int>(*factors) - warp_row;
  long errors = 0;
  for (int n = 0; n < Warpgroup::kTilesN; ++n) {
    for (int e = 0; e < 4; ++e) {
      const int codeword = first + column_of(n, e);
      const float expected = truth[static_cast<size_t>(first_row + row_of(e)) * all_codewords + codeword];
      errors += scores[0][n][e] != expected || norms[column_of(n, e)] != norms_of[codeword];
      scores[0][n][e] = NAN;
    }
  }
  const std::lock_guard guard(lock);
  made += 4 * Warpgroup::kTilesN;
  wrong += errors;
}

}  // namespace
}  // namespace unicode_fast::cuda

#include "hopper_loop.cuh"

namespace unicode_fast::cuda {
namespace {

void run(int width, int first_tile, int last_tile) {
  constexpr int kRows = kGroups * kGroupRows;
  std::mt19937 draw(width);
  const auto small_numbers = [&](size_t count) {
    std::vector<int16_t> numbers(count);
    for (int16_t& number : numbers) number = static_cast<int16_t>(draw() % 7) - 3;
    return numbers;
  };
  all_codewords = last_tile * kTileCodewords;
  const auto codewords = small_numbers(static_cast<size_t>(all_codewords) * width), rows = small_numbers(kRows * width);
  struct alignas(16) Bytes {
    unsigned char of[16];
  };
  std::vector<Bytes> memory(last_tile * tile_bytes(width) / 16);
  unsigned char* const tiles = memory[0].of;
  for (int j = 0; j < all_codewords; ++j) {
    for (int d = 0; d < width; ++d)
      std::memcpy(tiles + operand_place(j, d, width), &codewords[static_cast<size_t>(j) * width + d], 2);
    norms_of.push_back(draw() % 1000);
    std::memcpy(tiles + norm_place(j, width), &norms_of.back(), 4);
  }
  const int group_bytes = kGroupRows * 2 * width;
  float factors[kRows];
  for (int i = 0; i < kRows; ++i) {
    factors[i] = i;
    unsigned char* const group = shared + i / kGroupRows * group_bytes;
    for (int piece = 0; piece < width / 8; ++piece)
      std::memcpy(group + block_offset(i % kGroupRows, piece, kGroupRows), &rows[i * width + piece * 8], 16);
    for (int j = 0; j < all_codewords; ++j) {
      float sum = 0;
      for (int d = 0; d < width; ++d) sum += rows[i * width + d] * codewords[static_cast<size_t>(j) * width + d];
      truth.push_back(sum);
    }
  }
  const uint32_t full = 0, empty = 8 * kMostStages;
  for (int stage = 0; stage < kMostStages; ++stage) {
    barriers[stage] = {1, 1, 0, 0};
    barriers[kMostStages + stage] = {kComputing / 32, kComputing / 32, 0, 0};
  }
  const SearchArguments arguments{tiles, width};
  unsigned char* const ring = shared + kGroups * group_bytes;
  std::vector<std::thread> threads;
  for (unsigned number = 0; number <= kComputing; ++number) {
    threads.emplace_back([&, number] {
      threadIdx.x = number;
      generator.seed(number);
      if (number == kComputing) return fetch(arguments, shared_address(ring), full, empty, first_tile, last_tile);
      const int group = number / 128;
      Minima<Warpgroup> minima;
      score(arguments, group * group_bytes, ring, full, empty, first_tile, last_tile, factors + group * kGroupRows,
            nullptr, nullptr, minima);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::thread& copy : copies) copy.join();
  std::printf("%ld %ld\n", made, wrong);
}

}  // namespace
}  // namespace unicode_fast::cuda

int main(int, char** arguments) { unicode_fast::cuda::run(std::atoi(arguments[1]), 1, 1 + std::atoi(arguments[2])); }
