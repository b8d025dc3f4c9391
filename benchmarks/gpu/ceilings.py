# SPDX-License-Identifier: Apache-2.0
"""What the device at hand can do at most: ``python -m benchmarks.gpu.ceilings --out FILE``.

Bytes copied, bfloat16 products, exponentials, and the time of a launch, each at its best of many
samples. All bars are shares of these, so that an H100 and an H200 are judged by the same rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from .. import machine
from ..timing import Call, CpuTimer, CudaTimer, Timer


def best(call: Call, timer: Timer, calls: int, seconds: float) -> float:
    """Seconds of a call in the best sample."""
    ready = timer.prepare(call)
    found, end = float("inf"), time.perf_counter() + seconds
    while True:
        found = min(found, timer.sample(ready, calls).seconds)
        if time.perf_counter() > end:
            return found


def exponentials(device: torch.device, threads: int) -> tuple[Call, int]:
    """A call that does little else than exponentials, and how many."""
    x = torch.rand(threads, device=device)
    if device.type == "cpu":
        return x.exp, threads
    from .exponentials import ROUNDS, launch

    return lambda: launch(x), ROUNDS * threads


def measure(device: torch.device, seconds: float) -> dict[str, float]:
    """The ceilings: bytes, operations and exponentials per second, and seconds of a launch."""
    on_gpu = device.type == "cuda"
    timer: Timer = CudaTimer() if on_gpu else CpuTimer()
    source = torch.ones((1 << 28) if on_gpu else (1 << 20), device=device)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source), timer, 3, seconds)
    found = {"bytes": 2 * source.numel() * source.element_size() / copy}
    size = 8192 if on_gpu else 256
    a = torch.randn(size, size, device=device).bfloat16()
    found["flops"] = 2 * size**3 / best(lambda: a @ a, timer, 3, seconds)
    call, count = exponentials(device, (1 << 24) if on_gpu else (1 << 16))
    found["exps"] = count / best(call, timer, 3, seconds)
    one = torch.zeros(1, device=device)
    graph: Timer = CudaTimer(graph=True) if on_gpu else timer
    found["launch"] = best(lambda: one.add_(1), graph, 100, seconds)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each, and write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ceilings", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    with torch.inference_mode():
        found = measure(device, options.seconds)
    on_cpu = device.type == "cpu"
    name = machine.cpu_model() if on_cpu else torch.cuda.get_device_name(device)
    options.out.write_text(json.dumps({"name": name, **found}, indent=1), encoding="utf-8")
    print(
        f"{name}: copies {found['bytes'] * 1e-9:.0f} GB/s, bf16 {found['flops'] * 1e-12:.3g} "
        f"TFLOP/s, {found['exps'] * 1e-12:.3g} T exp/s, a launch {found['launch'] * 1e6:.2f} us"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
