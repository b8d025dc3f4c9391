# SPDX-License-Identifier: Apache-2.0
"""Workload of matching: from the metric to what merging needs.

That is a token map for tokenops and index tensors for the recipes. The rivals may choose other
pairs where similarities are close, above all in bfloat16, where the recipes round each score to
eight bits: what is compared is the mean similarity of the pairs that merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops import TokenMap

from . import rivals
from .cases import Shape, Work, compiled, make_metric, triton_rival, use_reference
from .timing import Rival

#: Difference of mean cosines up to which a rival counts as matching as well.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def setup_match(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of ``match``."""
    metric = make_metric(shape, dtype, device)
    split = shape.split()
    eager = rivals.tome_match if shape.grid is None else rivals.tomesd_match

    def ours() -> TokenMap:
        return tokenops.match(metric, shape.r, num_prefix=shape.prefix, split=split)

    def recipe(function: Callable[..., Any]) -> Rival:
        if shape.grid is None:
            return Rival(lambda: function(metric, shape.r, shape.prefix > 0))
        recipe_split = rivals.tomesd_split(*shape.grid, device)
        return Rival(lambda: function(metric, shape.r, *recipe_split))

    def product() -> tuple[Tensor, Tensor]:
        rows = metric.mean(1) if metric.dim() == 4 else metric
        sources, destinations = shape.split_index(device)
        return rows[:, sources], rows[:, destinations].transpose(1, 2)

    def bmm() -> Rival:
        a, b = product()
        return Rival(lambda: a @ b)

    def bmm_max() -> Rival:
        a, b = product()
        return Rival(lambda: (a @ b).max(dim=2))

    def difference(name: str, result: Any, expected: TokenMap) -> float:
        best = mean_similarity(metric, shape, expected)
        return best - mean_similarity(metric, shape, result)

    sources = shape.num_sources()
    return Work(
        rivals={
            "tokenops": lambda: Rival(ours),
            "reference": lambda: Rival(ours, use_reference),
            **triton_rival("match", ours, metric),
            "eager": lambda: recipe(eager),
            "compile": lambda: recipe(compiled(eager)),
            "bmm": bmm,
            "bmm+max": bmm_max,
        },
        bytes=metric.numel() * metric.element_size(),
        flops=2 * shape.batch * sources * (shape.tokens - sources) * shape.width,
        difference=difference,
        tolerance=TOLERANCE[dtype],
        tensor=metric,
    )


def mean_similarity(metric: Tensor, shape: Shape, result: Any) -> float:
    """Mean cosine of the pairs that merge, in float64: what a matching is to maximise.

    Args:
        metric: ``[B, N, D]`` or ``[B, H, N, D]``.
        shape: Sizes of the case.
        result: A token map, or the index tensors of a recipe.
    """
    rows = metric.double()
    rows = rows.mean(1) if rows.dim() == 4 else rows
    source, destination = _pairs(shape, result, metric.device)
    width = rows.shape[2]
    a = rows.gather(1, source[..., None].expand(-1, -1, width))
    b = rows.gather(1, destination[..., None].expand(-1, -1, width))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=2).mean())


def _pairs(shape: Shape, result: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, r] that merge, and the destinations [B, r] that they merge into."""
    sources, destinations = shape.split_index(device)
    if isinstance(result, rivals.GridPlan):  # its sort need not keep the order of sources
        sources, destinations = result.sources[0, :, 0], result.destinations[0, :, 0]
    if not isinstance(result, TokenMap):
        return sources[result.merged[..., 0]], destinations[result.target[..., 0]]
    assign = result.assign.long()
    batch = assign.shape[0]
    owner = torch.full((batch, result.num_tokens), -1, device=device)  # destination of each output
    owner.scatter_(1, assign[:, destinations], destinations.expand(batch, -1))
    target = owner.gather(1, assign[:, sources])  # [B, Ns]
    order = (target < 0).int().argsort(dim=1, stable=True)[:, : shape.r]  # merged sources first
    return sources[order], target.gather(1, order)
