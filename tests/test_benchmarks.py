# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: cases, timing, runs and tables."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

import tokenops
from benchmarks import machine, measure, memory, models, report, store
from benchmarks.attention import AttentionShape
from benchmarks.cases import RIVALS, YARDSTICKS, context
from benchmarks.registry import CASES, all_cases, find, operators, select
from benchmarks.timing import (
    CpuTimer,
    Policy,
    Sample,
    Series,
    event_timer,
    graph_timer,
    interleave,
    is_clean,
)
from tokenops import _choice, _library

CPU = torch.device("cpu")
BRIEF = Policy(samples=2, enough=1, budget=0.2, rounds=2, sample_seconds=1e-5)


def rows_of(case, rivals=("reference", "eager")):
    """Rows of a brief run at tiny sizes, by rival."""
    settings = measure.Settings(
        rivals=rivals,
        policy=BRIEF,
        ceilings=machine.Ceilings({"float32": 100.0}, "torch.mm", {"float32": 100.0}),
        common={
            "device": "cpu",
            "hardware": "some processor",
            "cores": "2",
            "threads": str(torch.get_num_threads()),
            "timer": "wall clock",
            "mode": "quick",
        },
    )
    rows = measure.run_case(case.tiny(), "float32", settings)
    return {row["rival"]: row for row in rows}


# Registry


def test_cases_have_unique_names_and_folders():
    names = [(case.operator, case.name) for case in all_cases()]
    assert len(set(names)) == len(names)
    folders = os.listdir(os.path.join(os.path.dirname(tokenops.__file__), "ops"))
    assert set(CASES) - {"models"} <= set(folders)
    for case in all_cases():
        assert case.operator in operators()
        assert case.public in {*_library.operators, "model"}
        assert set(case.memory) <= {*RIVALS, *YARDSTICKS} - set(case.skip)


def test_each_public_operator_has_a_case():
    assert {case.public for case in select()} == set(_library.operators)
    on_cuda = {case.public for case in select(device="cuda")}
    assert on_cuda == {*_library.operators, "model"}


def test_select():
    on_request = select(on_request=True)
    assert all(case.on_request for case in on_request)
    assert len(select()) + len(select(device="cuda")) + len(on_request) == len(list(all_cases()))
    assert {case.device for case in select(device="cuda")} == {"cuda"}
    assert {case.name for case in select(["unmerge"])} == {"vit-b", "sd"}
    assert {case.operator for case in select(["matching"])} == {"match", "nearest"}
    assert [case.operator for case in select(["match", "merge"], ["sd"])] == ["match", "merge"]
    assert [case.name for case in select(["merge"], ["vit-b-8"])] == ["vit-b-8"]
    with pytest.raises(ValueError, match="no case 'vit-x' of 'match'"):
        find("match", "vit-x")


def test_least_work():
    work = find("match", "vit-b").prepare(torch.bfloat16, CPU)
    assert work.flops == 2 * 32 * 99 * 98 * 64
    assert work.bytes == 32 * 197 * 64 * 2
    work = find("merge", "vit-b").prepare(torch.float32, CPU)
    assert work.bytes == 4 * 32 * 768 * (2 * 197 - 16)
    work = find("policy_attention", "vit-b").prepare(torch.bfloat16, CPU)
    assert work.flops == 4 * 16 * 12 * 197 * 197 * 64
    assert work.bytes == 4 * 2 * 16 * 12 * 197 * 64 + 4 * 16 * 197


@pytest.mark.parametrize(
    ("eps", "policy_grad", "forward", "backward"),
    [
        (0.0, "exact", 4 + 4, 2 * 10 + 3 * 4),
        (0.0, "none", 4 + 4, 5 * 4),
        (1e-6, "exact", 10 + 4, 2 * 10 + 3 * 4),
    ],
)
def test_least_work_of_a_hard_policy(eps, policy_grad, forward, backward):
    shape = AttentionShape(2, 3, 10, 8, "hard", 0.4, eps, policy_grad)
    product = 2 * 2 * 3 * 10 * 8  # one column of one product
    assert shape.forward_flops() == product * forward
    assert shape.backward_flops() == product * backward


# Timing


class Script:
    """Samplers that return samples by name and record the names."""

    def __init__(self, clean):
        self.clean, self.asked, self.now = clean, [], 0.0

    def sample(self, name):
        self.asked.append(name)
        self.now += 1.0
        return Sample(seconds=1.0 if name == "slow" else 0.1, clean=self.clean(name, self.now))


def scripted(policy, clean=lambda name, now: True):
    script = Script(clean)
    samplers = {name: partial(script.sample, name) for name in ("slow", "fast", "other")}
    return interleave(samplers, policy, clock=lambda: script.now), script.asked


def test_rivals_take_turns_in_random_order():
    series, asked = scripted(Policy(samples=20, budget=1e9))
    rounds = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert len(rounds) == 20
    assert all(sorted(names) == ["fast", "other", "slow"] for names in rounds)
    assert len(set(rounds)) > 3
    assert {len(s.samples) for s in series.values()} == {20}
    assert series["slow"].seconds(0.5) == 1.0
    assert series["fast"].seconds(0.5) == 0.1


def test_goes_on_until_enough_samples_are_clean():
    # Every second sample of one rival is disturbed: the others wait for it.
    turn = iter(range(10**6))
    series, _ = scripted(
        Policy(samples=10, budget=1e9),
        clean=lambda name, now: name != "slow" or next(turn) % 2 == 0,
    )
    assert series["slow"].clean == 10
    assert series["fast"].clean == len(series["slow"].samples) >= 19
    assert series["slow"].used == "clean"


def test_budget_ends_what_is_never_clean():
    policy = Policy(samples=10, enough=2, budget=60.0, rounds=3)
    series, asked = scripted(policy, clean=lambda name, now: False)
    assert len(asked) < 70
    assert series["slow"].clean == 0
    assert series["slow"].used == "all"
    assert series["slow"].seconds(0.5) == 1.0
    series, asked = scripted(replace(policy, budget=0.0), clean=lambda name, now: False)
    assert len(asked) == 3 * policy.rounds


def test_short_calls_are_repeated():
    clock = iter(range(10**9))
    timer = CpuTimer(lambda: [next(clock) for _ in range(1000)], 2e-3)
    assert timer.calls > 3
    sample = timer()
    assert sample.calls == timer.calls
    assert 1e-4 < sample.seconds * sample.calls < 1
    assert CpuTimer(lambda: None, 0.0).calls == 1


def test_disturbed_samples_do_not_count():
    series = Series(enough=2)
    series.samples += [Sample(1.0), Sample(9.0, clean=False), Sample(3.0), Sample(2.0, faults=4.0)]
    assert series.seconds(0.0) == 1.0
    assert series.seconds(0.5) == 2.0
    assert series.seconds(1.0) == 3.0
    assert series.clean == 3
    series.enough = 4
    assert series.used == "all"
    assert series.seconds(1.0) == 9.0


def test_clean():
    assert is_clean(0, 1e-3)
    assert not is_clean(1, 1e-3)
    assert is_clean(4, 0.21)  # the pulse of an idle system
    assert not is_clean(20, 0.21)


def test_cpu_timer_times_calls_and_no_more(monkeypatch):
    used = iter([(0, 0), (3, 50)] * 100)
    calls = []
    timer = CpuTimer(lambda: calls.append(None), 0.0)
    timer.calls, calls[:] = 5, []
    monkeypatch.setattr("benchmarks.timing.usage", lambda: next(used))
    sample = timer()
    assert len(calls) == 5 + 2  # two calls warm up caches and threads
    assert 0 < sample.seconds < 1
    assert sample.faults == 10  # of the timed calls only, without the warm-up
    assert not sample.clean


def test_contexts_hold_during_samples():
    case = find("merge", "vit-b").tiny()
    work, seen = case.prepare(torch.float32, CPU), []

    def make():
        return lambda: seen.append(_choice.chosen()) or torch.zeros(1)

    work = replace(work, rivals={"tokenops": make, "eager": make}, difference=lambda *_: 0.0)
    rows = {name: {} for name in ("tokenops", "composed", "eager")}
    ready = measure.make_ready(case, work, rows, "wall clock", BRIEF)
    for name, backend in (("tokenops", None), ("composed", "composed"), ("eager", None)):
        seen.clear()
        ready[name]()
        assert set(seen) == {backend}
    assert _choice.chosen() is None


def test_samples_have_no_garbage_collection():
    def sample():
        assert not gc.isenabled()
        return Sample(1.0)

    interleave({"a": sample}, BRIEF)
    assert gc.isenabled()


def test_triton_times_on_cuda(monkeypatch):
    pytest.importorskip("triton")

    def bench(kind):
        return lambda call, *_, **__: call() or {"events": 2.0, "graph": 3.0}[kind]

    monkeypatch.setattr("triton.testing.do_bench", bench("events"))
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", bench("graph"))
    calls = []
    assert event_timer(lambda: calls.append(0), 1e-3)() == Sample(2e-3)
    assert len(calls) == 1
    assert graph_timer(lambda: calls.append(0), 1e-3)() == Sample(3e-3)
    assert len(calls) == 3  # one trial checks whether a graph can capture the call


# Runs


def test_rows_of_a_run():
    rows = rows_of(find("merge", "vit-b"))
    assert list(rows) == ["tokenops", "reference", "eager", "copy"]
    for row in rows.values():
        assert set(row) == set(store.COLUMNS)
        assert row["status"] == "ok", row["note"]
        assert float(row["best_us"]) <= float(row["p20_us"]) <= float(row["median_us"])
        assert float(row["median_us"]) <= float(row["p80_us"])
        assert float(row["bound_us"]) > 0
    ours = rows["tokenops"]
    assert ours["ratio"] == "1.000"
    assert ours["backend"] in tokenops.available_backends()
    assert ours["bound_by"] == "memory"
    assert ours["shape"] == "B2 N17 C8 r4"


def test_match_has_yardsticks():
    rows = rows_of(find("match", "sd"), rivals=())
    assert list(rows) == ["tokenops", "bmm", "bmm+max", "copy"]


def test_attention_has_yardsticks():
    rows = rows_of(find("policy_attention_forward_backward", "vit-b"), rivals=("flex",))
    assert list(rows) == ["tokenops", "sdpa", "unweighted", "copy"]
    assert rows["tokenops"]["shape"] == "B2 H2 N17 D16 soft eps 1e-6"
    assert all(row["status"] == "ok" and row["ratio"] for row in rows.values())
    rows = rows_of(find("attention_scores", "vit-b-columns"), rivals=("sdpa+bias",))
    assert list(rows) == ["tokenops", "sdpa", "copy"]


def test_reasons_stand_in_the_row(monkeypatch):
    monkeypatch.setattr(machine, "cxx", lambda: None)
    case = find("match", "n65536")
    rows = rows_of(case, rivals=("reference", "eager", "compile"))
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["note"] == case.skip["eager"]
    assert rows["eager"]["median_us"] == ""
    rows = rows_of(find("merge", "sd"), rivals=("compile",))
    assert rows["compile"]["status"] == "skipped"
    assert "C++ compiler" in rows["compile"]["note"]
    assert rows["tokenops"]["status"] == "ok"


def test_a_rival_that_fails_or_differs_gets_no_ratio():
    def setup(shape, dtype, device):
        work = find("merge", "vit-b").setup(shape, dtype, device)

        def broken():
            raise RuntimeError("cannot open /usr/lib/somewhere/cc1plus: no such file\nmore")

        def wrong():
            right = work.make("eager")
            return lambda: right() + 1

        return replace(work, rivals={**work.rivals, "eager": wrong, "index": broken})

    rows = rows_of(replace(find("merge", "vit-b"), setup=setup), rivals=("eager", "index"))
    assert rows["index"]["status"] == "failed"
    assert rows["index"]["note"] == "RuntimeError: cannot open cc1plus: no such file"
    assert rows["eager"]["status"] == "differs"
    assert rows["eager"]["ratio"] == ""
    assert rows["eager"]["median_us"] != ""


@pytest.mark.slow
@pytest.mark.skipif(machine.cxx() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("operator", ["merge_wavg", "merge_wavg_backward"])
def test_compiled_rival(operator):
    rows = rows_of(find(operator, "vit-b"), rivals=("compile",))
    assert rows["compile"]["note"] == ""
    assert rows["compile"]["status"] == "ok"
    assert float(rows["compile"]["ratio"]) > 0


@pytest.mark.slow
@pytest.mark.skipif(machine.cxx() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("operator", "rival"),
    [
        ("policy_attention", "compile"),
        ("policy_attention", "flex"),
        ("policy_attention_forward_backward", "compile"),
    ],
)
def test_compiled_attention(operator, rival):
    rows = rows_of(find(operator, "vit-b"), rivals=(rival,))
    assert list(rows) == ["tokenops", rival, "sdpa", "unweighted", "copy"]
    assert rows[rival]["note"] == ""
    assert rows[rival]["status"] == "ok"


def test_command_line(capsys):
    measure.main(["--list", "--op", "unmerge", "--case", "sd"])
    assert capsys.readouterr().out.split()[:2] == ["unmerge", "sd"]
    with pytest.raises(SystemExit, match="no case"):
        measure.main(["--list", "--op", "unmerge", "--case", "n65536"])


@pytest.mark.slow
@pytest.mark.skipif(machine.cxx() is None, reason="needs a C++ compiler")
def test_fma_probe():
    float32, bfloat16 = machine.fma_peak(1, 0.05)
    assert float32 > 0.5
    assert bfloat16 >= 0


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
def test_memory_counts_the_scores():
    extra = memory.extra_bytes(find("match", "sd"), "eager", "float32")
    scores = 2 * 3072 * 1024 * 4
    assert scores < extra < 4 * scores


# Tables


def test_number():
    assert store.number(0.0) == "0"
    assert store.number(1234567.0) == "1234567"
    assert store.number(12.3456) == "12.35"
    assert store.number(0.00123456, 3) == "0.00123"
    assert report.duration("12.345") == "12.3 µs"
    assert report.duration("12345") == "12.3 ms"
    assert report.duration("1234567") == "1.23 s"


@pytest.fixture
def results(tmp_path):
    rows = rows_of(find("merge", "vit-b"), rivals=("eager",))
    skipped = rows_of(find("match", "n65536"), rivals=("eager",))
    skipped["tokenops"]["extra_mb"] = "1.50"
    store.merge(tmp_path / "cpu.csv", [*rows.values(), *skipped.values()])
    return tmp_path


def test_a_second_run_replaces_the_first(results):
    path = results / "cpu.csv"
    before = store.read(path)
    assert [row["operator"] for row in before] == ["match"] * 5 + ["merge"] * 3
    again = [{**row, "median_us": "42"} for row in before if row["operator"] == "merge"][:2]
    store.merge(path, again)
    after = store.read(path)
    assert [row["median_us"] for row in after if row["operator"] == "merge"] == ["42", "42"]
    assert [r for r in after if r["operator"] == "match"] == before[:5]


def test_rows_of_cases_that_are_no_more_go(results):
    path = results / "cpu.csv"
    rows = store.read(path)
    text = path.read_text(encoding="utf-8").replace("match,n65536", "match,n65535")
    path.write_text(text, encoding="utf-8")
    store.merge(path, [row for row in rows if row["operator"] == "merge"])
    assert {(row["operator"], row["case"]) for row in store.read(path)} == {("merge", "vit-b")}


def test_results_are_of_cases_that_there_are():
    known = {(case.operator, case.name, case.sizes) for case in all_cases()}
    for row in store.read(store.RESULTS / "cpu.csv"):
        assert (row["operator"], row["case"], row["shape"]) in known


def test_tables_go_between_markers(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    blocks = [f"<!-- benchmarks:{n}:start -->\n<!-- benchmarks:{n}:end -->" for n in report.TABLES]
    page.write_text("before\n\n" + "\n\n".join(blocks) + "\n\nafter\n", encoding="utf-8")
    arguments = [str(page), "--results", str(results)]
    assert report.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert report.main(arguments) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| merge | B2 N17 C8 r4 |" in text
    assert "match n65536, eager: not run" in text
    assert "1.50 MB" in text
    assert "some processor" in text
    assert "quick run" in text
    assert report.main([*arguments, "--check"]) == 0
    report.main(arguments)
    assert page.read_text(encoding="utf-8") == text


def test_a_failed_case_stands_in_the_tables(results):
    path = results / "cpu.csv"
    common = {name: store.read(path)[0][name] for name in store.KEY}
    row = measure.new_row(find("unmerge", "vit-b"), "float32", "tokenops", common)
    store.merge(path, [{**row, "status": "failed", "note": "odd"}])
    tables = {name: report.render(name, results) for name in report.TABLES}
    assert "| unmerge | B32 N197 C768 r16 |" in tables["merge"]


def test_attention_stands_in_tables_of_its_own(tmp_path):
    cases = {
        "policy": ("policy_attention", "vit-b"),
        "proportional": ("policy_attention_forward_backward", "vit-b-size"),
        "keep": ("policy_attention_forward_backward", "vit-b-keep70-none"),
        "scores": ("attention_scores", "vit-b-columns"),
    }
    for case in cases.values():
        store.merge(tmp_path / "cpu.csv", rows_of(find(*case)).values())
    tables = {name: report.render(name, tmp_path) for name in report.TABLES}
    for name in ("summary", "match", "merge", "backward", "overhead", "memory"):
        assert tables[name] == ""
    sizes = {name: f"| {find(*case).tiny().sizes} |" for name, case in cases.items()}
    for name in cases:
        assert [s for s in sizes if sizes[s] in tables[name]] == [name]
    assert [s for s in sizes if sizes[s] in tables["attention"]] == ["policy", "proportional"]
    assert [s for s in sizes if sizes[s] in tables["received"]] == ["scores"]
    assert "| policy_attention forward+backward |" in tables["proportional"]
    assert "| sdpa |" in tables["attention"]
    assert "*eager*: maps in PyTorch operators" in tables["legend"]
    assert "merging" not in tables["legend"]
    store.merge(tmp_path / "cpu.csv", rows_of(find("merge", "vit-b")).values())
    legend = report.render("legend", tmp_path)
    assert "*eager*: the recipe of ToMe" in legend
    assert "*eager* of attention: maps in PyTorch operators" in legend
    assert legend.count("*tokenops*") == 1


def test_files_of_results_hold_results():
    """The budgets of kernels in the same folder are not results."""
    for name in store.FILES.values():
        if (store.RESULTS / name).exists():
            assert {row["rival"] for row in store.read(store.RESULTS / name)} > {"tokenops"}


def test_without_results_tables_are_empty(tmp_path):
    for name in report.TABLES:
        assert report.render(name, tmp_path) == ""
        assert report.render(f"cuda-{name}", tmp_path) == ""


@pytest.mark.parametrize(
    "text",
    [
        "<!-- benchmarks:nothing:start -->\n<!-- benchmarks:nothing:end -->",
        "<!-- benchmarks:match:start -->\n",
        "<!-- benchmarks:match:start -->\n<!-- benchmarks:merge:end -->",
    ],
)
def test_bad_markers_are_refused(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=r"page\.md"):
        report.main([str(page), "--results", str(tmp_path)])


def test_documents_are_fresh():
    assert report.main(["--check"]) == 0


def test_the_fairest_rival_is_the_fastest_that_computes_the_same():
    ratios = {
        "tokenops": "1", "reference": "0.5", "eager": "9", "compile": "4", "index": "2.5",
        "sdpa": "0.8", "copy": "0.6", "flex": "",
    }  # fmt: skip
    run = dict.fromkeys(store.KEY, "x")
    rows = pd.DataFrame([{**run, "rival": r, "ratio": ratio} for r, ratio in ratios.items()])
    [best] = report.fairest(rows).itertuples()
    assert (best.rival, best.ratio) == ("index", "2.5")
    assert report.fairest(rows[rows.rival.isin(["tokenops", "sdpa"])]).empty


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    report.main(["--plot", str(path), "--results", str(results)])
    first = path.read_bytes()
    report.main(["--plot", str(path), "--results", str(results)])
    assert path.read_bytes() == first


# Variants and models


def test_a_variant_runs_the_cases_on_request(tmp_path):
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", "benchmarks.measure", "--variant", "no library", "--quick"]
    command += ["--threads", "1", "--op", "nearest", "match", "--case", "vit-b-8", "--samples", "1"]
    command += ["--rivals", "eager", "native", "composed", "--bar", "1000", "--out", str(out)]
    done = subprocess.run(command, cwd=store.RESULTS.parent.parent, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("match vit-b-8")]
    assert [line.endswith("BELOW") for line in lines] == [True, True]
    assert done.returncode == 2
    rows = store.read(out)
    assert {row["rival"] for row in rows} >= {"tokenops", "eager", "composed"}
    assert not [row for row in rows if row["rival"] == "native"]  # there is no library
    assert {row["backend"] for row in rows if row["rival"] == "tokenops"} == {"composed"}


def test_a_chosen_backend_serves_its_rival():
    work = find("merge_backward", "vit-b-8").tiny().prepare(torch.float32, CPU)
    expected = work.make("tokenops")()
    for name in ("reference", "composed"):
        with context(name):
            assert _choice.chosen() == name
            torch.testing.assert_close(work.make(name)(), expected)
    assert _choice.chosen() is None


def test_results_below_the_bar():
    rows = [{"rival": "tokenops", "ratio": "1.000"}, {"rival": "eager", "ratio": "0.94"}]
    assert measure.is_below(rows, 0.95)
    assert not measure.is_below(rows, 0.93)
    assert not measure.is_below([*rows[:1], {"rival": "eager", "ratio": ""}], 0.95)


def test_a_whole_model():
    rows = rows_of(find("model", "vit-b"), rivals=())
    assert list(rows) == ["tokenops", "dense", "slicing", "copy"]
    assert all(row["status"] == "ok" and row["ratio"] for row in rows.values())
    rows = rows_of(find("model", "vit-s"), rivals=("eager",))
    assert rows["eager"]["status"] == "ok"  # the patched model equals eager ToMe


def test_a_model_without_merging_is_dense():
    layers = torch.nn.ModuleList(models.Layer(64) for _ in range(3)).double()
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    with torch.no_grad():
        merged, dense, sliced = (run() for run in models.models(layers, x, 0).values())
    torch.testing.assert_close(dense, merged)
    torch.testing.assert_close(dense, sliced)


def test_slicing_leaves_as_many_tokens_as_merging():
    layers = torch.nn.ModuleList(models.Layer(64) for _ in range(2))
    with torch.no_grad():
        calls = models.models(layers, torch.randn(2, 20, 64), 3)
        assert calls["slicing"]().shape == calls["tokenops"]().shape == (2, 14, 64)
