# SPDX-License-Identifier: Apache-2.0
"""Tests of one backend on one device in one process: ``python -m benchmarks.gpu.suite``.

Only tests with tensors of that device run. Each test is recorded at once. After a CUDA error the
process can compute nothing; its exit status then asks for another start, which continues after the
failed test. A few such processes run side by side, each with a share of the tests, so that
pytest-xdist is not needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .record import GOOD, LEFT_OUT, POISONED, Row, append, is_cuda_error, read, settled


class Recorder:
    """pytest plugin: selects tests of a device, records them, and exits after a CUDA error.

    Tests that the file of records has do not run again. The backend ``"default"`` stands for tests
    without a backend.
    """

    def __init__(self, path: Path, backend: str, device: str) -> None:
        self.path, self.backend, self.device = path, backend, device
        self.known = settled(path)

    def wanted(self, item: pytest.Item) -> bool:
        """Whether a test is of this backend and device, and has not run."""
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        device = parameters.get("device")
        if device is None and item.get_closest_marker("cuda") is not None:
            device = "cuda"
        backend = parameters.get("backend", "default")
        return (backend, device) == (self.backend, self.device) and item.nodeid not in self.known

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if not self.wanted(item)])
        items[:] = filter(self.wanted, items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        append(self.path, Row(nodeid, "started"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else report.longreprtext[-1500:]
            append(self.path, Row(report.nodeid, report.outcome, report.duration, message))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.excinfo is not None and is_cuda_error(call.excinfo.value):
            self.pytest_runtest_logreport(report)
            print(f"\n{item.nodeid}\n{report.longreprtext[-3000:]}", flush=True)
            os._exit(POISONED)  # an orderly exit may hang
        return report


def main(arguments: list[str] | None = None) -> int:
    """Run the tests; returns 1 if a test failed, in an earlier start too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.suite", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="default")
    parser.add_argument("--share", default="1/1", help="2/5: the second of five parts")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="as for pytest")
    parser.add_argument("--unfilled", action="store_true", help="leave new memory as it is")
    parser.add_argument("paths", nargs="+")
    options = parser.parse_args(arguments)
    if options.backend == "native":
        from tokenops import _native

        if not _native.loaded:
            print(_native.reason)
            return LEFT_OUT
    if options.unfilled:  # by the tests' fixture, so that a checker sees reads of it
        import torch

        torch.utils.deterministic.fill_uninitialized_memory = False
    # Tests without a backend are collected beside those of some backend.
    backends = options.backend.replace("default", "reference")
    settings = ["-q", "-k", options.k, "-rf", "--tb=short", "-p", "no:cacheprovider"]
    settings += ["--backends", backends, "--devices", options.device, "--share", options.share]
    # torch 2.11 warns under deterministic algorithms.
    settings += ["--hypothesis-profile", "quick", "-W", "ignore:scatter_reduce_cuda_prod_"]
    plugin = Recorder(options.record, options.backend, options.device)
    status = pytest.main([*settings, *options.paths], plugins=[plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(status)
    return int(any(row.result not in GOOD for row in read(options.record).values()))


if __name__ == "__main__":
    sys.exit(main())
