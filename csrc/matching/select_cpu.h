// SPDX-License-Identifier: Apache-2.0
// The selection on the CPU: one thread for an image lists its tokens, and after the search merges.
#pragma once

#include <algorithm>

#include "../common.h"
#include "select.h"

namespace tokenops::matching {

template <class A>
struct Selection : Segments {
  Key<A>* key;
  KeyedToken<Key<A>>* keyed;
  int32_t* src;  // unprotected sources, ascending, then the protected ones that may have to merge
  int32_t* dst;  // unprotected destinations, ascending
  int64_t num_unprotected, num_src, num_dst;  // unprotected sources; lengths of `src` and `dst`

  Selection(Arena& arena, int64_t n) {
    for (int32_t** array : {&root, &count, &first, &output, &role, &src, &dst}) {
      *array = arena.take<int32_t>(n);
    }
    key = arena.take<Key<A>>(n);
    keyed = arena.take<KeyedToken<Key<A>>>(n);
  }

  int32_t src_index(int t) const { return role[t] == kNeitherSide ? -1 : role[t]; }
  void put(int i, int t) const { keyed[i] = {key[t], t}; }
  void sort(const Serial&, int count) const { std::sort(keyed, keyed + count); }
  int32_t sorted_token(int i) const { return keyed[i].token; }
};

// List the sources and destinations that the search compares.
template <class A>
void list_tokens(const Request& ask, Selection<A>& s) {
  start_segments(Serial{}, ask, s);
  if (!ask.listed) {  // the sides suffice, no one asks for the indices
    std::fill_n(s.role, ask.tokens, 0);
    for (int i = 0; i < ask.num_dst; ++i) s.role[ask.pattern.dst(i)] = INT_MIN;
  }
  s.num_unprotected = s.num_dst = 0;
  for (int32_t t = ask.prefix; t < ask.tokens; ++t) {  // append to both lists, without a branch
    const bool takes_part = !ask.is_protected(t);
    s.src[s.num_unprotected] = s.dst[s.num_dst] = t;
    s.num_unprotected += takes_part && s.src_index(t) >= 0;
    s.num_dst += takes_part && s.role[t] < 0;
  }
  s.num_src = s.num_unprotected;
  if (ask.has_threshold) return;
  for (int32_t t = ask.prefix; t < ask.tokens && s.num_src < ask.r; ++t) {
    if (s.src_index(t) >= 0 && ask.is_protected(t)) s.src[s.num_src++] = t;
  }
}

// Write the map of `num_segments` segments. If too few sources could merge, there are more segments
// than outputs: drop the last ones.
template <class A>
void write_map(const Request& ask, int32_t num_segments, const Selection<A>& s,
               const TokenMap& out) {
  const int32_t tokens = ask.tokens, outputs = ask.outputs;  // the stores may alias `ask`
  for (int32_t t = 0; t < tokens; ++t) {
    const int32_t m = s.output[s.root[t]];
    out.assign[t] = m < outputs ? m : -1;
  }
  invert_image(out.assign, tokens, outputs, out.offsets, out.members);
  *out.count = std::min(num_segments, outputs);
}

// Write the map of an image in which nothing merges.
inline void write_identity(int32_t n, const TokenMap& out) {
  for (int32_t t = 0; t < n; ++t) out.assign[t] = out.offsets[t] = out.members[t] = t;
  out.offsets[n] = *out.count = n;
}

// Write the map of one image. node_max and node_idx are [num_src]; node_idx are indices of `dst`.
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
  int32_t fallback = -1;
  if (s.num_dst == 0 && !ask.has_threshold) {
    const int32_t* const found =
        std::find_if(s.role, s.role + ask.tokens, [](int32_t role) { return role < 0; });
    if (found != s.role + ask.tokens) fallback = static_cast<int32_t>(found - s.role);
  }
  for (int i = 0; i < s.num_src; ++i) {
    const int32_t t = s.src[i];
    if (i < s.num_unprotected) s.key[t] = key_of(node_max[i]);
    s.output[t] = node_idx[i] < 0 ? fallback : s.dst[node_idx[i]];
    s.put(i, t);
  }

  // Bring the sources that merge to the front. Protected sources that are not in `src` do not
  // merge.
  const int num_merging = std::min<int>(ask.r, s.num_src);
  if (num_merging < s.num_src) {
    std::nth_element(s.keyed, s.keyed + num_merging, s.keyed + s.num_src);
  }
  constexpr Serial kTeam;
  const Key<A> limit = limit_of<A>(ask);
  for (int i = 0; i < num_merging; ++i) {
    const auto [key, t] = s.keyed[i];
    if (key <= limit) merge_one(kTeam, ask, t, s.output[t], s);
  }
  const int num_segments =
      ask.tome_order ? number_as_tome<A>(kTeam, ask, s) : number_by_position(kTeam, ask, s);
  write_map(ask, num_segments, s, out);
}

}  // namespace tokenops::matching
