# SPDX-License-Identifier: Apache-2.0
"""Measure tokenops and its rivals: ``python -m benchmarks.measure --help``.

All rivals of a case run in one process and in turns, in an order drawn anew each round, after a
warm-up that includes compilation and after a check that they compute the same. Figures are medians
over undisturbed samples. If tokenops itself fails in a case, its row says so, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine, memory, store
from .cases import DTYPES, ON_REQUEST, RIVALS, YARDSTICKS, Case, Work, context
from .gpu.record import POISONED, is_cuda_error
from .registry import all_cases, operators, select
from .store import Row, number
from .timing import QUICK, REHEARSAL, TIMERS, Call, Policy, Sampler, Series, interleave

#: Environments by name in which slower code serves on the CPU. "avx2 machine" keeps PyTorch's
#: kernels below AVX-512 too, as a CPU without it does.
VARIANTS = {
    "no library": {"TOKENOPS_LIBRARY": "/nonexistent"},
    "portable": {"TOKENOPS_CPU_ISA": "portable"},
    "avx2": {"TOKENOPS_CPU_ISA": "avx2"},
    "avx2 machine": {
        "TOKENOPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "best": {},
}


class Settings(NamedTuple):
    rivals: tuple[str, ...]
    policy: Policy
    ceilings: machine.Ceilings
    common: Row  # columns that all rows share, the device and the timer among them
    measure_memory: bool = False


def run_case(case: Case, dtype: str, settings: Settings) -> list[Row]:
    """Measure one case in one dtype; return a row per rival and yardstick."""
    device, policy = torch.device(settings.common["device"]), settings.policy
    work = case.prepare(DTYPES[dtype], device)
    source = torch.ones(max(1, work.bytes // 8), device=device)  # to read and to write
    copy = partial(torch.empty_like(source).copy_, source)
    work.rivals = {**work.rivals, "copy": lambda: copy}
    backends = machine.backends_of(case.public, work.tensor)
    able = {*work.rivals, *(n for n in backends if n != backends[0] or n in ON_REQUEST)}
    wanted = ["tokenops", *(n for n in (*settings.rivals, *YARDSTICKS) if n in able)]
    rows = {name: new_row(case, dtype, name, settings.common) for name in wanted}
    rows["tokenops"]["backend"] = backends[0] if backends else ""
    with torch.inference_mode(work.inference):
        samplers = make_ready(case, work, rows, settings.common["timer"], policy)
        series = interleave(samplers, policy)
    fill(rows, series, work, settings.ceilings, dtype)
    for name in case.memory if settings.measure_memory else ():
        if name not in rows:
            continue
        try:
            extra = memory.extra_bytes(case, name, dtype)
            rows[name]["extra_mb"] = number(extra * 1e-6, 3)
        except (RuntimeError, OSError) as error:
            notes = rows[name]["note"], f"memory: {explain(error)}"
            rows[name]["note"] = "; ".join(filter(None, notes))
    return list(rows.values())


def new_row(case: Case, dtype: str, rival: str, common: Row) -> Row:
    row = {**dict.fromkeys(store.COLUMNS, ""), **common, "status": "ok", "rival": rival}
    row.update(operator=case.operator, case=case.name, shape=case.sizes, dtype=dtype)
    return row


def make_ready(
    case: Case, work: Work, rows: dict[str, Row], timer: str, policy: Policy
) -> dict[str, Sampler]:
    """Make, warm up and check the rivals that have rows; the row of a failed one says why."""
    if {"compile", "flex"} & rows.keys():
        torch.compiler.reset()  # each shape counts towards a limit of recompilations
    ready: dict[str, Sampler] = {}
    expected: Any = None
    for name, row in rows.items():
        reason = case.skip.get(name, "")
        if name in ("compile", "flex") and not work.tensor.is_cuda and machine.cxx() is None:
            reason = "torch.compile needs a C++ compiler and none was found (g++, clang++ or CXX)"
        if reason:
            row.update(status="skipped", note=reason)
            continue
        try:
            with context(name):
                call = work.make(name)
                result = _warm_up(call, policy, work.tensor.is_cuda)
                sampler = TIMERS[timer](call, policy.sample_seconds)
            ready[name] = partial(_sample, name, sampler)
        except Exception as error:  # a compiler may raise anything
            if name == "tokenops":
                raise
            row.update(status="failed", note=explain(error))
            continue
        if name == "tokenops":
            expected = result
        elif name in RIVALS:
            difference = work.difference(name, result, expected)
            row["difference"] = f"{difference:.1e}"
            if not abs(difference) <= work.tolerance:  # also if it is NaN
                row.update(status="differs", note=f"tolerance {work.tolerance:g}")
    return ready


def _sample(name: str, sampler: Sampler) -> Any:
    with context(name):
        return sampler()


def explain(error: BaseException) -> str:
    """One line of an error, without the paths of the machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return re.sub(r"(?:/[^\s/:'\"]+)+/", "", text)[:200]


def _warm_up(call: Call, policy: Policy, on_cuda: bool) -> Any:
    """Call at least three times and, after the first call that may compile, for a while."""
    result = call()
    end, calls = time.perf_counter() + policy.warm_up, 1
    while calls < 3 or time.perf_counter() < end:
        result = call()
        calls += 1
        if on_cuda:
            torch.cuda.synchronize()
    return result


def fill(
    rows: dict[str, Row],
    series: dict[str, Series],
    work: Work,
    ceilings: machine.Ceilings,
    dtype: str,
) -> None:
    # The best copy, as for the peak: a ceiling is a limit of the machine, not an average.
    copied = 8 * max(1, work.bytes // 8)
    copy_rate = copied / series["copy"].seconds(0.0)  # bytes per second
    by_memory, by_compute = work.bytes / copy_rate, work.flops / (ceilings.peak[dtype] * 1e9)
    bound = max(by_memory, by_compute)
    for name, row in rows.items():
        row.update(
            bytes=str(work.bytes),
            flops=str(work.flops),
            copy_gbps=number(copy_rate * 1e-9),
            peak_gflops=number(ceilings.peak[dtype]),
            peak_source=ceilings.source,
            mm_gflops=number(ceilings.mm[dtype]),
            bound_us=number(bound * 1e6),
            bound_by="compute" if by_compute > by_memory else "memory",
        )
        if name not in series:
            continue
        timed = series[name]
        for column, quantile in (("median", 0.5), ("p20", 0.2), ("p80", 0.8), ("best", 0.0)):
            row[f"{column}_us"] = number(timed.seconds(quantile) * 1e6)
        row.update(
            samples=str(len(timed.samples)),
            clean=str(timed.clean),
            statistics=timed.used,
            calls_per_sample=str(timed.samples[0].calls),
            faults_per_call=number(statistics.median(s.faults for s in timed.samples)),
        )
        if row["status"] == "ok":
            row["ratio"] = number(timed.seconds(0.5) / series["tokenops"].seconds(0.5))
        if name not in YARDSTICKS:
            row["bound_share"] = number(bound / timed.seconds(0.5), 3)


def is_below(rows: list[Row], bar: float) -> bool:
    """Whether the eager recipe takes less than ``bar`` times the time of tokenops."""
    return any(r["rival"] == "eager" and r["ratio"] and float(r["ratio"]) < bar for r in rows)


def summary(rows: list[Row]) -> str:
    ours = rows[0]
    name = f"{ours['operator']} {ours['case']} {ours['dtype']}"
    if ours["status"] == "failed":
        return f"{name}: failed: {ours['note']}"
    words = [f"{name}: {ours['median_us']} us"]
    words += [f"({ours['backend']}, {float(ours['bound_share']):.0%} of bound)"]
    words += [f"{r['rival']} {r['ratio'] + 'x' if r['ratio'] else r['status']}" for r in rows[1:]]
    if any(row["statistics"] == "all" for row in rows):
        words.append(f"[disturbed: of tokenops, {ours['clean']} of {ours['samples']} clean]")
    return "  ".join(words)


def add_choice(p: argparse.ArgumentParser) -> None:
    """Options that choose cases and the number of samples."""
    names = sorted({case.name for case in all_cases()})
    text = f"operators or families, by default all: {', '.join(operators())}"
    p.add_argument("--op", nargs="+", choices=operators(), default=[], metavar="OP", help=text)
    text = f"cases, by default all except the cases on request: {', '.join(names)}"
    p.add_argument("--case", nargs="+", choices=names, default=[], metavar="NAME", help=text)
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--cuda-graph", action="store_true", help="capture and replay; no backwards")
    p.add_argument("--threads", type=int, default=machine.cores(), help="threads of the CPU")
    p.add_argument("--samples", type=int, help="clean samples wanted of each rival")
    p.add_argument("--budget", type=float, help="seconds after which a case ends")
    text = "few samples, no memory; to try things out (saved only with --out)"
    p.add_argument("--quick", action="store_true", help=text)
    text = "the cases of a GPU at sizes that take no time, to rehearse a run"
    p.add_argument("--rehearse", action="store_true", help=text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__)
    add_choice(p)
    default = [name for name in RIVALS[1:] if name not in ON_REQUEST]
    text = f"by default all but {' and '.join(ON_REQUEST)}"
    p.add_argument("--rivals", nargs="*", choices=RIVALS[1:], default=default, help=text)
    text = "measure the code that serves there, in the cases on request (saved only with --out)"
    p.add_argument("--variant", choices=VARIANTS, help=text)
    text = "fail where the eager recipe takes less than FACTOR times our time"
    p.add_argument("--bar", type=float, default=0.0, metavar="FACTOR", help=text)
    p.add_argument("--no-memory", action="store_true", help="don't measure memory")
    p.add_argument("--out", type=Path, help="CSV file; cpu.csv or gpu.csv in benchmarks/results")
    p.add_argument("--resume", action="store_true", help="leave out cases that the file has")
    p.add_argument("--list", action="store_true", help="print the cases and leave")
    return p


def timing_of(options: argparse.Namespace) -> tuple[str, Policy]:
    policy = REHEARSAL if options.rehearse else QUICK if options.quick else Policy()
    for name in ("samples", "budget"):
        if getattr(options, name) is not None:
            policy = replace(policy, **{name: getattr(options, name)})
    if options.device == "cpu":
        return "wall clock", policy
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks: --device cuda, but torch sees no CUDA device")
    return "graph" if options.cuda_graph else "events", policy


def settings_of(options: argparse.Namespace) -> Settings:
    """Set threads, measure the ceilings, and gather the settings of the run."""
    torch.set_num_threads(options.threads)
    device, quick = torch.device(options.device), options.quick or options.rehearse
    timer, policy = timing_of(options)
    seconds = 0.2 if options.quick else min(2.0, max(0.05, policy.budget))
    mode = {"threads": str(options.threads), "timer": timer, "mode": "quick" if quick else "full"}
    return Settings(
        rivals=tuple(name for name in RIVALS[1:] if name in options.rivals),
        policy=policy,
        ceilings=machine.ceilings(device, options.dtype, seconds),
        common={**machine.environment(device), **mode},
        measure_memory=not (quick or options.no_memory),
    )


def cases_of(options: argparse.Namespace) -> list[Case]:
    device = "cuda" if options.rehearse else options.device
    on_request = getattr(options, "variant", None) is not None
    cases = select(options.op, options.case, device, on_request)
    if options.cuda_graph:  # autograd launches on the stream of the forward, not the captured one
        cases = [case for case in cases if not case.operator.endswith("_backward")]
    if not cases:
        raise SystemExit("benchmarks: no case of these operators has this name")
    return [case.tiny() for case in cases] if options.rehearse else cases


def main(argv: list[str] | None = None) -> int:
    """Measure the cases that the command line names, one after the other.

    Returns:
        How many cases failed or were below the bar, cases that ``--resume`` leaves out included; at
        most 64. After a CUDA error, which makes the process useless, the process ends with
        :data:`POISONED`, and a second start with ``--resume`` goes on.
    """
    options = parser().parse_args(argv)
    cases = cases_of(options)
    if options.list:
        for case in cases:
            print(f"{case.operator:<33} {case.name:<20} {case.sizes}")
        return 0
    out = options.out
    if out is None and not (options.quick or options.rehearse or options.variant):
        out = store.RESULTS / store.FILES[options.device]
    settings = settings_of(options)
    peak, source, mm = settings.ceilings
    for name in options.dtype:
        print(f"{name}: peak {peak[name]:.0f} GFLOP/s ({source}), torch.mm {mm[name]:.0f}")
    known = {}
    if options.resume and out is not None:
        ours = (row for row in store.read(out) if row["rival"] == "tokenops")
        known = {(row["operator"], row["case"], row["dtype"]): row["status"] for row in ours}
    failures = 0
    gc.freeze()  # objects that exist already need not be searched before each case
    for case, dtype in itertools.product(cases, options.dtype):
        status = known.get((case.operator, case.name, dtype))
        if status is not None:
            failures += status == "failed"
            continue
        poisoned = below = False
        try:
            rows = run_case(case, dtype, settings)
            below = is_below(rows, options.bar)
        except Exception as error:  # the other cases have nothing to do with it
            rows = [new_row(case, dtype, "tokenops", settings.common)]
            rows[0].update(status="failed", note=explain(error))
            poisoned = is_cuda_error(error)
        failed = rows[0]["status"] == "failed"
        failures += failed or below
        print(summary(rows) + ("  BELOW" if below else ""), flush=True)
        if out is not None:
            store.merge(out, rows)
        if poisoned:
            raise SystemExit(POISONED)
        if failed:
            gc.collect()
            torch.cuda.empty_cache()  # it may have run out of memory
    return min(64, failures)


if __name__ == "__main__":
    variables = VARIANTS.get(parser().parse_args().variant, {})
    machine.run_again({**machine.TUNED, **variables})
    sys.exit(main())
