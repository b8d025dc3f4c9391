# SPDX-License-Identifier: Apache-2.0
"""Operators of merging: shapes and backward formulas.

``merge`` (sum), ``unmerge`` and ``pair_dot`` are the derivatives of one form, which is linear in
each of its four factors:

    sum_{b,n,c} scale[b, m] * weight[b, n] * x[b, n, c] * y[b, m, c],   m = assign[b, n].

So the derivatives of each of the three operators are the other two, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import acc_dtype, differentiates, references, register
from . import composed, reference
from .arguments import Factors, Index, Inverse, Wavg

#: Reductions whose backward reads the input and the result.
_NONLINEAR = ("amax", "amin", "prod")

#: A token map has no gradient.
_NO_GRADIENT = Index(None, None, None)  # type: ignore[arg-type]


def _per_output(ops: Any, value: Tensor, index: Index) -> Tensor:
    """Give each input token the number of its output token: [B, M] -> [B, N]."""
    out: Tensor = ops.unmerge(value[..., None], *index, None, None, None, False)
    return out[..., 0]


def _per_input(ops: Any, value: Tensor, index: Index) -> Tensor:
    """Sum the numbers of the members of each output token: [B, N] -> [B, M]."""
    out: Tensor = ops.merge(value[..., None], *index, None, None, "sum")
    return out[..., 0]


def _grad_of_factors(
    ops: Any, x: Tensor, y: Tensor, index: Index, weight: Tensor | None, scale: Tensor | None
) -> Factors:
    """Gradients of the form above with respect to weight [B, N] and scale [B, M]."""
    dot = ops.pair_dot(x, y, *index)  # [B, N]
    grad_weight = grad_scale = None
    if weight is not None:
        grad_weight = dot if scale is None else dot * _per_output(ops, scale, index)
    if scale is not None:
        grad_scale = _per_input(ops, dot if weight is None else dot * weight, index)
    return Factors(grad_weight, grad_scale)


def _reduce_backward(ops: Any) -> Any:
    """``merge_reduce_backward``: the kernel, or the reference if it is itself differentiated."""
    return (references if differentiates() else ops).merge_reduce_backward


def _mapped(grads: Any) -> bool:
    """Whether ``is_grads_batched`` maps over gradients: it cannot map operators that take lists."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, grads))


# ---- invert and compose ----


def _invert_fake(assign: Tensor, num_tokens: int) -> Inverse:
    offsets = assign.new_empty(assign.shape[0], num_tokens + 1, dtype=torch.int32)
    return Inverse(offsets, assign.new_empty(assign.shape, dtype=torch.int32))


register(reference.invert, composed=composed.invert, fake=_invert_fake)


def _compose_fake(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    return Index(earlier.new_empty(earlier.shape), *_invert_fake(earlier, num_tokens))


register(reference.compose, composed=composed.compose, fake=_compose_fake)


# ---- merge ----


def _merge_fake(x: Tensor, index: Index, factors: Factors, reduce: str) -> Tensor:
    return x.new_empty(x.shape[0], index.num_tokens, x.shape[2])


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, factors, ctx.reduce = inputs
    nonlinear = ctx.reduce in _NONLINEAR
    # The backward of a sum or a mean reads x only for the gradient of weight and scale.
    keeps_x = nonlinear or any(ctx.needs[4:6])
    kept = x if keeps_x else None, output if nonlinear else None
    ctx.save_for_backward(*kept, *index, *factors)


def _merge_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, out, *index, weight, scale = ctx.saved_tensors
    need_x, *_, need_weight, need_scale, _ = ctx.needs
    grad_x, grad_factors = None, Factors(None, None)
    if ctx.reduce == "mean":
        grad_x = ops.unmerge(grad, *index, None, None, None, True)
    elif ctx.reduce == "sum":
        if need_x:
            grad_x = ops.unmerge(grad, *index, weight, scale, None, False)
        if need_weight or need_scale:
            grad_factors = _grad_of_factors(ops, x, grad, index, weight, scale)
    elif need_x:
        grad_x = _reduce_backward(ops)(grad, x, out, *index, ctx.reduce)
    return grad_x, _NO_GRADIENT, grad_factors, None


register(
    reference.merge,
    composed=composed.merge,
    fake=_merge_fake,
    backward=_merge_backward,
    setup_context=_merge_setup,
    public=True,
)


def _reduce_backward_fake(
    grad: Tensor, x: Tensor, out: Tensor, index: Index, reduce: str
) -> Tensor:
    return x.new_empty(x.shape)


register(
    reference.merge_reduce_backward,
    composed=composed.merge_reduce_backward,
    fake=_reduce_backward_fake,
)


# ---- unmerge ----


def _unmerge_fake(
    y: Tensor, index: Index, factors: Factors, residual: Tensor | None, mean: bool
) -> Tensor:
    return y.new_empty(y.shape[0], index.assign.shape[1], y.shape[2])


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, index, factors, _, ctx.mean = inputs
    ctx.save_for_backward(y if any(ctx.needs[4:6]) else None, *index, *factors)


def _unmerge_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, *index, weight, scale = ctx.saved_tensors
    need_y, *_, need_weight, need_scale, need_residual, _ = ctx.needs
    grad_y, grad_factors = None, Factors(None, None)
    if need_y:
        grad_y = ops.merge(grad, *index, weight, scale, "mean" if ctx.mean else "sum")
    if need_weight or need_scale:
        grad_factors = _grad_of_factors(ops, grad, y, index, weight, scale)
    return grad_y, _NO_GRADIENT, grad_factors, grad if need_residual else None, None


register(
    reference.unmerge,
    composed=composed.unmerge,
    fake=_unmerge_fake,
    backward=_unmerge_backward,
    setup_context=_unmerge_setup,
    public=True,
)


# ---- merge_many and unmerge_many: several tensors by one map, in one launch ----


def _merge_many_fake(
    x: list[Tensor], index: Index, weight: Tensor | None, reduce: str
) -> list[Tensor]:
    return [_merge_fake(t, index, Factors(weight, None), reduce) for t in x]


def _merge_many_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, index, weight, ctx.reduce = inputs
    ctx.count = len(x)
    nonlinear = ctx.reduce in _NONLINEAR
    kept = x if nonlinear or ctx.needs[4] else ()
    ctx.save_for_backward(*index, weight, *kept, *(output if nonlinear else ()))


def _merge_many_backward(ops: Any, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    assign, offsets, members, weight, *rest = ctx.saved_tensors
    index = Index(assign, offsets, members)
    x, out = rest[: ctx.count], rest[ctx.count :]
    need_x, *_, need_weight, _ = ctx.needs
    grad_x, grad_weight = [None] * ctx.count, None
    if ctx.reduce in _NONLINEAR:
        backward = _reduce_backward(ops)
        pairs = zip(grads, x, out, strict=True)
        grad_x = [backward(g, t, o, *index, ctx.reduce) for g, t, o in pairs]
    else:
        mean = ctx.reduce == "mean"
        if _mapped(grads):
            grad_x = [ops.unmerge(g, *index, weight, None, None, mean) for g in grads]
        elif any(need_x):
            grad_x = ops.unmerge_many(grads, *index, weight, mean)
        if need_weight:
            grad_weight = sum(ops.pair_dot(t, g, *index) for t, g in zip(x, grads, strict=True))
    return grad_x, _NO_GRADIENT, grad_weight, None


register(
    reference.merge_many,
    composed=composed.merge_many,
    fake=_merge_many_fake,
    backward=_merge_many_backward,
    setup_context=_merge_many_setup,
)


def _unmerge_many_fake(
    y: list[Tensor], index: Index, weight: Tensor | None, mean: bool
) -> list[Tensor]:
    return [_unmerge_fake(t, index, Factors(weight, None), None, mean) for t in y]


def _unmerge_many_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    y, index, weight, ctx.mean = inputs
    ctx.save_for_backward(*index, weight, *(y if ctx.needs[4] else ()))


def _unmerge_many_backward(ops: Any, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    assign, offsets, members, weight, *y = ctx.saved_tensors
    index = Index(assign, offsets, members)
    need_y, *_, need_weight, _ = ctx.needs
    grad_y, grad_weight = [None] * len(grads), None
    reduce = "mean" if ctx.mean else "sum"
    if _mapped(grads):
        grad_y = [ops.merge(g, *index, weight, None, reduce) for g in grads]
    elif any(need_y):
        grad_y = ops.merge_many(grads, *index, weight, reduce)
    if need_weight:
        grad_weight = sum(ops.pair_dot(g, t, *index) for t, g in zip(y, grads, strict=True))
    return grad_y, _NO_GRADIENT, grad_weight, None


register(
    reference.unmerge_many,
    composed=composed.unmerge_many,
    fake=_unmerge_many_fake,
    backward=_unmerge_many_backward,
    setup_context=_unmerge_many_setup,
)


# ---- pair_dot ----


def _pair_dot_fake(x: Tensor, y: Tensor, index: Index) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=acc_dtype(x))


def _pair_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, index = inputs
    ctx.save_for_backward(x, y, *index)


def _pair_dot_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, y, *index = ctx.saved_tensors
    need_x, need_y, *_ = ctx.needs
    grad_x = ops.unmerge(y, *index, grad, None, None, False) if need_x else None
    grad_y = ops.merge(x, *index, grad, None, "sum") if need_y else None
    return grad_x, grad_y, _NO_GRADIENT


register(
    reference.pair_dot,
    composed=composed.pair_dot,
    fake=_pair_dot_fake,
    backward=_pair_dot_backward,
    setup_context=_pair_dot_setup,
)


# ---- merge_wavg ----


def _merge_wavg_fake(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    shape = (x.shape[0], index.num_tokens)
    return Wavg(x.new_empty(*shape, x.shape[2]), x.new_empty(shape, dtype=acc_dtype(x)))


def _merge_wavg_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, index, size = inputs
    _, total = output
    # Only the gradient of the sizes reads x. If sizes need no gradient, neither do the summed
    # sizes: sizes that are passed from layer to layer would keep the graph of all layers alive.
    need_size = ctx.needs[4]
    if not need_size:
        ctx.mark_non_differentiable(total)
    ctx.save_for_backward(x if need_size else None, total, *index, size)


def _merge_wavg_backward(ops: Any, ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Any, ...]:
    x, total, *index, size = ctx.saved_tensors
    need_x, *_, need_size = ctx.needs
    empty = total == 0
    scale = torch.where(empty, 0, 1 / torch.where(empty, 1, total))  # [B, M]
    grad_x = grad_size = None
    if need_x:
        grad_x = ops.unmerge(grad, *index, size, scale, None, False)
    if need_size:
        # d out / d size[n] = (x[n] - out) / total. Compute out again: the result was rounded.
        dot = ops.pair_dot(x, grad, *index)  # [B, N]
        excess = _per_input(ops, dot * size, index) * scale * scale  # [B, M]
        grad_size = dot * _per_output(ops, scale, index)
        grad_size = grad_size + _per_output(ops, grad_total - excess, index)
    return grad_x, _NO_GRADIENT, grad_size


register(
    reference.merge_wavg,
    composed=composed.merge_wavg,
    fake=_merge_wavg_fake,
    backward=_merge_wavg_backward,
    setup_context=_merge_wavg_setup,
    public=True,
)

_backend.serve_by_triton(
    __package__,
    *("invert", "compose", "merge", "merge_many", "merge_reduce_backward", "merge_wavg"),
    *("unmerge", "unmerge_many", "pair_dot"),
)
