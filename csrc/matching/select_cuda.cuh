// SPDX-License-Identifier: Apache-2.0
// Which sources merge, and the map that they make: an image by one block, its arrays in shared
// memory as far as they fit there.
//
// The last source to merge is found digit by digit, by histograms of 512 bins around what is left;
// two of them do mostly. The rest is linear in N, but for a sort of the unmerged sources in ToMe's
// order. Atomics are of integers, and nothing depends on the order they come in.
#pragma once

#include <tuple>

#include "../cuda.cuh"
#include "order.h"

namespace tokenops::matching {

// ---- working memory ----

constexpr int kMostThreads = 1024;

// What a block always has in shared memory.
struct Counters {
  int digits[1 << kDigitBits];  // how many numbers have each digit; zero between uses
  int sums[kMostThreads / cuda::kWarpSize + 1];
  int digit, before, digit_count;  // the digit of the number that is looked for
  unsigned lowest, highest;        // the leading bits of the words of finite scores
  int scored, mergeable;           // sources with a finite score, and all that may merge
  int crowded;                     // groups of very many members
};
constexpr int64_t kCounterBytes = (sizeof(Counters) + 15) / 16 * 16;

// Arrays of an element per token. Some take the place of others that are no longer needed.
template <class A>
struct Work {
  Counters* counters;
  Word<A>* words;         // by which sources merge
  int32_t* start;         // where the members of an output token begin; in place of the words
  Word<A>* sorted_words;  // of sources; in place of the numbers where they are small enough
  int32_t* size;          // members of a group
  int32_t* group;         // the token that stands for a token's group: its destination, or itself
  int32_t* number;        // the output token of a group
  int32_t* ascending;     // listed destinations; in place of the numbers
  int32_t* first;         // the first member of a group
  int32_t* sorted;        // sources; in place of the first members
  int32_t* staged;        // members, not yet in order; in place of the first ones
  int32_t* crowded;       // groups of very many members
  int32_t* slot;          // the sides of a listed split, see list_sides

  // Sorting may have memory of its own.
  __device__ __forceinline__ Work(const Choice& ask, char* of_counters, char* arrays,
                                  char* for_sorting)
      : counters(reinterpret_cast<Counters*>(of_counters)) {
    const int64_t n = ask.tokens;
    words = reinterpret_cast<Word<A>*>(arrays);
    start = reinterpret_cast<int32_t*>(arrays);
    size = reinterpret_cast<int32_t*>(words + (sizeof(A) == 8 ? 2 * n : n));
    group = size + n;
    number = ascending = group + n;
    first = sorted = staged = number + n;
    crowded = first + n;
    slot = crowded + n / 32 + 1;
    sorted_words = sizeof(A) == 8 ? words + n : reinterpret_cast<Word<A>*>(number);
    if (for_sorting != nullptr) {
      sorted_words = reinterpret_cast<Word<A>*>(for_sorting);
      sorted = reinterpret_cast<int32_t*>(sorted_words + ask.most_sorted());
    }
  }
};

// Bytes of the arrays, of what sorting needs if it has memory of its own, and of all that
// select_few needs.
template <class A>
TOKENOPS_HOST_DEVICE int64_t array_bytes(const Choice& ask) {
  const int64_t n = ask.tokens;
  const int64_t words = (sizeof(A) == 8 ? 16 : 4) * n;
  return (words + (4 * n + n / 32 + 1 + (ask.listed ? n : 0)) * 4 + 15) / 16 * 16;
}
template <class A>
TOKENOPS_HOST_DEVICE int64_t sorting_bytes(const Choice& ask) {
  return ask.most_sorted() * static_cast<int64_t>(sizeof(A) + sizeof(int32_t));
}
template <class A>
TOKENOPS_HOST_DEVICE int64_t few_bytes(const Choice& ask) {
  return kCounterBytes + array_bytes<A>(ask);
}

// ---- steps that all threads of a block take together ----

// The consecutive items that are this thread's. Their number is odd, so that in shared memory the
// threads of a warp come to different banks.
struct Share {
  int begin, end;

  __device__ __forceinline__ explicit Share(int count) {
    const int threads = blockDim.x, each = (count + threads - 1) / threads | 1;
    begin = static_cast<int>(threadIdx.x) * each;
    if (begin > count) begin = count;
    end = count - begin < each ? count : begin + each;
  }
};

// Number those of `count` items that `among(i)` is true of from 0 on, in order: `give(i, number)`.
// Returns how many they are.
template <class Among, class Give>
__device__ __forceinline__ int enumerate(int count, int* sums, const Among& among,
                                         const Give& give) {
  const Share share(count);
  int mine = 0, total;
  TOKENOPS_UNROLL_4
  for (int i = share.begin; i < share.end; ++i) mine += among(i);
  int next = cuda::exclusive_sum(mine, sums, &total);
  for (int i = share.begin; i < share.end; ++i) {
    if (among(i)) give(i, next++);
  }
  return total;
}

// Items whose loads a thread has on their way at a time.
constexpr int kAtOnce = 4;

// Narrow an interval until it ends with the number that is looked for, or is that alone;
// `number(i)` are the numbers, i < count, and none is the largest one that there is.
template <class W, class Number>
__device__ __forceinline__ Interval<W> narrow(Interval<W> among, int count, Counters* counters,
                                              const Number& number) {
  while (!among.found() && among.low < among.high) {
    const int shift = among.shift();
    for (int i = threadIdx.x; i < count; i += kAtOnce * blockDim.x) {
      W x[kAtOnce];
      TOKENOPS_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = i + k * blockDim.x;
        x[k] = at < count ? number(at) : ~W{0};
      }
      TOKENOPS_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        if (among.holds(x[k])) atomicAdd(&counters->digits[among.digit(x[k], shift)], 1);
      }
    }
    __syncthreads();
    const Share share(1 << kDigitBits);
    int mine = 0, total;
    for (int i = share.begin; i < share.end; ++i) mine += counters->digits[i];
    int before = cuda::exclusive_sum(mine, counters->sums, &total);
    for (int i = share.begin; i < share.end; ++i) {
      const int here = counters->digits[i];
      counters->digits[i] = 0;
      if (before <= among.rank && among.rank < before + here) {
        counters->digit = i;
        counters->before = before;
        counters->digit_count = here;
      }
      before += here;
    }
    __syncthreads();
    among = among.of_digit(counters->digit, shift, counters->before, counters->digit_count);
  }
  return among;
}

// Bitonic sort of pairs, ascending, with neighbours of all distances compared in one direction:
// what would be beyond the end would be larger than all else and stay there.
template <class W>
__device__ __forceinline__ void sort_pairs_by_word(W* words, int32_t* tokens, int count) {
  const unsigned end = count;
  for (unsigned run = 2; run / 2 < end; run *= 2) {  // runs of half the length are sorted
    for (unsigned by = run / 2; by > 0; by /= 2) {
      const bool mirrored = by == run / 2;
      for (unsigned i = threadIdx.x;; i += blockDim.x) {
        const unsigned within = i & (by - 1), left = (i - within) * 2 + within;
        if (left >= end) break;
        const unsigned right = mirrored ? left - 2 * within + run - 1 : left + by;
        if (right >= end) continue;
        const W a = words[left], b = words[right];
        const int32_t s = tokens[left], t = tokens[right];
        if (b < a || (b == a && t < s)) {
          words[left] = b, words[right] = a;
          tokens[left] = t, tokens[right] = s;
        }
      }
      __syncthreads();
    }
  }
}

// ---- sides ----

// In `slot`, the place of each source as it is listed, INT_MIN + that of each destination, and this
// for others. Of a token that is listed more than once the first place counts, that of a
// destination before that of a source.
constexpr int32_t kNeitherSide = INT_MAX;

// Lists destinations in ascending order. Returns how many tokens they are.
template <class A>
__device__ __forceinline__ int list_sides(const Choice& ask, const Work<A>& work) {
  for (int i = threadIdx.x; i < ask.destinations; i += blockDim.x) {
    atomicMin(&work.slot[ask.destination_index.at(i, ask.tokens)], INT_MIN + i);
  }
  for (int i = threadIdx.x; i < ask.sources; i += blockDim.x) {
    atomicMin(&work.slot[ask.source_index.at(i, ask.tokens)], i);
  }
  __syncthreads();
  const int found = enumerate(
      ask.tokens, work.counters->sums, [&](int t) { return work.slot[t] < 0; },
      [&](int t, int place) { work.ascending[place] = t; });
  __syncthreads();
  return found;
}

// Place of a token among the sources, or -1.
template <class A>
__device__ __forceinline__ int32_t source_place(const Choice& ask, const Work<A>& work, int t) {
  if (!ask.listed) return ask.rule.source_place(t);
  return work.slot[t] < 0 || work.slot[t] == kNeitherSide ? -1 : work.slot[t];
}

// ---- which sources merge ----

// Every token is a group of its own; returns how many are destinations.
template <class A>
__device__ __forceinline__ int begin_choice(const Choice& ask, const Work<A>& work) {
  Counters& counters = *work.counters;
  __syncthreads();  // whoever needed the memory before
  for (int i = threadIdx.x; i < 1 << kDigitBits; i += blockDim.x) counters.digits[i] = 0;
  for (int t = threadIdx.x; t < ask.tokens; t += blockDim.x) {
    work.group[t] = work.first[t] = t;
    work.size[t] = 1;
    if (ask.listed) work.slot[t] = kNeitherSide;
  }
  if (threadIdx.x == 0) {
    counters.lowest = ~0u;
    counters.highest = 0;
    counters.scored = counters.mergeable = counters.crowded = 0;
  }
  __syncthreads();
  return ask.listed ? list_sides(ask, work) : ask.destinations;
}

// The words of all tokens, and what there is of them.
template <class A>
__device__ __forceinline__ void weigh_sources(const Choice& ask, const A* score,
                                              const Work<A>& work) {
  unsigned lowest = ~0u, highest = 0, scored = 0, mergeable = 0;
  for (int i = threadIdx.x; i < ask.tokens; i += kAtOnce * blockDim.x) {
    Word<A> word[kAtOnce];
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int t = i + k * blockDim.x;
      const int32_t place = ask.prefix <= t && t < ask.tokens ? source_place(ask, work, t) : -1;
      word[k] = place >= 0 ? word_of(score[place]) : kNever<A>;
      if (place >= 0 && ask.is_protected != nullptr && ask.is_protected[t * ask.protected_stride]) {
        word[k] = kProtected<A>;
      }
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int t = i + k * blockDim.x;
      if (t < ask.tokens) work.words[t] = word[k];
      mergeable += word[k] < kNever<A>;
      if (word[k] >= kUnscored<A>) continue;
      const unsigned leading = static_cast<unsigned>(word[k] >> (8 * sizeof(A) - 32));
      ++scored;
      if (leading < lowest) lowest = leading;
      if (leading > highest) highest = leading;
    }
  }
  lowest = __reduce_min_sync(cuda::kAllLanes, lowest);
  highest = __reduce_max_sync(cuda::kAllLanes, highest);
  scored = __reduce_add_sync(cuda::kAllLanes, scored);
  mergeable = __reduce_add_sync(cuda::kAllLanes, mergeable);
  if (threadIdx.x % cuda::kWarpSize == 0) {
    atomicMin(&work.counters->lowest, lowest);
    atomicMax(&work.counters->highest, highest);
    atomicAdd(&work.counters->scored, static_cast<int>(scored));
    atomicAdd(&work.counters->mergeable, static_cast<int>(mergeable));
  }
  __syncthreads();
}

// The last source that merges, if there are so many destinations.
template <class A>
__device__ __forceinline__ Last<Word<A>> last_to_merge(const Choice& ask, int destinations,
                                                       const Work<A>& work) {
  using W = Word<A>;
  const Counters& counters = *work.counters;
  const int scored = counters.scored, mergeable = counters.mergeable;
  const bool never = ask.limited && ask.threshold != ask.threshold;
  if (ask.r <= 0 || mergeable == 0 || destinations == 0 || never) return {0, -1};
  if (ask.r >= mergeable) return {kProtected<A>, INT_MAX};
  constexpr int kRest = 8 * sizeof(A) - 32;
  Interval<W> words = {static_cast<W>(counters.lowest) << kRest,
                       (static_cast<W>(counters.highest) << kRest) | ((W{1} << kRest) - 1),
                       ask.r - 1, scored};
  if (ask.r > scored) {
    words = {kUnscored<A>, kProtected<A>, ask.r - 1 - scored, mergeable - scored};
  }
  words = narrow(words, ask.tokens, work.counters, [&](int t) { return work.words[t]; });
  if (words.found()) return {words.high, INT_MAX};
  // Of equal ones some merge, those of the lowest tokens.
  const auto token = [&](int t) {
    return work.words[t] == words.low ? static_cast<unsigned>(t) : ~0u;
  };
  const Interval<unsigned> all = {0, static_cast<unsigned>(ask.tokens - 1), words.rank,
                                  words.count};
  const Interval<unsigned> tokens = narrow(all, ask.tokens, work.counters, token);
  return {words.low, static_cast<int32_t>(tokens.high)};
}

// Merge the sources up to `last`, as far as they are similar enough.
template <class A>
__device__ __forceinline__ void merge_sources(const Choice& ask, const int32_t* choice,
                                              int destinations, Last<Word<A>> last,
                                              const Work<A>& work) {
  const Word<A> limit = ask.limited ? word_of(static_cast<A>(ask.threshold)) : kProtected<A>;
  for (int i = threadIdx.x; i < ask.tokens; i += kAtOnce * blockDim.x) {
    int32_t target[kAtOnce];  // -1 for none
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int t = i + k * blockDim.x;
      const Word<A> word = t < ask.tokens ? work.words[t] : kNever<A>;
      target[k] = -1;
      if (word > limit || !last.includes(word, t)) continue;
      const int32_t chosen = choice[source_place(ask, work, t)];
      if (ask.limited && chosen < 0) continue;
      const int32_t place = clamped(chosen, destinations);
      target[k] = ask.listed ? work.ascending[place] : ask.rule.destination(place);
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      if (target[k] < 0) continue;
      const int t = i + k * blockDim.x;
      work.group[t] = target[k];
      atomicAdd(&work.size[target[k]], 1);
      if (!ask.tome) atomicMin(&work.first[target[k]], t);
    }
  }
  __syncthreads();
}

// ---- the order of the groups ----

// Output tokens in the order of their first member; returns how many they are.
template <class A>
__device__ __forceinline__ int number_by_position(const Choice& ask, const Work<A>& work) {
  return enumerate(
      ask.tokens, work.counters->sums, [&](int t) { return work.first[work.group[t]] == t; },
      [&](int t, int number) { work.number[work.group[t]] = number; });
}

// ToMe's order: prefix, tokens of neither side, unmerged sources, destinations as they are listed.
// Sources come by similarity, or in place where there is a prefix.
template <class A>
__device__ __forceinline__ int number_as_tome(const Choice& ask, const Work<A>& work) {
  const int n = ask.tokens;
  int* const sums = work.counters->sums;
  const auto own = [&](int t) { return t >= ask.prefix && work.group[t] == t; };
  const auto is_by_score = [&](int t) { return work.words[t] < kUnscored<A>; };

  int by_score = 0;
  if (ask.by_score()) {
    by_score = enumerate(
        n, sums, [&](int t) { return own(t) && is_by_score(t); },
        [&](int t, int i) {
          work.sorted_words[i] = work.words[t];
          work.sorted[i] = t;
        });
    __syncthreads();
    sort_pairs_by_word(work.sorted_words, work.sorted, by_score);
  }
  int next = ask.prefix;
  for (int t = threadIdx.x; t < ask.prefix; t += blockDim.x) work.number[t] = t;
  const auto number = [&](int t, int i) { work.number[t] = next + i; };
  if (ask.listed) {
    const int others =
        enumerate(n, sums, [&](int t) { return own(t) && work.slot[t] == kNeitherSide; }, number);
    next += others;
  }
  for (int i = threadIdx.x; i < by_score; i += blockDim.x) work.number[work.sorted[i]] = next + i;
  next += by_score;
  const int in_place = enumerate(
      n, sums,
      [&](int t) {
        return own(t) && source_place(ask, work, t) >= 0 && !(ask.by_score() && is_by_score(t));
      },
      number);
  next += in_place;
  if (ask.listed) {
    const int listed = enumerate(
        ask.destinations, sums,
        [&](int i) {
          const int32_t t = ask.destination_index.at(i, n);
          return t >= ask.prefix && work.slot[t] == INT_MIN + i;
        },
        [&](int i, int place) { number(ask.destination_index.at(i, n), place); });
    return next + listed;
  }
  const int in_prefix = ask.rule.destinations_before(ask.prefix);
  for (int i = in_prefix + threadIdx.x; i < ask.destinations; i += blockDim.x) {
    number(ask.rule.destination(i), i - in_prefix);
  }
  return next + ask.destinations - in_prefix;
}

// ---- the map ----

// Write the map of `live` groups.
template <class A>
__device__ __forceinline__ void write_map(const Choice& ask, int live, const Work<A>& work,
                                          const ChosenMap& out) {
  const int n = ask.tokens, outputs = ask.outputs;
  const int bits = compared_bits(n), taken = 2 << bits;
  __syncthreads();
  // Crowded groups are listed, and their size becomes negative; what others have in `size` counts
  // from `taken` on how many members are staged.
  for (int t = threadIdx.x; t < n; t += blockDim.x) {
    if (work.group[t] != t) continue;
    const int size = work.size[t];
    work.start[work.number[t]] = size;
    if (size > 1 << bits) {
      work.crowded[atomicAdd(&work.counters->crowded, 1)] = t;
      work.size[t] = -size;
    }
  }
  __syncthreads();
  const Share share(live);
  int mine = 0, total;
  for (int m = share.begin; m < share.end; ++m) mine += work.start[m];
  int at = cuda::exclusive_sum(mine, work.counters->sums, &total);
  for (int m = share.begin; m < share.end; ++m) {
    const int size = work.start[m];
    work.start[m] = at;
    if (m <= outputs) out.offsets[m] = at;
    at += size;
  }
  for (int m = live + threadIdx.x; m <= outputs; m += blockDim.x) out.offsets[m] = n;
  if (threadIdx.x == 0) *out.count = live < outputs ? live : outputs;
  __syncthreads();

  // Groups beyond the outputs are dropped: there are such where too few sources could merge.
  for (int i = threadIdx.x; i < n; i += kAtOnce * blockDim.x) {
    int32_t group[kAtOnce], m[kAtOnce], size[kAtOnce], begin[kAtOnce];
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int t = i + k * blockDim.x;
      group[k] = work.group[t < n ? t : i];
      m[k] = work.number[group[k]];
      size[k] = atomicAdd(&work.size[group[k]], 0);  // others add to it meanwhile
      begin[k] = work.start[m[k]];
    }
    TOKENOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int t = i + k * blockDim.x;
      if (t >= n) break;
      const bool kept = m[k] < outputs;
      out.assign[t] = kept ? m[k] : -1;
      if (size[k] == 1) {
        out.members[begin[k]] = kept ? t : -1;
      } else if (size[k] > 0) {
        work.staged[begin[k] + (atomicAdd(&work.size[group[k]], taken) >> (bits + 1))] = t;
      }
    }
  }
  __syncthreads();
  for (int t = threadIdx.x; t < n; t += blockDim.x) {
    const int group = work.group[t], size = work.size[group];
    if (size <= 1) continue;
    const int m = work.number[group], begin = work.start[m], end = begin + (size & (taken - 1));
    int place = begin;
    for (int i = begin; i < end; ++i) place += work.staged[i] < t;
    out.members[place] = m < outputs ? t : -1;
  }
  // A warp for a crowded group goes over all tokens.
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  for (int i = warp; i < work.counters->crowded; i += blockDim.x / cuda::kWarpSize) {
    const int group = work.crowded[i], m = work.number[group];
    int next = work.start[m];
    for (int begin = 0; begin < n; begin += cuda::kWarpSize) {
      const int t = begin + lane;
      const bool member = t < n && work.group[t] == group;
      const unsigned members = __ballot_sync(cuda::kAllLanes, member);
      if (member) out.members[next + __popc(members & ((1u << lane) - 1))] = m < outputs ? t : -1;
      next += __popc(members);
    }
  }
}

// The map of one image from score and choice [sources], for `ask`, `out` of that image.
template <class A>
__device__ __forceinline__ void select_image(const Choice& ask, const A* score,
                                             const int32_t* choice, const Work<A>& work,
                                             const ChosenMap& out) {
  const int destinations = begin_choice(ask, work);
  weigh_sources(ask, score, work);
  const Last<Word<A>> last = last_to_merge(ask, destinations, work);
  merge_sources(ask, choice, destinations, last, work);
  const int live = ask.tome ? number_as_tome(ask, work) : number_by_position(ask, work);
  write_map(ask, live, work, out);
}

// The same with everything in shared memory: few_bytes<A>(ask) from `scratch` on, a multiple of 16.
// The block has any number of whole warps. It waits for its threads before anything is read.
template <class A>
__device__ __forceinline__ void select_few(const Choice& ask, const A* score, const int32_t* choice,
                                           char* scratch, const ChosenMap& out) {
  select_image(ask, score, choice, Work<A>(ask, scratch, scratch + kCounterBytes, nullptr), out);
}

}  // namespace tokenops::matching
