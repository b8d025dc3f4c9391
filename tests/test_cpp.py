# SPDX-License-Identifier: Apache-2.0
"""Unit tests in C++ of functions that CUDA kernels and the CPU share."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", ["index_logic"])
def test_cpp(name, tmp_path):
    program = tmp_path / name
    includes = [f"-isystem{path}" for path in include_paths()]
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fvisibility=hidden"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "tests" / "cpp" / f"{name}.cpp")
    subprocess.run([*COMPILER, *flags, *includes, source, "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "passed\n"
