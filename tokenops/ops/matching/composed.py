# SPDX-License-Identifier: Apache-2.0
"""Matching, composed of PyTorch's operators; serves where no kernel does.

The search multiplies blocks of rows with all candidates and takes the maximum while a block is in
the cache. The selection finds the best sources by a partial sort and numbers output tokens by
prefix sums.

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


class _Sides(NamedTuple):
    """Sources and destinations: a stride, or ascending lists, int64 ``[B, .]``.

    An index of a source or destination is its place in ascending order.
    """

    tokens: int
    prefix: int
    stride: int  # 0 where tokens are listed
    num_src: int
    num_dst: int
    prefix_src: int = 0  # sources and destinations in the prefix; with a stride only
    prefix_dst: int = 0
    src: Tensor | None = None
    dst: Tensor | None = None
    src_order: Tensor | None = None  # indices in the order of the split
    dst_order: Tensor | None = None

    def src_tokens(self, index: Tensor) -> Tensor:
        """Tokens [B, K] of sources by their indices."""
        if self.src is not None:
            return self.src.gather(1, index)
        return index + index // (self.stride - 1) if self.stride > 2 else index * self.stride

    def dst_tokens(self, index: Tensor) -> Tensor:
        """Tokens [B, K] of destinations by their indices."""
        if self.dst is not None:
            return self.dst.gather(1, index)
        return (index * self.stride).add_(self.stride - 1)

    def lists(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """All sources and destinations, ascending: int64 [B, Ns], [B, Nd]."""
        if self.src is not None and self.dst is not None:
            return self.src, self.dst
        src = torch.arange(self.num_src, device=device).expand(batch, -1)
        dst = torch.arange(self.num_dst, device=device).expand(batch, -1)
        return self.src_tokens(src), self.dst_tokens(dst)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the sources and of the destinations: [B, N, D] -> [B, Ns, D], [B, Nd, D]."""
        if self.stride == 2:
            return x[:, 0::2], x[:, 1::2]
        src, dst = self.lists(x.shape[0], x.device)
        return _rows(x, src), _rows(x, dst)


class _Pairs(NamedTuple):
    """Sources that merge and their destinations, by index: int64 ``[B, r]``."""

    src: Tensor
    dst: Tensor
    live: Tensor | None  # bool, false for a pair that does not merge; None if all merge
    by_score: Tensor | None  # all sources [B, Ns] by descending score, if they are sorted


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
    sides = _sides("search", metric.shape[0], metric.shape[-2], split, metric.device)
    best = _best_pairs(metric, split, sides, similarity == "cosine")
    if sides.src_order is not None:
        best = Best(*(torch.empty_like(x).scatter_(1, sides.src_order, x) for x in best))
    return best


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    sides = _sides("match", metric.shape[0], metric.shape[-2], split, metric.device)
    cosine, r = similarity == "cosine", common.mergeable(sides.tokens, request.r)
    free = sides.num_src - sides.prefix_src
    if metric.is_cpu and split.protected is None and sides.stride > 0 and 0 < r <= free:
        pairs = _few_pairs(metric, r, sides, request, cosine)
        if pairs is not None:
            return _map(pairs, sides, r, request)
    return _select(_best_pairs(metric, split, sides, cosine), sides, request, split)


def select(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    sides = _sides("select", best.node_max.shape[0], num_tokens, split, best.node_max.device)
    if sides.src_order is not None:
        best = Best(*(x.gather(1, sides.src_order) for x in best))
    return _select(best, sides, request, split)


# ---- the sides of the split ----


def _sides(
    operator: str, batch: int, tokens: int, split: SplitArgs, device: torch.device
) -> _Sides:
    common.check_split(operator, split)
    counts = common.count_sides(operator, tokens, split)
    prefix = common.prefix_of(tokens, split.num_prefix)
    if split.src_index is not None and split.dst_index is not None:
        last, lists = max(tokens - 1, 0), []
        for index in (split.src_index, split.dst_index):
            ascending, order = index.long().clamp(0, last).sort(dim=-1, stable=True)
            lists += [ascending.expand(batch, -1), order.expand(batch, -1)]
        return _Sides(tokens, prefix, 0, *counts, lists[0], lists[2], lists[1], lists[3])
    if split.grid_width == 0:
        return _Sides(tokens, prefix, split.stride, *counts)
    src, dst, _ = common.sides(operator, batch, tokens, split, device)  # both ascending
    return _Sides(tokens, prefix, 0, *counts, src, dst)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: [B, N, D], [B, K] -> [B, K, D]."""
    if index.stride(0) == 0 and index.shape[0] > 0:  # the same for every image
        return x.index_select(1, index[0])
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


# ---- search ----


def _best_pairs(metric: Tensor, split: SplitArgs, sides: _Sides, cosine: bool) -> Best:
    """Best destination of each source and its similarity, [B, Ns], both sides ascending."""
    x = _comparable(metric, cosine)
    receives, first = None, 0
    if split.protected is not None or (sides.stride == 0 and sides.prefix > 0):
        protected = common.protected_tokens(x.shape[0], x.shape[1], split, x.device)
        receives = ~protected.gather(1, sides.lists(x.shape[0], x.device)[1])
    else:
        first = sides.prefix_dst
    a, b = sides.rows(x)
    node_max, node_idx = _search(a, b[:, first:], receives)
    if first > 0:
        node_idx = torch.where(node_idx >= 0, node_idx + first, node_idx)
    return Best(node_max, node_idx)


def _few_pairs(
    metric: Tensor, r: int, sides: _Sides, request: Request, cosine: bool
) -> _Pairs | None:
    """The best pairs, if all scores fit into one block and none of them is NaN.

    ``amax`` is several times faster than ``max``, which also returns indices: destinations are
    looked up only for the r sources that merge.
    """
    batch = metric.shape[0]
    num_src, num_dst = sides.num_src - sides.prefix_src, sides.num_dst - sides.prefix_dst
    if batch * num_src * num_dst > block_entries(metric.device):
        return None
    if num_dst <= 0 or metric.numel() == 0:
        return None
    a, b = sides.rows(_comparable(metric, cosine))
    a = a[:, sides.prefix_src :] if sides.prefix_src > 0 else a
    b = b[:, sides.prefix_dst :] if sides.prefix_dst > 0 else b
    with no_autocast(a.device.type):
        scores = torch.bmm(a, b.mT)  # [B, Ns, Nd]
    best = scores.amax(dim=2)  # NaN if any score is NaN
    src, by_score = _top(best, r, _sorts(request, sides))
    if math.isnan(best.amax()):
        return None  # topk and argsort treat NaN as the largest
    dst = scores.gather(1, src[..., None].expand(-1, -1, num_dst)).argmax(dim=2)  # the first
    least = common.thresholds(request, best.dtype)
    live = None if least is None else best.gather(1, src) >= least
    if sides.prefix_src > 0:
        src = src + sides.prefix_src
    if sides.prefix_dst > 0:
        dst += sides.prefix_dst
    return _Pairs(src, dst, live, by_score)


def _comparable(x: Tensor, cosine: bool) -> Tensor:
    """Rows [B, N, D], in the dtype of sums, whose dot products are the similarities."""
    dtype = acc_dtype(x)
    # The metric of attention keys [B, H, N, D] is their mean over heads.
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
        return _search_block(a, b, b_mask, None)
    buffer = a.new_empty(batch * block * columns)
    starts = range(0, rows, block)
    parts = [_search_block(a[:, i : i + block], b, b_mask, buffer) for i in starts]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)


def _search_block(
    a: Tensor, b: Tensor, b_mask: Tensor | None, buffer: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = a.shape[0], a.shape[1], b.shape[1]
    out = None if buffer is None else buffer[: math.prod(shape)].view(shape)
    with no_autocast(a.device.type):
        scores = torch.bmm(a, b.transpose(1, 2), out=out)  # [B, block, Nb]
    if b_mask is not None:
        scores.masked_fill_(~b_mask[:, None, :], -math.inf)
    score, index = scores.max(dim=2)  # the first maximum; NaN if any score is NaN
    if may_be_true(score.isnan()):
        scores.masked_fill_(scores.isnan(), -math.inf)
        score, index = scores.max(dim=2)
    # If no score is above -inf: the first candidate that is not masked out, else -1.
    if may_be_true(none := score == -math.inf):
        first = torch.zeros_like(index[:, :1])
        if b_mask is not None:
            first = torch.where(b_mask.any(dim=1), b_mask.int().argmax(dim=1), -1)[:, None]
        index = torch.where(none, first, index)
    return score, index.int()


# ---- selection, and the token map ----


def _sorts(request: Request, sides: _Sides) -> bool:
    """Whether unmerged sources are ordered by score, so that all sources must be sorted."""
    return request.order == "tome" and sides.prefix == 0


def _top(score: Tensor, r: int, sort: bool) -> tuple[Tensor, Tensor | None]:
    """The r best sources [B, r], ties to the first; if ``sort``, also all by descending score."""
    if not sort and score.is_cpu and r > 0:
        best, index = score.topk(min(r + 1, score.shape[1]), dim=1)
        # topk breaks ties arbitrarily: use it only if the last score that it takes has no tie.
        if all(a != b for a, *rest in best[:, r - 1 :].tolist() for b in rest):
            return index[:, :r], None
    by_score = score.argsort(dim=1, descending=True, stable=True)
    return by_score[:, :r], by_score if sort else None


def _select(best: Best, sides: _Sides, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs, both sides ascending."""
    node_max, node_idx = best
    batch, device, sort = node_max.shape[0], node_max.device, _sorts(request, sides)
    r, least = common.mergeable(sides.tokens, request.r), common.thresholds(request, node_max.dtype)
    take = r if sides.num_dst > 0 else 0
    if split.protected is None and (sides.prefix == 0 or sides.stride > 0):
        first = sides.prefix_src
        src, by_score = _top(node_max[:, first:], min(take, node_max.shape[1] - first), sort)
        src, live = src + first, None
    else:
        protected = common.protected_tokens(batch, sides.tokens, split, device)
        node_max, grade, by_score, ranking = common.rank_sources(
            node_max, sides.lists(batch, device)[0], protected, sides.prefix
        )
        src = ranking[:, :take]
        live = grade.gather(1, src) < (2 if least is None else 1)
    dst = node_idx.gather(1, src)
    if least is not None:
        similar = (node_max.gather(1, src) >= least) & (dst >= 0)
        live = similar if live is None else live & similar
    pairs = _Pairs(src, dst.clamp(min=0).long(), live, by_score if sort else None)
    return _map(pairs, sides, r, request)


def _map(pairs: _Pairs, sides: _Sides, r: int, request: Request) -> Map:
    """The token map that merges pairs."""
    (batch, merged), tokens = pairs.src.shape, sides.tokens
    outputs = tokens if request.limited() else tokens - r
    if request.order == "position" or merged == 0:  # if nothing merges, both are the identity
        number = _by_position(pairs, sides)
    else:
        number = _as_tome(pairs, sides)
    if pairs.live is None:
        counts = number.new_full((batch,), min(tokens - merged, outputs), dtype=torch.int32)
    else:
        counts = (tokens - pairs.live.sum(dim=1)).clamp(max=outputs).int()
    if sides.stride > 0 and (request.limited() or (pairs.live is None and merged == r)):
        inverse = invert_partition(number, outputs)
        return Map(number.sub_(1).int(), *inverse, counts)
    # If too few sources can merge, there are more segments than outputs: drop the last ones.
    assign = torch.where(number <= outputs, number - 1, -1)
    return Map(assign.int(), *invert(assign, outputs), counts)


def _by_position(pairs: _Pairs, sides: _Sides) -> Tensor:
    """Output token of each token, plus 1, int64 [B, N], in the order of their first members."""
    batch = pairs.src.shape[0]
    token = torch.arange(sides.tokens, device=pairs.src.device)
    leader = token.expand(batch, -1).clone()  # first member of each token's segment
    if pairs.src.shape[1] == 0:
        return leader.add_(1)
    src, root = sides.src_tokens(pairs.src), sides.dst_tokens(pairs.dst)  # [B, r]
    if pairs.live is not None:
        root = torch.where(pairs.live, root, src)
    leader.scatter_reduce_(1, root, src, "amin")
    leader.scatter_(1, src, leader.gather(1, root))
    return (leader == token).cumsum(1).gather(1, leader)


def _as_tome(pairs: _Pairs, sides: _Sides) -> Tensor:
    """Output token of each token, plus 1, int64 [B, N], in ToMe's order.

    That is: prefix, tokens of neither side, unmerged sources, destinations.
    """
    batch, device, prefix = pairs.src.shape[0], pairs.src.device, sides.prefix
    stays = torch.ones(batch, sides.num_src, dtype=torch.int64, device=device)
    stays.scatter_(1, pairs.src, 0 if pairs.live is None else (~pairs.live).long())
    # Tokens of the prefix that are not sources come first; `stays` counts the sources.
    first: Tensor | int = prefix - sides.prefix_src
    neither, dst_order = None, sides.dst_order
    if sides.stride == 0 and prefix + sides.num_src + sides.num_dst > 0:
        src, dst = sides.lists(batch, device)
        neither = torch.ones(batch, sides.tokens, dtype=torch.int64, device=device)
        neither.scatter_(1, src, 0).scatter_(1, dst, 0)
        neither[:, :prefix] = 1  # even if a list names them
        neither = neither.cumsum(1)
        first = neither[:, -1:]
        if prefix > 0:
            stays = stays * (src >= prefix)
            outside = (dst >= prefix).long()
            if dst_order is not None:
                outside = torch.empty_like(outside).scatter_(1, dst_order, outside)
            rank = outside.cumsum(1).sub_(1)
            dst_order = rank if dst_order is None else rank.gather(1, dst_order)
    if pairs.by_score is None:
        src_number = stays.cumsum(1).add_(first)
        last = src_number[:, -1:]
    else:
        ranked = stays.gather(1, pairs.by_score).cumsum(1).add_(first)
        src_number = torch.empty_like(ranked).scatter_(1, pairs.by_score, ranked)
        last = ranked[:, -1:]
    if dst_order is None:
        dst_order = torch.arange(sides.num_dst, device=device)
    dst_number = dst_order + (last + (1 - sides.prefix_dst))  # [B, Nd]
    target = dst_number.gather(1, pairs.dst)
    if prefix > 0 and (sides.stride == 0 or sides.prefix_dst > 0):
        # Sources merge into a token of the prefix only if there is no other destination.
        token = sides.dst_tokens(pairs.dst)
        target = torch.where(token < prefix, token + 1, target)
    if pairs.live is not None:
        target = torch.where(pairs.live, target, src_number.gather(1, pairs.src))
    src_number.scatter_(1, pairs.src, target)
    number = src_number.new_zeros(batch, sides.tokens) if neither is None else neither
    if sides.stride == 2:
        number[:, 0::2], number[:, 1::2] = src_number, dst_number
    else:
        src, dst = sides.lists(batch, device)
        number.scatter_(1, src, src_number).scatter_(1, dst, dst_number)
    if prefix > 1 or (prefix > 0 and sides.stride == 0):
        number[:, :prefix] = torch.arange(1, prefix + 1, device=device)
    return number
