# SPDX-License-Identifier: Apache-2.0
"""Cost, dependencies and side effects of ``import tokenops``; each test uses a new process."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    """Run code in a new interpreter and return what it prints, as JSON."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("TOKENOPS_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**variables, "PYTHONPATH": path, **environment}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


USE = """
import json, torch, tokenops
x = torch.randn(2, 9, 4, requires_grad=True)
token_map = tokenops.match(x, 2)
y, size = tokenops.merge_wavg(x, token_map)
tokenops.unmerge(y, token_map, residual=x).sum().backward()
print(json.dumps({
    "loaded": tokenops._native.loaded,
    "reason": tokenops._native.reason,
    "backends": tokenops.available_backends(),
    "shape": list(y.shape),
    "gradient": bool(x.grad.isfinite().all()),
}))
"""


def test_without_a_library():
    """Plain PyTorch serves all calls, and the reason names the missing library."""
    found = python(USE, TOKENOPS_LIBRARY="/nonexistent/_C.so")
    assert not found["loaded"]
    assert "/nonexistent/_C.so" in found["reason"]
    assert found["backends"] == ["composed", "reference"]
    assert found["shape"] == [2, 7, 4]
    assert found["gradient"]


def test_with_a_broken_library(tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    found = python(USE, TOKENOPS_LIBRARY=str(broken))
    assert not found["loaded"]
    assert "cannot be loaded" in found["reason"]
    assert found["backends"] == ["composed", "reference"]


def test_forcing_a_missing_library_says_why():
    code = """
import json, torch, tokenops
tokenops.use_backend("native")
try:
    tokenops.match(torch.randn(1, 4, 2), 1)
except NotImplementedError as error:
    print(json.dumps(str(error)))
"""
    message = python(code, TOKENOPS_LIBRARY="/nonexistent/_C.so")
    assert message.startswith("match: backend 'native' was chosen but cannot serve it")
    assert "/nonexistent/_C.so" in message


def test_without_a_compiler_triton_transformers_or_a_home():
    """No compiler and no optional package is used, and no file is written."""
    blocked = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'timm', 'diffusers', 'numpy', 'setuptools'):\n"
        "    sys.modules[name] = None\n"
    )
    found = python(blocked + USE, PATH="", HOME="/nonexistent", CXX="/nonexistent/c++")
    assert found["shape"] == [2, 7, 4]


@pytest.mark.parametrize("library", ["", "/nonexistent/_C.so"], ids=["as-is", "no-library"])
def test_modules_that_come_along(library):
    """No compiler front ends, no integrations, and no package except torch are imported."""
    code = """
import json, sys, torch
before = set(sys.modules)
import tokenops
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    modules = python(code, **({"TOKENOPS_LIBRARY": library} if library else {}))
    packages = {name.partition(".")[0] for name in modules}
    assert not packages & {"triton", "transformers", "timm", "diffusers", "hypothesis", "pytest"}
    assert not [m for m in modules if m.startswith(("torch._dynamo", "torch._inductor"))]
    own = [m for m in modules if m.startswith("tokenops")]
    assert not [m for m in own if m.split(".")[1:2] in (["compat"], ["integrations"], ["testing"])]


def test_touches_no_device():
    code = """
import json, torch
def touched(*args, **kwargs):
    raise AssertionError("a device was touched")
for name in ("_lazy_init", "init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, touched)
torch.accelerator.is_available = torch.accelerator.current_accelerator = touched
state = torch.get_rng_state()
threads = torch.get_num_threads()
import tokenops
assert not torch.cuda.is_initialized()
assert torch.equal(state, torch.get_rng_state())
assert threads == torch.get_num_threads()
print(json.dumps(True))
"""
    assert python(code)


def test_is_quick():
    """At most 0.3 s of CPU time after the import of torch."""
    code = """
import json, time, torch
start = time.process_time()
import tokenops
print(json.dumps(time.process_time() - start))
"""
    seconds = [python(code) for _ in range(5)]
    assert statistics.median(seconds) <= 0.3, seconds


def test_backend_from_the_environment():
    code = "import json, tokenops\nprint(json.dumps(tokenops._choice.chosen()))"
    assert python(code, TOKENOPS_BACKEND="reference") == "reference"
    assert python(code, TOKENOPS_BACKEND="") is None
    refused = """
import json
try:
    import tokenops
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert "TOKENOPS_BACKEND must be one of" in python(refused, TOKENOPS_BACKEND="cuda")


def test_info_reports_without_a_library():
    code = """
import json
from tokenops.info import report
print(json.dumps(report()))
"""
    report = python(code, TOKENOPS_LIBRARY="/nonexistent/_C.so")
    assert "/nonexistent/_C.so" in report
    assert "operators on cpu" in report


def test_debug_mode_imports():
    found = python(USE, TOKENOPS_DEBUG="1")
    assert found["shape"] == [2, 7, 4]
