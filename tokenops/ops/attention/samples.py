# SPDX-License-Identifier: Apache-2.0
"""Samples of the operators of attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...testing import random_attention, random_tokens
from ...testing.samples import B, C, Call, N, Sample, Sizes
from .api import attention_scores, policy_attention
from .arguments import Inputs, ScoreInputs

#: For each kind: options of ``random_attention``, and options that differ from ``DEFAULTS``.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "policy": ({"policy": "hard"}, {"self_keep": True}),
    "eps": (
        {"policy": "per-head", "key_heads": 1},
        {"self_keep": True, "eps": 1e-3, "policy_grad": "kept"},
    ),
    "all": (
        {"policy": "soft", "zero_sizes": 0.2, "padding": 0.2, "value_width": 2},
        {"self_keep": True, "exclude_self": True, "eps": 1e-2, "is_causal": True},
    ),
    "none": ({"policy": "soft", "layout": "packed"}, {"policy_grad": "none"}),
    "half": (
        {"zero_sizes": 0.0, "dtype": torch.bfloat16},
        {"exclude_self": True, "eps": 1e-3, "is_causal": True},
    ),
    "double": ({"policy": "hard", "dtype": torch.float64}, {"self_keep": True, "eps": 1e-3}),
}
DEFAULTS = {
    "self_keep": False, "exclude_self": False, "eps": 0.0, "is_causal": False,
    "policy_grad": "exact", "scale": C**-0.5,
}  # fmt: skip


def samples() -> Iterator[Sample]:
    """Every kind of inputs, for attention, its backward and scores."""
    for name, (kind, options) in KINDS.items():
        position = None
        if name in ("eps", "none", "half"):
            position = torch.tensor([0, 3, 1, -1, 9, 2, 2], dtype=torch.int32)
            position = position if name == "eps" else position.expand(B, N).contiguous()
        named: dict[str, Any] = {
            **dict.fromkeys(Inputs._fields), **random_attention(B, 2, N, C, seed=3, **kind),
            **DEFAULTS, **options, "query_position": position,
        }  # fmt: skip
        inputs = Inputs(**named)
        yield Sample("policy_attention", name, _leaves(inputs))

        saved = torch.ops.tokenops.policy_attention(*inputs)
        grad_out = random_tokens(*saved[0].shape, dtype=inputs.q.dtype, seed=4)
        if name == "none":
            grad_out = grad_out[..., :1].expand(grad_out.shape)
        grad_lse = None if name == "plain" else torch.randn_like(saved[1])
        needs = name != "policy", name != "none", True
        arguments = *inputs, *saved, grad_out, grad_lse, *needs
        yield Sample("policy_attention_backward", name, arguments)

        named = {n: named.get(n) for n in ScoreInputs._fields}
        named["head_reduce"] = {"plain": "mean", "policy": "none", "eps": "none"}.get(name, "sum")
        if name != "plain":
            weight = torch.linspace(-1, 2, N).to(saved[1])
            named["query_weight"] = weight.expand(B, *((2,) * (name == "eps")), N)
        leaves = ScoreInputs(*_leaves(ScoreInputs(**named)))
        lse = saved[1] if name in ("policy", "all") else None
        yield Sample("attention_scores", name, tuple(leaves._replace(lse=lse)))


def _leaves(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Arguments whose floating-point tensors are leaves that require a gradient."""
    return tuple(
        t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t
        for t in arguments
    )


#: For each kind of call: options of ``random_attention``, and options of the function.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "soft": ({"policy": "soft"}, {"eps": 1e-3}),
    "hard": ({"policy": "hard", "zero_sizes": 0.1}, {}),
    "sizes": ({"zero_sizes": 0.0, "layout": "packed"}, {}),
    "per head": (
        {"policy": "per-head", "padding": 0.2, "key_heads": 1}, {"eps": 1e-2, "is_causal": True},
    ),
    "all": (
        {"policy": "soft", "zero_sizes": 0.0, "padding": 0.2}, {"eps": 1e-3, "self_keep": False},
    ),
}  # fmt: skip


def calls(sizes: Sizes) -> Iterator[Call]:
    """Every kind of key weights, for outputs and for scores of one row, of some and of all rows."""
    tokens = sizes.tokens
    for name, (kinds, options) in CALLS.items():
        inputs = random_attention(
            sizes.batch, sizes.heads, tokens, sizes.width, dtype=sizes.dtype, device=sizes.device,
            seed=16 * sizes.seed, **kinds,
        )  # fmt: skip
        mask = {n: inputs.pop(n) for n in ("key_padding_mask",) if n in inputs}
        fixed = {**options, **mask}
        attend = partial(policy_attention, return_lse=True, **fixed)
        yield Call("policy_attention", name, attend, inputs)
        rest = {n: t for n, t in inputs.items() if n != "v"}
        yield Call("attention_scores", name, partial(attention_scores, **fixed), rest)
        row = partial(attention_scores, **{**fixed, "is_causal": False}, query_index=[0])
        yield Call("attention_scores", f"{name}, class token", row, rest)
        if name == "plain":
            position = torch.arange(tokens, device=sizes.device)[::2]
            few = {**inputs, "q": inputs["q"][:, :, ::2]}
            attend = partial(policy_attention, query_position=position, is_causal=True)
            yield Call("policy_attention", "few queries", attend, few)
            weighted = {**rest, "query_weight": sizes.weights(tokens)}
            scores = partial(attention_scores, exclude_self=True, head_reduce="none")
            yield Call("attention_scores", "weighted", scores, weighted)
            index = torch.tensor([0, tokens - 1], device=sizes.device)
            rows = partial(attention_scores, query_index=index, head_reduce="none")
            yield Call("attention_scores", "rows", rows, rest)
