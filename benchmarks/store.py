# SPDX-License-Identifier: Apache-2.0
"""The CSV files of results: one row per rival of a case, one file per kind of device."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

Row = dict[str, str]

RESULTS = Path(__file__).resolve().parent / "results"

#: Columns and what they mean. Times are of one call.
COLUMNS = {
    "operator": "what was timed",
    "case": "name of the case",
    "shape": "its sizes",
    "dtype": "type of the data",
    "rival": "who, rivals and yardsticks alike",
    "status": "ok; skipped, failed (see note); differs: the result is not the one of tokenops",
    "note": "reason of a skip or failure",
    "median_us": "median",
    "p20_us": "20th percentile",
    "p80_us": "80th percentile",
    "best_us": "fastest sample",
    "ratio": "median divided by the median of tokenops in the same run",
    "samples": "samples taken",
    "clean": "samples during which the processor was not taken away",
    "statistics": "over the clean samples, or over all for want of those",
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
    "bound_by": "which of the two: memory or compute",
    "bound_share": "bound_us / median_us: 1 is as fast as the machine allows",
    "backend": "what serves tokenops by default",
    "isa": "instruction set that the compiled library chose",
    "device": "cpu or cuda",
    "hardware": "processor or graphics card",
    "cores": "processors that the process might use; multiprocessors of a card",
    "level": "widest vector extension of the processor; compute capability of a card",
    "threads": "threads used",
    "timer": "wall clock, or on the device: events, graph (CUDA graph replay)",
    "malloc": "tuned: large tensors reuse memory; fresh pages: each one page-faults",
    "mode": "full or quick; quick figures are for trying out, not for quoting",
    "torch": "version",
    "python": "version",
    "tokenops": "version",
    "date": "day of the run, UTC",
}

#: A run of a case replaces the rows that agree with it in these.
KEY = ("device", "operator", "case", "dtype", "threads", "timer")


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits and no exponent."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def read(path: Path) -> list[Row]:
    """All rows of a file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(file)]


def merge(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a file; a case's earlier rows give way, and cases that are no more."""
    from .registry import all_cases  # it needs torch, and reading does not

    fresh = list(rows)
    replaced = {_key(row) for row in fresh}
    order = {(c.operator, c.name): i for i, c in enumerate(all_cases())}
    earlier = [row for row in read(path) if (row["operator"], row["case"]) in order]
    kept = [row for row in earlier if _key(row) not in replaced]

    def place(row: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
        known = order[row["operator"], row["case"]]
        # float32 before bfloat16; within one run the order of rivals stays (the sort is stable)
        return known, (row["threads"], row["timer"], "" if row["dtype"] == "float32" else "b")

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + fresh, key=place))
    temporary.replace(path)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)
