# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels ahead of time, for devices that need not be there, and what they then use."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import ALIGNMENT, Recorded

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a device.

    Attributes:
        registers: Registers of a thread.
        stack: Bytes of a thread's stack, spilled registers included.
        spills: Instructions that access that stack.
        shared: Bytes of shared memory of a program.
    """

    registers: int
    stack: int
    spills: int
    shared: int


def target(arch: str) -> GPUTarget:
    """Triton's name of an architecture such as ``"sm_90"`` or ``"gfx942"``."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Source:
    """What the compiler makes a launch's code from; launches that agree in it share the code."""

    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]


def source(recorded: Recorded) -> Source:
    """Describe a launch as Triton does at its first call.

    Integers of 1 become constants, and pointers and integers that 16 divides are known to be so.
    """
    launch = recorded.launch
    names = launch.kernel.arg_names
    values = (*recorded.tensors, *launch.numbers, *launch.constants.values())
    if len(values) != len(names) or [*launch.constants] != names[-len(launch.constants) :]:
        raise ValueError(f"{launch.kernel.__name__}: parameters {names} for {launch.constants}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None or name in launch.constants or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % ALIGNMENT == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", ALIGNMENT]]
    options = {"num_warps": launch.settings.num_warps, "num_stages": launch.settings.num_stages}
    return Source(signature, constants, attributes, options)


def compile_launch(recorded: Recorded, arch: str) -> Any:
    """Compile a recorded launch as its first call would, for a device of the given kind."""
    s = source(recorded)
    tree = ASTSource(recorded.launch.kernel, s.signature, s.constants, s.attributes)
    return triton.compile(tree, target=target(arch), options=s.options)


def resources(compiled: Any) -> Resources:
    """Registers, stack, spills and shared memory of a kernel that was compiled for CUDA."""
    usage = _cuobjdump(compiled, "-res-usage")
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK"))
    spills = 0
    if stack > 0:  # where else would they go; disassembling takes longer than compiling
        spills = sum(1 for line in sass(compiled) if re.match(r"(@!?U?P\d+ )?(LDL|STL)\b", line))
    return Resources(registers, stack, spills, int(compiled.metadata.shared))


def sass(compiled: Any) -> list[str]:
    """The machine instructions of a kernel that was compiled for CUDA, in their order."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", _cuobjdump(compiled, "-sass"))
    return [text.strip() for _, text in found]


def _cuobjdump(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run(
            [_tool(), option, file.name], check=True, capture_output=True, text=True
        ).stdout


@functools.cache
def _tool() -> str:
    """The disassembler that comes with Triton."""
    folder = os.path.dirname(triton.__file__)
    return os.path.join(folder, "backends", "nvidia", "bin", "cuobjdump")
