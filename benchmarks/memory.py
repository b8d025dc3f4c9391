# SPDX-License-Identifier: Apache-2.0
"""Peak memory that a call takes beyond its inputs, outputs included.

On the CPU a child process runs the same case once at tiny sizes (so that code and thread pools are
there), makes the inputs, gives free memory back to the system, resets the kernel's high-water mark
of its resident memory, calls once, and reads the mark. Its malloc maps every block of 64 KB or more
anew and unmaps it when freed: what was freed does not hide what is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .cases import DTYPES, Case
from .registry import find
from .timing import Rival

_CHILD = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def extra_bytes(case: Case, rival: str, dtype: str, device: torch.device, threads: int) -> int:
    """Measure one rival of a case.

    Raises:
        RuntimeError: If the child process failed or the system does not tell.
    """
    if device.type == "cuda":
        return _cuda_bytes(case, rival, dtype, device)
    command = [
        sys.executable, "-m", "benchmarks.memory", case.operator, case.name, rival,
        "--dtype", dtype, "--threads", str(threads),
    ]  # fmt: skip
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, **_CHILD, "PYTHONPATH": path}
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(child.stderr.strip().rpartition("\n")[2] or "the child process failed")
    return int(json.loads(child.stdout)["extra_bytes"])


def _cuda_bytes(case: Case, rival: str, dtype: str, device: torch.device) -> int:
    work = case.prepare(DTYPES[dtype], device)
    with torch.inference_mode(work.inference):
        made = work.rivals[rival]()
        _call(made)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _call(made)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_bytes(case: Case, rival: str, dtype: str) -> int:
    device = torch.device("cpu")
    small = case.tiny().prepare(DTYPES[dtype], device)
    with torch.inference_mode(small.inference):
        _call(small.rivals[rival]())
    work = case.prepare(DTYPES[dtype], device)
    with torch.inference_mode(work.inference):
        made = work.rivals[rival]()
        gc.collect()
        _trim()
        _reset_peak()
        before = _status("VmRSS")
        _call(made)
        return max(0, _status("VmHWM") - before)


def _call(rival: Rival) -> None:
    with rival.context():
        rival.call()


def _trim() -> None:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _reset_peak() -> None:
    """Set the high-water mark to what is resident now; see proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the system does not tell {field}")
    return int(found[1]) * 1024


def main() -> None:
    """Measure one rival and print the result as JSON."""
    parser = argparse.ArgumentParser(description="Peak memory of one call beyond its inputs.")
    parser.add_argument("operator")
    parser.add_argument("case")
    parser.add_argument("rival")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = find(arguments.operator, arguments.case)
    print(json.dumps({"extra_bytes": _cpu_bytes(case, arguments.rival, arguments.dtype)}))


if __name__ == "__main__":
    main()
