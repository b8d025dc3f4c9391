// SPDX-License-Identifier: Apache-2.0
// A team runs the steps of one image: a thread of the CPU, or a block of a GPU (select_cuda.cuh).
// Functions of a team are written once for both.
#pragma once

#include "../tensors.h"

#if defined(__CUDACC__)
#define TOKENOPS_TEAM __device__ __forceinline__
#else
#define TOKENOPS_TEAM TOKENOPS_INLINE
#endif

namespace tokenops::matching {

// One thread.
struct Serial {
  // Call use(i) for i < count, in any order.
  template <class Use>
  void for_each(int count, const Use& use) const {
    for (int i = 0; i < count; ++i) use(i);
  }
  // Call use(i, load(i)) for i < count, in any order. No load may depend on a use.
  template <class Load, class Use>
  void for_each(int count, const Load& load, const Use& use) const {
    for (int i = 0; i < count; ++i) use(i, load(i));
  }
  // Call use(i, value(i), before) for i < count, where `before` is the sum of the values before i.
  // Returns the sum of all values.
  template <class Value, class Use>
  int scan(int count, const Value& value, const Use& use) const {
    int before = 0;
    for (int i = 0; i < count; ++i) {
      const int mine = value(i);
      use(i, mine, before);
      before += mine;
    }
    return before;
  }
  // Wait until all threads of the team are here.
  void sync() const {}
  // Atomic among the threads of the team.
  void add(int32_t* to, int32_t value) const { *to += value; }
  void min(int32_t* to, int32_t value) const { *to = value < *to ? value : *to; }
};

// Call give(i, n) for the n-th i < count of those that `among` is true of. Returns how many they
// are.
template <class Team, class Among, class Give>
TOKENOPS_TEAM int enumerate(const Team& team, int count, const Among& among, const Give& give) {
  return team.scan(count, among, [&](int i, int is_among, int before) {
    if (is_among) give(i, before);
  });
}

}  // namespace tokenops::matching
