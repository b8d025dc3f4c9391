# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as far as a machine without a GPU can tell: they compile, to what, for whom.

That they compute the right thing is shown by the tests of the operators, which run on this backend
under Triton's interpreter (``make interpret``) and on CUDA devices.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenops
from tokenops import _backend, _library

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import launches, resources
from tokenops._triton import compile as ahead
from tokenops._triton import launch
from tokenops._triton.launch import Launch, Settings, record, use_settings

ROOT = Path(__file__).resolve().parent.parent

compiled_here = pytest.mark.skipif(launch.interpreting, reason="kernels are Python functions")


@triton.jit
def double(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def doubling(count=100, block=64):
    grid = (launch.ceil_div(count, block),)
    return Launch(double, grid, (count,), Settings(1, block, warps=2), BLOCK=block)


# ---- launches ----


def test_a_recorded_launch_is_not_made():
    x = torch.empty(100, device="meta")
    with record("sm_90") as recorded:
        doubling()(x, x)
        with record("sm_80") as inner:
            doubling(count=0)(x, x)
            assert launch.arch(x) == "sm_80"
        doubling()(x, x)
        assert launch.arch(x) == "sm_90"
    assert len(recorded) == 2
    assert inner == []  # nothing to do, nothing launched
    assert recorded[0].tensors == (x, x)


def test_a_launch_that_is_ready_goes_straight_to_the_driver():
    calls = []
    ready = doubling()
    ready._ready = (lambda *a: calls.append(a)), "function", "metadata", (lambda d: d + 7), 3
    x = torch.zeros(100)
    ready(x, None)
    assert calls == [(2, 1, 1, 10, "function", "metadata", None, None, None, x, None, 100, 64)]


def test_pointers_that_are_not_aligned_take_the_long_way():
    """Vector loads were compiled in; what is not aligned is Triton's to specialize for."""
    used = []

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid):
            def call(*arguments, **options):
                used.append(grid)
                return self

            return call

    x = torch.zeros(101)
    long_way = Launch(Kernel(), (3,), (), Settings(1, 1))
    long_way._ready = (lambda *a: pytest.fail("vector loads")), None, None, (lambda d: 0), 0
    with contextlib.suppress(RuntimeError):  # there may be no driver to ask afterwards
        long_way(x[1:])
    assert used == [(3, 1, 1)]


@pytest.mark.skipif(not launch.interpreting, reason="needs TRITON_INTERPRET=1")
def test_a_launch_under_the_interpreter():
    x = torch.randn(100)
    y = torch.empty_like(x)
    doubling()(x, y)
    assert torch.equal(y, 2 * x)


def test_settings_for_trial():
    name = sorted(launch.rules)[0] if launch.rules else None
    with pytest.raises(ValueError, match="no_rule"), use_settings("no_rule", Settings(1, 1)):
        pass
    if name is not None:
        with use_settings(name, Settings(16, 16)):
            assert launch._instead == {name: Settings(16, 16)}
        assert launch._instead == {}


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(number, power):
    assert launch.power_of_two(number) == power
    assert launch.power_of_two(number, least=16) == max(16, power)


# ---- who is served ----


def test_every_operator_has_a_triton_kernel():
    assert set(_backend._in_triton) == set(_library.defined)


@pytest.mark.parametrize("name", sorted(_library.defined))
def test_the_kernels_are_there(name):
    """The module that the first call imports has a function of this name."""
    module = {
        "nearest": "matching", "match": "matching", "policy_attention": "attention",
        "policy_attention_backward": "attention", "attention_scores": "attention",
    }.get(name, "merging")  # fmt: skip
    code = f"from tokenops.ops.{module}.triton import {name}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_unserved_arguments(monkeypatch):
    """They go to the reference, unless Triton was chosen."""

    def unserved(*arguments):
        raise _backend.UnservedError("too strange")

    monkeypatch.setattr(_backend, "_new_enough", lambda index: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    serve = _backend._on_cuda("pair_dot", unserved)
    x = torch.ones(1, 2, 3)
    index = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    assert serve(None, x, x[:, :1], *index).tolist() == [[3.0, 3.0]]
    with (
        tokenops.use_backend("triton"),
        pytest.raises(NotImplementedError, match=r"pair_dot: backend 'triton' .* too strange"),
    ):
        serve(None, x, x[:, :1], *index)


def test_old_devices_take_the_reference(monkeypatch):
    monkeypatch.setattr(_backend, "_new_enough", lambda index: False)
    serve = _backend._on_cuda("invert", lambda *a: pytest.fail("served"))
    offsets, _ = serve(None, torch.zeros(1, 2, dtype=torch.int32), 1)
    assert offsets.tolist() == [[0, 2]]


# ---- what the kernels compile to ----


@compiled_here
def test_what_a_launch_is_compiled_from():
    x = torch.empty(100, dtype=torch.float16, device="meta")
    with record("sm_90") as recorded:
        doubling(count=1)(x, x)
        doubling(count=32)(x, x)
        doubling(count=100)(x, x)
    one, aligned, odd = map(ahead.source, recorded)
    assert one.constants == {"count": 1, "BLOCK": 64}
    assert aligned.signature == {"x": "*fp16", "y": "*fp16", "count": "i32", "BLOCK": "constexpr"}
    assert set(aligned.attributes) == {(0,), (1,), (2,)}
    assert set(odd.attributes) == {(0,), (1,)}
    used = ahead.resources(ahead.compile_launch(recorded[2], "sm_90"))
    assert 0 < used.registers <= 255
    assert (used.stack, used.spills, used.shared) == (0, 0, 0)


@compiled_here
@pytest.mark.slow
@pytest.mark.parametrize("arch", resources.ARCHS)
def test_resources(arch):
    """Every kernel with all its settings: no spills, no stack, within the committed budget."""
    jobs = resources.jobs([arch])
    assert jobs
    rows = resources.measure_all(jobs, os.cpu_count() or 1)
    budget = [row for row in resources.read_budget() if row["arch"] == arch]
    assert not resources.excesses(rows, budget)
    assert {row["case"] for row in rows} == {row["case"] for row in budget}


def test_cases_launch_something():
    for name, call in launches.cases().items():
        for arch in resources.ARCHS:
            with record(arch) as recorded:
                call()
            assert recorded, f"{name} launches nothing on {arch}"
