# SPDX-License-Identifier: Apache-2.0
"""Calls of operators free all memory that they allocate."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenops import _library

ROOT = Path(__file__).resolve().parent.parent


needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)


def count(*arguments):
    """Run tests/leaks.py; the output is text."""
    command = [sys.executable, str(ROOT / "tests" / "leaks.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


@pytest.mark.slow
@needs_glibc
def test_no_operator_leaks():
    """In a separate process, where no other code allocates memory."""
    run = count()
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    names = [*_library.defined, "merge, refused"]
    assert [line.rpartition(": ")[0] for line in lines] == names
    assert all(": 0 bytes a call" in line for line in lines), run.stdout


@needs_glibc
def test_a_leak_is_counted():
    """A leak of 40 bytes in each call, for which glibc allocates 48."""
    run = count("control")
    assert run.returncode == 1, run.stdout + run.stderr
    assert run.stdout.startswith("control: 48 bytes a call")
