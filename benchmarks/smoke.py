# SPDX-License-Identifier: Apache-2.0
"""Every operator once, forward and backward, at small sizes: ``python -m benchmarks.smoke``.

For checkers of memory and races, under which a test suite would take hours, and as the first thing
to run on a new machine. Results are compared with the reference in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
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

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Largest error, relative to the largest entry: what is looked for is garbage, not rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Check = Callable[[torch.dtype, torch.device], None]


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


def _nearest(dtype: torch.dtype, device: torch.device) -> None:
    for lead, width in (((2,), 64), ((2, 3), 64), ((1,), 320)):
        a = random_tokens(*lead, 75, width, dtype=dtype, device=device, seed=1)
        b = random_tokens(*lead, 70, width, dtype=dtype, device=device, seed=2)
        _, index = tokenops.nearest(a, b)
        regret = nearest_regret(a, b, index)
        if not (regret <= similarity_rounding(torch.cat([a, b], -2))).all():
            raise AssertionError(f"gave away {regret.max():.2g} of similarity")
        tokenops.nearest(a.requires_grad_(), b)[0].sum().backward()


def _match(dtype: torch.dtype, device: torch.device) -> None:
    x = random_tokens(2, 197, 64, dtype=dtype, device=device, seed=3)
    protected = torch.arange(197, device=device) % 7 == 3
    for options in (
        {"num_prefix": 1},
        {"num_prefix": 1, "order": "tome"},
        {"order": "tome", "split": tokenops.strided(3)},
        {"split": tokenops.grid(14, 14, 2, 2), "num_prefix": 1},
        {"threshold": 0.1, "protected": protected},
    ):
        token_map = tokenops.match(x, 16, **options)
        assert_valid_token_map(token_map)
        token_map.compose(token_map.identity(2, 197, device))
    large = random_tokens(1, 5000, 64, dtype=dtype, device=device, seed=4)
    assert_valid_token_map(tokenops.match(large, 1000))


def _merging(dtype: torch.dtype, device: torch.device) -> None:
    labels = torch.arange(3 * 67, device=device).reshape(3, 67) ** 2 % 13 - 1
    token_map = tokenops.TokenMap.from_assign(labels, 15)
    x = random_tokens(3, 67, 40, dtype=dtype, device=device, seed=5)
    odd = random_tokens(3, 67, 37, dtype=dtype, device=device, seed=6)
    size = torch.rand(3, 67, 1, device=device) + 0.5
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        compare(lambda x, r=reduce: tokenops.merge(x, token_map, reduce=r), {"x": odd})
    compare(lambda x, w: tokenops.merge(x, token_map, weight=w), {"x": x, "w": size})
    compare(lambda x, s: tokenops.merge_wavg(x, token_map, s), {"x": x, "s": size})
    y = random_tokens(3, 15, 40, dtype=dtype, device=device, seed=7)
    compare(lambda y, r: tokenops.unmerge(y, token_map, residual=r), {"y": y, "r": x})


#: Kinds of inputs, and options of the call.
ATTENTION: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"policy": "soft"}, {"eps": 1e-6}),
    ({"policy": "hard", "zero_sizes": 0.1}, {}),
    ({"policy": "per-head", "padding": 0.2, "key_heads": 1}, {"eps": 1e-2, "is_causal": True}),
    ({"zero_sizes": 0.0}, {}),
)


def _attention(dtype: torch.dtype, device: torch.device) -> None:
    for tokens, width, value_width in ((70, 64, 112), (197, 32, 32), (300, 80, 80)):
        for kinds, options in ATTENTION:
            kinds = {"value_width": value_width, "dtype": dtype, "device": device, **kinds}
            inputs = random_attention(2, 2, tokens, width, **kinds)
            compare(lambda o=options, **x: tokenops.policy_attention(**x, **o), inputs)


def _scores(dtype: torch.dtype, device: torch.device) -> None:
    for tokens in (70, 300):
        for kinds, options in ATTENTION:
            inputs = random_attention(2, 2, tokens, 64, dtype=dtype, device=device, **kinds)
            del inputs["v"]
            for rows in ({"query_index": [0]}, {"query_weight": torch.rand(tokens, device=device)}):
                chosen = {**options, **rows}
                compare(lambda o=chosen, **x: tokenops.attention_scores(**x, **o), inputs)


CHECKS: dict[str, Check] = {
    "nearest": _nearest,
    "match": _match,
    "merging": _merging,
    "policy_attention": _attention,
    "attention_scores": _scores,
}


def run(device: torch.device, dtypes: list[str], only: list[str]) -> Iterator[tuple[str, str]]:
    """Run the checks, and tell what is wrong with each; nothing if it passed."""
    for name in only or CHECKS:
        for dtype in dtypes:
            problem = ""
            try:
                CHECKS[name](DTYPES[dtype], device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except Exception as error:  # what a device reports comes as a RuntimeError
                problem = f"{type(error).__name__}: {error}"
            yield f"{name} {dtype}", problem


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; the result counts failures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default=None, help="the best one by default")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[])
    options = parser.parse_args(arguments)
    failures = 0
    with tokenops.use_backend(options.backend):
        for name, problem in run(torch.device(options.device), options.dtype, options.only):
            print(f"{name:<28} {problem or 'ok'}", flush=True)
            failures += bool(problem)
    return failures


if __name__ == "__main__":
    sys.exit(main())
