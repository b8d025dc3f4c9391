# SPDX-License-Identifier: Apache-2.0
"""Counts the memory that calls of operators do not give back, in a process of its own.

    python tests/leaks.py                     # every operator, forward and backward
    python tests/leaks.py --calls 50 merge    # fewer calls, of some operators

Prints the bytes that each call leaves allocated and exits with 1 if there are any. In a process
with LeakSanitizer (``make sanitize``) that tells where lost memory was allocated instead.
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
from ops.test_registration import kinds_of_arguments
from torch.utils import _pytree as pytree

from tokenops import _library

_process = ctypes.CDLL(None)
_sanitized = hasattr(_process, "__lsan_do_recoverable_leak_check")


class Usage(ctypes.Structure):
    """What ``mallinfo2`` of glibc returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    )  # fmt: skip


_process.mallinfo2.restype = Usage


def bytes_in_use() -> int:
    """Bytes that were allocated and not freed, small and large ones."""
    gc.collect()
    usage = _process.mallinfo2()
    return usage.uordblks + usage.hblkhd


@contextmanager
def watched() -> Iterator[None]:
    """LeakSanitizer, where it is there, looks at what is allocated meanwhile."""
    if _sanitized:
        _process.__lsan_enable()
    try:
        yield
    finally:
        if _sanitized:
            _process.__lsan_disable()


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """For each operator its name and a call with as many tensors as it can have, and a wrong one.

    Gradients are taken for all tensors that can have one.
    """
    kinds: dict[str, tuple[int, Any, Any]] = {}
    for operator, arguments, _ in kinds_of_arguments():
        name = operator.default.name().partition("::")[2].partition(".")[0]
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


def forward_and_backward(operator: Any, arguments: Any) -> Callable[[], Any]:
    """A call of an operator and, where its result has gradients, of its backward."""
    inputs = [a for a in pytree.tree_leaves(arguments) if getattr(a, "requires_grad", False)]
    grads = [torch.ones_like(t) for t in differentiable(operator(*arguments))]

    def call() -> None:
        outputs = differentiable(operator(*arguments))
        if outputs:
            torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

    return call


def differentiable(results: Any) -> list[torch.Tensor]:
    """Those of an operator's results that gradients come back through."""
    return [t for t in pytree.tree_leaves(results) if t.requires_grad]


def main(arguments: list[str] | None = None) -> int:
    """Count; 1 if memory is lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("operators", nargs="*", help="all by default")
    parser.add_argument("--calls", type=int, default=20_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    status = 0
    if _sanitized:
        _process.__lsan_disable()
    for name, call in calls():
        if options.operators and name not in options.operators:
            continue
        for _ in range(options.calls // 20 + 1):  # caches are filled
            call()
        before = bytes_in_use()
        with watched():
            for _ in range(options.calls):
                call()
        # The shortest allocation has many bytes: less than one a call is not lost by each call.
        lost = int((bytes_in_use() - before) / options.calls)
        print(f"{name}: {lost} bytes a call", flush=True)
        status |= lost > 0
    if _sanitized:
        status |= _process.__lsan_do_recoverable_leak_check() != 0
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # what the interpreter leaves behind at its end is no leak of a call
