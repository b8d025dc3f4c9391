# SPDX-License-Identifier: Apache-2.0
"""Merging in plain PyTorch: the oracle of every kernel.

Letters: B batch, N tokens in, M tokens out, C channels. All functions but ``invert`` are
differentiable by ordinary autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype
from . import common
from .arguments import Index, Inverse, Wavg


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """CSR inverse of ``assign`` [B, N] -> ``offsets`` [B, M + 1], ``members`` [B, N]."""
    slot = _slot(assign, num_tokens)  # [B, N], M where dropped
    members = slot.argsort(dim=1, stable=True).int()
    counts = torch.zeros(assign.shape[0], num_tokens + 1, dtype=torch.int32, device=assign.device)
    counts = counts.scatter_add(1, slot, torch.ones_like(slot, dtype=torch.int32))
    ends = counts[:, :num_tokens].cumsum(1, dtype=torch.int32)  # [B, M]
    offsets = torch.nn.functional.pad(ends, (1, 0))
    position = torch.arange(assign.shape[1], dtype=torch.int32, device=assign.device)
    return Inverse(offsets, torch.where(position < offsets[:, -1:], members, -1))


def compose(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    """The map through ``earlier`` [B, N0] and ``assign`` [B, N]: assign [B, N0] and its inverse."""
    through = common.route(assign, earlier, num_tokens)
    return Index(through, *invert(through, num_tokens))


def merge(
    x: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    reduce: str,
) -> Tensor:
    """Reduce the members of each output token; see the schema for the arguments."""
    assign, num_tokens = index.assign, index.num_tokens
    values = x.to(acc_dtype(x))
    if reduce in ("sum", "mean"):
        if weight is not None:
            values = values * weight[..., None]
        out = _sum(values, assign, num_tokens)
        if reduce == "mean":
            out = out / _member_counts(index.offsets)
        if scale is not None:
            out = out * scale[..., None]
    elif reduce == "prod":  # scatter_reduce is wrong under torch.func.jvp, and atomic on CUDA
        out = common.product(values, index)
    else:
        # One row more than there are outputs takes the dropped tokens.
        slot = _slot(assign, num_tokens)[..., None].expand_as(values)
        # It starts from NaN, for a start that equals a member would share that one's gradient.
        out = values.new_full((x.shape[0], num_tokens + 1, x.shape[2]), math.nan)
        out = out.scatter_reduce(1, slot, values, reduce, include_self=False)[:, :num_tokens]
        out = torch.where((index.offsets.diff(dim=1) > 0)[..., None], out, 0)
    return out.to(x.dtype)


def unmerge(
    y: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    mean: bool,
) -> Tensor:
    """Give each input token the row of its output token; see the schema for the arguments."""
    rows = y.to(acc_dtype(y))
    if mean:
        rows = rows / _member_counts(index.offsets)
    if scale is not None:
        rows = rows * scale[..., None]
    out = _take(rows, index.assign)
    if weight is not None:
        out = torch.where(_live(index.assign, y.shape[1]), out * weight[..., None], 0)
    if residual is not None:
        out = out + residual
    return out.to(y.dtype)


def merge_many(
    x: list[Tensor],
    index: Index,
    weight: Tensor | None,
    reduce: str,
) -> list[Tensor]:
    """Several tensors merged by one map."""
    return [merge(t, index, weight, None, reduce) for t in x]


def unmerge_many(
    y: list[Tensor],
    index: Index,
    weight: Tensor | None,
    mean: bool,
) -> list[Tensor]:
    """Several tensors unmerged by one map."""
    return [unmerge(t, index, weight, None, None, mean) for t in y]


def pair_dot(x: Tensor, y: Tensor, index: Index) -> Tensor:
    """Dot product [B, N] of each input row with the row of its output token."""
    dot = (x.to(acc_dtype(x)) * _take(y.to(acc_dtype(y)), index.assign)).sum(-1)
    return torch.where(_live(index.assign, y.shape[1])[..., 0], dot, 0)


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Size-weighted mean ``sum(x * size) / sum(size)`` and the summed sizes [B, M]."""
    assign, num_tokens = index.assign, index.num_tokens
    if size is None:
        size = x.new_ones(x.shape[:2], dtype=acc_dtype(x))
    total = _sum(size[..., None], assign, num_tokens)  # [B, M, 1]
    weighted = _sum(x.to(acc_dtype(x)) * size[..., None], assign, num_tokens)
    empty = total == 0
    out = torch.where(empty, 0, weighted / torch.where(empty, 1, total))
    return Wavg(out.to(x.dtype), total.squeeze(-1))


def merge_reduce_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    index: Index,
    reduce: str,
) -> Tensor:
    """Gradient of amax, amin (shared equally by ties) and prod with respect to ``x``.

    Made of differentiable operations, so that it serves double backward too.
    """
    assign = index.assign
    values, grads = x.to(acc_dtype(x)), grad.to(acc_dtype(x))
    if reduce == "prod":
        others = common.product_of_others(values, assign, index.members)
        return (_take(grads, assign) * others).to(x.dtype)
    best = _take(out.to(values.dtype), assign)
    chosen = ((values == best) | (values.isnan() & best.isnan())) & _live(assign, index.num_tokens)
    share = _sum(chosen.to(values.dtype), assign, index.num_tokens).clamp(min=1)
    return (chosen * _take(grads / share, assign)).to(x.dtype)


def _live(assign: Tensor, num_tokens: int) -> Tensor:
    return ((assign >= 0) & (assign < num_tokens))[..., None]  # [B, N, 1]


def _slot(assign: Tensor, num_tokens: int) -> Tensor:
    """Output token as int64 [B, N]; M where the token is dropped."""
    live = (assign >= 0) & (assign < num_tokens)
    return torch.where(live, assign, num_tokens).long()


def _sum(values: Tensor, assign: Tensor, num_tokens: int) -> Tensor:
    """Sum the members of each output token: [B, N, C] -> [B, M, C]."""
    batch, _, channels = values.shape
    slot = _slot(assign, num_tokens)
    out = values.new_zeros(batch, num_tokens + 1, channels)
    if values.is_cuda:  # sorts, where scatter_add would use atomics in no fixed order
        image = torch.arange(batch, device=slot.device)[:, None]
        out = out.index_put((image, slot), values, accumulate=True)
    else:
        out = out.scatter_add(1, slot[..., None].expand_as(values), values)
    return out[:, :num_tokens]


def _take(rows: Tensor, assign: Tensor) -> Tensor:
    """Row of each token's output token, zero where dropped: [B, M, C] -> [B, N, C]."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # the last row, zero, serves the dropped
    slot = _slot(assign, rows.shape[1])[..., None]
    return padded.gather(1, slot.expand(-1, -1, rows.shape[2]))


def _member_counts(offsets: Tensor) -> Tensor:
    return offsets.diff(dim=1).clamp(min=1)[..., None]  # [B, M, 1]
