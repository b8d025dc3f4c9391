# SPDX-License-Identifier: Apache-2.0
"""What this installation can do: ``python -m tokenops.info``."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

import torch

from . import __version__, _backend, _choice, _library, _missing, _native
from ._triton import VERIFIED, release


def report() -> str:
    """Describe versions, hardware, the compiled library, and which backend serves what.

    Returns:
        Lines of text. Reads the state of the process and of the devices; changes nothing.
    """
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield f"tokenops {__version__}"
    system = f"{platform.system()} {platform.machine()}"
    yield f"  python           {platform.python_version()} on {system}"
    yield f"  torch            {torch.__version__} ({torch.get_num_threads()} threads)"
    yield f"  triton           {_triton()}"
    yield f"  CUDA             {_cuda()}"
    if _native.loaded:
        yield f"  compiled library {_native.path}"
        build = _native.build_info()
        if build.get("compiler"):
            yield f"  built with       {build['compiler']}, {build['flags']}"
        if build.get("no_cuda"):
            yield f"  CUDA kernels     none: {build['no_cuda']}"
    else:
        yield f"  compiled library none: {_native.reason}"
    inspect = _native.inspect()
    if inspect is not None:
        features = inspect.cpu_features()
        present = " ".join(name for name, there in features.items() if there)
        yield f"  CPU              {present or 'no vector extension known'}"
    if _native.isa:
        yield f"  instruction set  {_native.isa}"
    if _backend.aside:
        names = ", ".join(sorted(_backend.aside))
        yield f"  step aside       {names} (composed is faster at this level)"
    chosen = _choice.chosen() or "the best one for the tensors' device"
    yield f"  chosen backend   {chosen}"
    for device in _devices():
        yield f"operators on {device}"
        if missing := _missing.advice(device):
            yield f"  plain PyTorch serves: {missing}"
        for operator in _library.operators:
            reasons = _backend.why_not(operator, torch.empty(0, device=device))
            serving = [b for b in _choice.BACKENDS if b not in reasons]
            if device == "cpu" and operator in _backend.aside:
                serving.sort(key="composed".__ne__)
            yield f"  {operator:<16} {', '.join(serving)}"
            for backend, reason in reasons.items():
                yield f"  {'':<16}   not {backend}: {reason}"
    if inspect is not None and _native.build_info().get("built") == "cuda":
        yield from _kernels(inspect)


def _devices() -> list[str]:
    """The CPU and, where one is available, the accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _kernels(inspect: ModuleType) -> Iterator[str]:
    yield "compiled CUDA kernels (threads and shared bytes of a block)"
    try:
        kernels = inspect.cuda_kernels(_native.path)
    except RuntimeError as error:
        yield f"  unknown: {error}"
        return
    for kernel in kernels:
        line = "{name:<36} {threads:>4} threads {shared_bytes:>6} shared {registers:>3} registers"
        line += "{blocks:>3} blocks per multiprocessor"
        yield "  " + line.format(**kernel)


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "installed, version unknown"


def _triton() -> str:
    version = _version("triton")
    if not version[:1].isdigit() or release(version) in VERIFIED:
        return version
    return f"{version} (not verified, so launches are slower; verified: {', '.join(VERIFIED)})"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no device"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}, " + ", ".join(names)


if __name__ == "__main__":
    print(report())
