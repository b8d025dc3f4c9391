// SPDX-License-Identifier: Apache-2.0
// CUDA operators tokenops::match_image, which matches small images in one launch, one block for
// each, and tokenops::match_fits, which tells whether one block is enough.
#include "search_cuda.cuh"
#include "select_cuda.cuh"

namespace tokenops::matching {
namespace {

// Larger images need more than one block each to keep a device busy.
constexpr int64_t kMaxImageTokens = 1056;

// ---- the kernel ----

// Bytes that stay in use from the search to the selection: the lists of sources and destinations,
// node_max, node_idx, and SearchMemory::first.
TOKENOPS_HOST_DEVICE int64_t kept_bytes(const Request& ask) {
  return (4 * (3 * int64_t{ask.num_src} + ask.num_dst + 1) + 15) / 16 * 16;
}
// Bytes of shared memory of a block. Listing, search and selection use the same memory in turn; the
// listing needs less than the selection.
TOKENOPS_HOST_DEVICE int64_t block_bytes(const Request& ask, int steps, int tiles) {
  const int64_t search = search_bytes(ask.num_dst, steps, tiles);
  const int64_t select = shared_bytes<float>(ask);
  return kept_bytes(ask) + (search > select ? search : select);
}

// List the sources, and the distinct destinations, ascending. Returns the number of destinations.
__device__ __forceinline__ int list_tokens(const Request& ask, int32_t* src, int32_t* dst,
                                           int* scratch) {
  const Block block = {scratch};
  if (!ask.listed) {
    block.for_each(ask.num_src, [&](int i) { src[i] = ask.pattern.src(i); });
    block.for_each(ask.num_dst, [&](int i) { dst[i] = ask.pattern.dst(i); });
    return ask.num_dst;
  }
  int* const is_dst = scratch + kMaxThreads / kWarpSize + 1;  // [tokens]
  block.for_each(ask.tokens, [&](int t) { is_dst[t] = 0; });
  __syncthreads();
  block.for_each(ask.num_src, [&](int i) { src[i] = ask.src(i); });
  block.for_each(ask.num_dst, [&](int i) { is_dst[ask.dst(i)] = 1; });
  __syncthreads();
  const int found = enumerate(
      block, ask.tokens, [&](int t) { return is_dst[t] != 0; }, [&](int t, int n) { dst[n] = t; });
  __syncthreads();
  return found;
}

// Blocks that share a multiprocessor. On sm_80, two would make inexact rows of 64 elements spill.
template <bool Exact, int Steps, int Tiles>
constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (!Exact && Steps == 8) return 1;
#endif
  return two_per_sm(Steps, Tiles) ? 2 : 1;
}

template <bool Exact, int Steps, int Tiles>
__global__ void __launch_bounds__(search_warps(Steps, Tiles) * kWarpSize,
                                  resident_blocks<Exact, Steps, Tiles>())
    match_image(MetricRows x, Request all, bool cosine, TokenMap maps) {
  const int64_t image = blockIdx.x;
  const Request ask = all.image(image);
  char* const memory = cuda::shared_memory();
  char* const rest = memory + kept_bytes(ask);
  float* const node_max = reinterpret_cast<float*>(memory);
  int32_t* const node_idx = reinterpret_cast<int32_t*>(node_max + ask.num_src);
  int32_t* const src = node_idx + ask.num_src;
  int32_t* const dst = src + ask.num_src;

  const int num_dst = list_tokens(ask, src, dst, reinterpret_cast<int*>(rest));
  const SearchMemory arrays = {src, dst, node_max, node_idx, dst + ask.num_dst, rest};
  const auto takes_part = [&](int t) { return t >= ask.prefix && !ask.is_protected(t); };
  search_image<Exact, Steps, Tiles>(x, image, ask.num_src, num_dst, cosine, arrays, takes_part);
  select_image(ask, node_max, Work<float>(ask, node_idx, rest, rest + kCounterBytes, nullptr),
               maps);
}

// ---- its launch ----

// A kernel that matches an image by one block. `function` is null if no kernel fits.
struct ImageKernel {
  void (*function)(MetricRows, Request, bool, TokenMap) = nullptr;
  int threads = 0;
  int64_t shared_bytes = 0;

  bool fits(const Target& target) const {
    return function != nullptr && shared_bytes <= target.max_shared_bytes();
  }
};

template <bool Exact, int Steps, int Tiles>
ImageKernel image_kernel(const Request& ask) {
  return {match_image<Exact, Steps, Tiles>, search_warps(Steps, Tiles) * kWarpSize,
          block_bytes(ask, Steps, Tiles)};
}

// Choose the kernel for a width. Inexact rows take more registers, so they must be narrower.
ImageKernel choose_kernel(const Request& ask, const Metric& x) {
  if (x.dtype == ScalarType::Double || ask.tokens == 0 || ask.tokens > kMaxImageTokens) return {};
  const bool few = ask.num_src <= search_warps(8, 1) * 16;
  if (x.heads == 1 && x.dtype != ScalarType::Float) {
    if (x.width > 128) return {};
    if (x.width > 64) return image_kernel<true, 16, 1>(ask);
    return few ? image_kernel<true, 8, 1>(ask) : image_kernel<true, 8, 2>(ask);
  }
  if (x.width > 80) return {};
  if (x.width > 64) return image_kernel<false, 10, 1>(ask);
  if (!few) return image_kernel<false, 8, 2>(ask);
  return x.width > 32 ? image_kernel<false, 8, 1>(ask) : image_kernel<false, 4, 1>(ask);
}

const char* const kOp = "tokenops::match";

// Whether the images of a metric fit. Without lists the split is strided; a grid must be listed.
bool match_fits(const Tensor& metric, const OptionalTensor& src_index,
                const OptionalTensor& dst_index, int64_t stride) {
  const Metric x(kOp, metric);
  const Target target(kOp, metric);
  SplitArgs split = {0, {}, src_index, dst_index, stride, 0, 1, {}};
  const Request ask = device_request(target, kOp, metric, x.tokens, {0, {}, {}, "position"}, split);
  return choose_kernel(ask, x).fits(target);
}

MapTensors match_images(const Tensor& metric, const Text& similarity, const RequestArgs& args,
                        SplitArgs split) {
  const Metric x(kOp, metric);
  const bool cosine = is_cosine(kOp, similarity);
  const Target target(kOp, metric);
  const Request ask = device_request(target, kOp, metric, x.tokens, args, split);
  const ImageKernel kernel = choose_kernel(ask, x);
  STD_TORCH_CHECK(kernel.fits(target), "tokenops::match_image: an image of ", x.tokens, " tokens, ",
                  x.heads, " heads and width ", x.width, " in ", x.dtype,
                  " does not fit one block of this device");
  const MapTensors maps = new_map(metric, ask, x.batch);
  target.launch(kernel.function, {x.batch, kernel.threads, kernel.shared_bytes}, MetricRows(x), ask,
                cosine, pointers(maps));
  return maps;
}

// Report the shared memory of ViT-B/16 and, where a warp has two tiles, of ViT-L/16 at 512 pixels.
template <bool Exact, int Steps, int Tiles>
cuda::Reported report(const char* name) {
  Request ask = {};
  ask.tokens = Tiles == 1 ? 197 : 1025;
  ask.num_dst = ask.tokens / 2;
  ask.num_src = ask.tokens - ask.num_dst;
  const ImageKernel kernel = image_kernel<Exact, Steps, Tiles>(ask);
  return {name, kernel.function, kernel.threads, kernel.shared_bytes};
}
const cuda::Reported reported_match[] = {report<true, 8, 1>("match_image<true, 8, 1>"),
                                         report<true, 8, 2>("match_image<true, 8, 2>"),
                                         report<true, 16, 1>("match_image<true, 16, 1>"),
                                         report<false, 4, 1>("match_image<false, 4, 1>"),
                                         report<false, 8, 1>("match_image<false, 8, 1>"),
                                         report<false, 8, 2>("match_image<false, 8, 2>"),
                                         report<false, 10, 1>("match_image<false, 10, 1>")};

}  // namespace
}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("match_fits", TORCH_BOX(&tokenops::matching::match_fits));
  m.impl("match_image", TOKENOPS_BOX(&tokenops::matching::match_images));
}
