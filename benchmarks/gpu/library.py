# SPDX-License-Identifier: Apache-2.0
"""The compiled library that is there, else one that is built here.

A library that was built elsewhere serves as it is: ``TOKENOPS_LIBRARY`` names it, or it lies in the
package. Without any, Triton's kernels and plain PyTorch are all that can be checked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .record import LEFT_OUT

ROOT = Path(__file__).resolve().parents[2]

#: Prints nothing if a library with kernels for the device loads, else why there is none.
PROBE = """
import sys, tokenops
from tokenops import _backend, _native
if not (_native.loaded and sys.argv[1] in _backend._compiled_for("merge")):
    print(_native.reason or f"{_native.path} has no kernels for {sys.argv[1]} tensors")
"""


def obstacle(device: str) -> str:
    """Why there is no library with kernels for this kind of device; empty if there is one."""
    probe = [sys.executable, "-c", PROBE, device]
    done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else ""


def build_environment(device: str) -> dict[str, str]:
    """Variables of a build for the device at hand alone."""
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return dict(os.environ)
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
    chosen = {"TOKENOPS_BUILD": "cuda", "TOKENOPS_CUDA_ARCHS": arch}
    return {**chosen, **os.environ}


def main(arguments: list[str] | None = None) -> int:
    """Look for a library and build one if there is none; the result says whether there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.library", description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    before = obstacle(device)
    if before and "TOKENOPS_LIBRARY" not in os.environ:
        print(before, flush=True)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        code = subprocess.run(command, cwd=ROOT, env=build_environment(device)).returncode
        before = obstacle(device)
        if before and code == 0:  # nothing here can build one
            print(before)
            return LEFT_OUT
    print(before or "a library is there")
    return int(bool(before))


if __name__ == "__main__":
    sys.exit(main())
