# SPDX-License-Identifier: Apache-2.0
"""The machine under the figures: what it is, and its ceilings as measured in the same run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import tokenops
from tokenops import _backend, _native

from .timing import usage

#: glibc hands each fresh tensor above 32 MB as new pages by default: the faults would be timed, and
#: they weigh more the fewer intermediate tensors there are to reuse.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


def run_again_with_tuned_malloc(module: str, arguments: list[str]) -> None:
    """Replace this process by the same one under a malloc that keeps large blocks.

    Returns only if it is so tuned already, or is not glibc's. The allocator reads these variables
    when a process starts.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    if all(os.environ.get(name) == value for name, value in MALLOC.items()):
        return
    # Inductor otherwise keeps a pool of compile workers beside the process.
    environment = {**os.environ, **MALLOC, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def malloc_state() -> str:
    """``tuned`` when a large tensor can get the memory of an earlier one, else ``fresh pages``.

    The first few may need new memory in either case, until there is a block that fits; glibc's
    default gives all of them fresh pages. The column ``faults_per_call`` tells of each rival.
    """
    for _ in range(24):
        before = usage()[1]
        torch.empty(48 << 20, dtype=torch.uint8).zero_()
        if usage()[1] - before < 1024:
            return "tuned"
    return "fresh pages"


def cpu_model() -> str:
    """Name of the processor."""
    info = _cpuinfo()
    return info.get("model name") or platform.processor() or platform.machine()


def cpu_level() -> str:
    """The widest vector extension of the processor."""
    flags = set(_cpuinfo().get("flags", "").split())
    for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2"):
        if flag in flags:
            return flag
    return platform.machine()


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, str]:
    """Columns that say on what a row was measured."""
    row = {
        "device": device.type,
        "hardware": cpu_model(),
        "cores": str(cores()),
        "level": cpu_level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tokenops": tokenops.__version__,
        "isa": getattr(_native, "isa", ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device.type == "cuda":
        row["hardware"] = torch.cuda.get_device_name(device)
        row["level"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
        row["cores"] = str(torch.cuda.get_device_properties(device).multi_processor_count)
        row["isa"] = ""
    else:
        row["malloc"] = malloc_state()
    return row


def backend_of(operator: str, tensor: torch.Tensor) -> str:
    """Backend that serves an operator by default."""
    operator = operator.removesuffix("_backward")
    obstacles = tokenops.why_not(operator, tensor)
    if tensor.device.type == "cpu" and operator in getattr(_backend, "aside", ()):
        return "composed"
    return next(name for name in _backend.BACKENDS if name not in obstacles)


@dataclass(frozen=True)
class Ceilings:
    """Rates that bound everything else, in GFLOP/s.

    Attributes:
        peak: Fused multiply-adds, by name of the dtype.
        source: Where the peak comes from: ``fma probe`` or ``torch.mm``.
        mm: Best rate of a large torch.mm, by name of the dtype.
    """

    peak: dict[str, float]
    source: str
    mm: dict[str, float]


def ceilings(device: torch.device, threads: int, dtypes: list[str], seconds: float) -> Ceilings:
    """Measure them.

    Args:
        device: CPU or CUDA device.
        threads: Threads on the CPU.
        dtypes: Names of dtypes.
        seconds: Time to spend on each.
    """
    mm = {name: mm_rate(device, getattr(torch, name), seconds) for name in dtypes}
    probe = fma_peak(threads, seconds) if device.type == "cpu" else None
    if probe is None:
        return Ceilings(mm, "torch.mm", mm)
    # Without an instruction for it, bfloat16 is computed as float32.
    peak = {"float32": probe[0], "bfloat16": probe[1] or probe[0]}
    return Ceilings({name: peak[name] for name in dtypes}, "fma probe", mm)


def mm_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Best rate of torch.mm of square matrices, in GFLOP/s."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    a @ a
    wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        a @ a
        wait()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return 2 * n**3 / best * 1e-9


def cxx() -> str | None:
    """The C++ compiler, if there is one: torch.compile needs it on the CPU, and the FMA probe."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def fma_peak(threads: int, seconds: float) -> tuple[float, float] | None:
    """Peak of fused multiply-adds in float32 and bfloat16, in GFLOP/s; None without a compiler.

    The second is 0 where no instruction multiplies bfloat16.
    """
    compiler = cxx()
    if compiler is None:
        return None
    source = Path(__file__).with_name("fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "fma_peak")
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
        build = subprocess.run([compiler, *flags, str(source), "-o", program], capture_output=True)
        if build.returncode != 0:
            return None
        run = subprocess.run([program, str(threads), str(seconds)], capture_output=True, text=True)
    if run.returncode != 0:
        return None
    float32, bfloat16 = map(float, run.stdout.split())
    return float32, bfloat16
