// SPDX-License-Identifier: Apache-2.0
// Attention of one head: the data that the driver and the kernels share.
//
// Logits count in powers of two: x_ij = scale * log2(e) * q_i . k_j + log2 z_j. Letters: Nq
// queries, Nk keys, D width, Dv width of the values.
#pragma once

#include "../tile.h"

namespace tokenops::attention {

constexpr int64_t kMaxTokens = int64_t{1} << 24;  // places of tokens count in float32

template <class A>
constexpr A infinity() {
  return static_cast<A>(__builtin_inf());
}
// Logarithms to base 2: of the largest number but for rounding, and of the largest share of a row
// that a dropped key can have, whose square is a number still.
template <class A>
constexpr A kLargest = sizeof(A) == 4 ? 127 : 1023;
template <class A>
constexpr A kMaxExponent = sizeof(A) == 4 ? 64 : 512;
// Smaller policies and sizes count as zero: their inverse is no number.
template <class A>
constexpr A kSmallest = static_cast<A>(sizeof(A) == 4 ? 0x1p-126 : 0x1p-1022);

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Rows of one head; those of a list, if there is one.
template <class T>
struct Tokens {
  const T* data;
  int64_t stride;
  int64_t width;
  const int32_t* list;
  int64_t count;

  const T* row(int64_t i) const { return data + (list == nullptr ? i : list[i]) * stride; }
};

template <class T>
struct Head {
  using A = acc_t<T>;

  Tokens<T> q, k, v;        // all queries and keys
  const A* policy;          // [Nk] or null
  const A* log_size;        // [Nk], to base 2; -inf for keys that take no part
  const int32_t* position;  // [Nq], or null: 0, 1, 2...
  bool self_keep, exclude_self, is_causal;
  A eps;
  A scale;

  A slope() const { return static_cast<A>(scale * kLog2E); }
  int64_t place_of(int64_t query) const { return position == nullptr ? query : position[query]; }
  bool takes_part(int64_t key) const { return log_size[key] > -infinity<A>(); }
  bool is_kept(int64_t key) const { return policy == nullptr || policy[key] >= kSmallest<A>; }
  // The key of a query that no list of kept keys holds, or -1.
  int64_t own_dropped(int64_t query) const {
    const int64_t key = place_of(query);
    const bool is =
        self_keep && eps == 0 && key >= 0 && key < k.count && !is_kept(key) && takes_part(key);
    return is ? key : -1;
  }
};

// Keys that rows attend to, ascending. Without eps only those that are kept: the others change
// nothing but the maximum, on which nothing depends then.
template <class A>
struct KeyList {
  int32_t* list;  // [Nk]
  int32_t* slot;  // [Nk], place of a key in the list or -1
  int32_t* rank;  // [Nk], listed keys up to this one
  A* weight;      // policy of each listed key, 0 behind the last one
  A* bias;        // log2 size of each listed key, -inf behind the last one
  int64_t count;

  KeyList() = default;
  KeyList(Arena& arena, int64_t keys)
      : list(arena.take<int32_t>(keys)),
        slot(arena.take<int32_t>(keys)),
        rank(arena.take<int32_t>(keys)),
        weight(arena.take<A>(row_words(keys) + kTile)),
        bias(arena.take<A>(row_words(keys) + kTile)),
        count(0) {}

  // List the keys that are (not) kept; behind the last one, fill up to whole vectors and tiles.
  template <class T>
  void fill(const Head<T>& head, bool kept, bool all) {
    count = 0;
    for (int64_t key = 0; key < head.k.count; ++key) {
      const bool listed = head.takes_part(key) && (all || head.is_kept(key) == kept);
      slot[key] = listed ? static_cast<int32_t>(count) : -1;
      if (listed) {
        list[count] = static_cast<int32_t>(key);
        weight[count] = head.policy == nullptr ? 1 : head.is_kept(key) ? head.policy[key] : 0;
        bias[count++] = head.log_size[key];
      }
      rank[key] = static_cast<int32_t>(count);
    }
    for (int64_t i = count; i < row_words(head.k.count) + kTile; ++i) {
      weight[i] = 0;
      bias[i] = -infinity<A>();
    }
  }
  // Listed keys that a row sees whose own key is at this place.
  template <class T>
  int64_t seen(const Head<T>& head, int64_t place) const {
    if (!head.is_causal) return count;
    if (place < 0) return 0;
    return head.k.count == 0 ? 0 : rank[place < head.k.count ? place : head.k.count - 1];
  }
};

// Words from row to row of a buffer: an odd number of cache lines, so that a column of it does not
// compete for one place in the cache.
template <class A>
int64_t buffer_stride(int64_t columns) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(A));
  return (round_up(columns, line) / line | 1) * line;
}

// Rows that are worked on together: as many as keep a buffer of them in the second-level cache.
template <class A>
int64_t rows_together(int64_t columns, int64_t most) {
  constexpr int64_t kBytes = 128 << 10;
  const int64_t fit = kBytes / (buffer_stride<A>(columns) * static_cast<int64_t>(sizeof(A)));
  const int64_t rows = (fit < most ? fit : most) / kTile * kTile;
  return rows < kTile ? kTile : rows;
}

constexpr int64_t kMostRows = 48;
constexpr int64_t kFewRows = 16;       // rows by one key head for which keys are not packed
constexpr int64_t kMostQueries = 512;  // queries that a backward pass works on together

// What the forward kernels need in memory.
template <class T>
struct ForwardWork {
  using A = acc_t<T>;

  ForwardWork(Arena& arena, int64_t keys, int64_t width, int64_t value_width,
              int64_t most_rows = kMostRows)
      : keys(arena, keys),
        group(rows_together<A>(keys, most_rows)),
        stride(buffer_stride<A>(keys)),
        key_panels(arena.take<A>(row_words(keys) * width)),
        value_panels(arena.take<A>((keys + 1) * row_words(value_width))),
        rows(arena.take<A>(group * width)),
        scores(arena.take<A>(group * stride)),
        best(arena.take<A>(group * 16)),
        tile(arena.take<A>(kTile * row_words(value_width))),
        columns(arena.take<A>(row_words(keys))),
        work(arena.take<A>(16 * row_words(width))) {}

  KeyList<A> keys;
  int64_t group, stride;
  A* key_panels;    // keys, transposed: panels [words of D][columns]
  A* value_panels;  // values: panels [words of keys][columns of Dv]
  A* rows;          // queries of a group [group][words of D]
  A* scores;        // logits, then weights, of a group [group][stride]
  A* best;          // largest logit by row and lane
  A* tile;          // [kTile][Dv]
  A* columns;       // sums over rows, by key
  A* work;
};

// Where a head's rows go.
template <class T>
struct ForwardResult {
  using A = acc_t<T>;

  T* out;  // row i at out + i * stride
  int64_t stride;
  A* lse;    // [Nq]
  A* floor;  // [Nq], null without eps
  int32_t* argmax;
};

// What scores are made of: rows of a list with their weights.
template <class A>
struct ScoreRows {
  const int32_t* list;
  int64_t count;
  const A* products;  // [Nq][Nk], of queries and all keys, or null: yet to be multiplied
  const A* weight;    // [Nq] or null
  const A* lse;       // [Nq] or null
  A* score;           // [Nk], zeros
};

// What comes into a backward pass for one head, beside the inputs.
template <class T>
struct Gradient {
  using A = acc_t<T>;

  Tokens<T> g, out;  // [Nq][Dv]
  const A* lse;      // [Nq]
  const A* floor;
  const int32_t* argmax;
  const A* grad_lse;  // [Nq] or null
  bool need_v;
  bool need_dropped;  // the policy's gradient of dropped keys
};

// Where it goes; sums add up over heads and parts.
template <class T>
struct BackwardResult {
  using A = acc_t<T>;

  T* dq;  // row i at dq + i * stride
  int64_t stride;
  A *dk, *dv;         // [Nk][D], [Nk][Dv], sums
  A *dpolicy, *dlog;  // [Nk], written where needed
};

template <class T>
struct BackwardWork {
  using A = acc_t<T>;

  BackwardWork(Arena& arena, int64_t queries, int64_t keys, int64_t width, int64_t value_width,
               bool running_means)
      : kept(arena, keys),
        dropped(arena, keys),
        block(rows_together<A>(most(queries), kMostRows)),
        stride(buffer_stride<A>(round_up(most(queries), 16) + kTile)),
        rows(arena.take<int32_t>(queries)) {
    const int64_t padded = keys + 2 * kTile, lanes = round_up(most(queries), 16);
    key_rows = arena.take<A>(padded * width);
    value_rows = arena.take<A>(padded * value_width);
    key_panels = arena.take<A>((keys + 1) * row_words(width));
    query_columns = arena.take<A>(lanes * width);
    grad_columns = arena.take<A>(lanes * value_width);
    query_panels = arena.take<A>((most(queries) + 1) * row_words(width));
    grad_panels = arena.take<A>((most(queries) + 1) * row_words(value_width));
    lse = arena.take<A>(lanes);
    delta = arena.take<A>(lanes);
    spread = arena.take<A>(lanes);
    top = arena.take<A>(lanes);
    place = arena.take<A>(lanes);
    argmax = arena.take<A>(lanes);
    attention = arena.take<A>(block * stride);
    slope = arena.take<A>(block * stride);
    paired = arena.take<A>(block / 2 * stride);
    sums = arena.take<A>(2 * block * 16);
    dq = arena.take<A>((lanes + kTile) * row_words(width));
    const int64_t widest = row_words(width > value_width ? width : value_width);
    tile = arena.take<A>(kTile * widest);
    mean = arena.take<A>((running_means ? keys + 1 : 1) * row_words(value_width));
    work = arena.take<A>(16 * widest);
  }
  static int64_t most(int64_t queries) { return queries < kMostQueries ? queries : kMostQueries; }

  KeyList<A> kept, dropped;
  int64_t block, stride;
  int32_t* rows;                    // queries that have a gradient
  A *key_rows, *value_rows;         // kept keys, then dropped ones, in tiles
  A* key_panels;                    // kept keys
  A *query_columns, *grad_columns;  // transposed
  A *query_panels, *grad_panels;
  A *lse, *delta, *spread, *top, *place, *argmax;  // of each query
  A *attention, *slope, *paired;                   // y and dS of a block of keys; dS in pairs
  A* sums;                                         // for dpolicy and dlog, by key and lane
  A* dq;
  A* mean;  // sums of the values of kept keys: of all, or of the first 0, 1, 2...
  A *tile, *work;
};

// The kernels of one instruction set.
template <class T>
struct Kernels {
  using A = acc_t<T>;

  void (*pack)(const Head<T>&, ForwardWork<T>&, bool values);
  void (*attend)(const Head<T>&, const ForwardWork<T>&, int64_t begin, int64_t end,
                 const ForwardResult<T>&);
  void (*multiply_few)(const T* const* rows, int64_t count, const Tokens<T>& keys, A* packed,
                       A* out, int64_t stride);
  void (*score)(const Head<T>&, const ForwardWork<T>&, const ScoreRows<A>&);
  void (*backward)(const Head<T>&, const Gradient<T>&, BackwardWork<T>&, int64_t begin, int64_t end,
                   const BackwardResult<T>&);
  void (*write)(const A* sums, A factor, int64_t count, int64_t width, T* out, int64_t stride);
};

}  // namespace tokenops::attention
