# SPDX-License-Identifier: Apache-2.0
"""Records launches of Triton kernels instead of making them, and compiles them without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from tokenops._triton import launch
from tokenops._triton.launch import ALIGNMENT, Launch


class Recorded(NamedTuple):
    launch: Launch
    tensors: tuple[Tensor | None, ...]


@contextmanager
def record(arch: str) -> Iterator[list[Recorded]]:
    """Record launches as for a GPU of this architecture; tensors may be on ``meta``."""
    recorded: list[Recorded] = []

    def call(self: Launch, *tensors: Tensor | None) -> None:
        if 0 not in self.grid:
            recorded.append(Recorded(self, tensors))

    with (
        mock.patch.object(Launch, "__call__", call),
        mock.patch.object(launch, "device_arch", return_value=arch),
    ):
        yield recorded


class Resources(NamedTuple):
    registers: int  # of a thread
    stack: int  # bytes of a thread, spilled registers included
    spills: int  # instructions that load from or store to the stack
    shared: int  # bytes of shared memory of a program


class Source(NamedTuple):
    """Input of Triton's compiler: launches with equal sources run the same code."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


def source(recorded: Recorded) -> Source:
    """Describe a launch to the compiler as Triton does when the kernel is first called.

    An integer 1 becomes a constant. Pointers, and integers that 16 divides, are marked as aligned.
    """
    made, names = recorded.launch, recorded.launch.kernel.arg_names
    values = (*recorded.tensors, *made.numbers, *made.constants.values())
    if len(values) != len(names) or [*made.constants] != names[-len(made.constants) :]:
        raise ValueError(f"{made.kernel.__name__}: parameters {names} for {made.constants}")
    options = {name: getattr(made.settings, name) for name in ("num_warps", "num_stages")}
    found = Source({}, {}, {}, options)
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None or name in made.constants or (type(value) is int and value == 1):
            found.signature[name], found.constants[name] = "constexpr", value
            continue
        found.signature[name] = mangle_type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % ALIGNMENT == 0):
            found.attributes[(index,)] = [["tt.divisibility", ALIGNMENT]]
    return found


def compile_launch(recorded: Recorded, arch: str) -> Any:
    """Compile a recorded launch for an architecture such as ``"sm_90"``."""
    s = source(recorded)
    tree = ASTSource(recorded.launch.kernel, s.signature, s.constants, s.attributes)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(tree, target=target, options=s.options)


def resources(compiled: Any) -> Resources:
    """Registers, stack, spills and shared memory of a kernel compiled for CUDA."""
    usage = _cuobjdump(compiled, "-res-usage")
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    spills = 0
    if stack > 0:  # without a stack there are no spills; disassembling is slower than compiling
        spills = sum(1 for line in sass(compiled) if re.match(r"(@!?U?P\d+ )?(LDL|STL)\b", line))
    return Resources(registers, stack, spills, int(compiled.metadata.shared))


def sass(compiled: Any) -> list[str]:
    """Machine instructions of a kernel compiled for CUDA, in order."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;/]+);", _cuobjdump(compiled, "-sass"))
    return [text.strip() for text in found]


def _cuobjdump(compiled: Any, option: str) -> str:
    """Output of the disassembler that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
