// SPDX-License-Identifier: Apache-2.0
// What the matching operators of every device make of their arguments.
#pragma once

#include "../tensors.h"

namespace tokenops::matching {

inline void check_metric(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, op, ": expected [B, N, D] or [B, H, N, D]");
  STD_TORCH_CHECK(t.dim() == 3 || t.size(1) > 0, op, ": expected at least one head");
  // Places of columns count in float32: 2^24 vectors of at least four.
  STD_TORCH_CHECK(t.size(t.dim() - 2) <= int64_t{1} << 26, op, ": expected at most 2^26 tokens");
}

inline bool is_cosine(const char* op, const Text& similarity) {
  STD_TORCH_CHECK(similarity == "cosine" || similarity == "dot", op,
                  ": expected similarity cosine or dot, got ", similarity);
  return similarity == "cosine";
}

}  // namespace tokenops::matching
