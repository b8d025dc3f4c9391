# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights, and the attention that keys receive."""

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None = ...,
    *,
    size: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    query_position: Tensor | None = ...,
    self_keep: bool = ...,
    eps: float = ...,
    is_causal: bool = ...,
    policy_grad: str = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None = ...,
    *,
    size: Tensor | None = ...,
    key_padding_mask: Tensor | None = ...,
    query_position: Tensor | None = ...,
    self_keep: bool = ...,
    eps: float = ...,
    is_causal: bool = ...,
    policy_grad: str = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """Softmax attention whose keys carry weights: a keep policy, a token size, or both.

    With ``s_ij = scale * q_i . k_j``, policy ``p``, size ``z`` and ``m_i`` the maximum of
    ``s_ij + log z_j`` over the keys, dropped ones included::

        w_ij = exp(s_ij - m_i) * z_j * (p_j, or 1 where i = j under self_keep)
        o_i  = (sum_j w_ij v_j + eps * mean_j v_j) / (sum_j w_ij + eps)

    ``eps=1e-6`` is DynamicViT's ``softmax_with_policy``, ``size`` alone ToMe's proportional
    attention. Memory is linear in the number of tokens, forward and backward (second derivatives
    keep maps of queries by keys); dropped keys and rows without a gradient are skipped where that
    changes nothing but rounding.

    Args:
        q: ``[B, H, Nq, D]``; float16, bfloat16, float32 or float64; any strides, best with a
            contiguous last dimension, for example views of a packed qkv.
        k: ``[B, Hkv, Nk, D]`` of the dtype of ``q``; ``Hkv`` divides ``H``.
        v: ``[B, Hkv, Nk, Dv]`` of the dtype of ``q``.
        policy: ``[B, Nk]``, ``[B, Nk, 1]`` or ``[B, H, Nk]``, bool or floating, at least 0: how
            much of each key is kept.
        size: ``[B, Nk]`` or ``[B, Nk, 1]``, floating, at least 0: how many tokens each key stands
            for. A key of size 0 is padding.
        key_padding_mask: Bool ``[B, Nk]``, true for padding, as in
            :class:`torch.nn.MultiheadAttention` (``~token_map.key_mask()``). Such keys take no
            part: neither in the maximum nor in the mean of the values.
        query_position: int32 or int64 ``[Nq]`` or ``[B, Nq]``, the key that stands where each query
            does, for ``self_keep`` and ``is_causal``: kept queries among all keys, or the last
            ones of a cache. ``0 .. Nq - 1`` by default. A query whose position is no key has none
            of its own.
        self_keep: A token always sees itself, whatever its policy.
        eps: Weight of the values' mean, relative to the largest weight of each row.
        is_causal: A query sees keys up to its position.
        policy_grad: Gradient of the policy: ``"exact"``, which is not zero where the policy is (it
            trains a predictor about tokens that it dropped); ``"kept"``, of kept tokens only, as
            when tokens are removed; ``"none"``.
        scale: ``1 / sqrt(D)`` by default.
        return_lse: Also return ``L_i = m_i + log(sum_j w_ij + eps)``.

    Returns:
        ``[B, H, Nq, Dv]`` in the dtype of ``q``, laid out so that
        ``out.transpose(1, 2).flatten(2)`` is a view; with ``return_lse`` also ``L``
        ``[B, H, Nq]`` in float32 (float64 for double). A row without any weight is 0, its ``L`` is
        -inf, and it has no gradients.

    Differentiable in: ``q``, ``k``, ``v``, ``policy``, ``size``, also through ``L``; twice. The
    gradient of a policy is computed in float32 and then takes the policy's dtype: keep policies in
    float32, since a dropped key that would dominate its rows has a gradient beyond float16. Where
    its logit lies more than 44 (double: 354) above the largest of the kept ones, its share
    ``exp(s_ij + log z_j - L_i)`` is capped at ``2^64`` (``2^512``), and its gradient with it.

    Determinism: the same bits from run to run, for any number of threads.

    Autocast lowers the precision of ``q``, ``k`` and ``v`` as for
    :func:`torch.nn.functional.scaled_dot_product_attention`.

    Under ``torch.compile``, each value of ``eps`` and ``scale`` compiles anew, as for PyTorch's own
    attention.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit. Negative or NaN policies and sizes
            are found where reading them does not wait for the device.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Source: ``softmax_with_policy`` of DynamicViT (Rao et al., NeurIPS 2021, section 3.3) and
    proportional attention of ToMe (Bolya et al., ICLR 2023, section 3).

    Example:
        >>> import torch, tokenops
        >>> q = k = v = torch.eye(2).expand(1, 1, 2, 2)
        >>> tokenops.policy_attention(q, k, v, torch.tensor([[1.0, 0.0]])).squeeze()[0].tolist()
        [1.0, 0.0]
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
    position = None
    if query_position is not None:
        position = _check_position(name, "query_position", query_position, q)
    _checks.check_choice(name, "policy_grad", policy_grad, POLICY_GRADS)
    self_keep = _self_keep(name, self_keep, policy, position, q, k)
    eps = _checks.check_real(name, "eps", eps, minimum=0.0)
    scale = _scale(name, scale, q)
    options = self_keep, False, eps, bool(is_causal), policy_grad, scale
    out, lse, _, _ = _backend.dispatch(name, q)(q, k, v, *weights, position, *options)
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
    """Attention that each key receives: what score-based pruning ranks tokens by.

    ``score_j = sum_i w_i y_ij`` with ``y`` the attention that :func:`policy_attention` applies and
    ``w`` the queries' weights, in memory that is linear in the number of tokens.

    Args:
        q: ``[B, H, Nq, D]``; float16, bfloat16, float32 or float64; any strides.
        k: ``[B, Hkv, Nk, D]`` of the dtype of ``q``; ``Hkv`` divides ``H``.
        query_weight: Floating ``[Nq]``, ``[B, Nq]`` or ``[B, H, Nq]``, one for each query by
            default; with ``query_index`` one for each index.
        query_index: Count these queries only: a list of ints or int32 or int64 ``[R]`` or
            ``[B, R]``; negative ones count from the end. ``[0]`` is the class token (EViT), the
            last token is ``[-1]`` (FastV). Only these rows are computed.
        policy: As in :func:`policy_attention`.
        size: As in :func:`policy_attention`.
        self_keep: As in :func:`policy_attention`, where ``Nq == Nk``. Off for a ``q`` of one row
            and several keys, as a cache has them: which key is the row's own is unknown.
        eps: As in :func:`policy_attention`.
        head_reduce: ``"mean"`` or ``"sum"`` over heads, or ``"none"``.
        exclude_self: Leave out what tokens give to themselves (PoWER-BERT), ``i = j``. Their
            attention to others stays as it is.
        is_causal: As in :func:`policy_attention`.
        key_padding_mask: As in :func:`policy_attention`. Padding has score 0.
        scale: ``1 / sqrt(D)`` by default.
        lse: ``L`` ``[B, H, Nq]`` that :func:`policy_attention` returned for the same arguments. It
            spares the search for the maximum where ``eps`` is 0, no more: gradients are as without
            it, and none goes to ``lse``.

    Returns:
        ``[B, Nk]``, or ``[B, H, Nk]`` without a reduction over heads, in float32 (float64 for
        double).

    Differentiable in: ``q``, ``k``, ``query_weight``, ``policy``, ``size``; twice.

    Determinism: the same bits from run to run, for any number of threads.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Source: EViT (Liang et al., ICLR 2022, section 3.2), FastV (Chen et al., ECCV 2024, section 4),
    PoWER-BERT (Goyal et al., ICML 2020, section 3.1).

    Example:
        >>> import torch, tokenops
        >>> q = k = torch.zeros(1, 2, 4, 8)
        >>> tokenops.attention_scores(q, k, query_index=[0]).tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    name = "attention_scores"
    q, k = _autocast(q, k)
    _check_heads(name, q, k)
    weights = _key_weights(name, q, k, policy, size, key_padding_mask)
    self_keep = _self_keep(name, self_keep, policy, None, q, k)
    batch, heads, queries = q.shape[:3]
    if lse is not None:
        if not isinstance(lse, Tensor) or lse.dtype != acc_dtype(q):
            raise _checks.type_error(name, "lse", f"a {acc_dtype(q)} tensor", lse)
        _checks.check_dense(name, "lse", lse)
        _checks.check_shape(name, "lse", lse, [(batch, heads, queries)])
        _checks.check_same_device(name, "lse", lse, q)
        lse = lse.detach()
    position = None
    if query_index is not None:
        q, lse, position = _select(name, query_index, q, lse)
        queries = q.shape[2]
        if not (self_keep or exclude_self or is_causal):
            position = None  # nobody asks
    if query_weight is not None:
        query_weight = _check_weight(name, query_weight, q, (batch, heads, queries))
    _checks.check_choice(name, "head_reduce", head_reduce, HEAD_REDUCTIONS)
    eps = _checks.check_real(name, "eps", eps, minimum=0.0)
    scale = _scale(name, scale, q)
    score: Tensor = _backend.dispatch(name, q)(
        *(q, k, query_weight, *weights, position, lse),
        *(self_keep, bool(exclude_self), eps, bool(is_causal), scale, head_reduce),
    )
    return score


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Lower the precision where autocast is on, as PyTorch does for attention."""
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
    groups = k.shape[1]
    if heads == 0 or groups == 0 or heads % groups != 0:
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
    """Policy [B, Nk] or [B, H, Nk] and size [B, Nk] in the type of sums, and the mask, checked."""
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    dtype = acc_dtype(q)
    rows, column, per_head = (batch, keys), (batch, keys, 1), (batch, heads, keys)
    if policy is not None:
        if isinstance(policy, Tensor) and policy.dtype == torch.bool:
            _checks.check_dense(name, "policy", policy)
        else:
            _check_weight_dtype(name, "policy", policy, "a bool or floating-point tensor")
        # The likely shape first: a comparison of symbolic sizes that fails is a guard for ever.
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
    least = _checks.read(value.detach().amin())  # NaN if there is one
    if least is not None and not least >= 0:
        raise _checks.value_mismatch(name, argument, ">= 0 everywhere", f"{least} in it")


def _check_weight(name: str, weight: Tensor, q: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The queries' weights as [B, Nq] or [B, H, Nq] in the type of sums."""
    batch, _, queries = shape
    _check_weight_dtype(name, "query_weight", weight, "a floating-point tensor")
    _checks.check_shape(name, "query_weight", weight, [(queries,), (batch, queries), shape])
    _checks.check_same_device(name, "query_weight", weight, q)
    weight = weight.to(acc_dtype(q))
    return weight.expand(batch, queries) if weight.dim() == 1 else weight


def _check_position(name: str, argument: str, value: Tensor, q: Tensor) -> Tensor:
    _checks.check_index(name, argument, value, dims=(1, 2))
    batch, queries = q.shape[0], q.shape[2]
    _checks.check_shape(name, argument, value, [(queries,), (batch, queries)])
    _checks.check_same_device(name, argument, value, q)
    # A wild int64 must not wrap around into the keys.
    return value.clamp(-1, torch.iinfo(torch.int32).max).int()


def _select(
    name: str, query_index: Any, q: Tensor, lse: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The chosen rows of q and lse, and their positions as int32 [R] or [B, R]."""
    queries = q.shape[2]

    def expected() -> str:  # only when it is wanted: writing out a symbolic size makes it constant
        return f"in [{-queries}, {queries})"

    if isinstance(query_index, (list, tuple, range)):
        lowest = -(2**31)
        rows = [_checks.check_int(name, "query_index", i, minimum=lowest) for i in query_index]
        if not all(-queries <= i < queries for i in rows):
            raise _checks.value_error(name, "query_index", expected(), query_index)
        first, count = (rows[0], len(rows)) if rows else (0, 0)
        one_side = first >= 0 or first + count <= 0
        if one_side and rows == list(range(first, first + count)):
            # Views, without a copy to the device.
            first = first + queries if first < 0 else first
            position = torch.arange(first, first + count, dtype=torch.int32, device=q.device)
            return q.narrow(2, first, count), _narrow(lse, first, count), position
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


def _narrow(lse: Tensor | None, first: int, count: int) -> Tensor | None:
    return None if lse is None else lse.narrow(2, first, count)


def _self_keep(
    name: str,
    self_keep: bool,
    policy: Tensor | None,
    position: Tensor | None,
    q: Tensor,
    k: Tensor,
) -> bool:
    """Whether own keys are kept, which only a policy calls for."""
    if policy is None or not self_keep:
        return False
    if position is not None or q.shape[2] == k.shape[2]:
        return True
    if name == "attention_scores" and q.shape[2] == 1:
        return False  # nobody says which key is the query's own
    got = f"{q.shape[2]} queries and {k.shape[2]} keys"
    where = " or a query_position" if name == "policy_attention" else ""
    expected = f"False unless there are as many queries as keys{where}"
    raise _checks.value_mismatch(name, "self_keep", expected, got)


def _scale(name: str, scale: float | None, q: Tensor) -> float:
    if scale is not None:
        return _checks.check_real(name, "scale", scale)
    return 1 / math.sqrt(q.shape[3]) if q.shape[3] > 0 else 1.0
