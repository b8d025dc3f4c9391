# SPDX-License-Identifier: Apache-2.0
"""Merging in plain PyTorch: the declaration of each operator, and the oracle of its kernels.

Letters: B batch, N tokens in, M tokens out, C channels. The dtype of sums is float64 for
float64, else float32. All functions but ``invert`` and ``compose`` are differentiable by
autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype
from . import common
from .arguments import Factors, Index, Inverse, Wavg


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """The members of each output token in CSR form.

    Args:
        assign: int32 ``[B, N]``; an index outside ``[0, num_tokens)`` drops the token.
        num_tokens: M.
    """
    slot = _slot(assign, num_tokens)
    members = slot.argsort(dim=1, stable=True).int()
    counts = torch.zeros(assign.shape[0], num_tokens + 1, dtype=torch.int32, device=assign.device)
    counts = counts.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.int32))
    ends = counts[:, :num_tokens].cumsum(1, dtype=torch.int32)  # [B, M]
    offsets = torch.nn.functional.pad(ends, (1, 0))
    position = torch.arange(assign.shape[1], dtype=torch.int32, device=assign.device)
    return Inverse(offsets, torch.where(position < offsets[:, -1:], members, -1))


def compose(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    """The token map of ``earlier`` int32 [B, N0] followed by ``assign`` int32 [B, N]."""
    composed = common.compose_assign(assign, earlier, num_tokens)
    return Index(composed, *invert(composed, num_tokens))


def merge(x: Tensor, index: Index, factors: Factors, reduce: str) -> Tensor:
    """Reduce the members of each output token: ``[B, N, C]`` -> ``[B, M, C]``.

    Args:
        x: Rows of the input tokens.
        index: The token map.
        factors: For ``reduce="sum"`` only: ``scale[m] * sum of weight[n] * x[n]``.
        reduce: ``"sum"``, ``"mean"``, ``"amax"``, ``"amin"`` or ``"prod"``.
    """
    assign, num_tokens = index.assign, index.num_tokens
    values = x.to(acc_dtype(x))
    if reduce in ("sum", "mean"):
        if factors.weight is not None:
            values = values * factors.weight[..., None]
        out = _sum(values, assign, num_tokens)
        if reduce == "mean":
            out = out / _member_counts(index.offsets)
        if factors.scale is not None:
            out = out * factors.scale[..., None]
    elif reduce == "prod":  # scatter_reduce is wrong under torch.func.jvp, and atomic on CUDA
        out = common.product(values, index)
    else:
        slot = _slot(assign, num_tokens)[..., None].expand_as(values)
        # Start from NaN: an initial value equal to a member would share the gradient of this
        # member.
        out = values.new_full((x.shape[0], num_tokens + 1, x.shape[2]), math.nan)
        out = out.scatter_reduce(1, slot, values, reduce, include_self=False)[:, :num_tokens]
        out = torch.where((index.offsets.diff(dim=1) > 0)[..., None], out, 0)
    return out.to(x.dtype)


def merge_many(x: list[Tensor], index: Index, weight: Tensor | None, reduce: str) -> list[Tensor]:
    """Merge each tensor of a list by one map."""
    return [merge(t, index, Factors(weight, None), reduce) for t in x]


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Size-weighted mean ``sum(x * size) / sum(size)``, and the summed sizes; 0 if they sum to 0.

    Args:
        x: Rows ``[B, N, C]``.
        index: The token map.
        size: ``[B, N]`` in the dtype of sums; ones if None.
    """
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=acc_dtype(x))
    total = _sum(size[..., None], index.assign, index.num_tokens)  # [B, M, 1]
    weighted = _sum(x.to(acc_dtype(x)) * size[..., None], index.assign, index.num_tokens)
    empty = total == 0
    out = torch.where(empty, 0, weighted / torch.where(empty, 1, total))
    return Wavg(out.to(x.dtype), total.squeeze(-1))


def merge_reduce_backward(
    grad: Tensor, x: Tensor, out: Tensor, index: Index, reduce: str
) -> Tensor:
    """Gradient of amax, amin (ties share it equally) and prod with respect to ``x``.

    Args:
        grad: Gradient of ``out``.
        x: Rows ``[B, N, C]``.
        out: Result of ``merge``, ``[B, M, C]``.
        index: The token map.
        reduce: ``"amax"``, ``"amin"`` or ``"prod"``.
    """
    assign = index.assign
    values, grad = x.to(acc_dtype(x)), grad.to(acc_dtype(x))
    if reduce == "prod":
        grad_x = _take(grad, assign) * common.product_of_others(values, index)
        return grad_x.to(x.dtype)
    result = _take(out.to(values.dtype), assign)
    is_result = (values == result) | (values.isnan() & result.isnan())
    is_result = is_result & _live(assign, index.num_tokens)
    ties = _sum(is_result.to(values.dtype), assign, index.num_tokens).clamp(min=1)
    return (is_result * _take(grad / ties, assign)).to(x.dtype)


def unmerge(
    y: Tensor, index: Index, factors: Factors, residual: Tensor | None, mean: bool
) -> Tensor:
    """Give each input token the row of its output token: ``[B, M, C]`` -> ``[B, N, C]``.

    ``weight[n] * scale[m] * y[m] + residual[n]`` with ``m = assign[n]``; dropped tokens get the
    residual, or 0.

    Args:
        y: Rows of the output tokens.
        index: The token map.
        factors: Factors of the rows.
        residual: ``[B, N, C]`` in the dtype of ``y``.
        mean: Whether to divide by the number of members of the output token.
    """
    rows = y.to(acc_dtype(y))
    if mean:
        rows = rows / _member_counts(index.offsets)
    if factors.scale is not None:
        rows = rows * factors.scale[..., None]
    out = _take(rows, index.assign)
    if factors.weight is not None:
        out = torch.where(_live(index.assign, y.shape[1]), out * factors.weight[..., None], 0)
    if residual is not None:
        out = out + residual
    return out.to(y.dtype)


def unmerge_many(y: list[Tensor], index: Index, weight: Tensor | None, mean: bool) -> list[Tensor]:
    """Unmerge each tensor of a list by one map."""
    return [unmerge(t, index, Factors(weight, None), None, mean) for t in y]


def pair_dot(x: Tensor, y: Tensor, index: Index) -> Tensor:
    """Dot product of each input row with the row of its output token, 0 for dropped tokens.

    Args:
        x: Rows of the input tokens, ``[B, N, C]``.
        y: Rows of the output tokens, ``[B, M, C]``.
        index: The token map.

    Returns:
        ``[B, N]`` in the dtype of sums.
    """
    dot = (x.to(acc_dtype(x)) * _take(y.to(acc_dtype(y)), index.assign)).sum(-1)
    return torch.where(_live(index.assign, y.shape[1])[..., 0], dot, 0)


def _live(assign: Tensor, num_tokens: int) -> Tensor:
    """Whether a token is not dropped, [B, N, 1]."""
    return ((assign >= 0) & (assign < num_tokens))[..., None]


def _slot(assign: Tensor, num_tokens: int) -> Tensor:
    """Output token as int64 [B, N]; M for dropped tokens."""
    live = (assign >= 0) & (assign < num_tokens)
    return torch.where(live, assign, num_tokens).long()


def _sum(values: Tensor, assign: Tensor, num_tokens: int) -> Tensor:
    """Sum the members of each output token: [B, N, C] -> [B, M, C]."""
    batch, _, channels = values.shape
    slot = _slot(assign, num_tokens)
    out = values.new_zeros(batch, num_tokens + 1, channels)
    if values.is_cuda:  # index_put sorts; scatter_add would use atomics in no fixed order
        image = torch.arange(batch, device=slot.device)[:, None]
        out = out.index_put((image, slot), values, accumulate=True)
    else:
        out = out.scatter_add(1, slot[..., None].expand_as(values), values)
    return out[:, :num_tokens]


def _take(rows: Tensor, assign: Tensor) -> Tensor:
    """Row of each token's output token, 0 for dropped tokens: [B, M, C] -> [B, N, C]."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # the last row is 0, for dropped tokens
    slot = _slot(assign, rows.shape[1])[..., None]
    return padded.gather(1, slot.expand(-1, -1, rows.shape[2]))


def _member_counts(offsets: Tensor) -> Tensor:
    """Number of members, at least 1, [B, M, 1]."""
    return offsets.diff(dim=1).clamp(min=1)[..., None]
