# SPDX-License-Identifier: Apache-2.0
"""Argument checks with uniform messages: operator, argument, expected, got."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Sequence
from numbers import Real
from operator import index
from typing import Any

import torch
from torch import Tensor

#: Checks that read values run on the CPU, where reading does not synchronize, and on every device
#: under ``TOKENOPS_DEBUG=1``.
DEBUG = os.environ.get("TOKENOPS_DEBUG", "0") not in ("", "0")

FLOATING_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
INDEX_DTYPES = (torch.int32, torch.int64)

_STRIDED = torch.strided
_DENSE = "a dense tensor (torch.strided, not nested)"

#: Maximum number of characters of a value in a message.
LONGEST = 80


class _Brief(reprlib.Repr):
    """Writes a few entries and levels of a container; describes tensors by dtype and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = LONGEST

    def repr1(self, x: Any, level: int) -> str:
        return describe_tensor(x) if isinstance(x, Tensor) else super().repr1(x, level)


_brief = _Brief()


def describe_tensor(x: Tensor) -> str:
    """Describe a tensor by dtype, layout, shape and device, without synchronization."""
    kind = str(x.dtype).removeprefix("torch.")
    if x.is_nested:
        kind = f"nested {kind}"
    elif x.layout is not torch.strided:
        kind = f"{str(x.layout).removeprefix('torch.')} {kind}"
    # A nested tensor that is not jagged has no shape.
    shape = "" if x.is_nested and x.layout is torch.strided else f" of shape {list(x.shape)}"
    return f"a {kind} tensor{shape} on {x.device}"


def brief(value: object) -> str:
    """Describe a value in one line of at most 80 characters."""
    try:
        text = _brief.repr(value)
    except Exception:  # an error in a user's __repr__ must not hide the message
        text = object.__repr__(value)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def describe(value: object) -> str:
    """Describe an argument: a tensor by dtype, shape and device, others by type and value."""
    if isinstance(value, Tensor):
        return describe_tensor(value)
    return f"{type(value).__name__} {brief(value)}"


def type_error(operator: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{operator}: {argument} must be {expected}, got {describe(got)}")


def value_mismatch(operator: str, argument: str, expected: str, got: str) -> ValueError:
    """Make an error whose caller describes the wrong value, for example ``h * w``."""
    return ValueError(f"{operator}: {argument} must be {expected}, got {got}")


def value_error(operator: str, argument: str, expected: str, got: object) -> ValueError:
    return value_mismatch(operator, argument, expected, describe(got))


def check_dense(operator: str, argument: str, value: Tensor) -> None:
    """Check that a tensor is dense: neither nested nor sparse."""
    if value.is_nested or value.layout is not _STRIDED:
        raise type_error(operator, argument, _DENSE, value)


def check_rank(operator: str, argument: str, value: Tensor, dims: Sequence[int]) -> None:
    if value.dim() not in dims:
        ranks = " or ".join(f"{d}-D" for d in dims)
        raise value_error(operator, argument, ranks, value)


def check_floating(operator: str, argument: str, value: object, dims: Sequence[int]) -> None:
    """Check for a float16, bfloat16, float32 or float64 tensor of one of the given ranks."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING_DTYPES:
        expected = "a floating-point tensor"
        if isinstance(value, Tensor) and value.dtype.is_floating_point:  # float8 or narrower
            expected = "float16, bfloat16, float32 or float64"
        raise type_error(operator, argument, expected, value)
    if value.is_nested or value.layout is not _STRIDED:
        raise type_error(operator, argument, _DENSE, value)
    if value.dim() not in dims:
        check_rank(operator, argument, value, dims)


def check_bool(operator: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype is not torch.bool:
        raise type_error(operator, argument, "a bool tensor", value)
    if value.is_nested or value.layout is not _STRIDED:
        raise type_error(operator, argument, _DENSE, value)


def check_shape(
    operator: str, argument: str, value: Tensor, shapes: Sequence[tuple[Any, ...]]
) -> None:
    shape = tuple(value.shape)
    for expected in shapes:  # runs in every call: a loop takes half the time of any()
        # Comparing tuples of symbolic sizes adds a guard for each entry that is compared.
        if len(shape) == len(expected) and shape == expected:
            return
    words = " or ".join(str(list(s)) for s in shapes)
    raise value_error(operator, argument, f"of shape {words}", value)


def check_same_device(operator: str, argument: str, value: Tensor, other: Tensor) -> None:
    if value.device != other.device:
        raise value_error(operator, argument, f"on {other.device}", value)


def check_int(operator: str, argument: str, value: object, minimum: int | None = 0) -> int:
    """Check for an integer of at least ``minimum`` that is not a bool; all counts use this check.

    Accepted are an int, a NumPy integer, a 0-D integer tensor, a symbolic integer, and any other
    object with ``__index__``. Reading a tensor on another device than the CPU synchronizes. A
    tensor without a value, because it is being traced, is an error.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = _read_int(operator, argument, value)
    if minimum is not None and value < minimum:
        raise value_error(operator, argument, f">= {minimum}", value)
    return value  # type: ignore[return-value]


def _read_int(operator: str, argument: str, value: object) -> int:
    expected = "an int"
    if isinstance(value, Tensor):
        dtype = value.dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or value.dim() > 0:
            expected = "an int or an integer tensor without dimensions"
            raise type_error(operator, argument, expected, value)
        # Under torch.jit.trace the value is known, and becomes a constant.
        expected = "an int under tracing and transforms, where a tensor has no value"
        if torch.compiler.is_compiling():
            raise type_error(operator, argument, expected, value)
    elif isinstance(value, bool):
        raise type_error(operator, argument, expected, value)
    try:
        return index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # NumPy bools; fake and transformed tensors
        raise type_error(operator, argument, expected, value) from None


def check_real(operator: str, argument: str, value: object, minimum: float = -math.inf) -> float:
    """Check for a finite number of at least ``minimum`` that is not a bool."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, Real):
        raise type_error(operator, argument, "a float", value)
    try:
        number = float(value)
    except OverflowError:  # an int of more than 308 digits
        raise value_error(operator, argument, "finite", value) from None
    # Dynamo traces comparisons of a symbolic number, but not math.isfinite.
    if not (-math.inf < number < math.inf and number >= minimum):
        expected = "finite" if minimum == -math.inf else f"finite and >= {minimum}"
        raise value_error(operator, argument, expected, number)
    return number


def check_choice(operator: str, argument: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise type_error(operator, argument, "a str", value)
    if value not in choices:
        raise value_error(operator, argument, "one of " + ", ".join(map(repr, choices)), value)


def values_visible(value: Tensor) -> bool:
    """Whether a check may read the values: without synchronization, and not under tracing."""
    if hasattr(value, "device_mesh"):  # a DTensor has values on several devices
        return False
    return (value.device.type == "cpu" or DEBUG) and not torch.compiler.is_compiling()


def read(number: Tensor) -> float | None:
    """Read a number for an eager check; None for a tensor without a value (under tracing)."""
    try:
        return float(number)
    except RuntimeError:  # fake tensors and functional transforms have no values
        return None


def holds(condition: Tensor) -> bool:
    """Read a condition for an eager check; True for a tensor without a value."""
    return read(condition) != 0


def check_index(operator: str, argument: str, value: object, dims: Sequence[int] | None) -> None:
    """Check for an int32 or int64 tensor of one of the given ranks, or of any rank if None."""
    if not isinstance(value, Tensor) or value.dtype not in INDEX_DTYPES:
        raise type_error(operator, argument, "an int32 or int64 tensor", value)
    check_dense(operator, argument, value)
    if dims is not None:
        check_rank(operator, argument, value, dims)


def check_range(operator: str, argument: str, value: Tensor, low: int, end: int) -> None:
    """Check that integers are in [low, end), if a check may read them."""
    if values_visible(value) and not holds(((value >= low) & (value < end)).all()):
        got = f"values from {int(value.min())} to {int(value.max())}"
        raise value_mismatch(operator, argument, f"in [{low}, {end})", got)


def check_generator(operator: str, generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise type_error(operator, "generator", "a torch.Generator or None", generator)


def check_first_pass(operator: str, generator: torch.Generator) -> None:
    """Raise an error for a draw in a backward, where activation checkpointing recomputes a forward.

    Checkpointing restores the state of default generators only. With any other generator the second
    draw would differ from the first, and the gradient would be wrong without an error.
    """
    if torch._C._current_graph_task_id() == -1 or generator is torch.default_generator:
        return
    defaults = getattr(torch.get_device_module(generator.device), "default_generators", ())
    if not any(generator is default for default in defaults):
        raise value_mismatch(
            operator,
            "generator",
            "None or a default generator where activation checkpointing recomputes a forward",
            "another generator, whose state is not restored",
        )
