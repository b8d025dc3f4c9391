# SPDX-License-Identifier: Apache-2.0
"""Time rivals in turns: by the wall clock on the CPU, by triton.testing on CUDA devices.

A sample is the time of a few calls of one rival. Rivals take turns in an order that is drawn anew
each round, so that other work on the machine disturbs all of them alike. A sample on the CPU counts
only if the system did not take the processor away during it and handed out no fresh memory.
"""

from __future__ import annotations

import gc
import random
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import benchmark

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


@dataclass(frozen=True)
class Policy:
    """How many samples to take."""

    samples: int = 40  # clean samples wanted of each rival
    enough: int = 5  # with fewer clean samples, statistics are over all samples
    budget: float = 60.0  # seconds after which a case ends
    rounds: int = 3  # rounds that run even beyond the budget
    sample_seconds: float = 1e-3  # length of a sample: short calls are repeated
    warm_up: float = 0.1  # seconds of calls before the first sample


QUICK = Policy(samples=5, enough=2, budget=3.0, rounds=2, sample_seconds=2e-4)
REHEARSAL = Policy(samples=1, enough=1, budget=0.0, rounds=1, sample_seconds=0.0, warm_up=0.0)


@dataclass
class Series:
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
        kept = [s.seconds for s in self.samples if s.clean or self.used == "all"]
        return torch.tensor(kept, dtype=torch.float64).quantile(quantile).item()


class CpuTimer:
    """Samples the wall-clock time of a call, and the disturbances of the process during it."""

    def __init__(self, call: Call, seconds: float) -> None:
        self.call, self.calls = call, 1
        for share in (0.2, 1.0):  # the time of a short call is known after some repetitions
            one = min(self().seconds for _ in range(3))
            if one >= seconds:
                break
            self.calls = max(1, round(share * seconds / one))

    def __call__(self) -> Sample:
        call, calls = self.call, range(self.calls)
        for _ in range(2):  # settles caches and threads
            call()
        before, start = usage(), time.perf_counter()
        for _ in calls:
            call()
        seconds = time.perf_counter() - start
        switches, faults = (b - a for a, b in zip(before, usage(), strict=True))
        clean = is_clean(switches, seconds) and faults <= FAULTS_PER_CALL * len(calls)
        return Sample(seconds / len(calls), clean, faults / len(calls), len(calls))


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


#: Makers of a sampler from a call and the length of a sample, by their names in the results.
TIMERS = {"wall clock": CpuTimer, "events": event_timer, "graph": graph_timer}


def is_clean(switches: int, seconds: float) -> bool:
    """Whether a sample of this length with so many involuntary context switches is undisturbed."""
    return switches <= int(seconds / SECONDS_PER_SWITCH)


def usage() -> tuple[int, int]:
    """Involuntary context switches and minor page faults of this process so far."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_nivcsw, now.ru_minflt


def best(call: Call, seconds: float) -> float:
    """Seconds of a call in the best of the samples that fit into so many seconds: a ceiling."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=seconds).times)


def interleave(
    samplers: Mapping[str, Sampler], policy: Policy, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Series]:
    """Sample rivals in turns until each has enough clean samples or the budget is spent."""
    order, names = random.Random(0), list(samplers)
    series = {name: Series(policy.enough) for name in names}
    end, rounds = clock() + policy.budget, 0
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
        gc.enable()
