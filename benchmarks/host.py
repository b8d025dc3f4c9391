# SPDX-License-Identifier: Apache-2.0
"""Cost of a call beyond its kernels, for one image of ViT-B/16: ``python -m benchmarks.host``.

Times how long the host takes for an eager call of the Triton kernels: checks, the dispatcher,
outputs, and the way to the driver. Needs no GPU: the kernels' launches serve CPU tensors and do
nothing, so that the driver's own one to two microseconds per launch are not counted.

With ``--count``, counts the kernels that a call launches on a CUDA device instead, by the profiler,
and those of the recipes in PyTorch operators. A *layer* is the token work of one layer of ToMe:
match, merge_wavg, and compose to track sources.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import benchmark

import tokenops
from tokenops import _backend, _checks, _library
from tokenops._triton import launch
from tokenops.testing import samples

from . import machine
from .registry import select

Calls = dict[str, Callable[[], Any]]


def calls(device: torch.device) -> Calls:
    """The calls in the operators' samples and a layer's token work, each at ViT-B/16's sizes."""
    sizes = samples.Sizes(
        batch=1, heads=12, tokens=197, width=64, channels=768, dtype=torch.float16, device=device
    )
    found = {
        f"{c.operator} {c.name}": partial(c.function, **c.tensors) for c in samples.calls(sizes)
    }
    x, size = sizes.rows(197, 768), sizes.weights(197)
    track = tokenops.TokenMap.identity(1, 197, device)

    def layer() -> Any:
        token_map = tokenops.match(x[..., :64], 13, num_prefix=1)
        return tokenops.merge_wavg(x, token_map, size), token_map.compose(track)

    return {**found, "layer": layer}


def recipes(device: torch.device) -> Calls:
    """The recipes in PyTorch operators that the operators replace; size does not matter."""
    found = {}
    for case in select(names=("vit-b-256", "vit-b-256-class"), device="cuda"):
        if not case.operator.endswith("_backward"):
            work = case.tiny().prepare(torch.bfloat16, device)
            found[f"recipe of {case.operator}"] = work.make("eager")
    return found


def serve_by_triton() -> None:
    """Let the Triton kernels serve CPU tensors in this process."""
    torch.cuda.current_device = lambda: None
    _backend._new_enough = lambda index: True
    _checks.values_visible = lambda value: False  # as for CUDA tensors, whose values are not read
    for name, kernel in _backend._in_triton.items():
        serve = _backend._on_cuda(name, kernel)
        _library.implement(name, serve, "CPU", instead="cpu" in _backend._compiled_for(name))


def launch_nothing() -> None:
    """Let launches of Triton kernels do all work of the host but the driver's."""

    def nothing(*arguments: Any) -> None:
        pass

    ready = SimpleNamespace(get=lambda dtypes: (nothing, None, None, nothing, 0))
    make = launch.Launch.__init__

    def make_ready(self: launch.Launch, *arguments: Any, **constants: Any) -> None:
        make(self, *arguments, **constants)
        self._ready = ready

    launch.Launch.__init__ = make_ready
    launch._direct = True


def microseconds(call: Callable[[], Any]) -> float:
    timer = benchmark.Timer("call()", globals={"call": call})
    return timer.blocked_autorange(min_run_time=0.5).median * 1e6


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


def count(out: Path | None) -> int:
    """Print and write the number of kernels of each call; returns the number of failed calls."""
    device, found = torch.device("cuda"), {}
    everything = {**calls(device), **recipes(device)}
    for name, call in everything.items():
        try:
            names = kernels(call)
        except Exception as error:
            print(f"{name:<40}{type(error).__name__}: {error}")
            continue
        found[name] = len(names)
        print(f"{name:<40}{len(names):3d}", *(n[:90] for n in names), sep="\n    ")
        if out:
            out.write_text(json.dumps(found), encoding="utf-8")
    return len(everything) - len(found)


def main(arguments: list[str] | None = None) -> int:
    """Print a table; the result counts calls that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--count", action="store_true", help="count kernels on a CUDA device")
    parser.add_argument("--out", type=Path, help="JSON file of the numbers of kernels")
    options = parser.parse_args(arguments)
    if options.count:
        with torch.inference_mode():
            return count(options.out)
    serve_by_triton()
    launch_nothing()
    print(f"{machine.cpu_model()}, torch {torch.__version__}; microseconds per call")
    for name, call in calls(torch.device("cpu")).items():
        with torch.inference_mode():
            inference = microseconds(call)
        print(f"{name:<40}{inference:6.1f}   with autograd on {microseconds(call):6.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
