# SPDX-License-Identifier: Apache-2.0
"""Results of cases in a file of JSON lines: a kill loses none, and another process goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: Exit status of a program that a CUDA error made useless; another start continues its work.
POISONED = 75
#: Exit status of a program that has nothing to do here; its last line is the reason.
LEFT_OUT = 77
#: Results of cases that did not fail.
GOOD = ("passed", "skipped")


class Row(NamedTuple):
    case: str  # unique within a file
    result: str  # "passed", "skipped", "failed"; "started" until then, or if the process was killed
    seconds: float = 0.0
    message: str = ""  # of the error


def append(path: Path, row: Row) -> None:
    """Write a row at the end of a file, on a new line even where a kill cut off the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row))


def settled(path: Path) -> set[str]:
    """Cases to skip in another start: those with a result, and those that twice did not end.

    A case that did not end once may have been stopped by a time limit.
    """
    starts: Counter[str] = Counter()
    for row in _rows(path):
        starts[row.case] += 1 if row.result == "started" else 2
    return {case for case, count in starts.items() if count >= 2}


def read(path: Path) -> dict[str, Row]:
    """The last row of each case, in the order of the first ones; empty if there is no file."""
    return {row.case: row for row in _rows(path)}


def _rows(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with suppress(TypeError, ValueError):  # of an empty line, or of one that a kill cut off
            yield Row(*json.loads(line))


def is_cuda_error(error: BaseException) -> bool:
    """Whether every later call of this process may fail because of this error.

    Running out of memory is not such an error: PyTorch says "CUDA out of memory" then.
    """
    text = str(error)
    return "CUDA error" in text or "Triton Error [CUDA]" in text
