// SPDX-License-Identifier: Apache-2.0
// Which sources merge, and the map that they make: an image by one block, its arrays in shared
// memory as far as they fit there.
//
// The last source to merge is found digit by digit, by histograms of 512 bins around what is left;
// two of them do mostly. The rest is linear in N, but for a sort of the unmerged sources in ToMe's
// order. Atomics are of integers, and nothing depends on the order they come in.
#pragma once

#include "../cuda.cuh"
#include "order.h"

namespace tokenops::matching {

// ---- what is asked ----

// An index tensor [K] or [B, K] of any strides.
struct IndexList {
  const void* data;
  int64_t batch_stride, stride;
  bool wide;  // int64, else int32

  TOKENOPS_HOST_DEVICE int32_t at(int64_t i, int32_t tokens) const {
    return clamped(wide ? static_cast<const int64_t*>(data)[i * stride]
                        : static_cast<const int32_t*>(data)[i * stride],
                   tokens);
  }
  TOKENOPS_HOST_DEVICE IndexList row(int64_t image) const {
    const int64_t skipped = image * batch_stride * (wide ? 8 : 4);
    return {static_cast<const char*>(data) + skipped, batch_stride, stride, wide};
  }
};

// What `select` asks of images of N tokens, all of them or, by `row`, one.
struct Choice {
  int32_t tokens, outputs;        // N, M
  int32_t sources, destinations;  // by rule, or listed
  int32_t r, prefix;
  bool listed, limited, tome;
  double threshold;           // where limited
  Alternation rule;           // the split, unless it is listed
  IndexList source_index;     // the split, if it is listed
  IndexList destination_index;
  const uint8_t* is_protected;  // [N] or [B, N], or null
  int64_t protected_batch_stride, protected_stride;

  TOKENOPS_HOST_DEVICE Choice row(int64_t image) const {
    Choice one = *this;
    if (listed) {
      one.source_index = source_index.row(image);
      one.destination_index = destination_index.row(image);
    }
    if (is_protected != nullptr) one.is_protected += image * protected_batch_stride;
    return one;
  }
  // Whether unmerged sources stand by falling score.
  TOKENOPS_HOST_DEVICE bool by_score() const { return tome && prefix == 0; }
};

// The results, of all images or one.
struct ChosenMap {
  int32_t* assign;   // [N]
  int32_t* offsets;  // [M + 1]
  int32_t* members;  // [N]
  int32_t* count;    // [1]

  TOKENOPS_HOST_DEVICE ChosenMap row(const Choice& ask, int64_t image) const {
    return {assign + image * ask.tokens, offsets + image * (ask.outputs + int64_t{1}),
            members + image * ask.tokens, count + image};
  }
};

// ---- working memory ----

constexpr int kMostThreads = 1024;

// What a block always has in shared memory.
struct Counters {
  int digits[1 << kDigitBits];  // how many numbers have each digit; zero between uses
  int sums[kMostThreads / cuda::kWarpSize + 1];
  int digit, before, digit_count;  // the digit of the number that is looked for
  unsigned lowest, highest;        // the leading bits of the words of finite scores
  int scored, mergeable;           // sources with a finite score, and all that may merge
  int crowded;                     // groups of which not all members are compared
};
constexpr int64_t kCounterBytes = (sizeof(Counters) + 15) / 16 * 16;

// Arrays of an element per token. Some take the place of others that are no longer needed.
template <class A>
struct Work {
  Counters* counters;
  Word<A>* words;      // by which sources merge
  int32_t* start;      // where the members of an output token begin; in place of the words
  int32_t* size;       // members of a group
  int32_t* group;      // the token that stands for a token's group: its destination, or itself
  int32_t* number;     // the output token of a group
  int32_t* ascending;  // listed destinations; in place of the numbers
  int32_t* first;      // the first member of a group
  int32_t* staged;     // members, not yet in order; in place of the first ones
  int32_t* crowded;    // groups of very many members
  int32_t* slot;       // the sides of a listed split, see list_sides
  Word<A>* sorted_words;
  int32_t* sorted;  // sources by word; in place of the first members

  // Sorting may have memory of its own.
  __device__ __forceinline__ Work(const Choice& ask, char* counters_, char* arrays, char* sorting)
      : counters(reinterpret_cast<Counters*>(counters_)) {
    const int64_t n = ask.tokens;
    words = reinterpret_cast<Word<A>*>(arrays);
    start = reinterpret_cast<int32_t*>(arrays);
    size = reinterpret_cast<int32_t*>(words + n);
    group = size + n;
    number = ascending = group + n;
    first = staged = sorted = number + n;
    crowded = first + n;
    slot = crowded + n / 32 + 2 - n % 2;  // so that what follows is a multiple of 8 bytes
    sorted_words = reinterpret_cast<Word<A>*>(sizeof(A) == 4 ? number : slot + 0);
  }
};
