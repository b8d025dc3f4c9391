// SPDX-License-Identifier: Apache-2.0
// Shared by all operators on any device: dtypes, views of tensors, new tensors, boxed arguments.
// Letters: B batch, N tokens in, M tokens out, C channels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>

#define TOKENOPS_INLINE inline __attribute__((always_inline))

// A function for index arithmetic on the CPU and the GPU.
#if defined(__CUDACC__)
#define TOKENOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TOKENOPS_HOST_DEVICE TOKENOPS_INLINE
#endif

namespace tokenops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- dtypes ----

// The type of sums, weights and scores: double for double, else float.
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

// Call f(Type<T>()) with the C++ type T of a floating dtype.
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

  TOKENOPS_HOST_DEVICE T* operator()(int64_t b, int64_t n) const {
    return data + b * batch_stride + n * row_stride;
  }
};

// A new contiguous tensor, uninitialised.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, int32_t device_type,
                    int32_t device_index) {
  constexpr size_t kMaxDims = 4;
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "tokenops::empty: too many dimensions");
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}
// The same on the device of another tensor.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return empty(sizes, dtype, device_type, like.get_device_index());
}

// The tensor itself if it is contiguous, else a contiguous copy.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// ---- strings ----

// A string argument of an operator, instead of std::string, whose conversion leaks a string per
// call before PyTorch 2.14.
struct Text : std::string {
  using std::string::string;
};

}  // namespace tokenops

// The kernel owns the string that PyTorch made for the call: copy it, then delete it, also if the
// copy throws.
template <>
struct torch::stable::detail::ToImpl<tokenops::Text> {
  static tokenops::Text call(StableIValue value, uint64_t, bool) {
    struct Owned {
      StringHandle handle;
      ~Owned() { torch_delete_string(handle); }
    };
    const Owned owned{to<StringHandle>(value)};
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(owned.handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(owned.handle, &data));
    return tokenops::Text(data, length);
  }
};

namespace tokenops {

// ---- arguments in groups ----

// Takes a kernel's parameter of type P from the operator's flat arguments: `next` points to its
// first argument and moves past its last one.
template <class P, class = void>
struct Parameter {
  static constexpr size_t kArguments = 1;
  static P take(StableIValue*& next) { return torch::stable::detail::to<P>(*next++); }
};

// A struct with a member function `fields()` that ties all its fields: one argument per field.
template <class P>
struct Parameter<P, std::void_t<decltype(std::declval<P&>().fields())>> {
  using Fields = decltype(std::declval<P&>().fields());
  static constexpr size_t kArguments = std::tuple_size_v<Fields>;
  static P take(StableIValue*& next) { return take(next, Type<Fields>()); }
  template <class... F>
  static P take(StableIValue*& next, Type<std::tuple<F&...>>) {
    return {Parameter<F>::take(next)...};
  }
};

// The outputs of a kernel: the elements of a tuple, or one value.
template <class R>
struct Outputs {
  static constexpr size_t kCount = 1;
  static void put(StableIValue* stack, R output) {
    torch::stable::detail::box_from_tuple<R>(stack, std::tuple<R>(std::move(output)));
  }
};
template <class... R>
struct Outputs<std::tuple<R...>> {
  static constexpr size_t kCount = sizeof...(R);
  static void put(StableIValue* stack, std::tuple<R...> outputs) {
    torch::stable::detail::box_from_tuple<R...>(stack, std::move(outputs));
  }
};

template <auto kernel>
struct Boxed;
template <class R, class... P, R (*kernel)(P...)>
struct Boxed<kernel> {
  static void call(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
    constexpr size_t kArguments = (Parameter<std::decay_t<P>>::kArguments + ...);
    STD_TORCH_CHECK(num_args == kArguments && num_outputs == Outputs<R>::kCount,
                    "tokenops: a schema of ", num_args, " arguments and ", num_outputs,
                    " outputs has a kernel of ", kArguments, " and ", Outputs<R>::kCount);
    StableIValue* next = stack;
    std::tuple<std::decay_t<P>...> arguments{Parameter<std::decay_t<P>>::take(next)...};
    Outputs<R>::put(stack, std::apply(kernel, arguments));
  }
};

}  // namespace tokenops

// TORCH_BOX for a kernel whose parameters may be structs with `fields()`.
#define TOKENOPS_BOX(kernel) (&::tokenops::Boxed<kernel>::call)
