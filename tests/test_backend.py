# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend: available backends, which one serves, and reasons why others cannot."""

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from tokenops import TokenMap, _backend, _choice, _library, _native
from tokenops.info import report
from tokenops.testing import assert_same_bits, random_tokens, samples

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that the reference served."""
    names = []
    for name, operator in _library.defined.items():

        def spy(*args, _operator=operator):
            names.append(_operator.name)
            return _operator.reference(*args)

        monkeypatch.setitem(_library.defined, name, operator._replace(reference=spy))
    return names


def call_everything():
    for call in samples.calls(samples.Sizes(dtype=torch.float32)):
        call.function(**call.tensors)
    token_map = tokenops.match(random_tokens(2, 9, 4), 2)
    kept = tokenops.prune(random_tokens(2, 7, 1)[..., 0], 3)
    TokenMap.from_assign(kept.assign, 3).compose(token_map)


def test_the_choice_is_obeyed(backend, calls):
    call_everything()
    expected = {*_library.operators, "invert", "compose"}
    assert set(calls) == (expected if backend == "reference" else set())


def test_use_backend_as_decorator():
    @tokenops.use_backend("reference")
    def chosen():
        """Return the chosen backend."""
        return _choice.chosen()

    before = _choice.chosen()
    assert before != "reference"
    assert chosen() == "reference"
    assert chosen.__doc__ == "Return the chosen backend."
    assert _choice.chosen() == before


def test_use_backend_as_context_and_function():
    assert _choice.chosen() is None
    with tokenops.use_backend("reference"):
        assert _choice.chosen() == "reference"
        with tokenops.use_backend(None):
            assert _choice.chosen() is None
        assert _choice.chosen() == "reference"
        with pytest.raises(RuntimeError, match="inside"), tokenops.use_backend(None):
            raise RuntimeError("inside")
        assert _choice.chosen() == "reference"
    assert _choice.chosen() is None
    tokenops.use_backend("reference")
    assert _choice.chosen() == "reference"
    tokenops.use_backend(None)
    assert _choice.chosen() is None


def test_contexts_end_their_own_choice_only():
    """In any order of leaving the contexts."""
    first, second = tokenops.use_backend("reference"), tokenops.use_backend("composed")
    tokenops.use_backend(None)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _choice.chosen() == "composed"
    second.__exit__(None, None, None)
    assert _choice.chosen() is None
    with first, second, first:  # entered twice
        assert _choice.chosen() == "reference"
    assert _choice.chosen() is None


def test_a_call_holds_until_its_context_is_left():
    with tokenops.use_backend("reference"):
        for _ in range(100):
            tokenops.use_backend("composed")
            tokenops.use_backend("native")
        assert _choice.chosen() == "native"
        assert len(_choice._choices.get()) <= 5  # calls do not accumulate choices
        with tokenops.use_backend(None):
            assert _choice.chosen() is None
        assert _choice.chosen() == "native"
    assert _choice.chosen() is None


def test_each_thread_has_its_own_choice():
    at_once = threading.Barrier(3)
    seen = {}

    def work(name):
        at_once.wait()
        with tokenops.use_backend(name):
            at_once.wait()
            seen[name] = _choice.chosen()
            at_once.wait()
        seen[name, "after"] = _choice.chosen()

    with tokenops.use_backend("native"):
        threads = [threading.Thread(target=work, args=(n,)) for n in ("reference", "composed")]
        for thread in threads:
            thread.start()
        for _ in range(3):
            at_once.wait()
            assert _choice.chosen() == "native"
        for thread in threads:
            thread.join()
    names = ("reference", "composed")
    assert seen == {**{n: n for n in names}, **{(n, "after"): None for n in names}}
    assert _choice.chosen() is None


def test_each_task_has_its_own_choice():
    async def work(name, steps):
        @tokenops.use_backend(name)
        async def decorated():
            await asyncio.sleep(0)
            return _choice.chosen()

        seen = []
        for _ in range(steps):
            with tokenops.use_backend(name):
                await asyncio.sleep(0)
                seen.append(_choice.chosen())
            await asyncio.sleep(0)
            seen.append(_choice.chosen())
            seen.append(await decorated())
        return seen

    async def main():
        with tokenops.use_backend("native"):
            tasks = [
                asyncio.create_task(work(n, s)) for n, s in (("reference", 3), ("composed", 2))
            ]
        assert _choice.chosen() is None  # the tasks keep the choice of their creation
        return await asyncio.gather(*tasks)

    first, second = asyncio.run(main())
    assert first == ["reference", "native", "reference"] * 3
    assert second == ["composed", "native", "composed"] * 2
    assert _choice.chosen() is None


def test_decorated_generators():
    """The choice holds only while the code of the generator runs."""
    closed = []

    @tokenops.use_backend("reference")
    def generate(last):
        try:
            got = yield _choice.chosen()
            try:
                yield got, _choice.chosen()
            except KeyError as error:
                yield repr(error), _choice.chosen()
            return last
        finally:
            closed.append(_choice.chosen())

    assert inspect.isgeneratorfunction(generate)
    generator = generate("end")
    assert next(generator) == "reference"
    assert _choice.chosen() is None
    with tokenops.use_backend("composed"):
        assert generator.send(5) == (5, "reference")
        assert _choice.chosen() == "composed"
    assert generator.throw(KeyError(1)) == ("KeyError(1)", "reference")
    with pytest.raises(StopIteration) as stop:
        next(generator)
    assert stop.value.value == "end"
    assert closed == ["reference"]
    left = generate("never")
    next(left)
    left.close()
    assert closed == ["reference"] * 2
    failing = generate("never")
    next(failing)
    with pytest.raises(OSError, match="broken"):
        failing.throw(OSError("broken"))
    assert closed == ["reference"] * 3
    assert _choice.chosen() is None


def test_decorated_coroutines_and_asynchronous_generators():
    closed = []

    @tokenops.use_backend("reference")
    async def generate():
        try:
            got = yield _choice.chosen()
            await asyncio.sleep(0)
            try:
                yield got, _choice.chosen()
            except KeyError as error:
                yield repr(error), _choice.chosen()
        finally:
            closed.append(_choice.chosen())

    @tokenops.use_backend("composed")
    async def main():
        generator = generate()
        assert await anext(generator) == "reference"
        assert _choice.chosen() == "composed"
        assert await generator.asend(5) == (5, "reference")
        assert await generator.athrow(KeyError(1)) == ("KeyError(1)", "reference")
        assert [value async for value in generator] == []
        async for value in generate():
            assert (value, _choice.chosen()) == ("reference", "composed")
            break
        return _choice.chosen()

    assert inspect.iscoroutinefunction(main)
    assert inspect.isasyncgenfunction(generate)
    assert asyncio.run(main()) == "composed"
    assert closed == ["reference"] * 2
    assert _choice.chosen() is None


def test_backwards_keep_the_choice_of_their_forward(calls):
    """Also on other threads, on which no backend is chosen."""
    x = random_tokens(2, 9, 4).requires_grad_()
    token_map = tokenops.match(x, 2)
    nodes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nodes.append(str(function))
            return function(*arguments, **options or {})

    with tokenops.use_backend("composed"):
        out = token_map.merge_wavg(x, x[..., 0].exp())[0].square().sum()

    def work():
        with Record():
            out.backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ours = {node for node in nodes if node.startswith("tokenops.")}
    assert {"tokenops.unmerge.composed", "tokenops.pair_dot.composed"} <= ours
    assert all(node.endswith(".composed") for node in ours)
    assert calls == []


STEPS_ASIDE = """
import torch
from tokenops import _backend, _library
import tokenops

x = torch.randn(2, 9, 4, requires_grad=True)
token_map = tokenops.match(x, 2)
expected = token_map.merge(x).detach()
gradient, = torch.autograd.grad(token_map.merge(x).sum(), x)
for name in ("merge", "unmerge"):
    operator = _library.defined[name]
    twice = lambda *args, f=operator.reference: 2 * f(*args)
    _library.defined[name] = operator._replace(composed=twice)
_backend.step_aside("merge", "unmerge")
out = token_map.merge(x)
torch.testing.assert_close(out, 2 * expected)
torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 2 * gradient)
with tokenops.use_backend("native"):
    out = token_map.merge(x)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], gradient)
assert torch.equal(tokenops.match(x, 2).assign, token_map.assign)
"""


@pytest.mark.native_only
def test_compiled_kernels_that_step_aside(backend):
    """If "native" is chosen, they serve forward and backward."""
    run = subprocess.run(
        [sys.executable, "-c", STEPS_ASIDE], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr


ROUTED = """
import torch, tokenops
from tokenops import _backend, _native
from tokenops.info import report

x = torch.randn(2, 33, 16)
q = torch.randn(2, 2, 33, 16, requires_grad=True)
token_map = tokenops.match(x, 5)
calls = {
    "nearest": lambda: tokenops.nearest(x, x),
    "match": lambda: tokenops.match(x, 5),
    "merge": lambda: tokenops.merge(x, token_map),
    "merge_wavg": lambda: tokenops.merge_wavg(x, token_map),
    "unmerge": lambda: tokenops.unmerge(x[:, :28], token_map),
    "policy_attention": lambda: tokenops.policy_attention(q, q, q, x[..., 0].abs()),
    "policy_attention_backward": lambda: torch.autograd.grad(
        tokenops.policy_attention(q, q, q, x[..., 0].abs()).sum(), q
    ),
    "attention_scores": lambda: tokenops.attention_scores(q, q),
}

def run(name, backend):
    with tokenops.use_backend(backend), torch.profiler.profile() as profile:
        result = calls[name]()
    tensors = result if isinstance(result, tuple) else (getattr(result, "assign", result),)
    return tensors, {event.name for event in profile.events() if "::" in event.name}

LEVEL = _native.isa
assert LEVEL in ("portable", WISH), LEVEL  # a CPU without AVX2 has portable kernels
assert _backend.aside == set(_backend.SLOWER.get(LEVEL, ()))
for name in calls:
    result, ran = run(name, None)
    native, ran_native = run(name, "native")
    composed, ran_composed = run(name, "composed")
    aside = name in _backend.aside
    assert ran_native != ran_composed, name
    assert ran == (ran_composed if aside else ran_native), (name, ran ^ ran_composed)
    for a, b in zip(result, composed if aside else native, strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(result, native, strict=True):
        torch.testing.assert_close(a, b)
lines = report().splitlines()
assert any(f"instruction set  {LEVEL}" in line for line in lines)
for name in tokenops._library.operators:
    first = "composed, native" if name in _backend.aside else "native, composed"
    assert any(line.split()[:1] == [name] and first in line for line in lines), name
    assert "native" not in tokenops.why_not(name, x)
"""


@pytest.mark.native_only
@pytest.mark.parametrize("level", ["portable", "avx2"])
def test_slow_kernels_step_aside_by_level(backend, level):
    """Composed functions serve in their place, unless "native" is chosen; results are the same."""
    run = subprocess.run(
        [sys.executable, "-c", f"WISH = {level!r}\n{ROUTED}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TOKENOPS_CPU_ISA": level},
    )
    assert run.returncode == 0, run.stderr


def test_a_refused_name_changes_nothing():
    with tokenops.use_backend("reference"):
        for name, error in (("cuda", ValueError), (1, TypeError)):
            with pytest.raises(error):
                tokenops.use_backend(name)
        assert _choice.chosen() == "reference"


def test_the_choice_holds_for_the_backward():
    """Even if the choice has changed since the forward."""
    x = random_tokens(2, 9, 4).requires_grad_()
    token_map = tokenops.match(x, 2)
    gradients = []
    for backend in ("reference", None):
        with tokenops.use_backend(backend):
            out = tokenops.merge(x, token_map).pow(2).sum()
        gradients += torch.autograd.grad(out, x)
    torch.testing.assert_close(*gradients)


def test_available_backends(backend):
    there = tokenops.available_backends()
    assert backend in (*there, "default")
    assert there[-2:] == ("composed", "reference")
    assert list(there) == [b for b in _choice.BACKENDS if b in there]
    assert tokenops.available_backends(torch.device("cpu")) == there
    assert tokenops.available_backends("meta") == ("composed", "reference")


def test_why_not():
    x = random_tokens(1, 8, 4)
    for operator in _library.operators:
        reasons = tokenops.why_not(operator, x)
        assert "reference" not in reasons
        assert ("native" in reasons) == (not _native.loaded)
        if not _backend._interpreting:
            assert "TRITON_INTERPRET=1" in reasons["triton"]
        if _native.loaded:
            assert "meta" in tokenops.why_not(operator, x.to("meta"))["native"]
        assert tokenops.why_not(operator) == reasons
    with pytest.raises(ValueError, match="why_not: operator must be one of"):
        tokenops.why_not("invert", x)


@pytest.mark.parametrize("operator", _library.operators)
def test_an_explicit_choice_never_falls_back(operator, monkeypatch):
    call = next(c for c in samples.calls(samples.Sizes()) if c.operator == operator)
    monkeypatch.setattr(_backend, "_interpreting", False)
    message = rf"{operator}: backend 'triton' was chosen but cannot serve it: Triton has no CPU"
    with tokenops.use_backend("triton"), pytest.raises(NotImplementedError, match=message):
        call.function(**call.tensors)


def test_backends_agree(backend, device):
    """A simple call on each backend against the reference."""

    def run():
        metric = random_tokens(2, 50, 16, device=device)
        token_map = tokenops.match(metric, 12, num_prefix=1)
        return token_map.assign, token_map.merge(metric, reduce="amax")

    got = run()
    with tokenops.use_backend("reference"):
        expected = run()
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


# ---- overloads of one backend ----


@pytest.mark.parametrize("name", ["composed", *(["triton"] if _backend._interpreting else [])])
def test_overloads_of_a_backend(name):
    """Forward and backward are nodes of one backend, in graphs too."""
    targets = []

    def record(graph, inputs):
        targets.extend(str(n.target) for n in graph.graph.nodes if "tokenops" in str(n.target))
        return make_boxed_func(graph.forward)

    def function(x, token_map):
        return token_map.unmerge(token_map.merge_wavg(x)[0])

    x = random_tokens(2, 9, 4).requires_grad_()
    token_map = tokenops.match(x, 2)
    expected = torch.autograd.grad(function(x, token_map).square().sum(), x)
    with tokenops.use_backend(name):
        out = function(x, token_map).square().sum()
        compiled = torch.compile(function, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        compiled_out = compiled(x, token_map).square().sum()
    for result in (out, compiled_out):  # outside, no backend is chosen
        torch.testing.assert_close(torch.autograd.grad(result, x), expected)
    nodes = ["merge_wavg", "unmerge", "merge", "unmerge"]
    assert targets == [f"tokenops.{n}.{name}" for n in nodes]


# ---- reports ----


def test_info():
    text = report()
    assert f"tokenops {tokenops.__version__}" in text
    for operator in _library.operators:
        assert f"  {operator} " in text
    if _native.loaded:
        assert _native.path in text
    run = subprocess.run(
        [sys.executable, "-m", "tokenops.info"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == text.splitlines()[0]


def test_cuda_kernels_of_a_library_without_any(tmp_path):
    inspect = _native.inspect()
    if inspect is None:
        pytest.skip("this Python has no tokenops._inspect")
    libraries = [inspect.__file__, str(tmp_path / "missing.so")]
    if _native.loaded and _native.build_info().get("built") == "cpu":
        libraries.append(_native.path)
    for library in libraries:
        assert inspect.cuda_kernels(library) == []


@pytest.mark.slow
def test_each_level_of_vector_instructions(isa_level):
    """Run the tests marked ``isa`` again at lower levels of vector instructions."""
    environment = {
        **os.environ,
        "TOKENOPS_CPU_ISA": isa_level,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
        )

    levels = ["portable", "avx2", "avx512"]  # a CPU without a level uses the one before
    selected = run("-c", "from tokenops import _native; print(_native.isa)").stdout.strip()
    assert selected in levels[: levels.index(isa_level) + 1]
    few = "not transposed and not expanded and not packed"
    tests = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--backends",
        "native",
        "-m",
        "isa",
        "-k",
        few,
        "tests/ops",
    )
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-1000:]
