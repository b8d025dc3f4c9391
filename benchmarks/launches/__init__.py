# SPDX-License-Identifier: Apache-2.0
"""Calls that between them launch every Triton kernel with all its settings.

A module for each family of kernels, with ``CASES``: what it is called, and a function that calls
operators on tensors without memory (device ``meta``). Nothing runs: launches are recorded, to be
compiled ahead of time.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable


def cases() -> dict[str, Callable[[], object]]:
    """All calls by name."""
    found: dict[str, Callable[[], object]] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(importlib.import_module(f"{__name__}.{module.name}").CASES)
    return found
