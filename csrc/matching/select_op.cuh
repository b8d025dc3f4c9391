// SPDX-License-Identifier: Apache-2.0
// What the host needs of tokenops::select on CUDA devices; in select_cuda.cu.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "../cuda.cuh"
#include "order.h"

namespace tokenops::matching {

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
    const std::optional<double>& threshold, const std::string& order);

}  // namespace tokenops::matching
