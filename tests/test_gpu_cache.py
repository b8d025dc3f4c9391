# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for ``benchmarks.gpu_check``, compiled without a GPU."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_cache, measure, smoke
from benchmarks.gpu import prefill, steps

ROOT = Path(__file__).resolve().parent.parent


def test_the_cache_is_of_the_calls_that_the_check_makes(tmp_path):
    assert {*steps.DTYPES} == {*smoke.DTYPES}
    names = [name for name, _ in prefill._calls()]
    assert len(set(names)) == len(names)
    for case in smoke.cases():
        assert sum(operator in case.operator for operator in steps.OPERATORS) == 1
        for dtype in steps.DTYPES:
            assert f"smoke {case.operator} {case.name} {case.sizes.tokens} {dtype}" in names
    assert {"ceilings", "launches layer", "times model vit-b tokenops"} <= {*names}
    for step in (step for group in steps.phases(steps.Plan("cuda", tmp_path)) for step in group):
        if "benchmarks.measure" in step.command:
            arguments = step.command[step.command.index("benchmarks.measure") + 1 :]
            for case in measure.cases_of(measure.parser().parse_args(arguments)):
                assert f"times {case.operator} {case.name} tokenops" in names


def test_a_filled_cache_compiles_nothing(tmp_path):
    """Another process finds the compiled kernels of two calls in the cache."""
    folder, archive = tmp_path / "cache", tmp_path / "cache.tar.xz"
    command = [sys.executable, "-m", "benchmarks.gpu_cache", "--folder", str(folder), "--jobs", "1"]
    command += ["--out", str(archive), "--only", "ceilings", "launches merge_wavg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    number = int(re.search(r"compiled (\d+), found 0, 0 calls stopped", done.stdout)[1])
    assert number >= 2

    shutil.rmtree(folder)
    assert gpu_cache.main(["--unpack", str(archive), "--folder", str(folder)]) == 0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert f"compiled 0, found {number}, 0 calls stopped" in done.stdout
    assert gpu_cache.count(folder) == f"0 of {number} kernels were compiled here"
    cubin = gpu_cache.kernels(folder)[0]
    os.utime(cubin, (time.time() + 10, time.time() + 10))
    assert gpu_cache.count(folder) == f"1 of {number} kernels were compiled here"


def test_an_archive_of_another_version_says_so(tmp_path, monkeypatch):
    (tmp_path / "cache" / "key").mkdir(parents=True)
    (tmp_path / "cache" / "key" / "some.cubin").touch()
    (tmp_path / "cache" / gpu_cache.VERSIONS).write_text("Python 3.12.3, Triton 3.6.0")
    gpu_cache.pack(tmp_path / "cache", tmp_path / "cache.tar.xz")
    monkeypatch.setattr(gpu_cache, "versions", lambda: "Python 3.12.3, Triton 3.7.1")
    text = gpu_cache.unpack(tmp_path / "cache.tar.xz", tmp_path / "there")
    assert text.startswith("1 kernels, made with Python 3.12.3, Triton 3.6.0; of no use here")
