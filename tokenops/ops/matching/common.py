# SPDX-License-Identifier: Apache-2.0
"""Sides of a split, and what follows the search for the best pairs, in plain PyTorch.

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


def check_split(
    operator: str,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
) -> None:
    """A split is two lists, or a rule by numbers in their range.

    Raises:
        ValueError: If it is not.
    """
    for missing, other in (
        ("source_index", destination_index),
        ("destination_index", source_index),
    ):
        if other is not None and (source_index is None or destination_index is None):
            raise ValueError(
                f"{operator}: {missing} must be given where the other list is, got None and a list "
                f"of shape {list(other.shape)}"
            )
    if stride < 1 or grid_width < 0 or cell_height < 1:
        raise ValueError(
            f"{operator}: stride and cell_height must be >= 1 and grid_width >= 0, got {stride}, "
            f"{cell_height} and {grid_width}"
        )


def prefix_of(tokens: int, num_prefix: int) -> int:
    """Tokens of the prefix, of which there are no more than tokens."""
    if isinstance(tokens, int) and isinstance(num_prefix, int):
        return min(max(num_prefix, 0), tokens)  # sym_min of PyTorch 2.10 wants symbols when traced
    prefix: int = torch.sym_min(torch.sym_max(num_prefix, 0), tokens)
    return prefix


def counts(
    operator: str,
    tokens: int,
    num_prefix: int,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
) -> tuple[int, int]:
    """How many sources and destinations a rule gives, those of an alternation's prefix included.

    Raises:
        ValueError: If ``cell`` has not one entry for each whole cell of a grid.
    """
    if grid_width == 0:
        return tokens - tokens // stride, tokens // stride
    behind = tokens - prefix_of(tokens, num_prefix)
    cells = behind // grid_width // cell_height * (grid_width // stride)
    if cell is not None and cell.shape[-1] != cells:
        raise ValueError(
            f"{operator}: cell must have an entry for each of {cells} cells, got shape "
            f"{list(cell.shape)}"
        )
    return behind - cells, cells


def sides(
    operator: str,
    batch: int,
    tokens: int,
    num_prefix: int,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
    device: torch.device,
) -> Sides:
    """Sources and destinations of a split; see :class:`tokenops.splits.ResolvedSplit`."""
    rule = stride, grid_width, cell_height, cell
    check_split(operator, source_index, destination_index, *rule)
    if source_index is None or destination_index is None:
        token = torch.arange(tokens, device=device)
        num_sources, num_destinations = counts(operator, tokens, num_prefix, *rule)
        if grid_width == 0:
            kind = (token % stride == stride - 1).byte()
        else:
            place = token - prefix_of(tokens, num_prefix)
            y, x = place // grid_width, place % grid_width
            columns = grid_width // stride
            number = y // cell_height * columns + x // stride
            inside = (place >= 0) & (number < num_destinations) & (x // stride < columns)
            drawn = torch.zeros((), dtype=torch.int64, device=device)
            if cell is not None and num_destinations > 0:
                drawn = cell.long().clamp(0, cell_height * stride - 1)
                drawn = drawn[..., number.clamp(0, num_destinations - 1)]  # [N] or [B, N]
            is_destination = inside & (y % cell_height * stride + x % stride == drawn)
            kind = torch.where(place < 0, 2, is_destination.byte())  # the prefix is of neither side
        # Stable sorts in place of masks: shapes must not depend on values.
        split = kind.argsort(dim=-1, stable=True)
        source_index = split[..., :num_sources]
        destination_index = split[..., num_sources : num_sources + num_destinations]
    # In the order of the split; clamped, for nobody may have looked at a user's indices.
    last = max(tokens - 1, 0)
    listed = destination_index.long().clamp(0, last).expand(batch, -1)  # [B, Nd]
    sources = source_index.long().clamp(0, last).expand(batch, -1)  # [B, Ns]
    return Sides(sources, listed.sort(dim=1).values, listed)


def mergeable(tokens: int, r: int) -> int:
    """Tokens that an operator is to merge away: one is left, whatever was asked for."""
    return max(min(r, tokens - 1), 0)


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
    thresholds: Tensor | None,
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
        thresholds: See the operator's schema.
        order: See the operator's schema.

    Returns:
        Output token of each token, int32 ``[B, N]``; live output tokens, int32 ``[B]``; the number
        of output tokens.
    """
    sources, destinations, listed = split
    batch, tokens = closed.shape
    least = threshold if thresholds is None else thresholds.to(score.dtype)[:, None]
    r = mergeable(tokens, r)
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
        if least is not None:
            merged = merged & (grade == 0) & (choice >= 0) & (score >= least)

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
    num_tokens = tokens - r if least is None else tokens
    assign = torch.where(assign < num_tokens, assign, -1).int()
    counts = (tokens - merged.sum(dim=1)).clamp(max=num_tokens).int()
    return assign, counts, num_tokens
