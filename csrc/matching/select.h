// SPDX-License-Identifier: Apache-2.0
// Which sources of an image merge and how its output tokens are ordered, written once for the CPU
// and for CUDA. The teams supply loops, scans and sorts.
//
// Each source has a key: sources merge in ascending order of key, then of token. The tokens that
// become one output token are a group: a destination and the sources that merge into it, or a
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

// The key of a score of -inf, the largest key that a score has.
template <class A>
constexpr Key<A> kUnscored = ~Key<A>{0} << (std::numeric_limits<A>::digits - 1);
// The key of protected sources, which are a last resort.
template <class A>
constexpr Key<A> kProtected = kUnscored<A> + 1;
// The key of tokens that never merge.
template <class A>
constexpr Key<A> kNever = ~Key<A>{0};

// The key falls where the score rises. Both zeros have one key, and NaN has that of -inf.
template <class A>
TOKENOPS_HOST_DEVICE Key<A> key_of(A score) {
  constexpr Key<A> kSign = Key<A>{1} << (8 * sizeof(A) - 1);
  if (score != score) return kUnscored<A>;
  if (score == 0) score = 0;
  Key<A> bits;
  memcpy(&bits, &score, sizeof(A));
  return bits & kSign ? bits : ~(bits | kSign);
}

// A source in the order in which sources merge.
template <class K>
struct Rank {
  K key;
  int32_t token;

  TOKENOPS_HOST_DEVICE bool operator<(const Rank& other) const {
    return key < other.key || (key == other.key && token < other.token);
  }
};

// The largest key that merges; no score has a key of 0.
template <class A>
TOKENOPS_HOST_DEVICE Key<A> limit_of(const Request& ask) {
  if (!ask.has_threshold) return kProtected<A>;
  const auto key = [](A limit) { return limit == limit ? key_of(limit) : Key<A>{0}; };
  if (ask.thresholds.data == nullptr) return key(static_cast<A>(ask.threshold));
  return key(static_cast<A>(ask.thresholds.number(0)));
}

// ---- radix select ----

// The n-th smallest of many numbers by histograms of 9-bit digits, usually in two passes; CUB has
// no selection within a block.

constexpr int kDigitBits = 9;

TOKENOPS_HOST_DEVICE int bit_width(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(x));
#else
  return x == 0 ? 0 : 64 - __builtin_clzll(x);
#endif
}

// `count` numbers are in [low, high]. The wanted one is larger than `rank` of them.
template <class K>
struct Interval {
  K low, high;
  int rank, count;

  // Whether the wanted number is the largest of the interval.
  TOKENOPS_HOST_DEVICE bool found() const { return rank + 1 == count; }
  TOKENOPS_HOST_DEVICE bool holds(K x) const { return low <= x && x <= high; }

  // A digit is the distance from `low` without its lowest `shift` bits.
  TOKENOPS_HOST_DEVICE int shift() const {
    const int bits = bit_width(static_cast<uint64_t>(high - low));
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  TOKENOPS_HOST_DEVICE int digit(K x, int shift) const {
    return static_cast<int>((x - low) >> shift);
  }
  // The `digit_count` numbers of one digit; `before` numbers have smaller digits.
  TOKENOPS_HOST_DEVICE Interval of_digit(int digit, int shift, int before, int digit_count) const {
    const K first = low + (static_cast<K>(digit) << shift);
    const K width = (K{1} << shift) - 1;
    return {first, high - first > width ? first + width : high, rank - before, digit_count};
  }
};

// ---- groups ----

// The members of a group up to 2^bits are ordered by comparing each with each, which for half of
// N / size such groups costs no more than a pass over all tokens for each larger group.
TOKENOPS_HOST_DEVICE int compared_bits(int64_t tokens) {
  int bits = 5;
  while (bits < 10 && (int64_t{1} << (2 * bits)) < tokens) ++bits;
  return bits;
}

// Arrays [N] of an image. A device adds `key` and
//   src_index(t)  index of a token among the sources, -1 if it is none
//   target(t)     the destination of a source, -1 for none
//   put(i, t), sort(team, count), ranked(i)  tokens in the order of Rank
struct Groups {
  int32_t* group;   // the token that stands for a token's group: its destination, or itself
  int32_t* size;    // members of a group
  int32_t* first;   // the first member of a group
  int32_t* number;  // the output token of a group
  int32_t* slot;    // the sides of a listed split
};

// `slot` holds the index in its list of each source, INT_MIN + index of each destination, and this
// value for other tokens. Of a token that is listed more than once the smallest value counts.
constexpr int32_t kNeitherSide = INT_MAX;

// Make every token a group.
template <class Team>
TOKENOPS_TEAM void start_groups(const Team& team, const Request& ask, const Groups& groups) {
  team.for_each(ask.tokens, [&](int t) {
    groups.group[t] = groups.first[t] = t;
    groups.size[t] = 1;
    if (ask.listed) groups.slot[t] = kNeitherSide;
  });
  team.sync();
  if (!ask.listed) return;
  team.for_each(ask.num_dst, [&](int i) { team.min(&groups.slot[ask.dst(i)], INT_MIN + i); });
  team.for_each(ask.num_src, [&](int i) { team.min(&groups.slot[ask.src(i)], i); });
  team.sync();
}

// Merge the sources up to `last` whose score reaches the threshold.
template <class A, class Team, class Work>
TOKENOPS_TEAM void merge_src(const Team& team, const Request& ask, const Rank<Key<A>>& last,
                             const Work& work) {
  const Key<A> limit = limit_of<A>(ask);
  team.for_each(
      ask.tokens,
      [&](int t) {
        const Key<A> key = work.key[t];
        return key > limit || last < Rank<Key<A>>{key, t} ? -1 : work.target(t);
      },
      [&](int t, int32_t target) {
        if (target < 0) return;
        work.group[t] = target;
        team.add(&work.size[target], 1);
        if (!ask.tome_order) team.min(&work.first[target], t);
      });
  team.sync();
}

// Number the output tokens in the order of their first member. Returns how many they are.
template <class Team>
TOKENOPS_TEAM int number_by_position(const Team& team, const Request& ask, const Groups& groups) {
  return enumerate(
      team, ask.tokens, [&](int t) { return groups.first[groups.group[t]] == t; },
      [&](int t, int n) { groups.number[groups.group[t]] = n; });
}

// Number the output tokens in ToMe's order: prefix, tokens of neither side, unmerged sources,
// destinations as they are listed. Sources come by falling score, or by position if there is a
// prefix.
template <class A, class Team, class Work>
TOKENOPS_TEAM int number_as_tome(const Team& team, const Request& ask, const Work& work) {
  const auto own = [&](int t) { return t >= ask.prefix && work.group[t] == t; };
  const auto is_sorted = [&](int t) { return work.key[t] < kUnscored<A>; };
  int sorted = 0;
  if (ask.by_score()) {
    sorted = enumerate(
        team, ask.tokens, [&](int t) { return own(t) && is_sorted(t); },
        [&](int t, int n) { work.put(n, t); });
    team.sync();
    work.sort(team, sorted);
  }
  int next = ask.prefix;
  const auto number = [&](int t, int n) { work.number[t] = next + n; };
  team.for_each(ask.prefix, [&](int t) { work.number[t] = t; });
  if (ask.listed) {
    next += enumerate(
        team, ask.tokens, [&](int t) { return own(t) && work.slot[t] == kNeitherSide; }, number);
  }
  team.for_each(sorted, [&](int i) { number(work.ranked(i), i); });
  next += sorted;
  next += enumerate(
      team, ask.tokens,
      [&](int t) { return own(t) && work.src_index(t) >= 0 && !(ask.by_score() && is_sorted(t)); },
      number);
  if (ask.listed) {
    return next + enumerate(
                      team, ask.num_dst,
                      [&](int i) {
                        const int32_t t = ask.dst(i);
                        return t >= ask.prefix && work.slot[t] == INT_MIN + i;
                      },
                      [&](int i, int n) { number(ask.dst(i), n); });
  }
  const int in_prefix = ask.pattern.dst_before(ask.prefix), rest = ask.num_dst - in_prefix;
  team.for_each(rest, [&](int i) { number(ask.pattern.dst(in_prefix + i), i); });
  return next + rest;
}

}  // namespace tokenops::matching
