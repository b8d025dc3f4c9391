# SPDX-License-Identifier: Apache-2.0
"""Time and memory of rivals that do the same work, on a shared machine."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Silence messages of the profiler and the allocator; torch reads these when it loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch.profiler import ProfilerActivity, profile

#: An idle system interrupts a running thread a few times per second, a competing process a hundred
#: times and more.
INTERRUPTIONS_PER_SECOND = 20


class Sample(NamedTuple):
    """One run: its time, and the number of interruptions by other processes."""

    seconds: float
    interruptions: int

    @property
    def clean(self) -> bool:
        """Whether the run had the cores to itself."""
        return self.interruptions <= self.seconds * INTERRUPTIONS_PER_SECOND


def time_once(run: Callable[[], object], device: torch.device) -> Sample:
    synchronize(device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return Sample(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before)


def interleave(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    tick: Callable[[], object],
) -> dict[str, list[Sample]]:
    """Run each rival ``repeats`` times in turns; each round begins with another rival."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    names = list(runs)
    for round_ in range(repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(time_once(runs[name], device))
            tick()
    return samples


def undisturbed(samples: list[Sample]) -> list[Sample]:
    """The clean samples, or the third with the fewest interruptions if this is larger."""
    by_quiet = sorted(samples, key=lambda sample: sample.interruptions)
    clean = sum(sample.clean for sample in samples)
    return by_quiet[: max(clean, (len(samples) + 2) // 3)]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory of the tensors of ``run``, without tensors that existed before.

    CUDA's allocator counts it; on a CPU, PyTorch's profiler records each allocation. Internal
    allocations of libraries are in neither figure.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda at_and_bytes: at_and_bytes[0]):
        now += change
        peak = max(peak, now)
    return peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
