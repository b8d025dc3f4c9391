# SPDX-License-Identifier: Apache-2.0
"""Compare the speed of the working tree with that of a commit: ``make bench-compare BASE=main``.

The commit is checked out and built in ``build/bench-compare``. Two processes, each with the package
of one tree, run the same cases and take turns sample by sample, after a check of their results
against the eager recipe. A case is slower if the median ratio of its samples exceeds the threshold
and the 95 % interval of that median (the noise) excludes 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import machine, measure
from .cases import DTYPES
from .registry import find
from .timing import Policy, Sample, Sampler, Series, interleave

ROOT = Path(__file__).resolve().parent.parent

#: Seconds between the turns of two processes: idle OpenMP threads spin for some milliseconds before
#: they sleep, and would take the processor from the other process.
PAUSE = 0.02

#: Samples of a turn, of which the last one counts: after a pause, the first ones are slow.
SETTLE = 5

#: Imports tokenops from one tree and the benchmarks from another one.
CHILD = """
import sys
sys.path[0] = sys.argv[1]
import tokenops
assert tokenops.__file__.startswith(sys.argv[1]), tokenops.__file__
sys.path[0] = sys.argv[2]
from benchmarks import compare
compare.serve(sys.argv[3:])
"""


class Process(subprocess.Popen[str]):
    """A process that runs cases with the package of a tree; a context ends it."""

    def __init__(self, tree: Path, arguments: list[str]) -> None:
        environment = {**os.environ, **machine.TUNED}
        environment.pop("TOKENOPS_LIBRARY", None)  # each tree has its own
        super().__init__(
            [sys.executable, "-c", CHILD, str(tree), str(ROOT), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True,
        )  # fmt: skip

    def ask(self, *request: str) -> dict[str, Any]:
        """Send a request: the operator, name and dtype of a case, or nothing for a sample of it."""
        print(json.dumps(request), file=self.stdin, flush=True)
        return json.loads(self.stdout.readline() or '{"error": "crashed"}')


def serve(arguments: list[str]) -> None:
    """Answer the requests of :class:`Process` on standard input."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    out, sys.stdout = sys.stdout, sys.stderr
    sample: Sampler | None = None
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if request:
                sample = None  # frees the case before
                sample = _prepare(*request, options)
            else:
                answer = asdict([sample() for _ in range(SETTLE)][-1])
        except Exception as error:
            answer = {"error": measure.explain(error)}
        print(json.dumps(answer), file=out, flush=True)


def _prepare(operator: str, name: str, dtype: str, options: argparse.Namespace) -> Sampler:
    case = find(operator, name)
    case = case.tiny() if options.rehearse else case
    work = case.prepare(DTYPES[dtype], torch.device(options.device))
    names = [rival for rival in ("tokenops", "eager") if rival in work.rivals]
    rows = {rival: measure.new_row(case, dtype, rival, {}) for rival in names}
    with torch.inference_mode(work.inference):
        ready = measure.make_ready(case, work, rows, *measure.timing_of(options))["tokenops"]
    if rows.get("eager", {}).get("status") == "differs":
        raise ValueError("the result is not that of the eager recipe")
    return torch.inference_mode(work.inference)(ready)


def ratio(base: Series, tree: Series) -> tuple[float, float]:
    """Median time of the tree over that of the base, and its noise.

    The noise is half of an approximate 95 % interval of a median, 1.57 IQR / sqrt(n).
    """
    pairs = list(zip(base.samples, tree.samples, strict=True))
    clean = [(b, t) for b, t in pairs if b.clean and t.clean]
    used = clean if len(clean) >= max(2, base.enough) else pairs
    ratios = [t.seconds / b.seconds for b, t in used]
    if len(ratios) < 2:
        return ratios[0], float("inf")
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, 1.57 * (high - low) / len(ratios) ** 0.5


def is_slower(median: float, noise: float, threshold: float) -> bool:
    """Whether a case is slower by more than the threshold, in percent, and by more than noise."""
    return median > 1 + threshold / 100 and median - noise > 1


def checkout(base: str) -> Path:
    """Check a commit out and build it; a second call only builds changes of the build."""
    git = ["git", "-C", str(ROOT)]
    verify = [*git, "rev-parse", "--verify", f"{base}^{{commit}}"]
    commit = subprocess.run(verify, check=True, capture_output=True, text=True).stdout.strip()
    tree = ROOT / "build" / "bench-compare" / commit[:12]
    if not tree.exists():
        add = [*git, "worktree", "add", "--force", "--detach", str(tree), commit]
        subprocess.run(add, check=True, stdout=sys.stderr)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True, stdout=sys.stderr)
    return tree


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    p.add_argument("--base", default="HEAD", help="commit to compare with (HEAD)")
    p.add_argument("--threshold", type=float, default=5.0, help="percent (5)")
    measure.add_choice(p)
    p.set_defaults(budget=10.0)
    return p


def compare(
    trees: dict[str, Any], request: tuple[str, ...], policy: Policy, threshold: float
) -> tuple[str, bool]:
    """Times and ratio of a case in words, and whether the working tree is slower or fails.

    ``trees`` has a process for ``"base"`` and for ``"tree"``.
    """
    for name, process in trees.items():
        if "error" in (answer := process.ask(*request)):
            # an operator may be new in the base
            return f"{name}: {answer['error']}", name == "tree"

    def sampler(process: Any) -> Sampler:
        def sample() -> Sample:
            time.sleep(PAUSE)
            return Sample(**process.ask())

        return sample

    found = interleave({name: sampler(process) for name, process in trees.items()}, policy)
    median, noise = ratio(**found)
    bad = is_slower(median, noise, threshold)
    times = "".join(f"{found[name].seconds(0.5) * 1e6:>12.4g}" for name in ("base", "tree"))
    return f"{times}   {median:.3f} +- {noise:.3f}{'   SLOWER' if bad else ''}", bad


def main(argv: list[str] | None = None, trees: Callable[[str], Path] = checkout) -> int:
    """Print a line per case; return 1 if one is slower than the threshold, or fails."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    folders = {"tree": ROOT, "base": trees(options.base)}
    _, policy = measure.timing_of(options)
    print(f"{'microseconds':<56}{options.base[:11]:>12}{'this tree':>12}   ratio")
    failures = 0
    jobs = [(case, dtype) for case in measure.cases_of(options) for dtype in options.dtype]
    with ExitStack() as running:

        def start() -> dict[str, Process]:
            running.close()
            return {n: running.enter_context(Process(f, argv)) for n, f in folders.items()}

        processes = start()
        for case, dtype in jobs:
            request = (case.operator, case.name, dtype)
            words, bad = compare(processes, request, policy, options.threshold)
            if bad:  # a process may have bad luck with its memory: two in a row hardly have
                processes = start()
                words, bad = compare(processes, request, policy, options.threshold)
            failures += bad
            print(f"{' '.join(request):<56}{words}", flush=True)
    print(f"{failures} of {len(jobs)} slower than {options.threshold:g} %, or failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
