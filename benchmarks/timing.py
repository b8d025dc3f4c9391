# SPDX-License-Identifier: Apache-2.0
"""Time rivals in turns: by torch.utils.benchmark on the CPU, by triton.testing on CUDA devices.

A sample is the time of a few calls of one rival. Rivals take turns in an order that is drawn anew
each round, so that other work on the machine disturbs all of them alike. A sample on the CPU counts
only if the system did not take the processor away during it and handed out no fresh memory.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.benchmark

try:
    import resource
except ImportError:  # not a Unix: every sample counts as clean
    resource = None

#: An idle system interrupts a running thread a few times per second, a competing process a hundred
#: times. A sample may be interrupted once per so many seconds of its length.
SECONDS_PER_SWITCH = 0.05

#: A call may cause so many minor page faults. With more, its time is that of the system zeroing
#: memory, which depends on the state of the allocator.
FAULTS_PER_CALL = 16


@dataclass(frozen=True)
class Sample:
    seconds: float  # of one call
    clean: bool = True  # whether the sample was undisturbed
    faults: float = 0.0  # minor page faults per call
    calls: int = 1  # calls that were timed together


Call = Callable[[], Any]
Sampler = Callable[[], Sample]
#: Makes the sampler of a call from the length of a sample in seconds.
Timer = Callable[[Call, float], Sampler]


@dataclass(frozen=True)
class Policy:
    """How many samples to take."""

    samples: int = 40  # clean samples wanted of each rival
    enough: int = 5  # with fewer clean samples, statistics are over all samples
    budget: float = 60.0  # seconds after which a case ends
    rounds: int = 3  # rounds that run even beyond the budget
    sample_seconds: float = 1e-3  # length of a sample: short calls are repeated
    warm_up: float = 0.1  # seconds of calls before the first sample
    seed: int = 0  # of the order of rivals


QUICK = Policy(samples=5, enough=2, budget=3.0, rounds=2, sample_seconds=2e-4)
REHEARSAL = Policy(samples=1, enough=1, budget=0.0, rounds=1, sample_seconds=0.0, warm_up=0.0)


@dataclass
class Series:
    """All samples of one rival."""

    enough: int  # as in Policy
    samples: list[Sample] = field(default_factory=list)

    @property
    def clean(self) -> int:
        return sum(sample.clean for sample in self.samples)

    @property
    def used(self) -> str:
        """The samples that the statistics are over: ``"clean"``, or ``"all"`` if few are clean."""
        return "clean" if self.clean >= self.enough else "all"

    def seconds(self, quantile: float) -> float:
        """Quantile of the time of one call: 0 is the best sample, 0.5 the median."""
        everything = self.used == "all"
        kept = [s.seconds for s in self.samples if s.clean or everything]
        return torch.tensor(kept, dtype=torch.float64).quantile(quantile).item()


class CpuTimer:
    """Samples the wall-clock time of a call, and the disturbances of the process during it."""

    def __init__(self, call: Call, seconds: float) -> None:
        self._timer = torch.utils.benchmark.Timer(
            "call()", globals={"call": call}, timer=self._clock, num_threads=torch.get_num_threads()
        )
        self._start: tuple[int, int] | None = None
        self.calls = 1
        for share in (0.2, 1.0):  # the time of a short call is known after some repetitions
            one = min(self().seconds for _ in range(3))
            if one >= seconds:
                break
            self.calls = max(1, round(share * seconds / one))

    def _clock(self) -> float:
        """The time. The usage is read before the timed calls begin and after they end."""
        if self._start is None:
            self._start = usage()
            return time.perf_counter()
        now = time.perf_counter()
        self._used = [end - start for start, end in zip(self._start, usage(), strict=True)]
        self._start = None
        return now

    def __call__(self) -> Sample:
        """Take a sample. ``timeit`` first makes two calls, which settle caches and threads."""
        seconds = self._timer.timeit(self.calls).median
        switches, faults = self._used[0], self._used[1] / self.calls
        clean = is_clean(switches, seconds * self.calls) and faults <= FAULTS_PER_CALL
        return Sample(seconds, clean, faults, self.calls)


def event_timer(call: Call, seconds: float) -> Sampler:
    """Time between two CUDA events around a call, with an empty L2 cache: median of a sample."""
    from triton.testing import do_bench

    return lambda: Sample(do_bench(call, 0, 1e3 * seconds, return_mode="median") * 1e-3)


def graph_timer(call: Call, seconds: float) -> Sampler:
    """Time of a call within a CUDA graph of many, without the host: median of ten replays.

    Raises:
        RuntimeError: If a graph cannot hold the call, since it waits for the device for example.
    """
    from triton.testing import do_bench_cudagraph

    def sample() -> Sample:
        return Sample(do_bench_cudagraph(call, 1e3 * seconds, return_mode="median") * 1e-3)

    sample()  # an error belongs here, not to the samples
    return sample


#: Timers by their names in the results.
TIMERS: dict[str, Timer] = {"wall clock": CpuTimer, "events": event_timer, "graph": graph_timer}


def is_clean(switches: int, seconds: float) -> bool:
    """Whether a sample of this length with so many involuntary context switches is undisturbed."""
    return switches <= int(seconds / SECONDS_PER_SWITCH)


def usage() -> tuple[int, int]:
    """Involuntary context switches and minor page faults of this process so far."""
    if resource is None:
        return 0, 0
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_nivcsw, now.ru_minflt


def best(call: Call, timer: Timer, seconds: float) -> float:
    """Seconds of a call in the best of the samples that fit into so many seconds."""
    sample, end = timer(call, min(seconds, Policy.sample_seconds)), time.perf_counter() + seconds
    found = sample().seconds
    while time.perf_counter() < end:
        found = min(found, sample().seconds)
    return found


def interleave(
    samplers: Mapping[str, Sampler], policy: Policy, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Series]:
    """Sample rivals in turns until each has enough clean samples or the budget is spent."""
    order = random.Random(policy.seed)
    names = list(samplers)
    series = {name: Series(policy.enough) for name in names}
    end, rounds, collecting = clock() + policy.budget, 0, gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while True:
            order.shuffle(names)
            for name in names:
                series[name].samples.append(samplers[name]())
            rounds += 1
            enough = all(s.clean >= policy.samples for s in series.values())
            if enough or (rounds >= policy.rounds and clock() > end):
                return series
    finally:
        if collecting:
            gc.enable()
