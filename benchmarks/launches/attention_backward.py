# SPDX-License-Identifier: Apache-2.0
"""Launches of attention's backward pass that ship, each kernel in every setting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tokenops.ops.attention.triton.backward import policy_attention_backward

_DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
}  # fmt: skip

#: What a call has: policy [B, Nk] or [B, H, Nk], sizes, a mask, positions; its flags.
_KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "policy eps": {"policy": 2, "eps": 1e-6},
    "policy": {"policy": 2},
    "kept": {"policy": 2, "policy_grad": "kept"},
    "size": {"size": True},
    "causal": {"causal": True},
    "all": {
        "policy": 3, "size": True, "mask": True, "position": True, "eps": 1e-6, "causal": True,
        "exclude": True, "grad_lse": True, "need_size": True,
    },
}  # fmt: skip


def _call(
    dtype: torch.dtype,
    width: int,
    tokens: int = 1025,
    *,
    policy: int = 0,
    size: bool = False,
    mask: bool = False,
    position: bool = False,
    eps: float = 0.0,
    causal: bool = False,
    exclude: bool = False,
    grad_lse: bool = False,
    need_size: bool = False,
    policy_grad: str = "exact",
    value_width: int | None = None,
) -> object:
    batch, heads = 8, 12
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    rows = tokens if eps > 0 else 0

    def some(*shape: int, dtype: torch.dtype = sums) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = some(batch, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    if value_width is not None:
        v = some(batch, heads, tokens, value_width, dtype=dtype)
    out = some(batch, tokens, heads, v.shape[3], dtype=dtype)
    return policy_attention_backward(
        out,
        some(batch, heads, tokens) if grad_lse else None,
        q,
        k,
        v,
        some(*(batch, heads)[: policy - 1], tokens) if policy else None,
        some(batch, tokens) if size else None,
        some(batch, tokens, dtype=torch.bool) if mask else None,
        some(batch, tokens, dtype=torch.int32) if position else None,
        out,
        some(batch, heads, tokens),
        some(batch, heads, rows),
        some(batch, heads, rows, dtype=torch.int32),
        policy > 0,
        exclude,
        eps,
        causal,
        policy_grad,
        width**-0.5,
        True,
        policy > 0,
        need_size,
    )


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in _DTYPES.items():
        for width in (64, 128, 256):
            # Where time matters all kinds of calls, elsewhere the most and the least of them.
            kinds = _KINDS if name == "bf16" and width < 256 else ("plain", "policy eps", "all")
            if name == "f16":  # as bfloat16, but for its range
                kinds = ("all",) if width == 64 else ()
            for kind in kinds:
                label = f"backward {kind} {name} D{width}"
                cases[label] = functools.partial(_call, dtype, width, **_KINDS[kind])
    for name, width, value_width in (("f32", 64, 128), ("bf16", 256, 64)):
        # Sides that take different numbers of parts.
        cases[f"backward policy eps {name} D{width} Dv{value_width}"] = functools.partial(
            _call, _DTYPES[name], width, 300, policy=2, eps=1e-6, value_width=value_width
        )
    cases["backward all f32 D80"] = functools.partial(_call, torch.float32, 80, **_KINDS["all"])
    cases["backward plain bf16 D80"] = functools.partial(_call, torch.bfloat16, 80)
    return cases


CASES: dict[str, Callable[[], object]] = _cases()
