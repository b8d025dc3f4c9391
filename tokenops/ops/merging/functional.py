# SPDX-License-Identifier: Apache-2.0
"""Merging of plain tensors: check the arguments, then call the operators.

The methods of ``TokenMap`` call these functions, and the public functions call the methods.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _backend, _checks
from ..._library import acc_dtype
from . import schema  # noqa: F401 - registers the operators

#: The fields of ``arguments.Index`` as a plain tuple, which is faster to make in every call.
IndexTensors = tuple[Tensor, Tensor, Tensor]

REDUCTIONS = ("sum", "mean", "amax", "amin", "prod")


def merge(x: Tensor, index: IndexTensors, reduce: str, weight: Tensor | None) -> Tensor:
    """See :func:`tokenops.merge`."""
    _check_tokens("merge", "x", x, index, index[0].shape)
    _checks.check_choice("merge", "reduce", reduce, REDUCTIONS)
    if weight is not None:
        weight = _per_token("merge", "weight", weight, x)
        if reduce == "mean":
            out, _ = _backend.dispatch("merge_wavg", x)(x, *index, weight)
            return out  # type: ignore[no-any-return]
        if reduce != "sum":  # round once, after the reduction: equal products stay equal
            return merge(x * weight[..., None], index, reduce, None).to(x.dtype)
    return _backend.dispatch("merge", x)(x, *index, weight, None, reduce)  # type: ignore[no-any-return]


def merge_many(
    x: Sequence[Tensor], index: IndexTensors, reduce: str, weight: Tensor | None
) -> list[Tensor]:
    """Merge each tensor of a list."""
    _check_list("merge", "x", x)
    for i, tensor in enumerate(x):
        _check_tokens("merge", f"x[{i}]", tensor, index, index[0].shape)
    _checks.check_choice("merge", "reduce", reduce, REDUCTIONS)
    if not _share_launch("merge", x) or (weight is not None and reduce != "sum"):
        return [merge(tensor, index, reduce, weight) for tensor in x]
    if weight is not None:
        weight = _per_token("merge", "weight", weight, x[0])
    serve = _backend.dispatch("merge_many", x[0])
    return serve(list(x), *index, weight, reduce)  # type: ignore[no-any-return]


def merge_wavg(
    x: Tensor, index: IndexTensors, size: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`tokenops.merge_wavg`."""
    _check_tokens("merge_wavg", "x", x, index, index[0].shape)
    size_dtype = torch.float32
    if size is not None:
        if isinstance(size, Tensor) and size.dtype == x.dtype == torch.float64:
            size_dtype = torch.float64
        size = _per_token("merge_wavg", "size", size, x)
    factor = size
    if weight is not None:
        factor = weight = _per_token("merge_wavg", "weight", weight, x)
        if size is not None:
            factor = weight * size
    out, total = _backend.dispatch("merge_wavg", x)(x, *index, factor)
    if weight is not None:
        size = torch.ones_like(weight) if size is None else size
        total = merge(size[..., None], index, "sum", None)[..., 0]
    return out, total[..., None].to(size_dtype)


def unmerge(y: Tensor, index: IndexTensors, residual: Tensor | None) -> Tensor:
    """See :func:`tokenops.unmerge`."""
    _check_tokens("unmerge", "y", y, index, _output_shape(index))
    if residual is not None:
        _checks.check_floating("unmerge", "residual", residual, dims=(3,))
        _checks.check_shape("unmerge", "residual", residual, [(*index[0].shape, y.shape[2])])
        _checks.check_same_device("unmerge", "residual", residual, y)
        if residual.dtype != y.dtype:
            dtype = torch.promote_types(y.dtype, residual.dtype)
            y, residual = y.to(dtype), residual.to(dtype)
    return _backend.dispatch("unmerge", y)(y, *index, None, None, residual, False)  # type: ignore[no-any-return]


def unmerge_many(y: Sequence[Tensor], index: IndexTensors, residual: Tensor | None) -> list[Tensor]:
    """Unmerge each tensor of a list."""
    _check_list("unmerge", "y", y)
    if residual is not None:
        raise _checks.value_error("unmerge", "residual", "None for several tensors", residual)
    for i, tensor in enumerate(y):
        _check_tokens("unmerge", f"y[{i}]", tensor, index, _output_shape(index))
    if not _share_launch("unmerge", y):
        return [unmerge(tensor, index, None) for tensor in y]
    serve = _backend.dispatch("unmerge_many", y[0])
    return serve(list(y), *index, None, False)  # type: ignore[no-any-return]


def _output_shape(index: IndexTensors) -> tuple[int, int]:
    return index[0].shape[0], index[1].shape[1] - 1  # B, M


def _share_launch(name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether one operator call takes all tensors: plain, of one dtype, and not the reference."""
    if len(tensors) < 2 or _backend.dispatches_to_reference(name, tensors[0]):
        return False
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return plain and all(t.dtype == tensors[0].dtype for t in tensors)


def _per_token(name: str, argument: str, value: Tensor, x: Tensor) -> Tensor:
    """Check one number per input token; return it as [B, N] in the dtype of sums."""
    _checks.check_floating(name, argument, value, dims=(2, 3))
    batch, tokens = x.shape[:2]
    _checks.check_shape(name, argument, value, [(batch, tokens), (batch, tokens, 1)])
    _checks.check_same_device(name, argument, value, x)
    return value.reshape(batch, tokens).to(acc_dtype(x))


def _check_list(name: str, argument: str, tensors: object) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise _checks.type_error(name, argument, "a tensor or a list of tensors", tensors)


def _check_tokens(
    name: str, argument: str, x: Tensor, index: IndexTensors, shape: Sequence[int]
) -> None:
    """Check that ``x`` is of shape [*shape, C] and on the device of the token map."""
    _checks.check_floating(name, argument, x, dims=(3,))
    batch, tokens = shape
    got = x.shape
    if got[0] != batch or got[1] != tokens:
        expected = f"of shape [{batch}, {tokens}, C] to match token_map"
        raise _checks.value_error(name, argument, expected, x)
    _checks.check_same_device(name, argument, x, index[0])
