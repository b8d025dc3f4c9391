# SPDX-License-Identifier: Apache-2.0
"""Operators of merging: schemas, shapes, backward formulas.

``merge`` (sum), ``unmerge`` and ``pair_dot`` are the three faces of one trilinear form

    sum_{b,n,c} scale[b, a(n)] * weight[b, n] * x[b, n, c] * y[b, a(n), c],   a = assign[b],

so that each one's derivatives are the other two, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import acc_dtype, differentiates, references, register
from . import composed, reference
from .arguments import Index, Inverse, Wavg

#: Gradient of a token map: none.
_NO_GRADIENT = (None, None, None)


def _per_output(ops: Any, value: Tensor, index: Index) -> Tensor:
    """Spread a number per output token [B, M] to its members [B, N]."""
    out: Tensor = ops.unmerge(value[..., None], *index, None, None, None, False)
    return out[..., 0]


def _per_input(ops: Any, value: Tensor, index: Index) -> Tensor:
    """Sum a number per input token [B, N] over each output token's members [B, M]."""
    out: Tensor = ops.merge(value[..., None], *index, None, None, "sum")
    return out[..., 0]


# ---- invert ----


def _invert_fake(assign: Tensor, num_tokens: int) -> Inverse:
    offsets = assign.new_empty(assign.shape[0], num_tokens + 1, dtype=torch.int32)
    return Inverse(offsets, assign.new_empty(assign.shape, dtype=torch.int32))


register(reference.invert, composed=composed.invert, fake=_invert_fake)


# ---- compose ----


def _compose_fake(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    return Index(earlier.new_empty(earlier.shape), *_invert_fake(earlier, num_tokens))


register(reference.compose, composed=composed.compose, fake=_compose_fake)


# ---- merge ----


def _merge_fake(
    x: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    reduce: str,
) -> Tensor:
    return x.new_empty(x.shape[0], index.num_tokens, x.shape[2])


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weight, scale, reduce = inputs
    ctx.reduce = reduce
    selects = reduce in ("amax", "amin", "prod")
    # The backward of sum and mean needs x for the gradient of weight and scale alone.
    keep_x = selects or any(ctx.needs[4:6])
    ctx.save_for_backward(x if keep_x else None, output if selects else None, *index, weight, scale)


def _merge_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, out, *index, weight, scale = ctx.saved_tensors
    needs = ctx.needs
    grad_x = grad_weight = grad_scale = None
    if ctx.reduce == "mean":
        grad_x = ops.unmerge(grad, *index, None, None, None, True)
    elif ctx.reduce == "sum":
        if needs[0]:
            grad_x = ops.unmerge(grad, *index, weight, scale, None, False)
        if needs[4] or needs[5]:
            grad_weight, grad_scale = _factor_grads(ops, x, grad, index, weight, scale)
    elif needs[0]:
        # The fused kernel has no derivative of its own; the formula in PyTorch has.
        source: Any = references if differentiates() else ops
        grad_x = source.merge_reduce_backward(grad, x, out, *index, ctx.reduce)
    return grad_x, *_NO_GRADIENT, grad_weight, grad_scale, None


def _factor_grads(
    ops: Any, x: Tensor, y: Tensor, index: Index, weight: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Derivatives of the trilinear form with respect to weight [B, N] and scale [B, M]."""
    dot = ops.pair_dot(x, y, *index)  # [B, N]
    grad_weight = grad_scale = None
    if weight is not None:
        grad_weight = dot if scale is None else dot * _per_output(ops, scale, index)
    if scale is not None:
        grad_scale = _per_input(ops, dot if weight is None else dot * weight, index)
    return grad_weight, grad_scale


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
    y: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    mean: bool,
) -> Tensor:
    return y.new_empty(y.shape[0], index.assign.shape[1], y.shape[2])


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, index, weight, scale, _, mean = inputs
    ctx.mean = mean
    keep_y = any(ctx.needs[4:6])
    ctx.save_for_backward(y if keep_y else None, *index, weight, scale)


def _unmerge_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    y, *index, weight, scale = ctx.saved_tensors
    needs = ctx.needs
    grad_y = grad_weight = grad_scale = None
    if needs[0]:
        reduce = "mean" if ctx.mean else "sum"
        grad_y = ops.merge(grad, *index, weight, scale, reduce)
    if needs[4] or needs[5]:
        grad_weight, grad_scale = _factor_grads(ops, grad, y, index, weight, scale)
    grad_residual = grad if needs[6] else None
    return grad_y, *_NO_GRADIENT, grad_weight, grad_scale, grad_residual, None


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
    return [_merge_fake(t, index, weight, None, reduce) for t in x]


def _merge_many_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, index, weight, reduce = inputs
    ctx.reduce, ctx.count = reduce, len(x)
    selects = reduce in ("amax", "amin", "prod")
    # As for one tensor: x for what selects, and for the gradient of the weights.
    kept = x if selects or ctx.needs[4] else ()
    ctx.save_for_backward(*index, weight, *kept, *(output if selects else ()))


def _loops(grads: Any) -> bool:
    """Whether ``is_grads_batched`` maps over gradients: it knows no operators of lists."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, grads))


def _merge_many_backward(ops: Any, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    assign, offsets, members, weight, *rest = ctx.saved_tensors
    index = assign, offsets, members
    x, out = rest[: ctx.count], rest[ctx.count :]
    grad_x, grad_weight = [None] * ctx.count, None
    if ctx.reduce in ("sum", "mean"):
        mean = ctx.reduce == "mean"
        if _loops(grads):
            grad_x = [ops.unmerge(g, *index, weight, None, None, mean) for g in grads]
        elif any(ctx.needs[0]):
            grad_x = ops.unmerge_many(grads, *index, weight, mean)
        if ctx.needs[4]:
            grad_weight = sum(ops.pair_dot(t, g, *index) for t, g in zip(x, grads, strict=True))
    else:
        source: Any = references if differentiates() else ops
        grad_x = [
            source.merge_reduce_backward(g, t, o, *index, ctx.reduce)
            for g, t, o in zip(grads, x, out, strict=True)
        ]
    return grad_x, *_NO_GRADIENT, grad_weight, None


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
    return [_unmerge_fake(t, index, weight, None, None, mean) for t in y]


def _unmerge_many_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    y, index, weight, mean = inputs
    ctx.mean = mean
    kept = y if ctx.needs[4] else ()
    ctx.save_for_backward(*index, weight, *kept)


def _unmerge_many_backward(ops: Any, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    assign, offsets, members, weight, *y = ctx.saved_tensors
    index = assign, offsets, members
    grad_y, grad_weight = [None] * len(grads), None
    reduce = "mean" if ctx.mean else "sum"
    if _loops(grads):
        grad_y = [ops.merge(g, *index, weight, None, reduce) for g in grads]
    elif any(ctx.needs[0]):
        grad_y = ops.merge_many(grads, *index, weight, reduce)
    if ctx.needs[4]:
        grad_weight = sum(ops.pair_dot(g, t, *index) for t, g in zip(y, grads, strict=True))
    return grad_y, *_NO_GRADIENT, grad_weight, None


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
    grad_x = grad_y = None
    if ctx.needs[0]:
        grad_x = ops.unmerge(y, *index, grad, None, None, False)
    if ctx.needs[1]:
        grad_y = ops.merge(x, *index, grad, None, "sum")
    return grad_x, grad_y, *_NO_GRADIENT


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


def _merge_wavg_setup(ctx: Any, inputs: tuple[Any, ...], output: Wavg) -> None:
    x, index, size = inputs
    # Only the gradient of the sizes needs x, and without it sizes must not hold on to the graph.
    needs_size = ctx.needs[4]
    if not needs_size:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if needs_size else None, output[1], *index, size)


def _merge_wavg_backward(ops: Any, ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Any, ...]:
    x, total, *index, size = ctx.saved_tensors
    empty = total == 0
    scale = torch.where(empty, 0, 1 / torch.where(empty, 1, total))  # [B, M]
    grad_x = grad_size = None
    if ctx.needs[0]:
        grad_x = ops.unmerge(grad, *index, size, scale, None, False)
    if ctx.needs[4]:
        # d out / d size_n = (x_n - out) / total, with out from x again: the result was rounded.
        dot = ops.pair_dot(x, grad, *index)  # [B, N]
        excess = _per_input(ops, dot * size, index) * scale * scale  # [B, M]
        grad_size = dot * _per_output(ops, scale, index) + _per_output(
            ops, grad_total - excess, index
        )
    return grad_x, *_NO_GRADIENT, grad_size


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
