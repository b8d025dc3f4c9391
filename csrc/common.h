// SPDX-License-Identifier: Apache-2.0
// What the CPU operators share: instruction set and dtype dispatch, views of tensors, scratch
// memory, parallel loops. Letters: B batch, N tokens in, M tokens out, C channels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <optional>

#include "simd.h"

namespace tokenops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- instruction set ----

enum class Isa { portable, avx2, avx512, avx512_bf16 };

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
  const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(wish, names[i]) == 0) return static_cast<Isa>(i);
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

// ---- dtypes ----

// Type of sums, weights and scores.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

inline ScalarType acc_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Type {
  using type = T;
};

// Call f(Type<T>()) with the C++ type of a floating dtype.
template <class F>
auto dispatch(const char* op, ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>());
    case ScalarType::Double: return f(Type<double>());
    case ScalarType::BFloat16: return f(Type<c10::BFloat16>());
    case ScalarType::Half: return f(Type<c10::Half>());
    default: STD_TORCH_CHECK(false, op, ": expected a floating dtype, got ", dtype);
  }
}

// ---- tensors ----

// Rows of a [B, rows, C] tensor whose last dimension is contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t batch_stride;
  int64_t row_stride;

  TOKENOPS_INLINE T* operator()(int64_t b, int64_t n) const {
    return data + b * batch_stride + n * row_stride;
  }
};

// A new contiguous CPU tensor, uninitialised.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr size_t kMaxDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "tokenops::empty: too many dimensions");
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The tensor itself where it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// ---- memory and loops ----

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

// Lays out arrays one after the other; over a null base it only measures.
class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}

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
