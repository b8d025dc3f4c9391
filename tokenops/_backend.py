# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend that serves an operator, and the reasons why another one does not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._library import NAMESPACE, operators

#: Every backend by name, the one that is preferred first.
BACKENDS = ("native", "triton", "reference")

_forced: str | None = None


def _check_name(where: str, name: object) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{where} must be a str or None, got {type(name).__name__} {name!r}")
    if name is not None and name not in BACKENDS:
        choices = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"{where} must be one of {choices} or None, got {name!r}")


class use_backend:  # noqa: N801 - used like torch.set_grad_enabled
    """Choose the backend of all operators: as a function, a context manager or a decorator.

    An explicit choice never falls back silently: an operator that the backend cannot serve raises
    ``NotImplementedError`` with the reason. ``None`` gives the choice back to tokenops, which takes
    the fastest backend for the tensors' device. The environment variable ``TOKENOPS_BACKEND`` sets
    the choice at import. The choice holds for the whole process; a function compiled by
    ``torch.compile`` keeps the one it was compiled under or compiles again.

    Args:
        name: ``"native"``, ``"triton"``, ``"reference"`` or ``None``.

    Raises:
        TypeError: If ``name`` is no string.
        ValueError: If there is no backend of this name.

    Example:
        >>> import torch, tokenops
        >>> with tokenops.use_backend("reference"):
        ...     token_map = tokenops.match(torch.randn(1, 8, 4), 2)
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        _check_name("use_backend: name", name)
        self._name = name
        self._previous = _forced
        _forced = name

    def __enter__(self) -> None:
        global _forced
        _forced = self._name

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        global _forced
        _forced = self._previous  # decorating a function is no choice yet
        name = self._name

        @functools.wraps(function)
        def chosen_inside(*args: Any, **kwargs: Any) -> Any:
            with use_backend(name):
                return function(*args, **kwargs)

        return chosen_inside

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def chosen() -> str | None:
    """Name of the backend that was chosen explicitly, if any."""
    return _forced


def _obstacle(operator: str, backend: str, device: str) -> str | None:
    """The reason why ``backend`` can't serve ``operator`` on ``device``; None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        return f"no Triton kernel of {operator} in this version"
    if not _native.loaded:
        return _native.reason
    if _transformed():
        return "torch.func.grad, vjp and jvp differentiate plain PyTorch alone"
    # Compiled kernels exist for these devices only; other names need not be dispatch keys.
    if device in ("cpu", "cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{operator}", device.upper()
    ):
        return None
    return f"the compiled library has no {operator} kernel for {device} tensors"


def _transformed() -> bool:
    """Whether torch.func.grad, vjp or jvp is at work, that no registered operator knows."""
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(t.key() != torch._C._functorch.TransformType.Vmap for t in transforms)


# What torch.compiler.assume_constant_result does, without its import of the compiler: torch.compile
# takes the answers for granted while it traces, and guards on the transforms by itself.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_reference(operator: str, tensor: Tensor) -> bool:
    """Whether this call must go to the reference, by an explicit choice or for want of another.

    Raises:
        NotImplementedError: If another backend was chosen and cannot serve the call.
    """
    if _forced is None:
        return _transformed()
    obstacle = _obstacle(operator, _forced, tensor.device.type)
    if obstacle is not None:
        raise NotImplementedError(
            f"{operator}: backend {_forced!r} was chosen but cannot serve it: {obstacle}"
        )
    return _forced == "reference"


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that serve at least one operator on a device, the preferred one first.

    Args:
        device: Device or device type, ``"cpu"`` by default.

    Returns:
        Names out of ``("native", "triton", "reference")``; the reference is always among them.

    Example:
        >>> import torch, tokenops
        >>> "reference" in tokenops.available_backends()
        True
    """
    kind = torch.device(device).type
    return tuple(
        backend
        for backend in BACKENDS
        if any(_obstacle(operator, backend, kind) is None for operator in operators)
    )


def why_not(operator: str, *args: object) -> dict[str, str]:
    """Why backends can't serve an operator on these arguments.

    Args:
        operator: Name of a public operator, for example ``"match"``.
        *args: The arguments of the call; the device of the first tensor counts, else the CPU.

    Returns:
        A reason for each backend that can't serve the call; a backend that can is not among them.

    Raises:
        ValueError: If there is no operator of this name.

    Example:
        >>> import torch, tokenops
        >>> "reference" in tokenops.why_not("match", torch.randn(1, 8, 4))
        False
    """
    if operator not in operators:
        choices = ", ".join(map(repr, operators))
        raise ValueError(f"why_not: operator must be one of {choices}, got {operator!r}")
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    obstacles = ((backend, _obstacle(operator, backend, device)) for backend in BACKENDS)
    return {backend: reason for backend, reason in obstacles if reason is not None}


_forced = os.environ.get("TOKENOPS_BACKEND") or None
_check_name("TOKENOPS_BACKEND", _forced)
