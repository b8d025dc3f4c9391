// SPDX-License-Identifier: Apache-2.0
// What the merging operators hand to their kernels: plain pointers and shapes.
#pragma once

#include "../tensors.h"

namespace tokenops {

// Members of one output token, ascending.
struct Members {
  const int32_t* index;
  int64_t count;
};

// A token map as it came from the user: an index is used only after a comparison with its bound.
struct Map {
  const int32_t* assign;   // [B, N]
  const int32_t* offsets;  // [B, M + 1]
  const int32_t* members;  // [B, N]
  int64_t batch;           // B
  int64_t inputs;          // N
  int64_t outputs;         // M

  // Output token of input token n, or -1 where it has none.
  TOKENOPS_HOST_DEVICE int64_t output_of(int64_t b, int64_t n) const {
    const int64_t m = assign[b * inputs + n];
    return 0 <= m && m < outputs ? m : -1;
  }
  // Entries of `members` for output token m; each may still be out of range.
  TOKENOPS_HOST_DEVICE Members members_of(int64_t b, int64_t m) const {
    const int32_t* ends = offsets + b * (outputs + 1) + m;
    const int64_t begin = ends[0] < 0 ? 0 : ends[0] > inputs ? inputs : ends[0];
    const int64_t end = ends[1] < begin ? begin : ends[1] > inputs ? inputs : ends[1];
    return {members + b * inputs + begin, end - begin};
  }
  TOKENOPS_HOST_DEVICE bool is_input(int64_t n) const { return 0 <= n && n < inputs; }
};

// How members become one row, before it is scaled or divided.
enum class Fold { sum, weighted_sum, amax, amin, prod };

template <class T>
struct MergeArgs {
  Map map;
  int64_t channels;        // C
  Rows<const T> x;         // [B, N, C]
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  bool average;            // divide by the sum of the weights, without them by the count
  T* out;                  // [B, M, C]
  bool stream;             // store past the caches
  acc_t<T>* total;         // [B, M] or null: receives what the average divides by
};

template <class T>
struct UnmergeArgs {
  Map map;
  int64_t channels;        // C
  Rows<const T> y;         // [B, M, C]
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  bool has_residual;
  Rows<const T> residual;  // [B, N, C]
  bool mean;
  T* out;       // [B, N, C]
  bool stream;  // store past the caches
};

template <class T>
struct PairDotArgs {
  Map map;
  int64_t channels;  // C
  Rows<const T> x;   // [B, N, C]
  Rows<const T> y;   // [B, M, C]
  acc_t<T>* out;     // [B, N]
};

template <class T>
struct SelectBackwardArgs {
  Map map;
  int64_t channels;    // C
  Rows<const T> grad;  // [B, M, C]
  Rows<const T> x;     // [B, N, C]
  Rows<const T> best;  // [B, M, C], the result of the forward pass
  T* out;              // [B, N, C]
  uint8_t* visited;    // [B, N], zeros: set where a row of `out` was written
};

}  // namespace tokenops
