// SPDX-License-Identifier: Apache-2.0
// What the host needs of tokenops::select on CUDA devices; in select_cuda.cu.
#pragma once

#include <optional>
#include <tuple>

#include "../cuda.cuh"
#include "order.h"

namespace tokenops::matching {

// From the operator's arguments. Tensors stay the caller's.
inline Choice make_choice(const char* op, int64_t batch, int64_t tokens, int64_t r,
                          int64_t num_prefix, const std::optional<Tensor>& is_protected,
                          const std::optional<Tensor>& source_index,
                          const std::optional<Tensor>& destination_index, int64_t stride,
                          const std::optional<double>& threshold, const Text& order) {
  constexpr int64_t kMostTokens = int64_t{1} << 30;
  STD_TORCH_CHECK(0 <= tokens && tokens <= kMostTokens, op, ": expected at most 2^30 tokens, got ",
                  tokens);
  STD_TORCH_CHECK(r <= tokens && stride >= 1, op, ": expected r <= N and stride >= 1, got r = ", r,
                  ", N = ", tokens, ", stride = ", stride);
  STD_TORCH_CHECK(order == "position" || order == "tome", op,
                  ": expected order position or tome, got ", order);
  const auto clamp = [&](int64_t value, int64_t most) {
    return static_cast<int32_t>(value < 0 ? 0 : value > most ? most : value);
  };
  // One row for all images, or one for each.
  const auto check_rows = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 1 || (t.dim() == 2 && (t.size(0) == batch || t.size(0) == 1)), op,
                    ": expected ", name, " to have one row, or one per image");
    return t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : 0;
  };
  Choice ask = {};
  ask.tokens = static_cast<int32_t>(tokens);
  ask.r = clamp(r, tokens);
  ask.outputs = threshold ? ask.tokens : ask.tokens - ask.r;
  ask.prefix = clamp(num_prefix, tokens);
  ask.limited = threshold.has_value();
  ask.threshold = threshold.value_or(0);
  ask.tome = order == "tome" && ask.r > 0;  // where nothing is to merge, the identity
  ask.rule = {static_cast<uint32_t>(clamp(stride, tokens + 1))};
  ask.destinations = ask.rule.destinations_before(ask.tokens);
  ask.sources = ask.tokens - ask.destinations;
  if (is_protected) {
    ask.protected_batch_stride = check_rows("protected", *is_protected);
    STD_TORCH_CHECK(is_protected->scalar_type() == ScalarType::Bool &&
                        is_protected->size(is_protected->dim() - 1) == tokens,
                    op, ": expected protected to be bool, one entry per token");
    ask.is_protected = static_cast<const uint8_t*>(is_protected->const_data_ptr());
    ask.protected_stride = is_protected->stride(is_protected->dim() - 1);
  }
  ask.listed = source_index && destination_index;
  if (ask.listed) {
    const auto list = [&](const char* name, const Tensor& t, int32_t* count) {
      const int64_t by_image = check_rows(name, t), size = t.size(t.dim() - 1);
      const bool wide = t.scalar_type() == ScalarType::Long;
      STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, op, ": expected ", name,
                      " of dtype int32 or int64, got ", t.scalar_type());
      STD_TORCH_CHECK(size <= kMostTokens, op, ": expected at most 2^30 indices, got ", size);
      *count = tokens == 0 ? 0 : static_cast<int32_t>(size);
      return IndexList{t.const_data_ptr(), by_image, t.stride(t.dim() - 1), wide};
    };
    ask.source_index = list("source_index", *source_index, &ask.sources);
    ask.destination_index = list("destination_index", *destination_index, &ask.destinations);
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

// The operator: maps from score and choice [B, Ns].
std::tuple<Tensor, Tensor, Tensor, Tensor> select(
    const Tensor& score, const Tensor& choice, int64_t num_tokens, int64_t r, int64_t num_prefix,
    const std::optional<Tensor>& is_protected, const std::optional<Tensor>& source_index,
    const std::optional<Tensor>& destination_index, int64_t stride,
    const std::optional<double>& threshold, const Text& order);

}  // namespace tokenops::matching
