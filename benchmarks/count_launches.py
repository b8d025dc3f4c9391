# SPDX-License-Identifier: Apache-2.0
"""How many kernels a call launches, by the profiler: ``python -m benchmarks.count_launches``.

One image of ViT-B/16 at 224 pixels on a CUDA device, forward, beside the recipes that tokenops
replaces. A *layer* is the token work of one layer with merging: match, merge_wavg, and tracking of
sources.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tokenops

from . import rivals
from .host import calls


def kernels(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call launches."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.name for e in events if not e.name.startswith(("Memcpy", "Memset"))]


def eager_calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The recipes of the same operators, by the same names."""
    x = torch.randn(1, 197, 768, device=device).half()
    q, k, v = torch.randn(1, 197, 3, 12, 64, device=device).half().permute(2, 0, 3, 1, 4)
    metric, policy = x[..., :64], torch.ones(1, 197, device=device)
    own = torch.eye(197, device=device)
    plan = rivals.tome_match(metric, 16, True)
    size = torch.ones(1, 197, 1, device=device)
    merged = rivals.tome_merge(x, plan, "mean")
    return {
        "match": lambda: rivals.tome_match(metric, 16, True),
        "merge": lambda: rivals.tome_merge(x, plan, "mean"),
        "merge_wavg": lambda: rivals.tome_merge_wavg(x, size, plan),
        "unmerge": lambda: rivals.tome_unmerge(merged, plan),
        "policy_attention": lambda: rivals.attention_with_policy(q, k, v, policy, own, 1e-6),
        "attention_scores": lambda: rivals.attention_of_rows(q[:, :, :1], k),
    }


def layer(device: torch.device) -> Callable[[], Any]:
    """The token work of one layer of ToMe."""
    x = torch.randn(1, 197, 768, device=device).half()
    metric, size = x[..., :64], torch.ones(1, 197, 1, device=device)
    track = tokenops.TokenMap.identity(1, 197, device)

    def work() -> Any:
        token_map = tokenops.match(metric, 13, num_prefix=1)
        return tokenops.merge_wavg(x, token_map, size), token_map.compose(track)

    return work


def main(arguments: list[str] | None = None) -> int:
    """Print a table; a call that fails does not keep the others from being counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.count_launches")
    parser.add_argument("--out", type=Path, help="JSON file of numbers of kernels")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    recipes = eager_calls(device)
    found: dict[str, int] = {}
    failures = 0
    with torch.inference_mode():
        for name, call in {**calls(device), "layer": layer(device)}.items():
            try:
                ours = kernels(call)
            except Exception as error:
                print(f"{name:<28}{type(error).__name__}: {error}")
                failures += 1
                continue
            found[name] = len(ours)
            text = f"{name:<28}{len(ours):3d}"
            if name in recipes:
                text += f"   the recipe {len(kernels(recipes[name])):3d}"
            print(text)
            for kernel in ours:
                print(f"    {kernel[:90]}")
            if options.out:
                options.out.write_text(json.dumps(found), encoding="utf-8")
    return failures


if __name__ == "__main__":
    sys.exit(main())
