# SPDX-License-Identifier: Apache-2.0
"""The warning about missing kernels; most tests use a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenops
from tokenops import _missing, _native
from tokenops.info import report

ROOT = Path(__file__).resolve().parent.parent

START = """
import threading, warnings
import torch, tokenops
from torch._subclasses.fake_tensor import FakeTensorMode
warnings.simplefilter("always")
caught = []
warnings.showwarning = lambda *details: caught.append(details)
x = torch.randn(2, 9, 4)
"""


def run(code, **environment):
    """Run code in a process without a compiled library, unless the environment names one."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TOKENOPS_")}
    variables |= {"TOKENOPS_LIBRARY": "/nonexistent/_C.so", **environment}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        env={**variables, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_call_without_a_library_warns_once():
    run("""
assert not caught
token_map = tokenops.match(x, 2)  # line 11
tokenops.merge(x, token_map)
tokenops.policy_attention(x[:, None], x[:, None], x[:, None])
message, category, file, line, *_ = *caught[0], None
assert len(caught) == 1, caught
assert category is RuntimeWarning and (file, line) == ("<string>", 11), (file, line)
text = str(message)
assert "plain PyTorch serves cpu tensors" in text and "/nonexistent/_C.so" in text, text
assert "compiler" in text and "TOKENOPS_BACKEND=composed" in text and "\\n" not in text, text
""")


def test_threads_warn_once():
    run("""
barrier = threading.Barrier(8)
def work():
    barrier.wait()
    tokenops.match(x, 2)
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(caught) == 1, caught
""")


def test_a_warning_that_is_an_error_leaves_the_next_call_alone():
    run("""
warnings.simplefilter("error")
try:
    tokenops.match(x, 2)
except RuntimeWarning:
    assert tokenops.match(x, 2).assign.shape == (2, 9)
else:
    raise AssertionError("no warning")
""")


QUIET = {
    "meta tensors": "tokenops.merge_wavg(x.to('meta'), tokenops.match(x.to('meta'), 2))",
    "fake tensors": """
with FakeTensorMode():
    tokenops.match(torch.empty(2, 9, 4), 2)
""",
    "export": """
class Match(torch.nn.Module):
    def forward(self, x):
        return tokenops.match(x, 2).assign
torch.export.export(Match(), (x,))
""",
    "torch.compile while it traces": """
def backend(graph, inputs):
    return lambda *args: (x,)
torch.compile(lambda x: tokenops.merge(x, tokenops.match(x, 2)), backend=backend)(x)
""",
    "a chosen backend": """
for name in ("composed", "reference"):
    with tokenops.use_backend(name):
        y = x.clone().requires_grad_()
        tokenops.merge(y, tokenops.match(y, 2)).sum().backward()
""",
}


@pytest.mark.parametrize("kind", QUIET)
def test_no_warning(kind):
    run(QUIET[kind] + "\nassert not caught, caught")


def test_no_warning_with_a_backend_in_the_environment():
    run("tokenops.match(x, 2)\nassert not caught, caught", TOKENOPS_BACKEND="composed")


def test_a_compiled_function_warns_when_it_runs():
    run("""
f = torch.compile(lambda x: tokenops.merge(x, tokenops.match(x, 2)), backend="aot_eager")
f(x)
f(x)
assert len(caught) == 1, caught
""")


def test_info_names_what_is_missing():
    text = run("from tokenops.info import report; print(report()); assert not caught")
    assert "plain PyTorch serves: no compiled library: TOKENOPS_LIBRARY=/nonexistent" in text


def test_info_knows_every_accelerator(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: meta
    )
    text = report()
    assert "operators on meta\n  plain PyTorch serves: tokenops has kernels for CPU and" in text
    assert text.count("  merge_wavg ") == 2


@pytest.mark.native_only
def test_no_warning_with_a_library(backend):
    run("tokenops.match(x, 2)\nassert not caught, caught", TOKENOPS_LIBRARY=_native.path)
    assert _missing.advice("cpu") == ""


def test_devices_without_kernels(monkeypatch):
    """Each device type warns once; CUDA tensors need no library if Triton is installed."""
    monkeypatch.setattr(_missing, "_known", set())
    with tokenops.use_backend(None):
        for device in ("mps", "xpu"):
            with pytest.warns(RuntimeWarning, match=f"serves {device} tensors: .*CPU and CUDA"):
                _missing.warn(device)
            _missing.warn(device)
        for found, expected in ((object(), ""), (None, "Triton is not installed")):
            monkeypatch.setattr(_missing.importlib.util, "find_spec", lambda name, f=found: f)
            assert _missing.advice("cuda").startswith(expected)
            assert bool(_missing.advice("cuda")) == bool(expected)
        _missing.warn("meta")
    assert "meta" not in _missing._known
