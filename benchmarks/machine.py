# SPDX-License-Identifier: Apache-2.0
"""The machine of a run: its description, and its ceilings as measured in the same run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import tokenops
from tokenops import _backend, _library, _native

from .cases import BACKENDS
from .timing import best, usage

#: glibc by default gives each tensor above 32 MB new pages: page faults would be timed, and they
#: weigh more the fewer intermediate tensors there are to reuse. Inductor otherwise keeps a pool of
#: compile workers beside the process.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def run_again(variables: dict[str, str]) -> None:
    """Replace this process by the same one in another environment; return if it has that already.

    glibc and the compiled library read these variables when a process starts.
    """
    if any(os.environ.get(name) != value for name, value in variables.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **variables})


def malloc_state() -> str:
    """``tuned`` when a large tensor can get the memory of an earlier one, else ``fresh pages``.

    Even a tuned malloc needs new memory for the first few, until there is a block that fits.
    """
    for _ in range(24):
        before = usage()[1]
        torch.empty(48 << 20, dtype=torch.uint8).zero_()
        if usage()[1] - before < 1024:
            return "tuned"
    return "fresh pages"


def _cpuinfo(key: str) -> str:
    """What Linux says about the first processor; nothing on other systems."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_level() -> str:
    """The widest vector extension of the processor."""
    flags = _cpuinfo("flags").split()
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    return next((flag for flag in known if flag in flags), platform.machine())


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, str]:
    """Columns that describe the machine and the versions."""
    row = {
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokenops": tokenops.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        row.update(hardware=card.name, level=f"sm_{card.major}{card.minor}")
        row.update(cores=str(card.multi_processor_count))
    else:
        row.update(hardware=cpu_model(), level=cpu_level(), cores=str(cores()))
        row.update(isa=_native.isa, malloc=malloc_state())
    return row


def backends_of(operator: str, tensor: torch.Tensor) -> list[str]:
    """Backends that can serve an operator, first the one that does by default."""
    if operator not in _library.operators:
        return []
    reasons = tokenops.why_not(operator, tensor)
    able = [n for n in BACKENDS if n not in reasons and (n != "triton" or tensor.is_cuda)]
    stepped_aside = not tensor.is_cuda and operator in getattr(_backend, "aside", ())
    return sorted(able, key="composed".__ne__) if stepped_aside else able


class Ceilings(NamedTuple):
    """Rates that bound everything else, in GFLOP/s, by name of the dtype."""

    peak: dict[str, float]  # of fused multiply-adds
    source: str  # of the peak: "fma probe" or "torch.mm"
    mm: dict[str, float]  # the best of a large torch.mm


def ceilings(device: torch.device, dtypes: list[str], seconds: float) -> Ceilings:
    """Measure the ceilings, for so many seconds each, with the threads of PyTorch."""
    n, mm = 2048 if device.type == "cpu" else 8192, {}
    for name in dtypes:
        a = torch.randn(n, n, device=device).to(getattr(torch, name))
        mm[name] = 2e-9 * n**3 / best(partial(torch.mm, a, a), seconds)
    probe = fma_peak(torch.get_num_threads(), seconds) if device.type == "cpu" else None
    if probe is None:
        return Ceilings(mm, "torch.mm", mm)
    # Without an instruction for it, bfloat16 is computed as float32.
    peak = {"float32": probe[0], "bfloat16": probe[1] or probe[0]}
    return Ceilings({name: peak[name] for name in dtypes}, "fma probe", mm)


def cxx() -> str | None:
    """The C++ compiler, if there is one: torch.compile needs it on the CPU, and the FMA probe."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def fma_peak(threads: int, seconds: float) -> tuple[float, float] | None:
    """Peak of fused multiply-adds in float32 and bfloat16, in GFLOP/s; None without a compiler.

    The second is 0 if no instruction multiplies bfloat16.
    """
    compiler = cxx()
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "fma_peak")
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        build = [compiler, *flags, str(Path(__file__).with_name("fma_peak.cpp")), "-o", program]
        for command in (build, [program, str(threads), str(seconds)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                return None
    float32, bfloat16 = map(float, done.stdout.split())
    return float32, bfloat16
