# SPDX-License-Identifier: Apache-2.0
"""Functions in plain PyTorch that several implementations of merging share."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Index


def compose_assign(assign: Tensor, earlier: Tensor, num_tokens: int) -> Tensor:
    """Output token of each input token through two maps: [B, N], [B, N0] -> int32 [B, N0]."""
    tokens = assign.shape[1]
    slot = torch.where((earlier >= 0) & (earlier < tokens), earlier, tokens).long()
    composed = torch.nn.functional.pad(assign, (0, 1), value=-1).gather(1, slot)
    return torch.where((composed >= 0) & (composed < num_tokens), composed, -1)


def product_of_others(values: Tensor, index: Index, longest: int | None = None) -> Tensor:
    """Product of all other members of each token's segment, without dividing, as some may be zero.

    The product of the members before each one times the product of the members after it.

    Args:
        values: ``[B, N, C]`` in the dtype of sums.
        index: The token map.
        longest: Upper bound of the length of a segment; N if None.

    Returns:
        ``[B, N, C]``; zeros for dropped tokens.
    """
    sorted_values, segment = _sorted_by_segment(values, index)
    left = _product_before(sorted_values, segment, longest)
    right = _product_before(sorted_values.flip(1), segment.flip(1), longest).flip(1)
    # Entries after the last member go to an additional row, which is cut off.
    target = torch.where(index.members >= 0, index.members, values.shape[1]).long()
    out = torch.zeros_like(torch.nn.functional.pad(values, (0, 0, 0, 1)))
    return out.scatter(1, target[..., None].expand_as(values), left * right)[:, :-1]


def product(values: Tensor, index: Index, longest: int | None = None) -> Tensor:
    """Product of the members of each output token, 0 without members: [B, N, C] -> [B, M, C]."""
    offsets = index.offsets
    sorted_values, segment = _sorted_by_segment(values, index)
    through = sorted_values * _product_before(sorted_values, segment, longest)
    tokens = values.shape[1]
    last = torch.where(offsets.diff(dim=1) > 0, offsets[:, 1:] - 1, tokens)  # [B, M]
    padded = torch.nn.functional.pad(through, (0, 0, 0, 1))  # the last row is zero
    last = last.clamp(0, tokens).long()
    return padded.gather(1, last[..., None].expand(-1, -1, values.shape[2]))


def _sorted_by_segment(values: Tensor, index: Index) -> tuple[Tensor, Tensor]:
    """Rows in the order of ``members``: [B, N, C], and the output token of each of them [B, N]."""
    members = index.members
    order = members.clamp(0, values.shape[1] - 1).long()  # never out of bounds
    segment = torch.where(members >= 0, index.assign.gather(1, order), -1)
    return values.gather(1, order[..., None].expand_as(values)), segment


def _product_before(x: Tensor, segment: Tensor, longest: int | None) -> Tensor:
    """Exclusive scan: product of the rows before each row in its segment, by doubling."""
    x = _shift_in_segment(x, segment, 1)
    step = 1
    reach = x.shape[1] if longest is None else min(longest, x.shape[1])
    while step < reach:
        x = x * _shift_in_segment(x, segment, step)
        step *= 2
    return x


def _shift_in_segment(x: Tensor, segment: Tensor, step: int) -> Tensor:
    """Row ``step`` rows before each row; ones if that row is in another segment."""
    moved = torch.nn.functional.pad(x[:, :-step], (0, 0, step, 0), value=1.0)
    same = torch.nn.functional.pad(segment[:, :-step], (step, 0), value=-2) == segment
    return torch.where(same[..., None], moved, 1)
