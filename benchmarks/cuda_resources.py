# SPDX-License-Identifier: Apache-2.0
"""Resources of the compiled CUDA kernels, from the output of ptxas.

``make cuda`` compiles them, which needs nvcc but no GPU, and compares with the budget of nvcc 13.0
in ``results/cuda.csv``; ``make cuda ARGS=--write`` writes that file. No kernel may use a stack or
spill registers. Shared memory is the static part; most kernels ask for theirs at the launch. CUB's
own kernels are left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from . import budget, store
from .store import Row

BUDGET = store.RESULTS / "cuda.csv"

#: Largest library, in bytes.
LARGEST = 25 << 20

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def short(name: str) -> str:
    """Name of a kernel without parameters and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\([\w:]+\)(?=[\d-])|^void ", "", name)
    return re.sub(r"\b(tokenops|matching|merging|c10)::", "", name.partition("(")[0])


def parse(log: str) -> list[Row]:
    """Rows from the output of ``ptxas -v``, in the order of kernels and architectures."""
    demangle = subprocess.run(["c++filt"], input=log, check=True, capture_output=True, text=True)
    rows = [
        {
            "kernel": short(entry["name"]),
            "arch": entry["arch"],
            "registers": entry["registers"],
            "stack": entry["stack"],
            "spills": str(int(entry["stores"]) + int(entry["loads"])),
            "shared": entry["shared"] or "0",
        }
        for entry in _ENTRY.finditer(demangle.stdout)
        if "cub::" not in entry["name"]
    ]
    return sorted(rows, key=lambda row: (row["kernel"], int(re.sub(r"\D", "", row["arch"]))))


def missing(rows: list[Row], known: list[Row]) -> list[str]:
    """Rows of the budget that were not compiled."""
    left = dict.fromkeys(map(budget.key, known))
    for row in rows:
        left.pop(budget.key(row), None)
    return [f"{' '.join(key)}: not compiled" for key in left]


def main(arguments: list[str] | None = None) -> int:
    """Compare with the budget; returns 1 if a number is too large, or if nothing was compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_resources")
    parser.description = __doc__
    parser.add_argument("log", type=Path, help="ptxas.log of a build")
    parser.add_argument("library", type=Path, help="the library that was built")
    parser.add_argument("--write", action="store_true", help="write the budget")
    options = parser.parse_args(arguments)
    rows = parse(options.log.read_text(encoding="utf-8"))
    if options.write:
        store.write(BUDGET, rows, ("kernel", "arch", *budget.NUMBERS))
    size = options.library.stat().st_size
    known = store.read(BUDGET)
    wrong = budget.excesses(rows, known) + missing(rows, known)
    if size > LARGEST:
        wrong.append(f"the library has {size} bytes, at most {LARGEST} allowed")
    archs = sorted({row["arch"] for row in rows})
    print(f"{len(rows)} kernels for {', '.join(archs)}; {size / 2**20:.1f} MiB")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong) or not rows)


if __name__ == "__main__":
    sys.exit(main())
