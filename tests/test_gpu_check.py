# SPDX-License-Identifier: Apache-2.0
"""``benchmarks.gpu_check`` and its parts, run without a GPU."""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, machine, measure, store
from benchmarks.gpu import bars, library, record, steps
from benchmarks.gpu.runner import LARGEST, Outcome, Run, Step, pack
from benchmarks.registry import find
from tokenops import _native

ROOT = Path(__file__).resolve().parent.parent


def python(code):
    return [sys.executable, "-c", code]


def go(tmp_path, *phases, resume=False, **options):
    """Run phases; return the outcomes by name."""
    options = {"deadline": 30, "summarise": str, "grace": 0.5, **options}
    job = Run(list(phases), tmp_path / "out", tmp_path / "out.tar.gz", resume=resume, **options)
    return job.go()


def archived(archive, name):
    """Content of a file in an archive of a folder ``out``; None if it has none."""
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers()}
        return tar.extractfile(members[name]).read().decode() if name in members else None


# ---- the runner ----


def test_outcomes_of_steps(tmp_path):
    hello = python("import os; print(os.environ['WORD']); raise SystemExit(3)")
    found = go(
        tmp_path,
        [
            Step("good", python("print('first'); print('last'); print()"), 20),
            Step("bad", hello, 20, {"WORD": "hello"}),
            Step("slow", python("import time; time.sleep(60)"), 0.5),
            Step("missing", ["no-such-program"], 1),
            Step("gpu", python("print('never')"), 1, left_out="it needs a GPU"),
            Step("nothing", python("print('no kernels'); raise SystemExit(77)"), 20),
        ],
        [Step("last", python("print('done')"), 20)],
    )
    results = {name: outcome.result for name, outcome in found.items()}
    assert results == {
        "good": "ok",
        "bad": "failed (3)",
        "slow": "stopped after its time",
        "missing": "left out: cannot start no-such-program: No such file or directory",
        "gpu": "left out: it needs a GPU",
        "nothing": "left out: no kernels",
        "last": "ok",
    }
    assert (found["good"].last, found["bad"].last) == ("last", "hello")
    assert "first\nlast" in archived(tmp_path / "out.tar.gz", "good.log")
    assert json.loads(archived(tmp_path / "out.tar.gz", "state.json"))["outcomes"].keys() == (
        results.keys()
    )


def test_steps_of_a_phase_run_side_by_side_and_phases_do_not(tmp_path):
    mark = "from pathlib import Path; import time\n"
    meet = (
        mark + "Path('{0}').touch()\nwhile not Path('{1}').exists(): time.sleep(0.01)\nprint('met')"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    check = mark + f"print(Path('{a}').exists() and Path('{b}').exists())"
    found = go(
        tmp_path,
        [Step("a", python(meet.format(a, b)), 20), Step("b", python(meet.format(b, a)), 20)],
        [Step("after", python(check), 20)],
    )
    assert [outcome.last for outcome in found.values()] == ["met", "met", "True"]


def test_ends_before_its_deadline(tmp_path):
    """Even if a step ignores SIGINT and has child processes."""
    deaf = python(
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\ntime.sleep(60)"
    )
    start = time.monotonic()
    found = go(
        tmp_path,
        [Step("deaf", deaf, 60), Step("slow", python("import time; time.sleep(60)"), 60)],
        [Step("late", python("print()"), 60)],
        deadline=12,
    )
    assert time.monotonic() - start < 12
    results = [outcome.result for outcome in found.values()]
    assert results == ["stopped after its time"] * 2 + ["not reached"]


def test_a_cuda_error_costs_a_case_and_no_step(tmp_path):
    """A step with work left is restarted until it finishes or its time is over."""
    count = tmp_path / "count"
    code = (
        f"from pathlib import Path; p = Path('{count}'); n = len(p.read_text()) if p.exists() else "
        f"0; p.write_text('x' * (n + 1)); print(n); raise SystemExit({{}} if n < 3 else 0)"
    )
    found = go(tmp_path, [Step("poisoned", python(code.format(75)), 20, goes_on=True)])
    assert (found["poisoned"].result, found["poisoned"].last) == ("ok, 4 starts", "3")
    count.unlink()
    found = go(tmp_path, [Step("failing", python(code.format(1)), 20, goes_on=True)])
    assert found["failing"].result == "failed (1)"


def test_a_summary_that_fails_takes_no_results_with_it(tmp_path):
    go(tmp_path, [Step("good", python("print('here')"), 20)], summarise=lambda outcomes: 1 / 0)
    assert "here" in archived(tmp_path / "out.tar.gz", "good.log")
    assert "ZeroDivisionError" in archived(tmp_path / "out.tar.gz", "summary.md")


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="not empty"):
        go(tmp_path, [Step("good", python("print()"), 20)])
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_run_resumes_on_its_own_device_only(tmp_path):
    go(tmp_path, [Step("good", python("print()"), 20)], label="cpu")
    with pytest.raises(SystemExit, match="'cpu'"):
        go(tmp_path, [Step("good", python("print()"), 20)], label="cuda", resume=True)


def test_the_archive_takes_both_ends_of_a_large_log(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.log").write_text("begin " + "x" * 2 * LARGEST + " end")
    pack(tmp_path / "out", tmp_path / "out.tar.gz")
    text = archived(tmp_path / "out.tar.gz", "x.log")
    assert text.startswith("begin ")
    assert text.endswith(" end")
    assert len(text) < LARGEST + 100


#: A run that is killed while its second step writes a row every 20 ms.
RUN = """
import sys
from pathlib import Path
from benchmarks.gpu.record import Row, append
from benchmarks.gpu.runner import Run, Step
out = Path(sys.argv[1])
write = '''
import time
from pathlib import Path
from benchmarks.gpu.record import Row, append
for i in range(400):
    append(Path({0!r}), Row(f"case {{i}}", "passed", time.time()))
    time.sleep(0.02)
'''.format(str(out / "rows.jsonl"))
python = lambda code: [sys.executable, "-c", code]
phases = [[Step("first", python("print('begun')"), 20)], [Step("rows", python(write), 60)],
          [Step("last", python("print('ended')"), 20)]]
if "--short" in sys.argv:
    phases[1] = [Step("rows", python("print('no more rows')"), 60)]
run = Run(phases, out, out.with_suffix(".tar.gz"), deadline=60, grace=1,
          summarise=lambda o: "".join(f"{n}: {x.result}\\n" for n, x in o.items()),
          resume="--resume" in sys.argv)
run.go()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.0, 0.3, 1.0])
def test_a_kill_leaves_all_results_in_the_archive(tmp_path, number, after):
    out, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    command = [sys.executable, "-c", RUN, str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert "first: ok" in process.stdout.readline()
        time.sleep(after)
        killed = time.time()
        process.send_signal(number)
        process.wait(10)
    summary = archived(archive, "summary.md")
    results = dict(line.split(": ") for line in summary.splitlines())
    assert results.keys() == {"first", "rows", "last"}
    assert (results["first"], results["last"]) == ("ok", "not reached")
    have = set(re.findall(r"case \d+", archived(archive, "rows.jsonl") or ""))
    rows = record.read(out / "rows.jsonl").values()
    if number == signal.SIGTERM:  # the run stops its steps and packs again
        assert results["rows"] in ("interrupted", "not reached")
        assert have == {row.case for row in rows}
    else:  # a busy machine may pack late, but not by 2 s
        assert have >= {row.case for row in rows if row.seconds < killed - 2}
    time.sleep(0.2)
    written = len(rows)
    assert len(record.read(out / "rows.jsonl")) <= written + 15  # no child process continues

    subprocess.run([*command, "--resume", "--short"], cwd=ROOT, check=True, timeout=30)
    assert archived(archive, "summary.md") == "first: ok\nrows: ok\nlast: ok\n"
    assert archived(archive, "first.log").count("---") == 1  # not run again
    assert record.read(out / "rows.jsonl").keys() >= {row.case for row in rows}


def test_the_summary_shows_some_failures_of_each_step(tmp_path):
    for case in range(20):
        record.append(
            tmp_path / "smoke-match.jsonl", record.Row(f"case {case}", "failed", 0, "odd")
        )
    record.append(tmp_path / "tests-native-1.jsonl", record.Row("test_x", "started"))
    record.append(tmp_path / "tests-native-1.jsonl", record.Row("test_y", "passed"))
    (tmp_path / "graph.csv").write_text(
        "operator,case,rival,dtype,status,note\nmatch,sd-2,eager,bfloat16,failed,no memory\n"
    )
    lines = gpu_check.summary({"smoke-match": Outcome("failed (20)", 3.0)}, tmp_path, "cuda")
    assert "22 cases failed." in lines
    assert "- smoke-match: case 7: odd\n- smoke-match: and 12 more\n" in lines
    assert "- tests-native-1: test_x: it did not end\n" in lines
    assert "- graph: match sd-2 eager failed: no memory\n" in lines
    assert "test_y" not in lines


def test_a_library_for_the_cpu_is_none_for_a_gpu():
    assert library.reason("cpu") == ("" if _native.loaded else _native.reason)
    if _native.build_info().get("built") != "cuda":
        assert library.reason("cuda")


# ---- records ----


def test_a_record_that_was_cut_off_goes_on(tmp_path):
    path = tmp_path / "record.jsonl"
    rows = [record.Row("a", "started"), record.Row("a", "failed", 1.5, 'two\nlines, "quoted"')]
    for row in rows:
        record.append(path, row)
    assert record.read(path) == {"a": rows[1]}
    path.write_text(path.read_text() + '\n["b", "pas')
    record.append(path, record.Row("c", "passed"))
    assert record.read(path) == {"a": rows[1], "c": record.Row("c", "passed")}


def test_what_did_not_end_twice_is_passed_over(tmp_path):
    path = tmp_path / "record.jsonl"
    for case, result in (("a", "started"), ("a", "passed"), ("b", "started"), ("c", "started")):
        record.append(path, record.Row(case, result))
    assert record.settled(path) == {"a"}
    record.append(path, record.Row("b", "started"))
    assert record.settled(path) == {"a", "b"}
    record.append(path, record.Row("c", "started"))
    record.append(path, record.Row("c", "failed"))
    assert record.settled(path) == {"a", "b", "c"}
    assert record.settled(tmp_path / "none.jsonl") == set()


#: Options and profiles of ``tests/conftest.py``.
CONFTEST = """
from hypothesis import settings
settings.register_profile("quick")
def pytest_addoption(parser):
    for option in ("--backends", "--devices", "--share"):
        parser.addoption(option)
"""

TESTS = """
import pytest
each = pytest.mark.parametrize("device", ["cpu"])
@each
def test_passes(device): pass
@each
def test_poisons(device): raise RuntimeError("CUDA error: an illegal memory access")
@each
def test_fails(device): assert 1 == 2
@each
def test_is_skipped(device): pytest.skip("no")
@pytest.mark.parametrize("device", ["cuda"])
def test_is_of_another_device(device): pass
def test_is_of_the_host(): pass
"""


def suite_of(tests, folder):
    """A command that runs tests on the CPU and records their results."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--device", "cpu"]
    return [*command, "--record", str(folder / "record.jsonl"), str(folder / "test_some.py")]


def test_a_cuda_error_costs_a_test_and_no_name_is_lost(tmp_path):
    command, path = suite_of(TESTS, tmp_path), tmp_path / "record.jsonl"
    for code in (record.POISONED, 1, 1):  # all tests are done before the third start
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == code
    rows = {re.search(r"test_\w+\[", c)[0]: row for c, row in record.read(path).items()}
    assert {name: row.result for name, row in rows.items()} == {
        "test_passes[": "passed",
        "test_poisons[": "failed",
        "test_fails[": "failed",
        "test_is_skipped[": "skipped",
    }
    assert "illegal memory access" in rows["test_poisons["].message
    assert "1 == 2" in rows["test_fails["].message


def test_a_step_with_an_early_failure_is_not_ok(tmp_path):
    """A failure, a CUDA error, and a second start in which everything passes."""
    tests = (
        "import pytest\n"
        "@pytest.mark.parametrize('device', ['cpu'])\n"
        "@pytest.mark.parametrize('number', range(3))\n"
        "def test_it(number, device):\n"
        "    if number == 1: raise RuntimeError('CUDA error: misaligned address')\n"
        "    assert number > 0\n"
    )
    command = suite_of(tests, tmp_path)
    found = go(tmp_path, [Step("tests", command, 200, goes_on=True)], cwd=ROOT, deadline=300)
    assert found["tests"].result == "failed (1), 2 starts"
    results = [row.result for row in record.read(tmp_path / "record.jsonl").values()]
    assert results == ["failed", "failed", "passed"]


def rehearse(path):
    command = ["--rehearse", "--threads", "1", "--op", "merge", "--rivals", "eager", "--resume"]
    return measure.main([*command, "--dtype", "float32", "--out", str(path)])


def test_a_benchmark_case_that_raises_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    plain = measure.run_case

    def fail_at(name, error):
        def run_case(case, *arguments):
            if case.name == name:
                raise error
            return plain(case, *arguments)

        monkeypatch.setattr(measure, "run_case", run_case)

    rates = machine.Ceilings({"float32": 100.0}, "torch.mm", {"float32": 100.0})
    monkeypatch.setattr(machine, "ceilings", lambda *arguments: rates)
    path = tmp_path / "times.csv"
    fail_at("sd-2", ValueError("odd"))
    assert rehearse(path) == 1
    status = {row["case"]: row["status"] for row in store.read(path) if row["rival"] == "tokenops"}
    assert status.pop("sd-2") == "failed"
    assert len(status) == 4
    assert set(status.values()) == {"ok"}
    assert "sd-2 float32: failed: ValueError: odd" in capsys.readouterr().out
    assert rehearse(path) == 1  # has them all, and the one that failed

    path.unlink()
    fail_at("sd-16", RuntimeError("CUDA error: misaligned address"))
    with pytest.raises(SystemExit) as ended:
        rehearse(path)
    assert ended.value.code == record.POISONED
    assert rehearse(path) == 1  # goes on after it
    assert len({row["case"] for row in store.read(path)}) == 5


# ---- bars ----


def test_bars_are_shares_of_the_ceilings():
    work = bars.Work(bytes=148e6, flops=1e9)
    bar = bars.within("merge", 40.0, work, 0.8, bars.H200)
    assert bar.by == "80% of copy rate"
    assert bar.limit(bars.H200) == pytest.approx(148e6 / 4.3e12 / 0.8 * 1e6)
    assert bar.limit(bars.H100) == pytest.approx(bar.limit(bars.H200) * 4.3 / 3.0)
    assert (bar.verdict(bars.H100), bar.verdict(bars.H200)) == ("reached", "reached")
    slower = bars.within("merge", 50.0, work, 0.8, bars.H200)
    assert (slower.verdict(bars.H100), slower.verdict(bars.H200)) == ("reached", "MISSED")
    assert bars.within("merge", float("nan"), work, 0.8, bars.H200).verdict(bars.H200) == ""
    least = bars.times("match", 3.9, 4, "eager")
    assert least.verdict(bars.H100) == "MISSED"


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (bars.Work(1e9, 1e9, 1e6), "copy rate"),
        (bars.Work(1e6, 1e12, 1e6), "matmul rate"),
        (bars.Work(1e6, 1e9, 1e10), "exp rate"),
        (bars.Work(1e6, 1e8, 1e6), "launch"),
    ],
)
def test_floors(work, name):
    assert work.floor(bars.H200)[1] == name


def write_times(path, rows):
    columns = ("operator", "case", "rival", "dtype", "median_us", "bytes", "flops", "shape")
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    lines = [",".join(columns), *(",".join(row.values()) for row in table)]
    path.write_text("\n".join(lines) + "\n")


def test_the_table_says_what_was_reached(tmp_path):
    ceilings = {"name": "H100", "bytes": 3e12, "flops": 8e14, "exps": 4.2e12, "launch": 2.5e-6}
    (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
    bf16, sizes = "bfloat16", "B256 H12 N197 D64 soft"
    write_times(
        tmp_path / "graph-matching.csv",
        [
            ("match", "vit-b-256", "tokenops", bf16, "6", "6500000", "300000000", "B256 N197"),
            ("match", "vit-b-256", "eager", bf16, "18", "", "", ""),
            ("match", "vit-b-256", "tokenops", "float32", "99", "1", "1", "B256 N197"),
        ],
    )
    write_times(
        tmp_path / "events-attention.csv",
        [("policy_attention", "vit-b-256", "tokenops", bf16, "200", "310e6", "30e9", sizes)],
    )
    lines = bars.table(tmp_path).splitlines()
    row = "| match vit-b-256, us | 6 | <= 8 | 31% of launch | 8 / 8 | reached |"
    assert row in lines
    row = "| match vit-b-256, eager / ours | 3 | >= 4 | eager, same run | 4 / 4 | MISSED |"
    assert row in lines
    row = "| 200 | <= 172 | 60% of copy rate | 172 / 120 | MISSED |"
    assert f"| policy_attention vit-b-256, us {row}" in lines
    assert any("match vit-l-512-32, us | not measured" in line for line in lines)


@pytest.mark.parametrize(("heads", "number"), [("H28", 28), ("H28/4", 28)])
def test_exponentials_of_attention(tmp_path, heads, number):
    for operator, passes in (("policy_attention", 1), ("policy_attention_forward_backward", 2)):
        row = (operator, "vit-b-256", "tokenops", "bfloat16", "9", "8", "7", f"B3 {heads} N5 D4")
        write_times(tmp_path / "times.csv", [row])
        work = bars.Table(tmp_path / "times.csv").work(operator, "vit-b-256")
        assert work == bars.Work(8, 7, 3 * number * 25 * passes)


def test_bars_name_cases_that_exist(tmp_path):
    """A bar of a case that is never timed would never fail."""

    class Everything(bars.Table):
        def __init__(self):
            super().__init__()
            self.asked = set()

        def us(self, operator, case, rival="tokenops"):
            self.asked.add((operator, case, rival))
            return float(len(self.asked))

        def work(self, operator, case):
            self.asked.add((operator, case, "tokenops"))
            return bars.Work(*({"sd-16": (63e6,), "sd-2": (7e6,)}.get(case, (1e9,))))

    graph, events = Everything(), Everything()
    assert len([*bars.all_bars(graph, events, tmp_path, bars.H100)]) > 40
    for operator, case, _ in graph.asked | events.asked:
        assert find(operator, case).device == "cuda"
    assert not [operator for operator, *_ in graph.asked if operator.endswith("_backward")]


# ---- the steps ----


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_names_of_steps(tmp_path, kind):
    phases = steps.phases(steps.Plan(kind, tmp_path))
    names = [step.name for group in phases for step in group]
    assert len(set(names)) == len(names)
    assert {"machine", "library", "ceilings", "graph-models", "memcheck"} <= {*names}


def test_important_steps_end_before_the_deadline(tmp_path):
    """All but memory checks and slow compilers, even if each step takes its full time."""
    phases = steps.phases(steps.Plan("cuda", tmp_path))
    longest = [max(step.seconds for step in group) for group in phases]
    run = Run(phases, tmp_path / "out", tmp_path / "out.tar.gz", deadline=480, summarise=str)
    assert sum(longest[:-2]) <= run.end


def test_programs_take_the_arguments_of_their_steps(tmp_path, monkeypatch):
    """Also the programs of steps that need a GPU."""

    class ParsedError(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, arguments=None, namespace=None):
        parse(self, arguments, namespace)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    plan = steps.Plan("cuda", tmp_path, cache=tmp_path / "cache.tar.xz")
    for step in (step for group in steps.phases(plan) for step in group if "-m" in step.command):
        module, *arguments = step.command[step.command.index("-m") + 1 :]
        if module not in ("torch.utils.collect_env", "tokenops.info"):  # these have no arguments
            with pytest.raises(ParsedError):
                importlib.import_module(module).main(arguments)


# ---- the whole run ----


def copy_sources(target):
    """Copy the files that git does not ignore; without git, all files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # and not deleted since the last commit
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
    else:
        ignored = shutil.ignore_patterns("build", "*.so", "_build_info.json", ".*", "*.egg-info")
        shutil.copytree(ROOT, target, ignore=ignored)


@pytest.mark.slow
def test_rehearsal_from_a_bare_copy(tmp_path):
    """Without a library, compiler, tqdm or NumPy: killed, resumed, and finished in time."""
    copy, blocked = tmp_path / "copy", tmp_path / "blocked"
    copy_sources(copy)
    blocked.mkdir()
    for name in ("numpy", "tqdm"):
        (blocked / f"{name}.py").write_text("raise ModuleNotFoundError")
    deadline = 500
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--resume"]
    command += ["--deadline", str(deadline), "--out", str(tmp_path / "out")]
    command += ["--patience", "3"]  # the machine may be busy
    environment = {name: value for name, value in os.environ.items() if "TOKENOPS" not in name}
    environment.update(CXX="no-such-compiler", OMP_NUM_THREADS="1", PYTHONPATH=str(blocked))
    with subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any("] machine: ok" in line for line in process.stdout)
        process.kill()
    archive = tmp_path / "out.tar.gz"
    before = json.loads(archived(archive, "state.json"))["outcomes"]
    assert before["machine"]["result"] == "ok"
    assert before["ceilings"]["result"] == "not reached"

    start = time.monotonic()
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert time.monotonic() - start < deadline
    state = json.loads(archived(archive, "state.json"))["outcomes"]
    phases = steps.phases(steps.Plan("cpu", tmp_path))
    assert [*state] == [step.name for group in phases for step in group]
    assert done.returncode == sum(o["result"].startswith("failed") for o in state.values())
    summary = archived(archive, "summary.md")
    assert all(f"| {name} | {outcome['result']}" in summary for name, outcome in state.items())
    assert {o["result"] for o in state.values()} <= {
        "ok",
        "left out: it needs a GPU",
        "left out: no archive was named",
        *(
            o["result"]
            for n, o in state.items()
            if n in ("library", "smoke-native", "tests-native")
        ),
    }
    assert "no C++ compiler" in state["library"]["result"]
    assert "no compiled library" in state["tests-native"]["result"]
    assert "no compiled library" in state["smoke-native"]["result"]
    assert "No case failed so far." in summary
    missing = [line for line in summary.splitlines() if "not measured" in line]
    # Kernels are counted on a GPU. Times of tiny sizes may have a negative difference.
    assert [line for line in missing if " backward, sdpa" not in line] == [
        "| kernels of a ToMe layer's token work | not measured | | one each | | |"
    ]
    assert archived(archive, "machine.log").count("---") == 1
    assert gpu_check.failures(tmp_path / "out") == {}
