# SPDX-License-Identifier: Apache-2.0
"""Calls of operators give back all memory that they take."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenops import _library

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_no_operator_leaks():
    """In a process of its own, whose memory nothing else uses."""
    command = [sys.executable, str(ROOT / "tests" / "leaks.py")]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    names = [*_library.defined, "merge, refused"]
    assert lines == [f"{name}: 0 bytes a call" for name in names]
