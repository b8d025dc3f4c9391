# SPDX-License-Identifier: Apache-2.0
"""Cases of merging: merge, merge_wavg, unmerge, and their backwards.

The match is made beforehand and not timed. tokenops and the recipes merge the same pairs, each in
its own order of output tokens: tokenops and *index* keep positions, the recipes put unmerged
sources first. A backward is ``autograd.grad`` on a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

import tokenops

from . import rivals
from .cases import Case, Shape, Work, cases_of, generator, make_metric, randn, recipes, relative
from .timing import Call

#: Largest difference, relative to the largest entry, up to which a rival counts as doing the same.
#: The recipes add and divide in the dtype of the data.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_match(shape: Shape, device: torch.device) -> tuple[tokenops.TokenMap, rivals.Match]:
    """The same match of a random metric, in the form of tokenops and of the recipes."""
    metric = make_metric(replace(shape, width=min(64, shape.width), heads=0), torch.float32, device)
    split = shape.split()
    ours, tome = (
        tokenops.match(metric, shape.r, num_prefix=shape.prefix, split=split, order=order)
        for order in ("position", "tome")
    )
    src, dst = shape.split_index(device)
    output = tome.assign.long()[:, src]  # [B, Ns]: unmerged sources come before all destinations
    order = output.argsort(dim=1)
    kept = len(src) - shape.r
    # The recipes list merged sources by similarity, which is no order of memory.
    shuffle = torch.randperm(shape.r, generator=generator(device), device=device)
    unmerged, merged = order[:, :kept, None], order[:, kept:][:, shuffle, None]
    target = output[..., None].gather(1, merged) - kept
    index = (src[None, :, None], dst[None, :, None]) if shape.grid else ()
    return ours, rivals.Match(unmerged, merged, target, *index)


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def setup(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of an operator, or with ``_backward`` of its gradient with respect to the tokens."""
    backward, public = operator.endswith("_backward"), operator.removesuffix("_backward")
    token_map, match = make_match(shape, device)
    batch, outputs = shape.batch, token_map.num_tokens
    start = torch.arange(batch, device=device)[:, None] * outputs
    row = (start + token_map.assign.long()).flatten()  # [B * N], output token through the batch

    # Tokens, and output tokens in the order of tokenops and of the recipe: members are equal here.
    x = randn((batch, shape.tokens, shape.width), dtype, device)
    y = randn((batch, outputs, shape.width), dtype, device)
    y_recipe = rivals.merge(tokenops.unmerge(y, token_map), match, "amax")

    # Of each: tokenops, the index, and the arguments of the recipe.
    if public == "merge":
        counts = torch.bincount(row, minlength=batch * outputs).view(batch, outputs, 1).to(dtype)
        ours, index = tokenops.merge, lambda t: rivals.index_merge(t, row, counts)
        arguments = (token_map,), (match, "mean")
    elif public == "merge_wavg":
        # Sizes are float32 for tokenops, and have the dtype of the data for the recipes.
        sizes = (batch, shape.tokens, 1)
        size = torch.randint(1, 5, sizes, generator=generator(device), device=device).float()
        rounded = size.to(dtype)
        ours, index = (
            tokenops.merge_wavg,
            lambda t: rivals.index_merge_wavg(t, rounded, row, outputs),
        )
        arguments = (token_map, size), (rounded, match)
    else:
        ours, index = tokenops.unmerge, lambda t: rivals.index_unmerge(t, row)
        arguments = (token_map,), (match,)

    def timed(function: Callable[..., Any], of_recipe: bool = False, *arguments: Any) -> Call:
        leaf, grad = x, y_recipe if of_recipe else y
        if public == "unmerge":
            leaf, grad = grad, leaf
        if not backward:
            return lambda: function(leaf, *arguments)
        # A compiled backward otherwise overwrites saved tensors, and could run only once.
        functorch.donated_buffer = False
        leaf = leaf.detach().requires_grad_()
        out = _outputs(function(leaf, *arguments))[0]
        return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    def difference(name: str, result: Any, expected: Any) -> float:
        result, expected = _outputs(result), _outputs(expected)
        if name in ("eager", "compile") and (public == "unmerge") == backward:  # output tokens
            result = tuple(rivals.unmerge(out, match) for out in result)
            expected = tuple(tokenops.unmerge(out, token_map) for out in expected)
        return relative(result, expected)

    return Work(
        rivals={
            "tokenops": lambda: timed(ours, False, *arguments[0]),
            **recipes(getattr(rivals, public), lambda recipe: timed(recipe, True, *arguments[1])),
            "index": lambda: timed(index),
        },
        # each row is read once and each row is written once, forward or backward
        bytes=x.element_size() * batch * shape.width * (shape.tokens + outputs),
        flops=0,
        difference=difference,
        tolerance=TOLERANCE[dtype],
        tensor=x,
        inference=not backward,
    )


#: Operators that take sizes, which Stable Diffusion does not have.
WITH_SIZES = ("merge_wavg", "merge_wavg_backward")

_VIT_B = Shape(32, 197, 768, 16, prefix=1)
_VIT_L = Shape(4, 1025, 1024, 40, prefix=1)
_SD = Shape(2, 4096, 320, 2048, grid=(64, 64, 2, 2))
_CPU = {
    "merge": {
        "vit-b": _VIT_B,
        "vit-l-512": _VIT_L,
        "sd": _SD,
        "overhead": Shape(1, 16, 64, 4),
    },
    "merge_wavg": {"vit-b": _VIT_B},
    "unmerge": {"vit-b": _VIT_B, "sd": _SD},
    "merge_backward": {"vit-b": _VIT_B},
    "merge_wavg_backward": {"vit-b": _VIT_B},
    "unmerge_backward": {"vit-b": _VIT_B},
}
_ON_REQUEST = {"vit-b-8": replace(_VIT_B, batch=8)}
_CUDA = {
    "vit-b-256": replace(_VIT_B, batch=256),
    "vit-l-512-32": replace(_VIT_L, batch=32),
    "sd-2": _SD,
    "sd-16": replace(_SD, batch=16),
    "vlm-2880-4096": Shape(8, 2880, 4096, 1440),
}


def _cases(shapes: Mapping[str, Mapping[str, Shape]], **options: Any) -> list[Case]:
    return [
        case
        for operator, of in shapes.items()
        for case in cases_of(operator, partial(setup, operator), of, **options)
        if case.shape.grid is None or operator not in WITH_SIZES
    ]


CASES = (
    *_cases(_CPU),
    *_cases(dict.fromkeys(_CPU, _ON_REQUEST), on_request=True),
    *_cases(dict.fromkeys(_CPU, _CUDA), device="cuda"),
)
