// SPDX-License-Identifier: Apache-2.0
// Around the search of one image: which tokens take part, which sources merge, and the token map
// with its inverse. All of it is linear in N, but for selecting and sorting the candidates.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "nearest.h"

namespace tokenops::matching {

// What a token is in the split; prefix and protected tokens are taboo besides.
enum Role : uint8_t { kNeither = 0, kSource = 1, kDestination = 2, kTaboo = 4 };

// Row of an index tensor, int32 or int64. Values outside [0, tokens) read as -1.
struct Indices {
  const void* data = nullptr;
  bool wide = false;
  int64_t count = 0, stride = 0;

  int64_t value(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
  int64_t at(int64_t i, int64_t tokens) const {
    const int64_t token = value(i);
    return token >= 0 && token < tokens ? token : -1;
  }
};

// What `match` asks of an image of N tokens.
struct Request {
  int64_t tokens, outputs;  // N, M
  int64_t r, prefix;
  bool has_threshold, tome_order, listed;
  double threshold;
  int64_t stride;                 // the split, unless it is listed or a grid
  Grid grid;                      // the split, if it has rows of tokens
  Indices cell;                   // places of destinations in the cells of a grid, or nothing
  Indices sources, destinations;  // the split, if it is listed
  const uint8_t* is_protected;    // [N], or null
  int64_t protected_stride;
};

// A source, its similarity and its destination (-1: none); the first to merge is the least.
template <class A>
struct Candidate {
  A score;
  int32_t token, target;

  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && token < other.token);
  }
};

// Working memory for one image, N elements each.
template <class A>
struct Selection {
  uint8_t* role;
  int32_t* sources;       // ascending; last resorts, ascending too, after the eligible ones
  int32_t* destinations;  // ascending
  int32_t* group;         // token whose output token this one shares
  int32_t* number;        // output token of a group
  Candidate<A>* candidates;
  int64_t eligible, last_resorts, num_destinations;
  int64_t left;  // eligible sources that do not merge, first among the candidates
};

// Find the roles of all tokens and the lists of those that take part.
template <class A>
void take_part(const Request& ask, Selection<A>& s) {
  const int64_t n = ask.tokens;
  if (ask.listed) {
    std::fill_n(s.role, n, kNeither);
    for (int64_t i = 0; i < ask.sources.count; ++i) {
      const int64_t t = ask.sources.at(i, n);
      if (t >= 0) s.role[t] = kSource;
    }
    for (int64_t i = 0; i < ask.destinations.count; ++i) {
      const int64_t t = ask.destinations.at(i, n);
      if (t >= 0) s.role[t] = kDestination;
    }
  } else if (ask.grid.width > 0) {
    std::fill_n(s.role, ask.prefix, kNeither);
    std::fill(s.role + ask.prefix, s.role + n, kSource);
    for (int64_t i = 0, y = 0; y < ask.grid.rows; ++y) {
      for (int64_t x = 0; x < ask.grid.columns; ++x, ++i) {
        const int64_t place = ask.cell.data == nullptr ? 0 : ask.cell.value(i);
        s.role[ask.prefix + ask.grid.destination(y, x, place)] = kDestination;
      }
    }
  } else {
    std::fill_n(s.role, n, kSource);
    for (int64_t t = ask.stride - 1; t < n; t += ask.stride) s.role[t] = kDestination;
  }
  for (int64_t t = 0; t < ask.prefix; ++t) s.role[t] |= kTaboo;
  if (ask.is_protected != nullptr) {
    for (int64_t t = ask.prefix; t < n; ++t) {
      if (ask.is_protected[t * ask.protected_stride]) s.role[t] |= kTaboo;
    }
  }

  s.eligible = s.last_resorts = s.num_destinations = 0;
  for (int64_t t = 0; t < n; ++t) {
    s.sources[s.eligible] = s.destinations[s.num_destinations] = static_cast<int32_t>(t);
    s.eligible += s.role[t] == kSource;
    s.num_destinations += s.role[t] == kDestination;
  }
  if (ask.has_threshold) return;
  for (int64_t t = ask.prefix; t < n && s.eligible + s.last_resorts < ask.r; ++t) {
    if (s.role[t] == (kSource | kTaboo)) {
      s.sources[s.eligible + s.last_resorts++] = static_cast<int32_t>(t);
    }
  }
}

// Decide which sources merge, given the similarity and the destination (a position in the list, or
// -1) of each: `group` says the result, and candidates[0, left) which eligible ones are left.
template <class A>
void select_best(const Request& ask, const A* score, const int32_t* choice, Selection<A>& s) {
  for (int64_t t = 0; t < ask.tokens; ++t) s.group[t] = static_cast<int32_t>(t);
  // Where nothing is similar, a pair that has to merge takes the first destination there is.
  int32_t fallback = -1;
  if (s.num_destinations == 0 && !ask.has_threshold) {
    for (int64_t t = ask.tokens - 1; t >= 0; --t) {
      if (s.role[t] & kDestination) fallback = static_cast<int32_t>(t);
    }
  }
  for (int64_t i = 0; i < s.eligible + s.last_resorts; ++i) {
    const int32_t target = choice[i] >= 0 ? s.destinations[choice[i]] : fallback;
    s.candidates[i] = {score[i], s.sources[i], target};
  }

  Candidate<A>* const end = s.candidates + s.eligible;
  const int64_t wanted = std::min(ask.r, s.eligible);
  if (0 < wanted && wanted < s.eligible) {
    std::nth_element(s.candidates, s.candidates + wanted, end);
  }
  const A threshold = ask.has_threshold ? static_cast<A>(ask.threshold) : -infinity<A>();
  s.left = 0;
  for (int64_t i = 0; i < s.eligible + s.last_resorts; ++i) {
    const Candidate<A> c = s.candidates[i];
    const bool chosen = i < wanted || i >= s.eligible;
    if (chosen && c.target >= 0 && c.score >= threshold) {
      s.group[c.token] = c.target;
    } else if (i < s.eligible) {
      s.candidates[s.left++] = c;
    }
  }
}

// Output tokens in the order of their first member.
template <class A>
int64_t number_by_position(const Request& ask, Selection<A>& s) {
  int32_t next = 0;
  for (int64_t t = 0; t < ask.tokens; ++t) {
    int32_t& number = s.number[s.group[t]];
    if (number < 0) number = next++;
  }
  return next;
}

// ToMe's order: prefix, tokens of neither side, unmerged sources, destinations as they are listed.
// Sources come by similarity, or in place where there is a prefix.
template <class A>
int64_t number_as_tome(const Request& ask, Selection<A>& s) {
  const int64_t n = ask.tokens;
  int32_t next = 0;
  for (int64_t t = 0; t < ask.prefix; ++t) s.number[t] = next++;
  for (int64_t t = ask.prefix; t < n; ++t) {
    if (!(s.role[t] & (kSource | kDestination))) s.number[t] = next++;
  }
  if (ask.prefix > 0) {
    for (int64_t t = ask.prefix; t < n; ++t) {
      if ((s.role[t] & kSource) && s.group[t] == t) s.number[t] = next++;
    }
  } else {
    for (int64_t t = 0; t < n; ++t) {
      if (s.role[t] == (kSource | kTaboo) && s.group[t] == t) {
        s.candidates[s.left++] = {-infinity<A>(), static_cast<int32_t>(t), -1};
      }
    }
    std::sort(s.candidates, s.candidates + s.left);
    for (int64_t i = 0; i < s.left; ++i) s.number[s.candidates[i].token] = next++;
  }
  const int64_t count = ask.listed ? ask.destinations.count : n;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = ask.listed ? ask.destinations.at(i, n) : i;
    if (t >= 0 && (s.role[t] & kDestination) && s.number[t] < 0) s.number[t] = next++;
  }
  return next;
}

// Write the map of one image: assign [N], offsets [M + 1], members [N], the number of live outputs.
template <class A>
void write_map(const Request& ask, Selection<A>& s, int32_t* assign, int32_t* offsets,
               int32_t* members, int32_t* live) {
  const int64_t n = ask.tokens, m = ask.outputs;
  std::fill_n(s.number, n, -1);
  // Where nothing is to merge the map is the identity, in either order.
  const int64_t numbered =
      ask.tome_order && ask.r > 0 ? number_as_tome(ask, s) : number_by_position(ask, s);
  *live = static_cast<int32_t>(std::min(numbered, m));
  std::fill_n(offsets, m + 1, 0);
  for (int64_t t = 0; t < n; ++t) {
    const int32_t a = s.number[s.group[t]];
    assign[t] = a < m ? a : -1;  // more tokens are left than asked for only if arguments disagree
    if (a < m) ++offsets[a + 1];
  }
  int32_t* const cursor = s.number;
  for (int64_t i = 0; i < m; ++i) {
    cursor[i] = offsets[i];
    offsets[i + 1] += offsets[i];
  }
  std::fill(members + offsets[m], members + n, -1);
  for (int64_t t = 0; t < n; ++t) {
    if (assign[t] >= 0) members[cursor[assign[t]]++] = static_cast<int32_t>(t);
  }
}

// The map that changes nothing.
inline void write_identity(int64_t n, int32_t* assign, int32_t* offsets, int32_t* members,
                           int32_t* live) {
  for (int64_t t = 0; t < n; ++t) assign[t] = offsets[t] = members[t] = static_cast<int32_t>(t);
  offsets[n] = *live = static_cast<int32_t>(n);
}

}  // namespace tokenops::matching
