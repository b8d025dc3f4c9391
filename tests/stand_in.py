# SPDX-License-Identifier: Apache-2.0
"""Launches on Triton's real launcher without a GPU: ``python tests/stand_in.py FOLDER``.

A stand-in for libcuda.so.1, compiled into the folder, records the arguments of launches. Each
launch of a few calls is made twice, by Triton's own launcher and directly, and both must be equal.
Errors of the driver must be raised, and after a refused launch Triton's own launcher must be used.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks import launches
from benchmarks.ahead_of_time import Recorded, record, source
from benchmarks.gpu.prefill import use_stand_in
from benchmarks.gpu_cache import build_stand_in
from tokenops._triton import launch

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests" / "cpp" / "kept_launches.c"

#: Launches with and without missing tensors, with one to three axes, with integers that are 1,
#: multiples of 16 or neither, with floats, and with shared memory.
CASES = ("attention size bf16 N197 D64", "nearest bf16 D64", "merge sum factors f16 C768 B1024")

_SIZES = {"i32": 4, "i64": 8, "fp32": 4}


class Stand:
    """The stand-in, loaded before Triton loads libcuda, and Triton's driver that uses it."""

    def __init__(self, folder: Path) -> None:
        library = build_stand_in(folder, KEPT)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
        self._library = ctypes.CDLL(str(library))
        self._kept = self._library.kept_launches
        self._kept.restype = ctypes.POINTER(ctypes.c_uint64 * 75)
        use_stand_in(library)
        triton.runtime.driver.active.get_current_stream = lambda device: 0xABC0

    def expect(self, sizes: list[int], error: int = 0) -> None:
        """Set the bytes of each parameter of the next launch, and its result."""
        self._library.expect_launches(len(sizes), (ctypes.c_int * len(sizes))(*sizes), error)

    @property
    def launches(self) -> int:
        """Number of launches so far, refused ones included."""
        return int(self._kept().contents[0])

    def last(self) -> list[int]:
        """Grid, block, shared memory, attributes, stream, function and parameters."""
        return list(self._kept().contents)[1:]


def sizes(item: Recorded) -> list[int]:
    """Bytes of each parameter of a recorded launch, the two scratch pointers last."""
    signature = source(item).signature.values()
    return [8 if s[0] == "*" else _SIZES[s] for s in signature if s != "constexpr"] + [8, 8]


def recorded() -> list[tuple[Recorded, list[Any]]]:
    """Launches of the cases, with real tensors, because launches pass their addresses."""
    found = []
    for case in CASES:
        with record("sm_90") as items:
            launches.cases()[case]()
        for item in items:
            tensors = [None if t is None else torch.empty(64, dtype=t.dtype) for t in item.tensors]
            found.append((item, tensors))
    return found


def check_same(stand: Stand, item: Recorded, tensors: list[Any]) -> None:
    """Check that Triton's own launcher and a direct launch pass the same arguments."""
    seen = []
    for _ in range(2):
        before = stand.launches
        stand.expect(sizes(item))
        item.launch(*tensors)
        assert stand.launches == before + 1
        seen.append(stand.last())
        assert len(item.launch._ready) == 1  # the second launch is direct
    assert seen[0] == seen[1], f"{item.launch.kernel.__name__}: {seen}"
    pointers = [t.data_ptr() for t in tensors if t is not None]
    assert [p for p in seen[1] if p in pointers], "no tensor reached the driver"


def check_errors(stand: Stand, item: Recorded, tensors: list[Any]) -> None:
    """Check that an error of the driver is raised, after one launch and without a warning."""
    before = stand.launches
    stand.expect(sizes(item), error=700)
    with pytest.raises(RuntimeError, match="an error of the stand-in"):
        item.launch(*tensors)
    assert stand.launches == before + 1
    assert launch._direct


def check_refusal(stand: Stand, item: Recorded, tensors: list[Any]) -> None:
    """Check a launcher with other arguments: one launch by Triton's launcher, and one warning."""
    ((kinds, ready),) = item.launch._ready.items()
    stand.expect(sizes(item))
    item.launch(*tensors)
    expected = stand.last()

    def changed(grid: int, *, stream: int) -> None:
        raise AssertionError("not reached")

    item.launch._ready[kinds] = (changed, *ready[1:])
    before = stand.launches
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            item.launch(*tensors)
    assert stand.launches == before + 2
    assert stand.last() == expected
    (warning,) = caught
    assert issubclass(warning.category, RuntimeWarning)
    assert triton.__version__ in str(warning.message)
    assert "TypeError" in str(warning.message)
    assert not launch._direct


def main() -> None:
    stand = Stand(Path(sys.argv[1]))
    launch._direct = True  # also under a version that is not verified
    found = recorded()
    for item, tensors in found:
        check_same(stand, item, tensors)
    check_errors(stand, *found[0])
    check_refusal(stand, *found[0])
    print(f"{len(found)} launches agree")


if __name__ == "__main__":
    main()
