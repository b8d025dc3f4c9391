# SPDX-License-Identifier: Apache-2.0
"""Merging and unmerging tokens by a token map: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from ... import _checks
from ...token_map import TokenMap


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

    ``out[b, m] = reduce(x[b, n] for all n with assign[b, n] == m)``. With a weight ``w``, a sum is
    ``sum(w * x)``, a mean is ``sum(w * x) / sum(w)``, and the other reductions take ``w * x``.
    Output tokens without members are 0, and so is a mean whose weights sum to 0.

    Args:
        x: Tokens ``[B, N, C]`` of float16, bfloat16, float32 or float64; any strides, fastest when
            the last dimension is contiguous. Or a list of such tensors, for example queries, keys
            and values, whose widths may differ. Tensors of one dtype share a launch on CUDA
            devices, except with ``weight`` and a reduction other than the sum.
        token_map: Map of N to M tokens.
        reduce: ``"sum"``, ``"mean"``, ``"amax"``, ``"amin"`` or ``"prod"``.
        weight: Weight of each member, floating ``[B, N]`` or ``[B, N, 1]``.

    Shape:
        ``[B, N, C] -> [B, M, C]`` for B images, N input tokens, M output tokens and C channels.

    Returns:
        ``[B, M, C]`` of the dtype of ``x``; a list for a list. float16 and bfloat16 accumulate in
        float32.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit, or ``reduce`` is unknown.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Differentiable in ``x`` and ``weight``, to any order; ties of amax and amin share the
        gradient equally. Deterministic for any number of threads; no atomics.

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> tokenops.merge(torch.tensor([[[1.0], [5.0], [3.0]]]), token_map).flatten().tolist()
        [2.0, 5.0]

    References:
        The merging step of ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023);
        ``weight`` as in EViT's fused token (Liang et al., ICLR 2022, section 3.2).
    """
    return _checked("merge", "x", x, token_map).merge(x, reduce=reduce, weight=weight)


def merge_wavg(
    x: Tensor, token_map: TokenMap, size: Tensor | None = None, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the members of each output token, and the new sizes, in one pass.

    ``out[b, m] = sum(w * s * x) / sum(w * s)`` and ``new_size[b, m] = sum(s)`` over the members of
    output token m, with their sizes ``s`` and weights ``w``. An output token without members, or
    whose ``w * s`` sum to 0, is 0.

    Args:
        x: Tokens ``[B, N, C]`` of float16, bfloat16, float32 or float64, any strides.
        token_map: Map of N to M tokens.
        size: Number of patches that each token stands for, floating ``[B, N]`` or ``[B, N, 1]``;
            ones if None.
        weight: Weight of each member, multiplied by its size; floating ``[B, N]`` or ``[B, N,
            1]``; ones if None.

    Shape:
        ``[B, N, C] -> [B, M, C], [B, M, 1]`` for B images, N input tokens, M output tokens and C
        channels.

    Returns:
        The means ``[B, M, C]`` of the dtype of ``x``, and the sizes ``[B, M, 1]``: float64 if ``x``
        and ``size`` are float64, else float32 (bfloat16 would count exactly only up to 256).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Differentiable in ``x``, ``size`` and ``weight``, to any order. Deterministic for any number
        of threads; no atomics.

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> x, size = tokenops.merge_wavg(torch.tensor([[[1.0], [5.0], [3.0]]]), token_map)
        >>> size.flatten().tolist()
        [2.0, 1.0]

    References:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
    """
    return _checked("merge_wavg", "x", x, token_map).merge_wavg(x, size, weight=weight)


@overload
def unmerge(y: Tensor, token_map: TokenMap, *, residual: Tensor | None = None) -> Tensor: ...
@overload
def unmerge(
    y: Sequence[Tensor], token_map: TokenMap, *, residual: Tensor | None = None
) -> list[Tensor]: ...
def unmerge(
    y: Tensor | Sequence[Tensor], token_map: TokenMap, *, residual: Tensor | None = None
) -> Tensor | list[Tensor]:
    """Give each input token the row of its output token.

    ``out[b, n] = y[b, assign[b, n]] + residual[b, n]``; a dropped token gets the residual alone, or
    0 without one.

    Args:
        y: Tokens ``[B, M, C]`` of float16, bfloat16, float32 or float64, any strides. Or a list of
            such tensors, as for :func:`merge`.
        token_map: Map of N to M tokens.
        residual: ``[B, N, C]``, added in the same pass if it has the dtype of ``y``; not for a
            list of tensors.

    Shape:
        ``[B, M, C] -> [B, N, C]`` for B images, N input tokens, M output tokens and C channels.

    Returns:
        ``[B, N, C]`` of the dtype to which ``y`` and ``residual`` promote; a list for a list.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit, or a list comes with a residual.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Differentiable in ``y`` and ``residual``, to any order. Deterministic for any number of
        threads; no atomics.

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
        >>> tokenops.unmerge(torch.tensor([[[2.0], [5.0]]]), token_map).flatten().tolist()
        [2.0, 5.0, 2.0]

    References:
        Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
    """
    return _checked("unmerge", "y", y, token_map).unmerge(y, residual=residual)


def _checked(name: str, argument: str, tokens: object, token_map: object) -> TokenMap:
    """Check the type of ``token_map``, and whether tokens and map were swapped."""
    if isinstance(token_map, TokenMap):
        return token_map
    if isinstance(tokens, TokenMap):
        raise _checks.type_error(name, argument, "a tensor", tokens)
    raise _checks.type_error(name, "token_map", "a TokenMap", token_map)
