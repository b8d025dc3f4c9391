# SPDX-License-Identifier: Apache-2.0
"""Operators of attention: schemas, shapes, backward formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend, _library
from ..._library import acc_dtype, differentiates, register
from . import composed, reference
from .arguments import InputGrads, Inputs, Needs, OutputGrads, Saved, ScoreInputs


def _differentiable(ops: Any) -> Any:
    """References if the backward is differentiated: backward kernels have no backward."""
    return _library.references if differentiates() else ops


def _product_flops(q: Any, k: Any, width: int) -> int:
    """FLOPs of products of maps [B, H, Nq, Nk] with matrices whose widths sum up to ``width``."""
    batch, heads, queries, _ = q
    return int(2 * batch * heads * queries * k[2] * width)  # q and k are shapes


# ---- policy_attention ----

_TENSORS = 7  # the first fields of Inputs; the others are options
_NO_GRADIENTS: Any = Inputs(*(None,) * len(Inputs._fields))  # type: ignore[arg-type]


def _attention_fake(inputs: Inputs) -> Saved:
    q, v = inputs.q, inputs.v
    batch, heads, queries = q.shape[:3]
    rows = queries if inputs.eps > 0 else 0
    return Saved(
        q.new_empty(batch, queries, heads, v.shape[3]),
        q.new_empty(batch, heads, queries, dtype=acc_dtype(q)),
        q.new_empty(batch, heads, rows, dtype=acc_dtype(q)),
        q.new_empty(batch, heads, rows, dtype=torch.int32),
    )


def _attention_flops(inputs: Any) -> int:
    q, k, v = inputs[:3]
    return _product_flops(q, k, q[3] + v[3])


def _attention_setup(ctx: Any, inputs: tuple[Inputs], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[0][:_TENSORS], inputs[0][_TENSORS:]
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(
    ops: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, *_: Tensor | None
) -> Any:
    tensors = ctx.saved_tensors  # activation checkpointing allows a single read
    inputs, saved = Inputs(*tensors[:_TENSORS], *ctx.options), Saved(*tensors[_TENSORS:])
    if grad_out is None and grad_lse is None:
        return _NO_GRADIENTS
    if grad_out is None:
        grad_out = torch.zeros_like(saved.out)
    needs = ctx.needs
    need_policy = needs[3] and inputs.policy_grad != "none"
    dq, dk, dv, dpolicy, dsize = _differentiable(ops).policy_attention_backward(
        *inputs, *saved, grad_out, grad_lse, needs[2], need_policy, needs[4]
    )
    return _NO_GRADIENTS._replace(
        q=dq.transpose(1, 2) if needs[0] else None,
        k=dk.transpose(1, 2) if needs[1] else None,
        v=dv.transpose(1, 2) if needs[2] else None,
        policy=dpolicy if need_policy else None,
        size=dsize if needs[4] else None,
    )


register(
    reference.policy_attention,
    composed=composed.policy_attention,
    fake=_attention_fake,
    backward=_attention_backward,
    setup_context=_attention_setup,
    flops=_attention_flops,
    shared=("query_position",),
    public=True,
)


def _attention_backward_fake(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    q, k, v, policy, size = inputs[:5]
    lse, need_v, need_policy, need_size = saved.lse, *needs
    batch, keys = k.shape[0], k.shape[2]
    none = lse.new_empty(batch, 0)
    return InputGrads(
        q.new_empty(batch, q.shape[2], q.shape[1], q.shape[3]),
        k.new_empty(batch, keys, k.shape[1], k.shape[3]),
        v.new_empty(batch, keys if need_v else 0, v.shape[1], v.shape[3]),
        lse.new_empty(policy.shape) if policy is not None and need_policy else none,
        lse.new_empty(batch, keys) if size is not None and need_size else none.clone(),
    )


def _attention_backward_flops(inputs: Any, saved: Any, grads: Any, needs: Needs) -> int:
    q, k, v = inputs[:3]
    # Widths of q: qk, dq and dk. Widths of v: dp and dv.
    return _product_flops(q, k, 3 * q[3] + (2 if needs.need_v else 1) * v[3])


register(
    reference.policy_attention_backward,
    composed=composed.policy_attention_backward,
    fake=_attention_backward_fake,
    flops=_attention_backward_flops,
    shared=("query_position",),
)


# ---- attention_scores ----


_NO_SCORE_GRADIENTS: Any = ScoreInputs(*(None,) * len(ScoreInputs._fields))  # type: ignore[arg-type]


def _scores_fake(inputs: ScoreInputs) -> Tensor:
    q, k = inputs.q, inputs.k
    leading = q.shape[:2] if inputs.head_reduce == "none" else q.shape[:1]
    return q.new_empty(*leading, k.shape[2], dtype=acc_dtype(q))


def _scores_flops(inputs: Any) -> int:
    q, k = inputs[:2]
    return _product_flops(q, k, q[3])


def _scores_setup(ctx: Any, inputs: tuple[ScoreInputs], output: Tensor) -> None:
    *tensors, _, self_keep, exclude_self, eps, is_causal, scale, ctx.head_reduce = inputs[0]
    ctx.options = self_keep, exclude_self, eps, is_causal, "exact", scale
    ctx.save_for_backward(*tensors)


def _scores_backward(ops: Any, ctx: Any, grad: Tensor) -> Any:
    """Backward of scores: attention whose values are the gradients of the scores.

    With ``v_j = grad_j``, the output ``o_i = sum_j y_ij grad_j`` of a row is the gradient of the
    query's weight. The gradients of q, k, policy and size are the gradients of this attention for
    ``w_i`` as the gradient of its output.
    """
    q, k, query_weight, *tensors = ctx.saved_tensors
    needs = ctx.needs
    dtype = acc_dtype(q)  # half precision would round small gradients to 0
    (batch, heads, queries), heads_k = q.shape[:3], k.shape[1]
    values, keys = grad[:, None] if grad.dim() == 2 else grad, k.to(dtype)
    if grad.dim() == 3 and heads_k < heads:  # each query head has its own values
        keys = keys.repeat_interleave(heads // heads_k, dim=1)
    values = values.expand(batch, keys.shape[1], -1)[..., None]  # [B, Hkv or H, Nk, 1]
    if ctx.head_reduce == "mean":
        values = values / heads
    inputs = Inputs(q.to(dtype), keys, values, *tensors, *ctx.options)
    saved = ops.policy_attention(*inputs)
    dweight = None
    if needs[2]:
        dweight = saved[0][..., 0]  # [B, Nq, H]
        dweight = dweight.sum(2) if query_weight.dim() == 2 else dweight.transpose(1, 2)
    w = values.new_ones(batch, queries) if query_weight is None else query_weight
    w = w[..., None] if w.dim() == 2 else w.transpose(1, 2)  # [B, Nq, 1 or H]
    dq = dk = dpolicy = dsize = None
    if needs[0] or needs[1] or needs[3] or needs[4]:
        grad_out = w.to(dtype).expand(batch, queries, heads)[..., None]
        dq, dk, _, dpolicy, dsize = _differentiable(ops).policy_attention_backward(
            *inputs, *saved, grad_out, None, False, needs[3], needs[4]
        )
        dk = dk.unflatten(2, (heads_k, -1)).sum(3) if dk.shape[2] > heads_k else dk
        dq, dk = dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype)
    return _NO_SCORE_GRADIENTS._replace(
        q=dq if needs[0] else None,
        k=dk if needs[1] else None,
        query_weight=dweight,
        policy=dpolicy if needs[3] else None,
        size=dsize if needs[4] else None,
    )


register(
    reference.attention_scores,
    composed=composed.attention_scores,
    fake=_scores_fake,
    backward=_scores_backward,
    setup_context=_scores_setup,
    flops=_scores_flops,
    shared=("query_position",),
    public=True,
)

_backend.serve_by_triton(
    __package__, "policy_attention", "policy_attention_backward", "attention_scores"
)
