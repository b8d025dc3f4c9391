# SPDX-License-Identifier: Apache-2.0
"""What is on this machine, for the log: ``python -m benchmarks.gpu.describe``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

#: Programs and how they tell what they are.
PROGRAMS = (
    ["nvidia-smi"],
    ["nvcc", "--version"],
    ["compute-sanitizer", "--version"],
    ["gcc", "--version"],
    ["free", "-g"],
)
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "tqdm")
PREFIXES = ("CUDA", "NVIDIA", "OMP_", "PYTORCH", "TOKENOPS", "TORCH", "TRITON")


def main() -> int:
    """Print it."""
    for program in PROGRAMS:
        if shutil.which(program[0]) is None:
            print(f"no {program[0]} here")
            continue
        try:
            done = subprocess.run(program, capture_output=True, text=True, timeout=20)
            print(done.stdout + done.stderr)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"{program[0]}: {error}")
    for name in sorted(os.environ):
        if name.startswith(PREFIXES):
            print(f"{name}={os.environ[name]}")
    versions = ", ".join(map(version, PACKAGES))
    print(f"{os.cpu_count()} processors, Python {platform.python_version()}, {versions}")
    return 0


def version(package: str) -> str:
    """Name and version of an installed package."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    sys.exit(main())
