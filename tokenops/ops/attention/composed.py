# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights put together from PyTorch's operators, where there is no kernel.

Blocks of images, or of rows of one image, whose maps stay in the cache: a product, few passes in
place, a product. The weights of a row are divided by their sum after the second product. A token's
own key, which a policy spares, is a diagonal that is kept aside while the policy multiplies.

Letters: B batch, H heads of queries, Hkv heads of keys, Nq queries, Nk keys, D width, Dv width of
the values. Nothing here is differentiable by autograd: the operators have backward formulas.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._library import acc_dtype, may_be_true, no_autocast
from .arguments import InputGrads, Inputs, Needs, OutputGrads, Saved, ScoreInputs
from .composed_rows import (
    Keys,
    Maps,
    Own,
    add_product,
    blocks,
    dense_rows,
    dense_values,
    logits,
    mean_value,
    per_group,
    product,
    product_dtype,
    rows_at_a_time,
    seen_keys,
    weigh,
    weighted_keys,
)

_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def policy_attention(inputs: Inputs) -> Saved:
    """Output, lse and, with eps, the share of eps and the key of the maximum of each row."""
    q, k, v, eps = inputs.q, inputs.k, inputs.v, inputs.eps
    keys = weighted_keys(inputs, product_dtype(q))
    if _is_fused(q, v, keys):
        dense = _with_dense_rows(q), keys.k, dense_values(v, keys)
        attended, lse = _fused_attention(*dense, 0.0, False, **_fused(q, keys))
        none = lse.new_empty(*lse.shape[:2], 0)
        return Saved(attended.transpose(1, 2), lse, none, none.int())
    values, maps = dense_values(v, keys), Maps(keys, q.device)
    batch, heads, rows = q.shape[:3]
    out = q.new_empty(batch, rows, heads, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=keys.dtype)
    p_eps = q.new_empty(batch, heads, rows if eps > 0 else 0, dtype=keys.dtype)
    argmax = torch.empty_like(p_eps, dtype=torch.int32)
    mean = mean_value(values, keys) if eps > 0 else None
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            queries = dense_rows(q[i, :, r], keys)
            weight, sums = weigh(queries, block, keys, maps)
            lse[i, :, r] = sums.lse
            attended = product(maps.lower(weight), values[i])
            if mean is not None:
                attended = attended.to(keys.dtype)
                p_eps[i, :, r] = sums.p_eps[..., 0]
                argmax[i, :, r] = -1 if sums.argmax is None else sums.argmax
                if not keys.by_row:
                    attended += sums.eps * mean[i]
                attended *= sums.inverse
            out[i, r] = attended.transpose(1, 2)
    return Saved(out, lse, p_eps, argmax)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size."""
    q, k, v, policy, size = inputs[:5]
    self_keep, exclude_self, eps, _, policy_grad, scale = inputs[7:]
    out, lse, p_eps, argmax = saved
    grad, grad_lse = grads
    need_v, need_policy, need_size = needs
    keys = weighted_keys(inputs, product_dtype(q))
    values, maps = dense_values(v, keys), Maps(keys, q.device)
    if _is_fused(q, v, keys) and grad_lse is None and not need_size:
        forward = _with_dense_rows(q), keys.k, values, out.transpose(1, 2), lse
        upward = _with_dense_rows(grad).transpose(1, 2)
        gradients = _fused_backward(upward, *forward, 0.0, False, **_fused(q, keys))
        dq, dk, dv = (
            per_group(t, heads).transpose(1, 2)
            for t, heads in zip(gradients, (q.shape[1], k.shape[1], k.shape[1]), strict=True)
        )
        none = lse.new_empty(q.shape[0], 0)
        return InputGrads(dq, dk, dv if need_v else dv[:, :0], none, none.clone())
    mean = mean_value(values, keys) if eps > 0 else None
    delta = (grad.to(keys.dtype) * out).sum(-1).transpose(1, 2)[..., None]  # [B, H, Nq, 1]
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    # A dropped key may dominate its row beyond all bounds; its share is capped, not infinite.
    limit = math.log(torch.finfo(keys.dtype).max) / 2
    shift = torch.where(lse == -math.inf, math.inf, lse)[..., None]  # rows without weights: 0
    dq = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    # Sums over the blocks of an image, or one product each.
    whole = 0 < q.shape[2] <= rows_at_a_time(q, k)
    dk = torch.zeros_like(keys.k, dtype=values.dtype if whole else keys.dtype)
    dv = torch.zeros_like(values, dtype=dk.dtype if mean is None else keys.dtype)
    dpolicy, dlog = (lse.new_zeros(dk.shape[:3]) for _ in range(2))
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            own, p = Own(block, k.shape[2]), None if keys.policy is None else keys.policy[i]
            queries = dense_rows(q[i, :, r], keys)
            g = dense_rows(grad[i, r].transpose(1, 2), keys)  # [b, H, R, Dv]
            # exp(s_ij + log z_j - L_i)
            share = logits(queries, block, keys, maps)
            if p is None and eps == 0:
                torch.softmax(share, -1, out=share)
                if may_be_true(empty := lse[i, :, r] == -math.inf):
                    share.masked_fill_(empty[..., None], 0)
            else:
                share.sub_(shift[i, :, r])
                if p is not None:
                    share.clamp_(max=torch.where(p > 0, math.inf, limit))
                share.exp_()
            t = maps.product(1, g, values[i])  # g_i . v_j
            if exclude_self:
                own.write(t, 0.0)
            if mean is not None:  # g_i . (mean of the values)
                seen, number = seen_keys(block, keys) if keys.by_row else (None, keys.number[i])
                if seen is None:
                    by_mean = g.to(keys.dtype) @ mean[i].transpose(2, 3)
                else:
                    by_mean = (t * seen).sum(-1, keepdim=True) / number
            t.sub_(delta[i, :, r]).mul_(share)
            if p is not None:
                kept = own.read(t) if self_keep else None
                _times(t, p, dpolicy[i], own, self_keep, need_policy)
                if kept is not None:
                    own.write(t, kept)
            if mean is not None and t.shape[3] > 0:
                tail = p_eps[i, :, r, None].mul(by_mean - delta[i, :, r])
                t.scatter_add_(3, argmax[i, :, r, None].clamp(0, t.shape[3] - 1).long(), tail)
            if need_size:
                dlog[i] += t.sum(2)
            ds = maps.lower(t)
            dq[i, r] = product(ds, keys.k[i]).mul_(scale).transpose(1, 2)
            add_product(dk[i], ds.transpose(2, 3), queries, whole)
            if not need_v:
                continue
            if p is not None:
                kept = own.read(share) if self_keep else None
                share *= p
                if kept is not None:
                    own.write(share, kept)
            if mean is not None and seen is not None:
                share += seen * (p_eps[i, :, r, None] / number)
            if exclude_self:
                own.write(share, 0.0)
            add_product(dv[i], maps.lower(share).transpose(2, 3), g, whole)
            if mean is not None and seen is None:
                dv[i] += (p_eps[i, :, r, None].transpose(2, 3) @ g.to(keys.dtype)) / number
    dk *= scale
    if keys.part is not None:
        dv.masked_fill_(~keys.part, 0)
    dk, dv = (per_group(t, k.shape[1]).transpose(1, 2).to(q.dtype) for t in (dk, dv))
    dsize = lse.new_empty(q.shape[0], 0)
    if size is not None and need_size:
        live = size > 0
        dsize = dlog.sum(1).div_(torch.where(live, size, 1)).masked_fill_(~live, 0)
    if policy is None or not need_policy:
        dpolicy = lse.new_empty(q.shape[0], 0)
    else:
        dpolicy = dpolicy.sum(1) if policy.dim() == 2 else dpolicy
        if policy_grad == "kept":
            dpolicy = torch.where(policy > 0, dpolicy, 0)
    return InputGrads(dq, dk, dv if need_v else dv[:, :0], dpolicy, dsize)


def _times(
    t: Tensor, policy: Tensor, total: Tensor, own: Own, self_keep: bool, need_policy: bool
) -> None:
    """Multiply a map by the policy, in place; before, add its sums by key to their total."""
    if need_policy:
        if self_keep:  # a row's own key knows no policy
            own.write(t, 0.0)
        total += t.sum(2)
    t *= policy


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads."""
    q, k, query_weight, eps = inputs.q, inputs.k, inputs.query_weight, inputs.eps
    head_reduce = inputs.head_reduce
    keys = weighted_keys(inputs, acc_dtype(q))
    maps = Maps(keys, q.device)
    score = keys.k.new_zeros(keys.k.shape[:3], dtype=keys.dtype)
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            queries = dense_rows(q[i, :, r], keys)
            weight, sums = weigh(queries, block, keys, maps, need_lse=False)
            factor = sums.inverse.transpose(2, 3)  # [b, H, 1, R]
            if query_weight is not None:
                of_rows = query_weight[i, ..., r].to(keys.dtype)
                factor = factor * (of_rows[:, None] if of_rows.dim() == 2 else of_rows)[:, :, None]
            received = factor * weight if weight.shape[2] == 1 else factor @ weight
            score[i] += received[:, :, 0]
            if eps > 0 and not keys.by_row:
                spread = (factor @ sums.eps)[:, :, 0] / keys.number[i, 0]  # [b, H, 1]
                score[i] += spread if keys.part is None else spread * keys.part[i, :, :, 0]
    if head_reduce == "none":
        return score
    return score.mean(1) if head_reduce == "mean" else score.sum(1)


def _is_fused(q: Tensor, v: Tensor, keys: Keys) -> bool:
    """Whether PyTorch's fused attention for CPUs serves: single precision, no weights but sizes.

    In bfloat16 it takes longer than two products and a softmax.
    """
    if q.dtype != torch.float32 or not q.is_cpu or q.shape[3] != v.shape[3]:
        return False
    plain = keys.policy is None and keys.part is None and keys.eps == 0
    masked = keys.is_causal or keys.exclude_self
    if not plain or masked or min(q.numel(), keys.k.numel()) == 0:
        return False
    # Where a row meets a NaN, it computes 0.
    return math.isfinite(q.sum() + keys.k.sum())


def _with_dense_rows(x: Tensor) -> Tensor:
    """The tensor, or a copy whose last dimension is contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _fused(q: Tensor, keys: Keys) -> dict[str, Any]:
    bias = keys.bias
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], -1)
    return {"attn_mask": bias, "scale": keys.scale}
