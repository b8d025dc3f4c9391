# SPDX-License-Identifier: Apache-2.0
"""Rivals of tokenops in the demo, inside the same Hugging Face ViT.

``eager_tome`` is ToMe (Bolya et al., ICLR 2023) written out in PyTorch operators: cosine
similarity of the head-mean keys, even tokens against odd ones, sort, gather, scatter, and sizes in
the attention. ``slicing`` reaches the same number of tokens at no cost, with wrong results: it
drops the last tokens, and attends by the kernels of the patched model. It is a lower bound: a model
that merges tokens also pays for matching and merging.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenops

#: State of one forward pass: nothing yet, or the size of each token.
State = dict[str, Tensor]


def replace_layers(model: Any, layer_forward: Callable[..., Tensor], r: Sequence[int]) -> None:
    """Let layer l of ``model.vit`` compute ``layer_forward``, which removes ``r[l]`` tokens."""
    state: State = {}
    model.vit.register_forward_pre_hook(lambda *_: state.clear())
    for layer, r_layer in zip(model.vit.layers, r, strict=True):
        layer.forward = partial(layer_forward, layer, r_layer, state)


def eager_tome(layer: Any, r: int, state: State, x: Tensor, mask: None = None) -> Tensor:
    """A layer that merges tokens between attention and MLP, as ToMe does."""
    x = merge_by_size(*attend(layer, x, state.get("size"), eager_attention), r, state)
    return x + layer.mlp(layer.layernorm_after(x))


def slicing(layer: Any, r: int, state: State, x: Tensor, mask: None = None) -> Tensor:
    """A layer that removes ``r`` tokens by a view, without a copy."""
    left = x.shape[1] - clamp(r, x.shape[1])
    x = attend(layer, x, state.get("size"), fused_attention)[0][:, :left]
    if "size" not in state:
        state["size"] = torch.ones_like(x[..., :1], dtype=torch.float32)
    state["size"] = state["size"][:, :left]
    return x + layer.mlp(layer.layernorm_after(x))


def eager_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """Attention, [B, H, N, D], with the sizes [B, N, 1] of tokens as a bias."""
    bias = None if size is None else size.log()[:, None, None, :, 0]
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    """The same attention by tokenops, as in a patched model, once tokens have sizes."""
    if size is None:
        return scaled_dot_product_attention(q, k, v)
    return tokenops.policy_attention(q, k, v, size=size)


def attend(
    layer: Any, x: Tensor, size: Tensor | None, by: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The tokens after attention and residual, [B, N, C], and the metric."""
    attention, normalised = layer.attention, layer.layernorm_before(x)
    batch, tokens, _ = x.shape
    query, key, value = (
        project(normalised).view(batch, tokens, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # [B, H, N, D]
    out = by(query, key, value, size)
    return x + attention.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), key


def merge_by_size(x: Tensor, key: Tensor, r: int, state: State) -> Tensor:
    """Merge ``r`` tokens: each segment becomes its mean weighted by size."""
    if r == 0:
        return x
    merge = soft_matching(key.mean(1), r)
    size = state.get("size")
    if size is None:
        size = torch.ones_like(x[..., :1])
    x, size = merge(x * size), merge(size)
    state["size"] = size
    return x / size


def clamp(r: int, tokens: int) -> int:
    """Limit r: at most half of the tokens except the class token can merge in one layer."""
    return min(r, (tokens - 1) // 2)


def soft_matching(metric: Tensor, r: int) -> Callable[[Tensor], Tensor]:
    """Match ``r`` even tokens with odd tokens to merge into; token 0 never merges."""
    r = clamp(r, metric.shape[1])
    unit = metric / metric.norm(dim=-1, keepdim=True)  # [B, N, D]
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [B, Na, Nb]
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=-1)  # [B, Na]
    ranking = best.argsort(dim=-1, descending=True)
    gone, kept = ranking[:, :r], ranking[:, r:].sort(dim=-1).values
    into = partner.gather(1, gone)

    def merge(x: Tensor) -> Tensor:
        channels = (-1, -1, x.shape[2])
        even, odd = x[:, ::2], x[:, 1::2]
        moving = even.gather(1, gone[..., None].expand(channels))
        odd = odd.scatter_reduce(1, into[..., None].expand(channels), moving, reduce="sum")
        return torch.cat([even.gather(1, kept[..., None].expand(channels)), odd], dim=1)

    return merge
