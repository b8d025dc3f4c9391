# SPDX-License-Identifier: Apache-2.0
"""Merging, composed of PyTorch's operators; serves where no kernel does.

``embedding_bag`` takes a token map in CSR form: the members of an output token are a bag of rows of
``x``, which one thread sums in one pass, in their order, in float32. So the sums are deterministic
on every device. Unmerging looks up bags of one row.

Letters: B batch, N tokens in, M tokens out, C channels. These functions are not differentiable by
autograd; the operators have backward formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype, may_be_true
from . import common
from .arguments import Factors, Index, Inverse, Wavg

#: Modes of embedding_bag.
_SUM, _MEAN = 0, 1


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """The members of each output token in CSR form."""
    live = (assign >= 0) & (assign < num_tokens)
    slot = torch.where(live, assign + 1, num_tokens + 1).long()
    offsets, members = invert_partition(slot, num_tokens + 1)  # the last segment: dropped tokens
    offsets = offsets[:, :-1].contiguous()
    position = torch.arange(assign.shape[1], device=assign.device)
    return Inverse(offsets, members.masked_fill_(position >= offsets[:, -1:], -1))


def invert_partition(slot: Tensor, num_tokens: int) -> Inverse:
    """:func:`invert` for a map that drops no token.

    Args:
        slot: int64 ``[B, N]``, ``assign + 1``: the entry of ``offsets`` that counts the token
            before the cumulative sum.
        num_tokens: M.
    """
    members = slot.argsort(dim=1, stable=True).int()
    offsets = slot.new_zeros(slot.shape[0], num_tokens + 1, dtype=torch.int32)
    one = offsets.new_ones(()).expand(slot.shape)
    return Inverse(offsets.scatter_add_(1, slot, one).cumsum_(1), members)


def compose(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    """The token map of ``earlier`` followed by ``assign``."""
    composed = common.compose_assign(assign, earlier, num_tokens)
    return Index(composed, *invert(composed, num_tokens))


def merge(x: Tensor, index: Index, factors: Factors, reduce: str) -> Tensor:
    """Reduce the members of each output token."""
    if reduce not in ("sum", "mean"):
        return _reduce(x, index, reduce)
    mean = reduce == "mean"
    if factors.weight is None and factors.scale is None:
        return _sum(x, index, None, mean)
    return _sum(x, index, _row_factor(x, index, factors, mean), False)


def merge_many(x: list[Tensor], index: Index, weight: Tensor | None, reduce: str) -> list[Tensor]:
    """Merge each tensor of a list."""
    return [merge(t, index, Factors(weight, None), reduce) for t in x]


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Size-weighted mean of the members of each output token, and the summed sizes."""
    if size is None:
        total = index.offsets.diff(dim=1).to(acc_dtype(x))
        return Wavg(_sum(x, index, None, True), total)
    total = _sum(size[..., None], index, None, False).squeeze(-1)
    empty = total == 0
    if total.shape[1] == 0:
        return Wavg(x.new_zeros(x.shape[0], 0, x.shape[2]), total)
    # Divide the sizes, not the sums, which saves a pass over rows. Multiplying by the reciprocal of
    # a small total would overflow.
    divisor = torch.where(empty, 1, total).gather(1, _clamped(index.assign, total.shape[1]).long())
    out = _sum(x, index, size / divisor, False)
    if may_be_true(empty):
        out.masked_fill_(empty[..., None], 0)
    return Wavg(out, total)


def merge_reduce_backward(
    grad: Tensor, x: Tensor, out: Tensor, index: Index, reduce: str
) -> Tensor:
    """Gradient of amax, amin and prod with respect to ``x``."""
    assign = index.assign
    values = x.to(acc_dtype(x))
    if reduce == "prod":
        others = common.product_of_others(values, index, _longest(index.offsets))
        return others.mul_(_take(grad, assign, None, upcast=True)).to(x.dtype)
    result = _take(out, assign, None, upcast=True)
    is_result = values == result
    if may_be_true(nan := result.isnan()):
        is_result |= values.isnan() & nan
    is_result = _zero_dropped(is_result, assign, out.shape[1]).to(values.dtype)
    ties = _sum(is_result, index, None, False).clamp_(min=1)
    share = _take(grad.to(values.dtype).div(ties), assign, None, upcast=True)
    return share.mul_(is_result).to(x.dtype)


def unmerge(
    y: Tensor, index: Index, factors: Factors, residual: Tensor | None, mean: bool
) -> Tensor:
    """Give each input token the row of its output token."""
    factor = _row_factor(y, index, factors, mean)
    out = _take(y, index.assign, factor, upcast=residual is not None)
    if residual is not None:
        out += residual
    return out.to(y.dtype)


def unmerge_many(y: list[Tensor], index: Index, weight: Tensor | None, mean: bool) -> list[Tensor]:
    """Unmerge each tensor of a list."""
    return [unmerge(t, index, Factors(weight, None), None, mean) for t in y]


def pair_dot(x: Tensor, y: Tensor, index: Index) -> Tensor:
    """Dot product of each input row with the row of its output token."""
    rows = _take(y, index.assign, None, upcast=True)
    dot = rows.mul_(x).sum(-1)
    return _zero_dropped(dot, index.assign, y.shape[1])


def _row_factor(x: Tensor, index: Index, factors: Factors, mean: bool) -> Tensor | None:
    """Factor of each input token [B, N], with that of its output token; None for ones."""
    weight, scale = factors
    if mean:
        inverse = index.offsets.diff(dim=1).clamp_(min=1).to(acc_dtype(x)).reciprocal_()  # [B, M]
        scale = inverse if scale is None else inverse * scale
    if scale is None or scale.shape[1] == 0:
        return weight
    scale = scale.gather(1, _clamped(index.assign, scale.shape[1]).long())
    return scale if weight is None else scale.mul_(weight)


def _sum(x: Tensor, index: Index, factor: Tensor | None, mean: bool) -> Tensor:
    """Sum of the members times their factors [B, N], or their mean: [B, N, C] -> [B, M, C]."""
    batch, tokens, channels = x.shape
    _, offsets, members = index
    outputs = index.num_tokens
    if x.numel() == 0 or outputs == 0:
        return x.new_zeros(batch, outputs, channels)
    # Dropped tokens are at the end of ``members``. If there may be any, they get an extra bag.
    drops = may_be_true(offsets[:, -1] != tokens)
    # For any map, even an invalid one, embedding_bag gets ascending starts within bounds.
    starts = offsets[:, : outputs + drops].clamp(0, tokens).cummax(1).values
    starts[:, 0] = 0
    order = members.clamp(0, tokens - 1)  # [B, N]
    if factor is not None:
        factor = factor.gather(1, order.long())
    if mean and x.dtype == torch.float16:  # the sum may overflow before the division
        bags = _bags(x.float(), order, starts, None, _MEAN)
    else:
        bags = _bags(x, order, starts, factor, _MEAN if mean else _SUM)
    return bags[:, :outputs].contiguous().to(x.dtype)


def _take(y: Tensor, assign: Tensor, factor: Tensor | None, *, upcast: bool = False) -> Tensor:
    """Row of each token's output token times a factor, 0 if dropped: [B, M, C] -> [B, N, C].

    In the dtype of sums if ``upcast``, else in the dtype of ``y``.
    """
    batch, outputs, channels = y.shape
    tokens = assign.shape[1]
    dtype = acc_dtype(y) if upcast else y.dtype
    if y.numel() == 0 or tokens == 0:
        return y.new_zeros(batch, tokens, channels, dtype=dtype)
    row = _clamped(assign, outputs)
    starts = torch.arange(tokens, dtype=torch.int32, device=y.device).expand(batch, -1)
    out = _bags(y.to(dtype), row, starts, factor, _SUM).to(dtype)
    return _zero_dropped(out, assign, outputs)


def _bags(x: Tensor, rows: Tensor, starts: Tensor, weight: Tensor | None, mode: int) -> Tensor:
    """Reduce bags of rows of each image: x [B, R, C], rows [B, K], starts [B, G] -> [B, G, C].

    Bag g of image b has the rows ``rows[b, starts[b, g]:starts[b, g + 1]]``. With weights [B, K]
    the result is in the dtype of sums.
    """
    batch, height, channels = x.shape
    if weight is not None:
        x, weight = x.to(weight.dtype), weight.reshape(-1)
    # Indices into the rows of all images together.
    needs_int64 = batch * max(height, rows.shape[1]) > torch.iinfo(torch.int32).max
    dtype = torch.int64 if needs_int64 else torch.int32
    image = torch.arange(batch, dtype=dtype, device=x.device)[:, None]
    flat = (rows + image * height).view(-1)
    bags, *_ = torch.embedding_bag(
        x.reshape(batch * height, channels),
        flat,
        (starts + image * rows.shape[1]).reshape(-1),
        mode=mode,
        per_sample_weights=weight,
    )
    return bags.view(batch, starts.shape[1], channels)


def _reduce(x: Tensor, index: Index, reduce: str) -> Tensor:
    """Maximum, minimum or product of the members, 0 without members: [B, N, C] -> [B, M, C]."""
    batch, _, channels = x.shape
    assign, offsets, _ = index
    outputs = index.num_tokens
    if x.numel() == 0 or outputs == 0:
        return x.new_zeros(batch, outputs, channels)
    if reduce == "prod":
        return common.product(x.to(acc_dtype(x)), index, _longest(offsets)).to(x.dtype)
    live = (assign >= 0) & (assign < outputs)
    image = torch.arange(batch, device=x.device)[:, None] * (outputs + 1)
    # Row M of each image is for dropped tokens.
    slot = torch.where(live, assign, outputs).long() + image
    row = slot.view(-1, 1).expand(-1, channels)
    start = -math.inf if reduce == "amax" else math.inf
    out = x.new_full((batch * (outputs + 1), channels), start)
    out = out.scatter_reduce_(0, row, x.reshape(-1, channels), reduce)
    out = out.view(batch, outputs + 1, channels)[:, :outputs].to(x.dtype).contiguous()
    empty = offsets.diff(dim=1) == 0
    return out.masked_fill_(empty[..., None], 0) if may_be_true(empty) else out


def _longest(offsets: Tensor) -> int | None:
    """Length of the longest segment; None where reading it would synchronize."""
    if not offsets.is_cpu or offsets.numel() <= offsets.shape[0]:
        return None
    return int(offsets.diff(dim=1).amax())


def _zero_dropped(x: Tensor, assign: Tensor, outputs: int) -> Tensor:
    """Set the entries of dropped tokens to 0, in place: [B, N] or [B, N, C]."""
    dropped = (assign < 0) | (assign >= outputs)
    if not may_be_true(dropped):
        return x
    return x.masked_fill_(dropped if x.dim() == 2 else dropped[..., None], 0)


def _clamped(assign: Tensor, outputs: int) -> Tensor:
    return assign.clamp(0, max(outputs - 1, 0))
