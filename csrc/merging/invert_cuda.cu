// SPDX-License-Identifier: Apache-2.0
// CUDA operators tokenops::invert and tokenops::compose, which make the CSR form of a token map.
#include "../sort.cuh"
#include "arguments.h"

namespace tokenops::merging {
namespace {

using cuda::Target;

// A block sorts keys of 32 bits: the output token, then the input token in kTokenBits bits.
constexpr int kTokenBits = 12;
constexpr int64_t kBlockTokens = 1 << kTokenBits;
constexpr int64_t kBlockOutputs = 1 << 19;

// One block for each image: sort its tokens by output token, and find where each segment begins.
template <int Threads, int Items>
__global__ void __launch_bounds__(Threads)
    invert_block(Assignment map, int32_t* composed, int32_t* offsets, int32_t* members, int bits) {
  using Sort = cuda::BlockSort<uint32_t, Threads, Items>;
  const int64_t image = blockIdx.x;
  const int inputs = static_cast<int>(map.inputs), outputs = static_cast<int>(map.outputs);
  uint32_t keys[Items];
  TOKENOPS_UNROLL
  for (int i = 0; i < Items; ++i) {
    const int n = threadIdx.x * Items + i;
    int32_t m = outputs;  // dropped tokens, and elements past the last token, go to the end
    if (n < inputs) {
      const int32_t to = map(image, n);
      if (composed != nullptr) composed[image * inputs + n] = to;
      if (to >= 0) m = to;
    }
    keys[i] = static_cast<uint32_t>(m) << kTokenBits | static_cast<uint32_t>(n);
  }
  char* const shared = cuda::shared_memory();
  Sort::sort(keys, kTokenBits, kTokenBits + bits, shared);
  // Each thread compares its first output token with the last one of the thread before.
  int32_t* const last = reinterpret_cast<int32_t*>(shared);
  last[threadIdx.x] = static_cast<int32_t>(keys[Items - 1] >> kTokenBits);
  __syncthreads();
  int32_t before = threadIdx.x == 0 ? -1 : last[threadIdx.x - 1];
  int32_t* const starts = offsets + image * (outputs + 1);
  TOKENOPS_UNROLL
  for (int i = 0; i < Items; ++i) {
    const int at = threadIdx.x * Items + i;
    const int32_t m = static_cast<int32_t>(keys[i] >> kTokenBits);
    // An empty segment begins where the next one does.
    for (int32_t next = before + 1; next <= m; ++next) starts[next] = at;
    before = m;
    if (at < inputs) {
      const int32_t n = static_cast<int32_t>(keys[i] & ((1u << kTokenBits) - 1));
      members[image * inputs + at] = m < outputs ? n : -1;
    }
  }
  if (threadIdx.x == Threads - 1) {
    for (int32_t next = before + 1; next <= outputs; ++next) starts[next] = inputs;
  }
}

// Images of any size are sorted by the whole device. This kernel makes the keys, for all images.
__global__ void __launch_bounds__(256)
    make_keys(Assignment map, int64_t count, int32_t* composed, uint64_t* keys, int32_t* values) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t image = i / map.inputs, n = i % map.inputs;
  const int32_t to = map(image, n);
  if (composed != nullptr) composed[i] = to;
  keys[i] = static_cast<uint64_t>(image * (map.outputs + 1) + (to < 0 ? map.outputs : to));
  values[i] = static_cast<int32_t>(n);
}

// This kernel reads the sorted keys: a thread writes its token to `members`, and the offsets of the
// segments that begin at it.
__global__ void __launch_bounds__(256)
    read_keys(const uint64_t* keys, const int32_t* values, int64_t count, int64_t inputs,
              int64_t outputs, int32_t* offsets, int32_t* members) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t image = i / inputs, slots = outputs + 1;
  const int64_t m = static_cast<int64_t>(keys[i]) - image * slots;
  const bool first = i % inputs == 0, last = (i + 1) % inputs == 0;
  const int64_t before = first ? -1 : static_cast<int64_t>(keys[i - 1]) - image * slots;
  for (int64_t next = before + 1; next <= m; ++next) {
    offsets[image * slots + next] = static_cast<int32_t>(i % inputs);
  }
  if (last) {
    for (int64_t next = m + 1; next <= outputs; ++next) {
      offsets[image * slots + next] = static_cast<int32_t>(inputs);
    }
  }
  members[i] = m < outputs ? values[i] : -1;
}

template <int Threads, int Items>
void launch_block(const Target& target, const Assignment& map, int32_t* composed, int32_t* offsets,
                  int32_t* members) {
  using Sort = cuda::BlockSort<uint32_t, Threads, Items>;
  constexpr int64_t kBytes = Threads * static_cast<int64_t>(sizeof(int32_t));
  target.launch(invert_block<Threads, Items>,
                {map.batch, Threads, std::max(Sort::kSharedBytes, kBytes)}, map, composed, offsets,
                members, cuda::bits_below(map.outputs + 1));
}

void launch_device(const Target& target, const Assignment& map, int32_t* composed, int32_t* offsets,
                   int32_t* members) {
  const int64_t count = map.batch * map.inputs, blocks = (count + 255) / 256;
  const Tensor keys = target.empty({2, count}, ScalarType::Long);
  const Tensor values = target.empty({2, count}, ScalarType::Int);
  uint64_t* const key = static_cast<uint64_t*>(keys.mutable_data_ptr());
  int32_t* const value = output<int32_t>(values);
  target.launch(make_keys, {blocks, 256}, map, count, composed, key, value);
  cuda::sort_pairs(target, key, key + count, value, value + count, count,
                   cuda::bits_below(map.batch * (map.outputs + 1)));
  target.launch(read_keys, {blocks, 256}, key + count, value + count, count, map.inputs,
                map.outputs, offsets, members);
}

// Make offsets [B, M + 1] and members [B, N] of a map, and fill `composed` [B, N] unless it is
// null.
std::tuple<Tensor, Tensor> run_invert(const Target& target, const Assignment& map,
                                      int32_t* composed) {
  const Tensor offsets_out = target.empty({map.batch, map.outputs + 1}, ScalarType::Int);
  const Tensor members_out = target.empty({map.batch, map.inputs}, ScalarType::Int);
  int32_t* const offsets = output<int32_t>(offsets_out);
  int32_t* const members = output<int32_t>(members_out);
  const bool few_outputs = map.outputs < kBlockOutputs;
  if (map.batch > 0 && map.inputs == 0) {
    target.zero(offsets, map.batch * (map.outputs + 1) * static_cast<int64_t>(sizeof(int32_t)));
  } else if (map.inputs <= 1024 && few_outputs) {
    launch_block<256, 4>(target, map, composed, offsets, members);
  } else if (map.inputs <= kBlockTokens && few_outputs) {
    launch_block<512, 8>(target, map, composed, offsets, members);
  } else if (map.batch > 0) {
    launch_device(target, map, composed, offsets, members);
  }
  return {offsets_out, members_out};
}

std::tuple<Tensor, Tensor> invert(const Tensor& assign, int64_t num_tokens) {
  const InvertInputs given("tokenops::invert", assign, std::nullopt, num_tokens);
  return run_invert(Target("tokenops::invert", assign), given.map, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> compose(const Tensor& assign, const Tensor& earlier,
                                           int64_t num_tokens) {
  const InvertInputs given("tokenops::compose", assign, earlier, num_tokens);
  const Target target("tokenops::compose", earlier);
  target.expect("assign", assign);
  const Tensor composed = target.empty({given.map.batch, given.map.inputs}, ScalarType::Int);
  const auto [offsets, members] = run_invert(target, given.map, output<int32_t>(composed));
  return {composed, offsets, members};
}

const cuda::Reported reported_few("invert_block<256, 4>", invert_block<256, 4>, 256,
                                  cuda::BlockSort<uint32_t, 256, 4>::kSharedBytes);
const cuda::Reported reported_many("invert_block<512, 8>", invert_block<512, 8>, 512,
                                   cuda::BlockSort<uint32_t, 512, 8>::kSharedBytes);

}  // namespace
}  // namespace tokenops::merging

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("invert", TOKENOPS_BOX(&tokenops::merging::invert));
  m.impl("compose", TOKENOPS_BOX(&tokenops::merging::compose));
}
