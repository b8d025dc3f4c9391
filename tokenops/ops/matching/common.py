# SPDX-License-Identifier: Apache-2.0
"""What follows the search for the best pairs, in plain PyTorch: which merge, and into what.

Letters: B batch, N tokens, Ns sources, Nd destinations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sides(NamedTuple):
    """Sources and destinations by index, in range whatever a user gave.

    Attributes:
        sources: int64 ``[B, Ns]``, in the order of the split.
        destinations: int64 ``[B, Nd]``, ascending.
        listed: The destinations in the order of the split.
    """

    sources: Tensor
    destinations: Tensor
    listed: Tensor


def sides(
    batch: int,
    tokens: int,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    device: torch.device,
) -> Sides:
    """Sources and destinations of a split."""
    if source_index is None or destination_index is None:
        token = torch.arange(tokens, device=device)
        is_destination = token % stride == stride - 1
        # Stable sorts in place of masks: shapes must not depend on values.
        split = is_destination.byte().argsort(stable=True)
        num_destinations = tokens // stride
        source_index = split[: tokens - num_destinations]
        destination_index = split[tokens - num_destinations :]
    # In the order of the split; clamped, for nobody may have looked at a user's indices.
    last = max(tokens - 1, 0)
    listed = destination_index.long().clamp(0, last).expand(batch, -1)  # [B, Nd]
    sources = source_index.long().clamp(0, last).expand(batch, -1)  # [B, Ns]
    return Sides(sources, listed.sort(dim=1).values, listed)


def taboo(
    batch: int, tokens: int, num_prefix: int, protected: Tensor | None, device: torch.device
) -> Tensor:
    """Bool [B, N], true for tokens that take no part."""
    out = (torch.arange(tokens, device=device) < num_prefix).expand(batch, tokens)
    return out if protected is None else out | protected


def select(
    score: Tensor,
    choice: Tensor,
    split: Sides,
    closed: Tensor,
    r: int,
    num_prefix: int,
    threshold: float | None,
    order: str,
) -> tuple[Tensor, Tensor, int]:
    """Which sources merge, and where the groups stand.

    Args:
        score: ``[B, Ns]`` similarity of each source to its destination.
        choice: int ``[B, Ns]``, places of those among the destinations; -1 for none.
        split: Sources and destinations.
        closed: Bool ``[B, N]``, true for tokens that take no part.
        r: Number of sources to merge.
        num_prefix: So many first tokens never merge.
        threshold: See the operator's schema.
        order: See the operator's schema.

    Returns:
        Output token of each token, int32 ``[B, N]``; live output tokens, int32 ``[B]``; the number
        of output tokens.
    """
    sources, destinations, listed = split
    batch, tokens = closed.shape
    token = torch.arange(tokens, device=score.device)
    sources, by_token = sources.sort(dim=1)  # so that of equal scores the first token's comes first
    score, choice = score.gather(1, by_token), choice.gather(1, by_token)
    # Eligible sources come first, protected ones as a last resort, prefix tokens never.
    grade = closed.gather(1, sources).int() + (sources < num_prefix)  # [B, Ns]: 0, 1, 2
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
        key = torch.ones(batch, tokens, dtype=torch.int64, device=score.device)
        key = key.scatter(1, sources, 2).scatter(1, listed, 3)
        key[:, :num_prefix] = 0
        within = token.repeat(batch, 1)
        if num_prefix == 0:
            by_score = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            within = within.scatter(1, sources, by_score)
        place = torch.arange(listed.shape[1], device=score.device).expand_as(listed)
        within = torch.where(key == 3, torch.zeros_like(within).scatter(1, listed, place), within)
        key = torch.where(group == token, key, 4) * tokens + within
        assign = key.argsort(dim=1).argsort(dim=1).gather(1, group)
    num_tokens = tokens if threshold is not None else tokens - r
    assign = torch.where(assign < num_tokens, assign, -1).int()
    counts = (tokens - merged.sum(dim=1)).int()
    return assign, counts, num_tokens
