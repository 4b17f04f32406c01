// Runs translated kernels: the blocks of a launch, the fibers of their threads, and what orders their
// accesses. SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

bool watches_global = false;

namespace {

constexpr size_t kStackBytes = 1 << 20;
constexpr unsigned kWarp = 32;
// of several blocks under way, as many as can meet in pairs
constexpr size_t kBlocksAtOnce = 2;
// bytes that one record of accesses stands for: the smallest element
constexpr unsigned kCellBytes = 2;
constexpr int kSeveral = -1;

enum State { kReady, kAtBarrier, kAtShuffle, kAtWarpBarrier, kYielded, kReturned };
enum Order { kForward, kBackward, kRandom };

// time counts accesses and fences, epoch the barriers of a block
struct Access {
  unsigned block;
  int thread;
  unsigned epoch;
  uint64_t time;
  int line;
  bool is_atomic;
};

struct Cell {
  bool written = false;
  Access write;
  // since that write, of each block the last one
  std::vector<Access> reads;
};

class Cells {
 public:
  Cell& at(uint64_t address) {
    std::vector<Cell>& page = pages_[address / kPageBytes];
    if (page.empty()) page.resize(kPageBytes / kCellBytes);
    return page[address % kPageBytes / kCellBytes];
  }
  void clear() { pages_.clear(); }

 private:
  static constexpr uint64_t kPageBytes = 1024;
  std::unordered_map<uint64_t, std::vector<Cell>> pages_;
};

// accesses that a fence makes visible: those of one thread before a time, and those of its whole block before
// an epoch
struct Released {
  unsigned block;
  int thread;
  uint64_t time;
  unsigned epoch;
};
// and who has seen them: one thread at once, the others of its block from the next epoch on
struct Acquired : Released {
  int by;
  unsigned by_epoch;
};

struct Fiber : Thread {
  State state = kReady;
  int line = 0;
  uint32_t value = 0, lane = 0;
  // of the last fence; 0 covers nothing
  uint64_t fence_time = 0;
  unsigned fence_epoch = 0;
  // seen by an atomic operation, and visible after the next fence
  std::vector<Released> pending;
  ucontext_t context;
  jmp_buf place;
  bool entered = false;
  std::unique_ptr<char[]> stack;
};

struct RunningBlock : Block {
  unsigned epoch = 0, returned = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<unsigned> ready;
  std::vector<unsigned char> memory;
  Cells cells;
  std::vector<Acquired> acquired;
};

Order order = kForward;
std::mt19937 draw;
const Entry* skipped_entry = nullptr;
int skipped_line = -1, times_skipped = 0;

std::mutex device;
std::string finding;
jmp_buf outside;
Fiber* running = nullptr;
std::vector<std::unique_ptr<RunningBlock>> pool;
uint64_t now = 0;
Cells global_cells;
std::unordered_map<uint64_t, std::vector<Released>> released;

Fiber& fiber(Thread& t) { return static_cast<Fiber&>(t); }
RunningBlock& block_of(Thread& t) { return *static_cast<RunningBlock*>(t.block); }

[[noreturn]] void stop(const Thread& t, int line, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  finding = std::string(text) + "; " + t.block->entry->name + ", block " + std::to_string(t.block->index) +
            ", thread " + std::to_string(t.index) + ", line " + std::to_string(line);
  _longjmp(outside, 1);
}

void wait(Thread& t, State state, int line) {
  Fiber& self = fiber(t);
  self.state = state, self.line = line;
  if (_setjmp(self.place) == 0) _longjmp(outside, 1);
}

// where the order is random, other blocks and threads may go first
void yield(Thread& t, int line) {
  if (order == kRandom) wait(t, kYielded, line);
}

bool is_skipped(const Thread& t, int line) {
  if (line != skipped_line || t.block->entry != skipped_entry) return false;
  times_skipped += 1;
  return true;
}

bool is_ordered(Thread& t, const Access& before) {
  RunningBlock& block = block_of(t);
  if (before.block == block.index) return before.thread == int(t.index) || before.epoch < block.epoch;
  for (const Acquired& seen : block.acquired) {
    if (seen.block != before.block) continue;
    const bool covered =
        (seen.thread == before.thread && before.time < seen.time) || before.epoch < seen.epoch;
    if (covered && (seen.by == int(t.index) || seen.by_epoch < block.epoch)) return true;
  }
  return false;
}

void check_order(Thread& t, const char* kind, const char* where, const Access& before, bool is_atomic,
                 int line) {
  if ((is_atomic && before.is_atomic) || is_ordered(t, before)) return;
  stop(t, line, "race: %s in %s, against block %u, thread %d, line %d", kind, where, before.block,
       before.thread, before.line);
}

// records an access, which earlier ones of the same place must be ordered before
void record(Thread& t, Cell& cell, const char* where, bool write, bool same, bool is_atomic, int line) {
  RunningBlock& block = block_of(t);
  const Access access{block.index, int(t.index), block.epoch, ++now, line, is_atomic};
  if (cell.written && !same)
    check_order(t, write ? "write after write" : "read after write", where, cell.write, is_atomic, line);
  if (write) {
    for (const Access& read : cell.reads) check_order(t, "write after read", where, read, is_atomic, line);
    cell.reads.clear();
    cell.written = true, cell.write = access;
    return;
  }
  for (Access& read : cell.reads) {
    if (read.block != block.index) continue;
    const bool alone = read.thread == access.thread || read.epoch < access.epoch;
    read = access;
    if (!alone) read.thread = kSeveral;
    return;
  }
  cell.reads.push_back(access);
}

const Variable* variable_at(const Block& block, uint64_t address, unsigned size) {
  for (unsigned i = 0; i < block.entry->n_shared; ++i) {
    const Variable& v = block.entry->shared[i];
    if (address >= v.begin && address + size <= v.end) return &v;
  }
  return nullptr;
}

bool is_in_params(const Block& block, uint64_t address, unsigned size) {
  for (unsigned i = 0; i < block.entry->n_params; ++i) {
    const uint64_t begin = reinterpret_cast<uint64_t>(block.params[i]);
    if (address >= begin && address + size <= begin + block.entry->sizes[i]) return true;
  }
  return false;
}

void* reach_shared(Thread& t, uint64_t address, unsigned size, bool write, bool is_atomic, const void* value,
                   int line) {
  const Variable* variable = variable_at(*t.block, address, size);
  if (!variable) fail(t, line, "outside of the shared variables", address, size);
  unsigned char* place = t.block->shared + (address - kSharedBegin);
  // threads that hold copies of one value may all write it
  const bool same = value && memcmp(place, value, size) == 0;
  for (uint64_t i = 0; i < size; i += kCellBytes) {
    Cell& cell = block_of(t).cells.at(address + i);
    if ((!write || is_atomic) && !cell.written)
      fail(t, line, "shared memory is read before it is written", address, size);
    record(t, cell, variable->name, write, same, is_atomic, line);
  }
  return place;
}

void* reach_global(Thread& t, uint64_t address, unsigned size, bool write, bool is_atomic, int line) {
  if (address < kSharedEnd) fail(t, line, "no address of global memory", address, size);
  if (watches_global)
    for (uint64_t i = 0; i < size; i += kCellBytes)
      record(t, global_cells.at(address + i), "global memory", write, false, is_atomic, line);
  return reinterpret_cast<void*>(address);
}

// one thread of every block after another
void live() {
  for (;;) {
    Fiber& self = *running;
    self.block->entry->kernel(self);
    block_of(self).returned += 1;
    wait(self, kReturned, 0);
  }
}

// runs a thread until it waits; false if it ended the launch
bool resume(Fiber& f) {
  running = &f;
  if (_setjmp(outside) != 0) return finding.empty();
  if (f.entered) _longjmp(f.place, 1);
  f.entered = true;
  setcontext(&f.context);
  return false;
}

void add_fiber(RunningBlock& block) {
  block.fibers.push_back(std::make_unique<Fiber>());
  Fiber& f = *block.fibers.back();
  f.block = &block;
  f.index = unsigned(block.fibers.size() - 1);
  f.stack.reset(new char[kStackBytes]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, live, 0);
}

void begin(RunningBlock& block, const Entry& entry, unsigned index, unsigned blocks, unsigned threads,
           unsigned char* const* params) {
  static_cast<Block&>(block) = Block{&entry, params, index, blocks, threads, nullptr};
  block.epoch = block.returned = 0;
  block.memory.assign(entry.shared_bytes, 0xcd);
  block.shared = block.memory.data();
  block.cells.clear(), block.acquired.clear(), block.ready.clear();
  while (block.fibers.size() < threads) add_fiber(block);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *block.fibers[i];
    f.state = kReady, f.fence_time = 0, f.fence_epoch = 0, f.pending.clear();
    block.ready.push_back(i);
  }
}

void make_ready(RunningBlock& block, unsigned first, unsigned count) {
  for (unsigned i = first; i < first + count; ++i) {
    block.fibers[i]->state = kReady;
    block.ready.push_back(i);
  }
}

// lets a warp go on whose threads all came to the same shuffle or barrier
bool release_warp(RunningBlock& block, unsigned first) {
  const Fiber& leader = *block.fibers[first];
  if (leader.state != kAtShuffle && leader.state != kAtWarpBarrier) return false;
  uint32_t values[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) {
    const Fiber& f = *block.fibers[first + i];
    if (f.state != leader.state || f.line != leader.line) return false;
    values[i] = f.value;
  }
  for (unsigned i = 0; i < kWarp; ++i) block.fibers[first + i]->value = values[block.fibers[first + i]->lane];
  make_ready(block, first, kWarp);
  return true;
}

// lets threads go on that waited for others; false if the block has ended
bool release(RunningBlock& block) {
  for (unsigned first = 0; first < block.n_threads; first += kWarp) release_warp(block, first);
  for (unsigned i = 0; i < block.n_threads && block.ready.empty(); ++i)
    if (block.fibers[i]->state == kYielded)
      for (unsigned k = i; k < block.n_threads; ++k)
        if (block.fibers[k]->state == kYielded) make_ready(block, k, 1);
  if (!block.ready.empty()) return true;
  if (block.returned == block.n_threads) return false;
  const Fiber& first = *block.fibers[0];
  if (_setjmp(outside) != 0) return false;
  for (unsigned i = 0; i < block.n_threads; ++i) {
    const Fiber& f = *block.fibers[i];
    if ((f.state == kReturned) != (first.state == kReturned))
      stop(f, f.line, "threads have returned while others wait, thread 0 at line %d", first.line);
    if (f.state != kAtBarrier || f.line != first.line)
      stop(f, f.line, "threads wait at different places, thread 0 at line %d", first.line);
  }
  block.epoch += 1;
  make_ready(block, 0, block.n_threads);
  return true;
}

// one turn of a block: every thread that is ready runs until it waits
bool take_turn(RunningBlock& block) {
  std::vector<unsigned> turn;
  turn.swap(block.ready);
  std::sort(turn.begin(), turn.end());
  if (order == kBackward) std::reverse(turn.begin(), turn.end());
  if (order == kRandom) std::shuffle(turn.begin(), turn.end(), draw);
  for (unsigned i : turn)
    if (!resume(*block.fibers[i])) return false;
  return release(block);
}

void run_all(const Entry& entry, unsigned blocks, unsigned threads, unsigned char* const* params) {
  std::vector<unsigned> waiting;
  for (unsigned i = 0; i < blocks; ++i) waiting.push_back(order == kBackward ? i : blocks - 1 - i);
  if (order == kRandom) std::shuffle(waiting.begin(), waiting.end(), draw);
  const size_t at_once = order == kRandom ? kBlocksAtOnce : 1;
  while (pool.size() < at_once) pool.push_back(std::make_unique<RunningBlock>());
  std::vector<RunningBlock*> idle, live_blocks;
  for (size_t i = 0; i < at_once; ++i) idle.push_back(pool[i].get());
  while (finding.empty() && !(waiting.empty() && live_blocks.empty())) {
    while (!waiting.empty() && !idle.empty()) {
      begin(*idle.back(), entry, waiting.back(), blocks, threads, params);
      live_blocks.push_back(idle.back());
      idle.pop_back(), waiting.pop_back();
    }
    const size_t i = live_blocks.size() == 1 ? 0 : draw() % live_blocks.size();
    if (take_turn(*live_blocks[i])) continue;
    idle.push_back(live_blocks[i]);
    live_blocks.erase(live_blocks.begin() + ptrdiff_t(i));
  }
}

}  // namespace

void fail(Thread& t, int line, const char* what, uint64_t address, uint64_t size) {
  stop(t, line, "%s: address %#llx of %llu bytes", what, static_cast<unsigned long long>(address),
       static_cast<unsigned long long>(size));
}

void* reach(Thread& t, Space space, uint64_t address, unsigned size, bool write, bool is_atomic,
            const void* value, int line) {
  if (address % size != 0) fail(t, line, "not aligned", address, size);
  if (space == kGeneric) space = address >= kSharedEnd ? kGlobal : address >= kSharedBegin ? kShared : kLocal;
  if (space == kGlobal) return reach_global(t, address, size, write, is_atomic, line);
  if (space == kShared) return reach_shared(t, address, size, write, is_atomic, value, line);
  if (space == kParam) {
    if (write || !is_in_params(*t.block, address, size))
      fail(t, line, "outside of the parameters", address, size);
    return reinterpret_cast<void*>(address);
  }
  if (address < kLocalBegin || address + size > kLocalEnd)
    fail(t, line, "outside of local memory", address, size);
  return t.local + (address - kLocalBegin);
}

void barrier(Thread& t, int line) {
  if (!is_skipped(t, line)) wait(t, kAtBarrier, line);
}

void warp_barrier(Thread& t, int line) {
  fiber(t).lane = t.index % kWarp;
  wait(t, kAtWarpBarrier, line);
}

uint32_t exchange(Thread& t, uint32_t value, uint32_t lane, uint32_t mask, int line) {
  if (mask != ~0u) fail(t, line, "a shuffle of a part of a warp, of which this machine has none", mask);
  fiber(t).value = value, fiber(t).lane = lane;
  wait(t, kAtShuffle, line);
  return fiber(t).value;
}

void fence(Thread& t, int line) {
  if (is_skipped(t, line)) return;
  Fiber& self = fiber(t);
  RunningBlock& block = block_of(t);
  self.fence_time = ++now, self.fence_epoch = block.epoch;
  for (const Released& seen : self.pending) block.acquired.push_back({seen, int(t.index), block.epoch});
  self.pending.clear();
  yield(t, line);
}

void before_atomic(Thread& t, Space space, uint64_t address, bool strong, int line) {
  if (space == kShared) return;
  yield(t, line);
  if (!watches_global) return;
  if (strong) fence(t, line);
  Fiber& self = fiber(t);
  std::vector<Released>& list = released[address];
  for (const Released& seen : list)
    if (seen.block != t.block->index) self.pending.push_back(seen);
  list.push_back({t.block->index, int(t.index), self.fence_time, self.fence_epoch});
  if (!strong || is_skipped(t, line)) return;
  for (const Released& seen : self.pending)
    block_of(t).acquired.push_back({seen, int(t.index), block_of(t).epoch});
  self.pending.clear();
}

}  // namespace ptx

extern "C" __attribute__((visibility("default"))) void ptx_configure(int order, unsigned seed, bool races) {
  ptx::order = ptx::Order(order);
  ptx::draw.seed(seed);
  ptx::watches_global = races;
}

// leaves out one barrier or fence of a kernel from now on, none for -1; returns how often the one before was
// left out
extern "C" __attribute__((visibility("default"))) int ptx_leave_out(const ptx::Entry* entry, int line) {
  const int times = ptx::times_skipped;
  ptx::skipped_entry = entry, ptx::skipped_line = line, ptx::times_skipped = 0;
  return times;
}

// returns what was found, or null
extern "C" __attribute__((visibility("default"))) const char* ptx_launch(const ptx::Entry* entry,
                                                                         unsigned blocks, unsigned threads,
                                                                         unsigned char* const* params) {
  using namespace ptx;
  const std::lock_guard<std::mutex> lock(device);
  finding.clear(), global_cells.clear(), released.clear();
  if (threads > entry->max_threads || threads % kWarp != 0)
    finding = std::string(entry->name) + " cannot have " + std::to_string(threads) + " threads";
  else
    run_all(*entry, blocks, threads, params);
  // fibers in the middle of a kernel cannot begin another one
  if (!finding.empty()) pool.clear();
  return finding.empty() ? nullptr : finding.c_str();
}
