// SPDX-License-Identifier: Apache-2.0
// The selection on the CPU: an image by one thread, before and after its search.
#pragma once

#include <algorithm>

#include "../common.h"
#include "select.h"

namespace tokenops::matching {

template <class A>
struct Selection : Groups {
  Key<A>* key;
  Rank<Key<A>>* ranks;
  int32_t* src;  // sources to search for, ascending: eligible ones, then protected ones that merge
  int32_t* dst;  // eligible destinations, ascending
  int64_t eligible, num_src, num_dst;

  Selection(Arena& arena, int64_t n) {
    for (int32_t** array : {&group, &size, &first, &number, &slot, &src, &dst}) {
      *array = arena.take<int32_t>(n);
    }
    key = arena.take<Key<A>>(n);
    ranks = arena.take<Rank<Key<A>>>(n);
  }

  int32_t src_index(int t) const { return slot[t] == kNeitherSide ? -1 : slot[t]; }
  int32_t target(int t) const { return number[t]; }  // until output tokens are numbered
  void put(int i, int t) const { ranks[i] = {key[t], t}; }
  void sort(const Serial&, int count) const { std::sort(ranks, ranks + count); }
  int32_t ranked(int i) const { return ranks[i].token; }
};

// List the tokens that the search is for.
template <class A>
void list_tokens(const Request& ask, Selection<A>& s) {
  start_groups(Serial{}, ask, s);
  if (!ask.listed) {
    std::fill_n(s.slot, ask.tokens, 0);
    for (int i = 0; i < ask.num_dst; ++i) s.slot[ask.pattern.dst(i)] = INT_MIN;
  }
  s.eligible = s.num_dst = 0;
  for (int32_t t = ask.prefix; t < ask.tokens; ++t) {
    const bool takes_part = !ask.is_protected(t);
    s.src[s.eligible] = s.dst[s.num_dst] = t;
    s.eligible += takes_part && s.src_index(t) >= 0;
    s.num_dst += takes_part && s.slot[t] < 0;
  }
  s.num_src = s.eligible;
  if (ask.has_threshold) return;
  for (int32_t t = ask.prefix; t < ask.tokens && s.num_src < ask.r; ++t) {
    if (s.src_index(t) >= 0 && ask.is_protected(t)) s.src[s.num_src++] = t;
  }
}

// Write the map of `live` groups.
template <class A>
void write_map(const Request& ask, int32_t live, const Selection<A>& s, const TokenMap& out) {
  const int32_t n = ask.tokens, m = ask.outputs;
  std::fill_n(out.offsets, m + 1, 0);
  for (int32_t t = 0; t < n; ++t) {
    // More groups than outputs are left if too few sources could merge: those are dropped.
    const int32_t a = s.number[s.group[t]];
    out.assign[t] = a < m ? a : -1;
    if (a < m) ++out.offsets[a];
  }
  int32_t total = 0;
  for (int32_t a = 0; a <= m; ++a) total = out.offsets[a] += total;
  std::fill(out.members + total, out.members + n, -1);
  // From the back, which turns the end of each group into its offset.
  for (int32_t t = n; t-- > 0;) {
    if (out.assign[t] >= 0) out.members[--out.offsets[out.assign[t]]] = t;
  }
  *out.count = std::min(live, m);
}

// Write the map that changes nothing.
inline void write_identity(int32_t n, const TokenMap& out) {
  for (int32_t t = 0; t < n; ++t) out.assign[t] = out.offsets[t] = out.members[t] = t;
  out.offsets[n] = *out.count = n;
}

// The map of one image from node_max and node_idx [num_src], indices of `dst`.
template <class A>
void select_image(const Request& ask, const A* node_max, const int32_t* node_idx,
                  const Selection<A>& s, const TokenMap& out) {
  std::fill_n(s.key, ask.tokens, kNever<A>);
  if (ask.protected_tokens.data != nullptr) {
    for (int32_t t = ask.prefix; t < ask.tokens; ++t) {
      if (s.src_index(t) >= 0 && ask.is_protected(t)) s.key[t] = kProtected<A>;
    }
  }
  // Without an eligible destination, sources that have to merge take the first destination.
  int32_t otherwise = -1;
  if (s.num_dst == 0 && !ask.has_threshold) {
    const int32_t* const found =
        std::find_if(s.slot, s.slot + ask.tokens, [](int32_t slot) { return slot < 0; });
    if (found != s.slot + ask.tokens) otherwise = static_cast<int32_t>(found - s.slot);
  }
  for (int i = 0; i < s.num_src; ++i) {
    const int32_t t = s.src[i];
    if (i < s.eligible) s.key[t] = key_of(node_max[i]);
    s.number[t] = node_idx[i] < 0 ? otherwise : s.dst[node_idx[i]];
    s.put(i, t);
  }

  Rank<Key<A>> last = {kUnscored<A>, INT_MAX};
  if (ask.r < s.num_src) {
    std::nth_element(s.ranks, s.ranks + ask.r - 1, s.ranks + s.num_src);
    last = s.ranks[ask.r - 1];
  } else if (s.eligible < s.num_src) {
    last = s.ranks[s.num_src - 1];
  }
  constexpr Serial kTeam;
  merge_src<A>(kTeam, ask, last, s);
  const int live =
      ask.tome_order ? number_as_tome<A>(kTeam, ask, s) : number_by_position(kTeam, ask, s);
  write_map(ask, live, s, out);
}

}  // namespace tokenops::matching
