# SPDX-License-Identifier: Apache-2.0
"""Drop-in for EViT: the class token's attention, ``complement_idx`` and the dropping of tokens.

The attention map of a block is not needed: :func:`class_attention` computes only the row of the
class token, and any fused attention computes the output. With ``q``, ``k`` of a block and its
tokens ``x`` after attention::

    cls_attn = class_attention(q, k)
    x, token_map = drop_tokens(x, cls_attn, keep_rate=0.7, fuse_token=True)

Two differences correct errors of EViT: ``num_prefix`` protects further prefix tokens (distillation,
registers) from being dropped (EViT #15), and an index out of range is an error.

References:
    Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", ICLR 2022, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import TokenMap, _checks, attention_scores, prune
from .. import merge as _merge

__all__ = ["class_attention", "complement_idx", "drop_tokens"]


def class_attention(
    q: Tensor, k: Tensor, scale: float | None = None, num_prefix: int = 1
) -> Tensor:
    """Attention of the class token to each token outside the prefix, the mean over heads.

    ``softmax(scale * q_0 k^T)[num_prefix:]``, without the other rows of the attention map.

    Args:
        q: ``[B, H, N, D]``, of which token 0 is the class token.
        k: ``[B, H, N, D]`` of the dtype of ``q``; ``[B, Hkv, N, D]`` if heads share keys.
        scale: ``1 / sqrt(D)`` by default.
        num_prefix: Leading tokens that are left out of the result, not of the softmax.

    Returns:
        ``[B, N - num_prefix]`` in float32 (float64 for double).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or device does not fit.

    Note:
        Differentiable in ``q`` and ``k``.

    Example:
        >>> from tokenops.compat.evit import class_attention
        >>> class_attention(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)).tolist()
        [[0.25, 0.25, 0.25]]

    References:
        ``attn[:, :, 0, 1:].mean(dim=1)`` of EViT's ``Attention``.
    """
    num_prefix = _checks.check_int("class_attention", "num_prefix", num_prefix)
    return attention_scores(q, k, query_index=[0], scale=scale)[:, num_prefix:]


def complement_idx(idx: Tensor, dim: int) -> Tensor:
    """Indices in ``range(dim)`` that ``idx`` does not contain, ascending.

    Args:
        idx: int32 or int64 ``[..., K]``, distinct along the last dimension, in [0, dim).
        dim: Number of tokens.

    Returns:
        int64 ``[..., dim - K]``.

    Raises:
        TypeError: If ``idx`` is not an integer tensor.
        ValueError: If K is above ``dim``, or an index is out of range (clamped where reading
            indices would wait for the device).

    Note:
        Deterministic: the same bits from run to run.

    Example:
        >>> from tokenops.compat.evit import complement_idx
        >>> complement_idx(torch.tensor([[3, 0]]), 5).tolist()
        [[1, 2, 4]]

    References:
        ``complement_idx`` of EViT.
    """
    name = "complement_idx"
    dim = _checks.check_int(name, "dim", dim)
    _checks.check_index(name, "idx", idx, dims=None)
    if idx.dim() == 0 or idx.shape[-1] > dim:
        expected = f"of shape [..., K] with K at most dim = {dim}"
        raise _checks.value_error(name, "idx", expected, idx)
    _checks.check_range(name, "idx", idx, 0, dim)
    named = torch.zeros(*idx.shape[:-1], dim, dtype=torch.uint8, device=idx.device)
    named = named.scatter(-1, idx.long().clamp(0, max(dim - 1, 0)), 1)
    return named.argsort(dim=-1, stable=True)[..., : dim - idx.shape[-1]]


def drop_tokens(
    x: Tensor,
    cls_attn: Tensor,
    keep_rate: float = 1.0,
    tokens: int | None = None,
    fuse_token: bool = False,
    *,
    num_prefix: int = 1,
    order: str = "score",
) -> tuple[Tensor, TokenMap]:
    """Keep the tokens that the class token attends to most; drop the others or fuse them into one.

    The fused token is ``sum_n cls_attn[n] x[n]`` over the dropped tokens; the sum is not
    normalized.

    Args:
        x: ``[B, N, C]``, prefix first.
        cls_attn: ``[B, N - num_prefix]``, from :func:`class_attention`.
        keep_rate: Share of the tokens outside the prefix to keep, in (0, 1]; rounded up.
        tokens: Number of these tokens to keep, at least 1; overrides ``keep_rate``.
        fuse_token: Append the fused token.
        num_prefix: Leading tokens that are always kept, in front.
        order: ``"score"``: kept tokens by descending attention, as in EViT; ``"position"``:
            in the order of the input.

    Returns:
        The tokens ``[B, num_prefix + kept (+ 1), C]`` in the dtype of ``x``, and the map that made
        them. ``token_map.members[:, num_prefix : num_prefix + kept] - num_prefix`` is EViT's
        ``idx``. If nothing is dropped, ``x`` itself, in its order, and the identity.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit.

    Note:
        Differentiable in ``x``, and ``cls_attn`` through the fused token. Deterministic: the same
        bits from run to run; ties go to the lowest index.

    Example:
        >>> from tokenops.compat.evit import drop_tokens
        >>> x, cls_attn = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[0.25, 0.5]])
        >>> drop_tokens(x, cls_attn, 0.5, fuse_token=True)[0].flatten().tolist()
        [1.0, 3.0, 0.5]

    References:
        ``Attention`` and ``Block`` of EViT; Liang et al., ICLR 2022, sections 3.2 and 3.3.
    """
    name = "drop_tokens"
    _checks.check_floating(name, "x", x, dims=(3,))
    num_prefix = _checks.check_int(name, "num_prefix", num_prefix)
    if num_prefix > x.shape[1]:
        raise _checks.value_error(name, "num_prefix", f"at most N = {x.shape[1]}", num_prefix)
    batch, free = x.shape[0], x.shape[1] - num_prefix
    _checks.check_floating(name, "cls_attn", cls_attn, dims=(2,))
    _checks.check_shape(name, "cls_attn", cls_attn, [(batch, free)])
    if tokens is None:
        keep_rate = _checks.check_real(name, "keep_rate", keep_rate)
        if not 0 < keep_rate <= 1:
            raise _checks.value_error(name, "keep_rate", "in (0, 1]", keep_rate)
        tokens = math.ceil(keep_rate * free)
    else:
        tokens = _checks.check_int(name, "tokens", tokens, minimum=1)
    if tokens >= free:
        return x, TokenMap.identity(batch, x.shape[1], x.device)
    scores = torch.nn.functional.pad(cls_attn, (num_prefix, 0))
    token_map = prune(scores, tokens, num_prefix=num_prefix, order=order, fuse=fuse_token)
    weight = None
    if fuse_token:
        fused = token_map.assign == token_map.num_tokens - 1
        weight = torch.where(fused, scores, 1)
    return _merge(x, token_map, reduce="sum", weight=weight), token_map
