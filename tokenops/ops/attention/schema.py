# SPDX-License-Identifier: Apache-2.0
"""Operators of attention: schemas, shapes, backward formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import acc_dtype, differentiates, register
from . import composed, reference


def _differentiable(ops: Any) -> Any:
    """The fused backward has no derivative of its own; the formula in PyTorch has."""
    return reference if differentiates() else ops


# ---- policy_attention ----


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    policy_grad: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries = q.shape[:3]
    rows = queries if eps > 0 else 0
    return (
        q.new_empty(batch, queries, heads, v.shape[3]),
        q.new_empty(batch, heads, queries, dtype=acc_dtype(q)),
        q.new_empty(batch, heads, rows, dtype=acc_dtype(q)),
        q.new_empty(batch, heads, rows, dtype=torch.int32),
    )


def _attention_flops(q: Any, k: Any, v: Any, *_: Any) -> int:
    return _product_flops(q, k, q[3] + v[3])


def _product_flops(q: Any, k: Any, width: int) -> int:
    """Of products with maps of queries by keys, of so many columns together."""
    batch, heads, queries, _ = q
    return int(2 * batch * heads * queries * k[2] * width)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, self_keep, exclude_self, eps, is_causal, policy_grad, scale = inputs
    ctx.options = self_keep, exclude_self, eps, is_causal, policy_grad, scale
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(
    ops: Any, ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: checkpoints of activations do not give them twice
    tensors, (out, *rows) = saved[:7], saved[7:]
    if grad is None and grad_lse is None:
        return (None,) * 13
    if grad is None:
        grad = torch.zeros_like(out)
    needs = ctx.needs
    need_policy = needs[3] and ctx.options[4] != "none"
    dq, dk, dv, dpolicy, dsize = _differentiable(ops).policy_attention_backward(
        grad, grad_lse, *tensors, out, *rows, *ctx.options, needs[2], need_policy, needs[4]
    )
    return (
        dq.transpose(1, 2) if needs[0] else None,
        dk.transpose(1, 2) if needs[1] else None,
        dv.transpose(1, 2) if needs[2] else None,
        dpolicy if need_policy else None,
        dsize if needs[4] else None,
        *(None,) * 8,
    )


register(
    reference.policy_attention,
    composed=composed.policy_attention,
    fake=_attention_fake,
    backward=_attention_backward,
    setup_context=_attention_setup,
    flops=_attention_flops,
    shared=("position",),
    public=True,
)


def _attention_backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    floor: Tensor,
    argmax: Tensor,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    policy_grad: str,
    scale: float,
    need_v: bool,
    need_policy: bool,
    need_size: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, keys = k.shape[0], k.shape[2]
    sums = lse.new_empty(batch, 0)
    return (
        q.new_empty(batch, q.shape[2], q.shape[1], q.shape[3]),
        k.new_empty(batch, keys, k.shape[1], k.shape[3]),
        v.new_empty(batch, keys if need_v else 0, v.shape[1], v.shape[3]),
        lse.new_empty(policy.shape) if policy is not None and need_policy else sums,
        lse.new_empty(batch, keys) if size is not None and need_size else sums.clone(),
    )


def _attention_backward_flops(grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> int:
    *_, need_v, _, _ = rest
    # Logits again, dq and dk; gradients of attention, and dv.
    return _product_flops(q, k, 3 * q[3] + (2 if need_v else 1) * v[3])


register(
    reference.policy_attention_backward,
    composed=composed.policy_attention_backward,
    fake=_attention_backward_fake,
    flops=_attention_backward_flops,
    shared=("position",),
)


# ---- attention_scores ----


def _scores_fake(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor | None,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    lse: Tensor | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    scale: float,
    head_reduce: str,
) -> Tensor:
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    shape = (batch, heads, keys) if head_reduce == "none" else (batch, keys)
    return q.new_empty(shape, dtype=acc_dtype(q))


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, self_keep, exclude_self, eps, is_causal, scale, head_reduce = inputs
    ctx.options = self_keep, exclude_self, eps, is_causal, "exact", scale
    ctx.head_reduce = head_reduce
    ctx.save_for_backward(*tensors)


def _scores_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """As attention to the gradients, one number per key for its value.

    With ``v_j = grad_j`` the rows' outputs ``o_i = sum_j y_ij grad_j`` are the gradients of their
    weights, and the scores change in q, k, policy and size as attention does whose output has the
    gradient ``w_i``.
    """
    q, k, weight, *tensors = ctx.saved_tensors
    needs = ctx.needs
    dtype = acc_dtype(q)  # half precision would round, or lose, the gradients of small attention
    (batch, heads, queries), groups = q.shape[:3], k.shape[1]
    keys, values = k.to(dtype), grad[:, None] if grad.dim() == 2 else grad
    if grad.dim() == 3 and groups < heads:  # no two heads have the same values
        keys = keys.repeat_interleave(heads // groups, dim=1)
    values = values.expand(batch, keys.shape[1], -1)[..., None]  # [B, Hkv or H, Nk, 1]
    if ctx.head_reduce == "mean":
        values = values / heads
    inputs = (q.to(dtype), keys, values, *tensors)
    rows = ops.policy_attention(*inputs, *ctx.options)
    dweight = None
    if needs[2]:
        dweight = rows[0][..., 0]  # [B, Nq, H]
        dweight = dweight.sum(2) if weight.dim() == 2 else dweight.transpose(1, 2)
    if weight is None:
        weight = values.new_ones(batch, queries)
    out_grad = weight[..., None] if weight.dim() == 2 else weight.transpose(1, 2)  # [B, Nq, 1 or H]
    out_grad = out_grad.to(dtype).expand(batch, queries, heads)[..., None]
    dq = dk = dpolicy = dsize = None
    if needs[0] or needs[1] or needs[3] or needs[4]:
        dq, dk, _, dpolicy, dsize = _differentiable(ops).policy_attention_backward(
            out_grad, None, *inputs, *rows, *ctx.options, False, needs[3], needs[4]
        )
        dk = dk.unflatten(2, (groups, -1)).sum(3) if dk.shape[2] > groups else dk
        dq, dk = dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype)
    return (
        dq if needs[0] else None,
        dk if needs[1] else None,
        dweight,
        dpolicy if needs[3] else None,
        dsize if needs[4] else None,
        *(None,) * 9,
    )


register(
    reference.attention_scores,
    composed=composed.attention_scores,
    fake=_scores_fake,
    backward=_scores_backward,
    setup_context=_scores_setup,
    flops=lambda q, k, *_: _product_flops(q, k, q[3]),
    shared=("position",),
    public=True,
)

_backend.serve_by_triton(
    __package__, "policy_attention", "policy_attention_backward", "attention_scores"
)
