# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend: what is there, what serves, and why something else does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import tokenops
from tokenops import TokenMap, _backend, _library, _native
from tokenops.info import report
from tokenops.testing import assert_same_bits, random_tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that went to the reference by choice."""
    names = []
    for name, operator in _library.defined.items():

        def spy(*args, _operator=operator):
            names.append(_operator.name)
            return _operator.reference(*args)

        monkeypatch.setitem(_library.defined, name, operator._replace(reference=spy))
    return names


def call_everything():
    x = random_tokens(2, 9, 4)
    token_map = tokenops.match(x, 2)
    tokenops.nearest(x, x)
    tokenops.merge(x, token_map)
    tokenops.merge_wavg(x, token_map)
    tokenops.unmerge(x[:, :7], token_map)
    tokenops.unmerge(tokenops.merge([x, x, x], token_map), token_map)
    tokenops.policy_attention(x[:, None], x[:, None], x[:, None])
    tokenops.attention_scores(x[:, None], x[:, None])
    kept = tokenops.prune(x[:, :7, 0], 3)
    TokenMap.from_assign(kept.assign, 3).compose(token_map)


def test_the_choice_is_obeyed(backend, calls):
    call_everything()
    expected = {*_library.operators, "invert", "compose"}
    assert set(calls) == (expected if backend == "reference" else set())


def test_use_backend_as_decorator():
    @tokenops.use_backend("reference")
    def chosen():
        """Say what is chosen."""
        return _backend.chosen()

    before = _backend.chosen()
    assert before != "reference"
    assert chosen() == "reference"
    assert chosen.__doc__ == "Say what is chosen."
    assert _backend.chosen() == before


def test_use_backend_as_context_and_function():
    assert _backend.chosen() is None
    with tokenops.use_backend("reference"):
        assert _backend.chosen() == "reference"
        with tokenops.use_backend(None):
            assert _backend.chosen() is None
        assert _backend.chosen() == "reference"
        with pytest.raises(RuntimeError, match="inside"), tokenops.use_backend(None):
            raise RuntimeError("inside")
        assert _backend.chosen() == "reference"
    assert _backend.chosen() is None
    tokenops.use_backend("reference")
    assert _backend.chosen() == "reference"
    tokenops.use_backend(None)
    assert _backend.chosen() is None


def test_a_refused_name_changes_nothing():
    with tokenops.use_backend("reference"):
        for name, error in (("cuda", ValueError), (1, TypeError)):
            with pytest.raises(error):
                tokenops.use_backend(name)
        assert _backend.chosen() == "reference"


def test_the_choice_holds_for_the_backward():
    """Also where the choice has changed in between."""
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
    assert list(there) == [b for b in _backend.BACKENDS if b in there]
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
    x = random_tokens(1, 8, 4)
    token_map = tokenops.match(x, 2)
    arguments = {
        "match": (x, 2),
        "nearest": (x, x),
        "merge": (x, token_map),
        "merge_wavg": (x, token_map),
        "unmerge": (x[:, :6], token_map),
        "policy_attention": (x[:, None],) * 3,
        "attention_scores": (x[:, None],) * 2,
    }
    monkeypatch.setattr(_backend, "_interpreting", False)
    message = rf"{operator}: backend 'triton' was chosen but cannot serve it: Triton has no CPU"
    with tokenops.use_backend("triton"), pytest.raises(NotImplementedError, match=message):
        getattr(tokenops, operator)(*arguments[operator])


def test_backends_agree(backend, device):
    """The plainest use, on each backend, against the reference."""

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


@pytest.mark.parametrize("name", ["composed", "triton"])
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
    if name == "triton" and not _backend._interpreting:
        _backend._overloads_of(name)
        assert set(vars(_library.overloads[name])) == set(_backend._in_triton)
        return
    with tokenops.use_backend(name):
        out = function(x, token_map).square().sum()
        compiled = torch.compile(function, backend=aot_autograd(fw_compiler=record), fullgraph=True)
        compiled_out = compiled(x, token_map).square().sum()
    for result in (out, compiled_out):  # outside, where nobody has chosen
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


SELECTED = """
from tokenops import _native
inspect = _native.inspect()
print(inspect.cpu_features()["isa"] if inspect else "unknown")
"""


@pytest.mark.slow
def test_each_level_of_vector_instructions(isa_level):
    """The tests marked ``isa`` again, with less of the CPU than there is."""
    environment = {
        **os.environ,
        "TOKENOPS_CPU_ISA": isa_level,
        "TOKENOPS_TEST_BACKENDS": "native",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }

    def run(*command):
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment
        )

    levels = ["portable", "avx2", "avx512"]  # a CPU that lacks one has the one before it
    assert run("-c", SELECTED).stdout.strip() in ("unknown", *levels[: levels.index(isa_level) + 1])
    few = "not transposed and not expanded and not packed"
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "isa", "-k", few, "tests/ops")
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-1000:]
