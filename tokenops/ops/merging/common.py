# SPDX-License-Identifier: Apache-2.0
"""What implementations of merging share, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import Index


def route(assign: Tensor, earlier: Tensor, num_tokens: int) -> Tensor:
    """Output token of each input token through two maps: [B, N], [B, N0] -> int32 [B, N0]."""
    tokens = assign.shape[1]
    slot = torch.where((earlier >= 0) & (earlier < tokens), earlier, tokens).long()
    through = torch.nn.functional.pad(assign, (0, 1), value=-1).gather(1, slot)
    return torch.where((through >= 0) & (through < num_tokens), through, -1)


def product_of_others(
    values: Tensor, assign: Tensor, members: Tensor, largest: int | None = None
) -> Tensor:
    """Product of all other members of each token's output token, right where some are zero.

    The product of those before it times the product of those behind it.

    Args:
        values: ``[B, N, C]`` in the type of sums.
        assign: int32 ``[B, N]``.
        members: int32 ``[B, N]``.
        largest: No output token has more members; N if None.

    Returns:
        ``[B, N, C]``; zeros where a token is dropped.
    """
    sorted_values, group = _by_group(values, assign, members)
    left = _product_before(sorted_values, group, largest)
    right = _product_before(sorted_values.flip(1), group.flip(1), largest).flip(1)
    # Entries past the last member go to a row of their own, which is cut off.
    target = torch.where(members >= 0, members, values.shape[1]).long()
    out = torch.zeros_like(torch.nn.functional.pad(values, (0, 0, 0, 1)))
    return out.scatter(1, target[..., None].expand_as(values), left * right)[:, :-1]


def product(values: Tensor, index: Index, largest: int | None = None) -> Tensor:
    """Product of the members of each output token, 0 without any: [B, N, C] -> [B, M, C]."""
    assign, offsets, members = index
    sorted_values, group = _by_group(values, assign, members)
    through = sorted_values * _product_before(sorted_values, group, largest)
    some = offsets.diff(dim=1) > 0  # [B, M]
    tokens = values.shape[1]
    last = torch.where(some, offsets[:, 1:] - 1, tokens).clamp(0, tokens).long()
    padded = torch.nn.functional.pad(through, (0, 0, 0, 1))  # the last row is zero
    return padded.gather(1, last[..., None].expand(-1, -1, values.shape[2]))


def _by_group(values: Tensor, assign: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Members of output token 0 first, then those of 1, ...: [B, N, C], and which token it is."""
    order = members.clamp(0, values.shape[1] - 1).long()  # [B, N]; in range, whoever made it
    group = torch.where(members >= 0, assign.gather(1, order), -1)
    return values.gather(1, order[..., None].expand_as(values)), group


def _product_before(x: Tensor, group: Tensor, largest: int | None) -> Tensor:
    """Product of all rows of the same group before each one; its reach doubles at each step."""
    x = _shift_in_group(x, group, 1)
    step = 1
    reach = x.shape[1] if largest is None else min(largest, x.shape[1])
    while step < reach:
        x = x * _shift_in_group(x, group, step)
        step *= 2
    return x


def _shift_in_group(x: Tensor, group: Tensor, step: int) -> Tensor:
    """Entry ``step`` places before each one, or one where that lies in another group."""
    moved = torch.nn.functional.pad(x[:, :-step], (0, 0, step, 0), value=1.0)
    same = torch.nn.functional.pad(group[:, :-step], (step, 0), value=-2) == group
    return torch.where(same[..., None], moved, 1)
