# SPDX-License-Identifier: Apache-2.0
"""Matching put together from PyTorch's operators: what serves where there is no kernel.

Products of blocks of rows with all candidates, whose maximum is taken while the block is in the
cache; one partial sort of the sources; places of the output tokens by counting.

Letters: B batch, N tokens, Na or Ns sources, Nb or Nd destinations, D width of the metric.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import acc_dtype, no_autocast
from ..merging.composed import invert, invert_partition

#: Similarities that are held at a time: so many float32 numbers share a cache with the rows.
SCORES_AT_A_TIME = 1 << 20


class _Split(NamedTuple):
    """Tokens by their role, ascending; int64 ``[B, .]`` in range, whatever indices came."""

    sources: Tensor
    destinations: Tensor
    listed: Tensor  # place of each destination in the order of the split
    order: Tensor | None  # place of each source in the order of the split; None if it ascends
    by_stride: bool
    prefix_sources: int  # the first sources and destinations of a stride are in the prefix
    prefix_destinations: int


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``: score [B, Na] and index [B, Na]."""
    score, index = _search(_comparable(a, similarity), _comparable(b, similarity), b_mask)
    if a_mask is not None:
        score = score.masked_fill_(~a_mask, -math.inf)
        index = index.masked_fill_(~a_mask, -1)
    return score, index


def search(
    metric: Tensor,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """Best destination of each source; see the schema for the arguments and results."""
    x = _comparable(metric, similarity)
    tokens = x.shape[1]
    first = 0  # destinations in the prefix, which take no part
    if source_index is None or destination_index is None:
        a, b = _by_stride(x, stride)
        if protected is None:
            first = min(num_prefix // stride, b.shape[1])
    else:
        a, b = _rows(x, source_index), _rows(x, _ascending(destination_index, tokens))
    takes_part = None
    if protected is not None or (source_index is not None and num_prefix > 0):
        takes_part = ~_closed(x.shape[0], tokens, num_prefix, protected, x.device)
        if source_index is None or destination_index is None:
            takes_part = _by_stride(takes_part, stride)[1]
        else:
            takes_part = _rows(takes_part, _ascending(destination_index, tokens))
    score, choice = _search(a, b[:, first:], takes_part)
    if first > 0:
        choice = torch.where(choice >= 0, choice + first, choice)
    return score, choice


def match(
    metric: Tensor,
    r: int,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    threshold: float | None,
    order: str,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bipartite matching; see the schema for the arguments and results."""
    split = source_index, destination_index, stride
    score, choice = search(metric, num_prefix, protected, *split, similarity)
    tokens = metric.shape[-2]
    return select(score, choice, tokens, r, num_prefix, protected, *split, threshold, order)


def select(
    score: Tensor,
    choice: Tensor,
    tokens: int,
    r: int,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    threshold: float | None,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The map of the best pairs; see the schema for the arguments and results."""
    batch, device = score.shape[0], score.device
    outputs = tokens if threshold is not None else tokens - r
    split = _split(
        batch, tokens, num_prefix, source_index, destination_index, stride, device
    )
    if split.order is not None:
        score, choice = score.gather(1, split.order), choice.gather(1, split.order)
    if r <= 0 or split.destinations.shape[1] == 0 or split.sources.shape[1] == 0:
        counts = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        return *_identity(batch, tokens, outputs, device), counts

    grade = None
    if protected is not None or (num_prefix > 0 and not split.by_stride):
        # Eligible sources come first, protected ones as a last resort, prefix tokens never.
        closed = _closed(batch, tokens, num_prefix, protected, device).gather(1, split.sources)
        grade = closed.int() + (split.sources < num_prefix)  # [B, Ns]: 0, 1, 2
    sort = order == "tome" and num_prefix == 0  # unmerged sources stand by their score
    merged, by_score = _best(score, grade, r, split.prefix_sources, sort)
    if threshold is not None:
        merged &= (score >= threshold) & (choice >= 0)
        if grade is not None:
            merged &= grade == 0
    target = choice.clamp(min=0).long()  # [B, Ns], among the destinations
    if order == "position":
        assign = _by_position(split, merged, target, tokens)
    else:
        by_score = by_score if sort else None
        assign = _as_tome(split, merged, target, by_score, tokens, num_prefix)
    counts = (tokens - merged.sum(dim=1)).int()
    # Fewer may have merged than r; what has no place among the outputs is dropped.
    if split.by_stride and threshold is not None:
        return assign, *invert_partition(assign, outputs), counts
    if split.by_stride and grade is None and r <= split.sources.shape[1] - split.prefix_sources:
        return assign, *invert_partition(assign, outputs), counts
    assign = torch.where(assign < outputs, assign, -1)
    return assign, *invert(assign, outputs), counts


def _comparable(x: Tensor, similarity: str) -> Tensor:
    """Rows [B, N, D] whose dot products are the similarities; keys [B, H, N, D] by their mean."""
    x = x.mean(1, dtype=acc_dtype(x)) if x.dim() == 4 else x.to(acc_dtype(x))
    if similarity != "cosine":
        return x
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(length == 0, 0, length.reciprocal())


def _search(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest dot product of each row of ``a`` with a row of ``b``, and the first such row."""
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if batch * rows * columns == 0:
        score = a.new_full((batch, rows), -math.inf)
        return score, torch.full_like(score, -1, dtype=torch.int32)
    block = max(1, SCORES_AT_A_TIME // (batch * columns))
    if rows <= block:
        return _nearest_block(a, b, b_mask, None)
    buffer = a.new_empty(batch * block * columns)
    starts = range(0, rows, block)
    parts = [_nearest_block(a[:, i : i + block], b, b_mask, buffer) for i in starts]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)


def _nearest_block(
    a: Tensor, b: Tensor, b_mask: Tensor | None, buffer: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = a.shape[0], a.shape[1], b.shape[1]
    out = None if buffer is None else buffer[: math.prod(shape)].view(shape)
    with no_autocast(a.device.type):
        scores = torch.bmm(a, b.transpose(1, 2), out=out)  # [B, block, Nb]
    if b_mask is not None:
        scores.masked_fill_(~b_mask[:, None, :], -math.inf)
    score, index = scores.max(dim=2)  # the first of equal maxima; NaN if there is one
    if _may_be_true(score.isnan()):
        scores.masked_fill_(scores.isnan(), -math.inf)
        score, index = scores.max(dim=2)
    # Nothing but NaN among the candidates: the first candidate, or none at all.
    if _may_be_true(none := score == -math.inf):
        first = 0
        if b_mask is not None:
            first = torch.where(b_mask.any(dim=1), b_mask.int().argmax(dim=1), -1)[:, None]
        index = torch.where(none, first, index)
    return score, index.int()


def _may_be_true(condition: Tensor) -> bool:
    """Whether some element is true: exactly on the CPU, where looking does not wait for anything."""
    return not condition.is_cpu or bool(condition.any())


def _by_stride(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Rows of the sources and of the destinations, every stride-th: [B, N, ...], views if can be."""
    destinations = x[:, stride - 1 :: stride]
    if stride == 2:
        return x[:, 0::2], destinations
    return x.index_select(1, _strided_sources(x.shape[1], stride, x.device)), destinations


def _strided_sources(tokens: int, stride: int, device: torch.device) -> Tensor:
    """Tokens that are no destinations, int64 [Ns], without a mask: shapes depend on no values."""
    count = tokens - tokens // stride
    place = torch.arange(count, device=device)
    return place + place // (stride - 1) if stride > 1 else place


def _ascending(index: Tensor, tokens: int) -> Tensor:
    return index.clamp(0, max(tokens - 1, 0)).sort(dim=-1).values


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: [B, N, ...], [K] or [B, K] -> [B, K, ...]; clamped, whatever a user gave."""
    index = index.clamp(0, max(x.shape[1] - 1, 0)).long()
    if index.dim() == 1:
        return x.index_select(1, index)
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _closed(
    batch: int, tokens: int, num_prefix: int, protected: Tensor | None, device: torch.device
) -> Tensor:
    """Bool [B, N], true for tokens that take no part."""
    out = (torch.arange(tokens, device=device) < num_prefix).expand(batch, tokens)
    return out if protected is None else out | protected


def _split(
    batch: int,
    tokens: int,
    num_prefix: int,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    device: torch.device,
) -> _Split:
    if source_index is None or destination_index is None:
        sources = _strided_sources(tokens, stride, device).expand(batch, -1)
        listed = torch.arange(tokens // stride, device=device).expand(batch, -1)
        destinations = listed * stride + (stride - 1)
        before = num_prefix // stride
        return _Split(sources, destinations, listed, None, True, num_prefix - before, before)
    last = max(tokens - 1, 0)
    sources, order = source_index.long().clamp(0, last).sort(dim=-1, stable=True)
    destinations, listed = destination_index.long().clamp(0, last).sort(dim=-1, stable=True)
    sides = (t.expand(batch, -1) for t in (sources, destinations, listed, order))
    return _Split(*sides, False, 0, 0)


def _identity(
    batch: int, tokens: int, outputs: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The map that keeps the first tokens, all where there are enough outputs, where they are."""
    assign = torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch, 1)
    assign = torch.where(assign < outputs, assign, -1)
    return assign, *invert(assign, outputs)


def _best(
    score: Tensor, grade: Tensor | None, r: int, skipped: int, ranked: bool
) -> tuple[Tensor, Tensor | None]:
    """The r best sources, bool [B, Ns], of equals the first; and all by score, if they are sorted."""
    if grade is None and not ranked:
        eligible = score[:, skipped:]
        r = min(r, eligible.shape[1])
        if r == 0:
            return torch.zeros_like(score, dtype=torch.bool), None
        last = eligible.topk(r, dim=1).values[:, -1:]  # [B, 1]
        above, equal = eligible > last, eligible == last
        wanted = r - above.sum(dim=1, keepdim=True)
        merged = above | (equal & (equal.cumsum(1) <= wanted))
        return torch.nn.functional.pad(merged, (skipped, 0)), None
    if grade is not None:
        score = score.masked_fill(grade > 0, -math.inf)
    ranking = score.argsort(dim=1, descending=True, stable=True)
    by_score = ranking
    if grade is not None:
        ranking = ranking.gather(1, grade.gather(1, ranking).argsort(dim=1, stable=True))
    merged = torch.zeros_like(score, dtype=torch.bool).scatter_(1, ranking[:, :r], True)
    if grade is not None:
        merged &= grade < 2
    return merged, by_score


def _by_position(split: _Split, merged: Tensor, target: Tensor, tokens: int) -> Tensor:
    """Output token of each token, int32 [B, N], in the order of their first members."""
    batch = merged.shape[0]
    token = torch.arange(tokens, device=merged.device)
    # The token that stands for each source's group: its destination if it merges, else itself.
    group = torch.where(merged, split.destinations.gather(1, target), split.sources)
    leader = token.repeat(batch, 1)  # first member of each token's group
    leader = leader.scatter_reduce_(1, group, split.sources, "amin")
    leader = leader.scatter_(1, split.sources, leader.gather(1, group))
    place = (leader == token).cumsum(1, dtype=torch.int32) - 1
    return place.gather(1, leader)


def _as_tome(
    split: _Split, merged: Tensor, target: Tensor, by_score: Tensor | None, tokens: int, prefix: int
) -> Tensor:
    """The same in ToMe's order: prefix, tokens of neither side, unmerged sources, destinations."""
    batch, sources = merged.shape
    stays = ~merged
    if by_score is not None:
        place = stays.gather(1, by_score).cumsum(1) - 1
        place = torch.empty_like(place).scatter_(1, by_score, place)
    else:
        place = stays.cumsum(1) - (1 + split.prefix_sources)
    others = prefix
    if not split.by_stride:
        others = max(tokens - sources - split.listed.shape[1], 0)
    place += others
    last = others + stays.sum(1, keepdim=True) - split.prefix_sources
    at = last + (split.listed - split.prefix_destinations)  # [B, Nd]
    place = torch.where(merged, at.gather(1, target), place)  # [B, Ns]
    if split.by_stride:
        neither = torch.arange(tokens, device=merged.device).repeat(batch, 1)
    else:
        is_other = torch.ones(batch, tokens, dtype=torch.bool, device=merged.device)
        is_other.scatter_(1, split.sources, False).scatter_(1, split.destinations, False)
        neither = is_other.cumsum(1) - 1
    assign = neither.scatter(1, split.sources, place).scatter_(1, split.destinations, at)
    if split.by_stride and prefix > 0:
        assign[:, :prefix] = neither[:, :prefix]
    return assign.int()
