# SPDX-License-Identifier: Apache-2.0
"""Cases of whole vision transformers with token merging, with random weights.

*vit-b*: the layers of ViT-B/16 at 224 pixels. tokenops merges ``r``
tokens in each layer by the attention keys, attends with token sizes, and tracks the inputs of each
token. *dense* is PyTorch alone. *slicing* drops the last ``r`` tokens instead, which takes no time
and gives a wrong result, and attends by the same kernel: no merging can be faster.

*vit-s*: a patched ViT-S of Hugging Face, against eager ToMe within the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tokenops

from .cases import Case, Work, randn

TOKENS = 197


@dataclass(frozen=True)
class ModelShape:
    batch: int  # images B, of 224 x 224 pixels
    width: int  # channels C; a head has 64
    layers: int  # layers L
    r: int  # tokens that merge in each layer

    def describe(self, letter: str) -> str:
        return f"B{self.batch} N{TOKENS} C{self.width} L{self.layers} r{self.r}"

    def tiny(self) -> ModelShape:
        return replace(self, batch=1, width=128, layers=2)


class Layer(nn.Module):
    """A layer of a pre-norm vision transformer, whose tokens are reduced between its halves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, size: Tensor | None, reduce: Callable[..., Any]) -> Any:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if size is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = tokenops.policy_attention(q, k, v, size=size)
        x = x + self.project(out.transpose(1, 2).flatten(2))
        x, size = reduce(x, k, size)
        return x + self.mlp(self.norm2(x)), size


def models(layers: nn.ModuleList, x: Tensor, r: int) -> dict[str, Callable[[], Tensor]]:
    """The models by name; each returns the tokens that are left."""
    track: list[tokenops.TokenMap] = []

    def merge(y: Tensor, k: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        token_map = tokenops.match(k, r, num_prefix=1)
        track[:] = [token_map if size is None else token_map.compose(track[0])]
        return tokenops.merge_wavg(y, token_map, size)

    def cut(y: Tensor, k: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        size = y.new_ones(y.shape[:2], dtype=torch.float32) if size is None else size
        left = y.shape[1] - r
        return y[:, :left].contiguous(), size[:, :left]

    def run(reduce: Callable[..., Any]) -> Tensor:
        y, size = x, None
        for layer in layers:
            y, size = layer(y, size, reduce)
        return y

    reductions = {"tokenops": merge, "dense": lambda y, k, size: (y, None), "slicing": cut}
    return {name: partial(run, reduce) for name, reduce in reductions.items()}


def setup_vit(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of ViT-B; none of the others computes the same."""
    torch.manual_seed(0)
    with torch.device(device):
        layers = nn.ModuleList(Layer(shape.width) for _ in range(shape.layers)).to(dtype).eval()
    x = randn((shape.batch, TOKENS, shape.width), dtype, device)
    return _work(models(layers, x, shape.r), layers, x)


def setup_patched(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Work:
    from transformers import ViTConfig, ViTForImageClassification

    from examples.rivals import eager_tome, replace_layers
    from tokenops.integrations.transformers import apply_patch

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.width // 64,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
    )
    eager = ViTForImageClassification(config).to(device, dtype).eval()
    ours = copy.deepcopy(eager)
    replace_layers(eager, eager_tome, [shape.r] * shape.layers)
    apply_patch(ours, shape.r)
    pixels = torch.randn(shape.batch, 3, 224, 224, device=device).to(dtype)
    calls = {"tokenops": lambda: ours(pixels).logits, "eager": lambda: eager(pixels).logits}
    return _work(calls, ours, pixels)


def _work(calls: dict[str, Callable[[], Tensor]], model: nn.Module, x: Tensor) -> Work:
    """Least work: each weight is read once, and the FLOPs of the model with merging."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        calls["tokenops"]()
    return Work(
        rivals={name: partial(lambda call: call, call) for name, call in calls.items()},
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        flops=counter.get_total_flops(),
        tolerance=1e-4 if x.dtype == torch.float32 else 5e-2,
        tensor=x,
    )


CASES = (
    Case("model", "vit-s", ModelShape(4, 384, 12, 8), setup_patched, on_request=True),
    Case("model", "vit-b", ModelShape(1, 768, 12, 13), setup_vit, "cuda"),
)
