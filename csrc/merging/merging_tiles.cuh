// SPDX-License-Identifier: Apache-2.0
// How merging on CUDA divides its work. A block computes a tile of the result: some rows of one
// image by some packs of channels. It copies the tile's part of the token map to shared memory;
// then each thread computes every kThreads-th pack of the tile, with kInFlight loads at a time.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../cuda.cuh"
#include "merging.h"

// For loops whose length is unknown at compile time: unrolled, they only take more registers.
#if defined(TOKENOPS_EMULATE)
#define TOKENOPS_ROLL
#else
#define TOKENOPS_ROLL _Pragma("unroll 1")
#endif

namespace tokenops::merging {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;   // packs that a thread loads before it uses the first one
constexpr int kStaged = 1024;  // most members of a tile that are copied to shared memory
constexpr int kLong = 32;      // a whole block reduces a segment that has more members
constexpr int kTensors = 8;    // most tensors of one launch

// Elements of a pack of 16 bytes.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));
// Blocks that must fit on a multiprocessor, which limits the registers of a thread.
template <class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) ? 2 : 4;
template <class T>
constexpr int kMergeBlocks = sizeof(T) == sizeof(double) ? 2 : 3;

// ---- tiles ----

// How rows [batch, rows, packs] are divided into tiles, one for each block.
struct Tiling {
  int batch, rows, packs;
  int tile_rows, tile_packs;
  int row_tiles, column_tiles;

  int64_t blocks() const { return int64_t{batch} * row_tiles * column_tiles; }
};

struct Tile {
  int64_t image;
  int row, rows;    // the first row, and the number of rows
  int pack, packs;  // the first pack of channels, and the number of packs

  // Blocks go through one image after the other.
  static __device__ __forceinline__ Tile in_order(const Tiling& all, unsigned block) {
    const int by_column = static_cast<int>(block / all.column_tiles);
    return at(all, by_column / all.row_tiles, by_column % all.row_tiles, block % all.column_tiles);
  }
  // Blocks begin with the last rows of all images. The last output token may have all pruned tokens
  // as members (`prune` with `fuse`), and the longest segment should not begin last.
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

// Iterates over the packs of a tile that a thread computes, without a division for each of them.
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

// V elements as they are in memory; an element is converted when it is read.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  static constexpr bool kPairs = sizeof(T) == 2 && V > 1;
  using Word = std::conditional_t<sizeof(T) == 2 && V == 1, uint16_t, uint32_t>;
  static constexpr int kWords = static_cast<int>(sizeof(T) * V / sizeof(Word));
  Word word[kWords];

  static __device__ __forceinline__ Pack at(const T* data) {
    return *reinterpret_cast<const Pack*>(data);
  }
  // The pack of values[first], ..., values[first + V - 1].
  template <int Count>
  static __device__ __forceinline__ Pack of(const acc_t<T> (&values)[Count], int first = 0) {
    Pack pack;
    TOKENOPS_UNROLL
    for (int i = 0; i < V; ++i) {
      const T value = static_cast<T>(values[first + i]);
      if constexpr (kPairs) {
        uint16_t bits;
        std::memcpy(&bits, &value, sizeof(T));
        pack.word[i / 2] = i % 2 == 0 ? bits : pack.word[i / 2] | uint32_t{bits} << 16;
      } else {
        std::memcpy(pack.word + i * kWords / V, &value, sizeof(T));
      }
    }
    return pack;
  }
  static __device__ __forceinline__ Pack zero() {
    Pack pack;
    TOKENOPS_UNROLL
    for (int i = 0; i < kWords; ++i) pack.word[i] = 0;
    return pack;
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
    if constexpr (sizeof(Pack) == 16) {  // the compiler splits an assignment into words
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(data)),
                   "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                   : "memory");
      return;
    }
#endif
    *reinterpret_cast<Pack*>(data) = *this;
  }
};

// ---- rows of a tile ----

// Scales an accumulated row by times / over. Where the result is rounded to half precision, a
// product with the reciprocal is as exact: there, `over` holds the reciprocal of the divisor.
template <class T>
struct Factor {
  using A = acc_t<T>;
  static constexpr bool kHalf = sizeof(T) < sizeof(A);
  A times, over;

  // 1 / total, both parts scaled by a power of two so that the reciprocal does not overflow.
  static __device__ __forceinline__ Factor mean(A total) {
    const A magnitude = total < 0 ? -total : total, big = A(uint64_t{1} << 63);
    const A times = magnitude < 1 / big ? big : magnitude > big ? 1 / big : A(1);
    return {times, kHalf ? 1 / (total * times) : total * times};
  }
  // The second argument of `apply`.
  __device__ __forceinline__ A reciprocal() const { return kHalf || over == 1 ? over : 1 / over; }
  // x * times / over, rounded as a division: the remainder corrects the quotient, unless it is
  // infinite or NaN.
  __device__ __forceinline__ A apply(A x, A reciprocal) const {
    x *= times;
    const A quotient = x * reciprocal;
    if (kHalf) return quotient;
    const A remainder = std::fma(-quotient, over, x);
    return remainder - remainder == 0 ? std::fma(remainder, reciprocal, quotient) : quotient;
  }
};

template <class T>
struct alignas(16) MergedRow {
  Factor<T> factor;
  int begin, count;  // its segment, as indices of the tile's members
};

// The members of a tile's rows and their weights: staged in shared memory if there are at most
// kStaged, else read from global memory.
template <class A>
struct TileMembers {
  const int32_t* list;  // members of the image from `begin` on
  const A* weight;      // by index of `list` if staged, else by token; or null
  int inputs, begin, count;
  bool staged;

  __device__ __forceinline__ TileMembers(const TokenMap& map, const A* weights, const Tile& tile,
                                         int32_t* shared_list, A* shared_weights) {
    const int32_t* const members = map.members + tile.image * map.inputs;
    const Segment last = map.segment(tile.image, tile.row + tile.rows - 1);
    inputs = static_cast<int>(map.inputs);
    begin = static_cast<int>(map.segment(tile.image, tile.row).members - members);
    count = static_cast<int>(last.members + last.count - members) - begin;
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
  // The i-th token, clamped to the image.
  __device__ __forceinline__ int token(int i) const {
    const int n = list[i];
    return n < 0 ? 0 : n < inputs ? n : inputs - 1;
  }
  __device__ __forceinline__ A weight_of(int i) const {
    return weight == nullptr ? A(1) : weight[staged ? i : token(i)];
  }
};

}  // namespace tokenops::merging
