# SPDX-License-Identifier: Apache-2.0
"""Cases of merging: merge, merge_wavg, unmerge, and their backwards.

The match is made beforehand and not timed. tokenops and the recipes merge the same pairs, each in
its own order of output tokens: tokenops and *index* keep positions, the recipes put unmerged
sources first. A backward is ``autograd.grad`` on a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

import tokenops

from . import rivals
from .cases import Case, Shape, Work, generator, make_metric, randn, recipes, relative
from .timing import Call

#: Largest difference, relative to the largest entry, up to which a rival counts as doing the same.
#: The recipes add and divide in the dtype of the data.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_merging(
    shape: Shape, device: torch.device
) -> tuple[tokenops.TokenMap, rivals.ToMeMatch | rivals.GridMatch]:
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
    match = rivals.ToMeMatch(unmerged, merged, output[..., None].gather(1, merged) - kept)
    if shape.grid is None:
        return ours, match
    return ours, rivals.GridMatch(*match, src[None, :, None], dst[None, :, None])


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def setup(operator: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of an operator, or with ``_backward`` of its gradient with respect to the tokens."""
    backward, public = operator.endswith("_backward"), operator.removesuffix("_backward")
    token_map, match = make_merging(shape, device)
    batch, outputs = shape.batch, token_map.num_tokens
    start = torch.arange(batch, device=device)[:, None] * outputs
    row = (start + token_map.assign.long()).flatten()  # [B * N], output token through the batch
    if shape.grid is None:
        recipe_merge, recipe_unmerge = rivals.tome_merge, rivals.tome_unmerge
    else:
        recipe_merge, recipe_unmerge = rivals.tomesd_merge, rivals.tomesd_unmerge

    # Tokens, and output tokens in the order of tokenops and of the recipe: members are equal here.
    x = randn((batch, shape.tokens, shape.width), dtype, device)
    y = randn((batch, outputs, shape.width), dtype, device)
    y_recipe = recipe_merge(tokenops.unmerge(y, token_map), match, "amax")

    if public == "merge":
        counts = torch.bincount(row, minlength=batch * outputs).view(batch, outputs, 1).to(dtype)
        functions = (
            lambda t: tokenops.merge(t, token_map),
            lambda t: rivals.index_merge(t, row, counts),
            recipe_merge,
            lambda function, t: function(t, match, "mean"),
        )
    elif public == "merge_wavg":
        # Sizes are float32 for tokenops, and have the dtype of the data for the recipes.
        sizes = (batch, shape.tokens, 1)
        size = torch.randint(1, 5, sizes, generator=generator(device), device=device).float()
        rounded = size.to(dtype)
        functions = (
            lambda t: tokenops.merge_wavg(t, token_map, size),
            lambda t: rivals.index_merge_wavg(t, rounded, row, outputs),
            rivals.tome_merge_wavg,
            lambda function, t: function(t, rounded, match),
        )
    else:
        functions = (
            lambda t: tokenops.unmerge(t, token_map),
            lambda t: rivals.index_unmerge(t, row),
            recipe_unmerge,
            lambda function, t: function(t, match),
        )
    ours, index, eager, call_recipe = functions

    # The input and the gradient of the output, and the same for the recipe.
    inputs = ((y, y_recipe), (x, x)) if public == "unmerge" else ((x, x), (y, y_recipe))
    leaves, grads = inputs
    if backward:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def timed(function: Callable[[Tensor], Any], of_recipe: bool = False) -> Call:
        leaf, grad = leaves[of_recipe], grads[of_recipe]
        if not backward:
            return lambda: function(leaf)
        # A compiled backward otherwise overwrites saved tensors, and could run only once.
        functorch.donated_buffer = False
        out = _first(function(leaf))
        return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

    def difference(name: str, result: Any, expected: Any) -> float:
        result, expected = _first(result), _first(expected)
        if name in ("eager", "compile") and (public == "unmerge") == backward:  # output tokens
            result = recipe_unmerge(result, match)
            expected = tokenops.unmerge(expected, token_map)
        return relative(result, expected)

    return Work(
        rivals={
            "tokenops": lambda: timed(ours),
            **recipes(eager, lambda function: timed(partial(call_recipe, function), True)),
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


_VIT_B = Shape(32, 197, 768, 16, prefix=1)
_SD = Shape(2, 4096, 320, 2048, grid=(64, 64, 2, 2))
_CPU = {
    "merge": {
        "vit-b": _VIT_B,
        "vit-l-512": Shape(4, 1025, 1024, 40, prefix=1),
        "sd": _SD,
        "overhead": Shape(1, 16, 64, 4),
    },
    "merge_wavg": {"vit-b": _VIT_B},
    "unmerge": {"vit-b": _VIT_B, "sd": _SD},
    "merge_backward": {"vit-b": _VIT_B},
    "merge_wavg_backward": {"vit-b": _VIT_B},
    "unmerge_backward": {"vit-b": _VIT_B},
}
_CUDA = {
    "vit-b-256": replace(_VIT_B, batch=256),
    "vit-l-512-32": Shape(32, 1025, 1024, 40, prefix=1),
    "sd-2": _SD,
    "sd-16": replace(_SD, batch=16),
    "vlm-2880-4096": Shape(8, 2880, 4096, 1440),
}


def _case(operator: str, name: str, shape: Shape, **options: Any) -> Case:
    return Case(operator, name, shape, partial(setup, operator), **options)


CASES = (
    *(_case(op, name, shape) for op, shapes in _CPU.items() for name, shape in shapes.items()),
    *(_case(op, "vit-b-8", replace(_VIT_B, batch=8), on_request=True) for op in _CPU),
    *(
        _case(op, name, shape, device="cuda")
        for op in _CPU
        for name, shape in _CUDA.items()
        if shape.grid is None or "wavg" not in op  # Stable Diffusion has no sizes
    ),
)
