# SPDX-License-Identifier: Apache-2.0
"""A whole vision transformer with and without token merging: ``python -m benchmarks.vit``.

ViT-B/16 at 224 pixels with random weights, from embedded patches to the class token. *dense* is
PyTorch alone; *tokenops* merges ``r`` tokens in each layer by the attention keys, attends with
token sizes, and tracks which input is in which token; *slicing* drops the last ``r`` instead, which
takes no time and gives a wrong result, and attends by the same kernel: how fast merging could be at
most. On a CUDA device all are captured as graphs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import tokenops

from . import machine
from .timing import CpuTimer, CudaTimer, Policy, Rival, interleave


class Layer(nn.Module):
    """A layer of a pre-norm vision transformer; ``r`` tokens merge between its two halves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, N, D] as views of one tensor."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, H, D]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def dense(self, x: Tensor) -> Tensor:
        """All tokens: [B, N, C] -> [B, N, C]."""
        out = nn.functional.scaled_dot_product_attention(*self.heads_of(x))
        x = x + self.project(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def weighted(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention with token sizes, before the second half, and its keys [B, H, N, D]."""
        q, k, v = self.heads_of(x)
        if size is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            out = tokenops.policy_attention(q, k, v, size=size)
        return x + self.project(out.transpose(1, 2).flatten(2)), k

    def slicing(self, x: Tensor, r: int, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """As many tokens as merging leaves, by dropping the last ones, and their sizes."""
        x, _ = self.weighted(x, size)
        x = x[:, : x.shape[1] - r].contiguous()
        ones = x.new_ones(x.shape[:2], dtype=torch.float32)
        size = ones if size is None else size[:, : x.shape[1]]
        return x + self.mlp(self.norm2(x)), size

    def merging(
        self, x: Tensor, r: int, size: Tensor | None, track: tokenops.TokenMap | None
    ) -> tuple[Tensor, Tensor, tokenops.TokenMap]:
        """Fewer tokens, how many inputs each one stands for, and which."""
        x, k = self.weighted(x, size)
        token_map = tokenops.match(k, r, num_prefix=1)
        x, size = tokenops.merge_wavg(x, token_map, size)
        track = token_map if track is None else token_map.compose(track)
        return x + self.mlp(self.norm2(x)), size, track


def models(layers: nn.ModuleList, x: Tensor, r: int) -> dict[str, Callable[[], Tensor]]:
    """The ways through the layers; each gives the last class token."""

    def dense() -> Tensor:
        y = x
        for layer in layers:
            y = layer.dense(y)  # type: ignore[operator]
        return y[:, 0]

    def merged() -> Tensor:
        y, size, track = x, None, None
        for layer in layers:
            y, size, track = layer.merging(y, r, size, track)  # type: ignore[operator]
        return y[:, 0]

    def sliced() -> Tensor:
        y, size = x, None
        for layer in layers:
            y, size = layer.slicing(y, r, size)  # type: ignore[operator]
        return y[:, 0]

    return {"dense": dense, "tokenops": merged, "slicing": sliced}


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each; the result says whether merging made the model slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vit", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--r", type=int, default=13, help="tokens that merge in each layer")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure for, at most")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file of milliseconds")
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    with torch.device(device):
        layers = nn.ModuleList(Layer(768, 12) for _ in range(options.layers)).to(dtype).eval()
        x = torch.randn(options.batch, options.tokens, 768).to(dtype)
    timer = CpuTimer() if device.type == "cpu" else CudaTimer(graph=not options.no_graph)
    policy = Policy(samples=30, budget=options.seconds, sample_seconds=0.0)
    with torch.inference_mode():
        ready = {
            name: Rival(timer.prepare(call)) for name, call in models(layers, x, options.r).items()
        }
        found = interleave(ready, timer, policy)
    name = machine.cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{name}, batch {options.batch}, {options.dtype}, r = {options.r}")
    seconds = {name: series.seconds(0.5) for name, series in found.items()}
    for name, value in seconds.items():
        print(f"{name:<10}{value * 1e3:9.3f} ms   {seconds['dense'] / value:5.2f}x")
    if options.out:
        text = json.dumps({name: value * 1e3 for name, value in seconds.items()})
        options.out.write_text(text, encoding="utf-8")
    return int(seconds["tokenops"] > seconds["dense"])


if __name__ == "__main__":
    sys.exit(main())
