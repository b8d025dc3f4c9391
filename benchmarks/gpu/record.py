# SPDX-License-Identifier: Apache-2.0
"""What each case came to, a line at once: whoever is killed loses no name, and goes on after it."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

#: Exit status of a program that a CUDA error made useless; started again, it goes on.
POISONED = 75
#: Exit status of a program that has nothing to do here; its last line says why.
LEFT_OUT = 77
#: Results of a case that did not go wrong.
GOOD = ("passed", "skipped")


@dataclass(frozen=True)
class Row:
    """A case and its result.

    Attributes:
        case: Its name, unique within a file.
        result: ``"passed"``, ``"skipped"``, ``"failed"``, or ``"started"`` while it runs. That is
            also what stays of a case during which the process was killed.
        seconds: Time that it took.
        message: What went wrong.
    """

    case: str
    result: str
    seconds: float = 0.0
    message: str = ""


HEADER = tuple(field.name for field in fields(Row))


def append(path: Path, row: Row) -> None:
    """Write a row at the end of a file, which begins with a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = _ends_whole(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        if not whole:  # a kill has cut the last line off
            file.write("\n")
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(HEADER)
        writer.writerow(astuple(row))


def _ends_whole(path: Path) -> bool:
    """Whether a file's last line is whole; so is that of an empty file and of none."""
    if not path.is_file() or path.stat().st_size == 0:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read(path: Path) -> dict[str, Row]:
    """The last row of each case, in the order of their first ones; none if there is no file."""
    return {row.case: row for row in _rows(path)}


def settled(path: Path) -> set[str]:
    """Cases that a further start passes over: those with a result, or that did not end twice.

    Once may be the fault of whoever stopped the process.
    """
    starts: dict[str, int] = {}
    for row in _rows(path):
        starts[row.case] = starts.get(row.case, 0) + 1 if row.result == "started" else 2
    return {case for case, count in starts.items() if count >= 2}


def _rows(path: Path) -> Iterator[Row]:
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for line in csv.DictReader(file):
                if all(line.get(name) is not None for name in HEADER):  # not cut off by a kill
                    yield Row(line["case"], line["result"], _number(line), line["message"])


def _number(line: dict[str, str]) -> float:
    try:
        return float(line["seconds"])
    except ValueError:
        return 0.0


def is_cuda_error(error: BaseException) -> bool:
    """Whether every later call of this process may fail because of this error.

    Want of memory is no such error: PyTorch says "CUDA out of memory" then.
    """
    text = str(error)
    return "CUDA error" in text or "Triton Error [CUDA]" in text
