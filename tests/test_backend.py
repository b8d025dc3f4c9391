# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend: what is there, what serves, and why something else does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenops
from tokenops import _backend, _library, _native
from tokenops.info import report
from tokenops.testing import assert_same_bits, random_tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def calls_of_the_reference(monkeypatch):
    """Names of the operators that went to the reference by choice."""
    from tokenops.ops.attention import reference as attention
    from tokenops.ops.matching import reference as matching
    from tokenops.ops.merging import reference as merging

    names = []
    for module, name in (
        (attention, "policy_attention"),
        (attention, "attention_scores"),
        (matching, "match"),
        (matching, "nearest"),
        (merging, "merge"),
        (merging, "merge_wavg"),
        (merging, "unmerge"),
    ):
        function = getattr(module, name)

        def spy(*args, _function=function, _name=name):
            names.append(_name)
            return _function(*args)

        monkeypatch.setattr(module, name, spy)
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


def test_the_choice_is_obeyed(backend, calls_of_the_reference):
    call_everything()
    expected = set(_library.operators)
    assert set(calls_of_the_reference) == (expected if backend == "reference" else set())


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
    assert there[-1] == "reference"
    assert list(there) == [b for b in _backend.BACKENDS if b in there]
    assert tokenops.available_backends(torch.device("cpu")) == there
    assert tokenops.available_backends("meta") == ("reference",)


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


# ---- Triton beside compiled CUDA kernels ----


class Compiled:
    """A kernel as the dispatcher gives it."""

    def call_boxed(self, keys, *args):
        return "compiled", keys, args


def in_triton(keys, *args):
    return "triton", keys, args


def test_triton_serves_while_it_is_chosen(monkeypatch):
    serve = _backend._if_chosen(in_triton, Compiled())
    for chosen in (None, "triton", "native", "triton", "reference", None):
        monkeypatch.setattr(_backend, "_forced", chosen)
        expected = "triton" if chosen == "triton" else "compiled"
        assert serve("keys", 1, None, [2]) == (expected, "keys", (1, None, [2]))


@pytest.fixture
def implemented(monkeypatch):
    """Kernels that were put in place of others, where merge alone has a compiled CUDA kernel."""
    kernels = []

    def implement(*args, **options):
        kernels.append((*args, options))

    def compiled_for(name):
        return frozenset(["cpu", "cuda"] if name == "merge" else ["cpu"])

    monkeypatch.setattr(_backend, "_let_in", [])
    monkeypatch.setattr(_backend, "_compiled_for", compiled_for)
    monkeypatch.setattr(_backend, "_on_cuda", lambda name, kernel: in_triton)
    monkeypatch.setattr(_library, "implement", implement)
    monkeypatch.setattr(torch.library, "get_kernel", lambda name, key: Compiled())
    return kernels


def test_triton_is_let_in_once_it_is_chosen(implemented):
    for name in ("native", "reference", None):
        with tokenops.use_backend(name):
            assert implemented == []  # each call would pass through Python
    for _ in range(2):
        with tokenops.use_backend("triton"):
            [(name, serve, key, options)] = implemented
            assert serve("keys", 1) == ("triton", "keys", (1,))
        assert serve("keys", 1) == ("compiled", "keys", (1,))
    assert (name, key, options) == ("merge", "CUDA", {"instead": True})


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
