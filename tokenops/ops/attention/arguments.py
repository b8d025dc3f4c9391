# SPDX-License-Identifier: Apache-2.0
"""Arguments and results of the operators of attention, in the order of their schemas.

Letters: B batch, H heads of queries, Hkv heads of keys, Nq queries, Nk keys, D width of queries and
keys, Dv width of values. The dtype of sums is ``acc_dtype(q)``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Arguments of ``policy_attention``."""

    q: Tensor  # [B, H, Nq, D]
    k: Tensor  # [B, Hkv, Nk, D]
    v: Tensor  # [B, Hkv, Nk, Dv]
    policy: Tensor | None  # [B, Nk] or [B, H, Nk] in the dtype of sums, >= 0
    size: Tensor | None  # [B, Nk] in the dtype of sums, >= 0; a key of size 0 is padding
    key_padding_mask: Tensor | None  # bool [B, Nk], true for padding
    query_position: Tensor | None  # int32 [Nq] or [B, Nq]; 0, 1, 2 ... by default
    self_keep: bool
    exclude_self: bool
    eps: float
    is_causal: bool
    policy_grad: str
    scale: float


class Saved(NamedTuple):
    """Results of ``policy_attention``, which its backward reads."""

    out: Tensor  # [B, Nq, H, Dv]
    lse: Tensor  # [B, H, Nq], log-sum-exp of each row
    p_eps: Tensor  # [B, H, Nq], share of a row's softmax that eps takes; [B, H, 0] without eps
    argmax: Tensor  # int32, shape of p_eps: key at which a row has its maximum; -1 for an empty row


class OutputGrads(NamedTuple):
    """Gradients of the outputs, which the backward takes."""

    grad_out: Tensor  # [B, Nq, H, Dv]
    grad_lse: Tensor | None  # [B, H, Nq]


class Needs(NamedTuple):
    """Gradients that the backward computes in addition to dq and dk."""

    need_v: bool
    need_policy: bool
    need_size: bool


class InputGrads(NamedTuple):
    """Results of ``policy_attention_backward``; a gradient that is not needed is empty."""

    dq: Tensor  # [B, Nq, H, D]
    dk: Tensor  # [B, Nk, Hkv, D]
    dv: Tensor  # [B, Nk, Hkv, Dv] or [B, 0, Hkv, Dv]
    dpolicy: Tensor  # as the policy, or [B, 0]
    dsize: Tensor  # [B, Nk] or [B, 0]


class ScoreInputs(NamedTuple):
    """Arguments of ``attention_scores``; a field that ``Inputs`` also has means the same."""

    q: Tensor
    k: Tensor
    query_weight: Tensor | None  # [B, Nq] or [B, H, Nq] in the dtype of sums
    policy: Tensor | None
    size: Tensor | None
    key_padding_mask: Tensor | None
    query_position: Tensor | None
    lse: Tensor | None  # [B, H, Nq] of policy_attention; kernels then skip a pass over the keys
    self_keep: bool
    exclude_self: bool
    eps: float
    is_causal: bool
    scale: float
    head_reduce: str
