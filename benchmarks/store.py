# SPDX-License-Identifier: Apache-2.0
"""CSV files: results, a row per rival of a case and a file per kind of device; and budgets.

Measuring needs no pandas: it also runs where nothing can be installed (``make gpu-check``).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]

RESULTS = Path(__file__).resolve().parent / "results"
#: Files of results by kind of device. Beside them, cuda.csv is the budget of compiled kernels.
FILES = {"cpu": "cpu.csv", "cuda": "gpu.csv"}

#: Columns. Times are of one call, in microseconds; a ratio is over the median of tokenops.
COLUMNS = (
    # ``rival`` is tokenops, a rival or a yardstick. A note says why it is skipped or failed;
    # ``differs``: its result is not that of tokenops.
    *("operator", "case", "shape", "dtype", "rival", "status", "note"),
    *("median_us", "p20_us", "p80_us", "best_us", "ratio"),
    # ``clean`` samples are undisturbed; statistics are over these, or over all if few are clean.
    *("samples", "clean", "statistics", "calls_per_sample", "faults_per_call"),
    # From the result of tokenops: of match the loss of mean similarity, else relative.
    "difference",
    "extra_mb",  # peak memory beyond the inputs, outputs included, in 10^6 bytes
    # Least work; the best rate of a copy of as many bytes, read and written; peak rates; and the
    # larger of bytes / copy_gbps and flops / peak_gflops, as a share of the median too.
    *("bytes", "flops", "copy_gbps", "peak_gflops", "peak_source", "mm_gflops"),
    *("bound_us", "bound_by", "bound_share"),
    # Backend that serves tokenops, and the instruction set of the compiled library. ``level``:
    # widest vector extension, or compute capability. ``malloc``: tuned, if large tensors reuse
    # memory, or fresh pages. ``mode``: full or quick, whose figures are not for quoting.
    *("backend", "isa", "device", "hardware", "cores", "level", "threads", "timer", "malloc"),
    *("mode", "torch", "python", "tokenops", "date"),
)

#: A run of a case replaces the rows that agree with it in these columns.
KEY = ("device", "operator", "case", "dtype", "threads", "timer")


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def read(path: Path) -> list[Row]:
    """All rows of a file; an empty list if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], columns: tuple[str, ...]) -> None:
    """Replace a file; a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, in place of earlier rows of their cases and of cases that are gone."""
    from .registry import all_cases  # it needs torch, and reading does not

    def key(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in KEY)

    fresh = list(rows)
    replaced = {key(row) for row in fresh}
    order = {(c.operator, c.name): i for i, c in enumerate(all_cases())}

    def position(row: Row) -> tuple[int, str, str, bool]:
        # float32 before bfloat16; the sort is stable: rivals stay in the order of their run
        case = order[row["operator"], row["case"]]
        return case, row["threads"], row["timer"], row["dtype"] != "float32"

    kept = [
        row
        for row in read(path)
        if (row["operator"], row["case"]) in order and key(row) not in replaced
    ]
    write(path, sorted(kept + fresh, key=position), COLUMNS)
