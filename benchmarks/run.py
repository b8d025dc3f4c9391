# SPDX-License-Identifier: Apache-2.0
"""Measure tokenops and its rivals: ``python -m benchmarks.run --help``.

All rivals of a case run in one process and in turns, in an order drawn anew each round, after a
warm-up that includes compilation and after a check that they compute the same thing. Figures are
medians over samples during which the system did not take the processor away. A case in which
tokenops itself fails gets a row that says so, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from typing_extensions import Self

from . import machine, memory, store
from .cases import DTYPES, RIVALS, YARDSTICKS, Case, Work
from .gpu.record import POISONED, is_cuda_error
from .registry import all_cases, operators, select
from .store import Row, number
from .timing import (
    QUICK,
    REHEARSAL,
    Call,
    CpuTimer,
    CudaTimer,
    Policy,
    Rival,
    Series,
    Timer,
    interleave,
)

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

Progress = Callable[[int, int], None]


class Lines:
    """What is used of tqdm, without a bar, where that is not installed."""

    n = 0.0

    def __init__(self, **options: object) -> None:
        """Takes the options of tqdm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the lines where they are."""

    def set_description(self, text: str) -> None:
        """Draws nothing."""

    def refresh(self) -> None:
        """Draws nothing."""

    @staticmethod
    def write(text: str, file: TextIO) -> None:
        """Print a line."""
        print(text, file=file, flush=True)


@dataclass(frozen=True)
class Settings:
    """What holds for all cases of a run."""

    device: torch.device
    threads: int
    rivals: tuple[str, ...]
    policy: Policy
    timer: Timer
    timer_name: str
    mode: str
    measure_memory: bool
    ceilings: machine.Ceilings
    environment: Row


def run_case(case: Case, dtype: str, settings: Settings, progress: Progress) -> list[Row]:
    """Measure one case in one dtype.

    Returns:
        A row per rival and yardstick.
    """
    work = case.prepare(DTYPES[dtype], settings.device)
    names = ["tokenops", *(n for n in (*settings.rivals, *YARDSTICKS) if n in work.rivals)]
    rows = {name: _new_row(case, dtype, name, work, settings) for name in names}
    if {"compile", "flex"} & work.rivals.keys() & {*settings.rivals}:
        torch.compiler.reset()  # each shape counts towards a limit of recompilations
    with torch.inference_mode(work.inference):
        ready = _make_ready(case, work, rows, settings)
        moved, ready["copy"] = _copy_rival(work, settings)
        rows["copy"] = _new_row(case, dtype, "copy", work, settings)
        series = interleave(ready, settings.timer, settings.policy, progress)
    _fill(rows, series, moved, work, dtype, settings)
    if settings.measure_memory:
        for name in case.memory:
            if name in rows:
                _add_memory(rows[name], case, dtype, settings)
    return list(rows.values())


def _named_row(case: Case, dtype: str, rival: str, settings: Settings) -> Row:
    row = dict.fromkeys(store.COLUMNS, "")
    row.update(settings.environment)
    row.update(
        operator=case.operator,
        case=case.name,
        shape=case.sizes,
        dtype=dtype,
        rival=rival,
        status="ok",
        threads=str(settings.threads),
        timer=settings.timer_name,
        mode=settings.mode,
    )
    return row


def _new_row(case: Case, dtype: str, rival: str, work: Work, settings: Settings) -> Row:
    row = _named_row(case, dtype, rival, settings)
    row.update(bytes=str(work.bytes), flops=str(work.flops))
    if rival == "tokenops":
        row["backend"] = machine.backend_of(case.public, work.tensor)
    return row


def failed_row(case: Case, dtype: str, settings: Settings, error: Exception) -> Row:
    """The row of a case in which tokenops itself failed."""
    row = _named_row(case, dtype, "tokenops", settings)
    row.update(status="failed", note=explain(error))
    return row


def _make_ready(
    case: Case, work: Work, rows: dict[str, Row], settings: Settings
) -> dict[str, Rival]:
    """Make, warm up and check the rivals; rows of those that cannot run say why."""
    ready: dict[str, Rival] = {}
    expected: Any = None
    for name, row in rows.items():
        reason = case.skip.get(name) or _obstacle(name, settings.device)
        if reason is not None:
            row.update(status="skipped", note=reason)
            continue
        try:
            rival = work.rivals[name]()
            with rival.context():
                result = _warm_up(rival.call, settings)
                rival = replace(rival, call=settings.timer.prepare(rival.call))
        except Exception as error:  # whatever a compiler may throw; tokenops itself must run
            if name == "tokenops":
                raise
            row.update(status="failed", note=explain(error))
            continue
        ready[name] = rival
        if name == "tokenops":
            expected = result
        elif name in RIVALS:
            difference = work.difference(name, result, expected)
            row["difference"] = f"{difference:.1e}"
            if not abs(difference) <= work.tolerance:  # NaN too
                row["status"] = "differs"
                row["note"] = f"tolerance {work.tolerance:g}"
    return ready


def _obstacle(rival: str, device: torch.device) -> str | None:
    if rival in ("compile", "flex") and device.type == "cpu" and machine.cxx() is None:
        return "torch.compile needs a C++ compiler and none was found (g++, clang++ or CXX)"
    return None


def explain(error: BaseException) -> str:
    """One line of an error, without the paths of the machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return re.sub(r"(?:/[^\s/:'\"]+)+/", "", text)[:200]


def _warm_up(call: Call, settings: Settings) -> Any:
    """Call at least three times and, after the first call that may compile, for a while."""
    result = call()
    end, calls = time.perf_counter() + settings.policy.warm_up, 1
    while calls < 3 or time.perf_counter() < end:
        result = call()
        calls += 1
        if settings.device.type == "cuda":
            torch.cuda.synchronize(settings.device)
    return result


def _copy_rival(work: Work, settings: Settings) -> tuple[int, Rival]:
    """A copy that reads and writes as many bytes as the case must, and that number."""
    count = max(1, work.bytes // 8)
    source = torch.ones(count, device=work.tensor.device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    _warm_up(copy, settings)
    return 8 * count, Rival(settings.timer.prepare(copy))


def _fill(
    rows: dict[str, Row],
    series: dict[str, Series],
    moved: int,
    work: Work,
    dtype: str,
    settings: Settings,
) -> None:
    """Turn samples into columns."""
    ours = series["tokenops"].seconds(0.5)
    # The best, as for the peak: a ceiling is what the machine can do, not what it did on average.
    copy_rate = moved / series["copy"].seconds(0.0)  # bytes per second
    peak = settings.ceilings.peak[dtype]
    by_memory, by_compute = work.bytes / copy_rate, work.flops / (peak * 1e9)
    bound = max(by_memory, by_compute)
    for name, row in rows.items():
        row.update(
            copy_gbps=number(copy_rate * 1e-9),
            peak_gflops=number(peak),
            peak_source=settings.ceilings.source,
            mm_gflops=number(settings.ceilings.mm[dtype]),
            bound_us=number(bound * 1e6),
            bound_by="compute" if by_compute > by_memory else "memory",
        )
        if name not in series:
            continue
        timed = series[name]
        median = timed.seconds(0.5)
        row.update(
            median_us=number(median * 1e6),
            p20_us=number(timed.seconds(0.2) * 1e6),
            p80_us=number(timed.seconds(0.8) * 1e6),
            best_us=number(timed.seconds(0.0) * 1e6),
            samples=str(len(timed.samples)),
            clean=str(timed.clean),
            statistics=timed.used,
            calls_per_sample=str(timed.calls),
            faults_per_call=number(timed.faults()),
        )
        if row["status"] == "ok":
            row["ratio"] = number(median / ours)
        if name not in YARDSTICKS:
            row["bound_share"] = number(bound / median, 3)


def _add_memory(row: Row, case: Case, dtype: str, settings: Settings) -> None:
    try:
        extra = memory.extra_bytes(case, row["rival"], dtype, settings.device, settings.threads)
    except (RuntimeError, OSError) as error:
        row["note"] = "; ".join(p for p in (row["note"], f"memory: {explain(error)}") if p)
    else:
        row["extra_mb"] = number(extra * 1e-6, 3)


def summary(rows: list[Row]) -> str:
    """One line about a case."""
    ours = rows[0]
    if ours["status"] == "failed":
        return f"{ours['operator']} {ours['case']} {ours['dtype']}: failed: {ours['note']}"
    words = [f"{ours['operator']} {ours['case']} {ours['dtype']}: {ours['median_us']} us"]
    words += [f"({ours['backend']}, {float(ours['bound_share']):.0%} of bound)"]
    for row in rows[1:]:
        words.append(f"{row['rival']} {row['ratio'] + 'x' if row['ratio'] else row['status']}")
    if any(row["statistics"] == "all" for row in rows):
        words.append(f"[disturbed: of tokenops, {ours['clean']} of {ours['samples']} clean]")
    return "  ".join(words)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure tokenops and its rivals, interleaved in one process.",
    )
    names = sorted({case.name for case in all_cases()})
    some: dict[str, Any] = {"nargs": "+", "default": []}
    text = f"operators or their folders, all by default: {', '.join(operators())}"
    p.add_argument("--op", choices=operators(), metavar="OP", help=text, **some)
    text = f"cases, all by default: {', '.join(names)}"
    p.add_argument("--case", choices=names, metavar="NAME", help=text, **some)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--rivals", nargs="*", choices=RIVALS[1:], default=list(RIVALS[1:]))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--cuda-graph", action="store_true", help="capture and replay; no backwards")
    p.add_argument("--threads", type=int, default=machine.cores(), help="threads of the CPU")
    p.add_argument("--samples", type=int, help="clean samples wanted of each rival")
    p.add_argument("--budget", type=float, help="seconds after which a case ends regardless")
    text = "few samples, no memory; to try things out (saved only with --out)"
    p.add_argument("--quick", action="store_true", help=text)
    p.add_argument("--no-memory", action="store_true", help="don't measure memory")
    p.add_argument("--out", type=Path, help="CSV file; benchmarks/results/DEVICE.csv by default")
    p.add_argument("--resume", action="store_true", help="leave out cases that the file has")
    text = "the cases of a GPU at sizes that take no time, to rehearse a run; needs --out"
    p.add_argument("--rehearse", action="store_true", help=text)
    p.add_argument("--list", action="store_true", help="print the cases and leave")
    return p


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Set threads, measure the ceilings, and gather what the run needs."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.run: --device cuda, but torch sees no CUDA device")
    policy = REHEARSAL if arguments.rehearse else QUICK if arguments.quick else Policy()
    if arguments.samples is not None:
        policy = replace(policy, samples=arguments.samples)
    if arguments.budget is not None:
        policy = replace(policy, budget=arguments.budget)
    graph = arguments.cuda_graph and device.type == "cuda"
    timer = CudaTimer(graph) if device.type == "cuda" else CpuTimer()
    timer_name = "wall clock" if device.type == "cpu" else "graph" if graph else "events"
    seconds = 0.2 if arguments.quick else min(2.0, max(0.05, policy.budget))
    return Settings(
        device=device,
        threads=arguments.threads,
        rivals=tuple(name for name in RIVALS[1:] if name in arguments.rivals),
        policy=policy,
        timer=timer,
        timer_name=timer_name,
        mode="quick" if arguments.quick or arguments.rehearse else "full",
        measure_memory=not (arguments.quick or arguments.no_memory),
        ceilings=machine.ceilings(device, arguments.threads, arguments.dtype, seconds),
        environment=machine.environment(device),
    )


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the command line names."""
    device = "cuda" if arguments.rehearse else arguments.device
    cases = select(arguments.op, arguments.case, device)
    if arguments.cuda_graph:  # autograd launches on the stream of the forward, not the captured one
        cases = [case for case in cases if not case.operator.endswith("_backward")]
    if not cases:
        raise SystemExit("benchmarks.run: no case of these operators has such a name")
    return [case.tiny() for case in cases] if arguments.rehearse else cases


def run_all(jobs: list[tuple[Case, str]], settings: Settings, out: Path | None) -> int:
    """Measure cases in their dtypes, one after the other.

    Returns:
        How many failed. After a CUDA error, which makes the process useless, it ends with
        :data:`POISONED`, and a second start with ``--resume`` goes on.
    """
    failures = 0
    gc.freeze()  # what is there already need not be looked through before each case
    with (tqdm or Lines)(total=len(jobs), unit="case", file=sys.stderr, disable=None) as bar:
        for done, (case, dtype) in enumerate(jobs):

            def progress(have: int, want: int, base: int = done) -> None:
                bar.n = base + have / want
                bar.refresh()

            bar.set_description(f"{case.operator} {case.name} {dtype}")
            poisoned = False
            try:
                rows = run_case(case, dtype, settings, progress)
            except Exception as error:  # the other cases have nothing to do with it
                rows = [failed_row(case, dtype, settings, error)]
                failures, poisoned = failures + 1, is_cuda_error(error)
            bar.n = done + 1
            bar.refresh()
            bar.write(summary(rows), file=sys.stdout)
            if out is not None:
                store.merge(out, rows)
            if poisoned:
                raise SystemExit(POISONED)
            if rows[0]["status"] == "failed" and settings.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()  # it may have failed for want of memory
    return failures


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        How many cases failed, those that ``--resume`` leaves out included; at most 64.
    """
    arguments = parser().parse_args(argv)
    cases = cases_of(arguments)
    if arguments.list:
        for case in cases:
            print(f"{case.operator:<33} {case.name:<20} {case.sizes}")
        return 0
    out = arguments.out
    if out is None and not (arguments.quick or arguments.rehearse):
        out = store.RESULTS / f"{arguments.device}.csv"
    settings = settings_of(arguments)
    for name in arguments.dtype:
        rates = settings.ceilings.peak[name], settings.ceilings.mm[name]
        print(f"{name}: peak {rates[0]:.0f} GFLOP/s ({settings.ceilings.source}), "
              f"torch.mm {rates[1]:.0f}")  # fmt: skip
    jobs = [(case, dtype) for case in cases for dtype in arguments.dtype]
    failures = 0
    if arguments.resume and out is not None:
        have = {(row["operator"], row["case"], row["dtype"]): row["status"]
                for row in store.read(out) if row["rival"] == "tokenops"}  # fmt: skip
        status = [have.get((c.operator, c.name, dtype)) for c, dtype in jobs]
        failures = status.count("failed")
        jobs = [job for job, known in zip(jobs, status, strict=True) if known is None]
    return min(64, failures + run_all(jobs, settings, out))


if __name__ == "__main__":
    machine.run_again_with_tuned_malloc("benchmarks.run", sys.argv[1:])
    sys.exit(main())
