# SPDX-License-Identifier: Apache-2.0
"""Drop-in for DynamicViT: attention under a keep policy, and the index functions of its ``utils``.

Arguments and results are as in DynamicViT. :func:`attention_with_policy` computes
:func:`softmax_with_policy` and the product with the values without storing an attention map;
:func:`masked_mean` is the mean in the predictor. See also :func:`tokenops.gumbel_keep`,
:func:`tokenops.keep_ratio_loss` and :func:`tokenops.prune`.

These differences correct errors of DynamicViT:

* Double precision is computed in double precision, not in single.
* Without ``eps``, a dropped key that dominates a row does not make it NaN; a row whose logits are
  all -inf is uniform (0 without ``eps``), not NaN.
* An index out of range is an error, and does not select a token of another image.
* ``batch_index_fill`` does not write into its argument, and defines the result of repeated indices.
* The mean over an image without kept tokens is 0, not NaN (DynamicViT #27).

References:
    Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
    NeurIPS 2021, sections 3.2 and 3.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import TokenMap, _checks, policy_attention, unmerge

__all__ = [
    "attention_with_policy",
    "batch_index_fill",
    "batch_index_select",
    "masked_mean",
    "softmax_with_policy",
]


def softmax_with_policy(attn: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over keys, some of which are dropped; each token attends to itself.

    ``y_ij = (w_ij + eps / N) / (sum_j w_ij + eps)`` with ``w_ij = exp(s_ij - max_j s_ij) * p_j``,
    where ``p_j`` is 1 for ``i = j``.

    Args:
        attn: Logits ``[B, H, N, N]``; float16, bfloat16, float32 or float64.
        policy: Share of each token that is kept, ``[B, N, 1]`` or ``[B, N]``, at least 0.
        eps: Smoothing, at least 0.

    Returns:
        The attention ``[B, H, N, N]`` in the dtype of ``attn``, computed in float32 (float64 for
        double). Only the arguments are saved for the backward.

    Raises:
        TypeError: If ``attn`` is not a floating-point tensor.
        ValueError: If a shape does not fit.

    Note:
        Differentiable in ``attn`` and ``policy``, twice; the gradient of the policy is not zero
        for dropped keys. Deterministic: the same bits from run to run.

    Example:
        >>> from tokenops.compat.dynamicvit import softmax_with_policy
        >>> policy = torch.tensor([[[1.0], [0.0]]])
        >>> softmax_with_policy(torch.zeros(1, 1, 2, 2), policy, eps=0.0).tolist()
        [[[[1.0, 0.0], [0.5, 0.5]]]]

    References:
        ``softmax_with_policy`` of DynamicViT.
    """
    name = "softmax_with_policy"
    _checks.check_floating(name, "attn", attn, dims=(4,))
    if attn.shape[2] != attn.shape[3]:
        raise _checks.value_error(name, "attn", "of shape [B, H, N, N]", attn)
    eps = _checks.check_real(name, "eps", eps, minimum=0.0)
    batch, _, tokens, _ = attn.shape
    policy = _as_column(name, policy, batch, tokens)
    out: Tensor = _Softmax.apply(attn, policy, eps)  # type: ignore[no-untyped-call]
    return out


def attention_with_policy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """Fused ``softmax_with_policy(q @ k.transpose(-2, -1) * scale, policy, eps) @ v``.

    Args:
        q: ``[B, H, N, D]``.
        k: ``[B, H, N, D]`` of the dtype of ``q``.
        v: ``[B, H, N, D]`` of the dtype of ``q``.
        policy: ``[B, N, 1]`` or ``[B, N]``, at least 0; plain softmax, without ``eps``, when None.
        eps: Smoothing, at least 0.
        scale: ``1 / sqrt(D)`` by default.

    Returns:
        ``[B, H, N, D]``, with strides such that ``.transpose(1, 2).reshape(B, N, C)`` is a view.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit.

    Note:
        Differentiable in ``q``, ``k``, ``v`` and ``policy``.

    Example:
        >>> from tokenops.compat.dynamicvit import attention_with_policy
        >>> q = k = v = torch.eye(2).expand(1, 1, 2, 2)
        >>> out = attention_with_policy(q, k, v, torch.tensor([[[1.0], [0.0]]]), eps=0.0)
        >>> out[0, 0, 0].tolist()
        [1.0, 0.0]

    References:
        ``Attention`` of DynamicViT; see :func:`tokenops.policy_attention`.
    """
    if policy is None:
        eps = 0.0
    return policy_attention(q, k, v, policy, eps=eps, scale=scale)


def batch_index_select(x: Tensor, idx: Tensor) -> Tensor:
    """Take tokens of each image by index: ``out[b, m] = x[b, idx[b, m]]``.

    Args:
        x: ``[B, N, C]``, ``[B, N]`` or ``[B, N, ...]`` of any dtype.
        idx: int32 or int64 ``[B, M]``, or ``[1, M]`` for all images, in [0, N).

    Returns:
        ``[B, M, ...]`` in the dtype of ``x``.

    Raises:
        TypeError: If ``idx`` is not an integer tensor.
        ValueError: If a shape does not fit or an index is out of range; where reading indices
            would wait for the device, they are clamped instead.

    Note:
        Differentiable in ``x``. Deterministic: the same bits from run to run, also in the gradient
        of a token taken twice.

    Example:
        >>> from tokenops.compat.dynamicvit import batch_index_select
        >>> batch_index_select(torch.tensor([[5.0, 6.0, 7.0]]), torch.tensor([[2, 0]])).tolist()
        [[7.0, 5.0]]

    References:
        ``batch_index_select`` of DynamicViT, except that an index out of range is an error instead
        of a token of another image, and that ``x`` may have any rank above 1.
    """
    name = "batch_index_select"
    _check_rows(name, "x", x)
    return _take(x, _check_index(name, "idx", idx, x.shape[0], x.shape[1]))


def batch_index_fill(x: Tensor, x1: Tensor, x2: Tensor, idx1: Tensor, idx2: Tensor) -> Tensor:
    """Write two sets of tokens by index: ``x[b, idx1[b]] = x1[b]``, then ``x[b, idx2[b]] = x2[b]``.

    Args:
        x: ``[B, N, C]`` or ``[B, N, ...]``, the tokens at all other indices; it is not changed.
        x1: ``[B, N1, ...]``.
        x2: ``[B, N2, ...]``.
        idx1: int32 or int64 ``[B, N1]``, or ``[1, N1]`` for all images, in [0, N).
        idx2: int32 or int64 ``[B, N2]`` or ``[1, N2]``, in [0, N).

    Returns:
        ``[B, N, ...]`` in the dtype of ``x``. Of several tokens with one index the last one is
        taken; ``x2`` comes after ``x1``.

    Raises:
        TypeError: If an index is not an integer tensor.
        ValueError: If a shape does not fit or an index is out of range; where reading indices
            would wait for the device, they are clamped instead.

    Note:
        Differentiable in ``x``, ``x1`` and ``x2``. Deterministic: the same bits from run to run.

    Example:
        >>> from tokenops.compat.dynamicvit import batch_index_fill
        >>> x, x1, x2 = torch.zeros(1, 3, 1), torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)
        >>> batch_index_fill(x, x1, x2, torch.tensor([[2]]), torch.tensor([[0]])).flatten().tolist()
        [2.0, 0.0, 1.0]

    References:
        ``batch_index_fill`` of DynamicViT, except that it does not write into ``x``, that the
        result of repeated indices is defined, and that an index out of range is an error.
    """
    name = "batch_index_fill"
    _check_rows(name, "x", x)
    batch, tokens = x.shape[:2]
    places = []
    for i, rows, idx in ((1, x1, idx1), (2, x2, idx2)):
        idx = _check_index(name, f"idx{i}", idx, batch, tokens)
        _check_rows(name, f"x{i}", rows)
        _checks.check_shape(name, f"x{i}", rows, [(batch, idx.shape[1], *x.shape[2:])])
        places.append(idx)
    # The row at each index: that of x, or the last one written to this index.
    place = torch.cat(places, dim=1)
    rows = torch.cat([x, x1.to(x.dtype), x2.to(x.dtype)], dim=1)
    number = torch.arange(rows.shape[1], device=x.device).expand(batch, -1)
    last = number[:, :tokens].scatter_reduce(1, place, number[:, tokens:], "amax")
    return _take(rows, last)


def masked_mean(x: Tensor, policy: Tensor) -> Tensor:
    """Mean of the kept tokens of each image: the predictor's global feature.

    ``out[b] = sum_n p[b, n] x[b, n] / sum_n p[b, n]``, 0 where the policy sums to 0.

    Args:
        x: ``[B, N, C]``; float16, bfloat16, float32 or float64.
        policy: ``[B, N, 1]`` or ``[B, N]``, at least 0.

    Returns:
        ``[B, 1, C]`` in the dtype of ``x``; float16 and bfloat16 accumulate in float32.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If a shape does not fit.

    Note:
        Differentiable in ``x`` and ``policy``. Without kept tokens the gradient is finite:
        0 for ``x``, ``g . x[b, n]`` for the policy, as if one token were kept. Deterministic: the
        same bits from run to run.

    Example:
        >>> from tokenops.compat.dynamicvit import masked_mean
        >>> x = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]])
        >>> masked_mean(x, torch.tensor([[1.0, 1.0], [0.0, 0.0]])).flatten().tolist()
        [2.0, 0.0]

    References:
        ``PredictorLG`` of DynamicViT, whose mean without kept tokens is NaN (#27).
    """
    name = "masked_mean"
    _checks.check_floating(name, "x", x, dims=(3,))
    policy = _as_column(name, policy, x.shape[0], x.shape[1])
    dtype = _sum_dtype(x)
    total = policy.sum(1, keepdim=True, dtype=dtype)  # [B, 1, 1]
    total = torch.where(total == 0, 1, total)
    mean: Tensor = (x * policy.to(x.dtype)).sum(1, keepdim=True, dtype=dtype) / total
    return mean.to(x.dtype)


class _Softmax(torch.autograd.Function):
    """Saves only its arguments; the backward computes the attention map again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(attn: Tensor, policy: Tensor, eps: float) -> Tensor:
        weight, _ = _weights(attn, policy, eps)
        own = weight.diagonal(dim1=-2, dim2=-1).clone()
        weight.mul_(policy[:, None, None, :, 0].to(weight.dtype)).diagonal(dim1=-2, dim2=-1).copy_(
            own
        )
        total = _nonzero(weight.sum(-1, keepdim=True) + eps)
        # If a function ends with an in-place operation or a conversion to the same dtype, PyTorch
        # 2.11 compiles it to one whose gradients are 0.
        out = weight.add_(eps / max(attn.shape[-1], 1)) / total
        return out if out.dtype == attn.dtype else out.to(attn.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        attn, policy, ctx.eps = inputs
        ctx.save_for_backward(attn, policy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        attn, policy = ctx.saved_tensors
        weight, top = _weights(attn, policy, ctx.eps)
        tokens = weight.shape[-1]
        own = torch.eye(tokens, dtype=torch.bool, device=weight.device)
        keep = torch.where(own, 1, policy[:, None, None, :, 0].to(weight.dtype))  # [B, 1, N, N]
        total = _nonzero((weight * keep).sum(-1, keepdim=True) + ctx.eps)
        p = weight / total  # attention before the policy
        p_eps = ctx.eps / total  # [B, H, N, 1]
        grad = grad.to(weight.dtype)
        mean = grad.sum(-1, keepdim=True) / max(tokens, 1)
        delta = (grad * p * keep).sum(-1, keepdim=True) + p_eps * mean
        ds = p * (grad - delta)
        d_attn = d_policy = None
        if ctx.needs_input_grad[0]:
            at_top = top == torch.arange(tokens, device=weight.device)
            d_attn = (ds * keep + p_eps * (mean - delta) * at_top).to(attn.dtype)
        if ctx.needs_input_grad[1]:
            d_policy = ds.masked_fill(own, 0).sum((1, 2))[..., None].to(policy.dtype)
        return d_attn, d_policy, None


def _weights(attn: Tensor, policy: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``exp(s - m)`` in the dtype of sums, and the key [B, H, N, 1] of each row's maximum m."""
    s = attn.to(_sum_dtype(attn))
    if s.shape[-1] == 0:
        return s.exp(), torch.zeros_like(s, dtype=torch.int64)
    candidates = s.detach()
    if eps == 0:  # m cancels out: without dropped keys, kept ones do not underflow
        own = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
        dropped = (policy.detach() == 0)[:, None, None, :, 0] & ~own
        candidates = candidates.masked_fill(dropped, -math.inf)
    top = candidates.argmax(-1, keepdim=True)
    m = s.gather(-1, top)
    s = s - torch.where(m == -math.inf, 0, m)
    if eps == 0:
        s = s.clamp(max=math.log(torch.finfo(s.dtype).max) / 2)
    return s.exp(), top


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _take(x: Tensor, idx: Tensor) -> Tensor:
    """Rows of ``x`` [B, N, ...] by valid indices [B, M]."""
    if x.is_floating_point() and x.dtype.itemsize > 1:
        rows = x.flatten(2) if x.dim() > 2 else x[..., None]
        out = unmerge(rows, TokenMap.from_assign(idx, x.shape[1]))
    else:
        index = idx.reshape(*idx.shape, *(1 for _ in x.shape[2:]))
        out = x.gather(1, index.expand(-1, -1, *x.shape[2:]))
    return out.reshape(*idx.shape, *x.shape[2:])


def _check_index(name: str, argument: str, idx: Tensor, batch: int, tokens: int) -> Tensor:
    """Check indices, and clamp them to [0, N): int64 [B, M]."""
    _checks.check_index(name, argument, idx, dims=(2,))
    if idx.shape[0] not in (1, batch):
        raise _checks.value_error(name, argument, f"of shape [{batch}, M]", idx)
    _checks.check_range(name, argument, idx, 0, tokens)
    if tokens == 0 and idx.shape[1] > 0:
        raise _checks.value_error(name, argument, "empty without tokens", idx)
    return idx.long().clamp(0, max(tokens - 1, 0)).expand(batch, -1)


def _check_rows(name: str, argument: str, x: Tensor) -> None:
    """Check for a tensor [B, N, ...] of any dtype."""
    if not isinstance(x, Tensor):
        raise _checks.type_error(name, argument, "a tensor", x)
    _checks.check_dense(name, argument, x)
    if x.dim() < 2:
        raise _checks.value_error(name, argument, "of shape [B, N, ...]", x)


def _as_column(name: str, policy: Tensor, batch: int, tokens: int) -> Tensor:
    """Check the policy, and reshape it to [B, N, 1]."""
    if not isinstance(policy, Tensor):
        raise _checks.type_error(name, "policy", "a tensor", policy)
    _checks.check_dense(name, "policy", policy)
    _checks.check_shape(name, "policy", policy, [(batch, tokens, 1), (batch, tokens)])
    return policy.reshape(batch, tokens, 1)
