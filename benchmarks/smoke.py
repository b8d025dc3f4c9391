# SPDX-License-Identifier: Apache-2.0
"""Every operator once, forward and backward, at small sizes: ``python -m benchmarks.smoke``.

For checkers of memory and races, under which a test suite would take hours, and as the first thing
to run on a new machine. Results are compared with the reference in float64. A case that fails does
not keep the others from running; ``--record`` notes each one in a file at once, and a second start
goes on after those that it has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops.testing import (
    assert_valid_token_map,
    nearest_regret,
    random_attention,
    random_tokens,
    similarity_rounding,
)

from .gpu import record

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Largest error, relative to the largest entry: what is looked for is garbage, not rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: A name and a call that raises if something is wrong.
Cases = Iterator[tuple[str, Callable[[], object]]]
#: Makes the cases of a dtype and a device.
Check = Callable[[torch.dtype, torch.device], Cases]


def results(function: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """What a function returns, and its gradients in all floating-point inputs."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    outputs = function(**leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in leaves.values() if t.requires_grad]
    total = sum((o.double() * torch.linspace(-1, 1, o.numel()).to(o).view_as(o)).sum()
                for o in outputs)  # fmt: skip
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


def compare(function: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Assert that results and gradients are those of the reference in float64."""
    got = results(function, inputs)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    with tokenops.use_backend("reference"):
        expected = results(function, wide)
    tolerance = max(TOLERANCE.get(t.dtype, 0) for t in inputs.values())
    for value, truth in zip(got, expected, strict=True):
        error = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
        if not error <= tolerance:
            raise AssertionError(f"off by {error:.2g} of the largest entry")


def _nearest(dtype: torch.dtype, device: torch.device) -> Cases:
    def check(lead: tuple[int, ...], width: int) -> None:
        a = random_tokens(*lead, 75, width, dtype=dtype, device=device, seed=1)
        b = random_tokens(*lead, 70, width, dtype=dtype, device=device, seed=2)
        _, index = tokenops.nearest(a, b)
        regret = nearest_regret(a, b, index)
        if not (regret <= similarity_rounding(torch.cat([a, b], -2))).all():
            raise AssertionError(f"gave away {regret.max():.2g} of similarity")
        tokenops.nearest(a.requires_grad_(), b)[0].sum().backward()

    for lead, width in (((2,), 64), ((2, 3), 64), ((1,), 320)):
        yield f"{'x'.join(map(str, lead))} of {width}", partial(check, lead, width)


def _match(dtype: torch.dtype, device: torch.device) -> Cases:
    def check(tokens: int, r: int, options: dict[str, Any]) -> None:
        x = random_tokens(2, tokens, 64, dtype=dtype, device=device, seed=3)
        token_map = tokenops.match(x, r, **options)
        assert_valid_token_map(token_map)
        token_map.compose(token_map.identity(2, tokens, device))

    protected = torch.arange(197, device=device) % 7 == 3
    for name, options in (
        ("prefix", {"num_prefix": 1}),
        ("tome order, prefix", {"num_prefix": 1, "order": "tome"}),
        ("tome order, strided", {"order": "tome", "split": tokenops.strided(3)}),
        ("grid", {"split": tokenops.grid(14, 14, 2, 2), "num_prefix": 1}),
        ("threshold", {"threshold": 0.1, "protected": protected}),
    ):
        yield name, partial(check, 197, 16, options)
    yield "5000 tokens", partial(check, 5000, 1000, {})


def _merging(dtype: torch.dtype, device: torch.device) -> Cases:
    labels = torch.arange(3 * 67, device=device).reshape(3, 67) ** 2 % 13 - 1
    token_map = tokenops.TokenMap.from_assign(labels, 15)
    x = random_tokens(3, 67, 40, dtype=dtype, device=device, seed=5)
    odd = random_tokens(3, 67, 37, dtype=dtype, device=device, seed=6)
    y = random_tokens(3, 15, 40, dtype=dtype, device=device, seed=7)
    size = torch.rand(3, 67, 1, device=device) + 0.5
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        merge = partial(tokenops.merge, token_map=token_map, reduce=reduce)
        yield reduce, partial(compare, merge, {"x": odd})
    for name, function, inputs in (
        ("weight", lambda x, w: tokenops.merge(x, token_map, weight=w), {"x": x, "w": size}),
        ("wavg", lambda x, s: tokenops.merge_wavg(x, token_map, s), {"x": x, "s": size}),
        ("unmerge", lambda y, r: tokenops.unmerge(y, token_map, residual=r), {"y": y, "r": x}),
    ):
        yield name, partial(compare, function, inputs)


#: Kinds of inputs, and options of the call.
ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "soft": ({"policy": "soft"}, {"eps": 1e-6}),
    "hard": ({"policy": "hard", "zero_sizes": 0.1}, {}),
    "per-head": (
        {"policy": "per-head", "padding": 0.2, "key_heads": 1},
        {"eps": 1e-2, "is_causal": True},
    ),
    "sizes": ({"zero_sizes": 0.0}, {}),
}


def _attention(dtype: torch.dtype, device: torch.device) -> Cases:
    def check(
        sizes: tuple[int, int], wide: int, kinds: dict[str, Any], options: dict[str, Any]
    ) -> None:
        kinds = {"value_width": wide, "dtype": dtype, "device": device, **kinds}
        inputs = random_attention(2, 2, *sizes, **kinds)
        compare(lambda **x: tokenops.policy_attention(**x, **options), inputs)

    for tokens, width, value_width in ((70, 64, 112), (197, 32, 32), (300, 80, 80)):
        for name, (kinds, options) in ATTENTION.items():
            call = partial(check, (tokens, width), value_width, kinds, options)
            yield f"{name}, {tokens} tokens", call


def _scores(dtype: torch.dtype, device: torch.device) -> Cases:
    def check(tokens: int, rows: str, kinds: dict[str, Any], options: dict[str, Any]) -> None:
        inputs = random_attention(2, 2, tokens, 64, dtype=dtype, device=device, **kinds)
        del inputs["v"]
        weights = {"query_weight": torch.rand(tokens, device=device)}
        chosen = {"query_index": [0]} if rows == "class" else weights
        compare(lambda **x: tokenops.attention_scores(**x, **options, **chosen), inputs)

    for tokens in (70, 300):
        for name, (kinds, options) in ATTENTION.items():
            for rows in ("class", "columns"):
                call = partial(check, tokens, rows, kinds, options)
                yield f"{name}, {tokens} tokens, {rows}", call


CHECKS: dict[str, Check] = {
    "nearest": _nearest,
    "match": _match,
    "merging": _merging,
    "policy_attention": _attention,
    "attention_scores": _scores,
}


def run(
    device: torch.device,
    dtypes: list[str],
    only: list[str],
    known: Container[str] = (),
    starts: Callable[[str], object] = lambda case: None,
) -> Iterator[tuple[str, Exception | None]]:
    """Run the cases of the checks, but for known ones, and tell what each one raised.

    Ends early after a CUDA error: nothing that this process does afterwards says anything.
    """
    for name in only or CHECKS:
        for dtype in dtypes:
            for case, call in _cases(name, DTYPES[dtype], device):
                full = f"{name} {dtype} {case}"
                if full in known:
                    continue
                starts(full)
                problem = None
                try:
                    call()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                except Exception as error:
                    problem = error
                yield full, problem
                if problem is not None and record.is_cuda_error(problem):
                    return


def _cases(name: str, dtype: torch.dtype, device: torch.device) -> Cases:
    """The cases of a check; where making their inputs fails, a case that says so."""
    try:
        yield from CHECKS[name](dtype, device)
    except Exception as error:
        problem = error

        def fail() -> None:
            raise problem

        yield "inputs", fail


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the result counts failures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default=None, help="the best one by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[])
    parser.add_argument("--record", type=Path, help="CSV file of cases and results")
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
            print(f"{name:<40} {text or 'ok'}", flush=True)
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
