# SPDX-License-Identifier: Apache-2.0
"""Budgets of registers and shared memory: CSV files of the most that each kernel may use."""

from __future__ import annotations

from collections import defaultdict

from .store import Row

#: Columns of numbers, at the end of every budget.
NUMBERS = ("registers", "stack", "spills", "shared")


def key(row: Row) -> tuple[str, ...]:
    """The names of a row."""
    return tuple(row[column] for column in ("case", "kernel", "arch") if column in row)


def excesses(rows: list[Row], budget: list[Row], shared: dict[str, int] | None = None) -> list[str]:
    """A line for each number above the budget, and for each row that the budget does not have.

    Stack and spills are never allowed. ``shared`` is the most shared memory by architecture.
    """
    allowed: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in budget:  # a case may launch a kernel more than once
        allowed[key(row)].append(row)
    found = []
    for row in rows:
        name, known = " ".join(key(row)), allowed[key(row)]
        limits = {"stack": 0, "spills": 0}
        limits |= {n: max(int(b[n]) for b in known) for n in ("registers", "shared") if known}
        if shared is not None:
            limits["shared"] = min(limits.get("shared", shared[row["arch"]]), shared[row["arch"]])
        found += [] if known else [f"{name}: not in the budget"]
        found += [
            f"{name}: {row[column]} {column}, at most {limit} allowed"
            for column, limit in limits.items()
            if int(row[column]) > limit
        ]
    return found
