# SPDX-License-Identifier: Apache-2.0
"""Samples of the operators of matching."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...splits import grid, strided
from ...testing import random_tokens
from ...testing.samples import B, C, Call, N, Sample, Sizes, rows
from .api import match, nearest

#: Two lists of tokens, none; stride, grid_width, cell_height and cell of a pattern.
ALTERNATE = None, None, 2, 0, 1, None


def samples() -> Iterator[Sample]:
    """Every kind of split, mask, threshold and order."""
    mask = torch.tensor([[True, False, True, True, True, False, True]] * B)
    heads = random_tokens(B, 2, N, C, dtype=torch.bfloat16, layout="packed").requires_grad_()
    for similarity in ("cosine", "dot"):
        yield Sample("nearest", similarity, (rows(N), rows(N, seed=2), None, None, similarity))
    yield Sample("nearest", "masks", (rows(N), rows(N, seed=2), mask, ~mask, "cosine"))
    yield Sample("nearest", "heads", (heads, heads, None, None, "cosine"))

    metric = rows(N, requires_grad=False)
    limits = torch.linspace(0.05, 0.3, B)
    doubles = limits[0].expand(B).double()
    for name, arguments in {
        "plain": arguments_of_match(metric),
        "heads": arguments_of_match(heads.detach(), order="tome", similarity="dot"),
        "threshold": arguments_of_match(metric, 1, threshold=0.1),
        "protected": arguments_of_match(metric, protected=~mask[0], order="tome"),
        "protected-each": arguments_of_match(metric, protected=~mask, threshold=0.0),
        "thresholds": arguments_of_match(metric, 1, thresholds=limits),
        "thresholds-double": arguments_of_match(metric, thresholds=doubles),
    }.items():
        yield Sample("match", name, arguments)

    lists = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5])
    each = tuple(index.expand(B, -1).contiguous() for index in lists)
    cells = torch.tensor([[3], [1]], dtype=torch.int32)[torch.arange(B) % 2]
    no_grid = 1, 0, 1, None
    for kind, split in {
        "alternate": ALTERNATE,
        "lists": (*lists, *no_grid),
        "lists-each": (*each, *no_grid),
        "grid": (None, None, 2, 3, 2, None),
        "grid-cell": (None, None, 2, 3, 2, torch.tensor([2])),
        "grid-each": (None, None, 2, 3, 2, cells),
    }.items():
        yield Sample("match", f"split-{kind}", arguments_of_match(metric, 1, split=split))
        for protected in (None, ~mask[0], ~mask):
            name = f"{kind}-{0 if protected is None else protected.dim()}"
            search = metric, 1, protected, *split, True
            yield Sample("search", name, search)
            pairs = *torch.ops.tokenops.search(*search), N, 2, 1, protected, *split
            yield Sample("select", name, (*pairs, None, None, "position"))
            yield Sample("select", f"tome-{name}", (*pairs, 0.1, None, "tome"))
            yield Sample("select", f"thresholds-{name}", (*pairs, None, limits, "position"))


def arguments_of_match(
    metric: Tensor,
    num_prefix: int = 0,
    *,
    protected: Tensor | None = None,
    split: tuple[Any, ...] = ALTERNATE,
    threshold: float | None = None,
    thresholds: Tensor | None = None,
    order: str = "position",
    similarity: str = "cosine",
) -> tuple[Any, ...]:
    """Arguments of the operator."""
    return metric, 2, num_prefix, protected, *split, threshold, thresholds, order, similarity


def calls(sizes: Sizes) -> Iterator[Call]:
    """Every similarity and mask of ``nearest``; every split, order and limit of ``match``."""
    tokens, width = sizes.tokens, sizes.width
    a, b = sizes.rows(tokens, width), sizes.rows(tokens - 2, width, seed=1)
    keys = sizes.rows(sizes.heads * tokens, width, seed=2).unflatten(1, (sizes.heads, tokens))
    token = torch.arange(tokens, device=sizes.device)
    a_mask = (token % 3 != 1).expand(sizes.batch, tokens)
    b_mask = (token[2:] % 4 != 2).expand(sizes.batch, tokens - 2)
    masks: dict[str, Any] = {"a_mask": a_mask, "b_mask": b_mask}
    for name, options in (("cosine", {}), ("dot", {"similarity": "dot"}), ("masks", masks)):
        yield Call("nearest", name, partial(nearest, **options), {"a": a, "b": b}, chooses=True)
    yield Call("nearest", "heads", nearest, {"a": keys, "b": keys.flip(2)}, chooses=True)

    height = tokens // 3
    requests: dict[str, dict[str, Any]] = {
        "plain": {},
        "heads": {"num_prefix": 1},
        "tome order": {"order": "tome", "num_prefix": 1},
        "dot": {"similarity": "dot", "order": "tome"},
        "strided": {"split": strided(3)},
        "grid": {"split": grid(height, 3, 2, 2), "num_prefix": tokens - height * 3},
        "threshold": {"threshold": 0.1},
        "protected": {"protected": token % 5 == 3, "num_prefix": 1},
    }
    for name, options in requests.items():
        function = partial(_fields, r=tokens // 8 + 1, options=options)
        metric = keys if name == "heads" else a
        yield Call("match", name, function, {"metric": metric}, chooses=True)
    yield Call("match", "twice", partial(_twice, r=tokens // 8 + 1), {"metric": a}, chooses=True)


def _fields(metric: Tensor, r: int, options: dict[str, Any]) -> list[Tensor]:
    """Results of the operator match: fields of the token map."""
    token_map = match(metric, r, **options)
    fields = token_map.assign, token_map.offsets, token_map.members, token_map.counts
    return [field for field in fields if field is not None]


def _twice(metric: Tensor, r: int) -> list[Tensor]:
    """Match, merge the metric, match again, and compose both maps."""
    first = match(metric, r)
    token_map = match(first.merge(metric), r).compose(first)
    return [token_map.assign, token_map.offsets, token_map.members]
