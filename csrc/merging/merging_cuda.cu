// SPDX-License-Identifier: Apache-2.0
// Merging on CUDA: checks, allocation and launches; the kernels are in merging_kernels.cuh.
#include "merging_kernels.cuh"

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace tokenops::merging {
namespace {

using cuda::Target;

// Tiles of so many packs are worth what a block costs to begin with ...
constexpr int64_t kTilePacks = 3072;
// ... where there are so many of them that each multiprocessor gets several.
constexpr int64_t kManyBlocks = 1024;

// Tiles of rows [batch, rows, packs] that are each made of about `members` other rows.
Tiling cut(int64_t batch, int64_t rows, int64_t packs, int pack_bytes, int64_t members) {
  const auto parts = [](int64_t count, int64_t size) { return (count + size - 1) / size; };
  // Wide rows are split evenly, in pieces that still are long for memory.
  const int64_t widest = pack_bytes < 16 ? kThreads : 64;
  const int64_t columns = parts(packs, std::max<int64_t>(parts(packs, widest), 1));
  const int64_t width = std::max<int64_t>(columns, 1);
  const int64_t column_tiles = std::max<int64_t>(parts(packs, width), 1);
  // Long rows keep a block busy one by one.
  const int64_t least = members > kLong ? 1 : kThreads;
  const int64_t wanted =
      members > kLong ? 1 : std::max<int64_t>(2 * kThreads, 2 * kTilePacks / (1 + members));
  int64_t height = std::clamp<int64_t>(std::min<int64_t>(wanted, kTilePacks) / width, 1, 512);
  while (height > 1 && height * width > least &&
         batch * column_tiles * parts(rows, height) < kManyBlocks) {
    height = (height + 1) / 2;
  }
  height = std::min(height, std::max<int64_t>(rows, 1));
  return {static_cast<int>(batch),       static_cast<int>(rows),
          static_cast<int>(packs),       static_cast<int>(height),
          static_cast<int>(width),       static_cast<int>(parts(rows, height)),
          static_cast<int>(column_tiles)};
}

// The kernels count tokens, images and channels in 32 bits.
void check_sizes(const char* op, const Data& data, const Map& map) {
  for (const int64_t size : {data.batch, data.channels, map.inputs, map.outputs}) {
    STD_TORCH_CHECK(size < INT_MAX, op, ": expected sizes below 2^31 - 1, got ", size);
  }
}

// All tensors of a launch share dtype, images and tokens.
void check_rows(const char* op, const char* name, const Data& got, const Data& first) {
  STD_TORCH_CHECK(got.batch == first.batch && got.rows == first.rows, op, ": expected each ", name,
                  " to be [", first.batch, ", ", first.rows, ", C], got [", got.batch, ", ",
                  got.rows, ", ", got.channels, "]");
  STD_TORCH_CHECK(got.dtype == first.dtype, op, ": expected each ", name, " of dtype ", first.dtype,
                  ", got ", got.dtype);
}

// Whether rows can be read in whole packs of 16 bytes.
bool packs_fit(const Data& data) {
  const int64_t bytes = data.dtype == ScalarType::Double  ? 8
                        : data.dtype == ScalarType::Float ? 4
                                                          : 2;
  const bool strides_fit = (data.batch < 2 || data.batch_stride * bytes % 16 == 0) &&
                           (data.rows < 2 || data.row_stride * bytes % 16 == 0);
  return data.channels * bytes % 16 == 0 && strides_fit &&
         reinterpret_cast<uintptr_t>(data.tensor.const_data_ptr()) % 16 == 0;
}

// Call f(V) with the number of elements of a pack, as a constant.
template <class T, class F>
void with_pack(bool whole, F&& f) {
  whole ? f(std::integral_constant<int, kPack<T>>()) : f(std::integral_constant<int, 1>());
}

// Hand tensors to `launch(kind, blocks, tile_rows)`: those that are read in whole packs and those
// that are not, each as few times as possible. `add(i, part)` describes the i-th one.
template <class Parts, class Tiles, class Add, class Launch>
void launch_in_parts(const std::vector<bool>& whole, Parts& parts, Tiles tiling, Add add,
                     Launch launch) {
  for (const bool kind : {true, false}) {
    int64_t blocks = 0;
    int height = 1;
    parts.count = 0;
    for (size_t i = 0; i <= whole.size(); ++i) {
      const bool end = i == whole.size();
      if (!end && whole[i] != kind) continue;
      const Tiling tiles = end ? Tiling{} : tiling(i, kind);
      const bool full = parts.count == kTensors || (!end && blocks + tiles.blocks() > INT_MAX);
      if (parts.count > 0 && (end || full)) {
        launch(kind, blocks, height);
        blocks = 0, height = 1, parts.count = 0;
      }
      if (end) break;
      auto& part = parts.part[parts.count++];
      add(i, part);
      part.tiling = tiles;
      blocks += tiles.blocks();
      part.end = static_cast<unsigned>(blocks);
      height = std::max(height, tiles.tile_rows);
    }
  }
}

void expect_map(const Target& target, const Tensor& assign, const Tensor& offsets,
                const Tensor& members) {
  target.expect("assign", assign);
  target.expect("offsets", offsets);
  target.expect("members", members);
}

// ---- merge ----

struct MergeInputs {
  Fold fold;
  bool average;
  std::optional<Matrix> weight, scale;
};

template <class T>
auto merge_kernel(Fold fold, bool whole) {
  constexpr int V = kPack<T>;
  switch (fold) {
    case Fold::amax:
    case Fold::amin: return whole ? merge_tiles<Fold::amax, T, V> : merge_tiles<Fold::amax, T, 1>;
    case Fold::prod: return whole ? merge_tiles<Fold::prod, T, V> : merge_tiles<Fold::prod, T, 1>;
    default: return whole ? merge_tiles<Fold::sum, T, V> : merge_tiles<Fold::sum, T, 1>;
  }
}

template <class T>
void run_merge(const Target& target, const std::vector<Data>& x, const Map& map,
               const MergeInputs& given, const std::vector<Tensor>& out, acc_t<T>* total) {
  using A = acc_t<T>;
  std::vector<bool> whole;
  for (size_t i = 0; i < x.size(); ++i) {
    whole.push_back(packs_fit(x[i]) && reinterpret_cast<uintptr_t>(output<T>(out[i])) % 16 == 0);
  }
  MergeParts<T> parts = {};
  parts.map = map;
  parts.weight = data_of<A>(given.weight);
  parts.scale = data_of<A>(given.scale);
  parts.total = total;
  parts.sign = given.fold == Fold::amin ? A(-1) : A(1);
  parts.average = given.average;
  const auto tiling = [&](size_t i, bool kind) {
    const int pack = kind ? kPack<T> : 1;
    return cut(x[i].batch, map.outputs, x[i].channels / pack, pack * static_cast<int>(sizeof(T)),
               map.inputs / std::max<int64_t>(map.outputs, 1));
  };
  const auto add = [&](size_t i, MergePart<T>& part) {
    part.x = x[i].template as<T>();
    part.out = output<T>(out[i]);
  };
  launch_in_parts(whole, parts, tiling, add, [&](bool kind, int64_t blocks, int height) {
    const int64_t bytes =
        kind ? merge_shared_bytes<T, kPack<T>>(height) : merge_shared_bytes<T, 1>(height);
    target.launch(merge_kernel<T>(given.fold, kind), {blocks, kThreads, bytes}, parts);
  });
}

std::vector<Tensor> merge_all(const char* op, const std::vector<Tensor>& x, const Tensor& assign,
                              const Tensor& offsets, const Tensor& members,
                              const OptionalTensor& weight, const OptionalTensor& scale,
                              const Text& reduce) {
  std::vector<Tensor> out;
  if (x.empty()) return out;
  std::vector<Data> data;
  for (const Tensor& t : x) data.emplace_back(op, "x", t);
  const Data& first = data[0];
  const MapTensors index(op, assign, offsets, members, first.batch, first.rows);
  const Fold fold = parse_fold(op, reduce, weight.has_value());
  STD_TORCH_CHECK(reduce == "sum" || (!weight && !scale), op,
                  ": weight and scale go with reduce sum only, got ", reduce);
  const ScalarType acc = acc_dtype(first.dtype);
  const MergeInputs given = {fold, reduce == "mean",
                             matrix(op, "weight", weight, first.batch, first.rows, acc),
                             matrix(op, "scale", scale, first.batch, index.outputs, acc)};
  const Target target(op, x[0]);
  for (const Tensor& t : x) target.expect("x", t);
  expect_map(target, assign, offsets, members);
  target.expect("weight", weight);
  target.expect("scale", scale);
  std::vector<Data> wide;  // those that have channels
  std::vector<Tensor> filled;
  for (const Data& d : data) {
    check_rows(op, "x", d, first);
    check_sizes(op, d, index.map);
    out.push_back(target.empty({d.batch, index.outputs, d.channels}, d.dtype));
    if (d.channels > 0) wide.push_back(d), filled.push_back(out.back());
  }
  if (wide.empty()) return out;
  dispatch(op, first.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_merge<T>(target, wide, index.map, given, filled, nullptr);
  });
  return out;
}

Tensor merge(const Tensor& x, const Tensor& assign, const Tensor& offsets, const Tensor& members,
             const OptionalTensor& weight, const OptionalTensor& scale, const Text& reduce) {
  return merge_all("tokenops::merge", {x}, assign, offsets, members, weight, scale, reduce)[0];
}

std::vector<Tensor> merge_many(const std::vector<Tensor>& x, const Tensor& assign,
                               const Tensor& offsets, const Tensor& members,
                               const OptionalTensor& weight, const Text& reduce) {
  return merge_all("tokenops::merge_many", x, assign, offsets, members, weight, std::nullopt,
                   reduce);
}

std::tuple<Tensor, Tensor> merge_wavg(const Tensor& x, const Tensor& assign, const Tensor& offsets,
                                      const Tensor& members, const OptionalTensor& size) {
  const char* op = "tokenops::merge_wavg";
  const std::vector<Data> data = {Data(op, "x", x)};
  const MapTensors index(op, assign, offsets, members, data[0].batch, data[0].rows);
  check_sizes(op, data[0], index.map);
  const ScalarType acc = acc_dtype(data[0].dtype);
  const MergeInputs given = {
      Fold::sum, true, matrix(op, "size", size, data[0].batch, data[0].rows, acc), std::nullopt};
  const Target target(op, x);
  expect_map(target, assign, offsets, members);
  target.expect("size", size);
  const Tensor out = target.empty({data[0].batch, index.outputs, data[0].channels}, data[0].dtype);
  const Tensor total = target.empty({data[0].batch, index.outputs}, acc);
  dispatch(op, data[0].dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_merge<T>(target, data, index.map, given, {out}, output<acc_t<T>>(total));
  });
  return {out, total};
}

// ---- unmerge ----

std::vector<Tensor> unmerge_all(const char* op, const std::vector<Tensor>& y, const Tensor& assign,
                                const Tensor& offsets, const Tensor& members,
                                const OptionalTensor& weight, const OptionalTensor& scale,
                                const OptionalTensor& residual, bool mean) {
  std::vector<Tensor> out;
  if (y.empty()) return out;
  std::vector<Data> data;
  for (const Tensor& t : y) data.emplace_back(op, "y", t);
  const Data& first = data[0];
  const auto sizes = assign.sizes();
  STD_TORCH_CHECK(sizes.size() == 2, op, ": expected assign [B, N]");
  const int64_t inputs = sizes[1];
  const MapTensors index(op, assign, offsets, members, first.batch, inputs);
  STD_TORCH_CHECK(first.rows == index.outputs, op,
                  ": expected y [B, M, C] with M = ", index.outputs, ", got M = ", first.rows);
  const ScalarType acc = acc_dtype(first.dtype);
  const auto w = matrix(op, "weight", weight, first.batch, inputs, acc);
  const auto s = matrix(op, "scale", scale, first.batch, index.outputs, acc);
  std::optional<Data> added;  // to the only tensor
  if (residual) {
    added.emplace(op, "residual", *residual);
    check_like(op, "residual", *added, inputs, first);
  }
  const Target target(op, y[0]);
  for (const Tensor& t : y) target.expect("y", t);
  expect_map(target, assign, offsets, members);
  target.expect("weight", weight);
  target.expect("scale", scale);
  target.expect("residual", residual);
  std::vector<Data> wide;
  std::vector<Tensor> filled;
  for (const Data& d : data) {
    check_rows(op, "y", d, first);
    check_sizes(op, d, index.map);
    out.push_back(target.empty({d.batch, inputs, d.channels}, d.dtype));
    if (d.channels > 0) wide.push_back(d), filled.push_back(out.back());
  }
  if (wide.empty()) return out;
  dispatch(op, first.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    std::vector<bool> whole;
    for (size_t i = 0; i < wide.size(); ++i) {
      whole.push_back(packs_fit(wide[i]) && (!added || packs_fit(*added)) &&
                      reinterpret_cast<uintptr_t>(output<T>(filled[i])) % 16 == 0);
    }
    UnmergeParts<T> parts = {};
    parts.map = index.map;
    parts.weight = data_of<A>(w);
    parts.scale = data_of<A>(s);
    parts.mean = mean;
    const auto tiling = [&](size_t i, bool kind) {
      const int pack = kind ? kPack<T> : 1;
      return cut(wide[i].batch, inputs, wide[i].channels / pack, pack * static_cast<int>(sizeof(T)),
                 1);
    };
    const auto add = [&](size_t i, UnmergePart<T>& part) {
      part.y = wide[i].template as<T>();
      part.residual = added ? added->as<T>() : Rows<const T>{nullptr, 0, 0};
      part.out = output<T>(filled[i]);
    };
    launch_in_parts(whole, parts, tiling, add, [&](bool kind, int64_t blocks, int height) {
      const auto kernel = kind ? unmerge_tiles<T, kPack<T>> : unmerge_tiles<T, 1>;
      const auto bytes = static_cast<int64_t>(sizeof(CopiedRow<T>)) * height;
      target.launch(kernel, {blocks, kThreads, bytes}, parts);
    });
  });
  return out;
}

Tensor unmerge(const Tensor& y, const Tensor& assign, const Tensor& offsets, const Tensor& members,
               const OptionalTensor& weight, const OptionalTensor& scale,
               const OptionalTensor& residual, bool mean) {
  return unmerge_all("tokenops::unmerge", {y}, assign, offsets, members, weight, scale, residual,
                     mean)[0];
}

std::vector<Tensor> unmerge_many(const std::vector<Tensor>& y, const Tensor& assign,
                                 const Tensor& offsets, const Tensor& members,
                                 const OptionalTensor& weight, bool mean) {
  return unmerge_all("tokenops::unmerge_many", y, assign, offsets, members, weight, std::nullopt,
                     std::nullopt, mean);
}

// ---- pair_dot ----

Tensor pair_dot(const Tensor& x, const Tensor& y, const Tensor& assign, const Tensor& offsets,
                const Tensor& members) {
  const char* op = "tokenops::pair_dot";
  const Data a(op, "x", x), b(op, "y", y);
  const MapTensors index(op, assign, offsets, members, a.batch, a.rows);
  check_like(op, "y", b, index.outputs, a);
  check_sizes(op, a, index.map);
  const Target target(op, x);
  target.expect("y", y);
  expect_map(target, assign, offsets, members);
  const Tensor out = target.empty({a.batch, a.rows}, acc_dtype(a.dtype));
  dispatch(op, a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const PairDotArgs<T> args = {index.map, a.channels, a.as<T>(), b.as<T>(),
                                 output<acc_t<T>>(out)};
    with_pack<T>(packs_fit(a) && packs_fit(b), [&](auto pack) {
      constexpr int V = decltype(pack)::value;
      const int packs = static_cast<int>(a.channels / V);
      int width = 1;
      while (width < cuda::kWarpSize && width < packs) width *= 2;
      const int64_t rows = kThreads / width, blocks = (a.rows + rows - 1) / rows;
      target.launch(pair_dot_rows<T, V>, {a.batch * blocks, kThreads}, args, width, packs,
                    static_cast<int>(blocks));
    });
  });
  return out;
}

// ---- backward of amax, amin and prod ----

Tensor merge_reduce_backward(const Tensor& grad, const Tensor& x, const Tensor& out,
                             const Tensor& assign, const Tensor& offsets, const Tensor& members,
                             const Text& reduce) {
  const char* op = "tokenops::merge_reduce_backward";
  const Data data(op, "x", x), slope(op, "grad", grad), best(op, "out", out);
  const MapTensors index(op, assign, offsets, members, data.batch, data.rows);
  check_like(op, "grad", slope, index.outputs, data);
  check_like(op, "out", best, index.outputs, data);
  check_sizes(op, data, index.map);
  const bool prod = reduce == "prod";
  STD_TORCH_CHECK(prod || reduce == "amax" || reduce == "amin", op,
                  ": expected reduce amax, amin or prod, got ", reduce);
  const int64_t batch = data.batch, inputs = data.rows, channels = data.channels;
  const Target target(op, x);
  target.expect("grad", grad);
  target.expect("out", out);
  expect_map(target, assign, offsets, members);
  const Tensor result = target.empty({batch, inputs, channels}, data.dtype);
  if (batch * inputs * channels == 0) return result;
  const Tensor written = target.empty({batch, inputs}, ScalarType::Byte);
  target.zero(written.mutable_data_ptr(), batch * inputs);
  const int64_t kept = prod ? inputs : 0;
  const Tensor after = target.empty({batch, kept, channels}, acc_dtype(data.dtype));
  dispatch(op, data.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const SelectArgs<T> args = {index.map,
                                slope.as<T>(),
                                data.as<T>(),
                                best.as<T>(),
                                output<T>(result),
                                output<acc_t<T>>(after),
                                output<uint8_t>(written)};
    const bool whole = packs_fit(data) && packs_fit(slope) && packs_fit(best) &&
                       reinterpret_cast<uintptr_t>(args.out) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(args.after) % 16 == 0;
    with_pack<T>(whole, [&](auto pack) {
      constexpr int V = decltype(pack)::value;
      constexpr int kBytes = V * static_cast<int>(sizeof(T));
      const Tiling groups = cut(batch, index.outputs, channels / V, kBytes,
                                inputs / std::max<int64_t>(index.outputs, 1));
      target.launch(prod ? select_backward_tiles<true, T, V> : select_backward_tiles<false, T, V>,
                    {groups.blocks(), kThreads}, args, groups);
      const Tiling tokens = cut(batch, inputs, channels / V, kBytes, 1);
      target.launch(zero_others<T, V>, {tokens.blocks(), kThreads}, args, tokens);
    });
  });
  return result;
}

// Those that whole packs take, with the shared memory of a tile of 32 rows.
template <class T>
cuda::Reported report_merge(const char* name) {
  return {name, merge_tiles<Fold::sum, T, kPack<T>>, kThreads, merge_shared_bytes<T, kPack<T>>(32)};
}
const cuda::Reported reported[] = {report_merge<float>("merge_tiles<sum, float>"),
                                   report_merge<c10::Half>("merge_tiles<sum, half>"),
                                   report_merge<c10::BFloat16>("merge_tiles<sum, bfloat16>")};

}  // namespace
}  // namespace tokenops::merging

STABLE_TORCH_LIBRARY_IMPL(tokenops, TOKENOPS_DEVICE, m) {
  m.impl("merge", TORCH_BOX(&tokenops::merging::merge));
  m.impl("merge_many", TORCH_BOX(&tokenops::merging::merge_many));
  m.impl("merge_reduce_backward", TORCH_BOX(&tokenops::merging::merge_reduce_backward));
  m.impl("merge_wavg", TORCH_BOX(&tokenops::merging::merge_wavg));
  m.impl("pair_dot", TORCH_BOX(&tokenops::merging::pair_dot));
  m.impl("unmerge", TORCH_BOX(&tokenops::merging::unmerge));
  m.impl("unmerge_many", TORCH_BOX(&tokenops::merging::unmerge_many));
}
