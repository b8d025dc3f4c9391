# SPDX-License-Identifier: Apache-2.0
"""Every call in the operators' samples once, at small sizes: ``python -m benchmarks.smoke``.

The first program to run on a new machine, and one that memory and race checkers can run in a
minute. Results and gradients are compared with the reference in float64. After a failed case the
others still run. With ``--record`` each case is recorded at once, and a second start skips the
cases that the record has.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import tokenops
from tokenops import _library
from tokenops.testing import (
    assert_valid_token_map,
    matching_regret,
    nearest_regret,
    similarity_rounding,
)
from tokenops.testing.samples import Call, Sizes

from .gpu import record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Largest error, relative to the largest entry: wrong results are looked for, not rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: Sizes, and beginnings of the names of the calls that are made at these sizes: each call at the
#: first sizes, some at others, where kernels differ. Triton compiles kernels for each.
LONG = ("policy_attention", "attention_scores per head", "attention_scores sizes")
SIZES = (
    (Sizes(tokens=75, width=64, value_width=112, channels=37), ("",)),
    (Sizes(tokens=300, width=80, channels=40), (*LONG, "merge", "unmerge")),
    (Sizes(tokens=197, width=320), ("nearest cosine", "match plain", "match threshold")),
    (Sizes(batch=1, tokens=5000, width=64), ("match plain",)),
)


def calls(operator: str, sizes: Sizes) -> Iterator[Call]:
    """The calls about an operator in its family's samples."""
    family = _library.defined[operator].module.rpartition(".")[0]
    for call in importlib.import_module(f"{family}.samples").calls(sizes):
        if call.operator == operator:
            yield call


def outcome(call: Call) -> list[Tensor]:
    """Results of a call, then its gradients."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    results = call.function(**leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    inputs = [t for t in leaves.values() if t.requires_grad]
    terms = [(t.double() * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sum()
             for t in results if t.requires_grad]  # fmt: skip
    gradients = torch.autograd.grad(sum(terms), inputs, allow_unused=True) if terms else ()
    return [t.detach() for t in results] + [g for g in gradients if g is not None]


def verify(call: Call, got: list[Tensor]) -> None:
    """Assert that results are right, and gradients where they do not depend on choices."""
    if call.chooses:
        verify_choices(call, got)
        return
    wide = {n: t.double() if t.is_floating_point() else t for n, t in call.tensors.items()}
    with tokenops.use_backend("reference"):
        expected = outcome(call._replace(tensors=wide))
    tolerance = max(TOLERANCE.get(t.dtype, 0) for t in call.tensors.values())
    for value, truth in zip(got, expected, strict=True):
        error = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
        if not error <= tolerance:
            raise AssertionError(f"off by {error:.2g} of the largest entry")


def verify_choices(call: Call, got: list[Tensor]) -> None:
    """Assert that the chosen pairs are as similar as the best ones, but for rounding."""
    given = call.function.keywords if isinstance(call.function, partial) else {}
    if call.operator == "nearest":
        options = {n: given[n] for n in ("similarity", "b_mask") if n in given}
        regret = nearest_regret(*call.tensors.values(), got[1], **options)
    else:
        token_map = tokenops.TokenMap(*got)
        assert_valid_token_map(token_map)
        batch, tokens = token_map.assign.shape
        token_map.compose(token_map.identity(batch, tokens, token_map.assign.device))
        if "options" not in given:  # several matches, composed
            return
        names = ("num_prefix", "protected", "split", "similarity")
        options = {n: given["options"][n] for n in names if n in given["options"]}
        regret = matching_regret(*call.tensors.values(), token_map, **options)
    rows = torch.cat([*call.tensors.values()], -2)
    bound = similarity_rounding(rows, options.get("similarity", "cosine"))
    if not (regret <= bound).all():
        raise AssertionError(f"gave away {regret.max():.2g} of similarity")


def cases(
    operator: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Callable[[], None]]]:
    """For each call about an operator its name, and a function that makes and verifies it."""

    def check(call: Call) -> None:
        verify(call, outcome(call))

    for sizes, names in SIZES:
        for call in calls(operator, replace(sizes, dtype=dtype, device=device)):
            if f"{operator} {call.name}".startswith(names):
                yield f"{call.name}, {sizes.tokens} tokens", partial(check, call)


def run(
    device: torch.device,
    dtypes: list[str],
    only: list[str],
    known: Container[str] = (),
    starts: Callable[[str], object] = lambda case: None,
) -> Iterator[tuple[str, Exception | None]]:
    """Run the cases of operators, except for known ones, and yield what each one raised.

    Ends early after a CUDA error, after which the process can compute nothing.
    """
    for operator, dtype in itertools.product(only or _library.operators, dtypes):
        try:
            for case, check in cases(operator, DTYPES[dtype], device):
                full, problem = f"{operator} {dtype} {case}", None
                if full in known:
                    continue
                starts(full)
                try:
                    check()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                except Exception as error:
                    problem = error
                yield full, problem
                if problem is not None and record.is_cuda_error(problem):
                    return
        except Exception as error:
            yield f"{operator} {dtype} inputs", error


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that the command line names; returns the number of failures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default=None, help="the default of each device, if not given")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=_library.operators, default=[])
    parser.add_argument("--record", type=Path, help="file of cases and results")
    options = parser.parse_args(arguments)
    known = record.settled(options.record) if options.record else set()
    rows = record.read(options.record) if options.record else {}
    failures = sum(rows[case].result not in record.GOOD for case in known)

    def note(case: str, result: str = "started", seconds: float = 0.0, message: str = "") -> None:
        if options.record:
            record.append(options.record, record.Row(case, result, seconds, message))

    start = time.perf_counter()
    with tokenops.use_backend(options.backend):
        device = torch.device(options.device)
        for name, problem in run(device, options.dtype, options.only, known, note):
            text = "" if problem is None else f"{type(problem).__name__}: {problem}"
            print(f"{name:<50} {text or 'ok'}", flush=True)
            now = time.perf_counter()
            note(name, "failed" if text else "passed", now - start, text)
            start = now
            failures += bool(text)
            if problem is not None and record.is_cuda_error(problem):
                return record.POISONED
    print(f"{failures} failed" if failures else "all ok")
    return min(failures, 64)


if __name__ == "__main__":
    sys.exit(main())
