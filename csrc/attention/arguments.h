// SPDX-License-Identifier: Apache-2.0
// The arguments of the attention operators: as their schemas list them, then checked.
//
// Letters: B B, H query heads, Hkv key heads, Nq queries, Nk keys, D D, Dv Dv.
#pragma once

#include <cmath>

#include "attention.h"

namespace tokenops::attention {

using OptionalTensor = std::optional<Tensor>;

// The arguments of policy_attention, in the order of its schema.
struct Inputs {
  Tensor q;                         // [B, H, Nq, D]
  Tensor k;                         // [B, Hkv, Nk, D]
  Tensor v;                         // [B, Hkv, Nk, Dv]
  OptionalTensor policy;            // [B, Nk] or [B, H, Nk]
  OptionalTensor size;              // [B, Nk]
  OptionalTensor key_padding_mask;  // bool [B, Nk], true for padding
  OptionalTensor query_position;    // int32 [Nq] or [B, Nq]
  bool self_keep, exclude_self;
  double eps;
  bool is_causal;
  Text policy_grad;  // exact, kept or none
  double scale;

  auto fields() {
    return std::tie(q, k, v, policy, size, key_padding_mask, query_position, self_keep,
                    exclude_self, eps, is_causal, policy_grad, scale);
  }
};

// The outputs of policy_attention, which its backward takes.
struct Saved {
  Tensor out;     // [B, Nq, H, Dv]
  Tensor lse;     // [B, H, Nq]
  Tensor p_eps;   // [B, H, Nq], or [B, H, 0] without eps
  Tensor argmax;  // int32, of the shape of p_eps

  auto fields() { return std::tie(out, lse, p_eps, argmax); }
};

struct OutputGrads {
  Tensor grad_out;          // [B, Nq, H, Dv]
  OptionalTensor grad_lse;  // [B, H, Nq]

  auto fields() { return std::tie(grad_out, grad_lse); }
};

// The gradients to compute besides those of q and k.
struct Needs {
  bool v, policy, size;

  auto fields() { return std::tie(v, policy, size); }
};

// The arguments of attention_scores. The fields that Inputs has too are the same.
struct ScoreInputs {
  Tensor q, k;
  OptionalTensor query_weight;  // [B, Nq] or [B, H, Nq]
  OptionalTensor policy, size, key_padding_mask, query_position;
  OptionalTensor lse;  // [B, H, Nq]
  bool self_keep, exclude_self;
  double eps;
  bool is_causal;
  double scale;
  Text head_reduce;  // mean, sum or none

  auto fields() {
    return std::tie(q, k, query_weight, policy, size, key_padding_mask, query_position, lse,
                    self_keep, exclude_self, eps, is_causal, scale, head_reduce);
  }
  Inputs with_values(const Tensor& v) const {  // policy_grad does not matter
    return Inputs({q, k, v, policy, size, key_padding_mask, query_position, self_keep, exclude_self,
                   eps, is_causal, Text(), scale});
  }
};

// ---- checks ----

inline void check(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": expected ", name, " of dtype ", dtype, ", got ",
                  t.scalar_type());
  bool fits = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t d = 0; fits && d < t.dim(); ++d) fits = t.size(d) == shape.begin()[d];
  STD_TORCH_CHECK(fits, op, ": ", name, " has a wrong shape");
}

// A checked tensor whose last dimension is contiguous.
inline Tensor with_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                        std::initializer_list<int64_t> shape) {
  check(op, name, t, dtype, shape);
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A checked contiguous tensor.
inline Tensor dense(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                    std::initializer_list<int64_t> shape) {
  check(op, name, t, dtype, shape);
  return as_contiguous(t);
}
inline OptionalTensor dense(const char* op, const char* name, const OptionalTensor& t,
                            ScalarType dtype, std::initializer_list<int64_t> shape) {
  return t.has_value() ? dense(op, name, *t, dtype, shape) : t;
}

// ---- data of tensors ----

template <class U>
const U* data_of(const OptionalTensor& t) {
  return t.has_value() ? static_cast<const U*>(t->const_data_ptr()) : nullptr;
}
template <class U>
U* output(const Tensor& t) {
  return static_cast<U*>(t.mutable_data_ptr());
}

// The rows of head h of image b of a tensor [B, H, N, D], or [B, N, H, D] with `heads` 2.
template <class T>
Tokens<T> tokens_of(const Tensor& t, int64_t b, int64_t h, int heads = 1) {
  const int rows = 3 - heads;
  const T* const data = static_cast<const T*>(t.const_data_ptr());
  const int64_t offset = data == nullptr ? 0 : b * t.stride(0) + h * t.stride(heads);
  return {data + offset, t.stride(rows), t.size(3), nullptr, t.size(rows)};
}

// ---- checked arguments ----

// Inputs whose shapes and dtypes are checked: q, k and v have contiguous rows, the other tensors
// are contiguous.
struct Params : Inputs {
  ScalarType dtype, acc;  // of q, k and v; of sums
  int64_t B, H, Hkv, Nq, Nk, D, Dv;
  bool policy_per_head;

  Params(const char* op, const Inputs& inputs) : Inputs(inputs) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op,
                    ": expected q, k and v [B, heads, N, D]");
    dtype = q.scalar_type(), acc = acc_dtype(dtype);
    B = q.size(0), H = q.size(1), Nq = q.size(2), D = q.size(3);
    Hkv = k.size(1), Nk = k.size(2), Dv = v.size(3);
    STD_TORCH_CHECK(H > 0 && Hkv > 0 && H % Hkv == 0, op, ": heads of k must divide those of q");
    STD_TORCH_CHECK(Nq < kMaxTokens && Nk < kMaxTokens, op, ": at most 2^24 tokens");
    q = with_rows(op, "q", q, dtype, {B, H, Nq, D});
    k = with_rows(op, "k", k, dtype, {B, Hkv, Nk, D});
    v = with_rows(op, "v", v, dtype, {B, Hkv, Nk, Dv});
    policy_per_head = policy.has_value() && policy->dim() == 3;
    policy = policy_per_head ? dense(op, "policy", policy, acc, {B, H, Nk})
                             : dense(op, "policy", policy, acc, {B, Nk});
    size = dense(op, "size", size, acc, {B, Nk});
    key_padding_mask = dense(op, "key_padding_mask", key_padding_mask, ScalarType::Bool, {B, Nk});
    query_position = query_position.has_value() && query_position->dim() == 2
                         ? dense(op, "query_position", query_position, ScalarType::Int, {B, Nq})
                         : dense(op, "query_position", query_position, ScalarType::Int, {Nq});
    acc == ScalarType::Double ? take_log2<double>() : take_log2<float>();
  }

  // Head h of image b.
  template <class T>
  Head<T> head(int64_t b, int64_t h) const {
    using A = acc_t<T>;
    const int64_t head_k = h / (H / Hkv);
    Head<T> head = {};
    head.q = tokens_of<T>(q, b, h);
    head.k = tokens_of<T>(k, b, head_k);
    head.v = tokens_of<T>(v, b, head_k);
    if (policy.has_value()) {
      head.policy = data_of<A>(policy) + (policy_per_head ? b * H + h : b) * Nk;
    }
    head.log2_size = reinterpret_cast<const A*>(log2_size.data()) + b * Nk;
    if (query_position.has_value()) {
      head.query_position =
          data_of<int32_t>(query_position) + (query_position->dim() == 2 ? b * Nq : 0);
    }
    head.self_keep = self_keep && policy.has_value();
    head.exclude_self = exclude_self;
    head.is_causal = is_causal;
    head.eps = static_cast<A>(eps);
    head.scale = static_cast<A>(scale);
    return head;
  }

 private:
  template <class A>
  void take_log2() {
    const A* const sizes = data_of<A>(size);
    const bool* const padding = data_of<bool>(key_padding_mask);
    A* const out = reinterpret_cast<A*>(log2_size.reserve(B * Nk * sizeof(A) + 1));
    parallel_for(B * Nk, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool valid =
            (padding == nullptr || !padding[i]) && !(sizes != nullptr && sizes[i] < kMinWeight<A>);
        out[i] = !valid ? -infinity<A>() : sizes == nullptr ? 0 : std::log2(sizes[i]);
      }
    });
  }

  Scratch<char> log2_size;  // of the type acc [B, Nk]; -inf for padding and keys of size 0
};

}  // namespace tokenops::attention
