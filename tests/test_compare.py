# SPDX-License-Identifier: Apache-2.0
"""The comparison of two commits by ``benchmarks.compare``."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

import tokenops
from benchmarks import compare
from benchmarks.timing import REHEARSAL, Sample, Series


def series(*seconds):
    return Series(2, [Sample(s, clean=s < 100) for s in seconds])


def test_ratio_of_neighbouring_samples():
    median, noise = compare.ratio(series(1, 2, 4, 999), series(1.1, 2.2, 4.4, 1))
    assert median == pytest.approx(1.1)
    assert noise == pytest.approx(0)
    _, noise = compare.ratio(series(1, 1, 1), series(1, 1.5, 2))
    assert noise == pytest.approx(1.57 * 0.5 / 3**0.5)
    assert compare.ratio(series(1), series(2)) == (2, float("inf"))


def test_slower_is_beyond_threshold_and_noise():
    assert compare.is_slower(1.06, 0.01, 5)
    assert not compare.is_slower(1.04, 0.01, 5)
    assert not compare.is_slower(1.06, 0.07, 5)


@pytest.mark.slow
def test_comparison_of_two_trees(tmp_path, monkeypatch, capsys):
    """Two copies, of which one sleeps for longer in merge."""
    for name, seconds in (("fast", 0.02), ("slow", 0.2)):
        package = tmp_path / name / "tokenops"
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(os.path.dirname(tokenops.__file__), package, ignore=ignored)
        with (package / "__init__.py").open("a") as file:
            print("import time", "_merge = merge", "def merge(*a, **k):", file=file, sep="\n")
            print(f"    time.sleep({seconds})", "    return _merge(*a, **k)", file=file, sep="\n")
    few = ["--rehearse", "--threads", "1", "--dtype", "float32", "--samples", "4", "--budget", "9"]
    few += ["--op", "merge", "--case", "sd-2"]
    start = compare.Process

    def run(tree, base):
        folders = {compare.ROOT: tmp_path / tree, tmp_path: tmp_path / base}
        monkeypatch.setattr(compare, "Process", lambda folder, argv: start(folders[folder], argv))
        status = compare.main(few, lambda commit: tmp_path)
        return status, capsys.readouterr().out

    status, out = run("fast", "slow")
    assert status == 0
    assert float(out.splitlines()[1].split()[5]) < 0.6
    status, out = run("slow", "fast")
    assert status == 1
    assert out.count("SLOWER") == 1
    assert out.splitlines()[-1] == "1 of 1 slower than 5 %, or failed"


def test_a_case_that_the_base_lacks(tmp_path):
    class Old:
        def ask(self, *request):
            return {"error": "AttributeError: no such operator"}

    class New:
        def ask(self, *request):
            return {}

    request = ("merge", "vit-b", "float32")
    assert compare.compare({"tree": New(), "base": Old()}, request, REHEARSAL, 5) == (
        "base: AttributeError: no such operator",
        False,
    )
    assert compare.compare({"tree": Old(), "base": New()}, request, REHEARSAL, 5)[1]


def test_checkout_of_the_base(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="0123456789abcdef\n")

    monkeypatch.setattr(subprocess, "run", run)
    tree = compare.checkout("main")
    assert tree.parts[-3:] == ("build", "bench-compare", "0123456789ab")
    assert commands[1][-2:] == [str(tree), "0123456789abcdef"]
    assert commands[2][1:] == ["setup.py", "--quiet", "build_ext", "--inplace"]
