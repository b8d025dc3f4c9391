// SPDX-License-Identifier: Apache-2.0
// The search for the best destinations of one image: data that the driver and its kernels share.
#pragma once

#include "../tile.h"
#include "arguments.h"

namespace tokenops::matching {

constexpr int kGroup = 96;   // most sources that are compared with a panel before the next one
constexpr int kBlock = 64;   // destinations that are packed together
constexpr int kDepth = 512;  // words of a row that are multiplied at a time

template <class A>
constexpr A infinity() {
  return static_cast<A>(__builtin_inf());
}

// The tokens of one side of an image that take part, in ascending order. Element d of head h of the
// i-th token is data[list[i] * token_stride + h * head_stride + d * stride].
template <class T>
struct Tokens {
  const T* data;
  const int32_t* list;
  int64_t count;
  int64_t heads, width;
  int64_t token_stride, head_stride, stride;
};

template <class T>
Tokens<T> tokens_of(const Metric& x, int64_t image, const int32_t* list, int64_t count) {
  return {static_cast<const T*>(x.data) + image * x.batch_stride,
          list,
          count,
          x.heads,
          x.width,
          x.token_stride,
          x.head_stride,
          x.stride};
}

// Rows are packed as words of acc_t<T>: one element, or a pair of bfloat16.
template <class T>
struct Search {
  using A = acc_t<T>;

  Tokens<T> src, dst;
  bool cosine;
  int64_t groups;     // parts of the sources
  A* panels;          // packed destinations, columns of kBlock * depth words
  A* inverse;         // 1 / length of each destination, if packed rows are not scaled by it
  A* node_max;        // [src.count]
  int32_t* node_idx;  // [src.count], indices of dst.list, or -1

  int64_t blocks() const { return (dst.count + kBlock - 1) / kBlock; }
  int64_t tiles() const { return (src.count + kTile - 1) / kTile; }
};

// The kernels of one instruction set. `work` is work_words() words of one thread.
template <class T>
struct Kernels {
  void (*pack)(const Search<T>&, int64_t block_begin, int64_t block_end, acc_t<T>* work);
  void (*search)(const Search<T>&, int64_t group_begin, int64_t group_end, acc_t<T>* work);
};

inline int64_t work_words(int64_t width) { return kGroup * (row_words(width) + kBlock); }

}  // namespace tokenops::matching
