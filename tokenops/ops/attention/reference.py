# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights in plain PyTorch: the oracle of every kernel.

Letters: B batch, H heads of queries, Hkv heads of keys, Nq queries, Nk keys, D width, Dv width of
the values. A row is one query of one head; what a row sees are the keys that are neither padding
nor of size 0 nor, where attention is causal, behind its position.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import acc_dtype, no_autocast
from .arguments import InputGrads, Inputs, Needs, OutputGrads, Saved, ScoreInputs

#: Entries of attention maps that the operators hold at a time: queries come in blocks of so many,
#: which keeps memory linear in N. Autograd through these functions keeps the maps all the same.
MAP_AT_A_TIME = 1 << 24


class _Rows(NamedTuple):
    """The factors of a block of rows; all but the last three are [B, H, Nq, Nk]."""

    share: Tensor  # exp(s_ij + log z_j - L_i): attention before the policy
    weight: Tensor  # share times the policy, which is 1 for a row's own key under self_keep
    attention: Tensor  # what multiplies the values: weight + p_eps / (number of seen keys)
    seen: Tensor  # bool
    own: Tensor  # bool, the row's own key
    lse: Tensor  # [B, H, Nq]
    p_eps: Tensor  # [B, H, Nq], the share of eps in the row's sum
    argmax: Tensor  # int32 [B, H, Nq], the key of the row's maximum; -1 without eps


def _map_rows(o: Inputs | ScoreInputs, rows: slice) -> _Rows:
    """All factors of some rows, differentiable by autograd in q, k, policy and size."""
    q = o.q[:, :, rows]
    dtype = acc_dtype(q)
    nk = o.k.shape[2]
    part = _part(o)
    keys = _per_head(_without_padding(o.k, part).to(dtype), q.shape[1])
    key = torch.arange(nk, device=q.device)
    at = torch.arange(rows.start, rows.stop, device=q.device)
    if o.query_position is not None:
        at = o.query_position[..., rows]
    own = (at[..., None] == key).unsqueeze(-3)  # [1, Nq, Nk] or [B, 1, Nq, Nk]
    seen = torch.ones(1, 1, 1, nk, dtype=torch.bool, device=q.device)
    if part is not None:
        seen = part[:, None, None]
    if o.is_causal:
        seen = seen & (key <= at[..., None]).unsqueeze(-3)

    s = (q.to(dtype) * o.scale) @ keys.transpose(-1, -2)  # [B, H, Nq, Nk]
    if o.size is not None:
        size = o.size.to(dtype)
        s = s + torch.where(size > 0, size, 1).log()[:, None, None]
    keep = torch.ones_like(s)
    if o.policy is not None:
        policy = o.policy.to(dtype)
        # The inverse of a smaller one is no number: it counts as 0.
        policy = torch.where(policy < torch.finfo(dtype).tiny, policy - policy.detach(), policy)
        policy = policy[:, None, None] if policy.dim() == 2 else policy[:, :, None]
        keep = policy.expand(s.shape)
        if o.self_keep:
            keep = torch.where(own, 1, keep)
    seen, own = seen.expand(s.shape), own.expand(s.shape)
    s = s.masked_fill(~seen, -math.inf)
    lse, p_eps, exp, total, argmax = _normalize(s, keep, seen, o.eps)

    # A dropped key may dominate its row beyond all bounds; its share is capped, not infinite.
    share = (exp / total[..., None]).clamp(max=math.exp(_limit(s)))
    count = seen.sum(-1).clamp(min=1)
    weight = exp * keep / total[..., None]
    attention = weight + (p_eps / count)[..., None] * seen
    if o.exclude_self:
        attention = attention.masked_fill(own, 0)
    return _Rows(share, weight, attention, seen, own, lse, p_eps, argmax)


def _normalize(
    s: Tensor, keep: Tensor, seen: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """L, the share of eps, exp(s - c), its weighted sum and the key of the maximum m, by row.

    Any constant c cancels out. With eps it is m. Without, nothing depends on m, and c is the
    largest of s + log keep: no dropped key makes the others vanish, nor does a small policy.
    """
    if s.shape[-1] == 0:
        nothing = s.sum(-1)
        no_key = torch.full_like(nothing, -1, dtype=torch.int32)
        return nothing - math.inf, nothing, s, nothing + 1, no_key
    kept = keep.detach() > 0
    argmax = s.detach().argmax(-1, keepdim=True)  # the first of equals
    m = s.gather(-1, argmax)
    m = torch.where(m == -math.inf, 0, m)
    c = m.detach()
    if eps == 0:
        log = keep.detach().clamp(min=torch.finfo(s.dtype).tiny).log()
        c = torch.where(kept, s.detach() + log, -math.inf).amax(-1, keepdim=True)
        c = torch.where(c == -math.inf, 0, c)
    exp = s - c
    exp = torch.where(kept, exp, exp.clamp(max=_limit(s))).exp().masked_fill(~seen, 0)
    some = seen.any(-1)
    # The gradient of m through c would be a sum that cancels but for rounding.
    weight_of_eps = torch.where(some, eps * (m - c)[..., 0].exp(), 0) if eps > 0 else 0 * c[..., 0]
    total = (exp * keep).sum(-1) + weight_of_eps
    empty = total == 0
    total = torch.where(empty, 1, total)
    exp = exp.masked_fill(empty[..., None], 0)
    lse = torch.where(empty, -math.inf, c[..., 0] + total.log())
    p_eps = weight_of_eps / total
    if eps == 0:
        return lse, p_eps, exp, total, torch.full_like(argmax[..., 0], -1, dtype=torch.int32)
    return lse, p_eps, exp, total, torch.where(some, argmax[..., 0], -1).int()


def _part(o: Inputs | ScoreInputs) -> Tensor | None:
    """Keys that take part, bool [B, Nk]; None for all."""
    part = None if o.key_padding_mask is None else ~o.key_padding_mask
    if o.size is None:
        return part
    return o.size > 0 if part is None else part & (o.size > 0)


def _without_padding(x: Tensor, part: Tensor | None) -> Tensor:
    """Keys or values with 0 for padding, whose NaN would outlast a weight of 0."""
    return x if part is None else torch.where(part[:, None, :, None], x, 0)


def _limit(x: Tensor) -> float:
    """Logarithm of the largest share: its square is a number still."""
    return math.log(torch.finfo(x.dtype).max) / 2


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Give each head of queries the keys or values that it shares with its group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """The adjoint of :func:`_per_head`: sums over the heads of each group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def _differentiable(policy: Tensor | None, policy_grad: str) -> Tensor | None:
    """The policy, of which as much has a gradient as is wanted."""
    if policy is None or policy_grad == "exact":
        return policy
    constant = policy.detach()
    return constant if policy_grad == "none" else torch.where(policy > 0, policy, constant)


def _sum(parts: list[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _row_blocks(q: Tensor, k: Tensor) -> list[slice]:
    rows = q.shape[2]
    if torch.is_grad_enabled():
        return [slice(0, rows)]
    per_row = max(1, q.shape[0] * q.shape[1] * k.shape[2])
    block = max(1, MAP_AT_A_TIME // per_row)
    if rows <= block:
        return [slice(0, rows)]
    return [slice(i, min(i + block, rows)) for i in range(0, rows, block)]


def policy_attention(inputs: Inputs) -> Saved:
    """Output, lse and, with eps, the share of eps and the key of the maximum of each row.

    Differentiable by ordinary autograd in q, k, v, policy and size.
    """
    q, v = inputs.q, inputs.v
    inputs = inputs._replace(policy=_differentiable(inputs.policy, inputs.policy_grad))
    parts = []
    with no_autocast(q.device.type):
        values = _per_head(_without_padding(v, _part(inputs)).to(acc_dtype(v)), q.shape[1])
        for block in _row_blocks(q, inputs.k):
            rows = _map_rows(inputs, block)
            out = (rows.attention @ values).to(q.dtype).transpose(1, 2)
            parts.append((out, rows.lse, rows.p_eps, rows.argmax))
    dims = (1, 2, 2, 2)
    out, lse, p_eps, argmax = (torch.cat([p[i] for p in parts], dims[i]) for i in range(4))
    if inputs.eps == 0:
        p_eps, argmax = p_eps[..., :0], argmax[..., :0]
    return Saved(out, lse, p_eps, argmax)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size; all is computed from the inputs again.

    Differentiable by ordinary autograd.
    """
    q, k, size = inputs.q, inputs.k, inputs.size
    policy = _differentiable(inputs.policy, inputs.policy_grad)
    inputs = inputs._replace(policy=policy)
    with no_autocast(q.device.type):
        parts = [_block_backward(inputs, grads, block) for block in _row_blocks(q, k)]
        dq = torch.cat([p[0] for p in parts], 2)
        dk, dv, dpolicy, dlog = (_sum([p[i] for p in parts]) for i in range(1, 5))
        dk, dv = _per_group(dk, k.shape[1]), _per_group(dv, k.shape[1])
    dq, dk, dv = (t.transpose(1, 2).to(q.dtype) for t in (dq, dk, dv))
    dsize = dlog[..., :0].sum(1)  # [B, 0]
    if size is not None and needs.need_size:
        dlog = dlog.sum(1)
        dsize = torch.where(size > 0, dlog / torch.where(size > 0, size, 1), 0)
    if policy is None or not needs.need_policy:
        dpolicy = dlog.flatten(1)[:, :0].clone()  # [B, 0]
    else:
        dpolicy = dpolicy.sum(1) if policy.dim() == 2 else dpolicy
        if inputs.policy_grad == "kept":
            dpolicy = torch.where(policy > 0, dpolicy, 0)
    return InputGrads(dq, dk, dv if needs.need_v else dv[:, :0], dpolicy, dsize)


def _block_backward(
    o: Inputs, grads: OutputGrads, block: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a block of rows adds to the gradients of q, k, v, policy and log size, by head."""
    q = o.q[:, :, block]
    g = grads.grad_out[:, block].transpose(1, 2).to(acc_dtype(q))  # [B, H, Nq, Dv]
    part = _part(o)
    keys, values = (
        _per_head(_without_padding(t, part).to(g.dtype), q.shape[1]) for t in (o.k, o.v)
    )
    rows = _map_rows(o, block)
    weighted = g @ values.transpose(-1, -2)  # g_i . v_j
    if o.exclude_self:
        weighted = weighted.masked_fill(rows.own, 0)
    delta = (rows.attention * weighted).sum(-1)  # g_i . o_i
    if grads.grad_lse is not None:
        delta = delta - grads.grad_lse[:, :, block]
    t = rows.share * (weighted - delta[..., None])
    ds = rows.weight * (weighted - delta[..., None])
    if o.eps > 0:
        count = rows.seen.sum(-1).clamp(min=1)
        mean = (weighted * rows.seen).sum(-1) / count  # g_i . (mean of the values)
        r = (rows.p_eps * (mean - delta))[..., None]
        key = torch.arange(keys.shape[2], device=keys.device)
        ds = ds + r * (rows.argmax[..., None] == key)
    dpolicy = (t.masked_fill(rows.own, 0) if o.self_keep else t).sum(-2)
    dq, dk = o.scale * (ds @ keys), o.scale * (ds.transpose(-1, -2) @ q.to(g.dtype))
    return dq, dk, rows.attention.transpose(-1, -2) @ g, dpolicy, ds.sum(-2)


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads.

    Differentiable by ordinary autograd.
    """
    weight, head_reduce = inputs.query_weight, inputs.head_reduce
    parts = []
    with no_autocast(inputs.q.device.type):
        for block in _row_blocks(inputs.q, inputs.k):
            rows = _map_rows(inputs, block)
            received = rows.attention
            if weight is not None:
                of_rows = weight[..., block].to(received.dtype)
                of_rows = of_rows[:, None] if of_rows.dim() == 2 else of_rows
                received = received * of_rows[..., None]
            parts.append(received.sum(2))  # [B, H, Nk]
    score = _sum(parts)
    if head_reduce == "none":
        return score
    return score.mean(1) if head_reduce == "mean" else score.sum(1)
