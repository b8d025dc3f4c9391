# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights, and the attention that each key receives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ... import _backend, _checks
from ..._library import acc_dtype, knows_autocast
from . import schema  # noqa: F401 - registers the operators

POLICY_GRADS = ("exact", "kept", "none")
HEAD_REDUCTIONS = ("mean", "sum", "none")


@overload
def policy_attention(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None = ..., *, size: Tensor | None = ...,
    key_padding_mask: Tensor | None = ..., query_position: Tensor | None = ...,
    self_keep: bool = ..., eps: float = ..., is_causal: bool = ..., policy_grad: str = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def policy_attention(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None = ..., *, size: Tensor | None = ...,
    key_padding_mask: Tensor | None = ..., query_position: Tensor | None = ...,
    self_keep: bool = ..., eps: float = ..., is_causal: bool = ..., policy_grad: str = ...,
    scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None = None,
    *,
    size: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    query_position: Tensor | None = None,
    self_keep: bool = True,
    eps: float = 0.0,
    is_causal: bool = False,
    policy_grad: str = "exact",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with a weight on each key: a keep policy, a token size, or both.

    With ``s_ij = scale * q_i . k_j``, policy ``p``, size ``z`` and ``m_i`` the maximum of
    ``s_ij + log(z_j)`` over all keys, dropped ones included::

        w_ij = exp(s_ij - m_i) * z_j * p_j    (p_j = 1 if self_keep and i = j)
        o_i  = (sum_j w_ij * v_j + eps * mean_j v_j) / (sum_j w_ij + eps)

    ``policy`` with ``eps=1e-6`` is DynamicViT's ``softmax_with_policy``; ``size`` alone is ToMe's
    proportional attention. Memory is linear in the number of tokens, forward and backward.

    Args:
        q: Queries ``[B, H, Nq, D]``, float16, bfloat16, float32 or float64; any strides, for
            example a view of a packed qkv. A contiguous last dimension is fastest.
        k: Keys ``[B, Hkv, Nk, D]`` of the dtype of ``q``; ``Hkv`` divides ``H``.
        v: Values ``[B, Hkv, Nk, Dv]`` of the dtype of ``q``.
        policy: Share of each key that is kept, ``[B, Nk]``, ``[B, Nk, 1]`` or ``[B, H, Nk]``, bool
            or floating, at least 0.
        size: Number of tokens that each key stands for, floating ``[B, Nk]`` or ``[B, Nk, 1]``, at
            least 0. A key of size 0 is padding.
        key_padding_mask: Bool ``[B, Nk]``, true for padding, as in
            :class:`torch.nn.MultiheadAttention`, for example ``~token_map.key_mask()``. Padding
            counts neither in the maximum nor in the mean of the values.
        query_position: Index of the key at the position of each query, int32 or int64 ``[Nq]`` or
            ``[B, Nq]``, ``0 .. Nq - 1`` by default: of kept queries among all keys, or of the last
            tokens of a key cache. ``self_keep`` and ``is_causal`` refer to it. A query whose
            position is outside the keys has no key of its own.
        self_keep: Let each token attend to itself, whatever its policy is.
        eps: Weight of the mean of the values, relative to the largest ``w_ij`` of the row.
        is_causal: Let a query attend only to the keys up to its position.
        policy_grad: Gradient of the policy. ``"exact"`` is not zero for dropped tokens, so that a
            predictor learns about them. ``"kept"`` is zero for dropped tokens, as if they had been
            removed. With ``"none"`` the policy gets no gradient.
        scale: Factor of the logits; ``1 / sqrt(D)`` by default.
        return_lse: Also return the log-sum-exp of each row.

    Shape:
        ``[B, H, Nq, D], [B, Hkv, Nk, D], [B, Hkv, Nk, Dv] -> [B, H, Nq, Dv]`` for B images, H heads
        of queries, Hkv heads of keys and values, Nq queries, Nk keys, and widths D and Dv of a
        head.

    Returns:
        The output ``[B, H, Nq, Dv]`` in the dtype of ``q``, laid out as ``[B, Nq, H, Dv]``. With
        ``return_lse`` also the log-sum-exp of each row, ``m_i + log(sum_j w_ij + eps)``,
        ``[B, H, Nq]`` in float32 (float64 for double). A row whose weights are all 0 has output 0,
        ``lse`` -inf and gradients of 0.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit. Negative and NaN policies and sizes
            are errors only where reading them does not wait for the device.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Deterministic: the same bits from run to run, for any number of threads.

        Differentiable twice in ``q``, ``k``, ``v``, ``policy`` and ``size``, also through ``lse``.
        The second derivative stores whole attention maps. Keep policies in float32: the gradient
        of a dropped key with a large logit overflows float16. The probability
        ``exp(s_ij + log(z_j) - lse_i)`` of a dropped key is clamped at ``2^64`` (float64:
        ``2^512``), that is, if its logit exceeds the logits of all kept keys by 44 (float64: 354).

        Autocast lowers the precision of ``q``, ``k`` and ``v`` as it does for
        :func:`torch.nn.functional.scaled_dot_product_attention`. ``torch.compile`` recompiles
        for each value of ``eps`` and ``scale``.

    Example:
        >>> import torch, tokenops
        >>> q = k = v = torch.eye(2).expand(1, 1, 2, 2)
        >>> tokenops.policy_attention(q, k, v, torch.tensor([[1.0, 0.0]])).squeeze()[0].tolist()
        [1.0, 0.0]

    References:
        ``softmax_with_policy`` of DynamicViT (Rao et al., NeurIPS 2021, section 3.3), proportional
        attention of ToMe (Bolya et al., ICLR 2023, section 3).
    """
    name = "policy_attention"
    q, k, v = _autocast(q, k, v)
    _check_heads(name, q, k)
    _checks.check_floating(name, "v", v, dims=(4,))
    if v.dtype != q.dtype:
        raise _checks.type_error(name, "v", f"of dtype {q.dtype} as q", v)
    _checks.check_shape(name, "v", v, [(*k.shape[:3], v.shape[3])])
    _checks.check_same_device(name, "v", v, q)
    weights = _key_weights(name, q, k, policy, size, key_padding_mask)
    if query_position is not None:
        query_position = _query_position(name, query_position, q)
    _checks.check_choice(name, "policy_grad", policy_grad, POLICY_GRADS)
    self_keep = _self_keep(name, self_keep, policy, query_position, q, k)
    eps = _checks.check_real(name, "eps", eps, minimum=0.0)
    scale = _scale(name, scale, q)
    options = self_keep, False, eps, bool(is_causal), policy_grad, scale
    out, lse, _, _ = _backend.dispatch(name, q)(q, k, v, *weights, query_position, *options)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    query_weight: Tensor | None = None,
    query_index: Tensor | Sequence[int] | None = None,
    policy: Tensor | None = None,
    size: Tensor | None = None,
    self_keep: bool = True,
    eps: float = 0.0,
    head_reduce: str = "mean",
    exclude_self: bool = False,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives: a score to prune tokens by.

    ``score_j = sum_i w_i * y_ij`` with the attention ``y`` of :func:`policy_attention` and a weight
    ``w`` of each query. Memory is linear in the number of tokens.

    Args:
        q: Queries ``[B, H, Nq, D]``, float16, bfloat16, float32 or float64; any strides.
        k: Keys ``[B, Hkv, Nk, D]`` of the dtype of ``q``; ``Hkv`` divides ``H``.
        query_weight: Weight of each query, floating ``[Nq]``, ``[B, Nq]`` or ``[B, H, Nq]``; 1 by
            default. With ``query_index``, R weights take the place of Nq.
        query_index: Queries that take part; all by default. A list of ints, or int32 or int64
            ``[R]`` or ``[B, R]``; negative indices count from the end. ``[0]`` is the class token
            (EViT), ``[-1]`` the last token (FastV). Only these rows are computed.
        policy: As in :func:`policy_attention`.
        size: As in :func:`policy_attention`.
        self_keep: As in :func:`policy_attention`, for ``Nq == Nk``. It has no effect on a ``q`` of
            one row and several keys, as with a key cache: the row's own key is unknown.
        eps: As in :func:`policy_attention`.
        head_reduce: ``"mean"`` or ``"sum"`` over heads, or ``"none"``.
        exclude_self: Leave out the attention of tokens to themselves (PoWER-BERT). Their attention
            to other tokens does not change.
        is_causal: As in :func:`policy_attention`.
        key_padding_mask: As in :func:`policy_attention`. Padding has score 0.
        scale: Factor of the logits; ``1 / sqrt(D)`` by default.
        lse: Log-sum-exp ``[B, H, Nq]`` that :func:`policy_attention` returned for the same
            arguments. It saves time if ``eps`` is 0. It gets no gradient and changes no other
            gradient.

    Shape:
        ``[B, H, Nq, D], [B, Hkv, Nk, D] -> [B, Nk]`` for B images, H heads of queries, Hkv heads of
        keys, Nq queries, Nk keys, and heads of width D; R is the length of ``query_index``.

    Returns:
        Scores ``[B, Nk]``, or ``[B, H, Nk]`` for ``head_reduce="none"``, in float32 (float64 for
        double).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Deterministic: the same bits from run to run, for any number of threads.

        Differentiable twice in ``q``, ``k``, ``query_weight``, ``policy`` and ``size``.

    Example:
        >>> import torch, tokenops
        >>> q = k = torch.zeros(1, 2, 4, 8)
        >>> tokenops.attention_scores(q, k, query_index=[0]).tolist()
        [[0.25, 0.25, 0.25, 0.25]]

    References:
        EViT (Liang et al., ICLR 2022, section 3.2), FastV (Chen et al., ECCV 2024, section 4),
        PoWER-BERT (Goyal et al., ICML 2020, section 3.1).
    """
    name = "attention_scores"
    q, k = _autocast(q, k)
    _check_heads(name, q, k)
    weights = _key_weights(name, q, k, policy, size, key_padding_mask)
    self_keep = _self_keep(name, self_keep, policy, None, q, k)
    if lse is not None:
        if not isinstance(lse, Tensor) or lse.dtype != acc_dtype(q):
            raise _checks.type_error(name, "lse", f"a {acc_dtype(q)} tensor", lse)
        _checks.check_dense(name, "lse", lse)
        _checks.check_shape(name, "lse", lse, [tuple(q.shape[:3])])
        _checks.check_same_device(name, "lse", lse, q)
        lse = lse.detach()
    query_position = None
    if query_index is not None:
        q, lse, query_position = _take_rows(name, query_index, q, lse)
        if not (self_keep or exclude_self or is_causal):
            query_position = None  # it has no effect
    if query_weight is not None:
        query_weight = _query_weight(name, query_weight, q)
    _checks.check_choice(name, "head_reduce", head_reduce, HEAD_REDUCTIONS)
    eps = _checks.check_real(name, "eps", eps, minimum=0.0)
    scale = _scale(name, scale, q)
    score: Tensor = _backend.dispatch(name, q)(
        *(q, k, query_weight, *weights, query_position, lse),
        *(self_keep, bool(exclude_self), eps, bool(is_causal), scale, head_reduce),
    )
    return score


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of autocast, as PyTorch does for attention."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    known = device in ("cpu", "cuda") or knows_autocast(device)
    if not known or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def lower(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return tuple(map(lower, tensors))


def _check_heads(name: str, q: Tensor, k: Tensor) -> None:
    _checks.check_floating(name, "q", q, dims=(4,))
    _checks.check_floating(name, "k", k, dims=(4,))
    if k.dtype != q.dtype:
        raise _checks.type_error(name, "k", f"of dtype {q.dtype} as q", k)
    batch, heads, _, width = q.shape
    _checks.check_shape(name, "k", k, [(batch, k.shape[1], k.shape[2], width)])
    if heads == 0 or k.shape[1] == 0 or heads % k.shape[1] != 0:
        expected = f"of a number of heads that divides the {heads} heads of q"
        raise _checks.value_error(name, "k", expected, k)
    _checks.check_same_device(name, "k", k, q)


def _key_weights(
    name: str,
    q: Tensor,
    k: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Policy [B, Nk] or [B, H, Nk] and size [B, Nk] in the dtype of sums, and the mask, checked."""
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    dtype = acc_dtype(q)
    rows, column, per_head = (batch, keys), (batch, keys, 1), (batch, heads, keys)
    if policy is not None:
        if isinstance(policy, Tensor) and policy.dtype == torch.bool:
            _checks.check_dense(name, "policy", policy)
        else:
            _check_weight_dtype(name, "policy", policy, "a bool or floating-point tensor")
        # The likely shape first: torch.compile guards on each comparison of sizes that fails.
        is_column = policy.dim() == 3 and policy.shape[2] == 1 and policy.shape[1] == keys
        shapes = [rows, column, per_head] if is_column else [rows, per_head, column]
        _checks.check_shape(name, "policy", policy, shapes)
        _checks.check_same_device(name, "policy", policy, q)
        _check_not_negative(name, "policy", policy)
        policy = policy if policy.dtype == dtype else policy.to(dtype)
        policy = policy.flatten(1) if is_column else policy
    if size is not None:
        _check_weight_dtype(name, "size", size, "a floating-point tensor")
        _checks.check_shape(name, "size", size, [rows, column])
        _checks.check_same_device(name, "size", size, q)
        _check_not_negative(name, "size", size)
        size = size if size.dtype == dtype else size.to(dtype)
        size = size.flatten(1) if size.dim() == 3 else size
    if key_padding_mask is not None:
        _checks.check_bool(name, "key_padding_mask", key_padding_mask)
        _checks.check_shape(name, "key_padding_mask", key_padding_mask, [rows])
        _checks.check_same_device(name, "key_padding_mask", key_padding_mask, q)
    return policy, size, key_padding_mask


def _check_weight_dtype(name: str, argument: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise _checks.type_error(name, argument, expected, value)
    _checks.check_dense(name, argument, value)


def _check_not_negative(name: str, argument: str, value: Tensor) -> None:
    if value.dtype == torch.bool or not _checks.values_visible(value) or value.numel() == 0:
        return
    least = _checks.read(value.detach().amin())  # NaN if any value is NaN
    if least is not None and not least >= 0:
        raise _checks.value_mismatch(name, argument, ">= 0 everywhere", f"a minimum of {least}")


def _query_weight(name: str, weight: Tensor, q: Tensor) -> Tensor:
    """Weights of queries as [B, Nq] or [B, H, Nq] in the dtype of sums, checked."""
    batch, heads, queries = q.shape[:3]
    shapes = [(queries,), (batch, queries), (batch, heads, queries)]
    _check_weight_dtype(name, "query_weight", weight, "a floating-point tensor")
    _checks.check_shape(name, "query_weight", weight, shapes)
    _checks.check_same_device(name, "query_weight", weight, q)
    weight = weight.to(acc_dtype(q))
    return weight.expand(batch, queries) if weight.dim() == 1 else weight


def _query_position(name: str, position: Tensor, q: Tensor) -> Tensor:
    """Positions as int32 [Nq] or [B, Nq], checked."""
    batch, queries = q.shape[0], q.shape[2]
    _checks.check_index(name, "query_position", position, dims=(1, 2))
    _checks.check_shape(name, "query_position", position, [(queries,), (batch, queries)])
    _checks.check_same_device(name, "query_position", position, q)
    # An int64 outside the range of int32 must not wrap around to a key.
    return position.clamp(-1, torch.iinfo(torch.int32).max).int()


def _take_rows(
    name: str, query_index: Any, q: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows of q and lse by index, and their positions, int32 [R] or [B, R]."""
    queries = q.shape[2]

    def expected() -> str:  # only for errors: formatting a symbolic size specializes it
        return f"in [{-queries}, {queries})"

    if isinstance(query_index, (list, tuple, range)):
        lowest = -(2**31)
        rows = [_checks.check_int(name, "query_index", i, minimum=lowest) for i in query_index]
        if not all(-queries <= i < queries for i in rows):
            raise _checks.value_error(name, "query_index", expected(), query_index)
        first, count = (rows[0], len(rows)) if rows else (0, 0)
        one_sign = first >= 0 or first + count <= 0
        if one_sign and rows == list(range(first, first + count)):
            # Consecutive rows are views: nothing is copied to the device.
            first = first + queries if first < 0 else first
            position = torch.arange(first, first + count, dtype=torch.int32, device=q.device)
            lse = None if lse is None else lse.narrow(2, first, count)
            return q.narrow(2, first, count), lse, position
        query_index = torch.tensor([i + queries if i < 0 else i for i in rows], device=q.device)
    _checks.check_index(name, "query_index", query_index, dims=(1, 2))
    if query_index.dim() == 2:
        _checks.check_shape(name, "query_index", query_index, [(q.shape[0], query_index.shape[1])])
    _checks.check_same_device(name, "query_index", query_index, q)
    _checks.check_range(name, "query_index", query_index, -queries, queries)
    from_start = torch.where(query_index < 0, query_index + queries, query_index)
    position = from_start.clamp(0, max(queries - 1, 0)).int()
    index = position.long().expand(q.shape[0], -1)[:, None].expand(-1, q.shape[1], -1)  # [B, H, R]
    q = q.gather(2, index[..., None].expand(-1, -1, -1, q.shape[3]))
    return q, None if lse is None else lse.gather(2, index), position


def _self_keep(
    name: str, self_keep: bool, policy: Tensor | None, position: Tensor | None, q: Tensor, k: Tensor
) -> bool:
    """Whether a policy does not apply to a row's own key."""
    if policy is None or not self_keep:
        return False
    if position is not None or q.shape[2] == k.shape[2]:
        return True
    if name == "attention_scores" and q.shape[2] == 1:
        return False  # the row's own key is unknown
    got = f"{q.shape[2]} queries and {k.shape[2]} keys"
    where = " or a query_position" if name == "policy_attention" else ""
    expected = f"False unless there are as many queries as keys{where}"
    raise _checks.value_mismatch(name, "self_keep", expected, got)


def _scale(name: str, scale: float | None, q: Tensor) -> float:
    if scale is not None:
        return _checks.check_real(name, "scale", scale)
    return 1 / math.sqrt(q.shape[3]) if q.shape[3] > 0 else 1.0
