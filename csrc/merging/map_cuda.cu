// SPDX-License-Identifier: Apache-2.0
// CUDA operators tokenops::invert and tokenops::compose: token maps in CSR form.
#include "../sort.cuh"
#include "route.h"

namespace tokenops {
namespace {

using cuda::Target;

// Most tokens of an image that one block sorts.
constexpr int64_t kBlockTokens = 4096;
constexpr int kTokenBits = 12;

// One block for an image: tokens sorted by output token, and where each of those begins.
template <int Threads, int Items>
__global__ void __launch_bounds__(Threads)
    invert_block(Route route, int32_t* composed, int32_t* offsets, int32_t* members, int bits) {
  using Sort = cuda::BlockSort<uint32_t, Threads, Items>;
  const int64_t image = blockIdx.x;
  const int inputs = static_cast<int>(route.inputs), outputs = static_cast<int>(route.outputs);
  uint32_t keys[Items];
  TOKENOPS_UNROLL
  for (int i = 0; i < Items; ++i) {
    const int n = threadIdx.x * Items + i;
    int32_t m = outputs;  // dropped tokens come last, and what is no token
    if (n < inputs) {
      const int32_t to = route(image, n);
      if (composed != nullptr) composed[image * inputs + n] = to;
      if (to >= 0) m = to;
    }
    keys[i] = static_cast<uint32_t>(m) << kTokenBits | static_cast<uint32_t>(n);
  }
  char* const shared = cuda::shared_memory();
  Sort::sort(keys, kTokenBits, kTokenBits + bits, shared);
  // The last output token of each thread, for the next one to see where a group begins.
  int32_t* const last = reinterpret_cast<int32_t*>(shared);
  last[threadIdx.x] = static_cast<int32_t>(keys[Items - 1] >> kTokenBits);
  __syncthreads();
  int32_t before = threadIdx.x == 0 ? -1 : last[threadIdx.x - 1];
  int32_t* const ends = offsets + image * (outputs + 1);
  TOKENOPS_UNROLL
  for (int i = 0; i < Items; ++i) {
    const int at = threadIdx.x * Items + i;
    const int32_t m = static_cast<int32_t>(keys[i] >> kTokenBits);
    // A group without members begins where the next one does.
    for (int32_t group = before + 1; group <= m; ++group) ends[group] = at;
    before = m;
    if (at < inputs) {
      const int32_t n = static_cast<int32_t>(keys[i] & ((1u << kTokenBits) - 1));
      members[image * inputs + at] = m < outputs ? n : -1;
    }
  }
  if (threadIdx.x == Threads - 1) {
    for (int32_t group = before + 1; group <= outputs; ++group) ends[group] = inputs;
  }
}

// The same for images of any size: keys for a sort of the whole device ...
__global__ void __launch_bounds__(256)
    list_keys(Route route, int64_t count, int32_t* composed, uint64_t* keys, int32_t* values) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t image = i / route.inputs, n = i % route.inputs;
  const int32_t to = route(image, n);
  if (composed != nullptr) composed[i] = to;
  keys[i] = static_cast<uint64_t>(image * (route.outputs + 1) + (to < 0 ? route.outputs : to));
  values[i] = static_cast<int32_t>(n);
}

// ... then, for each sorted token, its place and the groups that begin with it.
__global__ void __launch_bounds__(256)
    read_keys(const uint64_t* keys, const int32_t* values, int64_t count, int64_t inputs,
              int64_t outputs, int32_t* offsets, int32_t* members) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t image = i / inputs, groups = outputs + 1;
  const int64_t m = static_cast<int64_t>(keys[i]) - image * groups;
  const bool first = i % inputs == 0, last = (i + 1) % inputs == 0;
  const int64_t before = first ? -1 : static_cast<int64_t>(keys[i - 1]) - image * groups;
  for (int64_t group = before + 1; group <= m; ++group) {
    offsets[image * groups + group] = static_cast<int32_t>(i % inputs);
  }
  if (last) {
    for (int64_t group = m + 1; group <= outputs; ++group) {
      offsets[image * groups + group] = static_cast<int32_t>(inputs);
    }
  }
  members[i] = m < outputs ? values[i] : -1;
}

template <int Threads, int Items>
void launch_invert(const Target& target, int64_t batch, const Route& route, int32_t* composed,
                   int32_t* offsets, int32_t* members) {
  using Sort = cuda::BlockSort<uint32_t, Threads, Items>;
  constexpr int64_t kBytes = Threads * static_cast<int64_t>(sizeof(int32_t));
  target.launch(invert_block<Threads, Items>,
                {batch, Threads, Sort::kSharedBytes > kBytes ? Sort::kSharedBytes : kBytes}, route,
                composed, offsets, members, cuda::bits_below(route.outputs + 1));
}

// Write offsets [B, M + 1] and members [B, N] of a route, and its outputs [B, N] where `composed`
// is not null.
void invert_route(const Target& target, int64_t batch, const Route& route, int32_t* composed,
                  int32_t* offsets, int32_t* members) {
  const int64_t count = batch * route.inputs;
  if (batch == 0) return;
  if (route.inputs == 0) {
    target.zero(offsets, batch * (route.outputs + 1) * static_cast<int64_t>(sizeof(int32_t)));
  } else if (route.inputs <= 1024 && route.outputs < 1 << 19) {
    launch_invert<256, 4>(target, batch, route, composed, offsets, members);
  } else if (route.inputs <= kBlockTokens && route.outputs < 1 << 19) {
    launch_invert<512, 8>(target, batch, route, composed, offsets, members);
  } else {
    const Tensor keys = target.empty({2, count}, ScalarType::Long);
    const Tensor values = target.empty({2, count}, ScalarType::Int);
    uint64_t* const key = static_cast<uint64_t*>(keys.mutable_data_ptr());
    int32_t* const value = output<int32_t>(values);
    const int64_t blocks = (count + 255) / 256;
    target.launch(list_keys, {blocks, 256}, route, count, composed, key, value);
    cuda::sort_pairs(target, key, key + count, value, value + count, count,
                     cuda::bits_below(batch * (route.outputs + 1)));
    target.launch(read_keys, {blocks, 256}, key + count, value + count, count, route.inputs,
                  route.outputs, offsets, members);
  }
}

std::tuple<Tensor, Tensor> invert(const Tensor& assign, int64_t num_tokens) {
  const Inversion given("tokenops::invert", assign, num_tokens);
  const Target target("tokenops::invert", assign);
  const Tensor offsets = target.empty({given.batch, num_tokens + 1}, ScalarType::Int);
  const Tensor members = target.empty({given.batch, given.route.inputs}, ScalarType::Int);
  invert_route(target, given.batch, given.route, nullptr, output<int32_t>(offsets),
               output<int32_t>(members));
  return {offsets, members};
}

std::tuple<Tensor, Tensor, Tensor> compose(const Tensor& assign, const Tensor& earlier,
                                           int64_t num_tokens) {
  const Composition given("tokenops::compose", assign, earlier, num_tokens);
  const Target target("tokenops::compose", earlier);
  target.expect("assign", assign);
  const int64_t inputs = given.route.inputs;
  const Tensor composed = target.empty({given.batch, inputs}, ScalarType::Int);
  const Tensor offsets = target.empty({given.batch, num_tokens + 1}, ScalarType::Int);
  const Tensor members = target.empty({given.batch, inputs}, ScalarType::Int);
  invert_route(target, given.batch, given.route, output<int32_t>(composed),
               output<int32_t>(offsets), output<int32_t>(members));
  return {composed, offsets, members};
}

const cuda::Reported reported_few("invert_block<256, 4>", invert_block<256, 4>, 256,
                                  cuda::BlockSort<uint32_t, 256, 4>::kSharedBytes);
const cuda::Reported reported_many("invert_block<512, 8>", invert_block<512, 8>, 512,
                                   cuda::BlockSort<uint32_t, 512, 8>::kSharedBytes);

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("invert", TORCH_BOX(&tokenops::invert));
  m.impl("compose", TORCH_BOX(&tokenops::compose));
}
