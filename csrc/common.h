// SPDX-License-Identifier: Apache-2.0
// What the CPU operators share: instruction set dispatch, scratch memory, parallel loops.
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
  const char* wish = std::getenv("TOKENOPS_CPU_ISA");
  if (wish == nullptr) return best;
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(wish, kIsaNames[i]) == 0) return static_cast<Isa>(i);
  }
  return best;
}

// Best instruction set of this CPU; the environment variable TOKENOPS_CPU_ISA lowers it.
inline Isa isa() {
  static const Isa level = detect_isa();
  return level;
}

// The version of a kernel, which exists in each level's namespace, for this CPU.
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

// Bytes of cache that a pass can hope for: what the cores of one die share on current servers.
// (What sysconf says is not that on all of them.)
constexpr int64_t kCacheBytes = int64_t{32} << 20;

// Make what this thread stored past the caches visible to the others.
inline void stream_fence() {
#if TOKENOPS_X86
  _mm_sfence();
#endif
}

// Uninitialised memory, aligned to cache lines, that grows on demand; never null when made for a
// number of elements, even for none.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) { reserve(count > 0 ? count : 1); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // Room for this many elements; what was there before is lost if it has to grow.
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

// Gives out arrays one after the other from a block of memory, each aligned to a cache line.
// Without a block it only counts the bytes.
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
using Layout = Arena;

// A workspace W(arena, sizes...), whose arrays lie in `memory`.
template <class W, class... Sizes>
W allocate(Scratch<char>& memory, Sizes... sizes) {
  Arena measure(nullptr);
  W(measure, sizes...);
  Arena arena(memory.reserve(measure.used()));
  return W(arena, sizes...);
}

// Call f(begin, end) on parts of [0, count) in parallel, where `cost` is about the number of bytes
// that one index touches: small loops run on the calling thread, at no overhead.
template <class F>
void parallel_for(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kGrain = 64 * 1024;  // bytes, several times what waking a thread costs
  if (count <= 0) return;
  const int64_t grain = kGrain / (cost > 0 ? cost : 1) + 1;
  if (count <= grain) return f(0, count);
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace tokenops
