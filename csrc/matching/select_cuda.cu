// SPDX-License-Identifier: Apache-2.0
// CUDA operator tokenops::select: the token map of the best pairs, in one launch.
#include "select_cuda.cuh"

#include "select_op.cuh"

namespace tokenops::matching {
namespace {

using cuda::Target;

// A block for an image. Arrays are in shared memory where there are none in global memory; then
// sorting may still be in shared memory.
template <class A, bool kShared>
__global__ void __launch_bounds__(kMostThreads, 1)
    select_images(Choice all, const A* __restrict__ score, const int32_t* __restrict__ choice,
                  char* arrays, int64_t array_bytes, bool sorts_in_shared, ChosenMap out) {
  const int64_t image = blockIdx.x;
  const Choice ask = all.row(image);
  char* const counters = cuda::shared_memory();
  char* const behind = counters + kCounterBytes;
  const Work<A> work(ask, counters, kShared ? behind : arrays + image * array_bytes,
                     !kShared && sorts_in_shared ? behind : nullptr);
  select_image(ask, score + image * all.sources, choice + image * all.sources, work,
               out.row(all, image));
}

int threads_for(int64_t tokens) {
  return tokens <= 128 ? 128 : tokens <= 1056 ? 256 : tokens <= 2112 ? 512 : kMostThreads;
}

template <class A>
void launch_select(const Target& target, const Choice& ask, int64_t batch, const Tensor& score,
                   const Tensor& choice, const ChosenMap& out) {
  const A* const scores = static_cast<const A*>(score.const_data_ptr());
  const int32_t* const choices = static_cast<const int32_t*>(choice.const_data_ptr());
  const int threads = threads_for(ask.tokens);
  if (few_bytes<A>(ask) <= target.max_shared_bytes()) {
    target.launch(select_images<A, true>, {batch, threads, few_bytes<A>(ask)}, ask, scores, choices,
                  nullptr, 0, false, out);
    return;
  }
  const int64_t bytes = array_bytes<A>(ask), sorting = kCounterBytes + sorting_bytes<A>(ask);
  const Tensor arrays = target.empty({batch, bytes}, ScalarType::Byte);
  const bool sorts_in_shared = sorting <= target.max_shared_bytes();
  target.launch(select_images<A, false>,
                {batch, threads, sorts_in_shared ? sorting : kCounterBytes}, ask, scores, choices,
                static_cast<char*>(arrays.mutable_data_ptr()), bytes, sorts_in_shared, out);
}

// An image of 1024 tokens, for the shared memory that the list of kernels tells.
Choice usual_image() {
  Choice ask = {};
  ask.tokens = 1024;
  return ask;
}
const cuda::Reported reported_floats("select_images<float, true>", select_images<float, true>,
                                     threads_for(1024), few_bytes<float>(usual_image()));
const cuda::Reported reported_doubles("select_images<double, true>", select_images<double, true>,
                                      threads_for(1024), few_bytes<double>(usual_image()));
const cuda::Reported reported_many_floats("select_images<float, false>",
                                          select_images<float, false>, kMostThreads, kCounterBytes);
const cuda::Reported reported_many_doubles("select_images<double, false>",
                                           select_images<double, false>, kMostThreads,
                                           kCounterBytes);

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> select(
    const Tensor& score, const Tensor& choice, int64_t num_tokens, int64_t r,
    const std::optional<double>& threshold, const std::optional<Tensor>& thresholds,
    const Text& order, int64_t num_prefix, const std::optional<Tensor>& is_protected,
    const std::optional<Tensor>& source_index, const std::optional<Tensor>& destination_index,
    int64_t stride, int64_t grid_width, int64_t cell_height, const std::optional<Tensor>& cell) {
  const char* const op = "tokenops::select";
  STD_TORCH_CHECK(score.dim() == 2 && choice.dim() == 2, op, ": expected score and choice [B, Ns]");
  const int64_t batch = score.size(0);
  const Target target(op, score);
  target.expect("choice", choice);
  target.expect("protected", is_protected);
  target.expect("source_index", source_index);
  target.expect("destination_index", destination_index);
  target.expect("thresholds", thresholds);
  const Lists lists = make_lists(target, op, batch, num_tokens, num_prefix, source_index,
                                 destination_index, stride, grid_width, cell_height, cell);
  const Choice ask = make_choice(op, batch, num_tokens, r, num_prefix, is_protected, lists.source,
                                 lists.destination, stride, threshold, thresholds, order);
  STD_TORCH_CHECK(choice.size(0) == batch && choice.size(1) == score.size(1) &&
                      (score.size(1) == ask.sources || num_tokens == 0),
                  op, ": expected score and choice [", batch, ", ", ask.sources, "], got [", batch,
                  ", ", score.size(1), "] and [", choice.size(0), ", ", choice.size(1), "]");
  const bool is_double = score.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || score.scalar_type() == ScalarType::Float, op,
                  ": expected score of dtype float32 or float64, got ", score.scalar_type());
  STD_TORCH_CHECK(choice.scalar_type() == ScalarType::Int, op,
                  ": expected choice of dtype int32, got ", choice.scalar_type());
  const Tensor scores = as_contiguous(score), choices = as_contiguous(choice);

  const NewMaps maps(target, ask, batch);
  if (is_double) {
    launch_select<double>(target, ask, batch, scores, choices, maps.data());
  } else {
    launch_select<float>(target, ask, batch, scores, choices, maps.data());
  }
  return maps.tensors;
}

}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("select", TORCH_BOX(&tokenops::matching::select));
}
