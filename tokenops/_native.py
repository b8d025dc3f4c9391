# SPDX-License-Identifier: Apache-2.0
"""Loading of the compiled library, whose kernels register themselves with the dispatcher.

Importing this module neither raises nor touches a device: without a library plain PyTorch serves
every operator, and ``reason`` says what is missing.
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

#: Whether the compiled library is loaded.
loaded: bool = False
#: Why the library is not loaded; empty if it is.
reason: str = ""
#: Path of the library, even if it could not be loaded.
path: str | None = None
#: Vector instructions of the CPU kernels in use: "portable", "avx2", "avx512" or "avx512_bf16";
#: empty without CPU kernels.
isa: str = ""

_package = os.path.dirname(os.path.abspath(__file__))


def build_info() -> dict[str, Any]:
    """Return the record of the build; empty if there was no build.

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
    except Exception:  # the module is optional: any error counts as its absence
        return None


def _load() -> tuple[str | None, str]:
    """Load the library; return its path, and why it is not loaded or an empty string."""
    library = os.environ.get("TOKENOPS_LIBRARY")
    if library:
        library = os.path.abspath(library)
        if not os.path.isfile(library):
            return library, f"no compiled library: TOKENOPS_LIBRARY={library} is not a file"
    else:
        files = (os.path.join(_package, "_C" + suffix) for suffix in EXTENSION_SUFFIXES)
        library = next(filter(os.path.isfile, files), None)
    if library is None:
        why = build_info().get("reason") or "it was never built (see CONTRIBUTING.md)"
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
    except AttributeError:  # the library has no CPU kernels
        return ""
    level.restype = ctypes.c_char_p
    return str(level().decode())


path, reason = _load()
loaded = not reason
isa = _level(path) if loaded else ""
