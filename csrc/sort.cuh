// SPDX-License-Identifier: Apache-2.0
// Stable radix sorts by a range of bits of the keys: one by a block, one by the whole device.
#pragma once

#include "cuda.cuh"

#if defined(TOKENOPS_EMULATE)
#include <algorithm>
#else
#include <cub/block/block_radix_sort.cuh>
#endif

namespace tokenops::cuda {

// The number of bits of the numbers below `count`.
TOKENOPS_HOST_DEVICE int bits_below(int64_t count) {
  int bits = 0;
  while (bits < 63 && (int64_t{1} << bits) < count) ++bits;
  return bits;
}

// Sort Threads * Items keys by a block of Threads threads. Thread t holds keys [t * Items,
// (t + 1) * Items) before and after. `shared`: kSharedBytes of shared memory.
template <class Key, int Threads, int Items>
struct BlockSort {
#if defined(TOKENOPS_EMULATE)
  static constexpr int64_t kSharedBytes = sizeof(Key) * Threads * Items;

  static void sort(Key (&keys)[Items], int begin_bit, int end_bit, char* shared) {
    Key* all = reinterpret_cast<Key*>(shared);
    for (int i = 0; i < Items; ++i) all[threadIdx.x * Items + i] = keys[i];
    __syncthreads();
    if (threadIdx.x == 0) {
      const Key mask = (Key{1} << (end_bit - begin_bit)) - 1;
      std::stable_sort(all, all + Threads * Items, [=](Key a, Key b) {
        return (a >> begin_bit & mask) < (b >> begin_bit & mask);
      });
    }
    __syncthreads();
    for (int i = 0; i < Items; ++i) keys[i] = all[threadIdx.x * Items + i];
    __syncthreads();
  }
#else
  using Sort = cub::BlockRadixSort<Key, Threads, Items>;
  static constexpr int64_t kSharedBytes = sizeof(typename Sort::TempStorage);

  static __device__ __forceinline__ void sort(Key (&keys)[Items], int begin_bit, int end_bit,
                                              char* shared) {
    Sort(*reinterpret_cast<typename Sort::TempStorage*>(shared)).Sort(keys, begin_bit, end_bit);
    __syncthreads();
  }
#endif
};

// Sort `count` pairs by the lowest `bits` bits of their keys, on the target's stream (sort.cu).
void sort_pairs(const Target& target, const uint64_t* keys, uint64_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int bits);

}  // namespace tokenops::cuda
