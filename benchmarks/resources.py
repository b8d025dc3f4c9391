# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels take of a GPU, compiled here for ones that need not be there.

``python -m benchmarks.resources`` prints a table, ``--check`` compares it with the budget of the
installed version of Triton, such as ``results/triton-3.7.1.csv``, and ``--write`` makes that file
anew. Registers, stack and shared memory are ptxas's own figures; spills are counted in the machine
code.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from tokenops._triton.launch import VERSION

from . import launches
from .ahead_of_time import compile_launch, record, resources, source

ARCHS = ("sm_80", "sm_90", "sm_100")
RESULTS = Path(__file__).parent / "results"
BUDGET = RESULTS / f"triton-{VERSION}.csv"
COLUMNS = ("case", "kernel", "arch", "tile", "registers", "stack", "spills", "shared")

#: Shared memory in bytes that a program can have.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """A launch of a case, by its number, for a device of a kind."""

    case: str
    number: int
    arch: str
    kernel: str
    tile: str


def jobs(archs: Iterable[str] = ARCHS, only: str = "") -> list[Job]:
    """What there is to compile; of launches that compile to the same code, the first."""
    found: dict[str, Job] = {}
    for arch in archs:
        for case, call in launches.cases().items():
            with record(arch) as recorded:
                call()
            for number, item in enumerate(recorded):
                kernel, tile = item.launch.kernel.__name__, item.launch.settings
                words = f"{tile.block_m}x{tile.block_n} {tile.num_warps}w {tile.num_stages}s"
                variant = f"{arch} {kernel} {source(item)}"
                found.setdefault(variant, Job(case, number, arch, kernel, words))
    return [job for job in found.values() if only in job.case]


def choice(what: list[Job], budget: list[Row]) -> list[Job]:
    """Of all launches of a kernel with one tile, the one that takes the most registers."""
    registers = {key(row): int(row["registers"]) for row in budget}
    found: dict[tuple[str, str, str], Job] = {}
    for job in sorted(what, key=lambda j: registers.get((j.case, j.kernel, j.arch), 256)):
        found[job.arch, job.kernel, job.tile] = job
    return list(found.values())


def measure(job: Job) -> Row:
    """Compile a launch and describe the result."""
    with record(job.arch) as recorded:
        launches.cases()[job.case]()
    item = recorded[job.number]
    used = resources(compile_launch(item, job.arch))
    return {
        "case": job.case,
        "kernel": job.kernel,
        "arch": job.arch,
        "tile": job.tile,
        "registers": str(used.registers),
        "stack": str(used.stack),
        "spills": str(used.spills),
        "shared": str(used.shared),
    }


def measure_all(what: list[Job], workers: int = 2) -> list[Row]:
    """Compile launches, in several processes."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(measure, what), total=len(what), mininterval=30, file=sys.stderr))


def excesses(rows: list[Row], budget: list[Row]) -> list[str]:
    """What rows use beyond the budget or a device, and rows that the budget does not know."""
    allowed: dict[tuple[str, ...], list[Row]] = {}
    for row in budget:  # a case may launch a kernel more than once
        allowed.setdefault(key(row), []).append(row)
    wrong = []
    for row in rows:
        limits = {"stack": 0, "spills": 0, "shared": SHARED[row["arch"]]}
        budgeted = allowed.get(key(row))
        if budgeted is None:
            wrong.append(f"{' '.join(key(row))}: not in the budget")
        else:
            limits["registers"] = max(int(b["registers"]) for b in budgeted)
            limits["shared"] = min(limits["shared"], max(int(b["shared"]) for b in budgeted))
        wrong += [
            f"{' '.join(key(row))}: {row[what]} {what}, at most {limit} allowed"
            for what, limit in limits.items()
            if int(row[what]) > limit
        ]
    return wrong


def key(row: Row) -> tuple[str, ...]:
    """What names a row."""
    return row["case"], row["kernel"], row["arch"]


def read_budget(path: Path | None = None) -> list[Row]:
    """The rows of a committed file, else of the installed version's; none where there is none."""
    path = path or BUDGET
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def no_budget(archs: Iterable[str]) -> str | None:
    """Say that the installed version has no budget for one of these architectures, if so."""
    missing = sorted(set(archs) - {row["arch"] for row in read_budget()})
    if not missing:
        return None
    return f"there is no budget of Triton {VERSION} for {', '.join(missing)}"


def write_budget(rows: list[Row], archs: Iterable[str], only: str) -> None:
    """Put rows in the place of those of the same architectures and cases."""
    known = launches.cases()
    kept = [
        row
        for row in read_budget()
        if row["case"] in known and (row["arch"] not in archs or only not in row["case"])
    ]
    order = {case: place for place, case in enumerate(known)}
    rows = sorted([*kept, *rows], key=lambda r: (ARCHS.index(r["arch"]), order[r["case"]]))
    with BUDGET.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="compare with the budget")
    text = "make the budget anew, or the part of it that --arch and --only choose"
    parser.add_argument("--write", action="store_true", help=text)
    options = parser.parse_args(arguments)
    missing = no_budget(options.arch)
    if options.check and missing is not None:
        print(f"{missing}; --write makes it", file=sys.stderr)
        return 1
    rows = measure_all(jobs(options.arch, options.only), options.workers)
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(row[c].ljust(widths[c]) for c in COLUMNS).rstrip())
    if options.write:
        write_budget(rows, options.arch, options.only)
    wrong = excesses(rows, read_budget() if options.check else rows)
    print("\n".join(wrong))
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
