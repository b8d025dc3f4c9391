# SPDX-License-Identifier: Apache-2.0
"""Operators of matching: schemas, shapes, backward formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import acc_dtype, register
from ..merging import schema as _merging  # noqa: F401 - registers operators of the backward
from . import common, composed, cuda, reference
from .arguments import Best, Map, Request, SplitArgs

# ---- nearest ----


def _nearest_fake(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], a.shape[-2])
    return a.new_empty(shape, dtype=acc_dtype(a)), a.new_empty(shape, dtype=torch.int32)


def _nearest_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, _, similarity = inputs
    ctx.similarity = similarity
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, *output)


def _nearest_backward(ops: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    a, b, score, index = ctx.saved_tensors
    index = torch.where(score == -math.inf, -1, index)  # -inf has no gradient
    rows_a, rows_b = reference.metric_rows(a), reference.metric_rows(b)  # [B, Na, D], [B, Nb, D]
    # The chosen pairs are a token map from the rows of a to those of b.
    pairs = index, *ops.invert(index, rows_b.shape[1])
    if ctx.similarity == "cosine":
        unit_a, inverse_a = map(_finite, reference.unit_rows(rows_a))
        unit_b, inverse_b = map(_finite, reference.unit_rows(rows_b))
    else:
        unit_a, unit_b = _finite(rows_a), _finite(rows_b)
    grad_a = grad_b = None
    if ctx.needs[0]:
        grad_a = ops.unmerge(unit_b, *pairs, grad, None, None, False)
        if ctx.similarity == "cosine":
            grad_a = _through_normalization(grad_a, unit_a, inverse_a)
        grad_a = _through_metric(grad_a, a)
    if ctx.needs[1]:
        grad_b = ops.merge(unit_a, *pairs, grad, None, "sum")
        if ctx.similarity == "cosine":
            grad_b = _through_normalization(grad_b, unit_b, inverse_b)
        grad_b = _through_metric(grad_b, b)
    return grad_a, grad_b, None, None, None


def _finite(x: Tensor) -> Tensor:
    """Replace NaN and inf by 0: rows may hold them, and their product with a gradient of 0 is 0."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _through_normalization(grad: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    return (grad - unit * (unit * grad).sum(-1, keepdim=True)) * inverse


def _through_metric(grad: Tensor, x: Tensor) -> Tensor:
    if x.dim() == 4:
        grad = (grad / x.shape[1])[:, None].expand(x.shape)
    return grad.to(x.dtype)


def _nearest_flops(a: Any, b: Any, *_: Any) -> int:
    return int(2 * a[0] * a[-2] * b[-2] * a[-1])


register(
    reference.nearest,
    composed=composed.nearest,
    fake=_nearest_fake,
    backward=_nearest_backward,
    setup_context=_nearest_setup,
    flops=_nearest_flops,
    public=True,
)


# ---- match, search and select ----

#: Arguments that may be 1-D and then apply to all images.
_SHARED = ("protected", "src_index", "dst_index", "cell")


def _map_fake(like: Tensor, tokens: int, request: Request) -> Map:
    batch, outputs = like.shape[0], tokens
    if not request.limited():  # at least one token is left, which an export with r ~ N relies on
        outputs = torch.sym_max(tokens - torch.sym_max(request.r, 0), torch.sym_min(tokens, 1))
    shapes = (batch, tokens), (batch, outputs + 1), (batch, tokens), (batch,)
    return Map(*(like.new_empty(shape, dtype=torch.int32) for shape in shapes))


def _match_fake(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    common.check_split("match", split)
    return _map_fake(metric, metric.shape[-2], request)


def _search_fake(metric: Tensor, similarity: str, split: SplitArgs) -> Best:
    common.check_split("search", split)
    shape = metric.shape[0], common.count_sides("search", metric.shape[-2], split).num_src
    return Best(
        metric.new_empty(shape, dtype=acc_dtype(metric)),
        metric.new_empty(shape, dtype=torch.int32),
    )


def _select_fake(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    common.check_split("select", split)
    return _map_fake(best.node_max, num_tokens, request)


def _match_flops(metric: Any, similarity: str, request: Request, split: SplitArgs) -> int:
    return _search_flops(metric, similarity, split)


def _search_flops(metric: Any, similarity: str, split: Any) -> int:
    if split.src_index is not None:
        num_src, num_dst = split.src_index[-1], split.dst_index[-1]
    else:
        num_src, num_dst, *_ = common.count_sides("search", metric[-2], split._replace(cell=None))
    return int(2 * metric[0] * num_src * num_dst * metric[-1])


register(
    reference.match,
    composed=composed.match,
    fake=_match_fake,
    flops=_match_flops,
    shared=_SHARED,
    public=True,
)
register(
    reference.search,
    composed=composed.search,
    fake=_search_fake,
    flops=_search_flops,
    shared=_SHARED,
)
register(reference.select, composed=composed.select, fake=_select_fake, shared=_SHARED)

_backend.serve_by_parts("match", cuda.match, "grid_sides", "match_fits", "match_image", "select")
_backend.serve_by_triton(__package__, "nearest", "match", "search", "select")
