// SPDX-License-Identifier: Apache-2.0
// CPU operators tokenops::policy_attention, its backward, and tokenops::attention_scores: how the
// work is divided into tasks, and the sums over heads. The arithmetic is in the kernels.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "arguments.h"

namespace tokenops::attention {

#define TOKENOPS_KERNELS "attention/kernels.h"
#include "../isa_kernels.h"

namespace {

// Call f(begin, end) on parts of [0, tasks) in parallel, each task of `cost` multiplications.
template <class F>
void for_each_task(int64_t tasks, double cost, const F& f) {
  constexpr double kSmall = 2e5;  // multiplications that are not worth another thread
  if (tasks <= 0) return;
  const double worth = kSmall / std::max(cost, 1.0);
  const int64_t grain = worth < double(tasks) ? static_cast<int64_t>(worth) + 1 : tasks;
  if (grain >= tasks) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, f);
}

// out[i] = sum of sums[i][0], sums[i][1], ... for sums [count, rows, seqlen_k].
template <class A>
void sum_rows(const A* sums, int64_t count, int64_t rows, int64_t seqlen_k, A* out) {
  parallel_for(count, rows * seqlen_k * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* const to = out + i * seqlen_k;
      const A* const from = sums + i * rows * seqlen_k;
      for (int64_t n = 0; n < seqlen_k; ++n) to[n] = from[n];
      for (int64_t r = 1; r < rows; ++r) {
        for (int64_t n = 0; n < seqlen_k; ++n) to[n] += from[r * seqlen_k + n];
      }
    }
  });
}

// ---- forward ----

// The number of parts that the queries of a head are divided into, where heads alone do not occupy
// the threads. Parts are whole blocks of rows, so their number does not change a bit.
int64_t query_parts(int64_t heads, int64_t seqlen_q, int64_t block_m) {
  const int64_t wanted = 4 * torch::stable::get_num_threads(), blocks = seqlen_q / block_m;
  if (heads >= wanted || heads == 0) return 1;
  return std::clamp<int64_t>((wanted + heads - 1) / heads, 1, std::max<int64_t>(1, blocks / 2));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention(const Inputs& inputs) {
  const char* const op = "tokenops::policy_attention";
  const Params p(op, inputs);
  const int64_t rows = p.eps > 0 ? p.seqlen_q : 0;
  const Tensor out = empty({p.batch, p.seqlen_q, p.num_heads, p.head_dim_v}, p.dtype);
  const Tensor lse = empty({p.batch, p.num_heads, p.seqlen_q}, p.acc);
  const Tensor p_eps = empty({p.batch, p.num_heads, rows}, p.acc);
  const Tensor argmax = empty({p.batch, p.num_heads, rows}, ScalarType::Int);
  dispatch(op, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log2_size(p.batch * p.seqlen_k);
    p.log2_sizes(log2_size.data());
    const int64_t block_m = block_rows<A>(p.seqlen_k, kMaxBlockM);
    const int64_t parts = query_parts(p.batch * p.num_heads, p.seqlen_q, block_m);
    const int64_t part_rows = round_up((p.seqlen_q + parts - 1) / parts, block_m);
    const double cost =
        double(p.seqlen_q) / double(parts) * double(p.seqlen_k) * double(p.head_dim + p.head_dim_v);
    for_each_task(p.batch * p.num_heads * parts, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work =
          allocate<ForwardWork<T>>(memory, p.seqlen_k, p.head_dim, p.head_dim_v, kMaxBlockM);
      Head<T> packed = {};  // whose keys and values are packed
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, bh = task / parts;
        const int64_t b = bh / p.num_heads, h = bh % p.num_heads;
        const Head<T> head = p.head<T>(log2_size.data(), b, h);
        const bool same = head.k.data == packed.k.data && head.v.data == packed.v.data &&
                          head.policy == packed.policy && head.log2_size == packed.log2_size;
        if (!same || task == begin) kernels.pack_keys(head, work, true);
        packed = head;
        const ForwardResult<T> result = {
            output<T>(out) + (b * p.seqlen_q * p.num_heads + h) * p.head_dim_v,
            p.num_heads * p.head_dim_v, output<A>(lse) + bh * p.seqlen_q,
            p.eps > 0 ? output<A>(p_eps) + bh * p.seqlen_q : nullptr,
            p.eps > 0 ? output<int32_t>(argmax) + bh * p.seqlen_q : nullptr};
        kernels.forward(head, work, std::min(p.seqlen_q, part * part_rows),
                        std::min(p.seqlen_q, (part + 1) * part_rows), result);
      }
    });
  });
  return {out, lse, p_eps, argmax};
}

// ---- backward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_attention_backward(
    const Inputs& inputs, const Saved& saved, const Tensor& grad_out_in,
    const OptionalTensor& grad_lse_in, bool need_v, bool need_policy, bool need_size) {
  const char* const op = "tokenops::policy_attention_backward";
  const Params p(op, inputs);
  const int64_t rows = p.eps > 0 ? p.seqlen_q : 0;
  const auto of_out = {p.batch, p.seqlen_q, p.num_heads, p.head_dim_v};
  const auto of_rows = {p.batch, p.num_heads, p.seqlen_q};
  const Tensor out = with_rows(op, "out", saved.out, p.dtype, of_out);
  const Tensor lse = dense(op, "lse", saved.lse, p.acc, of_rows);
  const Tensor p_eps = dense(op, "p_eps", saved.p_eps, p.acc, {p.batch, p.num_heads, rows});
  const Tensor argmax =
      dense(op, "argmax", saved.argmax, ScalarType::Int, {p.batch, p.num_heads, rows});
  const Tensor grad_out = with_rows(op, "grad_out", grad_out_in, p.dtype, of_out);
  const OptionalTensor grad_lse = dense(op, "grad_lse", grad_lse_in, p.acc, of_rows);
  need_policy = need_policy && p.policy.has_value();
  need_size = need_size && p.size.has_value();

  const Tensor dq = empty({p.batch, p.seqlen_q, p.num_heads, p.head_dim}, p.dtype);
  const Tensor dk = empty({p.batch, p.seqlen_k, p.num_heads_k, p.head_dim}, p.dtype);
  const Tensor dv = empty({p.batch, need_v ? p.seqlen_k : 0, p.num_heads_k, p.head_dim_v}, p.dtype);
  const Tensor dpolicy = !need_policy        ? empty({p.batch, 0}, p.acc)
                         : p.policy_per_head ? empty({p.batch, p.num_heads, p.seqlen_k}, p.acc)
                                             : empty({p.batch, p.seqlen_k}, p.acc);
  const Tensor dsize = empty({p.batch, need_size ? p.seqlen_k : 0}, p.acc);

  dispatch(op, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log2_size(p.batch * p.seqlen_k);
    p.log2_sizes(log2_size.data());

    // A task is one key head, whose dk and dv all its query heads add up, or a part of the queries
    // of a key head where there are few. The number of parts, and with it the order of the sums,
    // does not depend on the number of threads.
    constexpr int64_t kTasks = 8;
    const int64_t heads_k = p.batch * p.num_heads_k, group = p.num_heads / p.num_heads_k;
    const int64_t most_parts =
        heads_k == 0 ? 1 : std::min(kTasks / heads_k, p.seqlen_q / kMaxQueries);
    const int64_t parts = std::max<int64_t>(1, most_parts);
    const int64_t dk_sums = p.seqlen_k * p.head_dim;
    const int64_t dv_sums = need_v ? p.seqlen_k * p.head_dim_v : 0;
    const int64_t sums = round_up(dk_sums + dv_sums, 16);
    const int64_t key_sums = p.batch * p.num_heads * parts * p.seqlen_k;
    const Scratch<A> partial(parts > 1 ? heads_k * parts * sums : 0);
    const Scratch<A> dpolicy_sums(need_policy ? key_sums : 0), dsize_sums(need_size ? key_sums : 0);

    const auto write = [&](const A* from, int64_t b, int64_t h) {
      const int64_t row = b * p.seqlen_k * p.num_heads_k + h;
      kernels.write_rows(from, static_cast<A>(p.scale), p.seqlen_k, p.head_dim,
                         output<T>(dk) + row * p.head_dim, p.num_heads_k * p.head_dim);
      if (need_v) {
        kernels.write_rows(from + dk_sums, 1, p.seqlen_k, p.head_dim_v,
                           output<T>(dv) + row * p.head_dim_v, p.num_heads_k * p.head_dim_v);
      }
    };
    const double cost = 2.5 * double(group) * double(p.seqlen_q) / double(parts) *
                        double(p.seqlen_k) * double(p.head_dim + p.head_dim_v);
    for_each_task(heads_k * parts, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work = allocate<BackwardWork<T>>(memory, p.seqlen_q, p.seqlen_k, p.head_dim,
                                            p.head_dim_v, p.is_causal && p.eps > 0);
      const Scratch<A> own(parts > 1 ? 0 : sums);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, bh_k = task / parts;
        const int64_t b = bh_k / p.num_heads_k, h_k = bh_k % p.num_heads_k;
        A* const to = parts > 1 ? partial.data() + task * sums : own.data();
        std::memset(to, 0, sums * sizeof(A));
        for (int64_t h = h_k * group; h < (h_k + 1) * group; ++h) {
          const Head<T> head = p.head<T>(log2_size.data(), b, h);
          const int64_t bh = b * p.num_heads + h, row = bh * p.seqlen_q;
          const auto zeroed = [&](const Scratch<A>& all, bool needed) -> A* {
            if (!needed) return nullptr;
            A* const of_head = all.data() + (bh * parts + part) * p.seqlen_k;
            std::memset(of_head, 0, p.seqlen_k * sizeof(A));
            return of_head;
          };
          const BackwardInputs<T> in = {tokens_of<T>(grad_out, b, h, 2),
                                        tokens_of<T>(out, b, h, 2),
                                        data_of<A>(lse) + row,
                                        data_of<A>(p_eps) + (p.eps > 0 ? row : 0),
                                        data_of<int32_t>(argmax) + (p.eps > 0 ? row : 0),
                                        grad_lse.has_value() ? data_of<A>(grad_lse) + row : nullptr,
                                        need_v,
                                        need_policy && p.policy_grad == "exact" && p.eps == 0};
          const BackwardResult<T> result = {
              output<T>(dq) + (b * p.seqlen_q * p.num_heads + h) * p.head_dim,
              p.num_heads * p.head_dim,
              to,
              to + dk_sums,
              zeroed(dpolicy_sums, need_policy),
              zeroed(dsize_sums, need_size)};
          kernels.backward(head, in, work, p.seqlen_q * part / parts,
                           p.seqlen_q * (part + 1) / parts, result);
        }
        if (parts == 1) write(to, b, h_k);
      }
    });
    if (parts > 1) {
      for_each_task(heads_k, double(parts * sums), [&](int64_t begin, int64_t end) {
        for (int64_t bh_k = begin; bh_k < end; ++bh_k) {
          A* const first = partial.data() + bh_k * parts * sums;
          for (int64_t i = sums; i < parts * sums; ++i) first[i % sums] += first[i];
          write(first, bh_k / p.num_heads_k, bh_k % p.num_heads_k);
        }
      });
    }
    if (need_policy) {
      A* const to = output<A>(dpolicy);
      const int64_t heads = p.policy_per_head ? p.num_heads : 1;  // that have a policy of their own
      sum_rows(dpolicy_sums.data(), p.batch * heads, p.num_heads / heads * parts, p.seqlen_k, to);
      const A* const policy = data_of<A>(p.policy);
      if (p.policy_grad == "kept") {
        for (int64_t i = 0; i < dpolicy.numel(); ++i) to[i] = policy[i] > 0 ? to[i] : 0;
      }
    }
    if (need_size) {  // d/dsize = d/dlog(size) / size
      A* const to = output<A>(dsize);
      sum_rows(dsize_sums.data(), p.batch, p.num_heads * parts, p.seqlen_k, to);
      const A* const size = data_of<A>(p.size);
      for (int64_t i = 0; i < p.batch * p.seqlen_k; ++i) {
        to[i] = size[i] < kMinWeight<A> ? 0 : to[i] / size[i];
      }
    }
  });
  return {dq, dk, dv, dpolicy, dsize};
}

// ---- scores ----

// q . k of few queries and all keys, [B, H, Nq, Nk]. Blocks of keys are tasks where heads are few;
// they do not change a bit.
template <class T>
void multiply_few(const Params& p, const Kernels<T>& kernels, acc_t<T>* out) {
  constexpr int64_t kBlockN = 256;
  const int64_t blocks = (p.seqlen_k + kBlockN - 1) / kBlockN, group = p.num_heads / p.num_heads_k;
  const int64_t rows = group * p.seqlen_q;
  const double cost = double(rows) * kBlockN * double(p.head_dim);
  for_each_task(p.batch * p.num_heads_k * blocks, cost, [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> packed(rows * row_words(p.head_dim));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start_n = task % blocks * kBlockN, bh_k = task / blocks;
      const int64_t b = bh_k / p.num_heads_k, h_k = bh_k % p.num_heads_k;
      const T* row[kFewRows];
      for (int64_t i = 0; i < rows; ++i) {
        row[i] = tokens_of<T>(p.q, b, h_k * group + i / p.seqlen_q).row(i % p.seqlen_q);
      }
      Tokens<T> keys = tokens_of<T>(p.k, b, h_k);
      keys.data += start_n * keys.stride;
      keys.count = std::min(kBlockN, p.seqlen_k - start_n);
      acc_t<T>* const to = out + bh_k * rows * p.seqlen_k + start_n;
      kernels.multiply_few(row, rows, keys, packed.data(), to, p.seqlen_k);
    }
  });
}

Tensor attention_scores(const Tensor& q, const Tensor& k, const OptionalTensor& query_weight,
                        const OptionalTensor& policy, const OptionalTensor& size,
                        const OptionalTensor& key_padding_mask,
                        const OptionalTensor& query_position, const OptionalTensor& lse_in,
                        bool self_keep, bool exclude_self, double eps, bool is_causal, double scale,
                        const Text& head_reduce) {
  const char* const op = "tokenops::attention_scores";
  const Params p(op, {q,
                      k,
                      k,
                      policy,
                      size,
                      key_padding_mask,
                      query_position,
                      self_keep,
                      exclude_self,
                      eps,
                      is_causal,
                      {},
                      scale});
  const auto of_rows = {p.batch, p.num_heads, p.seqlen_q};
  const bool weight_per_head = query_weight.has_value() && query_weight->dim() == 3;
  const OptionalTensor weight =
      weight_per_head ? dense(op, "query_weight", query_weight, p.acc, of_rows)
                      : dense(op, "query_weight", query_weight, p.acc, {p.batch, p.seqlen_q});
  const OptionalTensor lse = dense(op, "lse", lse_in, p.acc, of_rows);
  const bool all_heads = head_reduce == "none";
  STD_TORCH_CHECK(all_heads || head_reduce == "mean" || head_reduce == "sum", op,
                  ": expected head_reduce mean, sum or none, got ", head_reduce);
  const Tensor score = all_heads ? empty({p.batch, p.num_heads, p.seqlen_k}, p.acc)
                                 : empty({p.batch, p.seqlen_k}, p.acc);
  if (score.numel() == 0) return score;
  dispatch(op, p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> log2_size(p.batch * p.seqlen_k);
    p.log2_sizes(log2_size.data());
    const Scratch<A> scratch(all_heads ? 0 : p.batch * p.num_heads * p.seqlen_k);
    A* const sums = all_heads ? output<A>(score) : scratch.data();
    const bool few = p.seqlen_q * (p.num_heads / p.num_heads_k) <= kFewRows;
    const Scratch<A> products(few ? p.batch * p.num_heads * p.seqlen_q * p.seqlen_k : 0);
    if (few) multiply_few(p, kernels, products.data());
    const int64_t packed_dim = few ? 0 : p.head_dim;
    const int64_t most_rows = std::min(kMaxBlockM, round_up(p.seqlen_q, kTile));
    const double cost = double(p.seqlen_q + 8) * double(p.seqlen_k) * double(packed_dim + 8);
    for_each_task(p.batch * p.num_heads, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work = allocate<ForwardWork<T>>(memory, p.seqlen_k, packed_dim, int64_t{0}, most_rows);
      const Scratch<int32_t> list(p.seqlen_q);
      Head<T> packed = {};  // whose keys are packed
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / p.num_heads, h = bh % p.num_heads, row = bh * p.seqlen_q;
        const Head<T> head = p.head<T>(log2_size.data(), b, h);
        const A* const w = weight.has_value()
                               ? data_of<A>(weight) + (weight_per_head ? row : b * p.seqlen_q)
                               : nullptr;
        int64_t count = 0;
        for (int64_t m = 0; m < p.seqlen_q; ++m) {  // rows without weight need no attention
          if (w == nullptr || w[m] != 0) list.data()[count++] = static_cast<int32_t>(m);
        }
        A* const to = sums + bh * p.seqlen_k;
        std::memset(to, 0, p.seqlen_k * sizeof(A));
        const bool same = head.policy == packed.policy && head.log2_size == packed.log2_size &&
                          (few || head.k.data == packed.k.data);
        if (bh == begin || !same) {
          few ? work.keys.list_keys(head) : kernels.pack_keys(head, work, false);
        }
        packed = head;
        kernels.scores(head, work,
                       {list.data(), count, few ? products.data() + row * p.seqlen_k : nullptr, w,
                        lse.has_value() ? data_of<A>(lse) + row : nullptr, to});
      }
    });
    if (!all_heads) {
      A* const to = output<A>(score);
      sum_rows(sums, p.batch, p.num_heads, p.seqlen_k, to);
      const A factor = static_cast<A>(head_reduce == "mean" ? 1.0 / double(p.num_heads) : 1.0);
      for (int64_t i = 0; i < p.batch * p.seqlen_k; ++i) to[i] *= factor;
    }
  });
  return score;
}

}  // namespace
}  // namespace tokenops::attention

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("policy_attention", TOKENOPS_BOX(&tokenops::attention::policy_attention));
  m.impl("policy_attention_backward",
         TOKENOPS_BOX(&tokenops::attention::policy_attention_backward));
  m.impl("attention_scores", TORCH_BOX(&tokenops::attention::attention_scores));
}
