# SPDX-License-Identifier: Apache-2.0
"""Which backend serves an operator, and why another one cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import _checks, _library, _missing, _native
from ._choice import BACKENDS, chosen
from ._library import NAMESPACE, operators

#: Operators whose compiled kernels are slower than plain PyTorch, by level of CPU instructions;
#: docs/performance.md has the measurements.
SLOWER: dict[str, tuple[str, ...]] = {
    "portable": ("match", "nearest", "search", "policy_attention", "policy_attention_backward"),
}
#: Operators whose compiled kernels stepped aside for the composed functions in this process.
aside: set[str] = set()

_TOO_OLD = "the Triton kernels need compute capability 8.0"
# Whether Triton runs kernels as Python on CPU tensors.
_interpreting = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_in_triton: dict[str, Callable[..., Any]] = {}  # Triton kernel of each operator
_in_native: dict[str, frozenset[str]] = {}  # device types with a compiled kernel, by operator
_served_natively: set[str] = set()  # operators whose "native" overload is defined


def dispatch(operator: str, tensor: Tensor) -> Callable[..., Any]:
    """Return the function that serves a call: the operator, one of its overloads, or the reference.

    Args:
        operator: Name of the operator.
        tensor: One of the call's tensors, on the device of all of them.

    Raises:
        NotImplementedError: If the chosen backend cannot serve the call.
    """
    backend = chosen()
    if backend is None:
        if _differentiated():
            return _library.defined[operator].reference
        return getattr(_library.overloads[None], operator)  # type: ignore[no-any-return]
    reason = _reason(operator, backend, tensor.device.type)
    if reason is not None:
        raise NotImplementedError(
            f"{operator}: backend {backend!r} was chosen but cannot serve it: {reason}"
        )
    if backend == "reference":
        return _library.defined[operator].reference
    if backend not in _library.overloads:
        backend = None  # no kernel stepped aside, so the default overload runs the compiled ones
    return getattr(_library.overloads[backend], operator)  # type: ignore[no-any-return]


def dispatches_to_reference(operator: str, tensor: Tensor) -> bool:
    """Whether the reference serves a call; arguments and errors as those of :func:`dispatch`."""
    return dispatch(operator, tensor) is _library.defined[operator].reference


def step_aside(*names: str) -> None:
    """Let the composed functions serve operators on the CPU in place of compiled kernels.

    This is for levels of vector instructions at which the compiled kernels are slower. An explicit
    choice of ``"native"`` still runs the compiled kernels.

    Args:
        *names: Registered operators.
    """
    if not names:
        return
    aside.update(names)
    if "native" not in _library.overloads:
        _library.add_overloads("native")
    for name in _library.defined:
        _serve_natively(name)
    for name in names:
        if "cpu" in _compiled_for(name):
            composed = _library.dense(_library.defined[name].composed)

            def serve(keys: Any, *args: Any, composed: Any = composed) -> Any:
                return composed(*args)

            _library.implement(name, serve, "CPU", instead=True)


def _serve_natively(name: str) -> None:
    """Define the overload ``"native"`` of an operator by its compiled kernels."""
    if name in _served_natively:
        return
    _served_natively.add(name)
    for device in _compiled_for(name):
        compiled = torch.library.get_kernel(f"{NAMESPACE}::{name}", device.upper())

        def serve(keys: Any, *args: Any, compiled: Any = compiled) -> Any:
            return compiled.call_boxed(keys, *args)

        _library.implement(f"{name}.native", serve, device.upper())


def serve_by_parts(name: str, function: Callable[..., Any], *parts: str) -> None:
    """Let a function that calls compiled operators serve another operator.

    It becomes the operator's compiled kernel on each device for which all parts are compiled.

    Args:
        name: Registered operator.
        function: Takes the parameters of the operator's reference.
        *parts: The compiled operators that the function calls.
    """
    kernel = _library.defined[name].signature.flat(function)
    for device in frozenset.intersection(*map(_compiled_for, parts)):
        _library.implement(name, lambda keys, *args: kernel(*args), device.upper())


def _reason(operator: str, backend: str, device: str) -> str | None:
    """Return why ``backend`` can't serve ``operator`` on ``device``; None if it can."""
    if backend == "reference":
        return None
    if _differentiated():
        return "only the reference supports torch.func.grad, vjp, jvp and forward-mode AD"
    if backend == "composed":
        return None
    if backend == "triton":
        return _triton_reason(operator, device)
    if not _native.loaded:
        return _native.reason
    if device in _compiled_for(operator):
        return None
    return f"the compiled library has no {operator} kernel for {device} tensors"


def _compiled_for(operator: str) -> frozenset[str]:
    """Return the device types that the compiled library has kernels of an operator for."""
    if operator not in _in_native:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        _in_native[operator] = frozenset(
            device for device in ("cpu", "cuda") if has(f"{NAMESPACE}::{operator}", device.upper())
        )
    return _in_native[operator]


def _triton_reason(operator: str, device: str) -> str | None:
    if operator not in _in_triton:
        return f"there is no Triton kernel of {operator}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu" and not _interpreting:
        return "Triton has no CPU kernels (TRITON_INTERPRET=1 runs them as Python, to debug them)"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels do not support {device} tensors"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    if device == "cuda" and not _new_enough(torch.cuda.current_device()):
        return _TOO_OLD
    return None


@functools.cache
def _new_enough(index: int) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


class UnservedError(NotImplementedError):
    """Raised by a kernel for arguments that only plain PyTorch serves."""


def serve_by_triton(package: str, *names: str) -> None:
    """Let the functions of a package's module ``triton`` serve the operators of the same names.

    They serve CUDA tensors by default if the compiled library has no CUDA kernel, and always if
    ``"triton"`` is chosen; then, under the interpreter, also CPU tensors. The first call imports
    the module.

    Args:
        package: Package of the operators, which has the module.
        *names: Registered operators.
    """
    for name in names:
        compiled_for = _compiled_for(name)  # a Triton kernel registered below must not count
        if "native" in _library.overloads:
            _serve_natively(name)
        signature = _library.defined[name].signature
        kernel = signature.flat(_triton_kernel(f"{package}.triton", name))
        _in_triton[name] = kernel
        _library.implement(f"{name}.triton", _on_cuda(name, kernel), "CUDA")
        if _interpreting:
            _library.implement(f"{name}.triton", _interpreted(name, kernel), "CPU")
        if "cuda" not in compiled_for and importlib.util.find_spec("triton") is not None:
            otherwise = _library.dense(_library.defined[name].composed)
            _library.implement(name, _on_cuda(name, kernel, otherwise), "CUDA")


def _triton_kernel(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(module), name)
        return function(*args)

    return kernel


def _on_cuda(
    name: str, kernel: Callable[..., Any], otherwise: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Wrap a kernel so that it runs on the device of its tensors.

    Args:
        name: Name of the operator.
        kernel: Triton kernel, which may raise :class:`UnservedError`.
        otherwise: Function for arguments that the kernel does not serve; they are an error if None.
    """

    def serve(keys: Any, first: Any, *rest: Any) -> Any:
        index = _library.device_of(first, *rest).index
        try:
            if not _new_enough(index):
                if otherwise is not None:
                    _missing.warn("cuda", _TOO_OLD)
                raise UnservedError(_TOO_OLD)
            if index == torch.cuda.current_device():
                return kernel(first, *rest)
            with torch.cuda.device(index):
                return kernel(first, *rest)
        except UnservedError as reason:
            if otherwise is None:
                raise _refusal(name, reason) from None
            return otherwise(first, *rest)

    return serve


def _refusal(name: str, reason: UnservedError) -> NotImplementedError:
    return NotImplementedError(f"{name}: backend 'triton' was chosen but cannot serve it: {reason}")


def _interpreted(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a kernel for the interpreter, which has no bfloat16: compute in float32 instead."""
    fake = _library.defined[name].fake

    def widen(x: Tensor) -> Tensor:
        return x.float() if x.dtype == torch.bfloat16 else x

    def serve(keys: Any, *args: Any) -> Any:
        try:
            results = kernel(*pytree.tree_map_only(Tensor, widen, args))
        except UnservedError as reason:
            raise _refusal(name, reason) from None
        return pytree.tree_map(lambda got, like: got.to(like.dtype), results, fake(*args))

    return serve


def _differentiated() -> bool:
    """Return whether torch.func.grad, vjp, jvp or forward-mode AD is active.

    The registered operators have no rules for them, so the references serve the calls.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(t.key() != torch._C._functorch.TransformType.Vmap for t in transforms)


# Constant for Dynamo, which guards on active transforms itself.
_library.assume_constant_result(_reason, _differentiated)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that serve at least one operator on a device, the preferred one first.

    Args:
        device: Device or device type, ``"cpu"`` by default.

    Returns:
        Names out of ``("native", "triton", "composed", "reference")``; the last two are always
        among them.

    Example:
        >>> import torch, tokenops
        >>> "reference" in tokenops.available_backends()
        True
    """
    kind = torch.device(device).type
    return tuple(
        backend
        for backend in BACKENDS
        if any(_reason(operator, backend, kind) is None for operator in operators)
    )


def why_not(operator: str, *args: object) -> dict[str, str]:
    """Why backends can't serve an operator on these arguments.

    Args:
        operator: Name of a public operator, for example ``"match"``.
        *args: The arguments of the call; the device is that of the first tensor, else the CPU.

    Returns:
        A reason for each backend that can't serve the call, and only for these backends.

    Raises:
        TypeError: If ``operator`` is not a str.
        ValueError: If no public operator has this name.

    Example:
        >>> import torch, tokenops
        >>> "reference" in tokenops.why_not("match", torch.randn(1, 8, 4))
        False
    """
    _checks.check_choice("why_not", "operator", operator, operators)
    leaves = pytree.tree_leaves(args)
    device = next((a.device.type for a in leaves if isinstance(a, Tensor)), "cpu")
    reasons = ((backend, _reason(operator, backend, device)) for backend in BACKENDS)
    return {backend: reason for backend, reason in reasons if reason is not None}
