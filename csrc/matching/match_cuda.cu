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
constexpr int64_t kMostTokens = 1056;

template <bool Exact, int Steps, int Tiles>
bool launch_match(const Target& target, const Choice& ask, int64_t batch, const MetricRows& x,
                  bool cosine, const ChosenMap& out) {
  const MatchLayout at(ask, Steps, Tiles);
  if (at.bytes > target.max_shared_bytes()) return false;
  target.launch(match_image<Exact, Steps, Tiles>,
                {batch, search_warps(Steps, Tiles) * cuda::kWarpSize, at.bytes}, x, ask, cosine,
                out);
  return true;
}

// Whether a block could hold an image, and then its launch. What is not exact in half precision
// takes more registers: such rows may be less wide.
bool match_small(const Target& target, const Choice& ask, int64_t batch, const MetricRows& x,
                 bool cosine, const ChosenMap& out) {
  if (ask.tokens == 0 || ask.tokens > kMostTokens) return false;
  const bool few = ask.sources <= search_warps(8, 1) * 16;
  if (x.heads == 1 && x.type != 0) {
    if (x.width > 128) return false;
    const auto launch = x.width > 64 ? launch_match<true, 16, 1>
                        : few        ? launch_match<true, 8, 1>
                                     : launch_match<true, 8, 2>;
    return launch(target, ask, batch, x, cosine, out);
  }
  if (x.width > 80) return false;
  const auto launch = x.width > 64   ? launch_match<false, 10, 1>
                      : !few         ? launch_match<false, 8, 2>
                      : x.width > 32 ? launch_match<false, 8, 1>
                                     : launch_match<false, 4, 1>;
  return launch(target, ask, batch, x, cosine, out);
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
    const Tensor& metric, int64_t r, int64_t num_prefix, const std::optional<Tensor>& is_protected,
    const std::optional<Tensor>& source_index, const std::optional<Tensor>& destination_index,
    int64_t stride, const std::optional<double>& threshold, const std::string& order,
    const std::string& similarity) {
  const char* const op = "tokenops::match";
  check_metric(op, metric);
  const bool cosine = is_cosine(op, similarity);
  const int64_t batch = metric.size(0), tokens = metric.size(metric.dim() - 2);
  const Choice ask = make_choice(op, batch, tokens, r, num_prefix, is_protected, source_index,
                                 destination_index, stride, threshold, order);
  MetricRows x;
  if (describe(metric, &x)) {
    const Target target(op, metric);
    const NewMaps maps(target, ask, batch);
    if (match_small(target, ask, batch, x, cosine, maps.data())) return maps.tensors;
  }
  std::array<StableIValue, 7> stack{torch::stable::detail::from(metric),
                                    torch::stable::detail::from(num_prefix),
                                    torch::stable::detail::from(is_protected),
                                    torch::stable::detail::from(source_index),
                                    torch::stable::detail::from(destination_index),
                                    torch::stable::detail::from(stride),
                                    torch::stable::detail::from(similarity)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("tokenops::search", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor score = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor choice = torch::stable::detail::to<Tensor>(stack[1]);
  return select(score, choice, tokens, r, num_prefix, is_protected, source_index, destination_index,
                stride, threshold, order);
}

// Images of ViT-B/16 and, by two tiles a warp, of ViT-L/16 at 512 pixels.
template <bool Exact, int Steps, int Tiles>
cuda::Listed listed(const char* name) {
  Choice ask = {};
  ask.tokens = Tiles == 1 ? 197 : 1025;
  ask.destinations = ask.tokens / 2;
  ask.sources = ask.tokens - ask.destinations;
  return {name, match_image<Exact, Steps, Tiles>, search_warps(Steps, Tiles) * cuda::kWarpSize,
          MatchLayout(ask, Steps, Tiles).bytes};
}
const cuda::Listed listed_kernels[] = {listed<true, 8, 1>("match_image<true, 8, 1>"),
                                       listed<true, 8, 2>("match_image<true, 8, 2>"),
                                       listed<true, 16, 1>("match_image<true, 16, 1>"),
                                       listed<false, 4, 1>("match_image<false, 4, 1>"),
                                       listed<false, 8, 1>("match_image<false, 8, 1>"),
                                       listed<false, 8, 2>("match_image<false, 8, 2>"),
                                       listed<false, 10, 1>("match_image<false, 10, 1>")};

}  // namespace
}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("match", TORCH_BOX(&tokenops::matching::match));
}
