// Runs CUDA kernels on the CPU, one block at a time, each CUDA thread a fiber, and stops at the first error.
//
// Threads and blocks run in a random order, and some warps are held back for long. Asynchronous copies and matrix
// products finish late; until then their targets hold poison, numbers that are never right.
//
// The hooks of -fsanitize=thread,alignment receive every ordinary access. Each is checked for bounds, alignment, races,
// and reads of shared memory before a write. Vector clocks detect races: barriers, __syncwarp and mbarriers order
// accesses. Shuffles and votes do not, nor does the actual order of threads.
//
// An error ends the kernel, and cudaGetLastError returns it after the launch.
//
// UNICODE_FAST_HOST_SEED is the seed of the order. UNICODE_FAST_HOST_MULTIPROCESSORS (132) and
// UNICODE_FAST_HOST_CAPABILITY (90) set the GPU that the kernels find. With UNICODE_FAST_HOST_LAUNCHES=1 each launch
// and fill is a line "launch NAME" on the standard error.

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "arrivals_on_host.h"
#include "instructions_on_host.h"
#include "launch_on_host.h"

namespace on_host {

Indices indices;

namespace {

constexpr int kMostThreads = 1024, kMostWarps = kMostThreads / 32, kBarriers = 16, kTiles = 32;
constexpr size_t kStackBytes = 256 << 10, kMainStackBytes = 8 << 20, kArenaBytes = 512 << 10;
// Shared memory lies in the arena: dynamic memory near its start, in reach of the descriptor of an operand.
constexpr uint32_t kDynamic = 1024, kStatics = 256 << 10, kGap = 128;
constexpr int kPoison = 0xff, kCopyPoison = 0x5a, kBulkPoison = 0x55;

enum class State : uint8_t { kReady, kCollective, kBarrier, kPhase, kDone };

struct Copy {
  uint32_t to;
  const void* from;
};

struct Fiber {
  jmp_buf place;
  ucontext_t context;
  bool started;
  State state;
  Site site;                 // where it waits
  uint32_t barrier, parity;  // the phase of an mbarrier that it waits for
  std::vector<Copy> begun;   // since end_copies
  std::deque<std::vector<Copy>> copies;
};

struct Product {
  uint64_t rows, codewords;
  bool add;
};

struct Warp {
  unsigned ready, arrived;
  Lanes lanes;
  // Products of the warp's rows. While some are under way the lanes' sums hold poison, and `kept` their real values.
  bool may_multiply;
  std::vector<Product> begun;
  std::deque<std::vector<Product>> products;
  float (*sums[32])[4];
  float kept[32][kTiles][4];
};

// An mbarrier. `gathered` and `over` are the joined clocks of its arrivals, in this phase and in the last one.
struct Phases {
  int arrivals, pending;
  int64_t bytes;
  unsigned phase;
  std::vector<uint32_t> gathered, over;
};

struct BulkCopy {
  uint32_t to;
  const void* from;
  int bytes;
  uint32_t barrier;
  int thread;
  uint32_t clock;
};

// An access: the block and the thread that made it, and when, by that thread's clock.
enum class Way : uint8_t { kOrdinary, kAtomic, kEngine, kInFlight };
struct Access {
  uint32_t block = 0, clock = 0;
  uint16_t thread = 0;
  Way way = Way::kOrdinary;
};

// The last accesses to two bytes, or to one where single bytes are read and written.
struct Cell {
  Access write, read, other_read;
};
constexpr size_t kPageBytes = 4096, kMostPages = 4000;

Fiber fibers[kMostThreads];
Warp warps[kMostWarps];
std::vector<int> meetings[kBarriers];
unsigned char* stacks;
jmp_buf main_place;
bool running = false, busy = false;
const char* main_stack;
int current, threads, live;
unsigned ready_warps;
const std::function<void()>* body;
std::string kernel_name, failure;
bool failed = false;
std::mt19937_64 generator;
unsigned order[kMostWarps];
bool by_order;

alignas(1024) unsigned char arena[kArenaBytes];
bool there[kArenaBytes];  // bytes that belong to the block
struct Array {
  const void* owner;
  uint32_t place;
};
std::vector<Array> statics;
uint32_t next_static;
size_t static_bytes, dynamic_bytes;

std::map<uint32_t, Phases> phases;
std::vector<BulkCopy> bulk_copies;
std::unordered_map<const void*, int> shared_limits;
std::map<uintptr_t, size_t> allocations;

// Times are by the clock of thread u. clocks[t][u]: accesses of u until then are ordered before the next of thread t.
// full[u]: the same for all threads, by the last barrier of the block. fenced[0][u]: the same for the copy engine and
// the matrix units, by the last fence of u for shared memory; fenced[1][u]: by that for global memory.
std::vector<uint32_t> clocks;
uint32_t full[kMostThreads], fenced[2][kMostThreads];
uint32_t block_number = 0, first_of_launch = 0;

// By block of the launch and thread: the clock until which accesses are ordered before those of whoever sees the count
// at an address. What threads of the running block have seen, and when.
using Until = std::shared_ptr<const std::vector<uint32_t>>;
struct Seen {
  Until until;
  int by;
  uint32_t clock;
};
std::unordered_map<const int*, std::map<uint32_t, Until>> counted;
std::map<uint32_t, std::vector<Seen>> seen;
using Pages = std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>>;
Pages pages, byte_pages;
std::unique_ptr<Cell[]> arena_cells, arena_byte_cells;

// While such an object exists, the hooks ignore accesses, because these are the emulator's own. The linker may have
// taken functions of the standard library from an object with hooks.
struct Busy {
  Busy() { busy = true; }
  ~Busy() { busy = false; }
};

// A positive number of the environment.
int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == 0) return otherwise;
  const int number = std::atoi(value);
  if (number > 0) return number;
  std::fprintf(stderr, "%s must be a positive number, got %s\n", name, value);
  std::exit(64);
}

uint32_t* clock_of(int thread) { return &clocks[static_cast<size_t>(thread) * threads]; }
uint32_t& own_clock(int thread) { return clock_of(thread)[thread]; }

// Errors.

std::string text(const Site& site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(name == nullptr ? site.file_name() : name + 1) + ":" + std::to_string(site.line());
}

// The place in the sources of an address of code, by addr2line.
std::string text(const void* code) {
  Dl_info info;
  if (dladdr(code, &info) == 0 || info.dli_fname == nullptr) return "?";
  const size_t offset = static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  char command[600], line[256] = "?";
  std::snprintf(command, sizeof command, "addr2line -s -e '%s' 0x%zx 2> /dev/null", info.dli_fname, offset);
  if (FILE* const pipe = popen(command, "r")) {
    if (std::fgets(line, sizeof line, pipe) == nullptr) std::strcpy(line, "?");
    pclose(pipe);
  }
  return std::string(line, std::strcspn(line, "\n"));
}

[[noreturn]] void stop(const std::string& reason, const std::string& where) {
  failure = kernel_name + ", " + where + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
            "), thread " + std::to_string(current) + ": " + reason;
  failed = true;
  _longjmp(main_place, 1);
}

// Fibers.

void make_ready(int thread) {
  fibers[thread].state = State::kReady;
  warps[thread / 32].ready |= 1u << thread % 32;
  ready_warps |= 1u << thread / 32;
}

int any_bit(unsigned bits) {
  const unsigned turn = generator() % 32, turned = bits >> turn | (turn == 0 ? 0 : bits << (32 - turn));
  return (__builtin_ctz(turned) + turn) % 32;
}

[[noreturn]] void stop_at_deadlock() {
  const char* const names[] = {"", "at a call of its whole warp", "at a barrier", "at an mbarrier"};
  std::map<std::pair<int, std::string>, int> numbers;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i].state == State::kDone) continue;
    current = i;
    ++numbers[{static_cast<int>(fibers[i].state), text(fibers[i].site)}];
  }
  std::string reason = "deadlock, nothing moves:";
  for (const auto& [at, number] : numbers)
    reason += " " + std::to_string(number) + " threads " + names[at.first] + " (" + at.second + ")";
  stop(reason, text(fibers[current].site));
}

void finish_bulk_copy(size_t number);

// The thread to run next: mostly one of the foremost ready warp, in an order that changes now and then.
int choose() {
  while (ready_warps == 0) {
    if (bulk_copies.empty()) stop_at_deadlock();
    finish_bulk_copy(generator() % bulk_copies.size());
  }
  if (!bulk_copies.empty() && generator() % 16 == 0) finish_bulk_copy(generator() % bulk_copies.size());
  if (generator() % 1024 == 0) {
    by_order = generator() % 4 != 0;
    std::shuffle(order, order + kMostWarps, generator);
  }
  int warp = any_bit(ready_warps);
  for (int i = 0; by_order && i < kMostWarps; ++i) {
    if (ready_warps >> order[i] & 1) {
      warp = order[i];
      break;
    }
  }
  return warp * 32 + any_bit(warps[warp].ready);
}

[[noreturn]] __attribute__((noinline)) void go_to(int thread) {
  Warp& warp = warps[thread / 32];
  warp.ready &= ~(1u << thread % 32);
  if (warp.ready == 0) ready_warps &= ~(1u << thread / 32);
  current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (fibers[thread].started) _longjmp(fibers[thread].place, 1);
  fibers[thread].started = true;
  setcontext(&fibers[thread].context);
  std::abort();
}

__attribute__((noinline)) void wait_as(State state, const Site& site) {
  fibers[current].state = state;
  fibers[current].site = site;
  if (_setjmp(fibers[current].place) == 0) go_to(choose());
}

// Orders the past accesses of all members before their next accesses.
void join(const std::vector<int>& members) {
  static std::vector<uint32_t> joined;
  joined.assign(threads, 0);
  for (const int member : members)
    for (int u = 0; u < threads; ++u) joined[u] = std::max(joined[u], clock_of(member)[u]);
  for (const int member : members) {
    std::copy(joined.begin(), joined.end(), clock_of(member));
    ++own_clock(member);
  }
}

// Ends the wait at a barrier; the thread that runs is not ready but running.
void release(int number) {
  if (number == 0) {
    for (int i = 0; i < threads; ++i) full[i] = own_clock(i)++;
  } else {
    join(meetings[number]);
  }
  for (const int member : meetings[number])
    if (member != current) make_ready(member);
  meetings[number].clear();
}

void end_thread() {
  Fiber& fiber = fibers[current];
  fiber.state = State::kDone;
  --live;
  if (!fiber.begun.empty() || std::any_of(fiber.copies.begin(), fiber.copies.end(), [](auto& g) { return !g.empty(); }))
    stop("a thread ends before its copies", "end of the kernel");
  if (!warps[current / 32].begun.empty() || !warps[current / 32].products.empty())
    stop("a thread ends before its products", "end of the kernel");
  if (!meetings[0].empty() && static_cast<int>(meetings[0].size()) >= live) release(0);
}

void fiber_main() {
  for (;;) {
    busy = false;
    (*body)();
    busy = true;
    end_thread();
    if (_setjmp(fibers[current].place) == 0) {
      if (live == 0) _longjmp(main_place, 2);
      go_to(choose());
    }
  }
}

void make_fibers() {
  if (stacks == nullptr) {
    void* const memory = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<unsigned char*>(memory);
    generator.seed(setting("UNICODE_FAST_HOST_SEED", 1));
    for (int i = 0; i < kMostWarps; ++i) order[i] = i;
    arena_cells = std::make_unique<Cell[]>(kArenaBytes / 2);
    arena_byte_cells = std::make_unique<Cell[]>(kArenaBytes);
  }
  for (int i = 0; i < kMostThreads; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks + i * kStackBytes;
    fibers[i].context.uc_stack.ss_size = kStackBytes;
    fibers[i].context.uc_link = nullptr;
    makecontext(&fibers[i].context, fiber_main, 0);
    fibers[i].started = false;
  }
}

// 1 where the block was stopped, 2 where it ended.
__attribute__((noinline)) int run_threads() {
  const int result = _setjmp(main_place);
  if (result == 0) {
    running = true;
    go_to(choose());
  }
  running = false;
  return result;
}

void prepare_block(size_t shared_bytes) {
  ++block_number;
  seen.clear();
  std::memset(arena, kPoison, sizeof arena);
  std::memset(there, 0, sizeof there);
  statics.clear();
  next_static = kStatics;
  static_bytes = 0;
  dynamic_bytes = shared_bytes;
  phases.clear();
  bulk_copies.clear();
  for (auto& meeting : meetings) meeting.clear();
  clocks.assign(static_cast<size_t>(threads) * threads, 0);
  live = threads;
  ready_warps = 0;
  for (int i = 0; i < threads; ++i) {
    full[i] = fenced[0][i] = fenced[1][i] = 0;
    own_clock(i) = 1;
    fibers[i].begun.clear();
    fibers[i].copies.clear();
    make_ready(i);
  }
  for (int i = 0; i < threads / 32; ++i) {
    warps[i].arrived = 0;
    warps[i].may_multiply = false;
    warps[i].begun.clear();
    warps[i].products.clear();
  }
}

// Accesses.

// The page of the last access.
const Pages* last;
uintptr_t last_page;
Cell* last_cells = nullptr;

Cell* cells_at(Pages& all, uintptr_t address, size_t unit) {
  const uintptr_t page = address / kPageBytes;
  if (last != &all || last_page != page || last_cells == nullptr) {
    std::unique_ptr<Cell[]>& cells = all[page];
    if (cells == nullptr) cells = std::make_unique<Cell[]>(kPageBytes / unit);
    last = &all;
    last_page = page;
    last_cells = cells.get();
  }
  return last_cells + address % kPageBytes / unit;
}

bool ordered_within(int before, uint32_t clock, int thread) {
  return before == thread || full[before] >= clock || clock_of(thread)[before] >= clock;
}

bool ordered(const Access& before, int thread, bool shared) {
  // Each block has shared memory of its own.
  if (before.block < (shared ? block_number : first_of_launch)) return true;
  if (before.way == Way::kInFlight) return false;
  if (before.block == block_number) return ordered_within(before.thread, before.clock, thread);
  const auto of_block = seen.find(before.block);
  return of_block != seen.end() && std::any_of(of_block->second.begin(), of_block->second.end(), [&](const Seen& by) {
           return before.clock <= (*by.until)[before.thread] && ordered_within(by.by, by.clock, thread);
         });
}

// Whether this ordinary access is ordered before the accesses of an engine.
bool passed_on(const Access& before, bool shared) {
  return before.block != block_number || before.way == Way::kEngine ||
         before.clock <= fenced[shared ? 0 : 1][before.thread];
}

std::string who(const Access& before) {
  if (before.way == Way::kInFlight)
    return "a copy that may be under way, begun by thread " + std::to_string(before.thread);
  if (before.block != block_number) return "another block of this launch";
  return "thread " + std::to_string(before.thread);
}

enum class Kind { kRead, kWrite };

template <class Where>
void check(int thread, const void* pointer, size_t bytes, Kind kind, Way way, const Where& where) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const size_t place = address - reinterpret_cast<uintptr_t>(arena), unit = bytes == 1 ? 1 : 2;
  const bool shared = place < kArenaBytes;
  if (shared) {
    for (size_t i = 0; i < bytes; ++i)
      if (place + i >= kArenaBytes || !there[place + i])
        stop("an access beyond the block's shared memory", text(where));
  } else if (!allocations.empty()) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin() || (--after)->first + after->second < address + bytes)
      stop("an access beyond what was allocated", text(where));
  }
  for (size_t i = 0; i < bytes; i += unit) {
    Cell& cell = shared ? (unit == 1 ? arena_byte_cells[place + i] : arena_cells[(place + i) / 2])
                        : *cells_at(unit == 1 ? byte_pages : pages, address + i, unit);
    const Access now{block_number, own_clock(thread), static_cast<uint16_t>(thread), way};
    const bool engine = way == Way::kEngine;
    if (kind == Kind::kRead) {
      if (shared && cell.write.block != block_number) stop("a read of shared memory that nobody wrote", text(where));
      if (!ordered(cell.write, thread, shared)) stop("a race: reads what " + who(cell.write) + " writes", text(where));
      if (engine && !passed_on(cell.write, shared))
        stop("an engine reads what needs fence_async after it was written", text(where));
      if (ordered(cell.read, thread, shared)) {
        cell.read = now;
      } else if (generator() % 2 == 0 || ordered(cell.other_read, thread, shared)) {
        cell.other_read = now;
      }
    } else {
      for (const Access* before : {&cell.write, &cell.read, &cell.other_read}) {
        const bool both_atomic = way == Way::kAtomic && before->way == Way::kAtomic;
        if (!both_atomic && !ordered(*before, thread, shared))
          stop("a race: writes what " + who(*before) + (before == &cell.write ? " writes" : " reads"), text(where));
        if (engine && !passed_on(*before, shared))
          stop("an engine writes over what needs fence_async after it was used", text(where));
      }
      cell = Cell{now, {}, {}};
    }
  }
}

// The check of the hooks. Accesses to the stack of a fiber are its own; the launcher's stack holds arguments.
void hook(void* pointer, size_t bytes, Kind kind, bool aligned, const void* code) {
  if (!running || busy) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(stacks) < kStackBytes * kMostThreads) return;
  if (address - reinterpret_cast<uintptr_t>(main_stack) < kMainStackBytes) return;
  if (address - reinterpret_cast<uintptr_t>(&indices) < sizeof indices) return;
  const Busy own;
  if (aligned && address % bytes != 0) stop("a misaligned access", text(code));
  check(current, pointer, bytes, kind, Way::kOrdinary, code);
}

void* at(uint32_t address) { return arena + std::min<size_t>(address, kArenaBytes); }

// Marks the memory that a copy writes or has written.
void land(uint32_t to, size_t bytes, int thread, uint32_t clock, Way way) {
  for (size_t i = 0; i < bytes; i += 2)
    arena_cells[(to + i) / 2].write = {block_number, clock, static_cast<uint16_t>(thread), way};
}

void settle(Phases& barrier, uint32_t address) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  barrier.over = barrier.gathered;
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state == State::kPhase && fibers[i].barrier == address && barrier.phase != fibers[i].parity)
      make_ready(i);
}

void finish_bulk_copy(size_t number) {
  const BulkCopy copy = bulk_copies[number];
  bulk_copies.erase(bulk_copies.begin() + static_cast<long>(number));
  std::memcpy(at(copy.to), copy.from, copy.bytes);
  land(copy.to, copy.bytes, copy.thread, copy.clock, Way::kEngine);
  Phases& barrier = phases.at(copy.barrier);
  barrier.gathered[copy.thread] = std::max(barrier.gathered[copy.thread], copy.clock);
  barrier.bytes -= copy.bytes;
  if (barrier.bytes < 0) stop("an mbarrier gets more bytes than it expects", "the copy engine");
  settle(barrier, copy.barrier);
}

Phases& barrier_at(uint32_t address, const Site& site) {
  const auto found = phases.find(address);
  if (found == phases.end()) stop("no mbarrier was started there", text(site));
  check(current, at(address), 8, Kind::kRead, Way::kOrdinary, site);
  return found->second;
}

// Matrix products.

float value_of(const void* half) {
  __half value;
  std::memcpy(&value, half, 2);
  return __half2float(value);
}

// Truncated, as the matrix units may do, not rounded.
float cut(double sum) {
  const float rounded = static_cast<float>(sum);
  if (!(std::fabs(rounded) <= 3e38f) || std::fabs(static_cast<double>(rounded)) <= std::fabs(sum)) return rounded;
  uint32_t bits;
  std::memcpy(&bits, &rounded, 4);
  --bits;
  float smaller;
  std::memcpy(&smaller, &bits, 4);
  return smaller;
}

// The address of 8 of the 16 dimensions of a row of an operand in 128-byte swizzle.
uint32_t operand_at(uint64_t descriptor, int row, int half) {
  if (descriptor >> 62 != 1) stop("an operand without the 128-byte swizzle", "a product");
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + row / 8 * stride + row % 8 * 128 + half * 16;
  return address ^ (address >> 7 & 7) << 4;
}

void load_operand(int thread, uint64_t descriptor, int first, int rows, float (*values)[16], const Site& site) {
  for (int row = 0; row < rows; ++row) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = operand_at(descriptor, first + row, half);
      check(thread, at(address), 16, Kind::kRead, Way::kEngine, site);
      for (int d = 0; d < 8; ++d) values[row][half * 8 + d] = value_of(arena + address + d * 2);
    }
  }
}

void finish_product(int number, const Product& product, const Site& site) {
  static float rows[16][16], codewords[256][16], turned[16][256];
  Warp& warp = warps[number];
  load_operand(number * 32, product.rows, number % 4 * 16, 16, rows, site);
  load_operand(number * 32, product.codewords, 0, 256, codewords, site);
  for (int d = 0; d < 16; ++d)
    for (int j = 0; j < 256; ++j) turned[d][j] = codewords[j][d];
  for (int i = 0; i < 16; ++i) {
    double sums[256];
    for (int j = 0; j < 256; ++j)
      sums[j] = product.add ? warp.kept[i % 8 * 4 + j % 8 / 2][j / 8][i / 8 * 2 + j % 2] : 0.0;
    for (int d = 0; d < 16; ++d) {
      const double factor = rows[i][d];
      for (int j = 0; j < 256; ++j) sums[j] += factor * turned[d][j];
    }
    for (int j = 0; j < 256; ++j) warp.kept[i % 8 * 4 + j % 8 / 2][j / 8][i / 8 * 2 + j % 2] = cut(sums[j]);
  }
}

void finish_products(int number, size_t left, const Site& site) {
  Warp& warp = warps[number];
  if (warp.products.size() <= left) return;
  for (; warp.products.size() > left; warp.products.pop_front())
    for (const Product& product : warp.products.front()) finish_product(number, product, site);
  if (!warp.products.empty()) return;
  for (int lane = 0; lane < 32; ++lane) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(warp.sums[lane]);
    if (std::any_of(bytes, bytes + sizeof warp.kept[lane], [](unsigned char byte) { return byte != kPoison; }))
      stop("sums were written while products were under way", text(site));
    std::memcpy(warp.sums[lane], warp.kept[lane], sizeof warp.kept[lane]);
  }
}

}  // namespace

// What device_on_host.h, instructions_on_host.h and launch_on_host.h declare.

int lane() { return current % 32; }

void collective(unsigned mask, const Site& site, const void* brought, void (*finish)(const Lanes&)) {
  const Busy own_accesses;
  Warp& warp = warps[current / 32];
  fibers[current].site = site;
  if (mask != kAllLanes) stop("a call that names not all lanes of its warp", text(site));
  if (warp.arrived != 0) {
    const Site& other = fibers[current / 32 * 32 + __builtin_ctz(warp.arrived)].site;
    if (other.line() != site.line() || other.column() != site.column() ||
        std::strcmp(other.file_name(), site.file_name()) != 0)
      stop("lanes of a warp at different calls: here and " + text(other), text(site));
  }
  warp.lanes.of[lane()] = brought;
  warp.arrived |= 1u << lane();
  if (warp.arrived != kAllLanes) return wait_as(State::kCollective, site);
  warp.arrived = 0;
  finish(warp.lanes);
  for (int i = current / 32 * 32; i < current / 32 * 32 + 32; ++i)
    if (i != current) make_ready(i);
}

void sync_warp(unsigned mask, const Site& site) {
  const Busy own_accesses;
  collective(mask, site, nullptr, [](const Lanes&) {
    static std::vector<int> members(32);
    for (int i = 0; i < 32; ++i) members[i] = current / 32 * 32 + i;
    join(members);
  });
}

void barrier(int number, int wanted, const Site& site) {
  const Busy own_accesses;
  std::vector<int>& members = meetings[number];
  if (!members.empty()) {
    const Site& other = fibers[members[0]].site;
    if (other.line() != site.line() || std::strcmp(other.file_name(), site.file_name()) != 0)
      stop("threads at different barriers: here and " + text(other), text(site));
  }
  members.push_back(current);
  if (static_cast<int>(members.size()) < (wanted == 0 ? live : wanted)) return wait_as(State::kBarrier, site);
  release(number);
}

uint32_t shared_address(const void* pointer) {
  const Busy own_accesses;
  const size_t place = static_cast<const unsigned char*>(pointer) - arena;
  if (place >= kArenaBytes) stop("the address of shared memory is asked for other memory", "shared_address");
  return static_cast<uint32_t>(place);
}

void* static_shared(const void* owner, size_t bytes, size_t alignment) {
  const Busy own_accesses;
  for (const Array& array : statics)
    if (array.owner == owner) return arena + array.place;
  next_static = static_cast<uint32_t>((next_static + alignment - 1) / alignment * alignment);
  if (next_static + bytes + kGap > kArenaBytes) stop("too much shared memory", "an array");
  statics.push_back({owner, next_static});
  std::fill_n(there + next_static, bytes, true);
  next_static += static_cast<uint32_t>(bytes) + kGap;
  static_bytes += bytes;
  return arena + statics.back().place;
}

unsigned char* dynamic_shared(size_t alignment) {
  const Busy own_accesses;
  // Aligned to this and to no more.
  const size_t place = kDynamic + alignment;
  std::fill_n(there + place, dynamic_bytes, true);
  return arena + place;
}

void copy_16_bytes(uint32_t to, const void* from, const Site& site) {
  const Busy own_accesses;
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) stop("a misaligned copy", text(site));
  check(current, at(to), 16, Kind::kWrite, Way::kOrdinary, site);
  check(current, from, 16, Kind::kRead, Way::kOrdinary, site);
  land(to, 16, current, 0, Way::kInFlight);
  std::memset(at(to), kCopyPoison, 16);
  fibers[current].begun.push_back({to, from});
}

void end_copies() {
  const Busy own_accesses;
  fibers[current].copies.push_back(std::move(fibers[current].begun));
  fibers[current].begun.clear();
}

void wait_for_copies(int left) {
  const Busy own_accesses;
  auto& groups = fibers[current].copies;
  for (; static_cast<int>(groups.size()) > left; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(at(copy.to), copy.from, 16);
      land(copy.to, 16, current, own_clock(current), Way::kOrdinary);
    }
  }
}

struct Loading {
  uint32_t address, *part;
  const Site* site;
};

void load_matrices(uint32_t* part, uint32_t address, const Site& site) {
  const Busy own_accesses;
  if (address % 16 != 0) stop("a misaligned ldmatrix", text(site));
  const Loading own{address, part, &site};
  collective(kAllLanes, site, &own, [](const Lanes& lanes) {
    const int first = current / 32 * 32;
    for (int i = 0; i < 4; ++i) {
      for (int lane = 0; lane < 32; ++lane) {
        const auto* to = static_cast<const Loading*>(lanes.of[lane]);
        const uint32_t from = static_cast<const Loading*>(lanes.of[i * 8 + lane / 4])->address + lane % 4 * 4;
        check(first + lane, at(from), 4, Kind::kRead, Way::kOrdinary, *to->site);
        std::memcpy(&to->part[i], arena + from, 4);
      }
    }
  });
}

struct Operands {
  float* sums;
  const uint32_t* rows;
  uint32_t columns[2];
};

void multiply(float* sums, const uint32_t* rows, uint32_t low, uint32_t high, const Site& site) {
  const Busy own_accesses;
  const Operands own{sums, rows, {low, high}};
  // PTX ISA, mma.m16n8k16 with halves, element i. A: the row is lane / 4, plus 8 for i = 2, 3, 6, 7; the column is
  // lane % 4 * 2 + i % 2, plus 8 for i >= 4. B: the row is lane % 4 * 2 + i % 2, plus 8 for i >= 2; the column is
  // lane / 4. C: the row is lane / 4, plus 8 for i >= 2; the column is lane % 4 * 2 + i % 2.
  collective(kAllLanes, site, &own, [](const Lanes& lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<const Operands*>(lanes.of[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i)
        a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] =
            value_of(reinterpret_cast<const unsigned char*>(&own->rows[i / 2]) + i % 2 * 2);
      for (int i = 0; i < 4; ++i)
        b[pair + i % 2 + i / 2 * 8][group] =
            value_of(reinterpret_cast<const unsigned char*>(&own->columns[i / 2]) + i % 2 * 2);
    }
    double c[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = static_cast<const Operands*>(lanes.of[lane])->sums[i];
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column)
          c[row][column] += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<const Operands*>(lanes.of[lane])->sums[i] = cut(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  });
}

void start_barrier(uint32_t barrier, int arrivals) {
  const Busy own_accesses;
  if (barrier % 8 != 0) stop("a misaligned mbarrier", "start_barrier");
  check(current, at(barrier), 8, Kind::kWrite, Way::kOrdinary, Site::current());
  phases[barrier] = {arrivals, arrivals, 0, 0, std::vector<uint32_t>(threads), std::vector<uint32_t>(threads)};
}

void arrive(uint32_t address, int bytes, const Site& site) {
  const Busy own_accesses;
  Phases& barrier = barrier_at(address, site);
  for (int u = 0; u < threads; ++u) barrier.gathered[u] = std::max(barrier.gathered[u], clock_of(current)[u]);
  ++own_clock(current);
  barrier.bytes += bytes;
  if (--barrier.pending < 0) stop("one arrival too many at an mbarrier", text(site));
  settle(barrier, address);
}

void wait_for(uint32_t address, uint32_t parity, const Site& site) {
  const Busy own_accesses;
  Phases& barrier = barrier_at(address, site);
  while (barrier.phase == parity) {
    fibers[current].barrier = address;
    fibers[current].parity = parity;
    wait_as(State::kPhase, site);
  }
  for (int u = 0; u < threads; ++u) clock_of(current)[u] = std::max(clock_of(current)[u], barrier.over[u]);
}

void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier, const Site& site) {
  const Busy own_accesses;
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    stop("a misaligned copy", text(site));
  barrier_at(barrier, site);
  check(current, at(barrier), 8, Kind::kRead, Way::kEngine, site);
  check(current, at(to), bytes, Kind::kWrite, Way::kEngine, site);
  check(current, from, bytes, Kind::kRead, Way::kEngine, site);
  land(to, bytes, current, 0, Way::kInFlight);
  std::memset(at(to), kBulkPoison, bytes);
  bulk_copies.push_back({to, from, bytes, barrier, current, own_clock(current)});
}

void prefetch_bulk(const void* from, int bytes, const Site& site) {
  const Busy own_accesses;
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0) stop("a misaligned prefetch", text(site));
  check(current, from, bytes, Kind::kRead, Way::kOrdinary, site);
}

void fence_async(bool global) {
  const Busy own_accesses;
  fenced[global ? 1 : 0][current] = own_clock(current)++;
}

void begin_products(const Site& site) {
  const Busy own_accesses;
  collective(kAllLanes, site, nullptr, [](const Lanes&) { warps[current / 32].may_multiply = true; });
}

struct Multiplication {
  float (*sums)[4];
  Product product;
  const Site* site;
};

void multiply_later(float (*sums)[4], uint64_t rows, uint64_t codewords, bool add, const Site& site) {
  const Busy own_accesses;
  const Multiplication own{sums, {rows, codewords, add}, &site};
  collective(kAllLanes, site, &own, [](const Lanes& lanes) {
    Warp& warp = warps[current / 32];
    const auto* one = static_cast<const Multiplication*>(lanes.of[0]);
    if (!warp.may_multiply) stop("products without begin_products", text(*one->site));
    const bool first = warp.begun.empty() && warp.products.empty();
    for (int lane = 0; lane < 32; ++lane) {
      const auto* own = static_cast<const Multiplication*>(lanes.of[lane]);
      if (own->product.rows != one->product.rows || own->product.codewords != one->product.codewords)
        stop("lanes of a warp name different operands", text(*one->site));
      if (!first && warp.sums[lane] != own->sums) stop("products of two sums at once", text(*one->site));
      if (!first) continue;
      warp.sums[lane] = own->sums;
      std::memcpy(warp.kept[lane], own->sums, sizeof warp.kept[lane]);
      std::memset(own->sums, kPoison, sizeof warp.kept[lane]);
    }
    warp.begun.push_back(one->product);
  });
}

void end_products(const Site& site) {
  const Busy own_accesses;
  collective(kAllLanes, site, &site, [](const Lanes& lanes) {
    Warp& warp = warps[current / 32];
    warp.products.push_back(std::move(warp.begun));
    warp.begun.clear();
    warp.may_multiply = false;
    if (generator() % 4 == 0) finish_products(current / 32, 0, *static_cast<const Site*>(lanes.of[0]));
  });
}

struct Waiting {
  int left;
  const Site* site;
};

void wait_for_products(int left, const Site& site) {
  const Busy own_accesses;
  const Waiting own{left, &site};
  collective(kAllLanes, site, &own, [](const Lanes& lanes) {
    const auto* one = static_cast<const Waiting*>(lanes.of[0]);
    finish_products(current / 32, one->left, *one->site);
  });
}

cudaError_t set_shared_bytes(const void* kernel, int bytes) {
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (bytes > most) return cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

// The number of registers of the search with wgmma, as compiled for the GPU.
cudaError_t attributes_of(cudaFuncAttributes& attributes) {
  attributes.numRegs = 168;
  return cudaSuccess;
}

void note_launch(const char* name) {
  if (setting("UNICODE_FAST_HOST_LAUNCHES", 0) != 0) std::fprintf(stderr, "launch %s\n", name);
}

void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& thread) {
  if (failed) return;
  note_launch(name);
  const char here = 0;
  main_stack = &here;
  const auto refuse = [&](const std::string& reason) {
    failure = std::string(name) + ": " + reason;
    failed = true;
  };
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z != 1)
    return refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " blocks");
  if (block.x == 0 || block.x > kMostThreads || block.x % 32 != 0 || block.y != 1 || block.z != 1)
    return refuse("a block of " + std::to_string(block.x) + " threads");
  const auto limit = shared_limits.find(kernel);
  if (shared_bytes > static_cast<size_t>(limit == shared_limits.end() ? 48 << 10 : limit->second))
    return refuse("more shared memory than was asked for with cudaFuncSetAttribute");
  if (stacks == nullptr) make_fibers();
  kernel_name = name;
  gridDim = {grid.x, grid.y, 1};
  blockDim = {block.x, 1, 1};
  threads = static_cast<int>(block.x);
  body = &thread;
  first_of_launch = block_number + 1;
  counted.clear();
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y);
  for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), generator);
  for (const unsigned number : blocks) {
    blockIdx = {number % grid.x, number / grid.x, 0};
    prepare_block(shared_bytes);
    if (run_threads() == 1) return make_fibers();
    if (!bulk_copies.empty()) return refuse("a block ends before its copies");
    if (static_bytes + dynamic_bytes > static_cast<size_t>(most))
      return refuse("more shared memory than a block can have");
  }
  // Accesses of earlier launches are ordered before those of later ones.
  if (pages.size() + byte_pages.size() > kMostPages) {
    pages.clear();
    byte_pages.clear();
    last_cells = nullptr;
  }
}

void check_atomic(void* at, size_t bytes) {
  const Busy own_accesses;
  check(current, at, bytes, Kind::kWrite, Way::kAtomic, Site::current());
}

// All that is counted at an address is now ordered before the next accesses of this thread.
void see(const int* count) {
  for (const auto& [block, until] : counted[count]) seen[block].push_back({until, current, own_clock(current)});
}

int count_block(int* count, const Site& site) {
  const Busy own_accesses;
  check(current, count, sizeof *count, Kind::kWrite, Way::kAtomic, site);
  std::map<uint32_t, Until>& all = counted[count];
  for (const auto& [block, by_threads] : seen) {
    for (const Seen& by : by_threads) {
      if (!ordered_within(by.by, by.clock, current)) continue;
      std::vector<uint32_t> until = *by.until;
      if (const Until& before = all[block])
        for (int u = 0; u < threads; ++u) until[u] = std::max(until[u], (*before)[u]);
      all[block] = std::make_shared<std::vector<uint32_t>>(until);
    }
  }
  see(count);
  std::vector<uint32_t> until(full, full + threads);
  for (int u = 0; u < threads; ++u) until[u] = std::max(until[u], clock_of(current)[u]);
  all[block_number] = std::make_shared<std::vector<uint32_t>>(until);
  ++own_clock(current);
  return (*count)++;
}

void wait_for_count(const int* count, int least, const Site& site) {
  const Busy own_accesses;
  check(current, count, sizeof *count, Kind::kWrite, Way::kAtomic, site);
  if (*count < least) stop("waits for a block that may not have begun", text(site));
  see(count);
}

int mutation() {
  static const int chosen = setting("UNICODE_FAST_MUTATION", 0);
  return chosen;
}

}  // namespace on_host

// The hooks.

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of -fsanitize=alignment: the place in the source, and the address.
struct Misaligned {
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(const Misaligned* place, uintptr_t) {
  if (!on_host::running || on_host::busy) return;
  const on_host::Busy own_accesses;
  const char* name = std::strrchr(place->file, '/');
  on_host::stop("a misaligned access",
                (name == nullptr ? place->file : name + 1) + (":" + std::to_string(place->line)));
}
#define UNICODE_FAST_HOOKS(bytes)                                                        \
  void __tsan_read##bytes(void* at) {                                                    \
    on_host::hook(at, bytes, on_host::Kind::kRead, true, __builtin_return_address(0));   \
  }                                                                                      \
  void __tsan_write##bytes(void* at) {                                                   \
    on_host::hook(at, bytes, on_host::Kind::kWrite, true, __builtin_return_address(0));  \
  }                                                                                      \
  void __tsan_unaligned_read##bytes(void* at) {                                          \
    on_host::hook(at, bytes, on_host::Kind::kRead, false, __builtin_return_address(0));  \
  }                                                                                      \
  void __tsan_unaligned_write##bytes(void* at) {                                         \
    on_host::hook(at, bytes, on_host::Kind::kWrite, false, __builtin_return_address(0)); \
  }
UNICODE_FAST_HOOKS(1)
UNICODE_FAST_HOOKS(2)
UNICODE_FAST_HOOKS(4)
UNICODE_FAST_HOOKS(8)
UNICODE_FAST_HOOKS(16)
void __tsan_read_range(void* at, size_t bytes) {
  on_host::hook(at, bytes, on_host::Kind::kRead, false, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  on_host::hook(at, bytes, on_host::Kind::kWrite, false, __builtin_return_address(0));
}

// CUDA's runtime.

cudaError_t cudaGetLastError() {
  const bool before = on_host::failed;
  on_host::failed = false;
  return before ? cudaErrorLaunchFailure : cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return on_host::failure.c_str();
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = on_host::setting("UNICODE_FAST_HOST_CAPABILITY", 90);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = on_host::setting("UNICODE_FAST_HOST_MULTIPROCESSORS", 132);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (capability >= 90 ? 227 : capability == 80 ? 163 : capability > 80 ? 99 : 64) << 10;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
  if (*pointer == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*pointer, on_host::kPoison, bytes);
  on_host::allocations[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  on_host::allocations.erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  on_host::note_launch("fill");
  return cudaMemset(pointer, value, bytes);
}

struct on_host_event {
  std::chrono::steady_clock::time_point time;
};

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new on_host_event;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
}
