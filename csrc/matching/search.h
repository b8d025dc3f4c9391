// SPDX-License-Identifier: Apache-2.0
// The search for the best destinations of one image on the CPU: the data that matching_cpu.cpp
// passes to matching_kernels.h. Packed rows consist of words (tile_kernels.h) of type acc_t<T>.
#pragma once

#include "../tile.h"
#include "arguments.h"

namespace tokenops::matching {

constexpr int kGroup = 96;  // most sources that share a pass over all panels of destinations
constexpr int kBlock = 64;  // destinations of a block; a thread packs whole blocks

template <class A>
constexpr A infinity() {
  return static_cast<A>(__builtin_inf());
}

// The sources or destinations of an image that take part, ascending.
struct Tokens {
  Metric metric;  // of this image
  const int32_t* list;
  int64_t count;
};

template <class T>
struct Search {
  using A = acc_t<T>;

  Tokens src, dst;
  bool cosine;
  int64_t groups;     // number of groups that the sources are divided into
  A* panels;          // packed destinations
  A* inverse;         // factor of each destination's scores, see load_row in matching_kernels.h
  A* node_max;        // [src.count]
  int32_t* node_idx;  // [src.count], indices of dst.list, or -1

  int64_t blocks() const { return (dst.count + kBlock - 1) / kBlock; }
  int64_t tiles() const { return (src.count + kTile - 1) / kTile; }
};

// The kernels of one instruction set. `work` is scratch of one thread: kGroup packed rows.
template <class T>
struct Kernels {
  void (*pack)(const Search<T>&, int64_t block_begin, int64_t block_end, acc_t<T>* work);
  void (*search)(const Search<T>&, int64_t group_begin, int64_t group_end, acc_t<T>* work);
};

}  // namespace tokenops::matching
