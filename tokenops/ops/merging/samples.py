# SPDX-License-Identifier: Apache-2.0
"""Samples of the operators of merging."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...testing import random_token_map
from ...testing.samples import MAP, B, Call, M, N, Sample, Sizes, numbers, rows
from .api import merge, merge_wavg, unmerge

INDEX = MAP.assign, MAP.offsets, MAP.members


def samples() -> Iterator[Sample]:
    """Every reduction, dtype and combination of optional arguments."""
    earlier = random_token_map(B, 9, N, dropped=0.2, seed=4).assign
    yield Sample("invert", "map", (MAP.assign, M))
    yield Sample("compose", "map", (MAP.assign, earlier, M))
    for dtype, requires in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        for reduce in ("sum", "mean", "amax", "amin", "prod"):
            x = rows(N, dtype, requires_grad=requires)
            yield Sample("merge", f"{reduce}-{dtype}", (x, *INDEX, None, None, reduce))
    for weight, scale in ((numbers(N), None), (None, numbers(M)), (numbers(N), numbers(M))):
        kind = f"weight-{weight is not None}-scale-{scale is not None}"
        yield Sample("merge", kind, (rows(N), *INDEX, weight, scale, "sum"))
        for residual in (None, rows(N, seed=2)):
            arguments = rows(M), *INDEX, weight, scale, residual, False
            yield Sample("unmerge", f"{kind}-residual-{residual is not None}", arguments)
    yield Sample("unmerge", "mean", (rows(M), *INDEX, None, None, None, True))
    yield Sample("unmerge", "half", (rows(M, torch.float16), *INDEX, None, None, None, False))
    for dtype in (torch.float32, torch.bfloat16):
        for reduce in ("sum", "mean", "amax", "prod"):
            several = [rows(N, dtype), rows(N, dtype, seed=7)]
            yield Sample("merge_many", f"{reduce}-{dtype}", (several, *INDEX, None, reduce))
        for weight in (None, numbers(N)):
            kind = f"weight-{weight is not None}-{dtype}"
            xs, ys = ([rows(n, dtype), rows(n, dtype, seed=7)] for n in (N, M))
            yield Sample("merge_many", kind, (xs, *INDEX, weight, "sum"))
            yield Sample("unmerge_many", kind, (ys, *INDEX, weight, False))
    yield Sample("unmerge_many", "mean", ([rows(M), rows(M, seed=7)], *INDEX, None, True))
    yield Sample("pair_dot", "rows", (rows(N), rows(M, seed=2), *INDEX))
    yield Sample("merge_wavg", "plain", (rows(N), *INDEX, None))
    yield Sample(
        "merge_wavg", "size", (rows(N), *INDEX, numbers(N).detach().abs().requires_grad_())
    )

    plain = rows(N, requires_grad=False)
    ties = plain.round()  # with zeros among them
    nan = ties.clone()
    nan[:, 1], nan[:, 4, 0] = torch.nan, torch.nan
    for reduce in ("amax", "amin", "prod"):
        for kind, values in (("rows", plain), ("ties", ties), ("nan", nan)):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                z, grad = values.to(dtype), rows(M, dtype, requires_grad=False, seed=3)
                out = torch.ops.tokenops.merge(z, *INDEX, None, None, reduce)
                name = f"{reduce}-{kind}-{dtype}"
                yield Sample("merge_reduce_backward", name, (grad, z, out, *INDEX, reduce))


def calls(sizes: Sizes) -> Iterator[Call]:
    """Every reduction and every optional tensor; lists of tensors; composition of maps."""
    tokens, outputs, channels = sizes.tokens, sizes.outputs, sizes.channels
    token_map = random_token_map(
        sizes.batch, tokens, outputs, dropped=0.1, device=sizes.device, seed=1
    )
    x, other = sizes.rows(tokens, channels), sizes.rows(tokens, channels, seed=1)
    y, weight = sizes.rows(outputs, channels, seed=2), sizes.weights(tokens)
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        yield Call("merge", reduce, partial(merge, token_map=token_map, reduce=reduce), {"x": x})
    merges, averages = partial(merge, token_map=token_map), partial(merge_wavg, token_map=token_map)
    yield Call("merge", "weight", merges, {"x": x, "weight": weight})
    yield Call("merge", "list", lambda x, other: merges([x, other]), {"x": x, "other": other})
    yield Call("merge_wavg", "plain", averages, {"x": x})
    yield Call("merge_wavg", "size", averages, {"x": x, "size": weight})
    both = {"x": x, "size": weight, "weight": sizes.weights(tokens, seed=8)}
    yield Call("merge_wavg", "size and weight", averages, both)
    unmerges = partial(unmerge, token_map=token_map)
    yield Call("unmerge", "plain", unmerges, {"y": y})
    yield Call("unmerge", "residual", unmerges, {"y": y, "residual": x})
    yield Call("unmerge", "list", lambda y, other: unmerges([y, other]), {"y": y, "other": 2 * y})
