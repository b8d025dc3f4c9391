# SPDX-License-Identifier: Apache-2.0
"""Matching put together from PyTorch's operators: what serves where there is no kernel.

Products of blocks of rows with all candidates, whose maximum is taken while a block is in the
cache; the best sources by one partial sort; places of the output tokens by counting.

Letters: B batch, N tokens, Na or Ns sources, Nb or Nd destinations, D width of the metric.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import ROWS_AT_LEAST, acc_dtype, block_entries, may_be_true, no_autocast
from ..merging.composed import invert, invert_partition
from . import common
from .arguments import Best, Map, Request, SplitArgs


class _Split(NamedTuple):
    """Tokens by their role; by a stride, else by ascending lists, int64 ``[B, .]``."""

    tokens: int
    num_sources: int
    num_destinations: int
    stride: int  # 0 where the tokens are listed
    prefix_sources: int  # the first sources and destinations of a stride are in the prefix
    prefix_destinations: int
    sources: Tensor | None = None
    destinations: Tensor | None = None
    source_order: Tensor | None = None  # places in the order of the split
    destination_order: Tensor | None = None

    def source_tokens(self, place: Tensor) -> Tensor:
        """Token of each source [B, K] by its place."""
        if self.sources is not None:
            return self.sources.gather(1, place)
        return place + place // (self.stride - 1) if self.stride > 2 else place * self.stride

    def destination_tokens(self, place: Tensor) -> Tensor:
        """Token of each destination [B, K] by its place."""
        if self.destinations is not None:
            return self.destinations.gather(1, place)
        return (place * self.stride).add_(self.stride - 1)

    def lists(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """All sources and destinations, ascending: int64 [B, Ns], [B, Nd]."""
        if self.sources is not None and self.destinations is not None:
            return self.sources, self.destinations
        sources = torch.arange(self.num_sources, device=device).expand(batch, -1)
        destinations = torch.arange(self.num_destinations, device=device).expand(batch, -1)
        return self.source_tokens(sources), self.destination_tokens(destinations)

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the sources and of the destinations: [B, N, D] -> [B, Ns, D], [B, Nd, D]."""
        if self.stride == 2:
            return x[:, 0::2], x[:, 1::2]
        sources, destinations = self.lists(x.shape[0], x.device)
        return _rows(x, sources), _rows(x, destinations)


class _Pairs(NamedTuple):
    """Sources that merge: all int64 ``[B, r]``, places among the ascending ones of their side."""

    sources: Tensor
    destinations: Tensor
    live: Tensor | None  # bool, false for a source that does not merge after all
    by_score: Tensor | None  # all sources [B, Ns] by descending score, where they are sorted


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``: score [B, Na] and index [B, Na]."""
    cosine = similarity == "cosine"
    score, index = _search(_comparable(a, cosine), _comparable(b, cosine), b_mask)
    if a_mask is not None:
        score = score.masked_fill_(~a_mask, -math.inf)
        index = index.masked_fill_(~a_mask, -1)
    return score, index


def search(metric: Tensor, similarity: str, split: SplitArgs) -> Best:
    """Best destination of each source."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    split = split._replace(num_prefix=common.prefix_of(tokens, split.num_prefix))
    sides = _split("search", batch, tokens, split, metric.device)
    best = _best_pairs(metric, split, sides, similarity == "cosine")
    if sides.source_order is not None:
        best = Best(*(torch.empty_like(x).scatter_(1, sides.source_order, x) for x in best))
    return best


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    num_prefix = common.prefix_of(tokens, split.num_prefix)
    split = split._replace(num_prefix=num_prefix)
    sides = _split("match", batch, tokens, split, metric.device)
    least, cosine = common.thresholds(request, acc_dtype(metric)), similarity == "cosine"
    r, order = common.mergeable(tokens, request.r), request.order
    free = sides.num_sources - sides.prefix_sources
    if metric.is_cpu and split.protected is None and sides.stride > 0 and 0 < r <= free:
        pairs = _few_pairs(metric, r, sides, least, _sorts(order, num_prefix), cosine)
        if pairs is not None:
            return _map(pairs, sides, r, num_prefix, least is not None, order)
    best = _best_pairs(metric, split, sides, cosine)
    return _select(best, r, split, sides, least, order)


def select(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    batch, device = best.node_max.shape[0], best.node_max.device
    split = split._replace(num_prefix=common.prefix_of(num_tokens, split.num_prefix))
    sides = _split("select", batch, num_tokens, split, device)
    if sides.source_order is not None:
        best = Best(*(x.gather(1, sides.source_order) for x in best))
    least = common.thresholds(request, best.node_max.dtype)
    r = common.mergeable(num_tokens, request.r)
    return _select(best, r, split, sides, least, request.order)


# ---- the search ----


def _best_pairs(metric: Tensor, split: SplitArgs, sides: _Split, cosine: bool) -> Best:
    """Best destination of each source and its similarity, [B, Ns], both sides ascending."""
    x = _comparable(metric, cosine)
    receives, first = None, 0
    if split.protected is not None or (sides.stride == 0 and split.num_prefix > 0):
        protected = common.protected_tokens(x.shape[0], x.shape[1], split, x.device)
        receives = ~protected.gather(1, sides.lists(x.shape[0], x.device)[1])
    else:
        first = sides.prefix_destinations
    a, b = sides.sides(x)
    node_max, node_idx = _search(a, b[:, first:], receives)
    if first > 0:
        node_idx = torch.where(node_idx >= 0, node_idx + first, node_idx)
    return Best(node_max, node_idx)


def _few_pairs(
    metric: Tensor, r: int, split: _Split, least: float | Tensor | None, sort: bool, cosine: bool
) -> _Pairs | None:
    """The best pairs, of which only the r that merge are looked up; None where that does not do.

    For images whose similarities fit a block: the largest one of each row takes a fraction of the
    time that its place takes.
    """
    batch = metric.shape[0]
    rows = split.num_sources - split.prefix_sources
    columns = split.num_destinations - split.prefix_destinations
    if batch * rows * columns > block_entries(metric.device) or columns <= 0 or metric.numel() == 0:
        return None
    a, b = split.sides(_comparable(metric, cosine))
    a = a[:, split.prefix_sources :] if split.prefix_sources > 0 else a
    b = b[:, split.prefix_destinations :] if split.prefix_destinations > 0 else b
    with no_autocast(a.device.type):
        scores = torch.bmm(a, b.mT)  # [B, Na, Nb]
    best = scores.amax(dim=2)  # NaN if there is one
    sources, by_score = _top(best, r, sort)
    if math.isnan(best.amax()):
        return None  # it counts as the largest of all
    chosen = scores.gather(1, sources[..., None].expand(-1, -1, columns))
    destinations = chosen.argmax(dim=2)  # the first of equal maxima
    live = None if least is None else best.gather(1, sources) >= least
    if split.prefix_sources > 0:
        sources = sources + split.prefix_sources
    if split.prefix_destinations > 0:
        destinations += split.prefix_destinations
    return _Pairs(sources, destinations, live, by_score)


def _comparable(x: Tensor, cosine: bool) -> Tensor:
    """Rows [B, N, D], in the type of sums, whose dot products are the similarities."""
    dtype = acc_dtype(x)
    # Attention keys [B, H, N, D] count by their mean.
    x = x.mean(1, dtype=dtype) if x.dim() == 4 else x.to(dtype)
    if not cosine:
        return x
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.threshold_(length, 0, math.inf)  # a row of length 0 has similarity 0


def _search(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest dot product of each row of ``a`` with a row of ``b``, and the first such row."""
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if batch * rows * columns == 0:
        score = a.new_full((batch, rows), -math.inf)
        return score, torch.full_like(score, -1, dtype=torch.int32)
    block = max(ROWS_AT_LEAST, block_entries(a.device) // (batch * columns))
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
    if may_be_true(score.isnan()):
        scores.masked_fill_(scores.isnan(), -math.inf)
        score, index = scores.max(dim=2)
    # Nothing but NaN among the candidates: the first candidate, or none at all.
    if may_be_true(none := score == -math.inf):
        first = torch.zeros_like(index[:, :1])
        if b_mask is not None:
            first = torch.where(b_mask.any(dim=1), b_mask.int().argmax(dim=1), -1)[:, None]
        index = torch.where(none, first, index)
    return score, index.int()


# ---- the split ----


def _split(
    operator: str, batch: int, tokens: int, split: SplitArgs, device: torch.device
) -> _Split:
    common.check_split(operator, split)
    counts = common.count_sides(operator, tokens, split)
    if split.src_index is not None and split.dst_index is not None:
        last, lists = max(tokens - 1, 0), []
        for index in (split.src_index, split.dst_index):
            ascending, order = index.long().clamp(0, last).sort(dim=-1, stable=True)
            lists += [ascending.expand(batch, -1), order.expand(batch, -1)]
        return _Split(tokens, *counts[:2], 0, 0, 0, lists[0], lists[2], lists[1], lists[3])
    if split.grid_width == 0:
        return _Split(tokens, *counts[:2], split.stride, *counts[2:])
    src, dst, _ = common.sides(operator, batch, tokens, split, device)  # both ascending
    return _Split(tokens, *counts[:2], 0, 0, 0, src, dst)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: [B, N, D], [B, K] -> [B, K, D]."""
    if index.stride(0) == 0 and index.shape[0] > 0:  # the same for every image
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


# ---- the choice of the sources, and the map ----


def _sorts(order: str, num_prefix: int) -> bool:
    """Whether unmerged sources stand by their score, so that all must be sorted."""
    return order == "tome" and num_prefix == 0


def _top(score: Tensor, r: int, sort: bool) -> tuple[Tensor, Tensor | None]:
    """The r best sources [B, r], of equals the first; and all by their score if so asked."""
    if not sort and score.is_cpu and r > 0:
        best, index = score.topk(min(r + 1, score.shape[1]), dim=1)
        if all(a != b for a, *rest in best[:, r - 1 :].tolist() for b in rest):
            return index[:, :r], None
    by_score = score.argsort(dim=1, descending=True, stable=True)
    return by_score[:, :r], by_score if sort else None


def _select(
    best: Best,
    r: int,
    split: SplitArgs,
    sides: _Split,
    least: float | Tensor | None,
    order: str,
) -> Map:
    """The token map of the best pairs, both sides ascending."""
    (score, choice), num_prefix = best, split.num_prefix
    batch, device, sort = score.shape[0], score.device, _sorts(order, num_prefix)
    r_here = r if sides.num_destinations > 0 else 0
    if split.protected is None and (num_prefix == 0 or sides.stride > 0):
        first = sides.prefix_sources
        sources, by_score = _top(score[:, first:], min(r_here, score.shape[1] - first), sort)
        sources, live = sources + first, None
    else:
        # Eligible sources come first, protected ones as a last resort, prefix tokens never.
        tokens_of_sources = sides.lists(batch, device)[0]
        protected = common.protected_tokens(batch, sides.tokens, split, device)
        grade = protected.gather(1, tokens_of_sources).int() + (tokens_of_sources < num_prefix)
        score = score.masked_fill(grade > 0, -math.inf)
        by_score = score.argsort(dim=1, descending=True, stable=True)
        by_grade = grade.gather(1, by_score).argsort(dim=1, stable=True)
        sources = by_score.gather(1, by_grade)[:, :r_here]
        live = grade.gather(1, sources) < (2 if least is None else 1)
    destinations = choice.gather(1, sources)
    if least is not None:
        similar = (score.gather(1, sources) >= least) & (destinations >= 0)
        live = similar if live is None else live & similar
    pairs = _Pairs(sources, destinations.clamp(min=0).long(), live, by_score if sort else None)
    return _map(pairs, sides, r, num_prefix, least is not None, order)


def _map(
    pairs: _Pairs,
    split: _Split,
    r: int,
    num_prefix: int,
    limited: bool,
    order: str,
) -> Map:
    """Output token of each token, its inverse, and the number of live output tokens."""
    (batch, merged), tokens = pairs.sources.shape, split.tokens
    outputs = tokens if limited else tokens - r
    if order == "position" or merged == 0:  # where nothing merges, the identity in either order
        number = _by_position(pairs, split)
    else:
        number = _as_tome(pairs, split, num_prefix)
    if pairs.live is None:
        counts = number.new_full((batch,), min(tokens - merged, outputs), dtype=torch.int32)
    else:
        counts = (tokens - pairs.live.sum(dim=1)).clamp(max=outputs).int()
    if split.stride > 0 and (limited or (pairs.live is None and merged == r)):
        inverse = invert_partition(number, outputs)
        return Map(number.sub_(1).int(), *inverse, counts)
    # Fewer may have merged than r; what has no place among the outputs is dropped.
    assign = torch.where(number <= outputs, number - 1, -1)
    return Map(assign.int(), *invert(assign, outputs), counts)


def _by_position(pairs: _Pairs, split: _Split) -> Tensor:
    """Output token of each token, plus 1, int64 [B, N], in the order of their first members."""
    batch = pairs.sources.shape[0]
    token = torch.arange(split.tokens, device=pairs.sources.device)
    leader = token.expand(batch, -1).clone()  # first member of each token's group
    if pairs.sources.shape[1] == 0:
        return leader.add_(1)
    source = split.source_tokens(pairs.sources)  # [B, r]
    group = split.destination_tokens(pairs.destinations)
    if pairs.live is not None:
        group = torch.where(pairs.live, group, source)
    leader.scatter_reduce_(1, group, source, "amin")
    leader.scatter_(1, source, leader.gather(1, group))
    return (leader == token).cumsum(1).gather(1, leader)


def _as_tome(pairs: _Pairs, split: _Split, num_prefix: int) -> Tensor:
    """The same in ToMe's order: prefix, tokens of neither side, unmerged sources, destinations."""
    batch, device = pairs.sources.shape[0], pairs.sources.device
    stays = torch.ones(batch, split.num_sources, dtype=torch.int64, device=device)
    stays.scatter_(1, pairs.sources, 0 if pairs.live is None else (~pairs.live).long())
    first: Tensor | int = num_prefix - split.prefix_sources
    neither, order = None, split.destination_order
    if split.stride == 0 and num_prefix + split.num_sources + split.num_destinations > 0:
        sources, destinations = split.lists(batch, device)
        neither = torch.ones(batch, split.tokens, dtype=torch.int64, device=device)
        neither.scatter_(1, sources, 0).scatter_(1, destinations, 0)
        neither[:, :num_prefix] = 1  # whatever is listed
        neither = neither.cumsum(1)
        first = neither[:, -1:]
        if num_prefix > 0:
            stays = stays * (sources >= num_prefix)
            outside = (destinations >= num_prefix).long()
            if order is not None:
                outside = torch.empty_like(outside).scatter_(1, order, outside)
            places = outside.cumsum(1).sub_(1)
            order = places if order is None else places.gather(1, order)
    if pairs.by_score is None:
        place = stays.cumsum(1).add_(first)
        last = place[:, -1:]
    else:
        ranked = stays.gather(1, pairs.by_score).cumsum(1).add_(first)
        place = torch.empty_like(ranked).scatter_(1, pairs.by_score, ranked)
        last = ranked[:, -1:]
    begin = 1 - split.prefix_destinations
    if order is None:
        order = torch.arange(split.num_destinations, device=device)
    at = order + (last + begin)  # [B, Nd]
    target = at.gather(1, pairs.destinations)
    if num_prefix > 0 and (split.stride == 0 or split.prefix_destinations > 0):
        # Not merged into, but where there is no other one.
        token = split.destination_tokens(pairs.destinations)
        target = torch.where(token < num_prefix, token + 1, target)
    if pairs.live is not None:
        target = torch.where(pairs.live, target, place.gather(1, pairs.sources))
    place.scatter_(1, pairs.sources, target)
    number = place.new_zeros(batch, split.tokens) if neither is None else neither
    if split.stride == 2:
        number[:, 0::2], number[:, 1::2] = place, at
    else:
        sources, destinations = split.lists(batch, device)
        number.scatter_(1, sources, place).scatter_(1, destinations, at)
    if num_prefix > 1 or (num_prefix > 0 and split.stride == 0):
        number[:, :num_prefix] = torch.arange(1, num_prefix + 1, device=device)
    return number
