# SPDX-License-Identifier: Apache-2.0
"""What the compiled CUDA kernels take of a GPU, as ptxas said when they were compiled.

``make cuda`` compiles them, which needs nvcc but no GPU, and compares with the budget that is kept
in ``results/cuda.csv``, of nvcc 13.0; ``make cuda ARGS=--write`` makes that file anew. No kernel
may use a stack or spill registers. Shared memory is what a kernel declares; most ask for theirs
when they are launched. CUB's own kernels are not among them.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

BUDGET = Path(__file__).parent / "results" / "cuda.csv"
COLUMNS = ("kernel", "arch", "registers", "stack", "spills", "shared")

#: Largest library, in bytes.
LARGEST = 25 << 20

Row = dict[str, str]

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def demangle(names: list[str]) -> dict[str, str]:
    """Kernels as they are called in C++, without their parameters and namespaces."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout
    short = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        full = re.sub(r"\(anonymous namespace\)::|\([\w:]+\)(?=[\d-])", "", full)
        full = re.sub(r"^void ", "", full).partition("(")[0]
        short[name] = re.sub(r"\b(tokenops|matching|merging|c10)::", "", full)
    return short


def parse(log: str) -> list[Row]:
    """Rows of what ptxas wrote with ``-v``, in the order of kernels and architectures."""
    found = [match.groupdict() for match in _ENTRY.finditer(log)]
    found = [entry for entry in found if "3cub" not in entry["name"]]
    names = demangle([entry["name"] for entry in found])
    rows = []
    for entry in found:
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        rows.append(
            {
                "kernel": names[entry["name"]],
                "arch": entry["arch"],
                "registers": entry["registers"],
                "stack": entry["stack"],
                "spills": str(int(entry["stores"]) + int(entry["loads"])),
                "shared": shared[1] if shared else "0",
            }
        )
    return sorted(rows, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["arch"]))))


def excesses(rows: list[Row], budget: list[Row]) -> list[str]:
    """What rows use beyond the budget, and rows that it does not know."""
    allowed = {(row["kernel"], row["arch"]): row for row in budget}
    wrong = []
    for row in rows:
        name = f"{row['kernel']} {row['arch']}"
        limits = {"stack": 0, "spills": 0}
        budgeted = allowed.get((row["kernel"], row["arch"]))
        if budgeted is None:
            wrong.append(f"{name}: not in the budget")
        else:
            limits |= {what: int(budgeted[what]) for what in ("registers", "shared")}
        wrong += [
            f"{name}: {row[what]} {what}, at most {limit} allowed"
            for what, limit in limits.items()
            if int(row[what]) > limit
        ]
    return wrong


def missing(rows: list[Row], budget: list[Row]) -> list[str]:
    """Rows of the budget that were not compiled."""
    there = {(row["kernel"], row["arch"]) for row in rows}
    known = [(row["kernel"], row["arch"]) for row in budget]
    return [f"{' '.join(key)}: not compiled" for key in known if key not in there]


def read_budget() -> list[Row]:
    """The rows of the committed file."""
    with BUDGET.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources")
    parser.description = __doc__
    parser.add_argument("log", type=Path, help="ptxas.log of a build")
    parser.add_argument("library", type=Path, help="the library that was built")
    parser.add_argument("--write", action="store_true", help="make the budget anew")
    options = parser.parse_args(arguments)
    rows = parse(options.log.read_text(encoding="utf-8"))
    if options.write:
        with BUDGET.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    size = options.library.stat().st_size
    budget = read_budget()
    wrong = excesses(rows, budget) + missing(rows, budget)
    if size > LARGEST:
        wrong.append(f"the library has {size} bytes, at most {LARGEST} allowed")
    archs = sorted({row["arch"] for row in rows})
    print(f"{len(rows)} kernels for {', '.join(archs)}; {size / 2**20:.1f} MiB")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong) or not rows)


if __name__ == "__main__":
    sys.exit(main())
