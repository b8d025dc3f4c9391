// SPDX-License-Identifier: Apache-2.0
// A team is the threads that process one image: one thread of the CPU, or one block of a GPU
// (Block in select_cuda.cuh). A function that takes a team is written once for both.
#pragma once

#include "../tensors.h"

#if defined(__CUDACC__)
#define TOKENOPS_TEAM __device__ __forceinline__
#else
#define TOKENOPS_TEAM TOKENOPS_INLINE
#endif

namespace tokenops::matching {

// A team of one CPU thread.
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

// Number, from 0, the i < count that keep(i) holds for: call use(i, n) for the n-th one. Returns
// how many there are.
template <class Team, class Keep, class Use>
TOKENOPS_TEAM int enumerate(const Team& team, int count, const Keep& keep, const Use& use) {
  return team.scan(count, keep, [&](int i, int kept, int before) {
    if (kept) use(i, before);
  });
}

}  // namespace tokenops::matching
