# SPDX-License-Identifier: Apache-2.0
"""Operators of matching: schemas, shapes, backward formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _backend
from ..._library import acc_dtype, register
from ..merging import schema as _merging  # noqa: F401 - registers what the backward calls
from . import common, composed, reference

# ---- nearest ----


def _nearest_fake(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], a.shape[-2])
    return (
        a.new_empty(shape, dtype=acc_dtype(a)),
        a.new_empty(shape, dtype=torch.int32),
    )


def _nearest_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, _, _, similarity = inputs
    ctx.similarity = similarity
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(a, b, *output)


def _nearest_backward(ops: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    a, b, score, index = ctx.saved_tensors
    index = torch.where(score == -math.inf, -1, index)  # no finite similarity, no gradient
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
    """Rows that were never chosen may hold anything; they must not spoil the others' gradients."""
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


# ---- match ----

#: A split is two lists of tokens, or else a rule; see :class:`tokenops.splits.ResolvedSplit`.
_SPLIT = (
    "Tensor? source_index, Tensor? destination_index, SymInt stride, SymInt grid_width,"
    " SymInt cell_height, Tensor? cell"
)
_SHARED = ("protected", "source_index", "destination_index", "cell")

#: How similar pairs have to be: a number for all images, or one for each of them, [B].
_THRESHOLD = "float? threshold, Tensor? thresholds"


def _match_fake(
    metric: Tensor,
    r: int,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
    threshold: float | None,
    thresholds: Tensor | None,
    order: str,
    similarity: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = stride, grid_width, cell_height, cell
    common.check_split("match", source_index, destination_index, *rule)
    return _map_fake(metric, metric.shape[-2], r, threshold is not None or thresholds is not None)


def _map_fake(
    like: Tensor, tokens: int, r: int, limited: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, outputs = like.shape[0], tokens
    if not limited:  # some token is left, which exporting with a proportional r needs to see
        outputs = torch.sym_max(tokens - torch.sym_max(r, 0), torch.sym_min(tokens, 1))
    return (
        like.new_empty((batch, tokens), dtype=torch.int32),
        like.new_empty((batch, outputs + 1), dtype=torch.int32),
        like.new_empty((batch, tokens), dtype=torch.int32),
        like.new_empty((batch,), dtype=torch.int32),
    )


def _match_flops(metric: Any, r: int, *rest: Any) -> int:
    return _search_flops(metric, *rest)


register(
    reference.match,
    composed=composed.match,
    fake=_match_fake,
    flops=_match_flops,
    shared=_SHARED,
    public=True,
)


# ---- the two halves of match ----


def _search_fake(
    metric: Tensor,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    tokens = metric.shape[-2]
    rule = stride, grid_width, cell_height, cell
    common.check_split("search", source_index, destination_index, *rule)
    if source_index is not None:
        sources = source_index.shape[-1]
    else:
        sources, _ = common.counts("search", tokens, num_prefix, *rule)
    shape = metric.shape[0], sources
    return (
        metric.new_empty(shape, dtype=acc_dtype(metric)),
        metric.new_empty(shape, dtype=torch.int32),
    )


def _search_flops(
    metric: Any,
    num_prefix: int,
    protected: Any,
    source_index: Any,
    destination_index: Any,
    stride: int,
    grid_width: int,
    cell_height: int,
    *_: Any,
) -> int:
    if source_index is not None:
        sources, destinations = source_index[-1], destination_index[-1]
    else:
        rule = stride, grid_width, cell_height, None
        sources, destinations = common.counts("search", metric[-2], num_prefix, *rule)
    return int(2 * metric[0] * sources * destinations * metric[-1])


#: Similarity of each source to its best destination, sources in the order of the split, and the
#: place of that one among the destinations in ascending order; -1 where there is none. A token is
#: listed once: what becomes of one that is listed twice may differ from backend to backend.
register(
    reference.search,
    composed=composed.search,
    fake=_search_fake,
    flops=_search_flops,
    shared=_SHARED,
)


def _select_fake(
    score: Tensor,
    choice: Tensor,
    num_tokens: int,
    r: int,
    num_prefix: int,
    protected: Tensor | None,
    source_index: Tensor | None,
    destination_index: Tensor | None,
    stride: int,
    grid_width: int,
    cell_height: int,
    cell: Tensor | None,
    threshold: float | None,
    thresholds: Tensor | None,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rule = stride, grid_width, cell_height, cell
    common.check_split("select", source_index, destination_index, *rule)
    return _map_fake(score, num_tokens, r, threshold is not None or thresholds is not None)


register(
    reference.select,
    composed=composed.select,
    fake=_select_fake,
    shared=_SHARED,
)

_backend.serve_by_triton(__package__, "nearest", "match", "search", "select")
