# SPDX-License-Identifier: Apache-2.0
"""Loading of the compiled library, whose kernels register themselves with the dispatcher.

Nothing here raises or touches a device: without a library plain PyTorch serves every operator, and
``reason`` says what is missing.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType
from typing import Any

import torch

#: Whether the compiled kernels are there.
loaded: bool = False
#: Why they are not; empty when they are.
reason: str = ""
#: The library's file, also when it could not be loaded.
path: str | None = None
#: Level of vector instructions of its kernels for the CPU: "portable", "avx2", "avx512" or
#: "avx512_bf16"; empty without kernels.
isa: str = ""

_package = os.path.dirname(os.path.abspath(__file__))


def build_info() -> dict[str, Any]:
    """What the build recorded about itself; empty if nothing was ever built here.

    Returns:
        Entries of ``_build_info.json``: always ``mode`` and ``built`` (``"cpu"``, ``"cuda"``,
        ``"emulated"`` or None), then compiler, flags and versions, or the ``reason`` why nothing
        was compiled.
    """
    try:
        with open(os.path.join(_package, "_build_info.json"), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def inspect() -> ModuleType | None:
    """The pybind11 module (``build_info``, ``cpu_features``, ``cuda_kernels``), if there is one."""
    try:
        return importlib.import_module("._inspect", __package__)
    except Exception:  # any defect of a convenience counts as its absence
        return None


def _load() -> tuple[str | None, str]:
    """Load the library and return its path and the obstacle, empty when there was none."""
    library = os.environ.get("TOKENOPS_LIBRARY")
    if library:
        library = os.path.abspath(library)
        if not os.path.isfile(library):
            return library, f"no compiled library: TOKENOPS_LIBRARY={library} is no file"
    else:
        files = (os.path.join(_package, "_C" + suffix) for suffix in EXTENSION_SUFFIXES)
        library = next(filter(os.path.isfile, files), None)
    if library is None:
        why = build_info().get("reason") or "it was never built (CONTRIBUTING.md says how)"
        return None, f"no compiled library in this installation: {why}"
    try:
        torch.ops.load_library(library)
    except Exception as error:
        detail = error.__cause__ or error
        return (
            library,
            f"the compiled library cannot be loaded: {detail} (torch {torch.__version__})",
        )
    return library, ""


def _level(library: str | None) -> str:
    try:
        level = ctypes.CDLL(library).tokenops_cpu_isa
    except AttributeError:  # made of kernels for another device
        return ""
    level.restype = ctypes.c_char_p
    return str(level().decode())


path, reason = _load()
loaded = not reason
isa = _level(path) if loaded else ""
