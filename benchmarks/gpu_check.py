# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can show, in one go: ``python -m benchmarks.gpu_check``.

Builds the native library, runs the tests with CUDA tensors on every backend, runs small shapes
under compute-sanitizer, counts launches, times every operator against its rivals with and without
CUDA graphs, and closes with a summary. Stops after eight minutes; nothing is downloaded or
installed. Logs, CSV files and the summary are in the folder that ``--out`` names.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Row = dict[str, str]


@dataclass(frozen=True)
class Step:
    """A command with what it needs.

    Attributes:
        name: Names its log.
        command: Program and arguments.
        seconds: Time after which it is stopped.
        environment: Variables on top of those of the process.
    """

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    result: str  # "ok", "failed (code)", "stopped after its time", "left out: ..."
    seconds: float
    last: str  # line of its log


def run(steps: list[Step], out: Path) -> list[Outcome]:
    """Run steps side by side, each with a log of its own."""
    start = time.monotonic()
    running = []
    outcomes = []
    for step in steps:
        if shutil.which(step.command[0]) is None:
            outcomes.append(Outcome(step.name, f"left out: no {step.command[0]} here", 0.0, ""))
            continue
        with (out / f"{step.name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                step.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                start_new_session=True,  # so that all that it starts can be stopped with it
            )
        running.append((step, process))
    for step, process in running:
        try:
            code = process.wait(max(0.0, start + step.seconds - time.monotonic()))
            result = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = "stopped after its time"
        text = (out / f"{step.name}.log").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        seconds = time.monotonic() - start
        outcomes.append(Outcome(step.name, result, seconds, lines[-1] if lines else ""))
    return outcomes


def phases(out: Path, scale: float = 1.0) -> list[list[Step]]:
    """What to run, one phase after the other; the steps of a phase run side by side.

    Args:
        out: Folder for results.
        scale: Factor for all limits of time.
    """
    python = sys.executable
    on_cuda = {"TOKENOPS_TEST_DEVICES": "cuda", "HYPOTHESIS_PROFILE": "quick"}
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", str(min(8, os.cpu_count() or 1))]
    smoke = [python, "-m", "benchmarks.smoke", "--device", "cuda", "--dtype"]
    fresh = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor a block that has bounds
    bench = [python, "-m", "benchmarks.run", "--device", "cuda", "--no-memory", "--samples", "20"]
    bench += ["--dtype", "bfloat16", "--budget", "1", "--out"]

    def checked(tool: str, name: str = "", *, arguments: tuple[str, ...] = ()) -> Step:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        # PyTorch's own kernels leave padding unwritten; what counts are reads by ours.
        command += (
            ["--kernel-name-exclude", "kernel_substring=2at6native"] if tool == "initcheck" else []
        )
        return Step(name or tool, [*command, *smoke, "float16", *arguments], 140 * scale, fresh)

    # Where the compiled library serves these, Triton's kernels are checked besides.
    in_triton = "--backend", "triton", "--only", "match", "merging"

    one_each = [
        "vit-b-256",
        "sd-2",
        "vit-b-256-class",
    ]  # a case of each operator: compiling is slow
    return [
        [
            Step("nvidia-smi", ["nvidia-smi"], 30 * scale),
            Step(
                "build",
                [python, "setup.py", "--quiet", "build_ext", "--inplace"],
                80 * scale,
                _for_this_device(),
            ),
        ],
        [Step("info", [python, "-m", "tokenops.info"], 10 * scale)],
        [Step("smoke", [*smoke, "float32", "float16", "bfloat16"], 40 * scale)],
        [
            Step("tests", tests, 140 * scale, on_cuda),
            *map(checked, ("memcheck", "racecheck", "initcheck")),
            checked("memcheck", "memcheck-triton", arguments=in_triton),
            checked("racecheck", "racecheck-triton", arguments=in_triton),
        ],
        [Step("launches", [python, "-m", "benchmarks.count_launches"], 20 * scale)],
        # Fails where one image of ViT-B/16 takes longer with merged tokens than without.
        [Step("vit", [python, "-m", "benchmarks.vit"], 20 * scale)],
        [
            Step(
                "graph",
                [
                    *bench,
                    str(out / "cuda-graph.csv"),
                    "--cuda-graph",
                    "--rivals",
                    "eager",
                    "triton",
                ],
                55 * scale,
            )
        ],
        [
            Step(
                "events",
                [*bench, str(out / "cuda.csv"), "--rivals", "eager", "sdpa+bias"],
                60 * scale,
            )
        ],
        [
            Step(
                "compiled",
                [
                    *bench,
                    str(out / "cuda-compiled.csv"),
                    "--case",
                    *one_each,
                    "--rivals",
                    "compile",
                    "flex",
                ],
                55 * scale,
            )
        ],
    ]


def _for_this_device() -> dict[str, str]:
    """What makes a build compile CUDA kernels for the device at hand alone."""
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"TOKENOPS_CUDA_ARCHS": f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")}


# ---- bars on an H200 ----


class Table:
    """Rows of a CSV file by operator, case and rival, in bfloat16."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[tuple[str, str, str], Row] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["dtype"] == "bfloat16":
                        self.rows[row["operator"], row["case"], row["rival"]] = row

    def us(self, operator: str, case: str, rival: str = "tokenops") -> float:
        """Median in microseconds; NaN where nothing was measured."""
        return self._number(operator, case, rival, "median_us")

    def times(self, operator: str, case: str, rival: str) -> float:
        """How many times as long a rival takes."""
        return self.us(operator, case, rival) / self.us(operator, case)

    def share(self, operator: str, case: str) -> float:
        """Bound by bytes or operations, over the time."""
        return self._number(operator, case, "tokenops", "bound_share")

    def _number(self, operator: str, case: str, rival: str, column: str) -> float:
        text = self.rows.get((operator, case, rival), {}).get(column, "")
        return float(text) if text else float("nan")


STEP = "policy_attention_forward_backward"
MERGES = ("merge", "merge_wavg", "unmerge", "merge_backward", "unmerge_backward")


def bars(graph: Table, events: Table) -> list[tuple[str, float, str, float]]:
    """What is to be reached: description, measured, relation, limit."""

    def backward(rival: str, case: str) -> float:
        forward = events.us("policy_attention", case, rival)
        return events.us(STEP, case, rival) - forward

    found: list[tuple[str, float, str, float]] = []
    for case in ("vit-b-256", "vit-l-512-32"):
        found.append((f"match {case}, graph, us", graph.us("match", case), "<=", 8))
        found.append((f"match {case}, eager / ours", graph.times("match", case, "eager"), ">=", 4))
    for case in ("n16384-320", "n16384-640"):
        found.append(
            (f"match {case}, share of matmul rate", graph.share("match", case), ">=", 0.45)
        )
        times = graph.times("match", case, "bmm+max")
        found.append((f"match {case}, (bmm + max) / ours", times, ">=", 1.3))
    for operator in MERGES:
        for case in ("vit-b-256", "vit-l-512-32"):
            share = events.share(operator, case)
            found.append((f"{operator} {case}, share of copy rate", share, ">=", 0.8))
            times = events.times(operator, case, "eager")
            found.append((f"{operator} {case}, eager / ours", times, ">=", 3.5))
    name = "policy_attention"
    found.append((f"{name} vit-b-256, us", events.us(name, "vit-b-256"), "<=", 120))
    found.append((f"{name} backward vit-b-256, us", backward("tokenops", "vit-b-256"), "<=", 290))
    for case in ("vit-l-512-32", "vlm-2880"):
        times = events.times(name, case, "sdpa")
        found.append((f"{name} {case}, SDPA / ours", times, ">=", 0.8))
        times = backward("sdpa", case) / backward("tokenops", case)
        found.append((f"{name} backward {case}, SDPA / ours", times, ">=", 0.7))
    times = events.times(name, "vit-b-256", "eager")
    found.append((f"{name} vit-b-256, eager / ours", times, ">=", 10))
    for case in ("vit-b-256-size", "vit-l-512-32-size"):
        times = events.times(name, case, "unweighted")
        found.append((f"{name} {case}, unweighted / ours", times, ">=", 0.9))
        times = events.times(name, case, "sdpa+bias")
        found.append((f"{name} {case}, (SDPA + bias) / ours", times, ">=", 1.5))
    return found


def summary(outcomes: list[Outcome], out: Path) -> str:
    """Tables of what ran and of what was reached."""
    lines = ["| step | result | s | last line |", "| --- | --- | --- | --- |"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.0f} | {o.last[:110]} |" for o in outcomes]
    lines += ["", "| bar (bfloat16) | measured | asked | |", "| --- | --- | --- | --- |"]
    compare: dict[str, Callable[[float, float], bool]] = {
        "<=": lambda a, b: a <= b,
        ">=": lambda a, b: a >= b,
    }
    for text, value, relation, limit in bars(
        Table(out / "cuda-graph.csv"), Table(out / "cuda.csv")
    ):
        if value != value:
            lines.append(f"| {text} | not measured | {relation} {limit:g} | |")
            continue
        verdict = "reached" if compare[relation](value, limit) else "MISSED"
        lines.append(f"| {text} | {value:.3g} | {relation} {limit:g} | {verdict} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run all phases; the result counts the steps that did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--only", nargs="+", default=[], help="names of steps")
    parser.add_argument("--patience", type=float, default=1.0, help="factor for limits of time")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_check: torch sees no CUDA device")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for steps in phases(options.out, options.patience):
        chosen = [s for s in steps if not options.only or s.name in options.only]
        for outcome in run(chosen, options.out):
            print(f"{outcome.name}: {outcome.result} ({outcome.seconds:.0f} s) {outcome.last}")
            outcomes.append(outcome)
    text = summary(outcomes, options.out)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return sum(not o.result.startswith(("ok", "left out")) for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())
