# SPDX-License-Identifier: Apache-2.0
"""Merging and unmerging tokens by a token map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from ... import _backend, _checks
from ..._library import acc_dtype
from ...token_map import TokenMap
from . import schema  # noqa: F401 - registers the operators

REDUCTIONS = ("sum", "mean", "amax", "amin", "prod")


@overload
def merge(
    x: Tensor, token_map: TokenMap, *, reduce: str = "mean", weight: Tensor | None = None
) -> Tensor: ...
@overload
def merge(
    x: Sequence[Tensor], token_map: TokenMap, *, reduce: str = "mean", weight: Tensor | None = None
) -> list[Tensor]: ...
def merge(
    x: Tensor | Sequence[Tensor],
    token_map: TokenMap,
    *,
    reduce: str = "mean",
    weight: Tensor | None = None,
) -> Tensor | list[Tensor]:
    """Reduce the members of each output token to one row.

    ``out[b, m] = reduce_{n: assign[b, n] = m} x[b, n]``. With ``weight``, a sum becomes
    ``sum(w * x)``, a mean ``sum(w * x) / sum(w)`` (0 where the weights sum to 0), and the other
    reductions apply to ``w * x``. An output token without members is 0.

    Args:
        x: Tokens ``[B, N, C]`` of float16, bfloat16, float32 or float64; any strides, fastest when
            the last dimension is contiguous. Or a list of them, for example queries, keys and
            values, whose widths may differ: if all have one dtype, they share a launch on CUDA
            devices (but for a weight with another reduction than the sum).
        token_map: Map of N to M tokens.
        reduce: ``"sum"``, ``"mean"``, ``"amax"``, ``"amin"`` or ``"prod"``.
        weight: Weight of each member, floating ``[B, N]`` or ``[B, N, 1]``.

    Returns:
        ``[B, M, C]`` of the dtype of ``x``, a list of them for a list; half types accumulate in
        float32.

    Differentiable in: ``x`` (ties of amax and amin share the gradient equally) and ``weight``,
    twice and more.

    Determinism: the same bits from run to run, for any number of threads; no atomics.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit, or ``reduce`` is unknown.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Source: ``scatter_reduce(include_self=True)`` of ToMe's ``merge`` (Bolya et al., ICLR 2023);
    ``weight`` as in EViT's fused token (Liang et al., ICLR 2022, section 3.2).

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> tokenops.merge(torch.tensor([[[1.0], [5.0], [3.0]]]), token_map).flatten().tolist()
        [2.0, 5.0]
    """
    if not isinstance(x, Tensor):
        return _merge_all(x, token_map, reduce, weight)
    _check_tokens("merge", "x", x, token_map, token_map_inputs=True)
    _checks.check_choice("merge", "reduce", reduce, REDUCTIONS)
    if weight is not None:
        weight = _per_token("merge", "weight", weight, x)
        if reduce == "mean":
            return _weighted_mean("merge", x, token_map, weight)[0]
        if reduce != "sum":  # in the type of sums, rounded once: products tie there or nowhere
            return merge(x * weight[..., None], token_map, reduce=reduce).to(x.dtype)
    index = token_map.assign, token_map.offsets, token_map.members
    out: Tensor = _backend.dispatch("merge", x)(x, *index, weight, None, reduce)
    return out


def merge_wavg(
    x: Tensor, token_map: TokenMap, size: Tensor | None = None, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the members of each output token, and the new sizes, in one pass.

    ``out[b, m] = sum(w * s * x) / sum(w * s)`` and ``size_out[b, m] = sum(s)`` over the members n
    of m. An output token without members, or whose weights sum to 0, is 0.

    Args:
        x: Tokens ``[B, N, C]`` of float16, bfloat16, float32 or float64, any strides.
        token_map: Map of N to M tokens.
        size: Number of patches that each token stands for, floating ``[B, N]`` or ``[B, N, 1]``;
            ones when None.
        weight: Importance of each member beside its size, floating ``[B, N]`` or ``[B, N, 1]``.

    Returns:
        The means ``[B, M, C]`` of the dtype of ``x``, and the sizes ``[B, M, 1]``: float32 whatever
        ``x`` is (bfloat16 counts exactly up to 256 only), float64 where ``x`` and ``size`` are.

    Differentiable in: ``x``, ``size`` and ``weight``, twice and more.

    Determinism: the same bits from run to run, for any number of threads; no atomics.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Source: ToMe's ``merge_wavg`` (Bolya et al., ICLR 2023, section 3).

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> x, size = tokenops.merge_wavg(torch.tensor([[[1.0], [5.0], [3.0]]]), token_map)
        >>> size.flatten().tolist()
        [2.0, 1.0]
    """
    _check_tokens("merge_wavg", "x", x, token_map, token_map_inputs=True)
    size_dtype = torch.float32
    if size is not None:
        if isinstance(size, Tensor) and size.dtype == x.dtype == torch.float64:
            size_dtype = torch.float64
        size = _per_token("merge_wavg", "size", size, x)
    if weight is None:
        out, total = _weighted_mean("merge_wavg", x, token_map, size)
    else:
        weight = _per_token("merge_wavg", "weight", weight, x)
        if size is None:
            size = torch.ones_like(weight)
        out, _ = _weighted_mean("merge_wavg", x, token_map, weight * size)
        total = merge(size[..., None], token_map, reduce="sum")[..., 0]
    return out, total[..., None].to(size_dtype)


@overload
def unmerge(y: Tensor, token_map: TokenMap, *, residual: Tensor | None = None) -> Tensor: ...
@overload
def unmerge(
    y: Sequence[Tensor], token_map: TokenMap, *, residual: Tensor | None = None
) -> list[Tensor]: ...
def unmerge(
    y: Tensor | Sequence[Tensor], token_map: TokenMap, *, residual: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Give each input token the row of the output token it went to.

    ``out[b, n] = y[b, assign[b, n]] + residual[b, n]``; dropped tokens get 0, or the residual.

    Args:
        y: Tokens ``[B, M, C]`` of float16, bfloat16, float32 or float64, any strides. Or several of
            them, as for :func:`merge`.
        token_map: Map of N to M tokens.
        residual: ``[B, N, C]``, added in the same pass where it has the dtype of ``y``; for one
            tensor only.

    Returns:
        ``[B, N, C]`` of the dtype of ``y``, or the wider one of ``y`` and ``residual``; a list of
        them for a list.

    Differentiable in: ``y`` and ``residual``, twice and more.

    Determinism: the same bits from run to run, for any number of threads; no atomics.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> tokenops.unmerge(torch.tensor([[[2.0], [5.0]]]), token_map).flatten().tolist()
        [2.0, 5.0, 2.0]
    """
    if not isinstance(y, Tensor):
        if residual is not None and isinstance(y, (list, tuple)):
            raise _checks.value_error("unmerge", "residual", "None for several tensors", residual)
        return _unmerge_all(y, token_map)
    _check_tokens("unmerge", "y", y, token_map, token_map_inputs=False)
    if residual is not None:
        _checks.check_floating("unmerge", "residual", residual, dims=(3,))
        shape = (y.shape[0], token_map.num_inputs, y.shape[2])
        _checks.check_shape("unmerge", "residual", residual, [shape])
        _checks.check_same_device("unmerge", "residual", residual, y)
        if residual.dtype != y.dtype:
            dtype = torch.promote_types(y.dtype, residual.dtype)
            y, residual = y.to(dtype), residual.to(dtype)
    index = token_map.assign, token_map.offsets, token_map.members
    out: Tensor = _backend.dispatch("unmerge", y)(y, *index, None, None, residual, False)
    return out


def _merge_all(
    x: Sequence[Tensor], token_map: TokenMap, reduce: str, weight: Tensor | None
) -> list[Tensor]:
    _check_all("merge", "x", x, token_map, token_map_inputs=True)
    _checks.check_choice("merge", "reduce", reduce, REDUCTIONS)
    if _each_alone("merge", x) or (weight is not None and reduce != "sum"):
        return [merge(t, token_map, reduce=reduce, weight=weight) for t in x]
    if weight is not None:
        weight = _per_token("merge", "weight", weight, x[0])
    index = token_map.assign, token_map.offsets, token_map.members
    serve = _backend.dispatch("merge_many", x[0])
    out: list[Tensor] = serve(list(x), *index, weight, reduce)
    return out


def _unmerge_all(y: Sequence[Tensor], token_map: TokenMap) -> list[Tensor]:
    _check_all("unmerge", "y", y, token_map, token_map_inputs=False)
    if _each_alone("unmerge", y):
        return [unmerge(t, token_map) for t in y]
    index = token_map.assign, token_map.offsets, token_map.members
    serve = _backend.dispatch("unmerge_many", y[0])
    out: list[Tensor] = serve(list(y), *index, None, False)
    return out


def _check_all(
    name: str, argument: str, tensors: object, token_map: TokenMap, token_map_inputs: bool
) -> None:
    if not isinstance(tensors, (list, tuple)):
        raise _checks.type_error(name, argument, "a tensor or a list of tensors", tensors)
    for place, tensor in enumerate(tensors):
        _check_tokens(name, f"{argument}[{place}]", tensor, token_map, token_map_inputs)


def _each_alone(name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can't share a launch: other dtypes, the reference, or sharded ones."""
    if len(tensors) < 2 or _backend.dispatches_to_reference(name, tensors[0]):
        return True
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
    return not plain or any(t.dtype != tensors[0].dtype for t in tensors)


def _weighted_mean(
    name: str, x: Tensor, token_map: TokenMap, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    index = token_map.assign, token_map.offsets, token_map.members
    out, total = _backend.dispatch("merge_wavg", x)(x, *index, weight)
    return out, total


def _per_token(name: str, argument: str, value: Tensor, x: Tensor) -> Tensor:
    """A number per input token as [B, N] in the type of sums."""
    _checks.check_floating(name, argument, value, dims=(2, 3))
    batch, tokens = x.shape[:2]
    _checks.check_shape(name, argument, value, [(batch, tokens), (batch, tokens, 1)])
    _checks.check_same_device(name, argument, value, x)
    return value.reshape(batch, tokens).to(acc_dtype(x))


def _check_tokens(
    name: str, argument: str, x: Tensor, token_map: TokenMap, token_map_inputs: bool
) -> None:
    _checks.check_floating(name, argument, x, dims=(3,))
    if not isinstance(token_map, TokenMap):
        raise _checks.type_error(name, "token_map", "a TokenMap", token_map)
    batch = token_map.assign.shape[0]
    tokens = token_map.num_inputs if token_map_inputs else token_map.num_tokens
    if x.shape[0] != batch or x.shape[1] != tokens:
        raise _checks.value_error(
            name, argument, f"of shape [{batch}, {tokens}, C] as token_map has it", x
        )
    _checks.check_same_device(name, argument, x, token_map.assign)
