// SPDX-License-Identifier: Apache-2.0
// What is asked of `select`, which tokens a rule makes sources, and in what order sources merge:
// the index arithmetic of kernels, apart from them so that it can be tested on a CPU.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "../tensors.h"

namespace tokenops::matching {

// ---- sides ----

// Every stride-th token is a destination, the others are sources; each side counts its places from
// zero, in the order of the tokens.
struct Alternation {
  uint32_t stride;

  TOKENOPS_HOST_DEVICE int32_t destinations_before(uint32_t token) const {
    return static_cast<int32_t>(token / stride);
  }
  // Place of a token among the sources, -1 for destinations.
  TOKENOPS_HOST_DEVICE int32_t source_place(uint32_t token) const {
    const uint32_t before = token / stride;
    return token - before * stride == stride - 1 ? -1 : static_cast<int32_t>(token - before);
  }
  // Tokens by place; the stride of a source is at least two.
  TOKENOPS_HOST_DEVICE int32_t source(uint32_t place) const {
    return static_cast<int32_t>(place + place / (stride - 1));
  }
  TOKENOPS_HOST_DEVICE int32_t destination(uint32_t place) const {
    return static_cast<int32_t>(place * stride + stride - 1);
  }
};

// The closest number in [0, count), which has one at least.
TOKENOPS_HOST_DEVICE int32_t clamped(int64_t value, int32_t count) {
  return static_cast<int32_t>(value < 0 ? 0 : value >= count ? count - 1 : value);
}

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
  double threshold;        // where limited
  const void* thresholds;  // [B] of float or double that take its place, or null
  int64_t thresholds_stride;
  bool doubles;
  Alternation rule;        // the split, unless it is listed
  IndexList source_index;  // the split, if it is listed
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
    if (thresholds != nullptr) {
      const int64_t at = image * thresholds_stride;
      one.threshold = doubles ? static_cast<const double*>(thresholds)[at]
                              : static_cast<const float*>(thresholds)[at];
    }
    return one;
  }
  // Whether unmerged sources stand by falling score, and how many those are at most.
  TOKENOPS_HOST_DEVICE bool by_score() const { return tome && prefix == 0; }
  TOKENOPS_HOST_DEVICE int64_t most_sorted() const {
    const int64_t most = sources < tokens ? sources : tokens;
    if (!by_score() || limited || destinations == 0) return by_score() ? most : 0;
    return most > r ? most - r : 0;
  }
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

// ---- the order of sources ----

// An unsigned word for each source; those of smaller words merge first, of equals the lowest token.
template <class A>
using Word = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// The word of a score of -inf, the largest one that a score has.
template <class A>
constexpr Word<A> kUnscored = ~Word<A>{0} << (std::numeric_limits<A>::digits - 1);
// The word of protected tokens, which are a last resort.
template <class A>
constexpr Word<A> kProtected = kUnscored<A> + 1;
// The word of tokens that never merge.
template <class A>
constexpr Word<A> kNever = ~Word<A>{0};

// The word of a score: falls where scores rise. Both zeros are equal, and NaN is as -inf.
template <class A>
TOKENOPS_HOST_DEVICE Word<A> word_of(A score) {
  constexpr Word<A> kSign = Word<A>{1} << (8 * sizeof(A) - 1);
  if (score != score) return kUnscored<A>;
  if (score == 0) score = 0;
  Word<A> bits;
  memcpy(&bits, &score, sizeof(A));
  return bits & kSign ? bits : ~(bits | kSign);
}

// The last source to merge.
template <class W>
struct Last {
  W word;
  int32_t token;

  TOKENOPS_HOST_DEVICE bool includes(W other, int32_t other_token) const {
    return other < word || (other == word && other_token <= token);
  }
};

// ---- the n-th smallest of many numbers, digit by digit ----

constexpr int kDigitBits = 9;

TOKENOPS_HOST_DEVICE int bit_width(uint64_t x) {
#if defined(__CUDA_ARCH__)
  return 64 - __clzll(static_cast<long long>(x));
#else
  return x == 0 ? 0 : 64 - __builtin_clzll(x);
#endif
}

// Looked for is the one that is larger than `rank` others of `count` numbers in [low, high].
template <class W>
struct Interval {
  W low, high;
  int rank, count;

  // Whether all up to `high` are those up to the one looked for.
  TOKENOPS_HOST_DEVICE bool found() const { return rank + 1 == count; }
  TOKENOPS_HOST_DEVICE bool holds(W x) const { return low <= x && x <= high; }

  // A digit is what is left of the distance from `low` without the lowest so many bits.
  TOKENOPS_HOST_DEVICE int shift() const {
    const int bits = bit_width(static_cast<uint64_t>(high - low));
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }
  TOKENOPS_HOST_DEVICE int digit(W x, int shift) const {
    return static_cast<int>((x - low) >> shift);
  }
  // The numbers of one digit, of which there are `digit_count`, behind `before` smaller ones.
  TOKENOPS_HOST_DEVICE Interval of_digit(int digit, int shift, int before, int digit_count) const {
    const W first = low + (static_cast<W>(digit) << shift);
    const W width = (W{1} << shift) - 1;
    return {first, high - first > width ? first + width : high, rank - before, digit_count};
  }
};

// ---- members ----

// The members of a group up to so large are ordered by comparing each with each, which for half of
// N / size such groups costs no more than a pass over all tokens for each larger one.
TOKENOPS_HOST_DEVICE int compared_bits(int64_t tokens) {
  int bits = 5;
  while (bits < 10 && (int64_t{1} << (2 * bits)) < tokens) ++bits;
  return bits;
}

}  // namespace tokenops::matching
