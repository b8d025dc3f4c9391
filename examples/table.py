# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for index, (name, *cells) in enumerate(rows):
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("| " + " | ".join([name.ljust(widths[0]), *padded]) + " |")
        if index == 0:
            rules = ["-" * (width + 1) + ":" for width in widths[1:]]
            print("|" + "|".join(["-" * (widths[0] + 2), *rules]) + "|")
