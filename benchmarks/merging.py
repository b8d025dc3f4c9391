# SPDX-License-Identifier: Apache-2.0
"""Workloads of merging: merge, merge_wavg, unmerge, and their backwards.

Who merges into whom is settled before and not timed. tokenops and the recipes apply one and the
same merging, each with its own order of output tokens: tokenops and *index* keep positions, the
recipes put unmerged sources first. A backward is ``autograd.grad`` on a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops import TokenMap

from . import rivals
from .cases import Shape, Work, compiled, generator, make_metric, triton_rival, use_reference
from .timing import Rival

#: Largest difference, relative to the largest entry, up to which a rival counts as doing the same.
#: The recipes add and divide in the type of the data.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Merging:
    """One merging in tokenops' and in the recipes' form.

    Attributes:
        token_map: Output tokens in the order of their positions.
        plan: Index tensors of the recipe.
        place: ``[B, M]``, place among tokenops' output tokens of each of the recipe's.
        row: ``[B * N]``, output token of each token, counted through the batch.
    """

    token_map: TokenMap
    plan: rivals.Plan | rivals.GridPlan
    place: Tensor
    row: Tensor

    def counts(self, dtype: torch.dtype) -> Tensor:
        """Members of each output token, [B, M, 1]."""
        batch, outputs = self.place.shape
        members = torch.bincount(self.row, minlength=batch * outputs)
        return members.view(batch, outputs, 1).to(dtype)

    def to_recipe(self, y: Tensor) -> Tensor:
        """Reorder [B, M, C] from tokenops' order of output tokens to the recipe's."""
        return y.gather(1, self.place[..., None].expand(-1, -1, y.shape[2]))

    def from_recipe(self, y: Tensor) -> Tensor:
        """Reorder [B, M, C] from the recipe's order of output tokens to tokenops'."""
        index = self.place.argsort(dim=1)
        return y.gather(1, index[..., None].expand(-1, -1, y.shape[2]))


def make_merging(shape: Shape, device: torch.device) -> Merging:
    """Match a random metric."""
    metric = make_metric(replace(shape, width=min(64, shape.width), heads=0), torch.float32, device)
    split = shape.split()
    ours = tokenops.match(metric, shape.r, num_prefix=shape.prefix, split=split)
    tome = tokenops.match(metric, shape.r, num_prefix=shape.prefix, split=split, order="tome")
    assign = tome.assign.long()
    place = torch.zeros(shape.batch, tome.num_tokens, dtype=torch.int64, device=device)
    place.scatter_(1, assign, ours.assign.long())

    sources, destinations = shape.split_index(device)
    output = assign[:, sources]  # [B, Ns]: unmerged sources come before all destinations
    order = output.argsort(dim=1)
    kept = sources.shape[0] - shape.r
    # The recipes list merged sources by similarity, which is no order of memory.
    shuffle = torch.randperm(shape.r, generator=generator(device), device=device)
    unmerged, merged = order[:, :kept, None], order[:, kept:][:, shuffle, None]
    target = output[..., None].gather(1, merged) - kept
    plan: rivals.Plan | rivals.GridPlan = rivals.Plan(unmerged, merged, target)
    if shape.grid is not None:
        split_index = sources[None, :, None], destinations[None, :, None]
        plan = rivals.GridPlan(unmerged, merged, target, *split_index)
    start = torch.arange(shape.batch, device=device)[:, None] * ours.num_tokens
    return Merging(ours, plan, place, (start + ours.assign.long()).flatten())


@dataclass(frozen=True)
class Pair:
    """An operator and its recipe as functions of one tensor.

    Attributes:
        x: Input of tokenops.
        x_recipe: The same tokens as the recipe orders them.
        ours: tokenops as a function of ``x``.
        index: The same by an index of rows.
        recipe: ``(function, x_recipe)``: the recipe by this function, eager or compiled.
        function: The eager function.
        align_output: Brings the recipe's output into tokenops' order.
        align_input: Brings a gradient with respect to ``x_recipe`` into the order of ``x``.
    """

    x: Tensor
    x_recipe: Tensor
    ours: Callable[[Tensor], Any]
    index: Callable[[Tensor], Any]
    recipe: Callable[[Callable[..., Any], Tensor], Any]
    function: Callable[..., Any]
    align_output: Callable[[Tensor], Tensor]
    align_input: Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _tokens(rows: int, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = (shape.batch, rows, shape.width)
    return torch.randn(size, generator=generator(device), device=device).to(dtype)


def merge_pair(shape: Shape, dtype: torch.dtype, device: torch.device) -> Pair:
    """Plain mean."""
    merging = make_merging(shape, device)
    x, counts = _tokens(shape.tokens, shape, dtype, device), merging.counts(dtype)
    return Pair(
        x=x,
        x_recipe=x,
        ours=lambda t: tokenops.merge(t, merging.token_map),
        index=lambda t: rivals.index_merge(t, merging.row, counts),
        recipe=lambda function, t: function(t, merging.plan, "mean"),
        function=rivals.tome_merge if shape.grid is None else rivals.tomesd_merge,
        align_output=merging.from_recipe,
        align_input=_same,
    )


def wavg_pair(shape: Shape, dtype: torch.dtype, device: torch.device) -> Pair:
    """Mean weighted by sizes: float32 for tokenops, the type of the data for the recipe."""
    merging = make_merging(shape, device)
    x = _tokens(shape.tokens, shape, dtype, device)
    rows = (shape.batch, shape.tokens, 1)
    size = torch.randint(1, 5, rows, generator=generator(device), device=device).float()
    size_recipe, outputs = size.to(dtype), merging.token_map.num_tokens
    return Pair(
        x=x,
        x_recipe=x,
        ours=lambda t: tokenops.merge_wavg(t, merging.token_map, size),
        index=lambda t: rivals.index_merge_wavg(t, size_recipe, merging.row, outputs),
        recipe=lambda function, t: function(t, size_recipe, merging.plan),
        function=rivals.tome_merge_wavg,
        align_output=merging.from_recipe,
        align_input=_same,
    )


def unmerge_pair(shape: Shape, dtype: torch.dtype, device: torch.device) -> Pair:
    """Output tokens back to input tokens."""
    merging = make_merging(shape, device)
    y = _tokens(shape.tokens - shape.r, shape, dtype, device)
    return Pair(
        x=y,
        x_recipe=merging.to_recipe(y),
        ours=lambda t: tokenops.unmerge(t, merging.token_map),
        index=lambda t: rivals.index_unmerge(t, merging.row),
        recipe=lambda function, t: function(t, merging.plan),
        function=rivals.tome_unmerge if shape.grid is None else rivals.tomesd_unmerge,
        align_output=_same,
        align_input=merging.from_recipe,
    )


def _least_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Each row read once and each row written once, forward or backward."""
    return dtype.itemsize * shape.batch * shape.width * (2 * shape.tokens - shape.r)


def _first(result: Any) -> Tensor:
    first: Tensor = result[0] if isinstance(result, tuple) else result
    return first


def relative(result: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors relative to the largest entry."""
    if result.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(result.shape)} and {list(expected.shape)}")
    a, b = result.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def forward(
    make: Callable[[Shape, torch.dtype, torch.device], Pair],
) -> Callable[[Shape, torch.dtype, torch.device], Work]:
    """Setup of the operator itself."""

    def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
        pair = make(shape, dtype, device)

        def eager(function: Callable[..., Any]) -> Rival:
            return Rival(lambda: pair.recipe(function, pair.x_recipe))

        def difference(name: str, result: Any, expected: Any) -> float:
            align = pair.align_output if name in ("eager", "compile") else _same
            return relative(align(_first(result)), _first(expected))

        return Work(
            rivals={
                "tokenops": lambda: Rival(lambda: pair.ours(pair.x)),
                "reference": lambda: Rival(lambda: pair.ours(pair.x), use_reference),
                **triton_rival("merge", lambda: pair.ours(pair.x), pair.x),
                "eager": lambda: eager(pair.function),
                "compile": lambda: eager(compiled(pair.function)),
                "index": lambda: Rival(lambda: pair.index(pair.x)),
            },
            bytes=_least_bytes(shape, dtype),
            flops=0,
            difference=difference,
            tolerance=TOLERANCE[dtype],
            tensor=pair.x,
        )

    return setup


def backward(
    make: Callable[[Shape, torch.dtype, torch.device], Pair],
) -> Callable[[Shape, torch.dtype, torch.device], Work]:
    """Setup of the gradient with respect to the tokens."""

    def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> Work:
        pair = make(shape, dtype, device)
        x = pair.x.requires_grad_()
        x_recipe = pair.x_recipe.detach().requires_grad_()
        with torch.no_grad():
            out = _first(pair.ours(x))
            flow = torch.randn(out.shape, generator=generator(device), device=device).to(dtype)
            if pair.align_output is _same:
                flow_recipe = flow
            else:  # the gradient of the reordering brings it into the recipe's order
                with torch.enable_grad():
                    probe = torch.zeros_like(flow, requires_grad=True)
                    (flow_recipe,) = torch.autograd.grad(pair.align_output(probe), probe, flow)

        def gradient(out: Tensor, leaf: Tensor, flow: Tensor) -> Callable[[], Tensor]:
            return lambda: torch.autograd.grad(out, leaf, flow, retain_graph=True)[0]

        def ours() -> Rival:
            return Rival(gradient(_first(pair.ours(x)), x, flow))

        def reference() -> Rival:
            with use_reference():
                out = _first(pair.ours(x))
            return Rival(gradient(out, x, flow), use_reference)

        def recipe(function: Callable[..., Any]) -> Rival:
            out = _first(pair.recipe(function, x_recipe))
            return Rival(gradient(out, x_recipe, flow_recipe))

        def compile_both() -> Rival:
            # A compiled backward otherwise overwrites what it saved, and could run only once.
            torch._functorch.config.donated_buffer = False
            return recipe(compiled(pair.function))

        def difference(name: str, result: Tensor, expected: Tensor) -> float:
            align = pair.align_input if name in ("eager", "compile") else _same
            return relative(align(result), expected)

        return Work(
            rivals={
                "tokenops": ours,
                "reference": reference,
                "eager": lambda: recipe(pair.function),
                "compile": compile_both,
                "index": lambda: Rival(gradient(_first(pair.index(x)), x, flow)),
            },
            bytes=_least_bytes(shape, dtype),
            flops=0,
            difference=difference,
            tolerance=TOLERANCE[dtype],
            tensor=x,
            inference=False,
        )

    return setup
