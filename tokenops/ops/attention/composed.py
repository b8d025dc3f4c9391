# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights, composed of PyTorch's operators; serves where no kernel does.

Attention is computed in blocks of several images, or of some rows of one image, so that the maps of
a block stay in the cache: q k^T, a few passes in place, then p v, divided by the sum of each row.
Autograd cannot differentiate these functions: the operators have backward formulas.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._library import acc_dtype, may_be_true, no_autocast
from .arguments import InputGrads, Inputs, Needs, OutputGrads, Saved, ScoreInputs
from .common import max_exponent, per_key_head, reduce_heads, weight_grads
from .composed_rows import (
    Buffers,
    Keys,
    OwnKeys,
    add_product,
    blocks,
    dense_rows,
    logits,
    mean_value,
    prepare_keys,
    prepare_values,
    product,
    product_dtype,
    rows_per_block,
    seen_keys,
    softmax,
)

_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def policy_attention(inputs: Inputs) -> Saved:
    """Output of attention and lse, p_eps and argmax of each row."""
    q, k, v = inputs[:3]
    keys = prepare_keys(inputs, product_dtype(q))
    values = prepare_values(v, keys)
    if _is_fused(q, v, keys):
        out, lse = _fused_attention(_contiguous_rows(q), keys.k, values, **_fused_options(q, keys))
        empty = lse.new_empty(*lse.shape[:2], 0)
        return Saved(out.transpose(1, 2), lse, empty, empty.int())
    buffers = Buffers(keys, q.device)
    batch, heads, rows = q.shape[:3]
    out = q.new_empty(batch, rows, heads, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=keys.dtype)
    p_eps = q.new_empty(batch, heads, rows if inputs.eps > 0 else 0, dtype=keys.dtype)
    argmax = torch.empty_like(p_eps, dtype=torch.int32)
    mean = mean_value(values, keys) if inputs.eps > 0 else None
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            p, sums = softmax(dense_rows(q[i, :, r], keys), block, keys, buffers)
            lse[i, :, r] = sums.lse
            acc = product(buffers.lower(p), values[i])
            if mean is not None:
                acc = acc.to(keys.dtype)
                p_eps[i, :, r] = sums.p_eps[..., 0]
                argmax[i, :, r] = -1 if sums.argmax is None else sums.argmax
                if not keys.eps_by_row:
                    acc += sums.eps * mean[i]
                acc *= sums.inverse
            out[i, r] = acc.transpose(1, 2)
    return Saved(out, lse, p_eps, argmax)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size."""
    q, k, v = inputs[:3]
    self_keep, exclude_self, eps, _, _, scale = inputs[7:]
    out, lse, p_eps, argmax = saved
    grad_out, grad_lse = grads
    keys = prepare_keys(inputs, product_dtype(q))
    values = prepare_values(v, keys)
    if _is_fused(q, v, keys) and grad_lse is None and not needs.need_size:
        return _fused_gradients(inputs, saved, grad_out, keys, values, needs)
    buffers = Buffers(keys, q.device)
    mean = mean_value(values, keys) if eps > 0 else None
    delta = (grad_out.to(keys.dtype) * out).sum(-1).transpose(1, 2)[..., None]  # [B, H, Nq, 1]
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    shift = torch.where(lse == -math.inf, math.inf, lse)[..., None]  # makes p of an empty row 0
    dq = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    # A block with all rows of its images writes dk and dv as one product; other blocks add to them.
    whole = 0 < q.shape[2] <= rows_per_block(q, k)
    dk = torch.zeros_like(keys.k, dtype=values.dtype if whole else keys.dtype)
    dv = torch.zeros_like(values, dtype=dk.dtype if mean is None else keys.dtype)
    dpolicy, dlog_size = (lse.new_zeros(dk.shape[:3]) for _ in range(2))
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            own = OwnKeys(block, k.shape[2])
            policy = None if keys.policy is None else keys.policy[i]
            queries = dense_rows(q[i, :, r], keys)
            do = dense_rows(grad_out[i, r].transpose(1, 2), keys)  # [b, H, R, Dv]
            p = logits(queries, block, keys, buffers)
            if policy is None and eps == 0:  # faster than exp(p - lse)
                torch.softmax(p, -1, out=p)
                if may_be_true(empty := lse[i, :, r] == -math.inf):
                    p.masked_fill_(empty[..., None], 0)
            else:
                p.sub_(shift[i, :, r])
                if policy is not None:
                    p.clamp_(max=torch.where(policy > 0, math.inf, max_exponent(p.dtype)))
                p.exp_()
            ds = buffers.product(1, do, values[i])  # dp until delta is subtracted
            if exclude_self:
                own.write(ds, 0.0)
            if keys.eps_by_row:
                seen, count = seen_keys(block, keys)
                dp_mean = (ds * seen).sum(-1, keepdim=True) / count
            elif mean is not None:
                dp_mean = do.to(keys.dtype) @ mean[i].transpose(2, 3)
            ds.sub_(delta[i, :, r]).mul_(p)
            if policy is not None:
                with own.restored(ds, self_keep):
                    if needs.need_policy:
                        if self_keep:  # dpolicy has no term of a row's own key
                            own.write(ds, 0.0)
                        dpolicy[i] += ds.sum(2)
                    ds *= policy
            if mean is not None and ds.shape[3] > 0:
                at_max = p_eps[i, :, r, None].mul(dp_mean - delta[i, :, r])
                index = argmax[i, :, r, None].clamp(0, ds.shape[3] - 1).long()
                ds.scatter_add_(3, index, at_max)
            if needs.need_size:
                dlog_size[i] += ds.sum(2)
            ds = buffers.lower(ds)
            dq[i, r] = product(ds, keys.k[i]).mul_(scale).transpose(1, 2)
            add_product(dk[i], ds.transpose(2, 3), queries, whole)
            if not needs.need_v:
                continue
            if policy is not None:
                with own.restored(p, self_keep):
                    p *= policy
            if keys.eps_by_row:
                p += seen * (p_eps[i, :, r, None] / count)
            if exclude_self:
                own.write(p, 0.0)
            add_product(dv[i], buffers.lower(p).transpose(2, 3), do, whole)
            if mean is not None and not keys.eps_by_row:
                of_mean = p_eps[i, :, r, None].transpose(2, 3) @ do.to(keys.dtype)
                dv[i] += of_mean / keys.num_valid[i]
    dk *= scale
    if keys.valid is not None:
        dv.masked_fill_(~keys.valid[:, None, :, None], 0)
    dk, dv = (per_key_head(t, k.shape[1]).transpose(1, 2).to(q.dtype) for t in (dk, dv))
    dv = dv if needs.need_v else dv[:, :0]
    return InputGrads(dq, dk, dv, *weight_grads(dpolicy, dlog_size, inputs, needs))


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads."""
    q, k, query_weight = inputs[:3]
    keys = prepare_keys(inputs, acc_dtype(q))
    buffers = Buffers(keys, q.device)
    scores = keys.k.new_zeros(keys.k.shape[:3], dtype=keys.dtype)
    with no_autocast(q.device.type):
        for block in blocks(q, k, keys):
            i, r = block.images, block.rows
            p, sums = softmax(dense_rows(q[i, :, r], keys), block, keys, buffers, need_lse=False)
            factor = sums.inverse.transpose(2, 3)  # [b, H, 1, R]
            if query_weight is not None:
                w = query_weight[i, ..., r].to(keys.dtype)
                factor = factor * (w[:, None] if w.dim() == 2 else w)[:, :, None]
            received = factor * p if p.shape[2] == 1 else factor @ p
            scores[i] += received[:, :, 0]
            if inputs.eps > 0 and not keys.eps_by_row:
                spread = (factor @ sums.eps)[:, :, 0] / keys.num_valid[i, 0]  # [b, H, 1]
                scores[i] += spread if keys.valid is None else spread * keys.valid[i, None]
    return reduce_heads(scores, inputs.head_reduce)


# ---- PyTorch's fused attention for CPUs ----


def _is_fused(q: Tensor, v: Tensor, keys: Keys) -> bool:
    """Whether the fused attention can serve the call: float32, no key weights except sizes.

    In bfloat16 the fused attention is slower than two products and a softmax.
    """
    if q.dtype != torch.float32 or not q.is_cpu or q.shape[3] != v.shape[3]:
        return False
    plain = keys.policy is None and keys.valid is None and keys.inputs.eps == 0
    masked = keys.inputs.is_causal or keys.inputs.exclude_self
    if not plain or masked or min(q.numel(), keys.k.numel()) == 0:
        return False
    # The fused attention computes 0, not NaN, for a row with a NaN.
    return math.isfinite(q.sum() + keys.k.sum())


def _fused_options(q: Tensor, keys: Keys) -> dict[str, Any]:
    mask = keys.log_size
    return {
        "dropout_p": 0.0, "is_causal": False, "scale": keys.inputs.scale,
        "attn_mask": None if mask is None else mask.expand(-1, -1, q.shape[2], -1),
    }  # fmt: skip


def _fused_gradients(
    inputs: Inputs, saved: Saved, grad_out: Tensor, keys: Keys, values: Tensor, needs: Needs
) -> InputGrads:
    q, lse, heads_k = inputs.q, saved.lse, inputs.k.shape[1]
    do, rows = (_contiguous_rows(t) for t in (grad_out, q))
    forward = rows, keys.k, values, saved.out.transpose(1, 2), lse
    dq, dk, dv = _fused_backward(do.transpose(1, 2), *forward, **_fused_options(q, keys))
    dq, dk, dv = (t.transpose(1, 2) for t in (dq, *(per_key_head(t, heads_k) for t in (dk, dv))))
    empty = lse.new_empty(q.shape[0], 0)
    return InputGrads(dq, dk, dv if needs.need_v else dv[:, :0], empty, empty.clone())


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
