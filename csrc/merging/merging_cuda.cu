// SPDX-License-Identifier: Apache-2.0
// CUDA operators of merging: allocation and launches; the kernels are in merging_kernels.cuh.
#include "merging_kernels.cuh"

#include "arguments.h"

namespace tokenops::merging {
namespace {

using cuda::Target;

// Packs of a tile, enough to outweigh the constant cost of a block.
constexpr int64_t kTilePacks = 3072;
// Blocks that give each multiprocessor several; with fewer, tiles become smaller.
constexpr int64_t kManyBlocks = 1024;

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Divide output rows [batch, rows, packs], each reduced from about `members` rows, into tiles.
Tiling cut(int64_t batch, int64_t rows, int64_t packs, int pack_bytes, int64_t members) {
  // Split wide rows evenly into pieces that are still long reads: 1 KiB, if packs have 16 bytes.
  const int64_t widest = pack_bytes < 16 ? kThreads : 64;
  const int64_t columns = ceil_div(packs, std::max<int64_t>(ceil_div(packs, widest), 1));
  const int64_t width = std::max<int64_t>(columns, 1);
  const int64_t column_tiles = std::max<int64_t>(ceil_div(packs, width), 1);
  // One row with a long segment keeps a whole block busy.
  const bool is_long = members > kLong;
  const int64_t least = is_long ? 1 : kThreads;
  const int64_t wanted =
      is_long ? 1 : std::max<int64_t>(2 * kThreads, 2 * kTilePacks / (1 + members));
  int64_t height = std::clamp<int64_t>(std::min<int64_t>(wanted, kTilePacks) / width, 1, 512);
  while (height > 1 && height * width > least &&
         batch * column_tiles * ceil_div(rows, height) < kManyBlocks) {
    height = (height + 1) / 2;
  }
  height = std::min(height, std::max<int64_t>(rows, 1));
  return {static_cast<int>(batch),       static_cast<int>(rows),
          static_cast<int>(packs),       static_cast<int>(height),
          static_cast<int>(width),       static_cast<int>(ceil_div(rows, height)),
          static_cast<int>(column_tiles)};
}

// ---- checks ----

void expect(const Target& target, const Argument& argument) {
  target.expect(argument.name, argument.tensor);
}
void expect(const Target& target, const MapTensors& index) {
  for (const Matrix& m : {index.assign, index.offsets, index.members}) expect(target, m);
}
template <class A>
void expect(const Target& target, const std::optional<A>& argument) {
  if (argument) expect(target, *argument);
}
// Check that all arguments are on the device.
template <class... A>
void expect_all(const Target& target, const A&... arguments) {
  (expect(target, arguments), ...);
}

// The kernels count tokens, images and channels in 32 bits.
void check_sizes(const char* op, const Tokens& tokens, const TokenMap& map) {
  for (const int64_t size : {tokens.batch, tokens.channels, map.inputs, map.outputs}) {
    STD_TORCH_CHECK(size < INT_MAX, op, ": expected sizes below 2^31 - 1, got ", size);
  }
}

// Whether memory may be read in packs of 16 bytes.
bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
bool packs_fit(const Tokens& tokens) {
  const int64_t bytes = tokens.dtype == ScalarType::Double  ? 8
                        : tokens.dtype == ScalarType::Float ? 4
                                                            : 2;
  const bool strides_fit = (tokens.batch < 2 || tokens.batch_stride * bytes % 16 == 0) &&
                           (tokens.rows < 2 || tokens.row_stride * bytes % 16 == 0);
  return tokens.channels * bytes % 16 == 0 && strides_fit &&
         aligned(tokens.tensor.const_data_ptr());
}
bool packs_fit(const std::optional<Tokens>& tokens) { return !tokens || packs_fit(*tokens); }

// Call f with the number of elements of a pack as a compile-time constant.
template <class T, class F>
void with_pack(bool fits, F&& f) {
  fits ? f(std::integral_constant<int, kPack<T>>()) : f(std::integral_constant<int, 1>());
}

// ---- merge and unmerge of several tensors ----

// Tensors of one dtype and of one shape but for their channels, with an output for each.
struct TensorList {
  std::vector<Tokens> inputs;
  std::vector<Tensor> outputs;

  TensorList(const char* op, const char* name, const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) inputs.emplace_back(op, name, t);
  }
  const Tokens& first() const { return inputs[0]; }

  void allocate(const char* op, const Target& target, const TokenMap& map, int64_t rows) {
    for (const Tokens& t : inputs) {
      expect(target, t);
      check(op, t.name, t.tensor, first().dtype, {first().batch, first().rows, t.channels});
      check_sizes(op, t, map);
      outputs.push_back(target.empty({t.batch, rows, t.channels}, t.dtype));
    }
  }
};

// Call launch(packed, args, blocks, tile_rows) for the tensors whose rows can be read in packs of
// 16 bytes, then for the others, with as many tensors at a time as fit in a launch. `members`: see
// cut.
template <class T, class Launch>
void launch_parts(const TensorList& list, const std::optional<Tokens>& residual, Parts<T> args,
                  int64_t rows, int64_t members, Launch launch) {
  for (const bool packed : {true, false}) {
    const int pack = packed ? kPack<T> : 1;
    int64_t blocks = 0;
    int height = 1;
    const auto flush = [&] {
      if (args.count > 0) launch(packed, args, blocks, height);
      args.count = 0, blocks = 0, height = 1;
    };
    for (size_t i = 0; i < list.inputs.size(); ++i) {
      const Tokens& input = list.inputs[i];
      T* const out = output<T>(list.outputs[i]);
      if (input.channels == 0 && args.total == nullptr) continue;
      if (packed != (packs_fit(input) && packs_fit(residual) && aligned(out))) continue;
      const Tiling tiling = cut(input.batch, rows, input.channels / pack,
                                pack * static_cast<int>(sizeof(T)), members);
      if (args.count == kTensors || blocks + tiling.blocks() > INT_MAX) flush();
      blocks += tiling.blocks();
      height = std::max(height, tiling.tile_rows);
      args.part[args.count++] = {tiling, input.as<T>(), rows_of<T>(residual), out,
                                 static_cast<unsigned>(blocks)};
    }
    flush();
  }
}

template <class T, int V>
auto merge_kernel(Reduce reduce) {
  switch (reduce) {
    case Reduce::amax:
    case Reduce::amin: return merge_tiles<Reduce::amax, T, V>;
    case Reduce::prod: return merge_tiles<Reduce::prod, T, V>;
    default: return merge_tiles<Reduce::sum, T, V>;
  }
}

template <class T>
void run_merge(const Target& target, const TensorList& list, const MergeInputs& given,
               acc_t<T>* total) {
  using A = acc_t<T>;
  const TokenMap& map = given.index.map;
  Parts<T> args = {};
  args.map = map;
  args.weight = data_of<A>(given.weight);
  args.scale = data_of<A>(given.scale);
  args.total = total;
  args.sign = given.reduce == Reduce::amin ? A(-1) : A(1);
  args.mean = given.mean;
  const auto launch = [&](bool packed, const Parts<T>& part, int64_t blocks, int height) {
    with_pack<T>(packed, [&](auto pack) {
      constexpr int V = decltype(pack)::value;
      target.launch(merge_kernel<T, V>(given.reduce),
                    {blocks, kThreads, merge_shared_bytes<T, V>(height)}, part);
    });
  };
  launch_parts(list, std::nullopt, args, map.outputs,
               map.inputs / std::max<int64_t>(map.outputs, 1), launch);
}

std::vector<Tensor> merge_all(const char* op, const std::vector<Tensor>& x, const Index& index,
                              const OptionalTensor& weight, const OptionalTensor& scale,
                              const Text& reduce) {
  if (x.empty()) return {};
  TensorList list(op, "x", x);
  const MergeInputs given(op, list.first(), index, weight, scale, reduce);
  const Target target(op, x[0]);
  expect_all(target, given.index, given.weight, given.scale);
  list.allocate(op, target, given.index.map, given.index.map.outputs);
  dispatch(op, list.first().dtype, [&](auto type) {
    run_merge<typename decltype(type)::type>(target, list, given, nullptr);
  });
  return list.outputs;
}

Tensor merge(const Tensor& x, const Index& index, const OptionalTensor& weight,
             const OptionalTensor& scale, const Text& reduce) {
  return merge_all("tokenops::merge", {x}, index, weight, scale, reduce)[0];
}

std::vector<Tensor> merge_many(const std::vector<Tensor>& x, const Index& index,
                               const OptionalTensor& weight, const Text& reduce) {
  return merge_all("tokenops::merge_many", x, index, weight, std::nullopt, reduce);
}

std::tuple<Tensor, Tensor> merge_wavg(const Tensor& x, const Index& index,
                                      const OptionalTensor& size) {
  const char* op = "tokenops::merge_wavg";
  TensorList list(op, "x", {x});
  const MergeInputs given(op, list.first(), index, size);
  const TokenMap& map = given.index.map;
  const Target target(op, x);
  expect_all(target, given.index, given.weight);
  list.allocate(op, target, map, map.outputs);
  const Tensor total = target.empty({map.batch, map.outputs}, acc_dtype(list.first().dtype));
  dispatch(op, list.first().dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_merge<T>(target, list, given, output<acc_t<T>>(total));
  });
  return {list.outputs[0], total};
}

std::vector<Tensor> unmerge_all(const char* op, const std::vector<Tensor>& y, const Index& index,
                                const OptionalTensor& weight, const OptionalTensor& scale,
                                const OptionalTensor& residual, bool mean) {
  if (y.empty()) return {};
  TensorList list(op, "y", y);
  const UnmergeInputs given(op, list.first(), index, weight, scale, residual);
  const TokenMap& map = given.index.map;
  const Target target(op, y[0]);
  expect_all(target, given.index, given.weight, given.scale, given.residual);
  list.allocate(op, target, map, map.inputs);
  dispatch(op, list.first().dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Parts<T> args = {};
    args.map = map;
    args.weight = data_of<acc_t<T>>(given.weight);
    args.scale = data_of<acc_t<T>>(given.scale);
    args.mean = mean;
    const auto launch = [&](bool packed, const Parts<T>& part, int64_t blocks, int height) {
      const auto kernel = packed ? unmerge_tiles<T, kPack<T>> : unmerge_tiles<T, 1>;
      const auto bytes = static_cast<int64_t>(sizeof(CopiedRow<T>)) * height;
      target.launch(kernel, {blocks, kThreads, bytes}, part);
    };
    launch_parts(list, given.residual, args, map.inputs, 1, launch);
  });
  return list.outputs;
}

Tensor unmerge(const Tensor& y, const Index& index, const OptionalTensor& weight,
               const OptionalTensor& scale, const OptionalTensor& residual, bool mean) {
  return unmerge_all("tokenops::unmerge", {y}, index, weight, scale, residual, mean)[0];
}

std::vector<Tensor> unmerge_many(const std::vector<Tensor>& y, const Index& index,
                                 const OptionalTensor& weight, bool mean) {
  return unmerge_all("tokenops::unmerge_many", y, index, weight, std::nullopt, std::nullopt, mean);
}

// ---- backwards ----

Tensor pair_dot(const Tensor& x_in, const Tensor& y, const Index& index) {
  const char* op = "tokenops::pair_dot";
  const PairDotInputs given(op, x_in, y, index);
  const Tokens& x = given.x;
  check_sizes(op, x, given.index.map);
  const Target target(op, x_in);
  expect_all(target, given.y, given.index);
  const Tensor out = target.empty({x.batch, x.rows}, acc_dtype(x.dtype));
  dispatch(op, x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const PairDotArgs<T> args = {given.index.map, x.channels, x.as<T>(), given.y.as<T>(),
                                 output<acc_t<T>>(out)};
    with_pack<T>(packs_fit(x) && packs_fit(given.y), [&](auto pack) {
      constexpr int V = decltype(pack)::value;
      const int packs = static_cast<int>(x.channels / V);
      int width = 1;
      while (width < cuda::kWarpSize && width < packs) width *= 2;
      const int64_t blocks = ceil_div(x.rows, kThreads / width);
      target.launch(pair_dot_rows<T, V>, {x.batch * blocks, kThreads}, args, width, packs,
                    static_cast<int>(blocks));
    });
  });
  return out;
}

Tensor merge_reduce_backward(const Tensor& grad, const Tensor& x, const Tensor& out,
                             const Index& index, const Text& reduce) {
  const char* op = "tokenops::merge_reduce_backward";
  const ReduceBackwardInputs given(op, grad, x, out, index, reduce);
  const TokenMap& map = given.index.map;
  const int64_t batch = map.batch, inputs = map.inputs, channels = given.x.channels;
  check_sizes(op, given.x, map);
  const Target target(op, x);
  expect_all(target, given.grad, given.out, given.index);
  const Tensor grad_x = target.empty({batch, inputs, channels}, given.x.dtype);
  if (batch * inputs * channels == 0) return grad_x;
  const Tensor written = target.empty({batch, inputs}, ScalarType::Byte);
  target.zero(written.mutable_data_ptr(), batch * inputs);
  const Tensor suffix =
      target.empty({batch, given.prod ? inputs : 0, channels}, acc_dtype(given.x.dtype));
  dispatch(op, given.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const ReduceGradArgs<T> args = {map,
                                    given.grad.as<T>(),
                                    given.x.as<T>(),
                                    given.out.as<T>(),
                                    output<T>(grad_x),
                                    output<acc_t<T>>(suffix),
                                    output<uint8_t>(written)};
    const bool fits = packs_fit(given.x) && packs_fit(given.grad) && packs_fit(given.out) &&
                      aligned(args.grad_x) && aligned(args.suffix);
    with_pack<T>(fits, [&](auto pack) {
      constexpr int V = decltype(pack)::value;
      constexpr int kBytes = V * static_cast<int>(sizeof(T));
      const auto kernel =
          given.prod ? reduce_backward_tiles<true, T, V> : reduce_backward_tiles<false, T, V>;
      const Tiling segments =
          cut(batch, map.outputs, channels / V, kBytes, inputs / std::max<int64_t>(map.outputs, 1));
      target.launch(kernel, {segments.blocks(), kThreads}, args, segments);
      const Tiling tokens = cut(batch, inputs, channels / V, kBytes, 1);
      target.launch(zero_dropped<T, V>, {tokens.blocks(), kThreads}, args, tokens);
    });
  });
  return grad_x;
}

// Report the shared memory of a tile of 32 rows.
template <class T>
cuda::Reported report_merge(const char* name) {
  constexpr int V = kPack<T>;
  return {name, merge_tiles<Reduce::sum, T, V>, kThreads, merge_shared_bytes<T, V>(32)};
}
const cuda::Reported reported[] = {report_merge<float>("merge_tiles<sum, float>"),
                                   report_merge<c10::Half>("merge_tiles<sum, half>"),
                                   report_merge<c10::BFloat16>("merge_tiles<sum, bfloat16>")};

}  // namespace
}  // namespace tokenops::merging

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("merge", TOKENOPS_BOX(&tokenops::merging::merge));
  m.impl("merge_many", TOKENOPS_BOX(&tokenops::merging::merge_many));
  m.impl("merge_reduce_backward", TOKENOPS_BOX(&tokenops::merging::merge_reduce_backward));
  m.impl("merge_wavg", TOKENOPS_BOX(&tokenops::merging::merge_wavg));
  m.impl("pair_dot", TOKENOPS_BOX(&tokenops::merging::pair_dot));
  m.impl("unmerge", TOKENOPS_BOX(&tokenops::merging::unmerge));
  m.impl("unmerge_many", TOKENOPS_BOX(&tokenops::merging::unmerge_many));
}
