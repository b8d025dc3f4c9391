// SPDX-License-Identifier: Apache-2.0
// Merging on the CPU: checks, allocation and loops; the arithmetic is in merging_kernels.h.
#include "../common.h"
#include "route.h"

namespace tokenops {

namespace portable {
#include "merging_kernels.h"
}
#if TOKENOPS_X86
TOKENOPS_TARGET_AVX2
namespace avx2 {
#include "merging_kernels.h"
}
TOKENOPS_TARGET_END
TOKENOPS_TARGET_AVX512
namespace avx512 {
#include "merging_kernels.h"
}
TOKENOPS_TARGET_END
#endif

namespace {

// Run a kernel over its rows in parallel; each costs some time besides that for its bytes.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows,
         int64_t bytes_per_row) {
  parallel_for(rows, 64 + bytes_per_row, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
    stream_fence();
  });
}

// Whether to store `rows` rows per image past the caches: where input and output together do not
// fit there, the output would end up in memory anyway, but would be read from it first.
template <class T>
bool streams(const Data& input, int64_t rows, const T* out) {
  const int64_t row_bytes = input.channels * static_cast<int64_t>(sizeof(T));
  return input.batch * (input.rows + rows) * row_bytes > kCacheBytes && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// ---- operators ----

// Counting sort: sizes, their running sum, then each token into the last free slot of its group,
// from the back, which turns ends into beginnings.
void invert_into(const int32_t* from, int64_t batch, int64_t inputs, int64_t outputs,
                 int32_t* all_ends, int32_t* all_slots) {
  parallel_for(batch, 16 * inputs + 8 * outputs, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* a = from + b * inputs;
      int32_t* ends = all_ends + b * (outputs + 1);
      int32_t* slots = all_slots + b * inputs;
      for (int64_t m = 0; m <= outputs; ++m) ends[m] = 0;
      for (int64_t n = 0; n < inputs; ++n) {
        if (0 <= a[n] && a[n] < outputs) ++ends[a[n]];
      }
      int32_t total = 0;
      for (int64_t m = 0; m <= outputs; ++m) total = ends[m] += total;
      for (int64_t n = total; n < inputs; ++n) slots[n] = -1;
      for (int64_t n = inputs - 1; n >= 0; --n) {
        if (0 <= a[n] && a[n] < outputs) slots[--ends[a[n]]] = static_cast<int32_t>(n);
      }
    }
  });
}

std::tuple<Tensor, Tensor> invert(const Tensor& assign, int64_t num_tokens) {
  const Inversion given("tokenops::invert", assign, num_tokens);
  const int64_t batch = given.batch, inputs = given.route.inputs;
  const Tensor offsets = empty({batch, num_tokens + 1}, ScalarType::Int);
  const Tensor members = empty({batch, inputs}, ScalarType::Int);
  invert_into(given.route.assign, batch, inputs, num_tokens, output<int32_t>(offsets),
              output<int32_t>(members));
  return {offsets, members};
}

std::tuple<Tensor, Tensor, Tensor> compose(const Tensor& assign, const Tensor& earlier,
                                           int64_t num_tokens) {
  const Composition given("tokenops::compose", assign, earlier, num_tokens);
  const int64_t batch = given.batch, inputs = given.route.inputs;
  const Tensor composed = empty({batch, inputs}, ScalarType::Int);
  const Tensor offsets = empty({batch, num_tokens + 1}, ScalarType::Int);
  const Tensor members = empty({batch, inputs}, ScalarType::Int);
  int32_t* const to = output<int32_t>(composed);
  parallel_for(batch, 16 * inputs, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < inputs; ++n) to[b * inputs + n] = given.route(b, n);
    }
  });
  invert_into(to, batch, inputs, num_tokens, output<int32_t>(offsets), output<int32_t>(members));
  return {composed, offsets, members};
}

template <class T>
auto merge_kernel(Fold fold) {
  switch (fold) {
    case Fold::weighted_sum: return TOKENOPS_KERNEL(merge_rows<Fold::weighted_sum, T>);
    case Fold::amax: return TOKENOPS_KERNEL(merge_rows<Fold::amax, T>);
    case Fold::amin: return TOKENOPS_KERNEL(merge_rows<Fold::amin, T>);
    case Fold::prod: return TOKENOPS_KERNEL(merge_rows<Fold::prod, T>);
    default: return TOKENOPS_KERNEL(merge_rows<Fold::sum, T>);
  }
}

template <class T>
void run_merge(Fold fold, const MergeArgs<T>& args) {
  const int64_t rows = args.map.batch * args.map.outputs;
  if (rows == 0) return;
  const int64_t per_output = 2 + args.map.inputs / args.map.outputs;
  run(merge_kernel<T>(fold), args, rows,
      per_output * args.channels * static_cast<int64_t>(sizeof(T)));
}

Tensor merge(const Tensor& x, const Tensor& assign, const Tensor& offsets, const Tensor& members,
             const OptionalTensor& weight, const OptionalTensor& scale, const Text& reduce) {
  const char* op = "tokenops::merge";
  const Data data(op, "x", x);
  const MapTensors index(op, assign, offsets, members, data.batch, data.rows);
  const Fold fold = parse_fold(op, reduce, weight.has_value());
  STD_TORCH_CHECK(reduce == "sum" || (!weight && !scale), op,
                  ": weight and scale go with reduce sum only, got ", reduce);
  const ScalarType acc = acc_dtype(data.dtype);
  const auto w = matrix(op, "weight", weight, data.batch, data.rows, acc);
  const auto s = matrix(op, "scale", scale, data.batch, index.outputs, acc);
  const Tensor out = empty({data.batch, index.outputs, data.channels}, data.dtype);
  if (data.channels == 0) return out;
  dispatch(op, data.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    run_merge<T>(fold, {index.map, data.channels, data.as<T>(), data_of<A>(w), data_of<A>(s),
                        reduce == "mean", output<T>(out),
                        streams(data, index.outputs, output<T>(out)), nullptr});
  });
  return out;
}

std::vector<Tensor> merge_many(const std::vector<Tensor>& x, const Tensor& assign,
                               const Tensor& offsets, const Tensor& members,
                               const OptionalTensor& weight, const Text& reduce) {
  std::vector<Tensor> out;
  for (const Tensor& t : x) {
    out.push_back(merge(t, assign, offsets, members, weight, std::nullopt, reduce));
  }
  return out;
}

std::tuple<Tensor, Tensor> merge_wavg(const Tensor& x, const Tensor& assign, const Tensor& offsets,
                                      const Tensor& members, const OptionalTensor& size) {
  const char* op = "tokenops::merge_wavg";
  const Data data(op, "x", x);
  const MapTensors index(op, assign, offsets, members, data.batch, data.rows);
  const ScalarType acc = acc_dtype(data.dtype);
  const auto w = matrix(op, "size", size, data.batch, data.rows, acc);
  const Tensor out = empty({data.batch, index.outputs, data.channels}, data.dtype);
  const Tensor total = empty({data.batch, index.outputs}, acc);
  dispatch(op, data.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    run_merge<T>(size ? Fold::weighted_sum : Fold::sum,
                 {index.map, data.channels, data.as<T>(), data_of<A>(w), nullptr, true,
                  output<T>(out), streams(data, index.outputs, output<T>(out)), output<A>(total)});
  });
  return {out, total};
}

Tensor unmerge(const Tensor& y, const Tensor& assign, const Tensor& offsets, const Tensor& members,
               const OptionalTensor& weight, const OptionalTensor& scale,
               const OptionalTensor& residual, bool mean) {
  const char* op = "tokenops::unmerge";
  const Data data(op, "y", y);
  const auto sizes = assign.sizes();
  STD_TORCH_CHECK(sizes.size() == 2, op, ": expected assign [B, N]");
  const int64_t inputs = sizes[1];
  const MapTensors index(op, assign, offsets, members, data.batch, inputs);
  STD_TORCH_CHECK(data.rows == index.outputs, op, ": expected y [B, M, C] with M = ", index.outputs,
                  ", got M = ", data.rows);
  const ScalarType acc = acc_dtype(data.dtype);
  const auto w = matrix(op, "weight", weight, data.batch, inputs, acc);
  const auto s = matrix(op, "scale", scale, data.batch, index.outputs, acc);
  std::optional<Data> added;
  if (residual) {
    added.emplace(op, "residual", *residual);
    check_like(op, "residual", *added, inputs, data);
  }
  const Tensor out = empty({data.batch, inputs, data.channels}, data.dtype);
  if (data.channels == 0) return out;
  dispatch(op, data.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const UnmergeArgs<T> args = {index.map,
                                 data.channels,
                                 data.as<T>(),
                                 data_of<A>(w),
                                 data_of<A>(s),
                                 added.has_value(),
                                 added ? added->as<T>() : Rows<const T>{nullptr, 0, 0},
                                 mean,
                                 output<T>(out),
                                 streams(data, inputs, output<T>(out))};
    run(TOKENOPS_KERNEL(unmerge_rows<T>), args, data.batch * inputs,
        2 * data.channels * static_cast<int64_t>(sizeof(T)));
  });
  return out;
}

std::vector<Tensor> unmerge_many(const std::vector<Tensor>& y, const Tensor& assign,
                                 const Tensor& offsets, const Tensor& members,
                                 const OptionalTensor& weight, bool mean) {
  std::vector<Tensor> out;
  for (const Tensor& t : y) {
    out.push_back(unmerge(t, assign, offsets, members, weight, std::nullopt, std::nullopt, mean));
  }
  return out;
}

Tensor pair_dot(const Tensor& x, const Tensor& y, const Tensor& assign, const Tensor& offsets,
                const Tensor& members) {
  const char* op = "tokenops::pair_dot";
  const Data a(op, "x", x), b(op, "y", y);
  const MapTensors index(op, assign, offsets, members, a.batch, a.rows);
  check_like(op, "y", b, index.outputs, a);
  const Tensor out = empty({a.batch, a.rows}, acc_dtype(a.dtype));
  dispatch(op, a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const PairDotArgs<T> args = {index.map, a.channels, a.as<T>(), b.as<T>(),
                                 output<acc_t<T>>(out)};
    run(TOKENOPS_KERNEL(pair_dot_rows<T>), args, a.batch * a.rows,
        2 * a.channels * static_cast<int64_t>(sizeof(T)));
  });
  return out;
}

Tensor merge_reduce_backward(const Tensor& grad, const Tensor& x, const Tensor& out,
                             const Tensor& assign, const Tensor& offsets, const Tensor& members,
                             const Text& reduce) {
  const char* op = "tokenops::merge_reduce_backward";
  const Data data(op, "x", x), slope(op, "grad", grad), best(op, "out", out);
  const MapTensors index(op, assign, offsets, members, data.batch, data.rows);
  check_like(op, "grad", slope, index.outputs, data);
  check_like(op, "out", best, index.outputs, data);
  const bool prod = reduce == "prod";
  STD_TORCH_CHECK(prod || reduce == "amax" || reduce == "amin", op,
                  ": expected reduce amax, amin or prod, got ", reduce);
  const int64_t inputs = data.rows, rows = data.batch * inputs, channels = data.channels;
  const Tensor result = empty({data.batch, inputs, channels}, data.dtype);
  if (rows == 0 || channels == 0) return result;
  Scratch<uint8_t> visited(rows);
  std::memset(visited.data(), 0, static_cast<size_t>(rows));
  dispatch(op, data.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
    const SelectBackwardArgs<T> args = {index.map,     channels,     slope.as<T>(),
                                        data.as<T>(),  best.as<T>(), output<T>(result),
                                        visited.data()};
    const auto kernel = prod ? TOKENOPS_KERNEL(select_backward_rows<true, T>)
                             : TOKENOPS_KERNEL(select_backward_rows<false, T>);
    if (index.outputs > 0) {
      run(kernel, args, data.batch * index.outputs, (2 + 2 * inputs / index.outputs) * row_bytes);
    }
    for (int64_t row = 0; row < rows; ++row) {  // tokens of no output token
      if (args.visited[row]) continue;
      void* unset = args.out + row * channels;
      std::memset(unset, 0, static_cast<size_t>(row_bytes));
    }
  });
  return result;
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("invert", TORCH_BOX(&tokenops::invert));
  m.impl("compose", TORCH_BOX(&tokenops::compose));
  m.impl("merge_many", TORCH_BOX(&tokenops::merge_many));
  m.impl("unmerge_many", TORCH_BOX(&tokenops::unmerge_many));
  m.impl("merge", TORCH_BOX(&tokenops::merge));
  m.impl("merge_reduce_backward", TORCH_BOX(&tokenops::merge_reduce_backward));
  m.impl("merge_wavg", TORCH_BOX(&tokenops::merge_wavg));
  m.impl("pair_dot", TORCH_BOX(&tokenops::pair_dot));
  m.impl("unmerge", TORCH_BOX(&tokenops::unmerge));
}
