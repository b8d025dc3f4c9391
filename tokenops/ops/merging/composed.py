# SPDX-License-Identifier: Apache-2.0
"""Merging put together from PyTorch's operators: what serves where there is no kernel.

A token map in CSR form is what ``embedding_bag`` takes: an output token is a bag of rows of ``x``,
summed in one pass, in the order of the members, in float32, by one thread. So it is deterministic
on every device, and the rows are read once. Unmerging looks up bags of one row.

Letters: B batch, N tokens in, M tokens out, C channels. Nothing here is differentiable by autograd:
the operators have their own backward formulas.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype, may_be_true
from . import common
from .arguments import Index, Inverse, Wavg

#: Modes of embedding_bag.
_SUM, _MEAN = 0, 1


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """CSR inverse of ``assign`` [B, N] -> ``offsets`` [B, M + 1], ``members`` [B, N]."""
    live = (assign >= 0) & (assign < num_tokens)
    number = torch.where(live, assign + 1, num_tokens + 1).long()
    offsets, members = invert_partition(number, num_tokens + 1)
    # Dropped tokens, in a place of their own, come last.
    offsets = offsets[:, :-1].contiguous()
    place = torch.arange(assign.shape[1], device=assign.device)
    return Inverse(offsets, members.masked_fill_(place >= offsets[:, -1:], -1))


def invert_partition(number: Tensor, num_tokens: int) -> Inverse:
    """The same for a map that drops no token, by ``number`` = assign + 1, int64 [B, N].

    That is the slot of ``offsets`` in which a token is counted before the cumulative sum.
    """
    members = number.argsort(dim=1, stable=True).int()
    offsets = number.new_zeros(number.shape[0], num_tokens + 1, dtype=torch.int32)
    one = offsets.new_ones(()).expand(number.shape)
    return Inverse(offsets.scatter_add_(1, number, one).cumsum_(1), members)


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
    if reduce not in ("sum", "mean"):
        return _extremes(x, index, reduce)
    mean = reduce == "mean"
    if weight is None and scale is None:
        return _reduce(x, index, None, mean)
    return _reduce(x, index, _factor(x, index, weight, scale, mean), False)


def unmerge(
    y: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    mean: bool,
) -> Tensor:
    """Give each input token the row of its output token; see the schema for the arguments."""
    factor = _factor(y, index, weight, scale, mean)
    out = _take(y, index.assign, factor, wide=residual is not None)
    if residual is not None:
        out += residual
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
    rows = _take(y, index.assign, None, wide=True)
    dot = rows.mul_(x).sum(-1)
    return _zero_dropped(dot, index.assign, y.shape[1])


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Size-weighted mean ``sum(x * size) / sum(size)`` and the summed sizes [B, M]."""
    if size is None:
        total = index.offsets.diff(dim=1).to(acc_dtype(x))
        return Wavg(_reduce(x, index, None, True), total)
    total = _reduce(size[..., None], index, None, False).squeeze(-1)
    empty = total == 0
    if total.shape[1] == 0:
        return Wavg(x.new_zeros(x.shape[0], 0, x.shape[2]), total)
    # Shares of the members, before the sum: the mean needs no pass of its own then. A product with
    # the inverse of a small total would be infinite.
    whole = torch.where(empty, 1, total).gather(1, _clamped(index.assign, total.shape[1]).long())
    out = _reduce(x, index, size / whole, False)
    if may_be_true(empty):
        out.masked_fill_(empty[..., None], 0)
    return Wavg(out, total)


def merge_reduce_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    index: Index,
    reduce: str,
) -> Tensor:
    """Gradient of amax, amin (shared equally by ties) and prod with respect to ``x``."""
    assign, offsets, members = index
    values = x.to(acc_dtype(x))
    if reduce == "prod":
        others = common.product_of_others(values, assign, members, _largest(offsets))
        return others.mul_(_take(grad, assign, None, wide=True)).to(x.dtype)
    best = _take(out, assign, None, wide=True)
    chosen = values == best
    if may_be_true(nan := best.isnan()):
        chosen |= values.isnan() & nan
    chosen = _zero_dropped(chosen, assign, out.shape[1]).to(values.dtype)
    share = _reduce(chosen, index, None, False).clamp_(min=1)
    taken = _take(grad.to(values.dtype).div(share), assign, None, wide=True)
    return taken.mul_(chosen).to(x.dtype)


def _factor(
    x: Tensor, index: Index, weight: Tensor | None, scale: Tensor | None, mean: bool
) -> Tensor | None:
    """Number that each input token's row is multiplied by, [B, N]; None for ones.

    That of an output token (scale [B, M], the mean's division) is one of each of its members.
    """
    if mean:
        inverse = index.offsets.diff(dim=1).clamp_(min=1).to(acc_dtype(x)).reciprocal_()  # [B, M]
        scale = inverse if scale is None else inverse * scale
    if scale is None or scale.shape[1] == 0:
        return weight
    scale = scale.gather(1, _clamped(index.assign, scale.shape[1]).long())
    return scale if weight is None else scale.mul_(weight)


def _reduce(x: Tensor, index: Index, factor: Tensor | None, mean: bool) -> Tensor:
    """Sum of the members times their factors [B, N], or their mean: [B, N, C] -> [B, M, C]."""
    batch, tokens, channels = x.shape
    _, offsets, members = index
    outputs = index.num_tokens
    if x.numel() == 0 or outputs == 0:
        return x.new_zeros(batch, outputs, channels)
    # Dropped tokens end the list of members; where there may be some, a bag of their own has them.
    drops = may_be_true(offsets[:, -1] != tokens)
    # In range and in order: whoever made the lists, nothing out of bounds is read, and each bag has
    # its sum.
    starts = offsets[:, : outputs + drops].clamp(0, tokens).cummax(1).values
    starts[:, 0] = 0
    order = members.clamp(0, tokens - 1)  # [B, N]
    if factor is not None:
        factor = factor.gather(1, order.long())
    if mean and x.dtype == torch.float16:  # whose sum may overflow before the division
        bags = _bags(x.float(), order, starts, None, _MEAN)
    else:
        bags = _bags(x, order, starts, factor, _MEAN if mean else _SUM)
    return bags[:, :outputs].contiguous().to(x.dtype)


def _take(y: Tensor, assign: Tensor, factor: Tensor | None, *, wide: bool = False) -> Tensor:
    """Row of each token's output token times its factor, 0 where dropped: [B, M, C] -> [B, N, C].

    In the type of sums if ``wide``, else of ``y``.
    """
    batch, outputs, channels = y.shape
    tokens = assign.shape[1]
    dtype = acc_dtype(y) if wide else y.dtype
    if y.numel() == 0 or tokens == 0:
        return y.new_zeros(batch, tokens, channels, dtype=dtype)
    row = _clamped(assign, outputs)
    starts = torch.arange(tokens, dtype=torch.int32, device=y.device).expand(batch, -1)
    out = _bags(y.to(dtype), row, starts, factor, _SUM).to(dtype)
    return _zero_dropped(out, assign, outputs)


def _bags(x: Tensor, rows: Tensor, starts: Tensor, weight: Tensor | None, mode: int) -> Tensor:
    """Sums of bags of rows of each image: x [B, R, C], rows [B, K], starts [B, G] -> [B, G, C].

    Bag g of image b has the rows from its start to that of the next bag, or to the last of K. Sums
    with weights [B, K] come in the type of sums.
    """
    batch, height, channels = x.shape
    if weight is not None:
        x, weight = x.to(weight.dtype), weight.reshape(-1)
    # Rows and starts among those of all images.
    wide = batch * max(height, rows.shape[1]) > torch.iinfo(torch.int32).max
    image = torch.arange(batch, dtype=torch.int64 if wide else torch.int32, device=x.device)[
        :, None
    ]
    flat = (rows + image * height).view(-1)
    bags, *_ = torch.embedding_bag(
        x.reshape(batch * height, channels),
        flat,
        (starts + image * rows.shape[1]).reshape(-1),
        mode=mode,
        per_sample_weights=weight,
    )
    return bags.view(batch, starts.shape[1], channels)


def _extremes(x: Tensor, index: Index, reduce: str) -> Tensor:
    """Largest, smallest or product of the members: [B, N, C] -> [B, M, C]; 0 without members."""
    batch, _, channels = x.shape
    assign, offsets, _ = index
    outputs = index.num_tokens
    if x.numel() == 0 or outputs == 0:
        return x.new_zeros(batch, outputs, channels)
    if reduce == "prod":
        values = x.to(acc_dtype(x))
        return common.product(values, index, _largest(offsets)).to(x.dtype)
    live = (assign >= 0) & (assign < outputs)
    image = torch.arange(batch, device=x.device)[:, None] * (outputs + 1)
    # One row more than there are outputs takes the dropped tokens.
    slot = torch.where(live, assign, outputs).long() + image
    row = slot.view(-1, 1).expand(-1, channels)
    start = -math.inf if reduce == "amax" else math.inf
    out = x.new_full((batch * (outputs + 1), channels), start)
    out = out.scatter_reduce_(0, row, x.reshape(-1, channels), reduce)
    out = out.view(batch, outputs + 1, channels)[:, :outputs].to(x.dtype).contiguous()
    empty = offsets.diff(dim=1) == 0
    return out.masked_fill_(empty[..., None], 0) if may_be_true(empty) else out


def _largest(offsets: Tensor) -> int | None:
    """Members of the largest output token; None where looking would wait for a device."""
    if not offsets.is_cpu or offsets.numel() <= offsets.shape[0]:
        return None
    return int(offsets.diff(dim=1).amax())


def _zero_dropped(x: Tensor, assign: Tensor, outputs: int) -> Tensor:
    """Put 0, in place, where a token of [B, N] or [B, N, C] has no output token."""
    dropped = (assign < 0) | (assign >= outputs)
    if not may_be_true(dropped):
        return x
    return x.masked_fill_(dropped if x.dim() == 2 else dropped[..., None], 0)


def _clamped(assign: Tensor, outputs: int) -> Tensor:
    return assign.clamp(0, max(outputs - 1, 0))
