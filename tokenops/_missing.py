# SPDX-License-Identifier: Apache-2.0
"""A warning for calls that plain PyTorch serves because kernels are missing."""

from __future__ import annotations

import importlib.util
import sys
import threading
import warnings

import torch

from . import _choice, _native

_lock = threading.Lock()
_known: set[str] = set()  # device types that need no further warning


def advice(device: str) -> str:
    """Describe what is missing for a device type and how to add it; empty if nothing is missing."""
    if device == "cpu":
        if _native.loaded:
            return ""
        return f"{_native.reason}; build tokenops with a C++17 compiler for faster operators"
    if device == "cuda":
        if importlib.util.find_spec("triton") is not None:
            return ""
        return "Triton is not installed; its kernels serve CUDA tensors faster"
    return f"tokenops has kernels for CPU and CUDA tensors only, not for {device} tensors"


def warn(device: str, why: str | None = None) -> None:
    """Warn once per process and device type that plain PyTorch serves its tensors.

    Args:
        device: Device type of the tensors of a call that no kernel served.
        why: The reason; :func:`advice` by default.
    """
    if device in _known:
        return
    if device == "meta" or _choice.chosen() is not None:
        return
    with _lock:
        if device in _known:
            return
        _known.add(device)
    why = advice(device) if why is None else why
    if why:
        message = (
            f"tokenops: plain PyTorch serves {device} tensors: {why}. To silence this warning: "
            'tokenops.use_backend("composed") or TOKENOPS_BACKEND=composed'
        )
        warnings.warn(message, RuntimeWarning, stacklevel=_outside())


def _outside() -> int:
    """Stack level, above :func:`warn`, of the nearest code outside of tokenops and PyTorch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("tokenops", torch.__name__):
            break
        level, frame = level + 1, frame.f_back
    return level
