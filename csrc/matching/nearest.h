// SPDX-License-Identifier: Apache-2.0
// One image's search for nearest destinations: the data that the driver and the kernels share.
#pragma once

#include "../tile.h"

namespace tokenops::matching {

constexpr int kGroup = 96;   // sources that go over the destinations together, at most
constexpr int kBlock = 64;   // destinations that are packed together
constexpr int kDepth = 512;  // words of a row that are multiplied at a time

template <class A>
constexpr A infinity() {
  return static_cast<A>(__builtin_inf());
}

// The tokens of one image that take part on one side, in ascending order: element d of head h of
// the i-th one is data[list[i] * token_stride + h * head_stride + d * stride].
template <class T>
struct Tokens {
  const T* data;
  const int32_t* list;
  int64_t count;
  int64_t heads, width;
  int64_t token_stride, head_stride, stride;
};

// Rows are packed as words of acc_t<T>: one element each, or a pair of bfloat16.
template <class T>
struct Search {
  using A = acc_t<T>;

  Tokens<T> sources;
  Tokens<T> destinations;
  bool cosine;
  int64_t groups;   // the sources are searched in so many parts
  A* panels;        // packed destinations, columns of kBlock * depth words
  A* inverse;       // 1 / length of each destination, where not yet multiplied in
  A* score;         // [sources.count]
  int32_t* choice;  // [sources.count], positions in destinations.list

  int64_t blocks() const { return (destinations.count + kBlock - 1) / kBlock; }
  int64_t tiles() const { return (sources.count + kTile - 1) / kTile; }
};

// The kernels of one instruction set. `work` holds work_words() words for one thread.
template <class T>
struct Kernels {
  void (*pack)(const Search<T>&, int64_t block_begin, int64_t block_end, acc_t<T>* work);
  void (*search)(const Search<T>&, int64_t group_begin, int64_t group_end, acc_t<T>* work);
};

inline int64_t work_words(int64_t width) { return kGroup * (row_words(width) + kBlock); }

}  // namespace tokenops::matching
