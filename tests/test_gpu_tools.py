# SPDX-License-Identifier: Apache-2.0
"""What runs on a GPU alone, as far as it can be tried without one."""

import csv
import sys

import pytest
import torch

from benchmarks import gpu_check, smoke, vit
from benchmarks.gpu_check import Step, Table

pytest.importorskip("triton")

from benchmarks import tune
from tokenops._triton.launch import Settings


@pytest.mark.parametrize("check", smoke.CHECKS)
def test_smoke(check, backend):
    [(name, problem)] = smoke.run(torch.device("cpu"), ["float32"], [check])
    assert (name, problem) == (f"{check} float32", "")


def test_smoke_finds_garbage(monkeypatch):
    monkeypatch.setitem(smoke.CHECKS, "match", lambda dtype, device: 1 / 0)
    assert list(smoke.run(torch.device("cpu"), ["float16"], ["match"])) == [
        ("match float16", "ZeroDivisionError: division by zero")
    ]
    factor = {torch.float32: 1.1, torch.float64: 1.0}
    monkeypatch.setattr(
        smoke.tokenops,
        "unmerge",
        lambda y, token_map, residual: residual * factor[y.dtype] * y.sum(),
    )
    with pytest.raises(AssertionError, match="of the largest entry"):
        smoke.CHECKS["merging"](torch.float32, torch.device("cpu"))


def test_vit(capsys):
    small = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--tokens", "20", "--r", "4"]
    assert vit.main([*small, "--seconds", "0"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["dense", "tokenops"]


def test_vit_without_merging_is_dense():
    layers = torch.nn.ModuleList(vit.Layer(32, 2) for _ in range(3)).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        dense, merged = (run() for run in vit.models(layers, x, 0).values())
    torch.testing.assert_close(dense, merged)


def test_steps(tmp_path):
    def python(code):
        return [sys.executable, "-c", code]

    steps = [
        Step("good", python("print('first'); print('last'); print()"), 30),
        Step("bad", python("import os; print(os.environ['WORD']); raise SystemExit(3)"), 30,
             {"WORD": "hello"}),
        Step("slow", python("import time; time.sleep(60)"), 1),
        Step("missing", ["no-such-program"], 1),
    ]  # fmt: skip
    found = {o.name: o for o in gpu_check.run(steps, tmp_path)}
    assert (found["good"].result, found["good"].last) == ("ok", "last")
    assert (found["bad"].result, found["bad"].last) == ("failed (3)", "hello")
    assert found["slow"].result == "stopped after its time"
    assert found["missing"].result == "left out: no no-such-program here"
    assert (tmp_path / "good.log").read_text().startswith("first")


def test_phases_stay_within_eight_minutes(tmp_path):
    phases = gpu_check.phases(tmp_path)
    assert sum(max(step.seconds for step in steps) for steps in phases) <= 480
    names = [step.name for steps in phases for step in steps]
    assert len(set(names)) == len(names)


def write(path, rows):
    columns = ("operator", "case", "rival", "dtype", "median_us", "bound_share")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return Table(path)


def test_summary_says_what_was_reached(tmp_path):
    write(
        tmp_path / "cuda-graph.csv",
        [
            ("match", "vit-b-256", "tokenops", "bfloat16", "6", "0.4"),
            ("match", "vit-b-256", "eager", "bfloat16", "18", ""),
            ("match", "vit-b-256", "tokenops", "float32", "99", "0.4"),
        ],
    )
    lines = gpu_check.summary([], tmp_path).splitlines()
    assert "| match vit-b-256, graph, us | 6 | <= 8 | reached |" in lines
    assert "| match vit-b-256, eager / ours | 3 | >= 4 | MISSED |" in lines
    assert "| match vit-l-512-32, graph, us | not measured | <= 8 | |" in lines


def test_bars_name_cases_that_exist(tmp_path):
    """A bar about a case that is never timed would be missed by nobody."""

    class Everything(Table):
        def __init__(self):
            self.asked = set()

        def _number(self, operator, case, rival, column):
            self.asked.add((operator, case, rival))
            return float(len(self.asked))

    graph, events = Everything(), Everything()
    gpu_check.bars(graph, events)
    from benchmarks.registry import find

    for operator, case, _ in graph.asked | events.asked:
        assert find(operator, case).device == "cuda"
    assert not [operator for operator, *_ in graph.asked if operator.endswith("_backward")]


def test_walk_finds_the_best():
    def time(s):
        return abs(s.rows - 16) + abs(s.columns - 256) / 16 + abs(s.warps - 8) + abs(s.stages - 3)

    start = Settings(64, 64, 4, 1)
    best, seconds, before = tune.walk(start, lambda s: 10 + time(s))
    assert best == Settings(16, 256, 8, 3)
    assert (seconds, before) == (10, 10 + time(start))


def test_walk_stays_where_nothing_is_clearly_faster():
    start = Settings(64, 64, 4, 1)
    assert tune.walk(start, lambda s: 1.0 if s == start else 0.995)[0] == start
    assert tune.walk(start, lambda s: 1.0 if s == start else float("inf"))[0] == start
