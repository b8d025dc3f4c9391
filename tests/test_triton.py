# SPDX-License-Identifier: Apache-2.0
"""Triton kernels without a GPU: launches, dispatch, and the resources of the compiled code.

The tests of the operators check the results, under Triton's interpreter (``make interpret``) and on
CUDA devices.
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tokenops import _backend, _library, info

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import ahead_of_time, budget, launches, resources, store
from benchmarks.ahead_of_time import record
from tokenops._triton import VERIFIED, launch, release
from tokenops._triton.launch import Launch, Settings

ROOT = Path(__file__).resolve().parent.parent
compiled_here = pytest.mark.skipif(launch.interpreting, reason="kernels are Python functions")


@triton.jit
def double(x, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def doubling(count=100, block=64):
    grid = (launch.ceil_div(count, block),)
    return Launch(double, grid, (count,), Settings(1, block, num_warps=2), BLOCK=block)


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
    assert inner == []  # an empty grid
    assert recorded[0].tensors == (x, x)


class Driver:
    """The part of Triton's driver that a launch uses."""

    def get_current_device(self):
        return 3

    def get_current_stream(self, device):
        return device + 7


class Kernel:
    """A kernel that launches nothing: it records calls of Triton's launcher and direct launches."""

    __name__ = "kernel"
    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.own, self.direct = [], []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.own.append((grid, arguments, options))
            return self

        return call

    def run(self, *arguments):
        self.direct.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(launch, "_direct", True)
    return Kernel()


def prepared(kernel, *tensors):
    """A launch after its first call, so that the next one is direct."""
    made = Launch(kernel, (2,), (100, 0.5), Settings(1, 64, 2, 3), BLOCK=64)
    made(*tensors)
    options = {"BLOCK": 64, "num_warps": 2, "num_stages": 3}
    assert kernel.own == [((2, 1, 1), (*tensors, 100, 0.5), options)]
    assert kernel.direct == []
    return made


def test_a_launch_that_is_ready_goes_straight_to_the_driver(kernel):
    x = torch.zeros(100)
    again = prepared(kernel, x, None)
    again(x, None)
    assert len(kernel.own) == 1
    assert kernel.direct == [
        (2, 1, 1, 10, "function", "metadata", None, None, None, x, None, 100, 0.5, 64)
    ]


def test_other_arguments_go_through_tritons_launcher(kernel):
    """Compiled code depends on alignment, dtypes and missing tensors of the first call."""
    x = torch.zeros(104)
    made = prepared(kernel, x)
    others = (x[1:], None, x.double(), x.int())
    for other in others:
        made(other)
    assert [arguments[0] for _, arguments, _ in kernel.own[1:]] == [*others]
    assert kernel.direct == []
    for other in others:  # launches of unaligned tensors are not prepared
        made(other)
    assert len(kernel.own) == 6
    assert len(kernel.direct) == 3


def test_an_unverified_version_uses_tritons_launcher(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_direct", False)
    x = torch.zeros(100)
    made = prepared(kernel, x)
    made(x)
    assert len(kernel.own) == 2
    assert kernel.direct == []
    assert made._ready == {}


def test_the_versions_that_are_verified(monkeypatch):
    assert release("3.6.0+git9844da95") == release("3.6.0") == "3.6.0"
    is_one = torch.version.hip is None and launch.VERSION in VERIFIED
    assert launch._direct == (is_one and not launch.interpreting)
    for version, words in (
        ("3.7.1+git1", ""),
        ("3.9.0", "not verified, so launches are slower"),
    ):
        monkeypatch.setattr(info.metadata, "version", lambda package, version=version: version)
        assert info._triton().startswith(version)
        assert words in info._triton()
        assert (words == "") == (info._triton() == version)


@pytest.mark.parametrize("error", [TypeError("takes 3"), AttributeError("no x"), ValueError("y")])
def test_a_refused_launch_goes_through_tritons_launcher(kernel, error):
    """One launch, and one warning with version and error; later launches are not direct."""

    def refuse(*arguments):
        raise error

    x = torch.zeros(100)
    made, other = prepared(kernel, x), Launch(kernel, (5,), (), Settings(1, 1))
    other(x)
    kernel.run = refuse
    made._ready[torch.float32,] = refuse, *made._ready[torch.float32,][1:]
    kernel.own.clear()
    words = rf"kernel: Triton {re.escape(triton.__version__)} .*{type(error).__name__}: {error}"
    with pytest.warns(RuntimeWarning, match=words):
        made(x)
    assert [grid for grid, _, _ in kernel.own] == [(2, 1, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(x)
        other(x)
    assert [grid for grid, _, _ in kernel.own] == [(2, 1, 1), (2, 1, 1), (5, 1, 1)]
    assert kernel.direct == []


def test_an_error_of_the_driver_is_raised(kernel):
    """An earlier kernel may have failed, or this one may be running: no second launch."""
    x = torch.zeros(100)
    made = prepared(kernel, x)

    def fail(*arguments):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    made._ready[torch.float32,] = fail, *made._ready[torch.float32,][1:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            made(x)
    assert len(kernel.own) == 1
    assert launch._direct


def test_arguments_that_no_launcher_takes_are_not_blamed_on_a_version(kernel):
    x = torch.zeros(100)
    made = prepared(kernel, x)

    def refuse(*arguments, **options):
        raise ValueError("cpu tensor?")

    made._ready[torch.float32,] = refuse, *made._ready[torch.float32,][1:]
    made.kernel = {(2, 1, 1): refuse}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="cpu tensor"):
            made(x)
    assert launch._direct


def test_compiled_code_without_the_expected_attributes(kernel):
    """Triton launches it, and one warning reports that direct launches are not possible."""

    class Other(Kernel):
        @property
        def packed_metadata(self):
            raise AttributeError("no packed_metadata")

    made = Launch(Other(), (2,), (), Settings(1, 1))
    x = torch.zeros(100)
    with pytest.warns(RuntimeWarning, match="AttributeError: no packed_metadata"):
        made(x)
    made(x)
    assert len(made.kernel.own) == 2
    assert made._ready == {}


@compiled_here
@pytest.mark.skipif(launch.VERSION not in VERIFIED, reason="Triton's own launcher serves")
def test_launches_on_the_real_launcher(tmp_path):
    """Direct launches equal Triton's own launches, in a separate process."""
    program = Path(__file__).parent / "stand_in.py"
    environment = {**os.environ, "PYTHONPATH": str(program.parent.parent)}
    run = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == "4 launches agree\n"


@pytest.mark.skipif(not launch.interpreting, reason="needs TRITON_INTERPRET=1")
def test_a_launch_under_the_interpreter():
    x = torch.randn(100)
    y = torch.empty_like(x)
    doubling()(x, y)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize(("number", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(number, power):
    assert launch.power_of_two(number) == power
    assert launch.power_of_two(number, least=16) == max(16, power)


# ---- dispatch ----


def test_every_operator_has_a_triton_kernel():
    assert set(_backend._in_triton) == set(_library.defined)


@pytest.mark.parametrize("name", _library.defined)
def test_the_kernels_are_there(name):
    """The module that the first call of an operator imports has a function of this name."""
    family = _library.defined[name].module.rpartition(".")[0]
    assert callable(getattr(importlib.import_module(f"{family}.triton"), name))


def test_unserved_arguments(monkeypatch):
    """Plain PyTorch serves them, unless ``"triton"`` is chosen."""

    def unserved(*arguments):
        raise _backend.UnservedError("too strange")

    monkeypatch.setattr(_backend, "_new_enough", lambda index: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    pair_dot = _library.defined["pair_dot"].composed
    x = torch.ones(1, 2, 3)
    index = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    serve = _backend._on_cuda("pair_dot", unserved, pair_dot)
    assert serve(None, x, x[:, :1], *index).tolist() == [[3.0, 3.0]]
    refuse = _backend._on_cuda("pair_dot", unserved)
    with pytest.raises(NotImplementedError, match=r"pair_dot: backend 'triton' .* too strange"):
        refuse(None, x, x[:, :1], *index)


def test_old_devices_take_plain_pytorch(monkeypatch):
    monkeypatch.setattr(_backend, "_new_enough", lambda index: False)
    invert = _library.defined["invert"].composed
    serve = _backend._on_cuda("invert", lambda *a: pytest.fail("served"), invert)
    offsets, _ = serve(None, torch.zeros(1, 2, dtype=torch.int32), 1)
    assert offsets.tolist() == [[0, 2]]


# ---- number of launches ----


@pytest.mark.parametrize(
    ("operator", "arguments", "count"),
    [
        ("match", {"num_prefix": 1}, 2),
        ("match", {"num_prefix": 1, "metric": "BHND"}, 2),
        # One of the kernels evaluates the grid.
        ("match", {"num_prefix": 1, "grid_width": 14, "cell_height": 2, "cell": True, "G": 49}, 3),
        ("nearest", {}, 1),
        ("merge_wavg", {"size": True}, 1),
        ("merge", {"reduce": "mean"}, 1),
        ("unmerge", {"residual": True}, 1),
        ("invert", {}, 1),
        ("policy_attention", {}, 1),
        ("policy_attention", {"policy": True, "self_keep": True, "eps": 1e-6}, 2),
    ],
)
def test_launches_of_a_vit(operator, arguments, count):
    """Number of launches for a layer of ViT-B/16 at 224 pixels; the recipes make dozens."""
    sizes = {"B": 256, "H": 12, "N": 197, "D": 64, "C": 768}
    with record("sm_90") as recorded:
        launches.launch(operator, torch.bfloat16, {**sizes, **arguments})
    assert len(recorded) == count


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match=r"merge has no arguments \['weights'\]"):
        launches.launch("merge", torch.bfloat16, {"B": 2, "C": 8, "weights": True})


# ---- compiled code ----


@compiled_here
def test_what_a_launch_is_compiled_from():
    x = torch.empty(100, dtype=torch.float16, device="meta")
    with record("sm_90") as recorded:
        doubling(count=1)(x, x)
        doubling(count=32)(x, x)
        doubling(count=100)(x, x)
    one, aligned, odd = map(ahead_of_time.source, recorded)
    assert one.constants == {"count": 1, "BLOCK": 64}
    assert aligned.signature == {"x": "*fp16", "y": "*fp16", "count": "i32", "BLOCK": "constexpr"}
    assert set(aligned.attributes) == {(0,), (1,), (2,)}
    assert set(odd.attributes) == {(0,), (1,)}
    used = ahead_of_time.resources(ahead_of_time.compile_launch(recorded[2], "sm_90"))
    assert 0 < used.registers <= 255
    assert (used.stack, used.spills, used.shared) == (0, 0, 0)


def loop_instructions_per_score(code, settings):
    """Instructions of a thread per score, in the loop with the matrix product."""
    lengths = []
    for at, text in enumerate(code):
        branch = re.match(r"(?:@!?U?P\d+ )?BRA\b.*?0x([0-9a-f]+)", text)
        start = int(branch[1], 16) // 16 if branch else at
        if start < at and any("MMA" in line for line in code[start:at]):
            lengths.append(at + 1 - start)
    assert lengths, "no loop with a matrix product"
    return min(lengths) * 32 * settings.num_warps / (settings.block_m * settings.block_n)


@compiled_here
def test_a_score_costs_few_instructions():
    """At width 64, finding the maximum costs more than the matrix product."""
    with record("sm_90") as recorded:
        launches.launch("nearest", torch.bfloat16, {"B": 2, "N": 65536, "D": 64})
    search = recorded[-1]
    code = ahead_of_time.sass(ahead_of_time.compile_launch(search, "sm_90"))
    assert loop_instructions_per_score(code, search.launch.settings) <= 6.5


def budgeted(arch):
    """A test parameter, skipped if the installed Triton has no budget for the architecture."""
    missing = resources.no_budget([arch])
    return pytest.param(arch, marks=pytest.mark.skipif(missing is not None, reason=str(missing)))


@pytest.mark.parametrize("arch", [budgeted(arch) for arch in resources.ARCHS])
def test_the_budget_is_complete(arch):
    """It has each kernel with each setting; ``benchmarks.resources --write`` adds missing ones."""
    known = {(*budget.key(row), row["tile"]) for row in store.read(resources.BUDGET)}
    assert {job[:4] for job in resources.jobs([arch])} == {row for row in known if arch in row}


def test_the_budget_has_every_kernel():
    """``benchmarks/launches.py`` lists the launches of a new kernel. Helpers are called by one."""
    functions, called = set(), set()
    for path in (ROOT / "tokenops" / "ops").glob("*/triton/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if "triton.jit" in map(ast.unparse, getattr(node, "decorator_list", ())):
                functions.add(node.name)
                calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
                called |= {
                    n.id for call in calls for n in ast.walk(call) if isinstance(n, ast.Name)
                }
    assert functions - called == {row["kernel"] for row in store.read(resources.BUDGET)}


@pytest.mark.parametrize("version", VERIFIED)
def test_the_budgets_have_no_spills(version):
    rows = store.read(store.RESULTS / f"triton-{version}.csv")
    assert {row["arch"] for row in rows} >= {"sm_90"}
    assert not budget.excesses(rows, rows, resources.SHARED)


def test_there_is_no_budget_for_an_unknown_version(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(resources, "BUDGET", tmp_path / "triton-0.0.csv")
    monkeypatch.setattr(resources, "VERSION", "0.0")
    assert store.read(resources.BUDGET) == []
    assert resources.main(["--check", "--arch", "sm_80", "sm_90"]) == 1
    words = "there is no budget of Triton 0.0 for sm_80, sm_90; --write makes it"
    assert capsys.readouterr().err.strip() == words


def largest(jobs, rows):
    """For each kernel and tile the launch with the most registers in the budget."""
    registers = {budget.key(row): int(row["registers"]) for row in rows}
    jobs = sorted(jobs, key=lambda job: registers.get((job.case, job.kernel, job.arch), 256))
    return list({(job.arch, job.kernel, job.tile): job for job in jobs}.values())


@compiled_here
@pytest.mark.slow
@pytest.mark.parametrize("arch", [budgeted(arch) for arch in resources.ARCHS])
def test_resources(arch):
    """Kernels stay in the budget; of each setting the launch with the most registers compiles."""
    known = store.read(resources.BUDGET)
    jobs = largest(resources.jobs([arch]), known)
    rows = resources.measure_all(jobs)
    assert not budget.excesses(rows, known, resources.SHARED)


def test_cases_launch_something():
    for name, call in launches.cases().items():
        for arch in resources.ARCHS:
            with record(arch) as recorded:
                call()
            assert recorded, f"{name} launches nothing on {arch}"
