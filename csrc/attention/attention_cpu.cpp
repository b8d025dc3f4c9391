// SPDX-License-Identifier: Apache-2.0
// CPU operators tokenops::policy_attention, its backward, and tokenops::attention_scores.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention.h"

namespace tokenops::attention {

#define TOKENOPS_KERNELS "attention/kernels.h"
#include "../isa_kernels.h"

namespace {

using OptionalTensor = std::optional<Tensor>;

// ---- arguments ----

// A tensor whose last dimension is contiguous.
Tensor with_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// The rows of head h of image b, where these are dimensions `heads` and 0 of a tensor.
template <class T>
Tokens<T> tokens_of(const Tensor& t, int64_t b, int64_t h, int heads = 1) {
  const int rows = 3 - heads;
  const T* const data = static_cast<const T*>(t.const_data_ptr());
  const int64_t offset = data == nullptr ? 0 : b * t.stride(0) + h * t.stride(heads);
  return {data + offset, t.stride(rows), t.size(3), nullptr, t.size(rows)};
}

template <class U>
const U* data_of(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const U*>(t->const_data_ptr()) : nullptr;
}
template <class U>
U* output(const Tensor& t) {
  return static_cast<U*>(t.mutable_data_ptr());
}

OptionalTensor dense(const char* op, const char* name, const OptionalTensor& t, ScalarType dtype) {
  if (!t.has_value()) return t;
  STD_TORCH_CHECK(t->scalar_type() == dtype, op, ": ", name, " must be ", dtype);
  return as_contiguous(*t);
}

void check_shape(const char* op, const char* name, const Tensor& t,
                 std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, op, ": ", name, " has a wrong shape");
}

struct Options {
  bool self_keep, exclude_self, is_causal;
  double eps, scale;
};

// All that the operators have in common, checked.
struct Inputs {
  Inputs(const char* op, const Tensor& q_in, const Tensor& k_in, const OptionalTensor& policy_in,
         const OptionalTensor& size_in, const OptionalTensor& mask_in,
         const OptionalTensor& position_in, const Options& options)
      : q(with_rows(q_in)), k(with_rows(k_in)), options(options) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.scalar_type() == k.scalar_type(), op,
                    ": expected q and k [B, heads, N, D] of one dtype");
    batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3);
    groups = k.size(1), keys = k.size(2);
    check_shape(op, "k", k, {batch, groups, keys, width});
    STD_TORCH_CHECK(heads > 0 && groups > 0 && heads % groups == 0, op,
                    ": heads of k must divide those of q");
    STD_TORCH_CHECK(queries < kMaxTokens && keys < kMaxTokens, op, ": at most 2^24 tokens");
    acc = acc_dtype(q.scalar_type());
    policy = dense(op, "policy", policy_in, acc);
    size = dense(op, "size", size_in, acc);
    mask = dense(op, "key_padding_mask", mask_in, ScalarType::Bool);
    position = dense(op, "position", position_in, ScalarType::Int);
    if (policy.has_value()) {
      policy_heads = policy->dim() == 3;
      if (policy_heads) check_shape(op, "policy", *policy, {batch, heads, keys});
      if (!policy_heads) check_shape(op, "policy", *policy, {batch, keys});
    }
    if (size.has_value()) check_shape(op, "size", *size, {batch, keys});
    if (mask.has_value()) check_shape(op, "key_padding_mask", *mask, {batch, keys});
    if (position.has_value() && position->dim() == 2) {
      check_shape(op, "position", *position, {batch, queries});
    } else if (position.has_value()) {
      check_shape(op, "position", *position, {queries});
    }
  }

  // Logarithms of the sizes to base 2, -inf for padding, [B, Nk].
  template <class A>
  void log_sizes(A* out) const {
    const A* const z = data_of<A>(size);
    const bool* const padding = data_of<bool>(mask);
    parallel_for(batch * keys, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool live =
            (padding == nullptr || !padding[i]) && !(z != nullptr && z[i] < kSmallest<A>);
        out[i] = !live ? -infinity<A>() : z == nullptr ? 0 : std::log2(z[i]);
      }
    });
  }

  template <class T>
  Head<T> head(const Tensor& v, const acc_t<T>* log_size, int64_t b, int64_t h) const {
    using A = acc_t<T>;
    const int64_t group = h / (heads / groups);
    Head<T> head = {};
    head.q = tokens_of<T>(q, b, h);
    head.k = tokens_of<T>(k, b, group);
    head.v = tokens_of<T>(v, b, group);
    if (policy.has_value()) {
      head.policy = data_of<A>(policy) + (policy_heads ? b * heads + h : b) * keys;
    }
    head.log_size = log_size + b * keys;
    if (position.has_value()) {
      head.position = data_of<int32_t>(position) + (position->dim() == 2 ? b * queries : 0);
    }
    head.self_keep = options.self_keep && policy.has_value();
    head.exclude_self = options.exclude_self;
    head.is_causal = options.is_causal;
    head.eps = static_cast<A>(options.eps);
    head.scale = static_cast<A>(options.scale);
    return head;
  }

  Tensor q, k;
  Options options;
  int64_t batch, heads, queries, width, groups, keys;
  ScalarType acc;
  OptionalTensor policy, size, mask, position;
  bool policy_heads = false;
};

// Call f(begin, end) on parts of [0, tasks) in parallel, each of so many multiplications.
template <class F>
void share_out(int64_t tasks, double cost, const F& f) {
  constexpr double kSmall = 2e5;  // multiplications that are not worth another thread
  if (tasks <= 0) return;
  const double worth = kSmall / std::max(cost, 1.0);
  const int64_t grain = worth < double(tasks) ? static_cast<int64_t>(worth) + 1 : tasks;
  if (grain >= tasks) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, f);
}

// ---- forward ----

// Parts that the queries of a head are divided into, where heads alone do not occupy the threads:
// whole groups, so that the parts change no bit.
int64_t query_parts(int64_t heads, int64_t queries, int64_t group) {
  const int64_t wanted = 4 * torch::stable::get_num_threads(), groups = queries / group;
  if (heads >= wanted || heads == 0) return 1;
  return std::clamp<int64_t>((wanted + heads - 1) / heads, 1, std::max<int64_t>(1, groups / 2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention(
    const Tensor& q, const Tensor& k, const Tensor& v_in, const OptionalTensor& policy,
    const OptionalTensor& size, const OptionalTensor& key_padding_mask,
    const OptionalTensor& position, bool self_keep, bool exclude_self, double eps, bool is_causal,
    const Text&, double scale) {
  const char* const op = "tokenops::policy_attention";
  const Inputs in(op, q, k, policy, size, key_padding_mask, position,
                  {self_keep, exclude_self, is_causal, eps, scale});
  const Tensor v = with_rows(v_in);
  STD_TORCH_CHECK(v.dim() == 4 && v.scalar_type() == in.q.scalar_type(), op,
                  ": v must be [B, heads, N, D] of the dtype of q");
  const int64_t value_width = v.size(3);
  check_shape(op, "v", v, {in.batch, in.groups, in.keys, value_width});
  const int64_t rows = eps > 0 ? in.queries : 0;
  const Tensor out = empty({in.batch, in.queries, in.heads, value_width}, in.q.scalar_type());
  const Tensor lse = empty({in.batch, in.heads, in.queries}, in.acc);
  const Tensor floor = empty({in.batch, in.heads, rows}, in.acc);
  const Tensor argmax = empty({in.batch, in.heads, rows}, ScalarType::Int);
  dispatch(op, in.q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log_size(in.batch * in.keys);
    in.log_sizes(log_size.data());
    Layout measure(nullptr);
    const int64_t group = ForwardWork<T>(measure, in.keys, in.width, value_width).group;
    const int64_t parts = query_parts(in.batch * in.heads, in.queries, group);
    const int64_t per_part = round_up((in.queries + parts - 1) / parts, group);
    const double cost =
        double(in.queries) / double(parts) * double(in.keys) * double(in.width + value_width);
    share_out(in.batch * in.heads * parts, cost, [&](int64_t begin, int64_t end) {
      const Scratch<char> memory(measure.used());
      Layout layout(memory.data());
      ForwardWork<T> work(layout, in.keys, in.width, value_width);
      Head<T> packed = {};
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, h = task / parts % in.heads, b = task / parts / in.heads;
        const Head<T> head = in.head<T>(v, log_size.data(), b, h);
        const bool same = head.k.data == packed.k.data && head.v.data == packed.v.data &&
                          head.policy == packed.policy && head.log_size == packed.log_size;
        if (!same || task == begin) kernels.pack(head, work, true);
        packed = head;
        const int64_t row = (b * in.heads + h) * in.queries;
        const ForwardResult<T> result = {
            output<T>(out) + (b * in.queries * in.heads + h) * value_width, in.heads * value_width,
            output<A>(lse) + row, eps > 0 ? output<A>(floor) + row : nullptr,
            eps > 0 ? output<int32_t>(argmax) + row : nullptr};
        kernels.attend(head, work, std::min(in.queries, part * per_part),
                       std::min(in.queries, (part + 1) * per_part), result);
      }
    });
  });
  return {out, lse, floor, argmax};
}

// ---- backward ----

// Sums of a batch, one row for each of `heads` heads and `parts` parts, as one row for each of
// `kept` heads.
template <class A>
void fold(const A* sums, int64_t batch, int64_t rows, int64_t kept, int64_t keys, A* out) {
  parallel_for(batch * kept, rows / kept * keys * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* const to = out + i * keys;
      const A* const from = sums + i * (rows / kept) * keys;
      for (int64_t j = 0; j < keys; ++j) to[j] = from[j];
      for (int64_t r = 1; r < rows / kept; ++r) {
        for (int64_t j = 0; j < keys; ++j) to[j] += from[r * keys + j];
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_attention_backward(
    const Tensor& grad_in, const OptionalTensor& grad_lse_in, const Tensor& q, const Tensor& k,
    const Tensor& v_in, const OptionalTensor& policy, const OptionalTensor& size,
    const OptionalTensor& key_padding_mask, const OptionalTensor& position, const Tensor& out_in,
    const Tensor& lse_in, const Tensor& floor_in, const Tensor& argmax_in, bool self_keep,
    bool exclude_self, double eps, bool is_causal, const Text& policy_grad, double scale,
    bool need_v, bool need_policy, bool need_size) {
  const char* const op = "tokenops::policy_attention_backward";
  const Inputs in(op, q, k, policy, size, key_padding_mask, position,
                  {self_keep, exclude_self, is_causal, eps, scale});
  const Tensor v = with_rows(v_in), grad = with_rows(grad_in), out = with_rows(out_in);
  const ScalarType dtype = in.q.scalar_type();
  STD_TORCH_CHECK(v.dim() == 4 && v.scalar_type() == dtype && grad.scalar_type() == dtype &&
                      out.scalar_type() == dtype,
                  op, ": v, grad and out must be of the dtype of q");
  const int64_t value_width = v.size(3), rows = eps > 0 ? in.queries : 0;
  check_shape(op, "v", v, {in.batch, in.groups, in.keys, value_width});
  check_shape(op, "grad", grad, {in.batch, in.queries, in.heads, value_width});
  check_shape(op, "out", out, {in.batch, in.queries, in.heads, value_width});
  const Tensor lse = *dense(op, "lse", lse_in, in.acc);
  const Tensor floor = *dense(op, "floor", floor_in, in.acc);
  const Tensor argmax = *dense(op, "argmax", argmax_in, ScalarType::Int);
  const OptionalTensor grad_lse = dense(op, "grad_lse", grad_lse_in, in.acc);
  check_shape(op, "lse", lse, {in.batch, in.heads, in.queries});
  check_shape(op, "floor", floor, {in.batch, in.heads, rows});
  check_shape(op, "argmax", argmax, {in.batch, in.heads, rows});
  if (grad_lse.has_value()) {
    check_shape(op, "grad_lse", *grad_lse, {in.batch, in.heads, in.queries});
  }
  need_policy = need_policy && policy.has_value();
  need_size = need_size && size.has_value();
  const bool exact = policy_grad == "exact";

  const Tensor dq = empty({in.batch, in.queries, in.heads, in.width}, dtype);
  const Tensor dk = empty({in.batch, in.keys, in.groups, in.width}, dtype);
  const Tensor dv = empty({in.batch, need_v ? in.keys : 0, in.groups, value_width}, dtype);
  const Tensor dpolicy = !need_policy      ? empty({in.batch, 0}, in.acc)
                         : in.policy_heads ? empty({in.batch, in.heads, in.keys}, in.acc)
                                           : empty({in.batch, in.keys}, in.acc);
  const Tensor dsize = empty({in.batch, need_size ? in.keys : 0}, in.acc);

  dispatch(op, dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log_size(in.batch * in.keys);
    in.log_sizes(log_size.data());

    // Few heads share out their queries. The number of parts, and with it the order of the sums,
    // does not depend on the number of threads.
    constexpr int64_t kTasks = 8;
    const int64_t units = in.batch * in.groups, per_group = in.heads / in.groups;
    const int64_t parts =
        units == 0 ? 1 : std::max<int64_t>(1, std::min(kTasks / units, in.queries / kMostQueries));
    const int64_t key_sums = in.keys * in.width, value_sums = in.keys * value_width;
    const int64_t sums = round_up(key_sums + (need_v ? value_sums : 0), 16);
    const int64_t per_head = in.batch * in.heads * parts * in.keys;
    const Scratch<A> partial(parts > 1 ? units * parts * sums : 0);
    const Scratch<A> policy_sums(need_policy ? per_head : 0), log_sums(need_size ? per_head : 0);

    const auto write = [&](const A* from, int64_t b, int64_t group) {
      const int64_t row = b * in.keys * in.groups + group;
      kernels.write(from, static_cast<A>(scale), in.keys, in.width, output<T>(dk) + row * in.width,
                    in.groups * in.width);
      if (need_v) {
        kernels.write(from + key_sums, 1, in.keys, value_width, output<T>(dv) + row * value_width,
                      in.groups * value_width);
      }
    };
    const double cost = 2.5 * double(per_group) * double(in.queries) / double(parts) *
                        double(in.keys) * double(in.width + value_width);
    share_out(units * parts, cost, [&](int64_t begin, int64_t end) {
      const bool means = is_causal && eps > 0;
      Layout measure(nullptr);
      BackwardWork<T>(measure, in.queries, in.keys, in.width, value_width, means);
      const Scratch<char> memory(measure.used());
      Layout layout(memory.data());
      BackwardWork<T> work(layout, in.queries, in.keys, in.width, value_width, means);
      const Scratch<A> own(parts > 1 ? 0 : sums);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, group = task / parts % in.groups;
        const int64_t b = task / parts / in.groups;
        A* const to = parts > 1 ? partial.data() + task * sums : own.data();
        std::memset(to, 0, sums * sizeof(A));
        for (int64_t h = group * per_group; h < (group + 1) * per_group; ++h) {
          const Head<T> head = in.head<T>(v, log_size.data(), b, h);
          const int64_t row = (b * in.heads + h) * in.queries;
          const int64_t sum = ((b * in.heads + h) * parts + part) * in.keys;
          const auto zeroed = [&](const Scratch<A>& of, bool needed) -> A* {
            if (!needed) return nullptr;
            std::memset(of.data() + sum, 0, in.keys * sizeof(A));
            return of.data() + sum;
          };
          const Gradient<T> gradient = {tokens_of<T>(grad, b, h, 2),
                                        tokens_of<T>(out, b, h, 2),
                                        data_of<A>(lse) + row,
                                        data_of<A>(floor) + (eps > 0 ? row : 0),
                                        data_of<int32_t>(argmax) + (eps > 0 ? row : 0),
                                        grad_lse.has_value() ? data_of<A>(grad_lse) + row : nullptr,
                                        need_v,
                                        need_policy && exact && eps == 0};
          const BackwardResult<T> result = {
              output<T>(dq) + (b * in.queries * in.heads + h) * in.width,
              in.heads * in.width,
              to,
              to + key_sums,
              zeroed(policy_sums, need_policy),
              zeroed(log_sums, need_size)};
          kernels.backward(head, gradient, work, in.queries * part / parts,
                           in.queries * (part + 1) / parts, result);
        }
        if (parts == 1) write(to, b, group);
      }
    });
    if (parts > 1) {
      share_out(units, double(parts * sums), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          A* const first = partial.data() + unit * parts * sums;
          for (int64_t i = sums; i < parts * sums; ++i) first[i % sums] += first[i];
          write(first, unit / in.groups, unit % in.groups);
        }
      });
    }
    if (need_policy) {
      A* const to = output<A>(dpolicy);
      fold(policy_sums.data(), in.batch, in.heads * parts, in.policy_heads ? in.heads : 1, in.keys,
           to);
      const A* const p = data_of<A>(in.policy);
      if (policy_grad == "kept") {
        for (int64_t i = 0; i < dpolicy.numel(); ++i) to[i] = p[i] > 0 ? to[i] : 0;
      }
    }
    if (need_size) {
      A* const to = output<A>(dsize);
      fold(log_sums.data(), in.batch, in.heads * parts, 1, in.keys, to);
      const A* const z = data_of<A>(in.size);
      for (int64_t i = 0; i < in.batch * in.keys; ++i)
        to[i] = z[i] < kSmallest<A> ? 0 : to[i] / z[i];
    }
  });
  return {dq, dk, dv, dpolicy, dsize};
}

// ---- scores ----

// Products of a few queries with all keys, [B, H, Nq, Nk]. Blocks of keys share out the work where
// heads are few, and change no bit.
template <class T>
void multiply_few(const Inputs& in, const Kernels<T>& kernels, acc_t<T>* out) {
  constexpr int64_t kBlock = 256;
  const int64_t blocks = (in.keys + kBlock - 1) / kBlock, per_group = in.heads / in.groups;
  const int64_t count = per_group * in.queries;
  const double cost = double(count) * kBlock * double(in.width);
  share_out(in.batch * in.groups * blocks, cost, [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> packed(count * row_words(in.width));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kBlock, group = task / blocks % in.groups;
      const int64_t b = task / blocks / in.groups, h = group * per_group;
      const T* rows[kFewRows];
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = tokens_of<T>(in.q, b, h + i / in.queries).row(i % in.queries);
      }
      Tokens<T> keys = tokens_of<T>(in.k, b, group);
      keys.data += first * keys.stride;
      keys.count = std::min(kBlock, in.keys - first);
      acc_t<T>* const to = out + (b * in.heads + h) * in.queries * in.keys + first;
      kernels.multiply_few(rows, count, keys, packed.data(), to, in.keys);
    }
  });
}

Tensor attention_scores(const Tensor& q, const Tensor& k, const OptionalTensor& query_weight,
                        const OptionalTensor& policy, const OptionalTensor& size,
                        const OptionalTensor& key_padding_mask, const OptionalTensor& position,
                        const OptionalTensor& lse_in, bool self_keep, bool exclude_self, double eps,
                        bool is_causal, double scale, const Text& head_reduce) {
  const char* const op = "tokenops::attention_scores";
  const Inputs in(op, q, k, policy, size, key_padding_mask, position,
                  {self_keep, exclude_self, is_causal, eps, scale});
  const OptionalTensor weight = dense(op, "query_weight", query_weight, in.acc);
  const OptionalTensor lse = dense(op, "lse", lse_in, in.acc);
  const bool per_head = weight.has_value() && weight->dim() == 3;
  if (per_head) check_shape(op, "query_weight", *weight, {in.batch, in.heads, in.queries});
  if (weight.has_value() && !per_head) {
    check_shape(op, "query_weight", *weight, {in.batch, in.queries});
  }
  if (lse.has_value()) check_shape(op, "lse", *lse, {in.batch, in.heads, in.queries});
  const bool all_heads = head_reduce == "none";
  STD_TORCH_CHECK(all_heads || head_reduce == "mean" || head_reduce == "sum", op,
                  ": expected head_reduce mean, sum or none, got ", head_reduce);
  const Tensor score =
      all_heads ? empty({in.batch, in.heads, in.keys}, in.acc) : empty({in.batch, in.keys}, in.acc);
  if (score.numel() == 0) return score;
  dispatch(op, in.q.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log_size(in.batch * in.keys);
    in.log_sizes(log_size.data());
    const Scratch<A> scratch(all_heads ? 0 : in.batch * in.heads * in.keys);
    A* const sums = all_heads ? output<A>(score) : scratch.data();
    const bool few = in.queries * (in.heads / in.groups) <= kFewRows;
    const Scratch<A> products(few ? in.batch * in.heads * in.queries * in.keys : 0);
    if (few) multiply_few(in, kernels, products.data());
    const int64_t packed_width = few ? 0 : in.width;
    const int64_t most_rows = std::min(kMostRows, round_up(in.queries, kTile));
    const double cost = double(in.queries + 8) * double(in.keys) * double(packed_width + 8);
    share_out(in.batch * in.heads, cost, [&](int64_t begin, int64_t end) {
      Layout measure(nullptr);
      ForwardWork<T>(measure, in.keys, packed_width, 0, most_rows);
      const Scratch<char> memory(measure.used());
      const Scratch<int32_t> list(in.queries);
      Layout layout(memory.data());
      ForwardWork<T> work(layout, in.keys, packed_width, 0, most_rows);
      Head<T> before = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / in.heads, h = i % in.heads, row = i * in.queries;
        const Head<T> head = in.head<T>(in.k, log_size.data(), b, h);
        const A* const w =
            weight.has_value() ? data_of<A>(weight) + (per_head ? row : b * in.queries) : nullptr;
        int64_t count = 0;
        for (int64_t j = 0; j < in.queries; ++j) {  // rows without weight need no attention
          if (w == nullptr || w[j] != 0) list.data()[count++] = static_cast<int32_t>(j);
        }
        A* const to = sums + i * in.keys;
        std::memset(to, 0, in.keys * sizeof(A));
        const bool same_list = head.policy == before.policy && head.log_size == before.log_size;
        if (i == begin || !same_list || (!few && head.k.data != before.k.data)) {
          few ? work.keys.fill(head, true, eps > 0) : kernels.pack(head, work, false);
        }
        before = head;
        kernels.score(head, work,
                      {list.data(), count, few ? products.data() + row * in.keys : nullptr, w,
                       lse.has_value() ? data_of<A>(lse) + row : nullptr, to});
      }
    });
    if (!all_heads) {
      A* const to = output<A>(score);
      fold(sums, in.batch, in.heads, 1, in.keys, to);
      const A factor = static_cast<A>(head_reduce == "mean" ? 1.0 / double(in.heads) : 1.0);
      for (int64_t i = 0; i < in.batch * in.keys; ++i) to[i] *= factor;
    }
  });
  return score;
}

}  // namespace
}  // namespace tokenops::attention

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("policy_attention", TORCH_BOX(&tokenops::attention::policy_attention));
  m.impl("policy_attention_backward", TORCH_BOX(&tokenops::attention::policy_attention_backward));
  m.impl("attention_scores", TORCH_BOX(&tokenops::attention::attention_scores));
}
