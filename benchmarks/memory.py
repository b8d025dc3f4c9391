# SPDX-License-Identifier: Apache-2.0
"""Peak memory that a call takes on the CPU beyond its inputs, outputs included.

A child process runs the case once at tiny sizes (which loads code and starts thread
pools), makes the inputs, returns free memory to the system, resets the kernel's high-water mark of
its resident memory, calls once, and reads the mark. Its malloc maps every block of 64 KB or more
anew and unmaps it when freed: memory that was freed does not hide memory that is needed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from .cases import DTYPES, Case, context
from .registry import find

_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def extra_bytes(case: Case, rival: str, dtype: str) -> int:
    """Measure one rival of a case, with the threads of PyTorch.

    Raises:
        RuntimeError: If the child process fails, or the system does not report the memory.
    """
    command = [sys.executable, "-m", "benchmarks.memory"]
    command += [case.operator, case.name, rival, dtype, str(torch.get_num_threads())]
    root, environment = Path(__file__).resolve().parent.parent, {**os.environ, **_MALLOC}
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(child.stderr.strip().rpartition("\n")[2] or "the child process failed")
    return int(child.stdout)


def _cpu_bytes(case: Case, rival: str, dtype: str) -> int:
    for sized in (case.tiny(), case):
        work = sized.prepare(DTYPES[dtype], torch.device("cpu"))
        with torch.inference_mode(work.inference), context(rival):
            call = work.make(rival)
            gc.collect()
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
            before = _status("VmRSS")
            call()
            extra = max(0, _status("VmHWM") - before)
    return extra


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the system does not report {field}")
    return int(found[1]) * 1024


if __name__ == "__main__":
    operator, name, rival, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(_cpu_bytes(find(operator, name), rival, dtype))
