# SPDX-License-Identifier: Apache-2.0
"""The fastest that the device at hand can be: ``python -m benchmarks.gpu.ceilings --out FILE``.

Bytes copied, bfloat16 products, exponentials, and the time of a launch, each from the best of many
samples. All bars are shares of these, so that one rule judges every device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import machine
from ..timing import Call, best

#: Exponentials of an element, and elements of a program of :func:`repeat_exp`.
ROUNDS, BLOCK = 256, 1024


@triton.jit
def repeat_exp(x_ptr, rounds: tl.constexpr, block: tl.constexpr):
    offset = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_ptr + offset)
    for _ in range(rounds):
        x = tl.exp2(-x)  # stays between 0 and 1
    tl.store(x_ptr + offset, x)


def exponentials(x: Tensor) -> None:
    """Replace each element of x by ROUNDS exponentials of it; BLOCK divides their number."""
    repeat_exp[(x.numel() // BLOCK,)](x, ROUNDS, BLOCK, num_warps=4)


def replays(call: Call, times: int) -> Call:
    """Several replays of a CUDA graph that makes a call."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda: [graph.replay() for _ in range(times)]


def measure(device: torch.device, seconds: float) -> dict[str, float]:
    """The ceilings: bytes, operations and exponentials per second, and seconds of a launch."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 28) if on_gpu else (1 << 20), device=device)
    target = torch.empty_like(source)
    size = 8192 if on_gpu else 256
    a = torch.randn(size, size, device=device).bfloat16()
    x = torch.rand((1 << 24) if on_gpu else (1 << 16), device=device)
    one, launches = torch.zeros(1, device=device), 100

    def add() -> None:
        one.add_(1)

    rounds, exp = (ROUNDS, lambda: exponentials(x)) if on_gpu else (1, x.exp)
    return {
        "bytes": 2 * source.nbytes / best(lambda: target.copy_(source), seconds),
        "flops": 2 * size**3 / best(lambda: a @ a, seconds),
        "exps": rounds * x.numel() / best(exp, seconds),
        "launch": best(replays(add, launches) if on_gpu else add, seconds)
        / (launches if on_gpu else 1),
    }


def main(arguments: list[str] | None = None) -> int:
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
