# SPDX-License-Identifier: Apache-2.0
"""Sources and destinations of a split, and the selection of the pairs that merge.

Letters: B batch, N tokens, Ns sources, Nd destinations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Best, Map, Request, SplitArgs


class Sides(NamedTuple):
    """Sources and destinations by index, clamped to [0, N).

    Attributes:
        src: int64 ``[B, Ns]``, in the order of the split.
        dst: int64 ``[B, Nd]``, ascending.
        dst_listed: The destinations in the order of the split.
    """

    src: Tensor
    dst: Tensor
    dst_listed: Tensor


class Counts(NamedTuple):
    """Number of sources and destinations, and how many of them are in the prefix.

    With a stride, tokens of the prefix also count as sources or destinations; with lists or a grid
    they do not.
    """

    num_src: int
    num_dst: int
    prefix_src: int = 0
    prefix_dst: int = 0


def check_split(operator: str, split: SplitArgs) -> None:
    """Check that a split has both lists or none, and that the numbers of its pattern are in range.

    Raises:
        ValueError: If it is not.
    """
    for missing, index, other in (
        ("src_index", split.src_index, split.dst_index),
        ("dst_index", split.dst_index, split.src_index),
    ):
        if index is None and other is not None:
            raise ValueError(
                f"{operator}: {missing} must be given if the other list is, got None and a list "
                f"of shape {list(other.shape)}"
            )
    if split.stride < 1 or split.grid_width < 0 or split.cell_height < 1:
        raise ValueError(
            f"{operator}: stride and cell_height must be >= 1 and grid_width >= 0, got "
            f"{split.stride}, {split.cell_height} and {split.grid_width}"
        )


def prefix_of(tokens: int, num_prefix: int) -> int:
    """Number of tokens in the prefix: ``num_prefix`` clamped to [0, tokens]."""
    if isinstance(tokens, torch.SymInt) or isinstance(num_prefix, torch.SymInt):
        prefix: int = torch.sym_min(torch.sym_max(num_prefix, 0), tokens)
        return prefix
    return min(max(num_prefix, 0), tokens)  # sizes are tensors under torch.jit.trace


def count_sides(operator: str, tokens: int, split: SplitArgs) -> Counts:
    """Count the sources and destinations of a split.

    Raises:
        ValueError: If ``cell`` does not have one entry for each whole cell of a grid.
    """
    if split.src_index is not None and split.dst_index is not None:
        return Counts(split.src_index.shape[-1], split.dst_index.shape[-1])
    prefix, stride = prefix_of(tokens, split.num_prefix), split.stride
    if split.grid_width == 0:
        num_dst, prefix_dst = tokens // stride, prefix // stride
        return Counts(tokens - num_dst, num_dst, prefix - prefix_dst, prefix_dst)
    after, cell = tokens - prefix, split.cell
    cells = after // split.grid_width // split.cell_height * (split.grid_width // stride)
    if cell is not None and cell.shape[-1] != cells:
        raise ValueError(
            f"{operator}: cell must have an entry for each of {cells} cells, got shape "
            f"{list(cell.shape)}"
        )
    return Counts(after - cells, cells)


def sides(operator: str, batch: int, tokens: int, split: SplitArgs, device: torch.device) -> Sides:
    """List the sources and destinations of a split."""
    check_split(operator, split)
    src, dst = split.src_index, split.dst_index
    if src is None or dst is None:
        token = torch.arange(tokens, device=device)
        num_src, num_dst, *_ = count_sides(operator, tokens, split)
        width, stride, cell = split.grid_width, split.stride, split.cell
        if width == 0:
            kind = (token % stride == stride - 1).byte()
        else:
            after = token - prefix_of(tokens, split.num_prefix)
            y, x = after // width, after % width
            columns = width // stride
            number = y // split.cell_height * columns + x // stride  # of the cell
            inside = (after >= 0) & (number < num_dst) & (x // stride < columns)
            offset = torch.zeros((), dtype=torch.int64, device=device)
            if cell is not None and num_dst > 0:
                offset = cell.long().clamp(0, split.cell_height * stride - 1)
                offset = offset[..., number.clamp(0, num_dst - 1)]  # [N] or [B, N]
            is_dst = inside & (y % split.cell_height * stride + x % stride == offset)
            kind = torch.where(after < 0, 2, is_dst.byte())  # a grid excludes the prefix
        # Stable sorts instead of masks: shapes must not depend on values.
        order = kind.argsort(dim=-1, stable=True)
        src, dst = order[..., :num_src], order[..., num_src : num_src + num_dst]
    # Clamped, because the values of a user's indices may be unchecked.
    last = max(tokens - 1, 0)
    dst = dst.long().clamp(0, last).expand(batch, -1)  # [B, Nd]
    src = src.long().clamp(0, last).expand(batch, -1)  # [B, Ns]
    return Sides(src, dst.sort(dim=1).values, dst)


def mergeable(tokens: int, r: int) -> int:
    """Number of tokens to merge away: ``r`` clamped so that one token is left."""
    return max(min(r, tokens - 1), 0)


def protected_tokens(batch: int, tokens: int, split: SplitArgs, device: torch.device) -> Tensor:
    """Bool [B, N], true for tokens of the prefix and protected ones."""
    prefix = (torch.arange(tokens, device=device) < split.num_prefix).expand(batch, tokens)
    return prefix if split.protected is None else prefix | split.protected


def rank_sources(
    node_max: Tensor, src: Tensor, protected: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank sources: grade 0 merges first, grade 1 as a last resort, grade 2 never.

    Args:
        node_max: ``[B, Ns]`` score of each source, in the order of their tokens.
        src: ``[B, Ns]`` tokens of the sources, ascending.
        protected: Bool ``[B, N]``, true for protected tokens, which have grade 1.
        prefix: Number of tokens in the prefix, which have grade 2.

    Returns:
        Scores, with -inf for grades above 0; grades; indices of the sources by descending score;
        indices by grade, then descending score. Ties are in the order of sources.
    """
    grade = protected.gather(1, src).int() + (src < prefix)
    node_max = node_max.masked_fill(grade > 0, -math.inf)
    by_score = node_max.argsort(dim=1, descending=True, stable=True)
    by_grade = grade.gather(1, by_score).argsort(dim=1, stable=True)
    return node_max, grade, by_score, by_score.gather(1, by_grade)


def thresholds(request: Request, dtype: torch.dtype) -> float | Tensor | None:
    """Minimum similarity of a pair that merges: a float, [B, 1] with one per image, or None."""
    if request.thresholds is None:
        return request.threshold
    return request.thresholds.to(dtype)[:, None]


def select(
    best: Best,
    tokens: int,
    request: Request,
    split: SplitArgs,
    invert: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> Map:
    """Select the sources that merge and make the token map.

    Args:
        best: The best destination of each source.
        tokens: Number of tokens N.
        request: What to merge and how to order the output tokens.
        split: Sources and destinations.
        invert: Makes ``offsets`` and ``members`` from ``assign`` and the number of output tokens.
    """
    (batch, _), device = best.node_max.shape, best.node_max.device
    src, dst, dst_listed = sides("select", batch, tokens, split, device)
    protected = protected_tokens(batch, tokens, split, device)
    prefix, r = max(split.num_prefix, 0), mergeable(tokens, request.r)
    least = thresholds(request, best.node_max.dtype)
    token = torch.arange(tokens, device=device)
    src, by_token = src.sort(dim=1)  # ties go to the lowest token
    node_max, node_idx = best.node_max.gather(1, by_token), best.node_idx.gather(1, by_token)
    node_max, grade, by_score, ranking = rank_sources(node_max, src, protected, prefix)
    if dst.shape[1] == 0:
        merged = torch.zeros_like(src, dtype=torch.bool)
        target = src
    else:
        target = dst.gather(1, node_idx.clamp(min=0).long())  # [B, Ns]
        merged = (ranking.argsort(dim=1) < r) & (grade < 2)
        if least is not None:
            merged = merged & (grade == 0) & (node_idx >= 0) & (node_max >= least)

    # The root of a token is its destination if it merges, else the token itself.
    root = token.repeat(batch, 1).scatter(1, src, torch.where(merged, target, src))
    if request.order == "position" or r == 0:  # if nothing merges, both orders are the identity
        first = torch.full_like(root, tokens).scatter_reduce(
            1, root, token.expand(batch, -1), "amin"
        )
        leader = first.gather(1, root)  # first member of each token's segment
        number = (leader == token).cumsum(1) - 1
        assign = number.gather(1, leader)
    else:
        # Prefix 0, tokens of neither side 1, unmerged sources 2, destinations 3, merged sources 4.
        key = torch.ones(batch, tokens, dtype=torch.int64, device=device)
        key = key.scatter(1, src, 2).scatter(1, dst_listed, 3)
        key[:, :prefix] = 0
        within = token.repeat(batch, 1)
        if prefix == 0:
            within = within.scatter(1, src, by_score.argsort(dim=1))
        index = torch.arange(dst_listed.shape[1], device=device).expand_as(dst_listed)
        listed = torch.zeros_like(within).scatter(1, dst_listed, index)
        within = torch.where(key == 3, listed, within)
        key = torch.where(root == token, key, 4) * tokens + within
        assign = key.argsort(dim=1).argsort(dim=1).gather(1, root)
    outputs = tokens - r if least is None else tokens
    assign = torch.where(assign < outputs, assign, -1).int()
    counts = (tokens - merged.sum(dim=1)).clamp(max=outputs).int()
    return Map(assign, *invert(assign, outputs), counts)
