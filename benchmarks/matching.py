# SPDX-License-Identifier: Apache-2.0
"""Cases of matching: from the metric to a token map, or to the index tensors of the recipes.

A rival may take other pairs where similarities are close, above all in bfloat16, where the recipes
round each score to eight bits: compared is the mean similarity of the pairs that merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops import TokenMap

from . import rivals
from .cases import Case, Shape, Work, cases_of, make_metric, recipes, relative
from .timing import Call

#: Difference of mean cosines up to which a rival counts as matching as well.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def setup_match(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    metric = make_metric(shape, dtype, device)
    split, split_index = shape.split(), shape.split_index(device)
    index = rivals.tomesd_split(*shape.grid, device) if shape.grid else ()

    def ours() -> TokenMap:
        return tokenops.match(metric, shape.r, num_prefix=shape.prefix, split=split)

    def recipe(match: Callable[..., Any]) -> Call:
        return lambda: match(metric, shape.r, shape.prefix > 0, *index)

    def product(then: Callable[[Tensor], Any]) -> Call:
        rows = metric.mean(1) if metric.dim() == 4 else metric
        src, dst = (rows[:, index] for index in split_index)
        return lambda: then(src @ dst.transpose(1, 2))

    def difference(name: str, result: Any, expected: TokenMap) -> float:
        return mean_similarity(metric, shape, expected) - mean_similarity(metric, shape, result)

    num_src, num_dst = map(len, split_index)
    return Work(
        rivals={
            "tokenops": lambda: ours,
            **recipes(rivals.match, recipe),
            "bmm": lambda: product(lambda scores: scores),
            "bmm+max": lambda: product(lambda scores: scores.max(dim=2)),
        },
        bytes=metric.numel() * metric.element_size(),
        flops=2 * shape.batch * num_src * num_dst * shape.width,
        difference=difference,
        tolerance=TOLERANCE[dtype],
        tensor=metric,
    )


def setup_nearest(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """The search of ``match`` alone."""
    metric = make_metric(shape, dtype, device)
    a, b = (metric[:, index] for index in shape.split_index(device))
    return Work(
        rivals={
            "tokenops": lambda: lambda: tokenops.nearest(a, b),
            **recipes(rivals.nearest, lambda function: lambda: function(a, b)),
        },
        bytes=metric.numel() * metric.element_size(),
        flops=2 * shape.batch * a.shape[1] * b.shape[1] * shape.width,
        difference=lambda name, result, expected: relative(result[0], expected[0]),
        tolerance=TOLERANCE[dtype],
        tensor=a,
    )


def mean_similarity(metric: Tensor, shape: Shape, result: Any) -> float:
    """Mean cosine of the pairs that merge, in float64: the aim of a matching.

    ``result`` is a token map, or the index tensors of a recipe.
    """
    rows = metric.double()
    rows = rows.mean(1) if rows.dim() == 4 else rows
    src, dst = (
        rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
        for index in _pairs(shape, result, metric.device)
    )
    return float(torch.nn.functional.cosine_similarity(src, dst, dim=2).mean())


def _pairs(shape: Shape, result: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, r] that merge, and the destinations [B, r] that they merge into."""
    src, dst = shape.split_index(device)
    if isinstance(result, rivals.Match):
        if result.src_index is not None:  # its sort need not keep the order of sources
            src, dst = result.src_index[0, :, 0], result.dst_index[0, :, 0]
        return src[result.merged[..., 0]], dst[result.target[..., 0]]
    assign = result.assign.long()
    batch = assign.shape[0]
    owner = torch.full((batch, result.num_tokens), -1, device=device)  # destination of each output
    owner.scatter_(1, assign[:, dst], dst.expand(batch, -1))
    target = owner.gather(1, assign[:, src])  # [B, Ns]
    order = (target < 0).int().argsort(dim=1, stable=True)[:, : shape.r]  # merged sources first
    return src[order], target.gather(1, order)


_VIT_B = Shape(32, 197, 64, 16, prefix=1)
_VIT_L = Shape(4, 1025, 64, 40, prefix=1)
_SD = Shape(2, 4096, 320, 2048, grid=(64, 64, 2, 2))
_N16384 = Shape(2, 16384, 320, 8192, grid=(128, 128, 2, 2))
_N65536 = Shape(1, 65536, 64, 32768, grid=(256, 256, 2, 2))
_CPU = {
    "vit-b": _VIT_B,
    "vit-b-qkv": replace(_VIT_B, heads=12),
    "vit-l-512": _VIT_L,
    "sd": _SD,
    "n16384": _N16384,
}
_ON_REQUEST = {
    "vit-b-8": replace(_VIT_B, batch=8),
    "vit-b-8-qkv": replace(_VIT_B, batch=8, heads=12),
    "sd-cpu": _SD,
}
_CUDA = {
    "vit-b-256": replace(_VIT_B, batch=256),
    "vit-b-256-qkv": replace(_VIT_B, batch=256, heads=12),
    "vit-l-512-32": replace(_VIT_L, batch=32),
    "sd-2": _SD,
    "sd-16": replace(_SD, batch=16),
    "n16384-320": _N16384,
    "n16384-640": replace(_N16384, width=640),
    "vlm-2880": Shape(8, 2880, 64, 1440),
}
_MEMORY = {"sd": ("tokenops", "eager"), "n16384": ("tokenops", "reference", "eager")}
_TOO_LARGE = "not run: it stores 49152 x 16384 scores, 3.2 GB in float32"
_SKIP = dict.fromkeys(("eager", "compile", "bmm", "bmm+max"), _TOO_LARGE)

CASES = (
    *cases_of("match", setup_match, _CPU, _MEMORY),
    Case("match", "n65536", _N65536, setup_match, skip=_SKIP, memory=("tokenops",)),
    Case("nearest", "vit-b", _VIT_B, setup_nearest),
    *cases_of("match", setup_match, _ON_REQUEST, on_request=True),
    *cases_of("match", setup_match, _CUDA, device="cuda"),
    Case("nearest", "vit-b-256", _CUDA["vit-b-256"], setup_nearest, device="cuda"),
)
