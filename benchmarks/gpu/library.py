# SPDX-License-Identifier: Apache-2.0
"""Finds the compiled library, or builds one: ``python -m benchmarks.gpu.library``.

Without a library, only Triton kernels and plain PyTorch can be checked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .record import LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]

#: Prints why no library with kernels for a device loads; nothing if one does.
PROBE = """
import sys, tokenops
from tokenops import _backend, _native
if not (_native.loaded and sys.argv[1] in _backend._compiled_for("merge")):
    print(_native.reason or f"{_native.path} has no kernels for {sys.argv[1]} tensors")
"""


def reason(device: str) -> str:
    """Why there is no library with kernels for this kind of device; empty if there is one."""
    probe = [sys.executable, "-c", PROBE, device]
    done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


def build(device: str) -> int:
    """Build a library, for the GPU at hand only; returns the exit status."""
    import torch

    options = {}
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
        options = {"TOKENOPS_BUILD": "cuda", "TOKENOPS_CUDA_ARCHS": arch}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env={**options, **os.environ}).returncode


def main(arguments: list[str] | None = None) -> int:
    """Look for a library and build one if there is none; returns 0 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.library", description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    missing, status = reason(device), 1
    if missing and "TOKENOPS_LIBRARY" not in os.environ:
        print(missing, flush=True)
        status = build(device)
        missing = reason(device)
    print(missing or "a library is there")
    if missing and status == 0:  # there is no compiler, which is not a failure
        return LEFT_OUT
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
