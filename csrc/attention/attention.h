// SPDX-License-Identifier: Apache-2.0
// Attention of one head: the data that attention_cpu.cpp and the kernels share.
//
// Logits are to base 2 and without the policy:
//   qk[m][n] = scale * log2(e) * q[m] . k[n] + log2(size[n])
//   p[m][n]  = policy[n] * exp2(qk[m][n] - m_i[m])
// The own key of a query is the key at its query_position. Letters: Nq queries, Nk keys, D width of
// q and k, Dv width of v.
#pragma once

#include "../tile.h"

namespace tokenops::attention {

// Kernels compare indices of tokens as float32, which is exact up to this number.
constexpr int64_t kMaxTokens = int64_t{1} << 24;

template <class A>
constexpr A infinity() {
  return static_cast<A>(__builtin_inf());
}
// The backward clamps exp2(qk - lse2), which has no bound where the policy is small, at 2 to this
// exponent, the largest one.
template <class A>
constexpr A kMaxExponent = sizeof(A) == 4 ? 127 : 1023;
// The same for a dropped key, which lse does not include: half the exponent, so that the square of
// a gradient does not overflow.
template <class A>
constexpr A kMaxExponentDropped = sizeof(A) == 4 ? 64 : 512;
// Policies and sizes below this count as 0, because their inverse can overflow.
template <class A>
constexpr A kMinWeight = static_cast<A>(sizeof(A) == 4 ? 0x1p-126 : 0x1p-1022);

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

constexpr int64_t kMaxBlockM = 48;    // queries of a block in the forward
constexpr int64_t kMaxBlockN = 48;    // keys of a block in the backward
constexpr int64_t kMaxQueries = 512;  // queries that are packed at a time in the backward
constexpr int64_t kFewRows = 16;      // queries per key head up to which scores do not pack k
constexpr int64_t kMaxLanes = 16;     // of a vector of any instruction set

// Rows [count][dim] of q, k, v, out or its gradient; only the listed rows, where there is a list.
template <class T>
struct Tokens {
  const T* data;
  int64_t stride;  // elements from row to row
  int64_t dim;
  const int32_t* index;  // null, or [count]: row i lies at row index[i] of data
  int64_t count;

  const T* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * stride; }
};

template <class T>
struct Head {
  using A = acc_t<T>;

  Tokens<T> q, k, v;
  const A* policy;                // [Nk] or null
  const A* log2_size;             // [Nk], -inf for padding and keys of size 0
  const int32_t* query_position;  // [Nq], null for 0, 1, 2...
  bool self_keep, exclude_self, is_causal;
  A eps;
  A scale;

  A scale_log2() const { return static_cast<A>(scale * kLog2E); }
  int64_t position(int64_t m) const { return query_position == nullptr ? m : query_position[m]; }
  bool is_valid(int64_t n) const { return log2_size[n] > -infinity<A>(); }
  bool is_kept(int64_t n) const { return policy == nullptr || policy[n] >= kMinWeight<A>; }
  // The own key of a query if the key is dropped and only self_keep lets the query attend to it, so
  // that list_keys leaves the key out; else -1. (With eps list_keys lists dropped keys too.)
  int64_t dropped_own_key(int64_t m) const {
    const int64_t n = position(m);
    const bool dropped =
        self_keep && eps == 0 && n >= 0 && n < k.count && !is_kept(n) && is_valid(n);
    return dropped ? n : -1;
  }
};

// A list of keys in ascending order. Kernels work on listed keys only: a slot is an index into the
// list.
template <class A>
struct KeyList {
  int32_t* index;  // [Nk], the key of each slot
  int32_t* slot;   // [Nk], the slot of each key, -1 if it is not listed
  int32_t* rank;   // [Nk], the number of listed keys up to and including this one
  A* policy;       // of each slot; 0 behind the last one, where kernels load whole tiles
  A* log2_size;    // of each slot; -inf behind the last one
  int64_t count;

  KeyList(Arena& arena, int64_t Nk)
      : index(arena.take<int32_t>(Nk)),
        slot(arena.take<int32_t>(Nk)),
        rank(arena.take<int32_t>(Nk)),
        policy(arena.take<A>(row_words(Nk) + kTile)),
        log2_size(arena.take<A>(row_words(Nk) + kTile)),
        count(0) {}

  // List the keys that rows attend to: the kept keys, with eps also the dropped ones. (Without eps
  // a dropped key changes only m_i, which cancels out.)
  template <class T>
  void list_keys(const Head<T>& head) {
    list(head, [&](int64_t n) { return head.eps > 0 || head.is_kept(n); });
  }
  template <class T>
  void list_dropped(const Head<T>& head) {
    list(head, [&](int64_t n) { return !head.is_kept(n); });
  }
  // A query at this position attends to the first visible() slots.
  template <class T>
  int64_t visible(const Head<T>& head, int64_t position) const {
    if (!head.is_causal) return count;
    if (position < 0) return 0;
    return head.k.count == 0 ? 0 : rank[position < head.k.count ? position : head.k.count - 1];
  }

 private:
  template <class T, class F>
  void list(const Head<T>& head, const F& is_listed) {
    count = 0;
    for (int64_t n = 0; n < head.k.count; ++n) {
      const bool listed = head.is_valid(n) && is_listed(n);
      slot[n] = listed ? static_cast<int32_t>(count) : -1;
      if (listed) {
        index[count] = static_cast<int32_t>(n);
        policy[count] = head.policy == nullptr ? 1 : head.is_kept(n) ? head.policy[n] : 0;
        log2_size[count++] = head.log2_size[n];
      }
      rank[n] = static_cast<int32_t>(count);
    }
    for (int64_t i = count; i < row_words(head.k.count) + kTile; ++i) {
      policy[i] = 0;
      log2_size[i] = -infinity<A>();
    }
  }
};

// Elements from row to row of a buffer: an odd number of cache lines, so that the elements of a
// column do not all fall into the same cache set.
template <class A>
int64_t buffer_stride(int64_t columns) {
  const int64_t line = 64 / static_cast<int64_t>(sizeof(A));
  return (round_up(columns, line) / line | 1) * line;
}

// The number of rows of a block: as many as keep a buffer [rows][columns] in the L2 cache.
template <class A>
int64_t block_rows(int64_t columns, int64_t most) {
  constexpr int64_t kBytes = 128 << 10;  // half of an L2 cache of 256 KB
  const int64_t fit = kBytes / (buffer_stride<A>(columns) * static_cast<int64_t>(sizeof(A)));
  const int64_t rows = (fit < most ? fit : most) / kTile * kTile;
  return rows < kTile ? kTile : rows;
}

// ---- forward and scores ----

// The memory of one thread, for Nk keys of width D and values of width Dv (0 for scores).
template <class T>
struct ForwardWork {
  using A = acc_t<T>;

  Arena arena;
  int64_t Nk, D, Dv, max_block_m;

  KeyList<A> keys = {arena, Nk};
  int64_t block_m = block_rows<A>(Nk, max_block_m), stride = buffer_stride<A>(Nk);
  A* k_t_panels = arena.take<A>(row_words(Nk) * D);       // k transposed: panels [D][keys]
  A* v_panels = arena.take<A>((Nk + 1) * row_words(Dv));  // panels [keys][Dv]
  A* q_rows = arena.take<A>(block_m * D);                 // [block_m][D]
  A* qk = arena.take<A>(block_m * stride);                // [block_m][stride], replaced by p
  A* row_max = arena.take<A>(block_m * kMaxLanes);        // [block_m][lanes of a vector]
  A* acc = arena.take<A>(kTile * row_words(Dv));          // p @ v of a tile [kTile][Dv]
  A* column_sums = arena.take<A>(row_words(Nk));          // [keys]
  A* scratch = arena.take<A>(kMaxLanes * row_words(D));   // of pack_transposed
};

// Outputs of one head.
template <class T>
struct ForwardResult {
  using A = acc_t<T>;

  T* out;  // [Nq][Dv], rows out_stride apart
  int64_t out_stride;
  A* lse;           // [Nq]
  A* p_eps;         // [Nq], null without eps
  int32_t* argmax;  // [Nq], null without eps
};

// The queries of one head whose attention its scores sum.
template <class A>
struct ScoreRows {
  const int32_t* index;  // [count]
  int64_t count;
  const A* dots;          // q . k [Nq][Nk], or null: then the kernel multiplies
  const A* query_weight;  // [Nq] or null
  const A* lse;           // [Nq] or null
  A* score;               // [Nk], the kernel adds to it
};

// ---- backward ----

// Inputs of the backward of one head, besides its Head.
template <class T>
struct BackwardInputs {
  using A = acc_t<T>;

  Tokens<T> dout, out;    // [Nq][Dv]
  const A* lse;           // [Nq]
  const A* p_eps;         // [Nq], with eps only
  const int32_t* argmax;  // [Nq], with eps only
  const A* grad_lse;      // [Nq] or null
  bool need_v;
  bool need_dropped;  // dpolicy of dropped keys that are not listed, without eps
};

// Gradients of one head. The kernel writes dq and adds to the others.
template <class T>
struct BackwardResult {
  using A = acc_t<T>;

  T* dq;  // [Nq][D], rows dq_stride apart
  int64_t dq_stride;
  A* dk;         // [Nk][D], without the factor scale
  A* dv;         // [Nk][Dv]
  A* dpolicy;    // [Nk], null if not needed
  A* dlog_size;  // [Nk], the gradient of ln(size); null if not needed
};

// The memory of one thread. M is the number of queries that are packed at a time, padded_m the same
// in whole vectors.
template <class T>
struct BackwardWork {
  using A = acc_t<T>;

  Arena arena;
  int64_t Nq, Nk, D, Dv;
  bool need_prefix_sums;  // of v: causal rows with eps

  int64_t M = Nq < kMaxQueries ? Nq : kMaxQueries, padded_m = round_up(M, kMaxLanes);
  int64_t block_n = block_rows<A>(M, kMaxBlockN);
  int64_t stride = buffer_stride<A>(padded_m + kTile);  // + kTile: dq is summed in whole tiles
  KeyList<A> keys = {arena, Nk}, dropped = {arena, Nk};
  int32_t* query_index = arena.take<int32_t>(Nq);  // [Nq], the queries that have a gradient
  // Listed keys in tiles [keys][D] and [keys][Dv], then the dropped ones.
  A* k_rows = arena.take<A>((Nk + 2 * kTile) * D);
  A* v_rows = arena.take<A>((Nk + 2 * kTile) * Dv);
  A* k_panels = arena.take<A>((Nk + 1) * row_words(D));     // panels [keys][D]
  A* q_t_panels = arena.take<A>(padded_m * D);              // q transposed: panels [D][M]
  A* dout_t_panels = arena.take<A>(padded_m * Dv);          // dout transposed: panels [Dv][M]
  A* q_panels = arena.take<A>((M + 1) * row_words(D));      // panels [M][D]
  A* dout_panels = arena.take<A>((M + 1) * row_words(Dv));  // panels [M][Dv]
  A* lse2 = arena.take<A>(padded_m);                        // [M], lse to base 2
  A* delta = arena.take<A>(padded_m);                       // [M], rowsum(dout * out) - grad_lse
  A* p_eps_key = arena.take<A>(padded_m);                   // [M], p_eps / number of visible keys
  A* ds_argmax = arena.take<A>(padded_m);                   // [M], what eps adds to ds at argmax
  A* position = arena.take<A>(padded_m);                    // [M], clamped to [-1, kMaxTokens]
  A* argmax = arena.take<A>(padded_m);                      // [M], -1 without eps
  A* p = arena.take<A>(block_n * stride);                   // p transposed, [block_n][stride]
  A* ds = arena.take<A>(block_n * stride);                  // ds transposed, [block_n][stride]
  A* ds_pairs = arena.take<A>(block_n / 2 * stride);        // ds in pairs of keys, to multiply by k
  // By key and lane: dpolicy, then dlog_size.
  A* lane_sums = arena.take<A>(2 * block_n * kMaxLanes);
  A* dq = arena.take<A>((padded_m + kTile) * row_words(D));  // [M][D]
  // The sum of the listed rows of v, or its Nk + 1 prefix sums.
  A* v_sums = arena.take<A>((need_prefix_sums ? Nk + 1 : 1) * row_words(Dv));
  A* acc = arena.take<A>(kTile * row_words(D > Dv ? D : Dv));  // of a tile, [kTile][D or Dv]
  A* scratch = arena.take<A>(kMaxLanes * row_words(D > Dv ? D : Dv));  // of pack_transposed
};

// ---- the kernels of one instruction set ----

template <class T>
struct Kernels {
  using A = acc_t<T>;

  void (*pack_keys)(const Head<T>&, ForwardWork<T>&, bool values);
  void (*forward)(const Head<T>&, const ForwardWork<T>&, int64_t begin, int64_t end,
                  const ForwardResult<T>&);
  void (*multiply_few)(const T* const* rows, int64_t count, const Tokens<T>& keys, A* packed,
                       A* out, int64_t stride);
  void (*scores)(const Head<T>&, const ForwardWork<T>&, const ScoreRows<A>&);
  void (*backward)(const Head<T>&, const BackwardInputs<T>&, BackwardWork<T>&, int64_t begin,
                   int64_t end, const BackwardResult<T>&);
  void (*write_rows)(const A* sums, A factor, int64_t count, int64_t dim, T* out, int64_t stride);
};

}  // namespace tokenops::attention
