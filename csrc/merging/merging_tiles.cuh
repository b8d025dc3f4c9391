// SPDX-License-Identifier: Apache-2.0
// How merging on CUDA divides its work. A block makes a tile of the result: some rows of one image
// by some packs of channels. What the tile needs of the token map it puts into shared memory; then
// its threads take the tile's packs, every kThreads-th one each, with several on their way at once.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../cuda.cuh"
#include "merging.h"

// Loops of unknown length, whose copies would only take registers.
#if defined(TOKENOPS_EMULATE)
#define TOKENOPS_ROLL
#else
#define TOKENOPS_ROLL _Pragma("unroll 1")
#endif

namespace tokenops::merging {

constexpr int kThreads = 256;
constexpr int kAhead = 4;      // packs that a thread asks for before it uses the first of them
constexpr int kStaged = 1024;  // members of a tile that shared memory has room for
constexpr int kLong = 32;      // a row of more members is summed by the whole block
constexpr int kTensors = 8;    // most tensors of one launch

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
// Blocks that registers leave room for on a multiprocessor, at least.
template <class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 2 : 4;
template <class T>
constexpr int kMergeBlocks = sizeof(T) == sizeof(double) ? 2 : 3;

// ---- tiles ----

// How rows [B, rows, packs] are cut into tiles, one for each block.
struct Tiling {
  int batch, rows, packs;
  int tile_rows, tile_packs;
  int row_tiles, column_tiles;

  int64_t blocks() const { return int64_t{batch} * row_tiles * column_tiles; }
};

struct Tile {
  int64_t image;
  int row, rows;  // the first one, and how many there are
  int pack, packs;

  // Images one after the other.
  static __device__ __forceinline__ Tile in_order(const Tiling& all, unsigned block) {
    const int by_column = static_cast<int>(block / all.column_tiles);
    return at(all, by_column / all.row_tiles, by_column % all.row_tiles, block % all.column_tiles);
  }
  // The last rows of all images first: there the one token is that takes all pruned ones, and what
  // takes longest should not begin last.
  static __device__ __forceinline__ Tile last_rows_first(const Tiling& all, unsigned block) {
    const int by_column = static_cast<int>(block / all.column_tiles);
    return at(all, by_column % all.batch, all.row_tiles - 1 - by_column / all.batch,
              block % all.column_tiles);
  }

 private:
  static __device__ __forceinline__ Tile at(const Tiling& all, int image, int row_tile,
                                            int column_tile) {
    const int row = row_tile * all.tile_rows, pack = column_tile * all.tile_packs;
    const int rows = all.rows - row, packs = all.packs - pack;
    return {image, row, rows < all.tile_rows ? rows : all.tile_rows, pack,
            packs < all.tile_packs ? packs : all.tile_packs};
  }
};

// The packs of a tile that a thread takes, from row to row, without a division for each.
struct Walk {
  int row, pack, columns, step_rows, step_packs;

  explicit __device__ __forceinline__ Walk(int columns)
      : row(static_cast<int>(threadIdx.x) / columns),
        pack(static_cast<int>(threadIdx.x) % columns),
        columns(columns),
        step_rows(kThreads / columns),
        step_packs(kThreads % columns) {}

  __device__ __forceinline__ void step() {
    row += step_rows, pack += step_packs;
    if (pack >= columns) pack -= columns, ++row;
  }
};

// ---- packs ----

// V elements as they are stored, in whole registers for as long as nobody looks at them.
template <class T, int V>
struct alignas(sizeof(T) * V) Raw {
  static constexpr bool kPairs = sizeof(T) == 2 && V > 1;
  using Word = std::conditional_t<sizeof(T) == 2 && V == 1, uint16_t, uint32_t>;
  static constexpr int kWords = static_cast<int>(sizeof(T) * V / sizeof(Word));
  Word word[kWords];

  static __device__ __forceinline__ Raw at(const T* data) {
    return *reinterpret_cast<const Raw*>(data);
  }
  // V of the values, from `first` on.
  template <int Count>
  static __device__ __forceinline__ Raw of(const acc_t<T> (&values)[Count], int first = 0) {
    Raw raw;
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) {
      const T value = static_cast<T>(values[first + i]);
      if constexpr (kPairs) {
        uint16_t bits;
        std::memcpy(&bits, &value, sizeof(T));
        raw.word[i / 2] = i % 2 == 0 ? bits : raw.word[i / 2] | uint32_t{bits} << 16;
      } else {
        std::memcpy(raw.word + i * kWords / V, &value, sizeof(T));
      }
    }
    return raw;
  }
  static __device__ __forceinline__ Raw zero() {
    Raw raw;
    TOKENOPS_UNROLL
    for (int i = 0; i < kWords; ++i) raw.word[i] = 0;
    return raw;
  }
  __device__ __forceinline__ acc_t<T> operator[](int i) const {
    T value;
    if constexpr (kPairs) {
      const uint16_t bits = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
      std::memcpy(&value, &bits, sizeof(T));
    } else {
      std::memcpy(&value, word + i * kWords / V, sizeof(T));
    }
    return static_cast<acc_t<T>>(value);
  }
  __device__ __forceinline__ void store(T* data) const {
#if !defined(TOKENOPS_EMULATE)
    if constexpr (sizeof(Raw) == 16) {  // an assignment would be taken apart into its words
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(data)),
                   "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Raw*>(data) = *this;
  }
};

// ---- what the rows of a tile are made of ----

// What an accumulated row is multiplied with, and then divided by. For a result that is rounded to
// a shorter type, the reciprocal is as exact, and kept in place of the divisor.
template <class T>
struct Factor {
  using A = acc_t<T>;
  static constexpr bool kShort = sizeof(T) < sizeof(A);
  A times, over;

  // A power of two keeps the reciprocal of any total finite and exact.
  static __device__ __forceinline__ Factor average(A total) {
    const A size = total < 0 ? -total : total, big = A(uint64_t{1} << 63);
    const A times = size < 1 / big ? big : size > big ? 1 / big : A(1);
    return {times, kShort ? 1 / (total * times) : total * times};
  }
  // What `on` takes.
  __device__ __forceinline__ A reciprocal() const { return kShort || over == 1 ? over : 1 / over; }
  // x * times / over as division rounds it: its remainder corrects the product.
  __device__ __forceinline__ A on(A x, A reciprocal) const {
    x *= times;
    const A quotient = x * reciprocal;
    if (kShort) return quotient;
    const A left = std::fma(-quotient, over, x);
    return left - left == 0 ? std::fma(left, reciprocal, quotient) : quotient;
  }
};

template <class T>
struct alignas(16) MergedRow {
  Factor<T> factor;
  int begin, count;  // of its members among those of the tile
};

// The members of a tile's rows, with their weights: in shared memory if all of them fit there, else
// where they came from.
template <class A>
struct TileMembers {
  const int32_t* list;  // of the members from `begin` on
  const A* weight;      // of the same, or of tokens, or null
  int inputs, begin, count;
  bool staged;

  __device__ __forceinline__ TileMembers(const Map& map, const A* weights, const Tile& tile,
                                         int32_t* shared_list, A* shared_weights) {
    const int32_t* const members = map.members + tile.image * map.inputs;
    const Members last = map.members_of(tile.image, tile.row + tile.rows - 1);
    inputs = static_cast<int>(map.inputs);
    begin = static_cast<int>(map.members_of(tile.image, tile.row).index - members);
    count = static_cast<int>(last.index + last.count - members) - begin;
    list = members + begin;
    weight = weights != nullptr ? weights + tile.image * map.inputs : nullptr;
    staged = count <= kStaged;
    if (!staged) return;
    TOKENOPS_ROLL
    for (int i = threadIdx.x; i < count; i += kThreads) {
      shared_list[i] = list[i];
      if (weight != nullptr) shared_weights[i] = weight[token(i)];
    }
    list = shared_list;
    if (weight != nullptr) weight = shared_weights;
  }
  // The i-th token; a wild one is taken for the nearest that is there.
  __device__ __forceinline__ int token(int i) const {
    const int n = list[i];
    return n < 0 ? 0 : n < inputs ? n : inputs - 1;
  }
  __device__ __forceinline__ A weight_of(int i) const {
    return weight == nullptr ? A(1) : weight[staged ? i : token(i)];
  }
};

}  // namespace tokenops::merging
