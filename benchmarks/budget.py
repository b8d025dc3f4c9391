# SPDX-License-Identifier: Apache-2.0
"""Budgets of registers and shared memory: CSV files of what each kernel may use."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

#: Columns of numbers, at the end of every budget.
NUMBERS = ("registers", "stack", "spills", "shared")

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a budget; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], names: tuple[str, ...]) -> None:
    """Write a budget, whose rows the columns ``names`` name."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*names, *NUMBERS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def key(row: Row) -> tuple[str, ...]:
    """The names of a row."""
    return tuple(row[column] for column in ("case", "kernel", "arch") if column in row)


def excesses(rows: list[Row], budget: list[Row], shared: dict[str, int] | None = None) -> list[str]:
    """A line for each number above the budget, and for each row that the budget does not have.

    Stack and spills are never allowed. ``shared`` is the most shared memory by architecture.
    """
    allowed: dict[tuple[str, ...], list[Row]] = {}
    for row in budget:  # a case may launch a kernel more than once
        allowed.setdefault(key(row), []).append(row)
    found = []
    for row in rows:
        name, budgeted = " ".join(key(row)), allowed.get(key(row))
        limits = {"stack": 0, "spills": 0}
        if shared is not None:
            limits["shared"] = shared[row["arch"]]
        if budgeted is None:
            found.append(f"{name}: not in the budget")
        else:
            limits["registers"] = max(int(b["registers"]) for b in budgeted)
            most = max(int(b["shared"]) for b in budgeted)
            limits["shared"] = min(most, limits.get("shared", most))
        found += [
            f"{name}: {row[column]} {column}, at most {limit} allowed"
            for column, limit in limits.items()
            if int(row[column]) > limit
        ]
    return found
