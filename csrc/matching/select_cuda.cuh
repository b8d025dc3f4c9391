// SPDX-License-Identifier: Apache-2.0
// The selection on CUDA: one block for an image, its arrays in shared memory if they fit, else in
// global memory.
//
// All steps are linear in N, except for the sort of the unmerged sources in ToMe's order. Atomics
// are of integers, and no result depends on their order.
#pragma once

#include "../cuda.cuh"
#include "select.h"
#include "split.h"

namespace tokenops::matching {

constexpr int kMaxThreads = 1024;

// ---- a block as a team ----

// Loads that a thread has in flight at a time.
constexpr int kUnroll = 4;

// The functions of Serial in team.h.
struct Block {
  int* sums;  // [kMaxThreads / kWarpSize + 1], scratch of the scans

  template <class Use>
  __device__ __forceinline__ void for_each(int count, const Use& use) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) use(i);
  }
  template <class Load, class Use>
  __device__ __forceinline__ void for_each(int count, const Load& load, const Use& use) const {
    for (int i = threadIdx.x; i < count; i += kUnroll * blockDim.x) {
      decltype(load(0)) loaded[kUnroll];
      TOKENOPS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int at = i + k * blockDim.x;
        loaded[k] = at < count ? load(at) : decltype(load(0)){};
      }
      TOKENOPS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int at = i + k * blockDim.x;
        if (at < count) use(at, loaded[k]);
      }
    }
  }
  template <class Value, class Use>
  __device__ __forceinline__ int scan(int count, const Value& value, const Use& use) const {
    // Each thread takes consecutive indices. Their number is odd, so that in shared memory the
    // threads of a warp access different banks.
    const int threads = blockDim.x, each = (count + threads - 1) / threads | 1;
    int begin = static_cast<int>(threadIdx.x) * each;
    if (begin > count) begin = count;
    const int end = count - begin < each ? count : begin + each;
    int sum = 0, total;
    TOKENOPS_UNROLL_4
    for (int i = begin; i < end; ++i) sum += value(i);
    int before = cuda::exclusive_scan(sum, sums, &total);
    for (int i = begin; i < end; ++i) {
      const int mine = value(i);
      use(i, mine, before);
      before += mine;
    }
    return total;
  }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }
  __device__ __forceinline__ void min(int32_t* to, int32_t value) const { atomicMin(to, value); }
};

// ---- memory ----

// These are in shared memory even if the arrays are not.
struct Counters {
  int histogram[1 << kDigitBits];  // of digits; zero between uses
  int sums[kMaxThreads / cuda::kWarpSize + 1];
  int digit, before, digit_count;  // the digit of the wanted number
  unsigned lowest, highest;        // the leading 32 bits of the keys of scores above -inf
  int scored, mergeable;           // sources with a score above -inf, and all that may merge
  int num_dst;                     // distinct destinations
  int num_long;                    // long segments
};
constexpr int64_t kCounterBytes = (sizeof(Counters) + 15) / 16 * 16;

// Bitonic sort of `count` pairs by key and then token, ascending. All compare-exchanges go in one
// direction, so that elements past the end, which count as the largest, need not exist.
// CUB's block sorts fix the number of elements at compile time: for the 11,000 tokens that fit
// shared memory, its radix sort takes 64 registers, spills, and needs 44 KB of scratch. This sort
// takes 28 registers and no scratch (nvcc 13.0, sm_90a).
template <class K>
__device__ __forceinline__ void sort_pairs(K* keys, int32_t* tokens, int count) {
  const unsigned end = count;
  for (unsigned run = 2; run / 2 < end; run *= 2) {  // runs of half the length are sorted
    for (unsigned by = run / 2; by > 0; by /= 2) {
      const bool mirrored = by == run / 2;
      for (unsigned i = threadIdx.x;; i += blockDim.x) {
        const unsigned within = i & (by - 1), left = (i - within) * 2 + within;
        if (left >= end) break;
        const unsigned right = mirrored ? left - 2 * within + run - 1 : left + by;
        if (right >= end) continue;
        const KeyedToken<K> a = {keys[left], tokens[left]}, b = {keys[right], tokens[right]};
        if (b < a) {
          keys[left] = b.key, keys[right] = a.key;
          tokens[left] = b.token, tokens[right] = a.token;
        }
      }
      __syncthreads();
    }
  }
}

// Arrays [N] of an image. Some share the memory of others that are no longer needed.
template <class A>
struct Work : Segments {
  const Request& ask;
  const int32_t* node_idx;
  Counters* counters;
  Key<A>* key;
  int32_t* start;          // where the members of an output token begin; in place of `key`
  Key<A>* sorted_keys;     // of 4 bytes: in place of `output`; of 8 bytes: after `key`
  int32_t* sorted;         // sources by key; in place of `first`
  int32_t* ascending;      // listed destinations; in place of `output`
  int32_t* unsorted;       // members of each segment, in any order; in place of `first`
  int32_t* long_segments;  // their roots: at most N / 32, since each has more than 2^5 members

  // The sort uses `sort_memory` unless it is null.
  __device__ __forceinline__ Work(const Request& request, const int32_t* node_idx_,
                                  char* counter_memory, char* arrays, char* sort_memory)
      : ask(request), node_idx(node_idx_), counters(reinterpret_cast<Counters*>(counter_memory)) {
    const int64_t n = ask.tokens;
    key = reinterpret_cast<Key<A>*>(arrays);
    start = reinterpret_cast<int32_t*>(arrays);
    count = reinterpret_cast<int32_t*>(key + (sizeof(A) == 8 ? 2 * n : n));
    root = count + n;
    output = ascending = root + n;
    first = sorted = unsorted = output + n;
    long_segments = first + n;
    role = long_segments + n / 32 + 1;
    sorted_keys = sizeof(A) == 8 ? key + n : reinterpret_cast<Key<A>*>(output);
    if (sort_memory != nullptr) {
      sorted_keys = reinterpret_cast<Key<A>*>(sort_memory);
      sorted = reinterpret_cast<int32_t*>(sorted_keys + ask.max_sorted());
    }
  }

  __device__ __forceinline__ int32_t src_index(int t) const {
    if (!ask.listed) return ask.pattern.src_index(t);
    return role[t] < 0 || role[t] == kNeitherSide ? -1 : role[t];
  }
  // The destination of a source, -1 for none.
  __device__ __forceinline__ int32_t target(int t) const {
    const int32_t best = node_idx[src_index(t)];
    if (ask.has_threshold && best < 0) return -1;
    const int32_t i = clamp_index(best, counters->num_dst);
    return ask.listed ? ascending[i] : ask.pattern.dst(i);
  }
  __device__ __forceinline__ void put(int i, int t) const {
    sorted_keys[i] = key[t];
    sorted[i] = t;
  }
  __device__ __forceinline__ void sort(const Block&, int count) const {
    sort_pairs(sorted_keys, sorted, count);
  }
  __device__ __forceinline__ int32_t sorted_token(int i) const { return sorted[i]; }
};

// Bytes of the arrays of Work.
template <class A>
TOKENOPS_HOST_DEVICE int64_t array_bytes(const Request& ask) {
  const int64_t n = ask.tokens;
  const int64_t keys = (sizeof(A) == 8 ? 16 : 4) * n;
  return (keys + (4 * n + n / 32 + 1 + (ask.listed ? n : 0)) * 4 + 15) / 16 * 16;
}
// Bytes of the sort's own memory.
template <class A>
TOKENOPS_HOST_DEVICE int64_t sort_bytes(const Request& ask) {
  return ask.max_sorted() * static_cast<int64_t>(sizeof(A) + sizeof(int32_t));
}
// Bytes of shared memory that hold everything.
template <class A>
TOKENOPS_HOST_DEVICE int64_t shared_bytes(const Request& ask) {
  return kCounterBytes + array_bytes<A>(ask);
}

// ---- which sources merge ----

// Narrow an interval until it is selected as a whole, or holds only numbers equal to the wanted
// one. number(i) is the i-th number, i < count; ~K{0}, which no interval holds, stands for none.
template <class K, class Number>
__device__ __forceinline__ Interval<K> narrow(Interval<K> among, int count, const Block& block,
                                              Counters* counters, const Number& number) {
  while (!among.takes_all() && among.low < among.high) {
    const int shift = among.shift();
    block.for_each(count, number, [&](int, K x) {
      if (among.holds(x)) atomicAdd(&counters->histogram[among.digit(x, shift)], 1);
    });
    __syncthreads();
    block.scan(
        1 << kDigitBits, [&](int i) { return counters->histogram[i]; },
        [&](int i, int here, int before) {
          counters->histogram[i] = 0;
          if (before <= among.rank && among.rank < before + here) {
            counters->digit = i;
            counters->before = before;
            counters->digit_count = here;
          }
        });
    __syncthreads();
    among = among.of_digit(counters->digit, shift, counters->before, counters->digit_count);
  }
  return among;
}

// Find the keys of all tokens, and count them.
template <class A>
__device__ __forceinline__ void find_keys(const Request& ask, const A* node_max, const Block& block,
                                          const Work<A>& work) {
  unsigned lowest = ~0u, highest = 0, scored = 0, mergeable = 0;
  block.for_each(
      ask.tokens,
      [&](int t) {
        const int32_t i = ask.prefix <= t ? work.src_index(t) : -1;
        if (i < 0) return kNever<A>;
        return ask.is_protected(t) ? kProtected<A> : key_of(node_max[i]);
      },
      [&](int t, Key<A> key) {
        work.key[t] = key;
        mergeable += key < kNever<A>;
        if (key >= kUnscored<A>) return;
        const unsigned leading = static_cast<unsigned>(key >> (8 * sizeof(A) - 32));
        ++scored;
        if (leading < lowest) lowest = leading;
        if (leading > highest) highest = leading;
      });
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

// Find the last source that merges.
template <class A>
__device__ __forceinline__ KeyedToken<Key<A>> last_to_merge(const Request& ask, const Block& block,
                                                            const Work<A>& work) {
  using K = Key<A>;
  const Counters& counters = *work.counters;
  const int scored = counters.scored, mergeable = counters.mergeable;
  if (ask.r <= 0 || mergeable == 0 || counters.num_dst == 0) return {0, -1};
  if (ask.r >= mergeable) return {kProtected<A>, INT_MAX};
  constexpr int kRest = 8 * sizeof(A) - 32;
  Interval<K> keys = {static_cast<K>(counters.lowest) << kRest,
                      (static_cast<K>(counters.highest) << kRest) | ((K{1} << kRest) - 1),
                      ask.r - 1, scored};
  if (ask.r > scored) {
    keys = {kUnscored<A>, kProtected<A>, ask.r - 1 - scored, mergeable - scored};
  }
  keys = narrow(keys, ask.tokens, block, work.counters, [&](int t) { return work.key[t]; });
  if (keys.takes_all()) return {keys.high, INT_MAX};
  // Of several sources with the last key, those of the lowest tokens merge.
  const Interval<unsigned> all = {0, static_cast<unsigned>(ask.tokens - 1), keys.rank, keys.count};
  const Interval<unsigned> tokens = narrow(all, ask.tokens, block, work.counters, [&](int t) {
    return work.key[t] == keys.low ? static_cast<unsigned>(t) : ~0u;
  });
  return {keys.low, static_cast<int32_t>(tokens.high)};
}

// ---- the map ----

// Write the map of `num_segments` segments. The pointers of image blockIdx.x are computed here, not
// by the caller, to save registers.
template <class A>
__device__ __forceinline__ void write_map(const Request& ask, int num_segments, const Block& block,
                                          const Work<A>& work, const TokenMap& maps) {
  const TokenMap out = maps.image(ask, blockIdx.x);
  const int n = ask.tokens, outputs = ask.outputs, short_count = 1 << short_bits(n);
  __syncthreads();
  block.for_each(n, [&](int t) {
    if (work.root[t] != t) return;
    const int count = work.count[t];
    work.start[work.output[t]] = count;
    if (count > short_count) work.long_segments[atomicAdd(&work.counters->num_long, 1)] = t;
  });
  __syncthreads();
  block.scan(
      num_segments, [&](int m) { return work.start[m]; },
      [&](int m, int, int before) {
        work.start[m] = before;
        if (m <= outputs) out.offsets[m] = before;
      });
  for (int m = num_segments + threadIdx.x; m <= outputs; m += blockDim.x) out.offsets[m] = n;
  if (threadIdx.x == 0) *out.count = num_segments < outputs ? num_segments : outputs;
  __syncthreads();

  struct Place {
    int32_t root, m, begin, end;
  };
  const auto place_of = [&](int t) {
    Place place;
    place.root = work.root[t];
    place.m = work.output[place.root];
    place.begin = work.start[place.m];
    place.end = place.m + 1 < num_segments ? work.start[place.m + 1] : n;
    return place;
  };
  block.for_each(n, place_of, [&](int t, const Place& place) {
    // If too few sources could merge, there are more segments than outputs: drop the last ones.
    const bool kept = place.m < outputs;
    const int count = place.end - place.begin;
    out.assign[t] = kept ? place.m : -1;
    if (count == 1) {
      out.members[place.begin] = kept ? t : -1;
    } else if (count <= short_count) {  // `count` of the root falls to 0
      work.unsorted[place.begin + atomicAdd(&work.count[place.root], -1) - 1] = t;
    }
  });
  __syncthreads();
  block.for_each(n, [&](int t) {
    if (work.count[work.root[t]] != 0) return;  // neither alone nor in a long segment
    const Place place = place_of(t);
    int at = place.begin;  // each smaller member moves t one place further
    for (int i = place.begin; i < place.end; ++i) at += work.unsorted[i] < t;
    out.members[at] = place.m < outputs ? t : -1;
  });
  // For each long segment, one warp goes over all tokens.
  const int warp = threadIdx.x / cuda::kWarpSize, lane = threadIdx.x % cuda::kWarpSize;
  for (int i = warp; i < work.counters->num_long; i += blockDim.x / cuda::kWarpSize) {
    const int root = work.long_segments[i], m = work.output[root];
    int next = work.start[m];
    for (int begin = 0; begin < n; begin += cuda::kWarpSize) {
      const int t = begin + lane;
      const bool member = t < n && work.root[t] == root;
      const unsigned members = __ballot_sync(cuda::kAllLanes, member);
      if (member) out.members[next + __popc(members & ((1u << lane) - 1))] = m < outputs ? t : -1;
      next += __popc(members);
    }
  }
}

// Write the map of one image from node_max [num_src]. The block may have any number of whole warps.
template <class A>
__device__ __forceinline__ void select_image(const Request& ask, const A* node_max, Work<A> work,
                                             const TokenMap& maps) {
  Counters& counters = *work.counters;
  const Block block = {counters.sums};
  __syncthreads();  // the memory may have been in use
  block.for_each(1 << kDigitBits, [&](int i) { counters.histogram[i] = 0; });
  if (threadIdx.x == 0) {
    counters.lowest = ~0u;
    counters.highest = 0;
    counters.num_dst = ask.num_dst;
    counters.scored = counters.mergeable = counters.num_long = 0;
  }
  start_segments(block, ask, work);
  if (ask.listed) {
    const int found = enumerate(
        block, ask.tokens, [&](int t) { return work.role[t] < 0; },
        [&](int t, int n) { work.ascending[n] = t; });
    if (threadIdx.x == 0) counters.num_dst = found;
    __syncthreads();
  }
  find_keys(ask, node_max, block, work);
  // Merge the sources up to the last one whose score reaches the threshold.
  const KeyedToken<Key<A>> last = last_to_merge(ask, block, work);
  const Key<A> limit = limit_of<A>(ask);
  block.for_each(
      ask.tokens,
      [&](int t) {
        const Key<A> key = work.key[t];
        return key > limit || last < KeyedToken<Key<A>>{key, t} ? -1 : work.target(t);
      },
      [&](int t, int32_t target) { merge_one(block, ask, t, target, work); });
  __syncthreads();
  const int num_segments =
      ask.tome_order ? number_as_tome<A>(block, ask, work) : number_by_position(block, ask, work);
  write_map(ask, num_segments, block, work, maps);
}

// ---- requests ----

using cuda::Target;

// Check the arguments of an operator whose first tensor is `first`. A grid becomes lists, which
// `split` then owns (select_cuda.cu).
Request device_request(const Target& target, const char* op, const Tensor& first, int64_t tokens,
                       const RequestArgs& args, SplitArgs& split);

}  // namespace tokenops::matching
