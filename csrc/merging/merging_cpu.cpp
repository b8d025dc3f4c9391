// SPDX-License-Identifier: Apache-2.0
// CPU operators of merging: allocation and loops; the arithmetic is in merging_kernels.h.
#include "../common.h"
#include "arguments.h"

namespace tokenops::merging {

// A kernel computes rows [begin, end) of its output; the rows of all images are counted together.
template <class T>
struct Kernels {
  void (*merge[5])(const MergeArgs<T>&, int64_t begin, int64_t end);  // by Reduce
  void (*unmerge)(const UnmergeArgs<T>&, int64_t begin, int64_t end);
  void (*pair_dot)(const PairDotArgs<T>&, int64_t begin, int64_t end);
  void (*reduce_backward[2])(const ReduceBackwardArgs<T>&, int64_t begin, int64_t end);  // by prod
};

#define TOKENOPS_KERNELS "merging/merging_kernels.h"
#define TOKENOPS_NO_PAIRS
#include "../isa_kernels.h"

namespace {

// Run a kernel on its rows in parallel; 64 is the cost of a row besides its bytes.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t rows,
         int64_t bytes_per_row) {
  parallel_for(rows, 64 + bytes_per_row, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
    stream_fence();
  });
}

template <class T>
int64_t row_bytes(const Tokens& tokens) {
  return tokens.channels * static_cast<int64_t>(sizeof(T));
}

// Whether to use non-temporal stores for `rows` output rows per image. If input and output exceed
// the caches, a plain store would first read the output's cache lines from memory.
template <class T>
bool streams(const Tokens& input, int64_t rows, const T* out) {
  const int64_t bytes = row_bytes<T>(input);
  return input.batch * (input.rows + rows) * bytes > kCacheBytes && bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

// ---- invert and compose ----

void invert_into(const int32_t* assign, int64_t batch, int64_t inputs, int64_t outputs,
                 int32_t* offsets, int32_t* members) {
  parallel_for(batch, 16 * inputs + 8 * outputs, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      invert_image(assign + b * inputs, inputs, outputs, offsets + b * (outputs + 1),
                   members + b * inputs);
    }
  });
}

std::tuple<Tensor, Tensor> invert(const Tensor& assign, int64_t num_tokens) {
  const InvertInputs given("tokenops::invert", assign, std::nullopt, num_tokens);
  const auto [from, _, batch, inputs, middle, outputs] = given.map;
  const Tensor offsets = empty({batch, outputs + 1}, ScalarType::Int);
  const Tensor members = empty({batch, inputs}, ScalarType::Int);
  invert_into(from, batch, inputs, outputs, output<int32_t>(offsets), output<int32_t>(members));
  return {offsets, members};
}

std::tuple<Tensor, Tensor, Tensor> compose(const Tensor& assign, const Tensor& earlier,
                                           int64_t num_tokens) {
  const InvertInputs given("tokenops::compose", assign, earlier, num_tokens);
  const Assignment map = given.map;
  const int64_t batch = map.batch, inputs = map.inputs;
  const Tensor composed = empty({batch, inputs}, ScalarType::Int);
  const Tensor offsets = empty({batch, num_tokens + 1}, ScalarType::Int);
  const Tensor members = empty({batch, inputs}, ScalarType::Int);
  int32_t* const to = output<int32_t>(composed);
  parallel_for(batch, 16 * inputs, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t n = 0; n < inputs; ++n) to[b * inputs + n] = map(b, n);
    }
  });
  invert_into(to, batch, inputs, num_tokens, output<int32_t>(offsets), output<int32_t>(members));
  return {composed, offsets, members};
}

// ---- merge, merge_many and merge_wavg ----

template <class T>
void run_merge(const Tokens& x, const MergeInputs& given, const Tensor& out, acc_t<T>* total) {
  using A = acc_t<T>;
  const TokenMap& map = given.index.map;
  const int64_t rows = map.batch * map.outputs;
  if (rows == 0) return;
  const MergeArgs<T> args = {map,
                             x.channels,
                             x.as<T>(),
                             data_of<A>(given.weight),
                             data_of<A>(given.scale),
                             given.mean,
                             output<T>(out),
                             streams(x, map.outputs, output<T>(out)),
                             total};
  run(kernels_for<T>().merge[static_cast<int>(given.reduce)], args, rows,
      (2 + map.inputs / map.outputs) * row_bytes<T>(x));
}

Tensor merge(const Tensor& x_in, const Index& index, const OptionalTensor& weight,
             const OptionalTensor& scale, const Text& reduce) {
  const char* op = "tokenops::merge";
  const Tokens x(op, "x", x_in);
  const MergeInputs given(op, x, index, weight, scale, reduce);
  const Tensor out = empty({x.batch, given.index.map.outputs, x.channels}, x.dtype);
  if (x.channels == 0) return out;
  dispatch(op, x.dtype,
           [&](auto type) { run_merge<typename decltype(type)::type>(x, given, out, nullptr); });
  return out;
}

std::vector<Tensor> merge_many(const std::vector<Tensor>& x, const Index& index,
                               const OptionalTensor& weight, const Text& reduce) {
  std::vector<Tensor> out;
  for (const Tensor& t : x) out.push_back(merge(t, index, weight, std::nullopt, reduce));
  return out;
}

std::tuple<Tensor, Tensor> merge_wavg(const Tensor& x_in, const Index& index,
                                      const OptionalTensor& size) {
  const char* op = "tokenops::merge_wavg";
  const Tokens x(op, "x", x_in);
  const MergeInputs given(op, x, index, size);
  const Tensor out = empty({x.batch, given.index.map.outputs, x.channels}, x.dtype);
  const Tensor total = empty({x.batch, given.index.map.outputs}, acc_dtype(x.dtype));
  dispatch(op, x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_merge<T>(x, given, out, output<acc_t<T>>(total));
  });
  return {out, total};
}

// ---- unmerge and unmerge_many ----

Tensor unmerge(const Tensor& y_in, const Index& index, const OptionalTensor& weight,
               const OptionalTensor& scale, const OptionalTensor& residual, bool mean) {
  const char* op = "tokenops::unmerge";
  const Tokens y(op, "y", y_in);
  const UnmergeInputs given(op, y, index, weight, scale, residual);
  const TokenMap& map = given.index.map;
  const Tensor out = empty({y.batch, map.inputs, y.channels}, y.dtype);
  if (y.channels == 0) return out;
  dispatch(op, y.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const UnmergeArgs<T> args = {map,
                                 y.channels,
                                 y.as<T>(),
                                 data_of<A>(given.weight),
                                 data_of<A>(given.scale),
                                 rows_of<T>(given.residual),
                                 mean,
                                 output<T>(out),
                                 streams(y, map.inputs, output<T>(out))};
    run(kernels_for<T>().unmerge, args, y.batch * map.inputs, 2 * row_bytes<T>(y));
  });
  return out;
}

std::vector<Tensor> unmerge_many(const std::vector<Tensor>& y, const Index& index,
                                 const OptionalTensor& weight, bool mean) {
  std::vector<Tensor> out;
  for (const Tensor& t : y) {
    out.push_back(unmerge(t, index, weight, std::nullopt, std::nullopt, mean));
  }
  return out;
}

// ---- backwards ----

Tensor pair_dot(const Tensor& x, const Tensor& y, const Index& index) {
  const char* op = "tokenops::pair_dot";
  const PairDotInputs given(op, x, y, index);
  const int64_t batch = given.x.batch, inputs = given.x.rows;
  const Tensor out = empty({batch, inputs}, acc_dtype(given.x.dtype));
  dispatch(op, given.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const PairDotArgs<T> args = {given.index.map, given.x.channels, given.x.as<T>(),
                                 given.y.as<T>(), output<acc_t<T>>(out)};
    run(kernels_for<T>().pair_dot, args, batch * inputs, 2 * row_bytes<T>(given.x));
  });
  return out;
}

Tensor merge_reduce_backward(const Tensor& grad, const Tensor& x, const Tensor& out,
                             const Index& index, const Text& reduce) {
  const char* op = "tokenops::merge_reduce_backward";
  const ReduceBackwardInputs given(op, grad, x, out, index, reduce);
  const TokenMap& map = given.index.map;
  const int64_t rows = map.batch * map.inputs, channels = given.x.channels;
  const Tensor grad_x = empty({map.batch, map.inputs, channels}, given.x.dtype);
  if (rows == 0 || channels == 0) return grad_x;
  Scratch<uint8_t> written(rows);
  std::memset(written.data(), 0, static_cast<size_t>(rows));
  dispatch(op, given.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t bytes = row_bytes<T>(given.x);
    const ReduceBackwardArgs<T> args = {map,
                                        channels,
                                        given.grad.as<T>(),
                                        given.x.as<T>(),
                                        given.out.as<T>(),
                                        output<T>(grad_x),
                                        written.data()};
    if (map.outputs > 0) {
      run(kernels_for<T>().reduce_backward[given.prod], args, map.batch * map.outputs,
          (2 + 2 * map.inputs / map.outputs) * bytes);
    }
    for (int64_t row = 0; row < rows; ++row) {  // dropped tokens
      if (args.written[row]) continue;
      void* zeros = args.grad_x + row * channels;
      std::memset(zeros, 0, static_cast<size_t>(bytes));
    }
  });
  return grad_x;
}

}  // namespace
}  // namespace tokenops::merging

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("invert", TOKENOPS_BOX(&tokenops::merging::invert));
  m.impl("compose", TOKENOPS_BOX(&tokenops::merging::compose));
  m.impl("merge", TOKENOPS_BOX(&tokenops::merging::merge));
  m.impl("merge_many", TOKENOPS_BOX(&tokenops::merging::merge_many));
  m.impl("merge_wavg", TOKENOPS_BOX(&tokenops::merging::merge_wavg));
  m.impl("merge_reduce_backward", TOKENOPS_BOX(&tokenops::merging::merge_reduce_backward));
  m.impl("unmerge", TOKENOPS_BOX(&tokenops::merging::unmerge));
  m.impl("unmerge_many", TOKENOPS_BOX(&tokenops::merging::unmerge_many));
  m.impl("pair_dot", TOKENOPS_BOX(&tokenops::merging::pair_dot));
}
