// SPDX-License-Identifier: Apache-2.0
// The arguments of the attention operators: in the order of the schemas, then checked (Params).
//
// Letters: B images of the batch, H query heads, Hkv key heads, Nq queries, Nk keys, D width of q
// and k, Dv width of v.
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

// What policy_attention returns and its backward reads.
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

// Which gradients to compute. dq and dk are always computed.
struct Needs {
  bool v, policy, size;

  auto fields() { return std::tie(v, policy, size); }
};

// The arguments of attention_scores. A field that Inputs also has means the same.
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
  // Inputs for Params, which checks v too: scores read neither v nor policy_grad.
  Inputs with_values(const Tensor& v) const {
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

// Check a tensor; copy it unless its last dimension is contiguous.
inline Tensor checked_rows(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                           std::initializer_list<int64_t> shape) {
  check(op, name, t, dtype, shape);
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// Check a tensor; copy it unless it is contiguous.
inline Tensor checked(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                      std::initializer_list<int64_t> shape) {
  check(op, name, t, dtype, shape);
  return as_contiguous(t);
}
inline OptionalTensor checked(const char* op, const char* name, const OptionalTensor& t,
                              ScalarType dtype, std::initializer_list<int64_t> shape) {
  return t.has_value() ? checked(op, name, *t, dtype, shape) : t;
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

// The rows of head h of image b of a tensor [B, H, N, D], or [B, N, H, D] with `heads_axis` 2.
template <class T>
Tokens<T> tokens_of(const Tensor& t, int64_t b, int64_t h, int heads_axis = 1) {
  const int rows_axis = heads_axis == 1 ? 2 : 1;
  const T* const data = static_cast<const T*>(t.const_data_ptr());
  // An empty tensor may have a null pointer, to which no offset may be added.
  const int64_t offset = data == nullptr ? 0 : b * t.stride(0) + h * t.stride(heads_axis);
  return {data + offset, t.stride(rows_axis), t.size(3), nullptr, t.size(rows_axis)};
}

// ---- checked arguments ----

// Inputs whose shapes and dtypes are checked: q, k and v have contiguous rows, the other tensors
// are contiguous.
struct Params : Inputs {
  ScalarType dtype;      // of q, k and v
  ScalarType sum_dtype;  // of sums, policy, size and lse
  int64_t B, H, Hkv, Nq, Nk, D, Dv;
  bool policy_per_head;

  Params(const char* op, const Inputs& inputs) : Inputs(inputs) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op,
                    ": expected q, k and v [B, heads, N, D]");
    dtype = q.scalar_type(), sum_dtype = acc_dtype(dtype);
    B = q.size(0), H = q.size(1), Nq = q.size(2), D = q.size(3);
    Hkv = k.size(1), Nk = k.size(2), Dv = v.size(3);
    STD_TORCH_CHECK(H > 0 && Hkv > 0 && H % Hkv == 0, op,
                    ": the number of heads of k must divide that of q");
    STD_TORCH_CHECK(Nq < kMaxTokens && Nk < kMaxTokens, op, ": at most 2^24 tokens");
    q = checked_rows(op, "q", q, dtype, {B, H, Nq, D});
    k = checked_rows(op, "k", k, dtype, {B, Hkv, Nk, D});
    v = checked_rows(op, "v", v, dtype, {B, Hkv, Nk, Dv});
    policy_per_head = policy.has_value() && policy->dim() == 3;
    policy = policy_per_head ? checked(op, "policy", policy, sum_dtype, {B, H, Nk})
                             : checked(op, "policy", policy, sum_dtype, {B, Nk});
    size = checked(op, "size", size, sum_dtype, {B, Nk});
    key_padding_mask = checked(op, "key_padding_mask", key_padding_mask, ScalarType::Bool, {B, Nk});
    query_position = query_position.has_value() && query_position->dim() == 2
                         ? checked(op, "query_position", query_position, ScalarType::Int, {B, Nq})
                         : checked(op, "query_position", query_position, ScalarType::Int, {Nq});
    sum_dtype == ScalarType::Double ? compute_log2_size<double>() : compute_log2_size<float>();
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
  void compute_log2_size() {
    constexpr int64_t kLog2Cost = 64;  // of one log2, as bytes that parallel_for counts
    const A* const sizes = data_of<A>(size);
    const bool* const padding = data_of<bool>(key_padding_mask);
    // + 1: not a null pointer, even without keys.
    A* const out = reinterpret_cast<A*>(log2_size.reserve(B * Nk * sizeof(A) + 1));
    parallel_for(B * Nk, kLog2Cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool valid =
            (padding == nullptr || !padding[i]) && !(sizes != nullptr && sizes[i] < kMinWeight<A>);
        out[i] = !valid ? -infinity<A>() : sizes == nullptr ? 0 : std::log2(sizes[i]);
      }
    });
  }

  Scratch<char> log2_size;  // [B, Nk] of sum_dtype; -inf for padding and keys of size 0
};

}  // namespace tokenops::attention
