// SPDX-License-Identifier: Apache-2.0
// CUDA operators tokenops::select, which makes the token map of the best pairs in one launch, and
// tokenops::grid_sides, which lists the sources and destinations of a grid.
#include "select_cuda.cuh"

namespace tokenops::matching {
namespace {

// ---- sides ----

constexpr int kListThreads = 256;
constexpr int64_t kListBytes = (kMaxThreads / cuda::kWarpSize + 1) * sizeof(int);

// One block for each band of an image.
__global__ void __launch_bounds__(kListThreads) list_grid(Grid grid) {
  const Block block = {reinterpret_cast<int*>(cuda::shared_memory())};
  grid.list(block, blockIdx.x / grid.bands(), blockIdx.x % grid.bands());
}

const cuda::Reported reported_grid("list_grid", list_grid, kListThreads, kListBytes);

std::tuple<Tensor, Tensor> grid_sides(const Tensor& metric, SplitArgs split) {
  const char* const op = "tokenops::match";
  const Metric x(op, metric);
  STD_TORCH_CHECK(split.grid_width > 0 && !split.src_index, op, ": expected a grid");
  device_request(Target(op, metric), op, metric, x.tokens, {0, {}, {}, "position"}, split);
  return {*split.src_index, *split.dst_index};
}

// ---- selection ----

// One block for each image. Its arrays are in shared memory if kShared, else in `arrays`, in global
// memory; the sort may be in shared memory even then.
template <class A, bool kShared>
__global__ void __launch_bounds__(kMaxThreads, 1)
    select_images(Request all, const A* __restrict__ node_max, const int32_t* __restrict__ node_idx,
                  char* arrays, int64_t array_bytes, bool sort_in_shared, TokenMap maps) {
  const int64_t image = blockIdx.x;
  const Request ask = all.image(image);
  char* const counters = cuda::shared_memory();
  char* const rest = counters + kCounterBytes;
  const Work<A> work(ask, node_idx + image * all.num_src, counters,
                     kShared ? rest : arrays + image * array_bytes,
                     !kShared && sort_in_shared ? rest : nullptr);
  select_image(ask, node_max + image * all.num_src, work, maps);
}

int threads_for(int64_t tokens) {
  return tokens <= 128 ? 128 : tokens <= 1056 ? 256 : tokens <= 2112 ? 512 : kMaxThreads;
}

template <class A>
void launch_select(const Target& target, const Request& ask, int64_t batch, const Tensor& node_max,
                   const Tensor& node_idx, const TokenMap& out) {
  const A* const score = static_cast<const A*>(node_max.const_data_ptr());
  const int32_t* const index = static_cast<const int32_t*>(node_idx.const_data_ptr());
  const int threads = threads_for(ask.tokens);
  if (shared_bytes<A>(ask) <= target.max_shared_bytes()) {
    target.launch(select_images<A, true>, {batch, threads, shared_bytes<A>(ask)}, ask, score, index,
                  nullptr, 0, false, out);
    return;
  }
  const int64_t bytes = array_bytes<A>(ask), with_sort = kCounterBytes + sort_bytes<A>(ask);
  const Tensor arrays = target.empty({batch, bytes}, ScalarType::Byte);
  const bool sort_in_shared = with_sort <= target.max_shared_bytes();
  target.launch(select_images<A, false>,
                {batch, threads, sort_in_shared ? with_sort : kCounterBytes}, ask, score, index,
                static_cast<char*>(arrays.mutable_data_ptr()), bytes, sort_in_shared, out);
}

// Report the shared memory of an image of 1024 tokens.
template <class A, bool kShared>
cuda::Reported report(const char* name) {
  Request ask = {};
  ask.tokens = 1024;
  return {name, select_images<A, kShared>, kShared ? threads_for(ask.tokens) : kMaxThreads,
          kShared ? shared_bytes<A>(ask) : kCounterBytes};
}
const cuda::Reported reported_select[] = {report<float, true>("select_images<float, true>"),
                                          report<double, true>("select_images<double, true>"),
                                          report<float, false>("select_images<float, false>"),
                                          report<double, false>("select_images<double, false>")};

MapTensors select(const Tensor& node_max, const Tensor& node_idx, int64_t num_tokens,
                  const RequestArgs& args, SplitArgs split) {
  const char* const op = "tokenops::select";
  STD_TORCH_CHECK(node_max.dim() == 2 && node_idx.dim() == 2, op,
                  ": expected node_max and node_idx [B, Ns]");
  const int64_t batch = node_max.size(0);
  const Target target(op, node_max);
  target.expect("node_idx", node_idx);
  const Request ask = device_request(target, op, node_max, num_tokens, args, split);
  STD_TORCH_CHECK(node_idx.size(0) == batch && node_idx.size(1) == node_max.size(1) &&
                      (node_max.size(1) == ask.num_src || num_tokens == 0),
                  op, ": expected node_max and node_idx [", batch, ", ", ask.num_src, "], got [",
                  batch, ", ", node_max.size(1), "] and [", node_idx.size(0), ", ",
                  node_idx.size(1), "]");
  const bool is_double = node_max.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || node_max.scalar_type() == ScalarType::Float, op,
                  ": expected node_max of dtype float32 or float64, got ", node_max.scalar_type());
  STD_TORCH_CHECK(node_idx.scalar_type() == ScalarType::Int, op,
                  ": expected node_idx of dtype int32, got ", node_idx.scalar_type());
  const Tensor score = as_contiguous(node_max), index = as_contiguous(node_idx);
  const MapTensors maps = new_map(node_max, ask, batch);
  const auto launch = is_double ? launch_select<double> : launch_select<float>;
  launch(target, ask, batch, score, index, pointers(maps));
  return maps;
}

}  // namespace

Request device_request(const Target& target, const char* op, const Tensor& first, int64_t tokens,
                       const RequestArgs& args, SplitArgs& split) {
  target.expect("thresholds", args.thresholds);
  target.expect("protected", split.protected_tokens);
  target.expect("src_index", split.src_index);
  target.expect("dst_index", split.dst_index);
  target.expect("cell", split.cell);
  const int64_t batch = first.size(0);
  make_lists(op, first, batch, tokens, split, [&](const Grid& grid, int64_t images) {
    target.launch(list_grid, {images * grid.bands(), kListThreads, kListBytes}, grid);
  });
  return make_request(op, batch, tokens, args, split);
}

}  // namespace tokenops::matching

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("grid_sides", TOKENOPS_BOX(&tokenops::matching::grid_sides));
  m.impl("select", TOKENOPS_BOX(&tokenops::matching::select));
}
