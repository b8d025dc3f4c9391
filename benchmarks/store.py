# SPDX-License-Identifier: Apache-2.0
"""The CSV files of results: one row per rival of a case, one file per kind of device.

Measuring needs no pandas: it also runs where nothing can be installed (``make gpu-check``).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]

RESULTS = Path(__file__).resolve().parent / "results"

#: Columns and their meanings. Times are of one call.
COLUMNS = {
    "operator": "operator, with _backward or _forward_backward appended for those",
    "case": "name of the case",
    "shape": "its sizes",
    "dtype": "type of the data",
    "rival": "tokenops, a rival or a yardstick",
    "status": "ok; skipped or failed (see note); differs: the result is not that of tokenops",
    "note": "reason of a skip or failure",
    "median_us": "median",
    "p20_us": "20th percentile",
    "p80_us": "80th percentile",
    "best_us": "fastest sample",
    "ratio": "median divided by the median of tokenops in the same run",
    "samples": "samples taken",
    "clean": "samples that nothing disturbed",
    "statistics": "samples behind the figures: clean, or all if too few are clean",
    "calls_per_sample": "calls that one sample timed together",
    "faults_per_call": "minor page faults, median",
    "difference": "from the result of tokenops; match: loss of mean similarity; else relative",
    "extra_mb": "peak memory beyond the inputs, outputs included, in 10^6 bytes",
    "bytes": "least number of bytes read and written",
    "flops": "least number of floating point operations",
    "copy_gbps": "best rate of a torch copy_ of as many bytes in the same run, read and written",
    "peak_gflops": "peak rate of the type, see peak_source",
    "peak_source": "fma probe: fused multiply-adds in registers; torch.mm: its best rate",
    "mm_gflops": "best rate of a large square torch.mm",
    "bound_us": "the larger of bytes / copy_gbps and flops / peak_gflops",
    "bound_by": "the larger one: memory or compute",
    "bound_share": "bound_us / median_us: 1 is as fast as the machine allows",
    "backend": "backend that serves tokenops",
    "isa": "instruction set of the compiled library",
    "device": "cpu or cuda",
    "hardware": "processor or graphics card",
    "cores": "processors of the process; multiprocessors of a card",
    "level": "widest vector extension of the processor; compute capability of a card",
    "threads": "threads used",
    "timer": "wall clock; on a device: events, or graph (within a CUDA graph)",
    "malloc": "tuned: large tensors reuse memory; fresh pages: each one page-faults",
    "mode": "full or quick; quick figures are not for quoting",
    "torch": "version",
    "python": "version",
    "tokenops": "version",
    "date": "day of the run, UTC",
}

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
        return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(file)]


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file, in place of earlier rows of their cases and of cases that are gone."""
    from .registry import all_cases  # it needs torch, and reading does not

    fresh = list(rows)
    replaced = {_key(row) for row in fresh}
    order = {(c.operator, c.name): i for i, c in enumerate(all_cases())}
    kept = [
        row
        for row in read(path)
        if (row["operator"], row["case"]) in order and _key(row) not in replaced
    ]

    def position(row: Row) -> tuple[int, str, str, str]:
        # float32 before bfloat16; the sort is stable: rivals stay in the order of their run
        dtype = "" if row["dtype"] == "float32" else "b"
        return order[row["operator"], row["case"]], row["threads"], row["timer"], dtype

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + fresh, key=position))
    temporary.replace(path)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)
