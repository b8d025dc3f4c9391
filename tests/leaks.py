# SPDX-License-Identifier: Apache-2.0
"""Counts the memory that calls of operators do not free, in a separate process.

    python tests/leaks.py                     # every operator, forward and backward
    python tests/leaks.py --calls 50 merge    # fewer calls, of some operators

Prints the bytes that each call leaves allocated and exits with 1 if the calls of an operator leave
more than 4 KB together. ``control`` is a call that leaks, to check the count. In a process with
LeakSanitizer (``make sanitize``), LeakSanitizer reports where leaked memory was allocated instead.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tokenops import _library
from tokenops.testing.samples import samples

#: Bytes that all calls of an operator together may leave allocated, for example in a cache.
ALLOWED = 4096
#: The case that leaks, which runs only on request.
CONTROL = "control"

_process = ctypes.CDLL(None)
_sanitized = hasattr(_process, "__lsan_do_recoverable_leak_check")


class Usage(ctypes.Structure):
    """The struct that ``mallinfo2`` of glibc returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


_process.mallinfo2.restype = Usage
_process.malloc.restype = ctypes.c_void_p
_process.malloc.argtypes = [ctypes.c_size_t]


def bytes_in_use() -> int:
    """Allocated bytes, in small and large blocks."""
    gc.collect()
    usage = _process.mallinfo2()
    return usage.uordblks + usage.hblkhd


@contextmanager
def watched() -> Iterator[None]:
    """Context in which LeakSanitizer, if present, tracks allocations."""
    if _sanitized:
        _process.__lsan_enable()
    try:
        yield
    finally:
        if _sanitized:
            _process.__lsan_disable()


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """For each operator, a call with as many tensors as possible; and a call that raises an error.

    Gradients are taken for all tensors that can have one.
    """
    kinds: dict[str, tuple[int, Any, Any]] = {}
    for name, _, arguments in samples():
        operator = getattr(torch.ops.tokenops, name)
        count = sum(isinstance(a, torch.Tensor) for a in pytree.tree_leaves(arguments))
        if name not in kinds or count > kinds[name][0]:
            kinds[name] = count, operator, arguments
    for name in _library.defined:
        _, operator, arguments = kinds[name]
        yield name, forward_and_backward(operator, arguments)

    merge, arguments = kinds["merge"][1:]

    def refused() -> None:
        try:
            merge(*arguments[:-1], "median")
        except (RuntimeError, ValueError):
            return
        raise AssertionError("merge takes reduce='median'")

    yield "merge, refused", refused


def lose() -> None:
    """Leak 40 bytes, for which glibc allocates 48."""
    _process.malloc(40)


def forward_and_backward(operator: Any, arguments: Any) -> Callable[[], Any]:
    """Make a call of an operator and, if its results have gradients, of its backward."""
    inputs = [a for a in pytree.tree_leaves(arguments) if getattr(a, "requires_grad", False)]
    grads = [torch.ones_like(t) for t in differentiable(operator(*arguments))]

    def call() -> None:
        outputs = differentiable(operator(*arguments))
        if outputs:
            torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    return call


def differentiable(results: Any) -> list[torch.Tensor]:
    """The differentiable results of an operator."""
    return [t for t in pytree.tree_leaves(results) if t.requires_grad]


def main(arguments: list[str] | None = None) -> int:
    """Count allocated bytes; return 1 if a call leaks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("operators", nargs="*", help="all by default")
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    status = 0
    if _sanitized:
        _process.__lsan_disable()
    if options.operators == [CONTROL]:
        chosen = [(CONTROL, lose)]
    else:
        chosen = [
            (name, call)
            for name, call in calls()
            if not options.operators or name in options.operators
        ]
    for name, call in chosen:
        for _ in range(options.calls // 20 + 1):  # fill the caches
            call()
        before = bytes_in_use()
        with watched():
            for _ in range(options.calls):
                call()
        lost = bytes_in_use() - before
        print(f"{name}: {max(0, lost) // options.calls} bytes a call, {lost} in all", flush=True)
        status |= lost > ALLOWED
    if _sanitized:
        status |= _process.__lsan_do_recoverable_leak_check() != 0
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # memory that the interpreter does not free at exit is not a leak
