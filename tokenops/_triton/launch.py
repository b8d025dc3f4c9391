# SPDX-License-Identifier: Apache-2.0
"""Launching Triton kernels with little work on the host."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from . import VERIFIED, release

#: Whether Triton interprets kernels as Python functions (``TRITON_INTERPRET=1``).
interpreting: bool = bool(triton.knobs.runtime.interpret)

#: Alignment in bytes that Triton specializes on: it reads aligned pointers in whole vectors.
ALIGNMENT = 16

#: Version of Triton: ``"3.7.1"``.
VERSION = release(triton.__version__)

#: Whether Triton is older than 3.7, whose compiler needs fewer registers for some tiles.
BEFORE_3_7: bool = tuple(map(int, VERSION.split(".")[:2])) < (3, 7)

#: Errors that a launcher raises for arguments that it does not take, before it calls the driver.
#: Errors of the driver are RuntimeErrors, after which a launch is not repeated.
_REFUSALS = (TypeError, AttributeError, ValueError)

#: Whether prepared launches go straight to the driver; False after the first refusal.
_direct = not interpreting and torch.version.hip is None and VERSION in VERIFIED

#: Functions that pick settings, by name.
heuristics: dict[str, Callable[..., Settings]] = {}
#: Caches of :func:`planned` functions.
plans: list[Any] = []

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Settings:
    """Launch settings of a kernel, named as ``triton.Config`` names them.

    Attributes:
        block_m: Rows of a tile, or of the output that a program writes.
        block_n: Columns of a tile: keys, candidates or channels at a time.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline of its loop.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


def planned(function: Function) -> Function:
    """Cache the results of a function of shapes, dtypes, layouts and devices."""
    kept = functools.lru_cache(maxsize=1024)(function)
    plans.append(kept)
    return kept  # type: ignore[return-value]


def heuristic(function: Callable[..., Settings]) -> Callable[..., Settings]:
    """Register a function that picks settings, so that ``heuristics`` can replace it by name."""
    name = function.__name__.strip("_")

    @functools.wraps(function)
    def pick(*arguments: Any) -> Settings:
        return heuristics[name](*arguments)

    heuristics[name] = function
    return pick


class Launch:
    """A kernel with its grid, numbers and settings: everything in a call except the tensors.

    The kernel's parameters are tensors (or None) first, then ``numbers``, then ``constants``, which
    are its ``tl.constexpr`` parameters in the order of their definition. One ``Launch`` serves all
    calls of one shape, dtype, layout and device: the first call compiles. Under a verified version
    of Triton the later calls go straight to the driver. Under any other version, and after a direct
    launch was refused, all calls go through Triton's own launcher.

    Args:
        kernel: A function under ``triton.jit``.
        grid: Programs along up to three axes; where one is 0, nothing is launched.
        numbers: Integers and floats that the kernel takes.
        settings: Warps and stages; block sizes that the kernel takes are among the constants.
        constants: The ``tl.constexpr`` parameters by name.
    """

    __slots__ = ("_ready", "_tail", "constants", "grid", "kernel", "numbers", "settings")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...],
        settings: Settings,
        **constants: Any,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.numbers = numbers
        self.settings = settings
        self.constants = constants
        # By the dtype of each tensor, or None without a tensor: each has its own compiled code.
        self._ready: dict[tuple[torch.dtype | None, ...], tuple[Any, ...]] = {}
        self._tail = (*numbers, *constants.values())

    def __call__(self, *tensors: Tensor | None) -> None:
        """Run on the current stream; the tensors' device must be the current one."""
        if 0 in self.grid:
            return
        kinds = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        ready = self._ready.get(kinds)
        refusal: Exception | None = None
        if ready is not None and _direct and not _profiled():
            bits = 0
            for tensor in tensors:
                if tensor is not None:
                    bits |= tensor.data_ptr()
            if bits % ALIGNMENT == 0:
                run, function, metadata, stream, device = ready
                try:
                    run(*self.grid, stream(device), function, metadata, None, None, None,
                        *tensors, *self._tail)  # fmt: skip
                    return
                except _REFUSALS as error:
                    refusal = error
        compiled = self.kernel[self.grid](
            *tensors,
            *self.numbers,
            **self.constants,
            num_warps=self.settings.num_warps,
            num_stages=self.settings.num_stages,
        )
        if refusal is None and _direct and all(_aligned(tensor) for tensor in tensors):
            try:
                self._ready[kinds] = _prepare(compiled)
            except _REFUSALS as error:
                refusal = error
        if refusal is not None:  # Triton's own launcher took the same arguments
            _give_up(self.kernel.__name__, refusal)


def _aligned(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.data_ptr() % ALIGNMENT == 0


def _prepare(compiled: Any) -> tuple[Any, ...]:
    """Return the arguments of a direct launch of compiled code on the current device."""
    driver = triton.runtime.driver.active
    device, stream = driver.get_current_device(), driver.get_current_stream
    return compiled.run, compiled.function, compiled.packed_metadata, stream, device


def _give_up(kernel: str, refusal: Exception) -> None:
    """Send all launches through Triton's own launcher from now on, and say why."""
    global _direct
    _direct = False
    warnings.warn(
        f"{kernel}: Triton {triton.__version__} refused a direct launch "
        f"({type(refusal).__name__}: {refusal}); from now on all launches go through Triton's own "
        "launcher, which takes more host time",
        RuntimeWarning,
        stacklevel=3,
    )


def _profiled() -> bool:
    """Whether a profiler has set a launch hook, which only Triton's own launcher calls in full."""
    hook = triton.knobs.runtime.launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


@functools.cache
def device_arch(device: torch.device) -> str:
    """Architecture of a device as compilers name it: ``"sm_90"``, ``"gfx942"``."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def arch(tensor: Tensor) -> str:
    """Architecture of a tensor's device; ``"sm_90"`` where it is not a GPU."""
    return device_arch(tensor.device)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << (number - 1).bit_length() if number > 1 else 1)


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
