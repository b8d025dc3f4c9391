# SPDX-License-Identifier: Apache-2.0
"""Resources of the Triton kernels on several GPUs, none of which has to be there.

``python -m benchmarks.resources`` prints a table, ``--check`` compares it with the budget of the
installed version of Triton, such as ``results/triton-3.7.1.csv``, and ``--write`` writes that file.
Registers, stack and shared memory are ptxas's own figures; spills are counted in the machine code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from tqdm import tqdm

from tokenops._triton.launch import VERSION

from . import budget, launches, store
from .ahead_of_time import compile_launch, record, resources, source
from .store import RESULTS, Row

ARCHS = ("sm_80", "sm_90", "sm_100")
BUDGET = RESULTS / f"triton-{VERSION}.csv"
NAMES = ("case", "kernel", "arch", "tile")

#: Most shared memory of a program, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


class Job(NamedTuple):
    """A launch to compile: the ``number``-th one of a case, for an architecture."""

    case: str
    kernel: str
    arch: str
    tile: str
    number: int


def jobs(archs: Iterable[str] = ARCHS, only: str = "") -> list[Job]:
    """Launches to compile; the first of those that compile to the same code."""
    found: dict[str, Job] = {}
    for arch in archs:
        for case, call in launches.cases().items():
            with record(arch) as recorded:
                call()
            for number, item in enumerate(recorded):
                kernel, s = item.launch.kernel.__name__, item.launch.settings
                tile = f"{s.block_m}x{s.block_n} {s.num_warps}w {s.num_stages}s"
                code = f"{arch} {kernel} {source(item)}"
                found.setdefault(code, Job(case, kernel, arch, tile, number))
    return [job for job in found.values() if only in job.case]


def measure(job: Job) -> Row:
    with record(job.arch) as recorded:
        launches.cases()[job.case]()
    used = resources(compile_launch(recorded[job.number], job.arch))._asdict()
    names = {name: getattr(job, name) for name in NAMES}
    return names | {name: str(value) for name, value in used.items()}


def measure_all(some: list[Job]) -> list[Row]:
    """Compile launches in a process for each core."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(measure, some), total=len(some), mininterval=30, file=sys.stderr))


def no_budget(archs: Iterable[str]) -> str | None:
    """Which of these architectures the budget of the installed Triton lacks, if any."""
    missing = sorted(set(archs) - {row["arch"] for row in store.read(BUDGET)})
    return f"there is no budget of Triton {VERSION} for {', '.join(missing)}" if missing else None


def write_budget(rows: list[Row], archs: Iterable[str], only: str) -> None:
    """Replace the rows of these architectures and cases in the budget."""
    order = {case: index for index, case in enumerate(launches.cases())}
    kept = [
        row
        for row in store.read(BUDGET)
        if row["case"] in order and (row["arch"] not in archs or only not in row["case"])
    ]
    rows = sorted([*kept, *rows], key=lambda row: (ARCHS.index(row["arch"]), order[row["case"]]))
    store.write(BUDGET, rows, (*NAMES, *budget.NUMBERS))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns 1 if a number is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--check", action="store_true", help="compare with the budget")
    text = "write the budget, or the part of it that --arch and --only select"
    parser.add_argument("--write", action="store_true", help=text)
    options = parser.parse_args(arguments)
    missing = no_budget(options.arch)
    if options.check and missing is not None:
        print(f"{missing}; --write makes it", file=sys.stderr)
        return 1
    rows = measure_all(jobs(options.arch, options.only))
    columns = (*NAMES, *budget.NUMBERS)
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(row[c].ljust(widths[c]) for c in columns).rstrip())
    if options.write:
        write_budget(rows, options.arch, options.only)
    wrong = budget.excesses(rows, store.read(BUDGET) if options.check else rows, SHARED)
    print("\n".join(wrong))
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
