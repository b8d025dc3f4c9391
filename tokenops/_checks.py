# SPDX-License-Identifier: Apache-2.0
"""Argument checks with uniform messages: operator, argument, what was expected, what came."""

from __future__ import annotations

import os
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

#: Checks that read values run on the CPU, where they are free of synchronization, and on every
#: device under ``TOKENOPS_DEBUG=1``.
DEBUG = os.environ.get("TOKENOPS_DEBUG", "0") not in ("", "0")

INDEX_DTYPES = (torch.int32, torch.int64)


def describe(value: object) -> str:
    """What came, in words: dtype, shape and device of a tensor, type and value of the rest."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def type_error(operator: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{operator}: {argument} must be {expected}, got {describe(got)}")


def value_mismatch(operator: str, argument: str, expected: str, got: str) -> ValueError:
    """An error about something that is no argument by itself, described by the caller."""
    return ValueError(f"{operator}: {argument} must be {expected}, got {got}")


def value_error(operator: str, argument: str, expected: str, got: object) -> ValueError:
    return value_mismatch(operator, argument, expected, describe(got))


def check_floating(operator: str, argument: str, value: object, dims: Sequence[int]) -> None:
    """A floating-point tensor (half, bfloat16, single or double) of one of the given ranks."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        raise type_error(operator, argument, "a floating-point tensor", value)
    if value.dtype.itemsize == 1:
        raise type_error(operator, argument, "float16, bfloat16, float32 or float64", value)
    if value.dim() not in dims:
        ranks = " or ".join(f"{d}-D" for d in dims)
        raise value_error(operator, argument, ranks, value)


def check_bool(operator: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise type_error(operator, argument, "a bool tensor", value)


def check_shape(
    operator: str, argument: str, value: Tensor, shapes: Sequence[tuple[Any, ...]]
) -> None:
    shape = tuple(value.shape)
    for expected in shapes:  # every call passes here: a loop costs half of what any() does
        # Tuples of symbolic sizes compare entry by entry, and keep as a guard what they find.
        if len(shape) == len(expected) and shape == expected:
            return
    words = " or ".join(str(list(s)) for s in shapes)
    raise value_error(operator, argument, f"of shape {words}", value)


def check_same_device(operator: str, argument: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise value_error(operator, argument, f"on {other.device}", value)


def check_int(operator: str, argument: str, value: object, minimum: int = 0) -> int:
    """An integer (NumPy's too, a symbolic one while tracing), not a bool, at least ``minimum``."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise type_error(operator, argument, "an int", value)
        value = index(value)
    if value < minimum:
        raise value_error(operator, argument, f">= {minimum}", value)
    return value  # type: ignore[return-value]


def check_choice(operator: str, argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise type_error(operator, argument, "a str", value)
    if value not in choices:
        raise value_error(operator, argument, "one of " + ", ".join(map(repr, choices)), value)


def values_visible(value: Tensor) -> bool:
    """Whether a check may read the values: nothing to wait for, and not being traced."""
    return (value.device.type == "cpu" or DEBUG) and not torch.compiler.is_compiling()


def read(number: Tensor) -> float | None:
    """Read a number for an eager check; None for tensors whose values do not exist (tracing)."""
    try:
        return float(number)
    except RuntimeError:  # fake tensors and functional transforms have no values
        return None


def holds(condition: Tensor) -> bool:
    """Read a condition of an eager check; true for tensors whose values do not exist."""
    return read(condition) != 0


def check_index(operator: str, argument: str, value: object, dims: Sequence[int]) -> None:
    """An int32 or int64 tensor of one of the given ranks."""
    if not isinstance(value, Tensor) or value.dtype not in INDEX_DTYPES:
        raise type_error(operator, argument, "an int32 or int64 tensor", value)
    if value.dim() not in dims:
        ranks = " or ".join(f"{d}-D" for d in dims)
        raise value_error(operator, argument, ranks, value)
