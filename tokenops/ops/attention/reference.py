# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights in plain PyTorch: the oracle of every kernel.

A row is one query of one head. Its own key is the key at its position. It sees the keys that are
valid (neither padding nor of size 0) and, if attention is causal, not after its position.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import acc_dtype, no_autocast
from .arguments import InputGrads, Inputs, Needs, OutputGrads, Saved, ScoreInputs
from .common import max_exponent, per_head, per_key_head, reduce_heads, valid_keys, weight_grads

#: Maximum number of entries of the attention map of a block of rows, so that memory is linear in N.
#: Autograd through these functions still stores the whole map.
BLOCK_ENTRIES = 1 << 24


class _Rows(NamedTuple):
    """Attention of a block of rows; all but the last three are [B, H, Nq, Nk]."""

    p: Tensor  # exp(logit - lse): attention before the policy, but lse includes the policy
    p_kept: Tensor  # p times the policy, which is 1 for a row's own key under self_keep
    attention: Tensor  # factor of each value: p_kept + p_eps / (number of seen keys)
    seen: Tensor  # bool
    is_self: Tensor  # bool, the row's own key
    lse: Tensor  # [B, H, Nq]
    p_eps: Tensor  # [B, H, Nq]
    argmax: Tensor  # int32 [B, H, Nq]; -1 without eps


def _attend(inputs: Inputs | ScoreInputs, rows: slice) -> _Rows:
    """Attention of some rows, differentiable by autograd in q, k, policy and size."""
    q = inputs.q[:, :, rows]
    dtype = acc_dtype(q)
    valid = valid_keys(inputs)
    k = per_head(inputs.k, valid, dtype, q.shape[1])
    key = torch.arange(k.shape[2], device=q.device)
    position = torch.arange(rows.start, rows.stop, device=q.device)
    if inputs.query_position is not None:
        position = inputs.query_position[..., rows]
    is_self = (position[..., None] == key).unsqueeze(-3)  # [1, Nq, Nk] or [B, 1, Nq, Nk]
    seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)
    if valid is not None:
        seen = valid[:, None, None]
    if inputs.is_causal:
        seen = seen & (key <= position[..., None]).unsqueeze(-3)

    qk = (q.to(dtype) * inputs.scale) @ k.transpose(-1, -2)  # [B, H, Nq, Nk]
    if inputs.size is not None:
        size = inputs.size.to(dtype)
        qk = qk + torch.where(size > 0, size, 1).log()[:, None, None]
    policy = torch.ones_like(qk)
    if inputs.policy is not None:
        policy = inputs.policy.to(dtype)
        # 1 / policy overflows for subnormal policies, which count as 0 but keep their gradient.
        policy = torch.where(policy < torch.finfo(dtype).tiny, policy - policy.detach(), policy)
        policy = policy[:, None, None] if policy.dim() == 2 else policy[:, :, None]
        policy = policy.expand(qk.shape)
        if inputs.self_keep:
            policy = torch.where(is_self, 1, policy)
    seen, is_self = seen.expand(qk.shape), is_self.expand(qk.shape)
    qk = qk.masked_fill(~seen, -math.inf)
    lse, p_eps, p, l_i, argmax = _normalize(qk, policy, seen, inputs.eps)

    p_kept = p * policy / l_i[..., None]
    p = (p / l_i[..., None]).clamp(max=math.exp(max_exponent(dtype)))
    attention = p_kept + (p_eps / seen.sum(-1).clamp(min=1))[..., None] * seen
    if inputs.exclude_self:
        attention = attention.masked_fill(is_self, 0)
    return _Rows(p, p_kept, attention, seen, is_self, lse, p_eps, argmax)


def _normalize(
    qk: Tensor, policy: Tensor, seen: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By row: lse, p_eps, p = exp(qk - shift), l_i = sum(p * policy) + the term of eps, argmax.

    The shift cancels out. With eps it is the maximum m_i of qk. Without eps it is the maximum of
    qk + log(policy): neither a dropped key with a large logit nor a small policy makes the
    probabilities of the other keys underflow.
    """
    if qk.shape[-1] == 0:
        zero = qk.sum(-1)
        no_key = torch.full_like(zero, -1, dtype=torch.int32)
        return zero - math.inf, zero, qk, zero + 1, no_key
    kept = policy.detach() > 0
    argmax = qk.detach().argmax(-1, keepdim=True)  # the first maximum
    m_i = qk.gather(-1, argmax)
    m_i = torch.where(m_i == -math.inf, 0, m_i)
    shift = m_i.detach()
    if eps == 0:
        log_policy = policy.detach().clamp(min=torch.finfo(qk.dtype).tiny).log()
        shift = torch.where(kept, qk.detach() + log_policy, -math.inf).amax(-1, keepdim=True)
        shift = torch.where(shift == -math.inf, 0, shift)
    p = qk - shift
    p = torch.where(kept, p, p.clamp(max=max_exponent(p.dtype))).exp().masked_fill(~seen, 0)
    sees_any = seen.any(-1)
    p_eps = 0 * shift[..., 0]
    if eps > 0:  # exp is 1; its gradient goes through m_i alone, as the shift is detached
        p_eps = torch.where(sees_any, eps * (m_i - shift)[..., 0].exp(), 0)
    l_i = (p * policy).sum(-1) + p_eps
    empty = l_i == 0
    l_i = torch.where(empty, 1, l_i)
    p = p.masked_fill(empty[..., None], 0)
    lse = torch.where(empty, -math.inf, shift[..., 0] + l_i.log())
    argmax = torch.where(sees_any & (eps > 0), argmax[..., 0], -1).int()
    return lse, p_eps / l_i, p, l_i, argmax


def _differentiable(inputs: Inputs) -> Inputs:
    """Inputs whose policy has the gradient that ``policy_grad`` selects."""
    policy, policy_grad = inputs.policy, inputs.policy_grad
    if policy is None or policy_grad == "exact":
        return inputs
    constant = policy.detach()
    kept = constant if policy_grad == "none" else torch.where(policy > 0, policy, constant)
    return inputs._replace(policy=kept)


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    """Blocks of rows; autograd gets all rows at once."""
    rows = q.shape[2]
    block = max(1, BLOCK_ENTRIES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    if torch.is_grad_enabled() or rows <= block:
        return [slice(0, rows)]
    return [slice(i, min(i + block, rows)) for i in range(0, rows, block)]


def policy_attention(inputs: Inputs) -> Saved:
    """Output of attention and lse, p_eps and argmax of each row.

    Differentiable by autograd in q, k, v, policy and size.
    """
    inputs = _differentiable(inputs)
    q, k, v = inputs[:3]
    parts = []
    with no_autocast(q.device.type):
        v = per_head(v, valid_keys(inputs), acc_dtype(v), q.shape[1])
        for block in _blocks(q, k):
            rows = _attend(inputs, block)
            out = (rows.attention @ v).to(q.dtype).transpose(1, 2)
            parts.append((out, rows.lse, rows.p_eps, rows.argmax))
    dims = (1, 2, 2, 2)  # the dimension of the rows in each output
    out, lse, p_eps, argmax = (torch.cat([p[i] for p in parts], dims[i]) for i in range(4))
    if inputs.eps == 0:
        p_eps, argmax = p_eps[..., :0], argmax[..., :0]
    return Saved(out, lse, p_eps, argmax)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size, computed from the inputs alone.

    Differentiable by autograd.
    """
    inputs = _differentiable(inputs)
    q, k = inputs[:2]
    with no_autocast(q.device.type):
        parts = [_backward(inputs, grads, block) for block in _blocks(q, k)]
        dq = torch.cat([part[0] for part in parts], 2)
        dk, dv, dpolicy, dlog_size = (
            functools.reduce(torch.add, [part[i] for part in parts]) for i in range(1, 5)
        )
        dk, dv = per_key_head(dk, k.shape[1]), per_key_head(dv, k.shape[1])
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype) for t in (dq, dk, dv))
    dv = dv if needs.need_v else dv[:, :0]
    return InputGrads(dq, dk, dv, *weight_grads(dpolicy, dlog_size, inputs, needs))


def _backward(
    inputs: Inputs, grads: OutputGrads, rows: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q and, by query head, of k, v, policy and log(size) from some rows."""
    q = inputs.q[:, :, rows]
    dtype, heads, valid = acc_dtype(q), q.shape[1], valid_keys(inputs)
    k, v = (per_head(t, valid, dtype, heads) for t in (inputs.k, inputs.v))
    do = grads.grad_out[:, rows].transpose(1, 2).to(dtype)  # [B, H, Nq, Dv]
    p, p_kept, attention, seen, is_self, _, p_eps, argmax = _attend(inputs, rows)
    dp = do @ v.transpose(-1, -2)
    if inputs.exclude_self:
        dp = dp.masked_fill(is_self, 0)
    delta = (attention * dp).sum(-1)
    if grads.grad_lse is not None:
        delta = delta - grads.grad_lse[:, :, rows]
    dpolicy = p * (dp - delta[..., None])
    ds = p_kept * (dp - delta[..., None])
    if inputs.eps > 0:  # through the mean of the values and the maximum
        dp_mean = (dp * seen).sum(-1) / seen.sum(-1).clamp(min=1)
        key = torch.arange(k.shape[2], device=k.device)
        ds = ds + (p_eps * (dp_mean - delta))[..., None] * (argmax[..., None] == key)
    dpolicy = (dpolicy.masked_fill(is_self, 0) if inputs.self_keep else dpolicy).sum(-2)
    dq = inputs.scale * (ds @ k)
    dk = inputs.scale * (ds.transpose(-1, -2) @ q.to(dtype))
    return dq, dk, attention.transpose(-1, -2) @ do, dpolicy, ds.sum(-2)


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads.

    Differentiable by autograd.
    """
    weight = inputs.query_weight
    parts = []
    with no_autocast(inputs.q.device.type):
        for block in _blocks(inputs.q, inputs.k):
            received = _attend(inputs, block).attention
            if weight is not None:
                w = weight[..., block].to(received.dtype)
                received = received * (w[:, None] if w.dim() == 2 else w)[..., None]
            parts.append(received.sum(2))  # [B, H, Nk]
    return reduce_heads(functools.reduce(torch.add, parts), inputs.head_reduce)
