# SPDX-License-Identifier: Apache-2.0
"""Tools for a GPU, as far as they run without one."""

import importlib

import pytest
import torch

import tokenops
from benchmarks import smoke
from benchmarks.gpu import record
from tokenops import _library
from tokenops.testing.samples import Sizes

pytest.importorskip("triton")

from benchmarks import launches, tune
from benchmarks.ahead_of_time import record as record_launches
from tokenops._triton import launch
from tokenops._triton.launch import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", _library.operators)
def test_smoke(operator, backend):
    problems = dict(smoke.run(CPU, ["float32"], [operator]))
    assert set(problems.values()) == {None}
    assert all(case.startswith(f"{operator} float32 ") for case in problems)


def test_smoke_finds_wrong_results(monkeypatch):
    module = importlib.import_module("tokenops.ops.merging.samples")
    factor = {torch.float32: 1.1, torch.float64: 1.0}

    def unmerge(y, token_map, residual=None):
        several = y if isinstance(y, list) else [y]
        return [tokenops.unmerge(t, token_map) * factor[t.dtype] for t in several]

    monkeypatch.setattr(module, "unmerge", unmerge)
    problems = dict(smoke.run(CPU, ["float32"], ["unmerge", "merge"]))
    wrong = {case for case, problem in problems.items() if problem is not None}
    assert wrong == {case for case in problems if case.startswith("unmerge")}
    assert "of the largest entry" in str(problems["unmerge float32 plain, 75 tokens"])


@pytest.mark.parametrize("operator", ["match", "nearest"])
def test_smoke_finds_wrong_choices(operator):
    sizes = Sizes(tokens=12, dtype=torch.float32)
    call = next(call for call in smoke.calls(operator, sizes) if call.name in ("plain", "cosine"))
    smoke.verify(call, smoke.outcome(call))
    other = {name: tensor.flip(1) for name, tensor in call.tensors.items()}
    if operator == "nearest":
        other["b"] = -call.tensors["b"]
    with pytest.raises(AssertionError, match="of similarity"):
        smoke.verify(call, smoke.outcome(call._replace(tensors=other)))


def three_cases(monkeypatch, error):
    """Let smoke have three cases, the second of which fails."""

    def fail():
        raise error

    def cases(operator, dtype, device):
        yield "first", lambda: None
        yield "second", fail
        yield "third", lambda: None

    monkeypatch.setattr(smoke, "cases", cases)


def test_a_smoke_case_that_fails_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    three_cases(monkeypatch, ValueError("odd"))
    path = tmp_path / "record.csv"
    command = ["--dtype", "float16", "--only", "match", "--record", str(path)]
    assert smoke.main(command) == 1
    rows = {row.case.split()[-1]: row for row in record.read(path).values()}
    assert {name: row.result for name, row in rows.items()} == {
        "first": "passed", "second": "failed", "third": "passed",
    }  # fmt: skip
    assert rows["second"].message == "ValueError: odd"
    capsys.readouterr()
    assert smoke.main(command) == 1  # the record has all cases
    assert capsys.readouterr().out == "1 failed\n"


def test_smoke_goes_on_after_a_cuda_error_in_another_process(monkeypatch, tmp_path):
    three_cases(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    path = tmp_path / "record.csv"
    command = ["--dtype", "float16", "--only", "match", "--record", str(path)]
    assert smoke.main(command) == record.POISONED
    assert len(record.read(path)) == 2
    assert smoke.main(command) == 1
    results = [row.result for row in record.read(path).values()]
    assert results == ["passed", "failed", "passed"]


def test_smoke_reports_inputs_that_cannot_be_made(monkeypatch):
    def cases(operator, dtype, device):
        raise ValueError("no inputs")
        yield

    monkeypatch.setattr(smoke, "cases", cases)
    [(name, problem)] = smoke.run(CPU, ["float16"], ["match"])
    assert (name, str(problem)) == ("match float16 inputs", "no inputs")


def test_walk_finds_the_best():
    def time(s):
        tiles = abs(s.block_m - 16) + abs(s.block_n - 256) / 16
        return tiles + abs(s.num_warps - 8) + abs(s.num_stages - 3)

    start = Settings(64, 64, 4, 1)
    best, seconds, before = tune.walk(start, lambda s: 10 + time(s))
    assert best == Settings(16, 256, 8, 3)
    assert (seconds, before) == (10, 10 + time(start))


def test_walk_stays_where_nothing_is_clearly_faster():
    start = Settings(64, 64, 4, 1)
    assert tune.walk(start, lambda s: 1.0 if s == start else 0.995)[0] == start
    assert tune.walk(start, lambda s: 1.0 if s == start else float("inf"))[0] == start


def test_replaced_heuristics():
    def settings():
        with record_launches("sm_90") as recorded:
            launches.cases()["wavg size bf16 C768 B1024"]()
        return recorded[0].launch.settings

    def pick(*arguments):
        return trial

    shipped, trial = settings(), Settings(16, 16)
    before = dict(launch.heuristics)
    with tune.replaced(dict.fromkeys(before, pick)):
        assert settings() == trial != shipped
    assert settings() == shipped
    assert launch.heuristics == before
    with pytest.raises(ValueError, match="unknown"), tune.replaced({"unknown": pick}):
        pass
