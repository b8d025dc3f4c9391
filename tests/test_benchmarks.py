# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: that runs, timing and tables do what they say."""

from __future__ import annotations

import gc
import os
from dataclasses import replace

import pytest
import torch

import tokenops
from benchmarks import fallback, machine, memory, report, run, store
from benchmarks.attention import AttentionShape
from benchmarks.cases import RIVALS, YARDSTICKS
from benchmarks.registry import CASES, all_cases, find, operators, select
from benchmarks.timing import (
    SETTLING_CALLS,
    CpuTimer,
    Policy,
    Rival,
    Sample,
    Series,
    interleave,
    is_clean,
)
from tokenops import _library

CPU = torch.device("cpu")
BRIEF = Policy(samples=2, enough=1, budget=0.2, rounds=2, sample_seconds=1e-5)


def brief_settings(**changes):
    defaults = {
        "device": CPU,
        "threads": torch.get_num_threads(),
        "rivals": ("reference", "eager"),
        "policy": BRIEF,
        "timer": CpuTimer(),
        "timer_name": "wall clock",
        "mode": "quick",
        "measure_memory": False,
        "ceilings": machine.Ceilings({"float32": 100.0}, "torch.mm", {"float32": 100.0}),
        "environment": {"device": "cpu", "hardware": "some processor", "cores": "2"},
    }
    return run.Settings(**{**defaults, **changes})


def measure(case, **changes):
    rows = run.run_case(case.tiny(), "float32", brief_settings(**changes), lambda have, want: None)
    return {row["rival"]: row for row in rows}


# Registry


def test_cases_have_unique_names_and_folders():
    names = [(case.operator, case.name) for case in all_cases()]
    assert len(set(names)) == len(names)
    folders = os.listdir(os.path.join(os.path.dirname(tokenops.__file__), "ops"))
    assert set(CASES) <= set(folders)
    for case in all_cases():
        assert case.operator in operators()
        assert case.public in _library.operators
        assert set(case.memory) <= {*RIVALS, *YARDSTICKS} - set(case.skip)


def test_select():
    assert len(select()) + len(select(device="cuda")) == len(list(all_cases()))
    assert {case.device for case in select(device="cuda")} == {"cuda"}
    assert {case.name for case in select(["unmerge"])} == {"vit-b", "sd"}
    assert {case.operator for case in select(["matching"])} == {"match"}
    assert [case.operator for case in select(["match", "merge"], ["sd"])] == ["match", "merge"]
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


class ScriptedTimer:
    """Hands out samples that were written down before, and notes who asked."""

    def __init__(self, clean):
        self.clean, self.asked, self.now = clean, [], 0.0

    def prepare(self, call):
        return call

    def sample(self, call, calls):
        name = call()
        self.asked.append((name, calls))
        self.now += 1.0
        return Sample(seconds=1.0 if name == "slow" else 0.1, clean=self.clean(name, self.now))


def scripted(policy, clean=lambda name, now: True):
    timer = ScriptedTimer(clean)
    racers = {name: Rival(lambda name=name: name) for name in ("slow", "fast", "other")}
    series = interleave(racers, timer, policy, clock=lambda: timer.now)
    calibration = 3 * len(racers)
    return series, timer.asked[calibration:]


def test_rivals_take_turns_in_random_order():
    series, asked = scripted(Policy(samples=20, budget=1e9, sample_seconds=1e-9))
    rounds = [tuple(name for name, _ in asked[i : i + 3]) for i in range(0, len(asked), 3)]
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
        Policy(samples=10, budget=1e9, sample_seconds=1e-9),
        clean=lambda name, now: name != "slow" or next(turn) % 2 == 0,
    )
    assert series["slow"].clean == 10
    assert series["fast"].clean == len(series["slow"].samples) >= 19
    assert series["slow"].used == "clean"


def test_budget_ends_what_is_never_clean():
    policy = Policy(samples=10, enough=2, budget=60.0, rounds=3, sample_seconds=1e-9)
    series, asked = scripted(policy, clean=lambda name, now: False)
    assert len(asked) < 70
    assert series["slow"].clean == 0
    assert series["slow"].used == "all"
    assert series["slow"].seconds(0.5) == 1.0
    series, asked = scripted(replace(policy, budget=0.0), clean=lambda name, now: False)
    assert len(asked) == 3 * policy.rounds


def test_short_calls_are_repeated():
    timer = ScriptedTimer(lambda name, now: True)
    series = interleave({"fast": Rival(lambda: "fast")}, timer, Policy(2, sample_seconds=0.7))
    assert series["fast"].calls == 7
    assert timer.asked[-1] == ("fast", 7)


def test_disturbed_samples_do_not_count():
    series = Series(1, enough=2)
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


def test_cpu_timer_times_calls_and_no_more():
    calls = []
    sample = CpuTimer().sample(lambda: calls.append(None), 5)
    assert len(calls) == 5 + SETTLING_CALLS
    assert 0 < sample.seconds < 1


def test_contexts_hold_during_samples():
    inside = []

    class Context:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    def call():
        assert inside
        assert gc.isenabled() or len(inside) == 1

    interleave({"a": Rival(call, Context)}, CpuTimer(), BRIEF)
    assert not inside
    assert gc.isenabled()


# Runs


def test_rows_of_a_run():
    rows = measure(find("merge", "vit-b"))
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
    rows = measure(find("match", "sd"), rivals=())
    assert list(rows) == ["tokenops", "bmm", "bmm+max", "copy"]


def test_attention_has_yardsticks():
    rows = measure(find("policy_attention_forward_backward", "vit-b"), rivals=("flex",))
    assert list(rows) == ["tokenops", "sdpa", "unweighted", "copy"]
    assert rows["tokenops"]["shape"] == "B2 H2 N17 D16 soft eps 1e-6"
    assert all(row["status"] == "ok" and row["ratio"] for row in rows.values())
    rows = measure(find("attention_scores", "vit-b-columns"), rivals=("sdpa+bias",))
    assert list(rows) == ["tokenops", "sdpa", "copy"]


def test_reasons_stand_in_the_row(monkeypatch):
    monkeypatch.setattr(machine, "cxx", lambda: None)
    case = find("match", "n65536")
    rows = measure(case, rivals=("reference", "eager", "compile"))
    assert rows["eager"]["status"] == "skipped"
    assert rows["eager"]["note"] == case.skip["eager"]
    assert rows["eager"]["median_us"] == ""
    rows = measure(find("merge", "sd"), rivals=("compile",))
    assert rows["compile"]["status"] == "skipped"
    assert "C++ compiler" in rows["compile"]["note"]
    assert rows["tokenops"]["status"] == "ok"


def test_a_rival_that_fails_or_differs_gets_no_ratio():
    def setup(shape, dtype, device):
        work = find("merge", "vit-b").setup(shape, dtype, device)

        def broken():
            raise RuntimeError("cannot open /usr/lib/somewhere/cc1plus: no such file\nmore")

        def wrong():
            right = work.rivals["eager"]()
            return Rival(lambda: right.call() + 1)

        return replace(work, rivals={**work.rivals, "eager": wrong, "reference": broken})

    rows = measure(replace(find("merge", "vit-b"), setup=setup))
    assert rows["reference"]["status"] == "failed"
    assert rows["reference"]["note"] == "RuntimeError: cannot open cc1plus: no such file"
    assert rows["eager"]["status"] == "differs"
    assert rows["eager"]["ratio"] == ""
    assert rows["eager"]["median_us"] != ""


@pytest.mark.slow
@pytest.mark.skipif(machine.cxx() is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("operator", ["merge_wavg", "merge_wavg_backward"])
def test_compiled_rival(operator):
    rows = measure(find(operator, "vit-b"), rivals=("compile",))
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
    rows = measure(find(operator, "vit-b"), rivals=(rival,))
    assert list(rows) == ["tokenops", rival, "sdpa", "unweighted", "copy"]
    assert rows[rival]["note"] == ""
    assert rows[rival]["status"] == "ok"


def test_command_line(capsys):
    run.main(["--list", "--op", "unmerge", "--case", "sd"])
    assert capsys.readouterr().out.split()[:2] == ["unmerge", "sd"]
    with pytest.raises(SystemExit, match="no case"):
        run.main(["--list", "--op", "unmerge", "--case", "n65536"])


@pytest.mark.slow
@pytest.mark.skipif(machine.cxx() is None, reason="needs a C++ compiler")
def test_fma_probe():
    float32, bfloat16 = machine.fma_peak(1, 0.05)
    assert float32 > 0.5
    assert bfloat16 >= 0


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc")
def test_memory_counts_the_scores():
    extra = memory.extra_bytes(find("match", "sd"), "eager", "float32", CPU, 1)
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
    rows = measure(find("merge", "vit-b"), rivals=("eager",))
    skipped = measure(find("match", "n65536"), rivals=("eager",))
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


def test_attention_stands_in_tables_of_its_own(tmp_path):
    cases = {
        "policy": ("policy_attention", "vit-b"),
        "proportional": ("policy_attention_forward_backward", "vit-b-size"),
        "keep": ("policy_attention_forward_backward", "vit-b-keep70-none"),
        "scores": ("attention_scores", "vit-b-columns"),
    }
    for case in cases.values():
        store.merge(tmp_path / "cpu.csv", measure(find(*case)).values())
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
    store.merge(tmp_path / "cpu.csv", measure(find("merge", "vit-b")).values())
    legend = report.render("legend", tmp_path)
    assert "*eager*: the recipe of ToMe" in legend
    assert "*eager* of attention: maps in PyTorch operators" in legend
    assert legend.count("*tokenops*") == 1


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
    group = report.Group({name: {"ratio": ratio} for name, ratio in ratios.items()})
    assert report.fairest(group) == ("index", 2.5)
    assert report.fairest(report.Group(tokenops={"ratio": "1"}, sdpa={"ratio": "2"})) is None


def test_plot(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    report.main(["--plot", str(path), "--results", str(results)])
    first = path.read_bytes()
    report.main(["--plot", str(path), "--results", str(results)])
    assert path.read_bytes() == first


# Fallback


def test_fallback_runs_each_variant(capfd):
    few = ["--tiny", "--threads", "1", "--only", "match plain float32", "merge mean bfloat16"]
    assert fallback.main([*few, "--variants", "no library", "avx2", "--all"]) in (0, 1)
    words = capfd.readouterr().out.splitlines()
    assert [w for w in words if "threads" in w] == ["no library, 1 threads", "avx2, 1 threads"]
    rows = [w for w in words if " ms " in w]
    assert len(rows) == 4
    assert all("tokenops" in w and "composed" in w for w in rows)
    assert words[-1].split()[0] == str(sum("BELOW" in w for w in rows))


def test_fallback_times_a_patched_model():
    found = fallback.model_rivals(tiny=True)
    with torch.inference_mode():
        torch.testing.assert_close(found["tokenops"].call(), found["eager"].call())


def test_fallback_marks_what_is_below_the_bar():
    row = {"case": "match", "median": {"eager": 0.94, "tokenops": 1.0}}
    assert fallback.line({**row, "best": row["median"]})[1]
    row["median"]["eager"] = 0.96
    assert not fallback.line({**row, "best": row["median"]})[1]
