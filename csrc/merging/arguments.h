// SPDX-License-Identifier: Apache-2.0
// The arguments of the merging operators on every device: as their schemas list them, then checked.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "merging.h"

namespace tokenops::merging {

using OptionalTensor = std::optional<Tensor>;

// The tensors of a token map as the schemas list them.
struct Index {
  Tensor assign;   // int32 [B, N]
  Tensor offsets;  // int32 [B, M + 1]
  Tensor members;  // int32 [B, N]

  auto fields() { return std::tie(assign, offsets, members); }
};

// ---- checked tensors ----

inline std::string text(const int64_t* sizes, size_t count) {
  std::string all;
  for (size_t i = 0; i < count; ++i) all += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
  return "[" + all + "]";
}

inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op,
                  ": expected ", name, " ", text(shape.begin(), shape.size()), ", got ",
                  text(sizes.data(), sizes.size()));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype, ", got ",
                  t.scalar_type());
}

struct Argument {
  const char* name;
  Tensor tensor;
};

// A tensor [B, rows, C] whose last dimension is contiguous.
struct Tokens : Argument {
  ScalarType dtype;
  int64_t batch, rows, channels;
  int64_t batch_stride, row_stride;

  Tokens(const char* op, const char* argument, const Tensor& given)
      : Argument{argument, given}, dtype(given.scalar_type()) {
    const auto sizes = given.sizes();
    STD_TORCH_CHECK(sizes.size() == 3, op, ": expected ", name, " to have 3 dimensions, got ",
                    sizes.size());
    batch = sizes[0], rows = sizes[1], channels = sizes[2];
    if (channels > 1 && given.stride(2) != 1) tensor = torch::stable::contiguous(given);
    batch_stride = tensor.stride(0), row_stride = tensor.stride(1);
  }
  // An argument with `rows_` rows and the batch, channels and dtype of `like`.
  Tokens(const char* op, const char* argument, const Tensor& given, int64_t rows_,
         const Tokens& like)
      : Tokens(op, argument, given) {
    check(op, name, given, like.dtype, {like.batch, rows_, like.channels});
  }

  template <class T>
  Rows<const T> as() const {
    return {static_cast<const T*>(tensor.const_data_ptr()), batch_stride, row_stride};
  }
};

template <class T>
Rows<const T> rows_of(const std::optional<Tokens>& tokens) {
  return tokens ? tokens->as<T>() : Rows<const T>{nullptr, 0, 0};
}

// A contiguous matrix [rows, columns] of the given dtype.
struct Matrix : Argument {
  Matrix(const char* op, const char* argument, const Tensor& given, int64_t rows, int64_t columns,
         ScalarType dtype)
      : Argument{argument, as_contiguous(given)} {
    check(op, name, given, dtype, {rows, columns});
  }

  template <class T>
  const T* as() const {
    return static_cast<const T*>(tensor.const_data_ptr());
  }
};

inline std::optional<Matrix> matrix(const char* op, const char* name, const OptionalTensor& given,
                                    int64_t rows, int64_t columns, ScalarType dtype) {
  if (!given) return std::nullopt;
  return Matrix(op, name, *given, rows, columns, dtype);
}

template <class T>
const T* data_of(const std::optional<Matrix>& matrix) {
  return matrix ? matrix->as<T>() : nullptr;
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline int64_t columns(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, op, ": expected ", name, " to have 2 dimensions, got ", t.dim());
  return t.size(1);
}

// The checked tensors of a token map, and their pointers.
struct MapTensors {
  Matrix assign, offsets, members;
  TokenMap map;

  MapTensors(const char* op, const Index& index, int64_t batch, int64_t inputs)
      : MapTensors(op, index, batch, inputs, columns(op, "offsets", index.offsets) - 1) {}

 private:
  MapTensors(const char* op, const Index& index, int64_t batch, int64_t inputs, int64_t outputs)
      : assign(op, "assign", index.assign, batch, inputs, ScalarType::Int),
        offsets(op, "offsets", index.offsets, batch, outputs + 1, ScalarType::Int),
        members(op, "members", index.members, batch, inputs, ScalarType::Int),
        map{assign.as<int32_t>(),
            offsets.as<int32_t>(),
            members.as<int32_t>(),
            batch,
            inputs,
            outputs} {
    STD_TORCH_CHECK(outputs >= 0, op, ": expected offsets [B, M + 1], got [B, 0]");
  }
};

// ---- checked arguments of operators ----

// The arguments of merge and merge_wavg, except for x.
struct MergeInputs {
  MapTensors index;
  Reduce reduce;
  bool mean;
  std::optional<Matrix> weight, scale;

  MergeInputs(const char* op, const Tokens& x, const Index& index_, const OptionalTensor& weight_,
              const OptionalTensor& scale_, const Text& name)
      : index(op, index_, x.batch, x.rows),
        reduce(parse(op, name, weight_.has_value())),
        mean(name == "mean"),
        weight(matrix(op, "weight", weight_, x.batch, x.rows, acc_dtype(x.dtype))),
        scale(matrix(op, "scale", scale_, x.batch, index.map.outputs, acc_dtype(x.dtype))) {
    STD_TORCH_CHECK(name == "sum" || (!weight && !scale), op,
                    ": weight and scale go with reduce sum only, got ", name);
  }
  MergeInputs(const char* op, const Tokens& x, const Index& index_, const OptionalTensor& size)
      : index(op, index_, x.batch, x.rows),
        reduce(size ? Reduce::weighted_sum : Reduce::sum),
        mean(true),
        weight(matrix(op, "size", size, x.batch, x.rows, acc_dtype(x.dtype))) {}

 private:
  static Reduce parse(const char* op, const Text& name, bool weighted) {
    if (name == "sum") return weighted ? Reduce::weighted_sum : Reduce::sum;
    if (name == "mean") return Reduce::sum;
    if (name == "amax") return Reduce::amax;
    if (name == "amin") return Reduce::amin;
    STD_TORCH_CHECK(name == "prod", op, ": expected reduce sum, mean, amax, amin or prod, got ",
                    name);
    return Reduce::prod;
  }
};

// The arguments of unmerge, except for y.
struct UnmergeInputs {
  MapTensors index;
  std::optional<Matrix> weight, scale;
  std::optional<Tokens> residual;

  UnmergeInputs(const char* op, const Tokens& y, const Index& index_, const OptionalTensor& weight_,
                const OptionalTensor& scale_, const OptionalTensor& residual_)
      : index(op, index_, y.batch, columns(op, "assign", index_.assign)),
        weight(matrix(op, "weight", weight_, y.batch, index.map.inputs, acc_dtype(y.dtype))),
        scale(matrix(op, "scale", scale_, y.batch, index.map.outputs, acc_dtype(y.dtype))) {
    check(op, "y", y.tensor, y.dtype, {y.batch, index.map.outputs, y.channels});
    if (residual_) residual.emplace(op, "residual", *residual_, index.map.inputs, y);
  }
};

// The arguments of pair_dot.
struct PairDotInputs {
  Tokens x;
  MapTensors index;
  Tokens y;

  PairDotInputs(const char* op, const Tensor& x_, const Tensor& y_, const Index& index_)
      : x(op, "x", x_), index(op, index_, x.batch, x.rows), y(op, "y", y_, index.map.outputs, x) {}
};

// The arguments of the backward of amax, amin and prod.
struct ReduceBackwardInputs {
  Tokens x;
  MapTensors index;
  Tokens grad, out;
  bool prod;

  ReduceBackwardInputs(const char* op, const Tensor& grad_, const Tensor& x_, const Tensor& out_,
                       const Index& index_, const Text& reduce)
      : x(op, "x", x_),
        index(op, index_, x.batch, x.rows),
        grad(op, "grad", grad_, index.map.outputs, x),
        out(op, "out", out_, index.map.outputs, x),
        prod(reduce == "prod") {
    STD_TORCH_CHECK(prod || reduce == "amax" || reduce == "amin", op,
                    ": expected reduce amax, amin or prod, got ", reduce);
  }
};

// The arguments of invert and compose.
struct InvertInputs {
  Matrix assign;
  std::optional<Matrix> earlier;
  Assignment map;

  InvertInputs(const char* op, const Tensor& assign_, const OptionalTensor& earlier_,
               int64_t outputs)
      : assign(op, "assign", assign_, assign_.size(0), columns(op, "assign", assign_),
               ScalarType::Int),
        map{assign.as<int32_t>(), nullptr,         assign_.size(0),
            assign_.size(1),      assign_.size(1), outputs} {
    if (earlier_) {
      map.inputs = columns(op, "earlier", *earlier_);
      earlier.emplace(op, "earlier", *earlier_, map.batch, map.inputs, ScalarType::Int);
      map.earlier = earlier->as<int32_t>();
    }
    STD_TORCH_CHECK(0 <= outputs && outputs < INT32_MAX && map.inputs < INT32_MAX, op,
                    ": expected fewer than 2^31 - 1 tokens, got ", map.inputs, " to ", outputs);
  }
};

}  // namespace tokenops::merging
