# SPDX-License-Identifier: Apache-2.0
"""The calls that ``benchmarks.gpu_check`` makes, for an H100 or H200 that is not there.

Triton itself compiles each kernel, and so under the keys that it looks for on the device. Tensors
are on the CPU, a stand-in for libcuda takes the launches, and all results are zeros.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .. import host, smoke
from ..cases import Case
from ..registry import select
from . import ceilings

CPU = torch.device("cpu")

#: Rivals that launch kernels of this project.
OURS = ("tokenops", "unweighted")

#: Number of kernels that were compiled (False) and that were found in the cache (True).
kernels: Counter[bool] = Counter()


def use_stand_in(library: Path) -> None:
    """Give Triton a stand-in for libcuda and a device of compute capability 9.0."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)

    def listen(**event: Any) -> None:
        kernels[event["cache_hit"]] += 1

    triton.knobs.compilation.listener = listen


def start(library: Path) -> None:
    """Prepare a process for :func:`make`.

    Kernels leave outputs as they are: zeros, which are valid indices for the next kernel.
    """
    torch.set_num_threads(1)
    use_stand_in(library)
    host.serve_by_triton()
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
    torch.Tensor.new_empty = torch.Tensor.new_zeros


def make(name: str) -> tuple[int, int, bool]:
    """Make a call; returns how many kernels were compiled and found, and whether it raised."""
    begin, before, error = time.monotonic(), kernels.copy(), ""
    try:
        calls()[name]()
    except Exception as raised:  # zeros may be wrong arguments for what follows
        error = f" stopped: {type(raised).__name__}: {str(raised)[:150]}"
    new, found = (kernels[hit] - before[hit] for hit in (False, True))
    if new or error:
        print(f"{name}: {new} compiled in {time.monotonic() - begin:.0f} s{error}", flush=True)
    return new, found, bool(error)


@cache
def calls() -> dict[str, Callable[[], Any]]:
    return dict(_calls())


def _calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for case, dtype in itertools.product(smoke.cases(), smoke.DTYPES):
        name = f"smoke {case.operator} {case.name} {case.sizes.tokens} {dtype}"
        yield name, lambda c=case, d=smoke.DTYPES[dtype]: smoke.outcome(c.call(d, CPU))
    yield "ceilings", partial(ceilings.exponentials, torch.zeros(ceilings.BLOCK))
    for name, call in host.calls(CPU).items():
        yield f"launches {name}", torch.inference_mode()(call)
    for case in select(device="cuda"):
        for rival in OURS:
            yield f"times {case.operator} {case.name} {rival}", partial(_time, case, rival)


def _time(case: Case, which: str) -> None:
    work = case.prepare(torch.bfloat16, CPU)
    if which in work.rivals:
        with torch.inference_mode(work.inference):
            work.make(which)()
