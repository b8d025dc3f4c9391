// SPDX-License-Identifier: Apache-2.0
// CUDA kernels as C++ on the CPU, thread by thread, as Triton's interpreter runs Triton's kernels.
// Tests check the results, that all threads reach each barrier, and, with AddressSanitizer, that no
// kernel reads or writes out of bounds of tensors and shared memory. Threads run in a new random
// order after each barrier, which finds many missing barriers but not all: between two barriers a
// thread runs alone.
//
// The threads of a block are coroutines; blocks run one after the other. There is only the x axis,
// and warps are whole.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define threadIdx (::tokenops::emulate::running().thread)
#define blockIdx (::tokenops::emulate::running().block->index)
#define blockDim (::tokenops::emulate::running().block->threads)
#define gridDim (::tokenops::emulate::running().block->grid)

namespace tokenops::emulate {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kSlot = 128;  // bytes that a thread can exchange with its warp

struct Axis {
  unsigned x;
};

// A barrier for the threads of a block or a warp.
struct Barrier {
  int arrived = 0;
  int expected = 0;  // threads that have not returned
  unsigned generation = 0;

  void open_if_complete() {
    if (arrived > 0 && arrived == expected) arrived = 0, ++generation;
  }
};

struct Block;

struct Thread {
  Axis thread;
  Block* block;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Barrier* waits = nullptr;
  unsigned generation = 0;
  bool done = false;
};

inline Thread*& current() {
  static thread_local Thread* thread = nullptr;
  return thread;
}
inline Thread& running() { return *current(); }

struct Warp {
  Barrier barrier;
  alignas(16) char slots[kWarp][kSlot];
  const char* calls[kWarp] = {};
};

struct Block {
  Axis index, threads, grid;
  char* shared = nullptr;
  Barrier barrier;
  bool vote = false;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  const std::function<void()>* body;

  Warp& warp_of(const Thread& t) { return warps[t.thread.x / kWarp]; }
};

inline void fail(const char* message) {
  std::fprintf(stderr, "tokenops: emulated kernel: %s\n", message);
  std::abort();
}

inline void wait(Barrier& barrier) {
  Thread& self = running();
  self.waits = &barrier;
  self.generation = barrier.generation;
  ++barrier.arrived;
  barrier.open_if_complete();
  if (barrier.generation != self.generation) return;
  swapcontext(&self.context, &self.block->scheduler);
}

inline void enter() {
  Thread& self = running();
  (*self.block->body)();
  self.done = true;
  Block& block = *self.block;
  for (Barrier* barrier : {&block.barrier, &block.warp_of(self).barrier}) {
    --barrier->expected;
    barrier->open_if_complete();
  }
  swapcontext(&self.context, &block.scheduler);
}

// Run one block to its end; `seed` shuffles the order of its threads.
inline void run_block(Block& block, std::vector<Thread>& threads, uint64_t& seed) {
  const unsigned count = block.threads.x;
  block.warps = std::vector<Warp>((count + kWarp - 1) / kWarp);
  block.barrier = {};
  block.barrier.expected = static_cast<int>(count);
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.thread = {i}, t.block = &block, t.waits = nullptr, t.done = false;
    if (!t.stack) t.stack.reset(new char[kStack]);
    ++block.warp_of(t).barrier.expected;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = nullptr;
    makecontext(&t.context, &enter, 0);
    order[i] = i;
  }
  for (unsigned left = count; left > 0;) {
    for (unsigned i = count; i > 1; --i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
      std::swap(order[i - 1], order[(seed >> 33) % i]);
    }
    bool progress = false;
    for (unsigned i : order) {
      Thread& t = threads[i];
      if (t.done || (t.waits != nullptr && t.waits->generation == t.generation)) continue;
      t.waits = nullptr;
      current() = &t;
      swapcontext(&block.scheduler, &t.context);
      progress = true;
      left -= t.done;
    }
    if (!progress) fail("threads wait at different barriers");
  }
  current() = nullptr;
}

// The number of kernels launched since the program began.
inline int64_t& launches() {
  static int64_t count = 0;
  return count;
}

// Run a kernel for a grid of blocks. Each block gets its shared memory from the heap, filled with
// bits that are NaN as floats.
template <class... P>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, P... args) {
  ++launches();
  static thread_local std::vector<Thread> pool;
  static thread_local uint64_t seed = 1;
  if (pool.size() < static_cast<size_t>(threads)) pool.resize(threads);
  const std::function<void()> body = [&] { kernel(args...); };
  Block block;
  block.threads = {static_cast<unsigned>(threads)};
  block.grid = {static_cast<unsigned>(blocks)};
  block.body = &body;
  for (int64_t i = 0; i < blocks; ++i) {
    const size_t bytes = static_cast<size_t>(shared_bytes);
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes > 0 ? bytes : 1) != 0) fail("no memory");
    const std::unique_ptr<void, void (*)(void*)> owner(memory, std::free);
    std::memset(memory, 0xff, bytes);
    block.shared = static_cast<char*>(memory);
    block.index = {static_cast<unsigned>(i)};
    run_block(block, pool, seed);
  }
}

// Exchange values within a warp: returns look(value_of), where value_of(lane) is the `value` of
// that lane. All threads of the warp must call this from the same function, named `call`.
template <class T, class F>
auto in_warp(const T& value, F look, const char* call = __builtin_FUNCTION()) {
  static_assert(sizeof(T) <= kSlot, "too large a value");
  Thread& self = running();
  Warp& warp = self.block->warp_of(self);
  std::memcpy(warp.slots[self.thread.x % kWarp], &value, sizeof(T));
  warp.calls[self.thread.x % kWarp] = call;
  if (warp.barrier.expected != kWarp) fail("a warp function is called after threads returned");
  wait(warp.barrier);
  for (const char* other : warp.calls) {
    if (std::strcmp(other, call) != 0) fail("threads of a warp call different warp functions");
  }
  const auto result = look([&](int lane) {
    T other;
    std::memcpy(&other, warp.slots[lane], sizeof(T));
    return other;
  });
  wait(warp.barrier);
  return result;
}

inline int lane() { return static_cast<int>(running().thread.x % kWarp); }

}  // namespace tokenops::emulate

inline void __syncthreads() {
  ::tokenops::emulate::wait(::tokenops::emulate::running().block->barrier);
}
inline bool __syncthreads_or(bool mine) {
  bool& vote = ::tokenops::emulate::running().block->vote;
  __syncthreads();  // after the last reads of the previous vote
  vote = false;
  __syncthreads();
  vote |= mine;
  __syncthreads();
  return vote;
}
inline void __syncwarp(unsigned = ~0u) {
  auto& self = ::tokenops::emulate::running();
  ::tokenops::emulate::wait(self.block->warp_of(self).barrier);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return ::tokenops::emulate::in_warp(value, [=](auto value_of) { return value_of(source & 31); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return ::tokenops::emulate::in_warp(
      value, [=](auto value_of) { return value_of(::tokenops::emulate::lane() ^ bits); });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int from = ::tokenops::emulate::lane() - by;
  return ::tokenops::emulate::in_warp(
      value, [=](auto value_of) { return from < 0 ? value : value_of(from); });
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  return ::tokenops::emulate::in_warp(mine, [](auto value_of) {
    unsigned bits = 0;
    for (int lane = 0; lane < ::tokenops::emulate::kWarp; ++lane)
      bits |= unsigned{value_of(lane)} << lane;
    return bits;
  });
}
// Reduce the values of a warp by a function of two values.
template <class F>
unsigned reduce_in_warp(unsigned mine, F combine) {
  return ::tokenops::emulate::in_warp(mine, [=](auto value_of) {
    unsigned all = value_of(0);
    for (int lane = 1; lane < ::tokenops::emulate::kWarp; ++lane)
      all = combine(all, value_of(lane));
    return all;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned mine) {
  return reduce_in_warp(mine, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned mine) {
  return reduce_in_warp(mine, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_add_sync(unsigned, unsigned mine) {
  return reduce_in_warp(mine, [](unsigned a, unsigned b) { return a + b; });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}
template <class T>
T atomicMin(T* at, T value) {
  const T old = *at;
  if (value < old) *at = value;
  return old;
}
template <class T>
T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
