// SPDX-License-Identifier: Apache-2.0
// The radix sort by a whole device: a file of its own, because it takes long to compile.
#include "sort.cuh"

#if defined(TOKENOPS_EMULATE)
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace tokenops::cuda {

void sort_pairs(const Target& target, const uint64_t* keys, uint64_t* sorted_keys,
                const int32_t* values, int32_t* sorted_values, int64_t count, int bits) {
#if defined(TOKENOPS_EMULATE)
  std::vector<int64_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  const uint64_t mask = bits < 64 ? (uint64_t{1} << bits) - 1 : ~uint64_t{0};
  std::stable_sort(order.begin(), order.end(),
                   [=](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
#else
  size_t bytes = 0;
  const auto sort = [&](void* memory) {
    target.check(cub::DeviceRadixSort::SortPairs(memory, bytes, keys, sorted_keys, values,
                                                 sorted_values, count, 0, bits, target.stream()));
  };
  sort(nullptr);
  const Tensor memory = target.empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
  sort(memory.mutable_data_ptr());
#endif
}

}  // namespace tokenops::cuda
