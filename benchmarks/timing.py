# SPDX-License-Identifier: Apache-2.0
"""Timers for one sample, and the interleaving of rivals that makes samples comparable.

A sample times a fixed number of calls of one rival, right after a few calls that are not timed.
Rivals take turns in an order drawn anew each round, so that whatever else happens on the machine
happens to all of them. On the CPU a sample counts when the operating system did not take the
processor away from it (see :data:`SECONDS_PER_SWITCH`) and had no fresh memory to hand out
(:data:`FAULTS_PER_CALL`).
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

try:
    import resource
except ImportError:  # not a Unix: no sample can be told to be disturbed
    resource = None  # type: ignore[assignment]

Call = Callable[[], Any]

#: An idle system interrupts a running thread a few times per second whatever happens; a sample may
#: be interrupted once per so many seconds of its length. Samples shorter than this: not at all.
#: A competing process interrupts a hundred times per second and more.
SECONDS_PER_SWITCH = 0.05

#: Calls before a sample: caches need more than one to forget what another rival left in them.
SETTLING_CALLS = 3

#: Minor page faults that a call may cause: more, and the time is that of the system's zeroing
#: memory, which depends on what else the allocator holds.
FAULTS_PER_CALL = 16


@dataclass(frozen=True)
class Sample:
    """One timing.

    Attributes:
        seconds: Time of one call.
        clean: Whether nothing took the processor away meanwhile.
        faults: Minor page faults per call: fresh memory that the system had to hand out.
    """

    seconds: float
    clean: bool = True
    faults: float = 0.0


@dataclass(frozen=True)
class Rival:
    """Something to time.

    Attributes:
        call: The work.
        context: Makes the context in which samples are taken, outside of the timing.
    """

    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Policy:
    """How many samples to take.

    Attributes:
        samples: Clean samples wanted of each rival.
        enough: With fewer clean samples than this, statistics are over all samples.
        budget: Seconds after which a case ends whatever it has.
        rounds: Rounds that are run even beyond the budget.
        sample_seconds: Length of a sample; short calls are repeated to fill it.
        warm_up: Seconds of calls before the first sample.
        seed: Seed of the order of rivals.
    """

    samples: int = 40
    enough: int = 5
    budget: float = 60.0
    rounds: int = 3
    sample_seconds: float = 1e-3
    warm_up: float = 0.1
    seed: int = 0


QUICK = Policy(samples=5, enough=2, budget=3.0, rounds=2, sample_seconds=2e-4)
REHEARSAL = Policy(samples=1, enough=1, budget=0.0, rounds=1, sample_seconds=0.0, warm_up=0.0)


@dataclass
class Series:
    """All samples of one rival.

    Attributes:
        calls: Calls per sample.
        enough: With fewer clean samples than this, statistics are over all samples.
    """

    calls: int
    enough: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def clean(self) -> int:
        """Number of clean samples."""
        return sum(sample.clean for sample in self.samples)

    @property
    def used(self) -> str:
        """Which samples the statistics are over: ``"clean"``, or ``"all"`` for want of those."""
        return "clean" if self.clean >= self.enough else "all"

    def seconds(self, quantile: float) -> float:
        """Quantile of the time of one call: 0 is the best sample, 0.5 the median."""
        everything = self.used == "all"
        kept = [s.seconds for s in self.samples if s.clean or everything]
        return torch.tensor(kept, dtype=torch.float64).quantile(quantile).item()

    def faults(self) -> float:
        """Median of the minor page faults per call."""
        return statistics.median(s.faults for s in self.samples)


class Timer(Protocol):
    """Takes samples on one kind of device."""

    def prepare(self, call: Call) -> Call:
        """What to call instead, to time ``call``."""

    def sample(self, call: Call, calls: int) -> Sample:
        """Time so many calls."""


class CpuTimer:
    """Wall-clock time, with the involuntary context switches of all threads of the process."""

    def prepare(self, call: Call) -> Call:
        """Nothing to prepare."""
        return call

    def sample(self, call: Call, calls: int) -> Sample:
        """Time so many calls, after some that settle caches and threads left by another rival."""
        for _ in range(SETTLING_CALLS):
            call()
        before = usage()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds = time.perf_counter() - start
        after = usage()
        switches, faults = after[0] - before[0], (after[1] - before[1]) / calls
        clean = is_clean(switches, seconds) and faults <= FAULTS_PER_CALL
        return Sample(seconds / calls, clean, faults)


class CudaTimer:
    """Time on the device between two events on the current stream.

    Launches that the host issues too slowly leave gaps, which count: that is what a user waits for.
    With ``graph`` each rival is captured once as a CUDA graph and replayed, so that only the
    kernels count.

    Args:
        graph: Whether to capture and replay.
    """

    def __init__(self, graph: bool = False) -> None:
        self.graph = graph

    def prepare(self, call: Call) -> Call:
        """Capture the call as a graph if so asked.

        Raises:
            RuntimeError: If the call does something that a graph can't hold, a synchronization say.
        """
        if not self.graph:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture wants a warm allocator and loaded kernels
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay(keep: Any = kept) -> None:  # the outputs live as long as the graph
            graph.replay()

        return replay

    def sample(self, call: Call, calls: int) -> Sample:
        """Time so many calls back to back, after one that is not timed."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3 / calls)


def is_clean(switches: int, seconds: float) -> bool:
    """Whether a sample of this length with so many involuntary context switches counts."""
    return switches <= int(seconds / SECONDS_PER_SWITCH)


def interleave(
    rivals: Mapping[str, Rival],
    timer: Timer,
    policy: Policy,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Series]:
    """Sample all rivals in turns until each has enough clean samples or the time is up.

    Args:
        rivals: What to time, by name; already warm.
        timer: Takes the samples.
        policy: How many samples.
        progress: Called after each round with the fewest clean samples so far and those wanted.
        clock: Source of time for the budget.

    Returns:
        The samples of each rival. All rivals have the same number of them.
    """
    order = random.Random(policy.seed)
    names = list(rivals)
    end = clock() + policy.budget
    series = {}
    for name in names:
        with rivals[name].context():
            calls = _calls_per_sample(rivals[name].call, timer, policy.sample_seconds)
        series[name] = Series(calls, policy.enough)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        rounds = 0
        while True:
            order.shuffle(names)
            for name in names:
                with rivals[name].context():
                    series[name].samples.append(timer.sample(rivals[name].call, series[name].calls))
            rounds += 1
            fewest = min(s.clean for s in series.values())
            if progress is not None:
                progress(min(fewest, policy.samples), policy.samples)
            if fewest >= policy.samples:
                break
            if clock() > end and rounds >= policy.rounds:
                break
    finally:
        if collecting:
            gc.enable()
    return series


def _calls_per_sample(call: Call, timer: Timer, seconds: float) -> int:
    """Repetitions that fill a sample, from the best of a few trials."""
    one = min(timer.sample(call, 1).seconds for _ in range(3))
    if one >= seconds:
        return 1
    few = max(1, int(0.2 * seconds / max(one, 1e-9)))
    one = min(timer.sample(call, few).seconds for _ in range(3))
    return max(1, round(seconds / max(one, 1e-9)))


def usage() -> tuple[int, int]:
    """Involuntary context switches and minor page faults of this process so far."""
    if resource is None:
        return 0, 0
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_nivcsw, now.ru_minflt
