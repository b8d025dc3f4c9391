// SPDX-License-Identifier: Apache-2.0
// Shared by the CPU operators: instruction sets, scratch memory, parallel loops.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <type_traits>

#include "simd.h"
#include "tensors.h"

namespace tokenops {

// ---- instruction set ----

enum class Isa { portable, avx2, avx512, avx512_bf16 };

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

inline Isa detect_isa() {
  Isa best = Isa::portable;
#if TOKENOPS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("TOKENOPS_CPU_ISA");
  if (wanted == nullptr) return best;
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  }
  return best;
}

// The best instruction set of this CPU; the environment variable TOKENOPS_CPU_ISA asks for less.
inline Isa isa() {
  static const Isa level = detect_isa();
  return level;
}

// The address of a function that every instruction set's namespace defines: picks that of this CPU.
#if TOKENOPS_X86
#define TOKENOPS_KERNEL(...)                                           \
  (::tokenops::isa() >= ::tokenops::Isa::avx512 ? &avx512::__VA_ARGS__ \
   : ::tokenops::isa() == ::tokenops::Isa::avx2 ? &avx2::__VA_ARGS__   \
                                                : &portable::__VA_ARGS__)
#else
#define TOKENOPS_KERNEL(...) (&portable::__VA_ARGS__)
#endif

// ---- memory and loops ----

// A new contiguous CPU tensor, uninitialised.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

// Bytes of last-level cache that the cores of one die share on current servers. (sysconf reports
// other numbers on some of them.)
constexpr int64_t kCacheBytes = int64_t{32} << 20;

// Make this thread's streaming stores visible to other threads.
inline void stream_fence() {
#if TOKENOPS_X86
  _mm_sfence();
#endif
}

// Uninitialised memory, aligned to cache lines, that grows on demand. Not null if constructed with
// a count, even 0.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { reserve(count > 0 ? count : 1); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Make room for this many elements; growing loses the old contents.
  T* reserve(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      capacity_ = 0;
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      capacity_ = count;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Arrays one after the other in a block of memory, each aligned to a cache line. With a null base,
// only their bytes are counted.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <class U>
  U* take(int64_t count) {
    U* array = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Make a workspace in `memory`: a struct W{arena, sizes...} that takes its arrays from its member
// `arena`.
template <class W, class... Sizes>
W allocate(Scratch<char>& memory, Sizes... sizes) {
  const W measured{Arena(nullptr), sizes...};
  return W{Arena(memory.reserve(measured.arena.used())), sizes...};
}

// Call f(begin, end) on parts of [0, count) in parallel. `cost` is about the number of bytes that
// one index reads and writes; small loops run on the calling thread without overhead.
template <class F>
void parallel_for(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kGrain = 64 * 1024;  // bytes; takes several times as long as waking a thread
  if (count <= 0) return;
  const int64_t grain = kGrain / (cost > 0 ? cost : 1) + 1;
  if (count <= grain) return f(0, count);
  torch::stable::parallel_for(0, count, grain, f);
}

// ---- token maps ----

// Bring the map of an image into CSR form: offsets [outputs + 1] and members [inputs] from assign
// [inputs], whose values out of range are dropped. A counting sort: count the members of each
// output token, sum the counts to the segments' ends, then place the tokens from the last one on,
// which moves each end to the beginning of its segment.
inline void invert_image(const int32_t* assign, int64_t inputs, int64_t outputs, int32_t* offsets,
                         int32_t* members) {
  const auto is_kept = [=](int32_t m) { return 0 <= m && m < outputs; };
  for (int64_t m = 0; m <= outputs; ++m) offsets[m] = 0;
  for (int64_t n = 0; n < inputs; ++n) {
    if (is_kept(assign[n])) ++offsets[assign[n]];
  }
  int32_t total = 0;
  for (int64_t m = 0; m <= outputs; ++m) total = offsets[m] += total;
  for (int64_t n = total; n < inputs; ++n) members[n] = -1;
  for (int64_t n = inputs - 1; n >= 0; --n) {
    if (is_kept(assign[n])) members[--offsets[assign[n]]] = static_cast<int32_t>(n);
  }
}

}  // namespace tokenops
