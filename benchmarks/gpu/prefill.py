# SPDX-License-Identifier: Apache-2.0
"""Makes the calls that ``benchmarks.gpu_check`` makes, for an H100 or H200 that is not there.

Triton compiles each kernel on its own way, and so under the keys that it will look for on the
device; tensors are on the CPU, a stand-in for libcuda takes the launches, and all results are zeros
that nobody looks at. ``benchmarks.gpu_cache`` runs this in several processes.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenops import _library

from .. import host, smoke, vit
from ..cases import Case
from ..registry import select

CPU = torch.device("cpu")
Call = Callable[[], object]

#: Rivals that are Triton's kernels.
OURS = ("tokenops", "unweighted")


def use_stand_in(library: Path) -> dict[bool, int]:
    """Let Triton take a stand-in for libcuda for a device of compute capability 9.0.

    Returns:
        How many kernels were compiled (under False) and found in the cache (True), kept up to date.
    """
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)
    found = {False: 0, True: 0}

    def listen(**event: Any) -> None:
        found[event["cache_hit"]] += 1

    triton.knobs.compilation.listener = listen
    return found


def forget_results() -> None:
    """Let the checks of ``smoke`` make their calls and not look at results.

    Kernels leave their outputs as they were: zeros, which are valid indices for what comes next.
    """
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros
    smoke.verify = lambda call, got: None


def calls() -> Iterator[tuple[str, Call]]:
    """All calls of the check that launch Triton's kernels, by name."""
    for operator in _library.operators:
        for dtype in smoke.DTYPES:
            yield f"smoke {operator} {dtype}", partial(_smoke, operator, dtype)
    yield "ceilings", _exponentials
    yield "vit", _vit
    for name, call in host.calls(CPU).items():
        yield f"launches {name}", partial(_infer, call)
    for case in select(device="cuda"):
        for rival in OURS:
            yield f"times {case.operator} {case.name} {rival}", partial(_time, case, rival)


def _smoke(operator: str, dtype: str) -> None:
    for name, problem in smoke.run(CPU, [dtype], [operator]):
        if problem is not None:
            print(f"  {name}: {type(problem).__name__}: {str(problem)[:150]}", flush=True)


def _exponentials() -> None:
    from .exponentials import BLOCK, launch

    launch(torch.zeros(BLOCK))


def _infer(call: Call) -> None:
    with torch.inference_mode():
        call()


def _vit() -> None:
    layers = torch.nn.ModuleList(vit.Layer(768, 12) for _ in range(12)).bfloat16().eval()
    models = vit.models(layers, torch.randn(1, 197, 768).bfloat16(), 13)
    _infer(models["tokenops"])
    _infer(models["slicing"])


def _time(case: Case, which: str) -> None:
    work = case.prepare(torch.bfloat16, CPU)
    if which in work.rivals:
        with torch.inference_mode(work.inference):
            rival = work.rivals[which]()
            with rival.context():
                rival.call()


def main(arguments: list[str] | None = None) -> int:
    """Make the calls of one part; the result counts those that did not come to their end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.prefill", description=__doc__)
    parser.add_argument("--library", type=Path, required=True, help="stand-in for libcuda.so.1")
    parser.add_argument("--part", default="1/1", help="2/4: the second of four parts")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names of calls")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = use_stand_in(options.library)
    host.serve_by_triton()
    forget_results()
    part, of = map(int, options.part.split("/"))
    wanted = [(n, c) for n, c in calls() if not options.only or n.startswith(tuple(options.only))]
    stopped = 0
    for name, call in wanted[part - 1 :: of]:
        start, before = time.monotonic(), found[False]
        try:
            call()
        except Exception as error:  # what comes after such results may not make sense
            print(f"{name} stopped: {type(error).__name__}: {str(error)[:150]}", flush=True)
            stopped += 1
        if found[False] > before:
            seconds = time.monotonic() - start
            print(f"{name}: {found[False] - before} compiled in {seconds:.0f} s", flush=True)
    print(f"compiled {found[False]}, found {found[True]}, {stopped} calls stopped")
    return min(stopped, 64)


if __name__ == "__main__":
    sys.exit(main())
