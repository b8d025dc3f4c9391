// SPDX-License-Identifier: Apache-2.0
// Arguments of the merging kernels: plain pointers and shapes.
#pragma once

#include "../tensors.h"

namespace tokenops::merging {

// The members of one output token, ascending.
struct Segment {
  const int32_t* members;
  int64_t count;
};

// A token map from a user: its values are unchecked, so no index is used before it is compared with
// its bound.
struct TokenMap {
  const int32_t* assign;   // [B, N]
  const int32_t* offsets;  // [B, M + 1]
  const int32_t* members;  // [B, N]
  int64_t batch;           // B
  int64_t inputs;          // N
  int64_t outputs;         // M

  // Output token of input token n, -1 if n is dropped.
  TOKENOPS_HOST_DEVICE int64_t output_of(int64_t b, int64_t n) const {
    const int64_t m = assign[b * inputs + n];
    return 0 <= m && m < outputs ? m : -1;
  }
  // The segment of output token m, clamped to `members`, whose values may be out of range.
  TOKENOPS_HOST_DEVICE Segment segment(int64_t b, int64_t m) const {
    const int32_t* bounds = offsets + b * (outputs + 1) + m;
    const int64_t begin = bounds[0] < 0 ? 0 : bounds[0] > inputs ? inputs : bounds[0];
    const int64_t end = bounds[1] < begin ? begin : bounds[1] > inputs ? inputs : bounds[1];
    return {members + b * inputs + begin, end - begin};
  }
  TOKENOPS_HOST_DEVICE bool is_input(int64_t n) const { return 0 <= n && n < inputs; }
};

// The output token of each input token, which invert and compose turn into CSR form.
struct Assignment {
  const int32_t* assign;   // [B, N], or [B, middle] after an earlier map
  const int32_t* earlier;  // [B, N], indices into `middle` tokens, or null
  int64_t batch, inputs, middle, outputs;

  // Output token of input token n of image b, -1 if n is dropped.
  TOKENOPS_HOST_DEVICE int32_t operator()(int64_t b, int64_t n) const {
    if (earlier != nullptr) {
      n = earlier[b * inputs + n];
      if (n < 0 || n >= middle) return -1;
    }
    const int32_t m = assign[b * middle + n];
    return m >= 0 && m < outputs ? m : -1;
  }
};

enum class Reduce { sum, weighted_sum, amax, amin, prod };

template <class T>
struct MergeArgs {
  TokenMap map;
  int64_t channels;        // C
  Rows<const T> x;         // [B, N, C]
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  bool mean;               // divide by the sum of the weights, by the count if there are none
  T* out;                  // [B, M, C]
  bool stream;             // use non-temporal stores
  acc_t<T>* total;         // [B, M] or null: receives the divisor of the mean
};

template <class T>
struct UnmergeArgs {
  TokenMap map;
  int64_t channels;        // C
  Rows<const T> y;         // [B, M, C]
  const acc_t<T>* weight;  // [B, N] or null
  const acc_t<T>* scale;   // [B, M] or null
  Rows<const T> residual;  // [B, N, C], its data null if there is none
  bool mean;               // divide by the number of members
  T* out;                  // [B, N, C]
  bool stream;             // use non-temporal stores
};

template <class T>
struct PairDotArgs {
  TokenMap map;
  int64_t channels;  // C
  Rows<const T> x;   // [B, N, C]
  Rows<const T> y;   // [B, M, C]
  acc_t<T>* out;     // [B, N]
};

// Arguments of the backward of amax, amin and prod on the CPU; ReduceGradArgs on CUDA.
template <class T>
struct ReduceBackwardArgs {
  TokenMap map;
  int64_t channels;    // C
  Rows<const T> grad;  // [B, M, C]
  Rows<const T> x;     // [B, N, C]
  Rows<const T> out;   // [B, M, C], the result of the forward
  T* grad_x;           // [B, N, C]
  uint8_t* written;    // [B, N], zeros at first; 1 where a row of grad_x was written
};

}  // namespace tokenops::merging
