// SPDX-License-Identifier: Apache-2.0
// CUDA operator tokenops::match: one launch for small images; for others tokenops::search, which
// Triton serves, and tokenops::select.
#include "match_cuda.cuh"

#include "arguments.h"
#include "select_op.cuh"

#include <array>
#include <tuple>

namespace tokenops::matching {
namespace {

using cuda::Target;

// Larger images are for many blocks.
constexpr int64_t kMostBlockTokens = 1056;

// A kernel for an image by one block; none where the function is null.
struct BlockMatch {
  void (*kernel)(MetricRows, Choice, bool, ChosenMap) = nullptr;
  int threads = 0;
  int64_t shared_bytes = 0;
};

template <bool Exact, int Steps, int Tiles>
BlockMatch block_match(const Choice& ask) {
  return {match_image<Exact, Steps, Tiles>, search_warps(Steps, Tiles) * cuda::kWarpSize,
          MatchLayout(ask, Steps, Tiles).bytes};
}

// What is not exact in half precision takes more registers: such rows may be less wide.
BlockMatch choose_kernel(const Choice& ask, const MetricRows& x) {
  if (ask.tokens == 0 || ask.tokens > kMostBlockTokens) return {};
  const bool few = ask.sources <= search_warps(8, 1) * 16;
  if (x.heads == 1 && x.type != 0) {
    if (x.width > 128) return {};
    if (x.width > 64) return block_match<true, 16, 1>(ask);
    return few ? block_match<true, 8, 1>(ask) : block_match<true, 8, 2>(ask);
  }
  if (x.width > 80) return {};
  if (x.width > 64) return block_match<false, 10, 1>(ask);
  if (!few) return block_match<false, 8, 2>(ask);
  return x.width > 32 ? block_match<false, 8, 1>(ask) : block_match<false, 4, 1>(ask);
}

// The rows of a metric, and whether a block knows their dtype.
bool describe(const Tensor& metric, MetricRows* x) {
  const int64_t dims = metric.dim();
  switch (metric.scalar_type()) {
    case ScalarType::Float: x->type = 0; break;
    case ScalarType::Half: x->type = 1; break;
    case ScalarType::BFloat16: x->type = 2; break;
    default: return false;
  }
  x->data = metric.const_data_ptr();
  x->heads = static_cast<int32_t>(dims == 4 ? metric.size(1) : 1);
  x->width = static_cast<int32_t>(metric.size(dims - 1));
  x->batch_stride = metric.stride(0);
  x->head_stride = dims == 4 ? metric.stride(1) : 0;
  x->token_stride = metric.stride(dims - 2);
  x->stride = metric.stride(dims - 1);
  const int64_t pair = x->type == 0 ? 8 : 4;  // bytes
  x->paired = x->stride == 1 && x->width % 2 == 0 && x->batch_stride % 2 == 0 &&
              x->head_stride % 2 == 0 && x->token_stride % 2 == 0 &&
              reinterpret_cast<uintptr_t>(x->data) % pair == 0;
  return metric.size(dims - 1) <= INT32_MAX;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> match(
    const Tensor& metric, const Text& similarity, int64_t r, const std::optional<double>& threshold,
    const std::optional<Tensor>& thresholds, const Text& order, int64_t num_prefix,
    const std::optional<Tensor>& is_protected, const std::optional<Tensor>& source_index,
    const std::optional<Tensor>& destination_index, int64_t stride, int64_t grid_width,
    int64_t cell_height, const std::optional<Tensor>& cell) {
  const char* const op = "tokenops::match";
  check_metric(op, metric);
  const bool cosine = is_cosine(op, similarity);
  const int64_t batch = metric.size(0), tokens = metric.size(metric.dim() - 2);
  const Target target(op, metric);
  target.expect("protected", is_protected);
  target.expect("source_index", source_index);
  target.expect("destination_index", destination_index);
  target.expect("thresholds", thresholds);
  const Lists lists = make_lists(target, op, batch, tokens, num_prefix, source_index,
                                 destination_index, stride, grid_width, cell_height, cell);
  const Choice ask = make_choice(op, batch, tokens, r, num_prefix, is_protected, lists.source,
                                 lists.destination, stride, threshold, thresholds, order);
  MetricRows x;
  if (describe(metric, &x)) {
    const BlockMatch block = choose_kernel(ask, x);
    if (block.kernel != nullptr && block.shared_bytes <= target.max_shared_bytes()) {
      const NewMaps maps(target, ask, batch);
      target.launch(block.kernel, {batch, block.threads, block.shared_bytes}, x, ask, cosine,
                    maps.data());
      return maps.tensors;
    }
  }
  const int64_t no_grid = 0, no_height = 1;
  const std::optional<Tensor> no_cell;
  std::array<StableIValue, 10> stack{torch::stable::detail::from(metric),
                                     torch::stable::detail::from(std::string(similarity)),
                                     torch::stable::detail::from(num_prefix),
                                     torch::stable::detail::from(is_protected),
                                     torch::stable::detail::from(lists.source),
                                     torch::stable::detail::from(lists.destination),
                                     torch::stable::detail::from(stride),
                                     torch::stable::detail::from(no_grid),
                                     torch::stable::detail::from(no_height),
                                     torch::stable::detail::from(no_cell)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tokenops::search", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor score = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor choice = torch::stable::detail::to<Tensor>(stack[1]);
  return select(score, choice, tokens, r, threshold, thresholds, order, num_prefix, is_protected,
                lists.source, lists.destination, stride, 0, 1, std::nullopt);
}

// Images of ViT-B/16 and, by two tiles a warp, of ViT-L/16 at 512 pixels.
template <bool Exact, int Steps, int Tiles>
cuda::Reported report(const char* name) {
  Choice ask = {};
  ask.tokens = Tiles == 1 ? 197 : 1025;
  ask.destinations = ask.tokens / 2;
  ask.sources = ask.tokens - ask.destinations;
  const BlockMatch block = block_match<Exact, Steps, Tiles>(ask);
  return {name, block.kernel, block.threads, block.shared_bytes};
}
const cuda::Reported reported[] = {report<true, 8, 1>("match_image<true, 8, 1>"),
                                   report<true, 8, 2>("match_image<true, 8, 2>"),
                                   report<true, 16, 1>("match_image<true, 16, 1>"),
                                   report<false, 4, 1>("match_image<false, 4, 1>"),
                                   report<false, 8, 1>("match_image<false, 8, 1>"),
                                   report<false, 8, 2>("match_image<false, 8, 2>"),
                                   report<false, 10, 1>("match_image<false, 10, 1>")};

}  // namespace
}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("match", TORCH_BOX(&tokenops::matching::match));
}
