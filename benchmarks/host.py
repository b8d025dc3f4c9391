# SPDX-License-Identifier: Apache-2.0
"""Time that the host spends on one eager call of the Triton kernels: ``python -m benchmarks.host``.

What a user of small models waits for is the host: checks, the dispatcher, outputs, and the way to
the driver. Here the Triton kernels serve CPU tensors and a launch does nothing, so that no GPU is
needed; the driver's own share, one to two microseconds per launch, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import tokenops
from tokenops import _backend, _checks, _library
from tokenops._triton import launch

from . import machine

#: At most so many microseconds under ``torch.inference_mode``.
BAR = 25.0


def serve_by_triton() -> None:
    """Let the Triton kernels serve CPU tensors in this process."""
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value]
    _backend._new_enough = lambda index: True  # type: ignore[assignment]
    _checks.values_visible = lambda value: False  # nobody reads values of CUDA tensors
    for name, kernel in _backend._in_triton.items():
        serve = _backend._on_cuda(name, kernel)
        _library.implement(name, serve, "CPU", instead="cpu" in _backend._compiled_for(name))


def without_device() -> None:
    """Let the Triton kernels serve CPU tensors in this process, with launches that do nothing."""

    def nothing(*arguments: Any) -> None:
        pass

    class Ready(dict):  # type: ignore[type-arg]
        def get(self, key: Any, default: Any = None) -> Any:
            return nothing, None, None, nothing, 0

    make = launch.Launch.__init__

    def make_ready(self: launch.Launch, *arguments: Any, **constants: Any) -> None:
        make(self, *arguments, **constants)
        self._ready = Ready()

    launch.Launch.__init__ = make_ready  # type: ignore[method-assign]
    launch._direct = True
    serve_by_triton()


def calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """One call of each operator, at the sizes of one image of ViT-B/16 at 224 pixels."""
    q, k, v = torch.randn(1, 197, 3, 12, 64, device=device).half().permute(2, 0, 3, 1, 4)
    x = torch.randn(1, 197, 768, device=device).half()
    metric = torch.randn(1, 197, 64, device=device).half()
    policy, size = torch.ones(1, 197, device=device), torch.ones(1, 197, 1, device=device)
    token_map = tokenops.TokenMap.identity(1, 197, device)
    return {
        "nearest": lambda: tokenops.nearest(metric, metric),
        "match": lambda: tokenops.match(metric, 16, num_prefix=1),
        "match of keys": lambda: tokenops.match(k, 16, num_prefix=1),
        "merge": lambda: tokenops.merge(x, token_map),
        "merge_wavg": lambda: tokenops.merge_wavg(x, token_map, size),
        "unmerge": lambda: tokenops.unmerge(x, token_map, residual=x),
        "invert": lambda: torch.ops.tokenops.invert(token_map.assign, 197),
        "policy_attention": lambda: tokenops.policy_attention(q, k, v, policy, eps=1e-6),
        "policy_attention, size": lambda: tokenops.policy_attention(q, k, v, size=size),
        "attention_scores": lambda: tokenops.attention_scores(q, k, query_index=[0]),
        "attention_scores, columns": lambda: tokenops.attention_scores(q, k, query_weight=policy),
    }


def microseconds(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Median time of a call, of samples of fifty."""
    for _ in range(20):
        call()
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(50):
            call()
        samples.append((time.perf_counter() - start) / 50)
    return statistics.median(samples) * 1e6


def main(arguments: list[str] | None = None) -> int:
    """Print a table; the result says whether a call is above the bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--check", action="store_true", help=f"fail above {BAR:g} microseconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    without_device()
    print(f"{machine.cpu_model()}, torch {torch.__version__}; microseconds per call")
    slow = False
    for name, call in calls(torch.device("cpu")).items():
        with torch.inference_mode():
            inference = microseconds(call)
        slow = slow or inference > BAR
        print(f"{name:<28}{inference:6.1f}   with autograd on {microseconds(call):6.1f}")
    return int(options.check and slow)


if __name__ == "__main__":
    sys.exit(main())
