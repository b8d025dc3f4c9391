// SPDX-License-Identifier: Apache-2.0
// Decides which sources of an image merge, and orders its output tokens: written once for the CPU
// and for CUDA. A team (team.h) supplies loops and scans, the structs derived from Segments a sort.
//
// Each source has a key: sources merge in ascending order of key, then of token. The tokens that
// become one output token are a segment: a destination and the sources that merge into it, or a
// single token.
#pragma once

#include <climits>
#include <cstring>
#include <limits>
#include <type_traits>

#include "arguments.h"
#include "team.h"

namespace tokenops::matching {

// ---- keys ----

template <class A>
using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// The key of a score of -inf, which is its bit pattern: the largest key that a score has.
template <class A>
constexpr Key<A> kUnscored = ~Key<A>{0} << (std::numeric_limits<A>::digits - 1);
// The key of protected sources, which merge only after all others.
template <class A>
constexpr Key<A> kProtected = kUnscored<A> + 1;
// The key of tokens that never merge.
template <class A>
constexpr Key<A> kNever = ~Key<A>{0};

// Map a score to an integer that falls as the score rises. 0.0 and -0.0 have the same key, and NaN
// has that of -inf.
template <class A>
TOKENOPS_HOST_DEVICE Key<A> key_of(A score) {
  constexpr Key<A> kSign = Key<A>{1} << (8 * sizeof(A) - 1);
  if (score != score) return kUnscored<A>;
  if (score == 0) score = 0;
  Key<A> bits;
  memcpy(&bits, &score, sizeof(A));
  return bits & kSign ? bits : ~(bits | kSign);
}

// A source with its key. Sources merge in ascending order.
template <class K>
struct KeyedToken {
  K key;
  int32_t token;

  TOKENOPS_HOST_DEVICE bool operator<(const KeyedToken& other) const {
    return key < other.key || (key == other.key && token < other.token);
  }
};

// The largest key that merges. A threshold of NaN lets nothing merge: no score has a key of 0.
template <class A>
TOKENOPS_HOST_DEVICE Key<A> limit_of(const Request& ask) {
  if (!ask.has_threshold) return kProtected<A>;
  const auto key = [](A limit) { return limit == limit ? key_of(limit) : Key<A>{0}; };
  if (ask.thresholds.data == nullptr) return key(static_cast<A>(ask.threshold));
  return key(static_cast<A>(ask.thresholds.number(0)));
}

// ---- radix select ----

// Finds the n-th smallest number by histograms of 9-bit digits, usually in two passes. CUB cannot
// select within a block.

constexpr int kDigitBits = 9;

TOKENOPS_HOST_DEVICE int bit_width(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(x));
#else
  return x == 0 ? 0 : 64 - __builtin_clzll(x);
#endif
}

// `count` numbers lie in [low, high]; the wanted one has the rank `rank` among them, from 0.
template <class K>
struct Interval {
  K low, high;
  int rank, count;

  // Whether the wanted number is the largest one: then the whole interval is selected.
  TOKENOPS_HOST_DEVICE bool takes_all() const { return rank + 1 == count; }
  TOKENOPS_HOST_DEVICE bool holds(K x) const { return low <= x && x <= high; }

  // The digit of x is (x - low) >> shift.
  TOKENOPS_HOST_DEVICE int shift() const {
    const int bits = bit_width(static_cast<uint64_t>(high - low));
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  TOKENOPS_HOST_DEVICE int digit(K x, int shift) const {
    return static_cast<int>((x - low) >> shift);
  }
  // The interval of one digit, which `digit_count` numbers have; `before` numbers have a smaller
  // one.
  TOKENOPS_HOST_DEVICE Interval of_digit(int digit, int shift, int before, int digit_count) const {
    const K first = low + (static_cast<K>(digit) << shift);
    const K width = (K{1} << shift) - 1;
    return {first, high - first > width ? first + width : high, rank - before, digit_count};
  }
};

// ---- segments ----

// A segment of up to 2^bits members is short: its members are ordered by comparing each with each,
// count^2 steps. A longer one takes a pass over all N tokens, which is cheaper from sqrt(N) on.
TOKENOPS_HOST_DEVICE int short_bits(int64_t tokens) {
  int bits = 5;
  while (bits < 10 && (int64_t{1} << (2 * bits)) < tokens) ++bits;
  return bits;
}

// Arrays [N] of an image. A segment is named by its root: the destination, or the single token.
// Selection (CPU) and Work (CUDA) derive from this struct and add `key` and
//   src_index(t)  index of a token among the sources, negative if it is none
//   put(i, t), sort(team, count), sorted_token(i)  sort tokens by key, then by token
struct Segments {
  int32_t* root;    // of each token
  int32_t* count;   // members of each root
  int32_t* first;   // first member of each root
  int32_t* output;  // output token of each root
  int32_t* role;    // the side of each token, if the split is listed
};

// The role of a source is its index in the list, of a destination INT_MIN + its index, of any other
// token this value. A token that is listed twice gets the smallest role: destinations win.
constexpr int32_t kNeitherSide = INT_MAX;

// Make every token a segment of its own, and fill `role`.
template <class Team>
TOKENOPS_TEAM void start_segments(const Team& team, const Request& ask, const Segments& segments) {
  team.for_each(ask.tokens, [&](int t) {
    segments.root[t] = segments.first[t] = t;
    segments.count[t] = 1;
    if (ask.listed) segments.role[t] = kNeitherSide;
  });
  team.sync();
  if (!ask.listed) return;
  team.for_each(ask.num_dst, [&](int i) { team.min(&segments.role[ask.dst(i)], INT_MIN + i); });
  team.for_each(ask.num_src, [&](int i) { team.min(&segments.role[ask.src(i)], i); });
  team.sync();
}

// Merge source t into `target`, which is negative if it has none.
template <class Team>
TOKENOPS_TEAM void merge_one(const Team& team, const Request& ask, int t, int32_t target,
                             const Segments& segments) {
  if (target < 0) return;
  segments.root[t] = target;
  team.add(&segments.count[target], 1);
  if (!ask.tome_order) team.min(&segments.first[target], t);
}

// Number the output tokens by their first member. Returns how many there are.
template <class Team>
TOKENOPS_TEAM int number_by_position(const Team& team, const Request& ask,
                                     const Segments& segments) {
  return enumerate(
      team, ask.tokens, [&](int t) { return segments.first[segments.root[t]] == t; },
      [&](int t, int n) { segments.output[segments.root[t]] = n; });
}

// Number the output tokens in ToMe's order: prefix, tokens of neither side, unmerged sources,
// destinations as they are listed. As in ToMe, sources come by falling score, but by position if
// there is a prefix. Returns how many output tokens there are.
template <class A, class Team, class Work>
TOKENOPS_TEAM int number_as_tome(const Team& team, const Request& ask, const Work& work) {
  const auto is_root = [&](int t) { return t >= ask.prefix && work.root[t] == t; };
  const auto has_score = [&](int t) { return work.key[t] < kUnscored<A>; };
  int sorted = 0;
  if (ask.by_score()) {
    sorted = enumerate(
        team, ask.tokens, [&](int t) { return is_root(t) && has_score(t); },
        [&](int t, int n) { work.put(n, t); });
    team.sync();
    work.sort(team, sorted);
  }
  int next = ask.prefix;
  const auto number = [&](int t, int n) { work.output[t] = next + n; };
  team.for_each(ask.prefix, [&](int t) { work.output[t] = t; });
  if (ask.listed) {
    next += enumerate(
        team, ask.tokens, [&](int t) { return is_root(t) && work.role[t] == kNeitherSide; },
        number);
  }
  team.for_each(sorted, [&](int i) { number(work.sorted_token(i), i); });
  next += sorted;
  next += enumerate(
      team, ask.tokens,
      [&](int t) {
        return is_root(t) && work.src_index(t) >= 0 && !(ask.by_score() && has_score(t));
      },
      number);
  if (ask.listed) {
    return next + enumerate(
                      team, ask.num_dst,
                      [&](int i) {
                        const int32_t t = ask.dst(i);
                        return t >= ask.prefix && work.role[t] == INT_MIN + i;
                      },
                      [&](int i, int n) { number(ask.dst(i), n); });
  }
  const int in_prefix = ask.pattern.dst_before(ask.prefix), rest = ask.num_dst - in_prefix;
  team.for_each(rest, [&](int i) { number(ask.pattern.dst(in_prefix + i), i); });
  return next + rest;
}

}  // namespace tokenops::matching
