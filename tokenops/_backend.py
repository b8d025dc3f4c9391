# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend that serves an operator, and the reasons why another one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _library, _native
from ._library import NAMESPACE, operators

#: Every backend by name, the one that is preferred first.
BACKENDS = ("native", "triton", "reference")

_forced: str | None = None

# Triton runs its kernels as Python on CPU tensors then.
_interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_in_triton: dict[str, Callable[..., Any]] = {}  # Triton kernels by operator
_in_native: dict[str, frozenset[str]] = {}  # and by operator, where they have a compiled one


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
        if name == "triton":
            _let_triton_in()

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
    if _transformed():
        return "torch.func.grad, vjp and jvp differentiate plain PyTorch alone"
    if backend == "triton":
        return _triton_obstacle(operator, device)
    if not _native.loaded:
        return _native.reason
    if device in _compiled_for(operator):
        return None
    return f"the compiled library has no {operator} kernel for {device} tensors"


def _compiled_for(operator: str) -> frozenset[str]:
    """Kinds of devices that the compiled library has kernels of an operator for."""
    if operator not in _in_native:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        _in_native[operator] = frozenset(
            device for device in ("cpu", "cuda") if has(f"{NAMESPACE}::{operator}", device.upper())
        )
    return _in_native[operator]


def _triton_obstacle(operator: str, device: str) -> str | None:
    if operator not in _in_triton:
        return f"there is no Triton kernel of {operator}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu" and not _interpreting:
        return "Triton has no CPU kernels (TRITON_INTERPRET=1 runs them as Python, to debug them)"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels know no {device} tensors"
    if device == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if device == "cuda" and not _new_enough(torch.cuda.current_device()):
        return "the Triton kernels need compute capability 8.0"
    return None


@functools.cache
def _new_enough(index: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


#: Operators whose compiled CUDA kernel steps aside when "triton" is chosen.
_let_in: list[str] = []


def _let_triton_in() -> None:
    """Put Triton's kernels before compiled ones on CUDA devices, to serve while they are chosen.

    Not before anybody chooses them, for each call then passes through Python.
    """
    if importlib.util.find_spec("triton") is None:
        return
    for name, kernel in _in_triton.items():
        if "cuda" in _compiled_for(name) and name not in _let_in:
            compiled = torch.library.get_kernel(f"{NAMESPACE}::{name}", "CUDA")
            serve = _if_chosen(_on_cuda(name, kernel), compiled)
            _library.implement(name, serve, "CUDA", instead=True)
            _let_in.append(name)


def _if_chosen(in_triton: Callable[..., Any], compiled: Any) -> Callable[..., Any]:
    def serve(keys: Any, *args: Any) -> Any:
        if _forced == "triton":
            return in_triton(keys, *args)
        return compiled.call_boxed(keys, *args)

    return serve


class UnservedError(NotImplementedError):
    """A kernel does not know such arguments; the reference does."""


def serve_by_triton(package: str, *names: str) -> None:
    """Let the functions of a package's module ``triton`` serve the operators of the same names.

    On CUDA tensors where the compiled library does not, and on CPU tensors under the interpreter
    when ``"triton"`` is chosen. The module is imported by the first call.

    Args:
        package: Package of the operators, which has the module.
        *names: Operators that are registered already.
    """
    for name in names:
        there = _compiled_for(name)  # before what follows counts as one
        kernel = _in_triton[name] = _triton_kernel(f"{package}.triton", name)
        if importlib.util.find_spec("triton") is None:
            continue
        if "cuda" not in there:
            _library.implement(name, _on_cuda(name, kernel), "CUDA")
        elif _forced == "triton":  # by TOKENOPS_BACKEND
            _let_triton_in()
        if _interpreting:
            other = None
            if "cpu" in there:
                other = torch.library.get_kernel(f"{NAMESPACE}::{name}", "CPU")
            kernel = _interpreted(name, kernel, other)
            _library.implement(name, kernel, "CPU", instead=other is not None)


def _triton_kernel(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(module), name)
        return function(*args)

    return kernel


def _on_cuda(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    reference = _library.references[name]

    def serve(keys: Any, first: Any, *rest: Any) -> Any:
        # The first argument is a tensor or a list of some.
        index = (rest[0] if isinstance(first, list) else first).device.index
        try:
            if not _new_enough(index):
                raise UnservedError("the Triton kernels need compute capability 8.0")
            if index == torch.cuda.current_device():
                return kernel(first, *rest)
            with torch.cuda.device(index):
                return kernel(first, *rest)
        except UnservedError as obstacle:
            _refuse_if_chosen(name, obstacle)
            return reference(first, *rest)

    return serve


def _refuse_if_chosen(name: str, obstacle: UnservedError) -> None:
    if _forced == "triton":
        raise NotImplementedError(
            f"{name}: backend 'triton' was chosen but cannot serve it: {obstacle}"
        ) from None


def _interpreted(name: str, kernel: Callable[..., Any], other: Any) -> Callable[..., Any]:
    """The kernel under the interpreter, which knows no bfloat16: it computes in float32 then."""
    reference, fake = _library.references[name], _library.fakes[name]

    def widen(x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.bfloat16 else x

    def serve(keys: Any, *args: Any) -> Any:
        if _forced != "triton":
            return reference(*args) if other is None else other.call_boxed(keys, *args)
        try:
            results = kernel(*pytree.tree_map_only(Tensor, widen, args))
        except UnservedError as obstacle:
            _refuse_if_chosen(name, obstacle)
        return pytree.tree_map(lambda got, like: got.to(like.dtype), results, fake(*args))

    return serve


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
    leaves = pytree.tree_leaves(args)
    device = next((a.device.type for a in leaves if isinstance(a, Tensor)), "cpu")
    obstacles = ((backend, _obstacle(operator, backend, device)) for backend in BACKENDS)
    return {backend: reason for backend, reason in obstacles if reason is not None}


_forced = os.environ.get("TOKENOPS_BACKEND") or None
_check_name("TOKENOPS_BACKEND", _forced)
