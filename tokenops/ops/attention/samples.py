# SPDX-License-Identifier: Apache-2.0
"""Samples of the operators of attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...testing import random_attention, random_tokens
from ...testing.samples import B, C, Call, N, Sample, Sizes
from .api import attention_scores, policy_attention

#: Inputs by kind; then self_keep, exclude_self, eps and is_causal; then the policy's gradient.
KINDS: dict[str, tuple[dict[str, Any], tuple[bool, bool, float, bool], str]] = {
    "plain": ({}, (False, False, 0.0, False), "exact"),
    "policy": ({"policy": "hard"}, (True, False, 0.0, False), "exact"),
    "eps": ({"policy": "per-head", "key_heads": 1}, (True, False, 1e-3, False), "kept"),
    "all": (
        {"policy": "soft", "zero_sizes": 0.2, "padding": 0.2, "value_width": 2},
        (True, True, 1e-2, True),
        "exact",
    ),
    "none": ({"policy": "soft", "layout": "packed"}, (False, False, 0.0, False), "none"),
    "half": ({"zero_sizes": 0.0, "dtype": torch.bfloat16}, (False, True, 1e-3, True), "exact"),
    "double": ({"policy": "hard", "dtype": torch.float64}, (True, False, 1e-3, False), "exact"),
}


def samples() -> Iterator[Sample]:
    """Every kind of inputs, each forward, backward and as scores."""
    for name, (kind, flags, policy_grad) in KINDS.items():
        inputs = random_attention(B, 2, N, C, seed=3, **kind)
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        weights = tuple(inputs.get(n) for n in ("policy", "size", "key_padding_mask"))
        position = None
        if name in ("eps", "none", "half"):
            position = torch.tensor([0, 3, 1, -1, 9, 2, 2], dtype=torch.int32)
            position = position if name == "eps" else position.expand(B, N).contiguous()
        options = *flags, policy_grad, C**-0.5

        arguments = (*_leaves(q, k, v, *weights), position, *options)
        yield Sample("policy_attention", name, arguments)

        saved = torch.ops.tokenops.policy_attention(q, k, v, *weights, position, *options)
        grad = random_tokens(*saved[0].shape, dtype=q.dtype, seed=4)
        if name == "none":
            grad = grad[..., :1].expand(grad.shape)
        grad_lse = None if name == "plain" else torch.randn_like(saved[1])
        needs = name != "policy", name != "none", True
        arguments = q, k, v, *weights, position, *options, *saved, grad, grad_lse, *needs
        yield Sample("policy_attention_backward", name, arguments)

        head_reduce = {"plain": "mean", "policy": "none", "eps": "none"}.get(name, "sum")
        query_weight = None
        if name != "plain":
            query_weight = torch.linspace(-1, 2, N).to(saved[1])
            query_weight = query_weight.expand(B, *((2,) * (name == "eps")), N)
        lse = saved[1] if name in ("policy", "all") else None
        tensors = *_leaves(q, k, query_weight, *weights), position, lse
        yield Sample("attention_scores", name, (*tensors, *flags, C**-0.5, head_reduce))


def _leaves(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of their own that require a gradient where they can."""
    return tuple(
        None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors
    )


#: Kinds of calls: inputs, and options of the function.
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
