# SPDX-License-Identifier: Apache-2.0
"""Search better launch settings on the GPU at hand: ``python -m benchmarks.tune --op match``.

For each case and each heuristic that picks its settings, a hill climb from the shipped settings: of
all neighbours, which halve or double one number, it takes the fastest until none is faster by a
percent. It prints the settings; they go into the heuristic's table in the kernels' module.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from tokenops._triton import launch
from tokenops._triton.launch import Settings

from .cases import DTYPES, Case
from .registry import operators, select
from .timing import CudaTimer

#: Bounds of each number, and whether it doubles or counts.
LIMITS = {"block_m": (1, 256), "block_n": (16, 256), "num_warps": (1, 16), "num_stages": (1, 6)}

#: A setting has to be so much faster to take another's place.
GAIN = 0.99

Time = Callable[[Settings], float]


def neighbours(settings: Settings) -> Iterator[Settings]:
    """Settings that differ in one number, by a factor of two; num_stages by one."""
    for name, (low, high) in LIMITS.items():
        value = getattr(settings, name)
        near = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for other in near:
            if low <= other <= high:
                yield replace(settings, **{name: other})


def walk(start: Settings, time: Time) -> tuple[Settings, float, float]:
    """The best settings found from a start, their time and that of the start."""
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


@contextlib.contextmanager
def watch() -> Iterator[dict[str, Settings]]:
    """Note what each heuristic picks."""
    chosen: dict[str, Settings] = {}
    original = dict(launch.heuristics)

    def watched(name: str) -> Callable[..., Settings]:
        def heuristic(*arguments: Any) -> Settings:
            chosen[name] = original[name](*arguments)
            return chosen[name]

        return heuristic

    launch.heuristics.update({name: watched(name) for name in original})
    launch.forget_plans()
    try:
        yield chosen
    finally:
        launch.heuristics.update(original)


def tune(case: Case, dtype: str) -> list[str]:
    """Lines about what was found for a case."""
    device = torch.device("cuda")
    work = case.prepare(DTYPES[dtype], device)
    timer = CudaTimer()
    lines = []
    with torch.inference_mode(work.inference):
        call = work.rivals["tokenops"]().call
        with watch() as chosen:
            expected = call()
        for name, shipped in chosen.items():

            def time(settings: Settings, name: str = name) -> float:
                try:
                    with launch.use_settings(name, settings):
                        result = call()
                        if not abs(work.difference("tokenops", result, expected)) <= work.tolerance:
                            return float("inf")
                        return min(timer.sample(call, 10).seconds for _ in range(5))
                except Exception:  # tiles that no kernel of this kind can have, or no room for them
                    return float("inf")

            best, seconds, before = walk(shipped, time)
            lines.append(
                f"{case.operator} {case.name} {dtype} {name}: {shipped} {before * 1e6:.1f} us"
                + ("" if best == shipped else f" -> {best} {seconds * 1e6:.1f} us")
            )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Tune what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=operators(), default=[], metavar="OP")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.tune: torch sees no CUDA device")
    for case in select(options.op, options.case, "cuda"):
        for dtype in options.dtype:
            for line in tune(case, dtype):
                print(line, flush=True)


if __name__ == "__main__":
    main()
