// SPDX-License-Identifier: Apache-2.0
// What the host needs of tokenops::select on CUDA devices; in select_cuda.cu.
#pragma once

#include <optional>
#include <tuple>

#include "../cuda.cuh"
#include "arguments.h"
#include "order.h"

namespace tokenops::matching {

inline void check_tokens(const char* op, int64_t tokens) {
  STD_TORCH_CHECK(0 <= tokens && tokens <= int64_t{1} << 30, op,
                  ": expected at most 2^30 tokens, got ", tokens);
}

// The distance of the rows of a tensor: one row for all images, or one for each.
inline int64_t check_rows(const char* op, const char* name, const Tensor& t, int64_t batch) {
  STD_TORCH_CHECK(t.dim() == 1 || (t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1)), op,
                  ": expected ", name, " to have one row, or one per image");
  return t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : 0;
}

inline IndexList index_list(const char* op, const char* name, const Tensor& t, int64_t batch) {
  const int64_t by_image = check_rows(op, name, t, batch), size = t.size(t.dim() - 1);
  const bool wide = t.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, op, ": expected ", name,
                  " of dtype int32 or int64, got ", t.scalar_type());
  STD_TORCH_CHECK(size <= int64_t{1} << 30, op, ": expected at most 2^30 indices, got ", size);
  return {t.const_data_ptr(), by_image, t.stride(t.dim() - 1), wide};
}

// From the operator's arguments, where a grid has become two lists. Tensors stay the caller's.
inline Choice make_choice(const char* op, int64_t batch, int64_t tokens, int64_t r,
                          int64_t num_prefix, const std::optional<Tensor>& is_protected,
                          const std::optional<Tensor>& source_index,
                          const std::optional<Tensor>& destination_index, int64_t stride,
                          const std::optional<double>& threshold,
                          const std::optional<Tensor>& thresholds, const Text& order) {
  check_tokens(op, tokens);
  check_thresholds(op, thresholds, batch);
  STD_TORCH_CHECK(order == "position" || order == "tome", op,
                  ": expected order position or tome, got ", order);
  const auto clamp = [&](int64_t value, int64_t most) {
    return static_cast<int32_t>(value < 0 ? 0 : value > most ? most : value);
  };
  Choice ask = {};
  ask.tokens = static_cast<int32_t>(tokens);
  ask.r = static_cast<int32_t>(mergeable(tokens, r));
  ask.limited = threshold.has_value() || thresholds.has_value();
  ask.outputs = ask.limited ? ask.tokens : ask.tokens - ask.r;
  ask.prefix = clamp(num_prefix, tokens);
  ask.threshold = threshold.value_or(0);
  if (thresholds) {
    ask.thresholds = thresholds->const_data_ptr();
    ask.thresholds_stride = thresholds->stride(0);
    ask.doubles = thresholds->scalar_type() == ScalarType::Double;
  }
  ask.tome = order == "tome" && ask.r > 0;  // where nothing is to merge, the identity
  ask.rule = {static_cast<uint32_t>(clamp(stride, tokens + 1))};
  ask.destinations = ask.rule.destinations_before(ask.tokens);
  ask.sources = ask.tokens - ask.destinations;
  if (is_protected) {
    ask.protected_batch_stride = check_rows(op, "protected", *is_protected, batch);
    STD_TORCH_CHECK(is_protected->scalar_type() == ScalarType::Bool &&
                        is_protected->size(is_protected->dim() - 1) == tokens,
                    op, ": expected protected to be bool, one entry per token");
    ask.is_protected = static_cast<const uint8_t*>(is_protected->const_data_ptr());
    ask.protected_stride = is_protected->stride(is_protected->dim() - 1);
  }
  ask.listed = source_index.has_value();
  if (ask.listed) {
    const auto count = [&](const Tensor& t) {
      return tokens == 0 ? 0 : static_cast<int32_t>(t.size(t.dim() - 1));
    };
    ask.source_index = index_list(op, "source_index", *source_index, batch);
    ask.destination_index = index_list(op, "destination_index", *destination_index, batch);
    ask.sources = count(*source_index);
    ask.destinations = count(*destination_index);
  }
  return ask;
}

// The tensors of new maps: assign [B, N], offsets [B, M + 1], members [B, N], counts [B].
struct NewMaps {
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors;

  NewMaps(const cuda::Target& target, const Choice& ask, int64_t batch)
      : tensors(target.empty({batch, ask.tokens}, ScalarType::Int),
                target.empty({batch, ask.outputs + int64_t{1}}, ScalarType::Int),
                target.empty({batch, ask.tokens}, ScalarType::Int),
                target.empty({batch}, ScalarType::Int)) {}

  ChosenMap data() const {
    return {pointer(std::get<0>(tensors)), pointer(std::get<1>(tensors)),
            pointer(std::get<2>(tensors)), pointer(std::get<3>(tensors))};
  }
  static int32_t* pointer(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }
};

// A split as two lists: those that were given, those of a grid, or none.
struct Lists {
  std::optional<Tensor> source, destination;
};
Lists make_lists(const cuda::Target& target, const char* op, int64_t batch, int64_t tokens,
                 int64_t num_prefix, const std::optional<Tensor>& source_index,
                 const std::optional<Tensor>& destination_index, int64_t stride, int64_t grid_width,
                 int64_t cell_height, const std::optional<Tensor>& cell);

// The operator: maps from score and choice [B, Ns].
std::tuple<Tensor, Tensor, Tensor, Tensor> select(
    const Tensor& score, const Tensor& choice, int64_t num_tokens, int64_t r,
    const std::optional<double>& threshold, const std::optional<Tensor>& thresholds,
    const Text& order, int64_t num_prefix, const std::optional<Tensor>& is_protected,
    const std::optional<Tensor>& source_index, const std::optional<Tensor>& destination_index,
    int64_t stride, int64_t grid_width, int64_t cell_height, const std::optional<Tensor>& cell);

}  // namespace tokenops::matching
