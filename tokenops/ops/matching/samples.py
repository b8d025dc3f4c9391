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
from .arguments import Request, SplitArgs


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
    plain, tome, alternate = Request(2), Request(2, order="tome"), SplitArgs()
    for name, arguments in {
        "plain": (metric, "cosine", *plain, *alternate),
        "heads": (heads.detach(), "dot", *tome, *alternate),
        "threshold": (metric, "cosine", *Request(2, 0.1), *SplitArgs(1)),
        "protected": (metric, "cosine", *tome, *SplitArgs(0, ~mask[0])),
        "protected-each": (metric, "cosine", *Request(2, 0.0), *SplitArgs(0, ~mask)),
        "thresholds": (metric, "cosine", *Request(2, None, limits), *SplitArgs(1)),
        "thresholds-double": (metric, "cosine", *Request(2, None, doubles), *alternate),
    }.items():
        yield Sample("match", name, arguments)

    lists = {"src_index": torch.tensor([0, 1, 2, 3]), "dst_index": torch.tensor([4, 5])}
    each = {name: index.expand(B, -1).contiguous() for name, index in lists.items()}
    cells = torch.tensor([[3], [1]], dtype=torch.int32)[torch.arange(B) % 2]
    cellular = {"stride": 2, "grid_width": 3, "cell_height": 2}
    patterns: dict[str, dict[str, Any]] = {
        "alternate": {},
        "lists": lists,
        "lists-each": each,
        "grid": cellular,
        "grid-cell": {**cellular, "cell": torch.tensor([2])},
        "grid-each": {**cellular, "cell": cells},
    }
    for kind, pattern in patterns.items():
        split = SplitArgs(1, **pattern)
        yield Sample("match", f"split-{kind}", (metric, "cosine", *plain, *split))
        for protected in (None, ~mask[0], ~mask):
            name = f"{kind}-{0 if protected is None else protected.dim()}"
            split = SplitArgs(1, protected, **pattern)
            search = metric, "cosine", *split
            yield Sample("search", name, search)
            pairs = *torch.ops.tokenops.search(*search), N
            for limit, request in {
                "": plain,
                "tome-": Request(2, 0.1, None, "tome"),
                "thresholds-": Request(2, None, limits),
            }.items():
                yield Sample("select", f"{limit}{name}", (*pairs, *request, *split))


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
    """Fields of the token map that ``match`` returns."""
    token_map = match(metric, r, **options)
    fields = token_map.assign, token_map.offsets, token_map.members, token_map.counts
    return [field for field in fields if field is not None]


def _twice(metric: Tensor, r: int) -> list[Tensor]:
    """Match, merge the metric, match again, and compose both maps."""
    first = match(metric, r)
    token_map = match(first.merge(metric), r).compose(first)
    return [token_map.assign, token_map.offsets, token_map.members]
