# SPDX-License-Identifier: Apache-2.0
"""Attention's forward pass and scores: every setting, with and without what keys can have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenops.ops.attention.triton import attention_scores, policy_attention

_HALF, _SINGLE, _DOUBLE = torch.bfloat16, torch.float32, torch.float64
_NAMES = {_HALF: "bf16", torch.float16: "f16", _SINGLE: "f32", _DOUBLE: "f64"}

#: By name: which tensors come with a call, and its options.
_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "hard": {"policy": True},
    "size": {"size": True},
    "all": {"policy": True, "size": True, "mask": True, "is_causal": True},
    "eps": {"policy": True, "eps": 1e-6},
    "all eps": {"policy": True, "size": True, "mask": True, "is_causal": True, "eps": 1e-6},
    "position": {"policy": True, "mask": True, "position": True},
}


def _inputs(
    tokens: int, width: int, dtype: torch.dtype, queries: int, kind: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    """q, k, v of a packed qkv; policy, size and mask; position."""
    sums = _DOUBLE if dtype == _DOUBLE else _SINGLE
    qkv = torch.empty(2, tokens, 3, 12, width, dtype=dtype, device="meta").transpose(1, 3)
    q, k, v = qkv.unbind(2)
    weight = torch.empty(2, tokens, dtype=sums, device="meta")
    weights = [
        weight if kind.get("policy") else None,
        weight if kind.get("size") else None,
        weight.bool() if kind.get("mask") else None,
    ]
    position = torch.empty(queries, dtype=torch.int32, device="meta")
    return [q[:, :, :queries], k, v], weights, position if kind.get("position") else None


def _attend(
    tokens: int, width: int, dtype: torch.dtype, queries: int, kind: dict[str, Any]
) -> object:
    qkv, weights, position = _inputs(tokens, width, dtype, queries, kind)
    eps, causal = kind.get("eps", 0.0), kind.get("is_causal", False)
    scale = width**-0.5
    return policy_attention(
        *qkv, *weights, position, True, False, eps, causal, "exact", scale
    )  # fmt: skip


def _score(
    tokens: int, width: int, dtype: torch.dtype, queries: int, kind: dict[str, Any]
) -> object:
    (q, k, _), weights, position = _inputs(tokens, width, dtype, queries, kind)
    eps, causal = kind.get("eps", 0.0), kind.get("is_causal", False)
    exclude = position is None and kind.get("size", False)
    scale = width**-0.5
    return attention_scores(
        q, k, None, *weights, position, None, True, exclude, eps, causal, scale, "mean"
    )


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}

    def add(name: str, call: Callable[..., object], *sizes: Any) -> None:
        kind, dtype, tokens, width, queries = sizes
        label = f"{name} {kind} {_NAMES[dtype]} N{tokens} D{width}"
        label += f" Nq{queries}" if queries != tokens else ""
        cases[label] = partial(call, tokens, width, dtype, queries, _KINDS[kind])

    for kind in _KINDS:
        add("attention", _attend, kind, _HALF, 1025, 64, 1025)
        for dtype in (_HALF, _SINGLE, _DOUBLE):
            add("attention", _attend, kind, dtype, 197, 64, 197)
    for kind in ("plain", "hard", "all", "all eps"):
        add("attention", _attend, kind, _HALF, 577, 256, 577)
        for dtype in _NAMES:
            add("attention", _attend, kind, dtype, 577, 80, 577)
    for dtype in (_HALF, _SINGLE, _DOUBLE):
        add("attention", _attend, "all eps", dtype, 577, 1, 577)
        add("attention", _attend, "position", dtype, 577, 64, 9)
        for kind in ("plain", "size", "eps", "all eps"):
            add("scores", _score, kind, dtype, 577, 64, 577)
        for kind in ("plain", "position"):
            add("scores", _score, kind, dtype, 577, 64, 1)
        for width in (80, 256) if dtype.itemsize == 2 else (80,):
            add("scores", _score, "all eps", dtype, 577, width, 577)
            add("scores", _score, "position", dtype, 577, width, 1)
    add("attention", _attend, "position", _HALF, 197, 64, 9)
    return cases


CASES = _cases()
