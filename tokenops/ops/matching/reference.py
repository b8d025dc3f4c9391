# SPDX-License-Identifier: Apache-2.0
"""Matching in plain PyTorch: the oracle of every kernel and the fallback where there is none.

Letters: B batch, N tokens, Na sources, Nb destinations, D width of the metric.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype, no_autocast
from ..merging.reference import invert

#: Similarities that are held at a time: rows of the score matrix come in blocks of so many entries,
#: which keeps memory linear in N.
SCORES_AT_A_TIME = 1 << 24


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length one, zero where their length is zero, and the inverse lengths."""
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    inverse = torch.where(zero, 0, torch.where(zero, 1, squares).rsqrt())
    return x * inverse, inverse


def metric_rows(x: Tensor) -> Tensor:
    """The metric as [B, N, D] in the type of sums; attention keys [B, H, N, D] as their mean."""
    x = x.to(acc_dtype(x))
    return x.mean(1) if x.dim() == 4 else x


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``: score [B, Na] and index [B, Na].

    Differentiable by ordinary autograd through the score.
    """
    a, b = _comparable(a, similarity), _comparable(b, similarity)
    score, index = _search(a.detach(), b.detach(), b_mask)
    if a_mask is not None:
        score = score.masked_fill(~a_mask, -math.inf)
        index = index.masked_fill(~a_mask, -1)
    if score.numel() == 0 or b.shape[1] == 0:
        return score, index
    # The chosen pairs again, for the gradient, in which nothing else (NaN above all) has a part.
    chosen = (score > -math.inf)[..., None]
    pairs = torch.where(chosen, _rows(b, index.clamp(min=0).long()), 0)  # [B, Na, D]
    similar = (torch.where(chosen, a, 0) * pairs).sum(-1)
    return torch.where(chosen[..., 0], similar, score), index


def _comparable(x: Tensor, similarity: str) -> Tensor:
    """Rows [B, N, D] whose dot products are the similarities."""
    rows = metric_rows(x)
    return unit_rows(rows)[0] if similarity == "cosine" else rows


def _search(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest dot product of each row of ``a`` with a row of ``b``, and the first such row."""
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if batch * rows * columns == 0:
        score = a.new_full((batch, rows), -math.inf)
        return score, torch.full_like(score, -1, dtype=torch.int32)
    if b_mask is None:
        b_mask = torch.ones(1, 1, dtype=torch.bool, device=b.device).expand(batch, columns)
    if batch * rows * columns <= SCORES_AT_A_TIME:
        return _nearest_block(a, b, b_mask)
    # A loop over blocks fixes the sizes when traced, hence it stands apart.
    block = max(1, SCORES_AT_A_TIME // (batch * columns))
    parts = [_nearest_block(a[:, i : i + block], b, b_mask) for i in range(0, rows, block)]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)


def _nearest_block(a: Tensor, b: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    with no_autocast(a.device.type):
        scores = a @ b.transpose(1, 2)  # [B, block, Nb]
    scores = scores.masked_fill(scores.isnan() | ~b_mask[:, None, :], -math.inf)
    score, index = scores.max(dim=2)  # the first of equal maxima
    # Nothing but NaN among the candidates: the first candidate, or none at all.
    first = b_mask.int().argmax(dim=1)
    fallback = torch.where(b_mask.any(dim=1), first, -1)[:, None]
    return score, torch.where(score == -math.inf, fallback, index).int()


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
    x = _comparable(metric, similarity)
    batch, tokens, _ = x.shape
    token = torch.arange(tokens, device=x.device)
    if source_index is None or destination_index is None:
        is_destination = token % stride == stride - 1
        # Stable sorts in place of masks: shapes must not depend on values.
        split = is_destination.byte().argsort(stable=True)
        num_destinations = tokens // stride
        source_index = split[: tokens - num_destinations]
        destination_index = split[tokens - num_destinations :]
    # In the order of the split; clamped, for nobody may have looked at a user's indices.
    last = max(tokens - 1, 0)
    listed = destination_index.long().clamp(0, last).expand(batch, -1)  # [B, Nd]
    sources = source_index.long().clamp(0, last).expand(batch, -1).sort(dim=1).values  # [B, Ns]
    destinations = listed.sort(dim=1).values

    taboo = (token < num_prefix).expand(batch, tokens)
    if protected is not None:
        taboo = taboo | protected
    # Eligible sources come first, protected ones as a last resort, prefix tokens never.
    grade = taboo.gather(1, sources).int() + (sources < num_prefix)  # [B, Ns]: 0, 1, 2
    open_to_sources = ~taboo.gather(1, destinations)
    score, choice = _search(_rows(x, sources), _rows(x, destinations), open_to_sources)
    score = torch.where(grade > 0, -math.inf, score)
    if destinations.shape[1] == 0:
        merged = torch.zeros_like(sources, dtype=torch.bool)
        target = sources
    else:
        target = destinations.gather(1, choice.clamp(min=0).long())  # [B, Ns]
        ranking = score.argsort(dim=1, descending=True, stable=True)
        ranking = ranking.gather(1, grade.gather(1, ranking).argsort(dim=1, stable=True))
        rank = ranking.argsort(dim=1)
        merged = (rank < r) & (grade < 2)
        if threshold is not None:
            merged = merged & (grade == 0) & (choice >= 0) & (score >= threshold)

    # The token that stands for each token's group: its destination if it merges, else itself.
    group = token.repeat(batch, 1).scatter(1, sources, torch.where(merged, target, sources))
    if order == "position" or r == 0:  # where nothing merges, the identity in either order
        first = torch.full_like(group, tokens).scatter_reduce(
            1, group, token.expand(batch, -1), "amin"
        )
        leader = first.gather(1, group)  # first member of each token's group
        number = (leader == token).cumsum(1) - 1
        assign = number.gather(1, leader)
    else:
        key = torch.ones(batch, tokens, dtype=torch.int64, device=x.device)
        key = key.scatter(1, sources, 2).scatter(1, listed, 3)
        key[:, :num_prefix] = 0
        within = token.repeat(batch, 1)
        if num_prefix == 0:
            by_score = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            within = within.scatter(1, sources, by_score)
        place = torch.arange(listed.shape[1], device=x.device).expand_as(listed)
        within = torch.where(key == 3, torch.zeros_like(within).scatter(1, listed, place), within)
        key = torch.where(group == token, key, 4) * tokens + within
        assign = key.argsort(dim=1).argsort(dim=1).gather(1, group)
    num_tokens = tokens if threshold is not None else tokens - r
    assign = torch.where(assign < num_tokens, assign, -1).int()
    counts = (tokens - merged.sum(dim=1)).int()
    offsets, members = invert(assign, num_tokens)
    return assign, offsets, members, counts


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: [B, N, D], [B, K] -> [B, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
