# SPDX-License-Identifier: Apache-2.0
"""Fixtures and options of all tests: backends, devices, poisoned memory, profiles.

A test with an argument ``backend`` runs once for each backend, which is chosen explicitly, so that
nothing falls back silently. With an argument ``device`` it runs on each available device.
``pytest --help`` lists the options (under "tokenops"). ``--hypothesis-profile=thorough`` searches
longer and with a new seed each time, ``quick`` runs few examples.
"""

import ctypes
import os
import platform
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

import tokenops
from tokenops import _backend, _native

# Without this setting, matrix products on CUDA devices warn that they are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HAS_CUDA = torch.cuda.is_available()
#: Levels below the best one of this CPU; all other tests run at the best level.
ISA_LEVELS = ["portable", "avx2", "avx512"]

# Threads do not speed up small tensors, and slow them down on a busy machine. Separate tests check
# that the number of threads changes no bit.
torch.set_num_threads(1)

# Uninitialized memory holds 0x7f in each byte: 3e38 as a number, out of bounds as an index. This
# also fills memory of compiled code, unlike PyTorch's filling of empty tensors.
if platform.libc_ver()[0] == "glibc":
    M_PERTURB = -6
    ctypes.CDLL(None).mallopt(M_PERTURB, 0x80)

quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
settings.register_profile(
    "default", max_examples=200, derandomize=True, deadline=None, suppress_health_check=quiet
)
settings.register_profile("quick", parent=settings.get_profile("default"), max_examples=15)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=2000)
settings.register_profile("thorough", settings.get_profile("thorough"), derandomize=False)
settings.load_profile("default")


def pytest_addoption(parser):
    group = parser.getgroup("tokenops")
    group.addoption(
        "--backends", type=lambda names: names.split(","),
        default=["native", "triton", "reference"] if HAS_CUDA else ["native", "reference"],
        help="backends to test: native,reference, and triton beside a CUDA device, by default. One "
        "that is missing on the CPU fails the run. default: no explicit choice. With "
        "TRITON_INTERPRET=1, triton runs on the CPU too, slowly",
    )  # fmt: skip
    group.addoption(
        "--devices", type=lambda names: names.split(","),
        default=["cpu", "cuda"] if HAS_CUDA else ["cpu"], help="cpu,cuda; all of them by default",
    )  # fmt: skip
    group.addoption(
        "--share", default="1/1", help="1/8: one test in eight, always the same ones", metavar="K/N"
    )
    group.addoption(
        "--partial", action="store_true",
        help="skip tests of operators that the native library does not have, as always on CUDA "
        "devices, where Triton serves them; else they fail",
    )  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line("markers", "isa: runs again at each level of CPU vector instructions")
    config.addinivalue_line("markers", "native_only: about a promise that kernels alone make")


def pytest_generate_tests(metafunc):
    names = metafunc.fixturenames
    chosen, devices = metafunc.config.option.backends, metafunc.config.option.devices
    native_only = metafunc.definition.get_closest_marker("native_only") is not None
    backends = [b for b in chosen if b == "native" or not native_only]
    on_cpu = [b for b in backends if b != "triton" or _backend._interpreting]
    if "backend" in names and "device" in names:
        # On other devices the available backends. On the CPU all backends, or the run fails.
        pairs = [(b, "cpu") for b in on_cpu if "cpu" in devices]
        if "cuda" in devices:
            there = tokenops.available_backends("cuda")
            pairs += [(b, "cuda") for b in backends if b in there]
        ids = ["-".join(pair) for pair in pairs]
        metafunc.parametrize(("backend", "device"), pairs, ids=ids)
    elif "backend" in names:
        metafunc.parametrize("backend", on_cpu if "cpu" in devices else [])
    elif "device" in names:
        metafunc.parametrize("device", devices)
    if "isa_level" in names:
        metafunc.parametrize("isa_level", ISA_LEVELS if "native" in chosen else [])


def pytest_collection_modifyitems(config, items):
    number, of = map(int, config.option.share.split("/"))

    def wanted_here(item):
        if "cuda" not in config.option.devices and item.get_closest_marker("cuda") is not None:
            return False
        return zlib.crc32(item.nodeid.encode()) % of == number - 1

    config.hook.pytest_deselected(items=[item for item in items if not wanted_here(item)])
    items[:] = filter(wanted_here, items)
    parameters = [getattr(item, "callspec", None) for item in items]
    wanted = any(
        c.params.get("backend") == "native" or c.params.get("isa_level") in ISA_LEVELS
        for c in parameters
        if c is not None
    )
    if wanted and not _native.loaded:
        raise pytest.UsageError(
            f"the native backend cannot be tested: {_native.reason}\n"
            "(--backends=reference tests the reference only)"
        )


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except NotImplementedError as error:
        callspec = getattr(pyfuncitem, "callspec", None)
        partial = pyfuncitem.config.option.partial
        partial = partial or (callspec and callspec.params.get("device") == "cuda")
        if partial and "the compiled library has no" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def quick():
    """Whether the Hypothesis profile is ``quick``."""
    return settings.default.max_examples < 100


@pytest.fixture(autouse=True)
def _chosen_backend(request):
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    with tokenops.use_backend(None if backend == "default" else backend):
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Let PyTorch fill empty tensors with NaN and huge indices, so that reading them is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)
