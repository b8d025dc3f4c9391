# SPDX-License-Identifier: Apache-2.0
"""Search faster launch settings on the GPU at hand: ``python -m benchmarks.tune --op match``.

For each case, and each heuristic that picks settings in it, a walk from the shipped settings: all
neighbours, which halve or double one number, are timed, and the fastest is the next position, until
none is faster by a percent. Prints the settings that it finds; they go into the table of settings
in the kernels' module.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch

from tokenops._triton import launch
from tokenops._triton.launch import Settings

from .cases import DTYPES, Case
from .registry import operators, select
from .timing import event_timer

#: Least and largest value of each number.
LIMITS = {"block_m": (1, 256), "block_n": (16, 256), "num_warps": (1, 16), "num_stages": (1, 6)}

#: Settings must take at most this share of the time of the ones that they replace.
GAIN = 0.99

Heuristic = Callable[..., Settings]


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Settings that differ in one number, by a factor of two; num_stages by one."""
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for other in near:
            if low <= other <= high:
                yield replace(settings, **{name: other})


def walk(start: Settings, time: Callable[[Settings], float]) -> tuple[Settings, float, float]:
    """The fastest settings found from a start, their time and the time of the start."""
    times = {start: time(start)}
    best = start
    while True:
        for candidate in neighbours(best):
            if candidate not in times:
                times[candidate] = time(candidate)
        fastest = min(times, key=times.__getitem__)
        if times[fastest] >= GAIN * times[best]:
            return best, times[best], times[start]
        best = fastest


@contextmanager
def replaced(heuristics: dict[str, Heuristic]) -> Iterator[None]:
    """Replace heuristics by name; launches are planned again before and after."""
    with mock.patch.dict(launch.heuristics, heuristics), ExitStack() as after:
        for cache in launch.plans:
            cache.cache_clear()
            after.callback(cache.cache_clear)
        yield


def tune(case: Case, dtype: str) -> Iterator[str]:
    """For each heuristic of a case, a line with the shipped settings and faster ones."""
    work = case.prepare(DTYPES[dtype], torch.device("cuda"))
    with torch.inference_mode(work.inference):
        call = work.make("tokenops")
        expected = call()  # the first call imports the kernels and their heuristics
        watched = {name: mock.Mock(wraps=h) for name, h in launch.heuristics.items()}
        with replaced(watched):
            call()
        for name, heuristic in watched.items():
            if not heuristic.called:
                continue

            def time(settings: Settings, name: str = name) -> float:
                try:
                    with replaced({name: lambda *arguments: settings}):
                        result = call()
                        if not abs(work.difference("tokenops", result, expected)) <= work.tolerance:
                            return float("inf")
                        return event_timer(call, 1e-3)().seconds
                except Exception:  # the kernel has no such tiles, or they need too much memory
                    return float("inf")

            shipped = launch.heuristics[name](*heuristic.call_args.args)
            best, seconds, before = walk(shipped, time)
            line = f"{case.operator} {case.name} {dtype} {name}: {shipped} {before * 1e6:.1f} us"
            yield line + ("" if best == shipped else f" -> {best} {seconds * 1e6:.1f} us")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=operators(), default=[], metavar="OP")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune: torch sees no CUDA device")
    for case in select(options.op, options.case, "cuda"):
        for line in tune(case, options.dtype):
            print(line, flush=True)


if __name__ == "__main__":
    main()
