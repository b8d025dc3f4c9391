// SPDX-License-Identifier: Apache-2.0
// CPU operators tokenops::policy_attention, its backward, and tokenops::attention_scores: division
// of the work into tasks, and sums over heads. The kernels do the arithmetic of one head.

#include <algorithm>
#include <cmath>
#include <tuple>

#include "arguments.h"

namespace tokenops::attention {

#define TOKENOPS_KERNELS "attention/kernels.h"
#include "../isa_kernels.h"

namespace {

// Call f(begin, end) on parts of [0, tasks) in parallel, where each task takes `cost`
// multiplications.
template <class F>
void for_each_task(int64_t tasks, double cost, const F& f) {
  constexpr double kSmall = 2e5;  // multiplications that take less time than waking a thread
  if (tasks <= 0) return;
  const double min_tasks = kSmall / std::max(cost, 1.0);
  const int64_t grain = min_tasks < double(tasks) ? static_cast<int64_t>(min_tasks) + 1 : tasks;
  if (grain >= tasks) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, grain, f);
}

// out[i] = sums[i][0] + sums[i][1] + ..., from sums [count, rows, Nk] to out [count, Nk].
template <class A>
void sum_rows(const A* sums, int64_t count, int64_t rows, int64_t Nk, A* out) {
  parallel_for(count, rows * Nk * 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* const to = out + i * Nk;
      const A* const from = sums + i * rows * Nk;
      for (int64_t n = 0; n < Nk; ++n) to[n] = from[n];
      for (int64_t r = 1; r < rows; ++r) {
        for (int64_t n = 0; n < Nk; ++n) to[n] += from[r * Nk + n];
      }
    }
  });
}

// ---- forward ----

// The number of parts that the queries of each head are divided into, if there are too few heads
// for all threads. A part is whole blocks of queries, about two at least, so results do not depend
// on the number of parts.
int64_t query_parts(int64_t heads, int64_t Nq, int64_t block_m) {
  constexpr int64_t kTasksPerThread = 4;  // for threads to end at about the same time
  const int64_t wanted = kTasksPerThread * torch::stable::get_num_threads(), blocks = Nq / block_m;
  if (heads >= wanted || heads == 0) return 1;
  return std::clamp<int64_t>((wanted + heads - 1) / heads, 1, std::max<int64_t>(1, blocks / 2));
}

// Returns the tensors of Saved.
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_attention(const Inputs& inputs) {
  const char* const op = "tokenops::policy_attention";
  const Params params(op, inputs);
  const int64_t eps_rows = params.eps > 0 ? params.Nq : 0;
  const Tensor out = empty({params.B, params.Nq, params.H, params.Dv}, params.dtype);
  const Tensor lse = empty({params.B, params.H, params.Nq}, params.sum_dtype);
  const Tensor p_eps = empty({params.B, params.H, eps_rows}, params.sum_dtype);
  const Tensor argmax = empty({params.B, params.H, eps_rows}, ScalarType::Int);
  dispatch(op, params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const int64_t block_m = block_rows<A>(params.Nk, kMaxBlockM);
    const int64_t parts = query_parts(params.B * params.H, params.Nq, block_m);
    const int64_t part_rows = round_up((params.Nq + parts - 1) / parts, block_m);
    const double cost =
        double(params.Nq) / double(parts) * double(params.Nk) * double(params.D + params.Dv);
    for_each_task(params.B * params.H * parts, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work = allocate<ForwardWork<T>>(memory, params.Nk, params.D, params.Dv, kMaxBlockM);
      Head<T> packed = {};  // whose keys and values are packed
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, bh = task / parts;
        const int64_t b = bh / params.H, h = bh % params.H;
        const Head<T> head = params.head<T>(b, h);
        const bool same = head.k.data == packed.k.data && head.v.data == packed.v.data &&
                          head.policy == packed.policy && head.log2_size == packed.log2_size;
        // The first task packs even if null pointers of empty tensors look the same.
        if (!same || task == begin) kernels.pack_keys(head, work, true);
        packed = head;
        const ForwardResult<T> result = {
            output<T>(out) + (b * params.Nq * params.H + h) * params.Dv, params.H * params.Dv,
            output<A>(lse) + bh * params.Nq,
            params.eps > 0 ? output<A>(p_eps) + bh * params.Nq : nullptr,
            params.eps > 0 ? output<int32_t>(argmax) + bh * params.Nq : nullptr};
        kernels.forward(head, work, std::min(params.Nq, part * part_rows),
                        std::min(params.Nq, (part + 1) * part_rows), result);
      }
    });
  });
  return {out, lse, p_eps, argmax};
}

// ---- backward ----

// Returns dq [B, Nq, H, D], dk [B, Nk, Hkv, D], dv [B, Nk, Hkv, Dv], dpolicy and dsize of the
// shapes of policy and size; a gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_attention_backward(
    const Inputs& inputs, const Saved& saved, const OutputGrads& grads, const Needs& needs) {
  const char* const op = "tokenops::policy_attention_backward";
  const Params params(op, inputs);
  const int64_t eps_rows = params.eps > 0 ? params.Nq : 0;
  const auto out_shape = {params.B, params.Nq, params.H, params.Dv};
  const auto row_shape = {params.B, params.H, params.Nq};
  const Tensor out = checked_rows(op, "out", saved.out, params.dtype, out_shape);
  const Tensor lse = checked(op, "lse", saved.lse, params.sum_dtype, row_shape);
  const Tensor p_eps =
      checked(op, "p_eps", saved.p_eps, params.sum_dtype, {params.B, params.H, eps_rows});
  const Tensor argmax =
      checked(op, "argmax", saved.argmax, ScalarType::Int, {params.B, params.H, eps_rows});
  const Tensor grad_out = checked_rows(op, "grad_out", grads.grad_out, params.dtype, out_shape);
  const OptionalTensor grad_lse =
      checked(op, "grad_lse", grads.grad_lse, params.sum_dtype, row_shape);
  const bool need_v = needs.v, need_policy = needs.policy && params.policy.has_value();
  const bool need_size = needs.size && params.size.has_value();

  const Tensor dq = empty({params.B, params.Nq, params.H, params.D}, params.dtype);
  const Tensor dk = empty({params.B, params.Nk, params.Hkv, params.D}, params.dtype);
  const Tensor dv = empty({params.B, need_v ? params.Nk : 0, params.Hkv, params.Dv}, params.dtype);
  const Tensor dpolicy = !need_policy ? empty({params.B, 0}, params.sum_dtype)
                         : params.policy_per_head
                             ? empty({params.B, params.H, params.Nk}, params.sum_dtype)
                             : empty({params.B, params.Nk}, params.sum_dtype);
  const Tensor dsize = empty({params.B, need_size ? params.Nk : 0}, params.sum_dtype);

  dispatch(op, params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();

    // A task is a key head with its group of query heads, or, if there are few key heads, with a
    // part of the queries. The number of parts and the order of the sums do not depend on the
    // number of threads.
    constexpr int64_t kTasks = 8;  // not more: each task of a divided head has its own dk and dv
    const int64_t heads_k = params.B * params.Hkv, group = params.H / params.Hkv;
    const int64_t most_parts =
        heads_k == 0 ? 1 : std::min(kTasks / heads_k, params.Nq / kMaxQueries);
    const int64_t parts = std::max<int64_t>(1, most_parts);
    const int64_t dk_numel = params.Nk * params.D;
    const int64_t dv_numel = need_v ? params.Nk * params.Dv : 0;
    const int64_t dkdv_numel = round_up(dk_numel + dv_numel, kMaxLanes);
    const int64_t key_numel = params.B * params.H * parts * params.Nk;
    const Scratch<A> partial(parts > 1 ? heads_k * parts * dkdv_numel : 0);
    const Scratch<A> dpolicy_sums(need_policy ? key_numel : 0),
        dsize_sums(need_size ? key_numel : 0);

    const auto write_dkdv = [&](const A* from, int64_t b, int64_t h) {
      const int64_t row = b * params.Nk * params.Hkv + h;
      kernels.write_rows(from, static_cast<A>(params.scale), params.Nk, params.D,
                         output<T>(dk) + row * params.D, params.Hkv * params.D);
      if (need_v) {
        kernels.write_rows(from + dk_numel, 1, params.Nk, params.Dv,
                           output<T>(dv) + row * params.Dv, params.Hkv * params.Dv);
      }
    };
    constexpr double kProducts = 2.5;  // five products of matrices; the forward has two
    const double cost = kProducts * double(group) * double(params.Nq) / double(parts) *
                        double(params.Nk) * double(params.D + params.Dv);
    for_each_task(heads_k * parts, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work = allocate<BackwardWork<T>>(memory, params.Nq, params.Nk, params.D, params.Dv,
                                            params.is_causal && params.eps > 0);
      const Scratch<A> task_dkdv(parts > 1 ? 0 : dkdv_numel);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, bh_k = task / parts;
        const int64_t b = bh_k / params.Hkv, h_k = bh_k % params.Hkv;
        A* const to = parts > 1 ? partial.data() + task * dkdv_numel : task_dkdv.data();
        std::memset(to, 0, dkdv_numel * sizeof(A));
        for (int64_t h = h_k * group; h < (h_k + 1) * group; ++h) {
          const Head<T> head = params.head<T>(b, h);
          const int64_t bh = b * params.H + h, row = bh * params.Nq;
          const auto zeroed = [&](const Scratch<A>& all, bool needed) -> A* {
            if (!needed) return nullptr;
            A* const of_head = all.data() + (bh * parts + part) * params.Nk;
            std::memset(of_head, 0, params.Nk * sizeof(A));
            return of_head;
          };
          const BackwardInputs<T> in = {
              tokens_of<T>(grad_out, b, h, 2),
              tokens_of<T>(out, b, h, 2),
              data_of<A>(lse) + row,
              data_of<A>(p_eps) + (params.eps > 0 ? row : 0),
              data_of<int32_t>(argmax) + (params.eps > 0 ? row : 0),
              grad_lse.has_value() ? data_of<A>(grad_lse) + row : nullptr,
              need_v,
              need_policy && params.policy_grad == "exact" && params.eps == 0};
          const BackwardResult<T> result = {
              output<T>(dq) + (b * params.Nq * params.H + h) * params.D,
              params.H * params.D,
              to,
              to + dk_numel,
              zeroed(dpolicy_sums, need_policy),
              zeroed(dsize_sums, need_size)};
          kernels.backward(head, in, work, params.Nq * part / parts, params.Nq * (part + 1) / parts,
                           result);
        }
        if (parts == 1) write_dkdv(to, b, h_k);
      }
    });
    if (parts > 1) {
      for_each_task(heads_k, double(parts * dkdv_numel), [&](int64_t begin, int64_t end) {
        for (int64_t bh_k = begin; bh_k < end; ++bh_k) {
          A* const first = partial.data() + bh_k * parts * dkdv_numel;
          for (int64_t i = dkdv_numel; i < parts * dkdv_numel; ++i) {
            first[i % dkdv_numel] += first[i];
          }
          write_dkdv(first, bh_k / params.Hkv, bh_k % params.Hkv);
        }
      });
    }
    if (need_policy) {
      A* const to = output<A>(dpolicy);
      const int64_t heads = params.policy_per_head ? params.H : 1;  // of the policy
      sum_rows(dpolicy_sums.data(), params.B * heads, params.H / heads * parts, params.Nk, to);
      const A* const policy = data_of<A>(params.policy);
      if (params.policy_grad == "kept") {
        for (int64_t i = 0; i < dpolicy.numel(); ++i) to[i] = policy[i] > 0 ? to[i] : 0;
      }
    }
    if (need_size) {  // dsize = dlog_size / size
      A* const to = output<A>(dsize);
      sum_rows(dsize_sums.data(), params.B, params.H * parts, params.Nk, to);
      const A* const size = data_of<A>(params.size);
      for (int64_t i = 0; i < params.B * params.Nk; ++i) {
        to[i] = size[i] < kMinWeight<A> ? 0 : to[i] / size[i];
      }
    }
  });
  return {dq, dk, dv, dpolicy, dsize};
}

// ---- scores ----

// out [B, H, Nq, Nk] = q . k of few queries and all keys. Results do not depend on the blocks of
// keys.
template <class T>
void multiply_few(const Params& params, const Kernels<T>& kernels, acc_t<T>* out) {
  constexpr int64_t kBlockN = 256;
  const int64_t blocks = (params.Nk + kBlockN - 1) / kBlockN, group = params.H / params.Hkv;
  const int64_t rows = group * params.Nq;
  const double cost = double(rows) * kBlockN * double(params.D);
  for_each_task(params.B * params.Hkv * blocks, cost, [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> packed(rows * row_words(params.D));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t start_n = task % blocks * kBlockN, bh_k = task / blocks;
      const int64_t b = bh_k / params.Hkv, h_k = bh_k % params.Hkv;
      const T* row[kFewRows];
      for (int64_t i = 0; i < rows; ++i) {
        row[i] = tokens_of<T>(params.q, b, h_k * group + i / params.Nq).row(i % params.Nq);
      }
      Tokens<T> keys = tokens_of<T>(params.k, b, h_k);
      keys.data += start_n * keys.stride;
      keys.count = std::min(kBlockN, params.Nk - start_n);
      acc_t<T>* const to = out + bh_k * rows * params.Nk + start_n;
      kernels.multiply_few(row, rows, keys, packed.data(), to, params.Nk);
    }
  });
}

// Returns score [B, Nk], or [B, H, Nk] with head_reduce none.
Tensor attention_scores(const ScoreInputs& inputs) {
  const char* const op = "tokenops::attention_scores";
  const Params params(op, inputs.with_values(inputs.k));  // k stands in for v
  const auto row_shape = {params.B, params.H, params.Nq};
  const bool weight_per_head = inputs.query_weight.has_value() && inputs.query_weight->dim() == 3;
  const OptionalTensor weight = weight_per_head ? checked(op, "query_weight", inputs.query_weight,
                                                          params.sum_dtype, row_shape)
                                                : checked(op, "query_weight", inputs.query_weight,
                                                          params.sum_dtype, {params.B, params.Nq});
  const OptionalTensor lse = checked(op, "lse", inputs.lse, params.sum_dtype, row_shape);
  const bool all_heads = inputs.head_reduce == "none";
  STD_TORCH_CHECK(all_heads || inputs.head_reduce == "mean" || inputs.head_reduce == "sum", op,
                  ": expected head_reduce mean, sum or none, got ", inputs.head_reduce);
  const Tensor score = all_heads ? empty({params.B, params.H, params.Nk}, params.sum_dtype)
                                 : empty({params.B, params.Nk}, params.sum_dtype);
  if (score.numel() == 0) return score;
  dispatch(op, params.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const Kernels<T> kernels = kernels_for<T>();
    const Scratch<A> scratch(all_heads ? 0 : params.B * params.H * params.Nk);
    A* const sums = all_heads ? output<A>(score) : scratch.data();
    const bool few_rows = params.Nq * (params.H / params.Hkv) <= kFewRows;
    const Scratch<A> dots(few_rows ? params.B * params.H * params.Nq * params.Nk : 0);
    if (few_rows) multiply_few(params, kernels, dots.data());
    const int64_t packed_dim = few_rows ? 0 : params.D;
    const int64_t most_rows = std::min(kMaxBlockM, round_up(params.Nq, kTile));
    // Packing a key costs about as much as 8 queries, the softmax as much as 8 channels.
    const double cost = double(params.Nq + 8) * double(params.Nk) * double(packed_dim + 8);
    for_each_task(params.B * params.H, cost, [&](int64_t begin, int64_t end) {
      Scratch<char> memory;
      auto work = allocate<ForwardWork<T>>(memory, params.Nk, packed_dim, int64_t{0}, most_rows);
      const Scratch<int32_t> index(params.Nq);
      Head<T> packed = {};  // whose keys are packed
      for (int64_t bh = begin; bh < end; ++bh) {
        const int64_t b = bh / params.H, h = bh % params.H, row = bh * params.Nq;
        const Head<T> head = params.head<T>(b, h);
        const A* const w = weight.has_value()
                               ? data_of<A>(weight) + (weight_per_head ? row : b * params.Nq)
                               : nullptr;
        int64_t count = 0;
        for (int64_t m = 0; m < params.Nq; ++m) {  // queries with a weight
          if (w == nullptr || w[m] != 0) index.data()[count++] = static_cast<int32_t>(m);
        }
        A* const to = sums + bh * params.Nk;
        std::memset(to, 0, params.Nk * sizeof(A));
        const bool same = head.policy == packed.policy && head.log2_size == packed.log2_size &&
                          (few_rows || head.k.data == packed.k.data);
        if (bh == begin || !same) {
          few_rows ? work.keys.list_keys(head) : kernels.pack_keys(head, work, false);
        }
        packed = head;
        kernels.scores(head, work,
                       {index.data(), count, few_rows ? dots.data() + row * params.Nk : nullptr, w,
                        lse.has_value() ? data_of<A>(lse) + row : nullptr, to});
      }
    });
    if (!all_heads) {
      A* const to = output<A>(score);
      sum_rows(sums, params.B, params.H, params.Nk, to);
      const A factor = static_cast<A>(inputs.head_reduce == "mean" ? 1.0 / double(params.H) : 1.0);
      for (int64_t i = 0; i < params.B * params.Nk; ++i) to[i] *= factor;
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
  m.impl("attention_scores", TOKENOPS_BOX(&tokenops::attention::attention_scores));
}
