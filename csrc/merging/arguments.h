// SPDX-License-Identifier: Apache-2.0
// What the merging operators of every device make of their arguments.
#pragma once

#include <optional>
#include <tuple>

#include "merging.h"

namespace tokenops {

using OptionalTensor = std::optional<Tensor>;

// A tensor [B, rows, C] whose last dimension is contiguous.
struct Data {
  Tensor tensor;
  ScalarType dtype;
  int64_t batch, rows, channels;
  int64_t batch_stride, row_stride;

  Data(const char* op, const char* name, const Tensor& given) : tensor(given) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(sizes.size() == 3, op, ": expected ", name, " to have 3 dimensions, got ",
                    sizes.size());
    batch = sizes[0], rows = sizes[1], channels = sizes[2];
    if (channels > 1 && tensor.stride(2) != 1) tensor = torch::stable::contiguous(tensor);
    const auto strides = tensor.strides();
    batch_stride = strides[0], row_stride = strides[1];
    dtype = tensor.scalar_type();
  }

  template <class T>
  Rows<const T> as() const {
    return {static_cast<const T*>(tensor.const_data_ptr()), batch_stride, row_stride};
  }
};

// A contiguous matrix [rows, cols] of the given dtype, for as long as the object lives.
struct Matrix {
  Tensor tensor;
  const void* data;

  Matrix(const char* op, const char* name, const Tensor& given, int64_t rows, int64_t cols,
         ScalarType dtype)
      : tensor(as_contiguous(given)), data(tensor.const_data_ptr()) {
    const auto sizes = tensor.sizes();
    STD_TORCH_CHECK(sizes.size() == 2, op, ": expected ", name, " to have 2 dimensions, got ",
                    sizes.size());
    STD_TORCH_CHECK(sizes[0] == rows && sizes[1] == cols, op, ": expected ", name, " [", rows, ", ",
                    cols, "], got [", sizes[0], ", ", sizes[1], "]");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype,
                    ", got ", tensor.scalar_type());
  }
};

inline std::optional<Matrix> matrix(const char* op, const char* name, const OptionalTensor& given,
                                    int64_t rows, int64_t cols, ScalarType dtype) {
  if (!given) return std::nullopt;
  return Matrix(op, name, *given, rows, cols, dtype);
}

template <class T>
const T* data_of(const std::optional<Matrix>& m) {
  return m ? static_cast<const T*>(m->data) : nullptr;
}

// The three index tensors of a token map from `inputs` tokens.
struct MapTensors {
  int64_t outputs;
  Matrix assign, offsets, members;
  Map map;

  MapTensors(const char* op, const Tensor& assign_, const Tensor& offsets_, const Tensor& members_,
             int64_t batch, int64_t inputs)
      : outputs(columns(op, offsets_) - 1),
        assign(op, "assign", assign_, batch, inputs, ScalarType::Int),
        offsets(op, "offsets", offsets_, batch, outputs + 1, ScalarType::Int),
        members(op, "members", members_, batch, inputs, ScalarType::Int),
        map{pointer(assign), pointer(offsets), pointer(members), batch, inputs, outputs} {}

  static const int32_t* pointer(const Matrix& m) { return static_cast<const int32_t*>(m.data); }
  static int64_t columns(const char* op, const Tensor& offsets) {
    const auto sizes = offsets.sizes();
    STD_TORCH_CHECK(sizes.size() == 2 && sizes[1] > 0, op, ": expected offsets [B, M + 1]");
    return sizes[1];
  }
};

inline void check_like(const char* op, const char* name, const Data& got, int64_t rows,
                       const Data& x) {
  STD_TORCH_CHECK(got.batch == x.batch && got.rows == rows && got.channels == x.channels, op,
                  ": expected ", name, " [", x.batch, ", ", rows, ", ", x.channels, "], got [",
                  got.batch, ", ", got.rows, ", ", got.channels, "]");
  STD_TORCH_CHECK(got.dtype == x.dtype, op, ": expected ", name, " of dtype ", x.dtype, ", got ",
                  got.dtype);
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Fold parse_fold(const char* op, const Text& reduce, bool weighted) {
  if (reduce == "sum") return weighted ? Fold::weighted_sum : Fold::sum;
  if (reduce == "mean") return Fold::sum;
  if (reduce == "amax") return Fold::amax;
  if (reduce == "amin") return Fold::amin;
  STD_TORCH_CHECK(reduce == "prod", op, ": expected reduce sum, mean, amax, amin or prod, got ",
                  reduce);
  return Fold::prod;
}

}  // namespace tokenops
