# SPDX-License-Identifier: Apache-2.0
"""Results and gradients of every sample call at small sizes, against the reference.

Run these tests first on a new machine. They are few enough for memory and race checkers.
"""

import importlib
from functools import partial

import pytest
import torch

import tokenops
from benchmarks import smoke
from tokenops.testing import (
    assert_valid_token_map,
    matching_regret,
    nearest_regret,
    similarity_rounding,
)
from tokenops.testing.samples import Sizes

DTYPES = smoke.DTYPES if torch.cuda.is_available() else ["float32"]


#: Largest error, relative to the largest entry: wrong results are looked for, not rounding.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify(call, got):
    """Assert that results are right, and gradients where they do not depend on choices."""
    if call.chooses:
        verify_choices(call, got)
        return
    wide = {n: t.double() if t.is_floating_point() else t for n, t in call.tensors.items()}
    with tokenops.use_backend("reference"):
        expected = smoke.outcome(call._replace(tensors=wide))
    tolerance = max(TOLERANCE.get(t.dtype, 0) for t in call.tensors.values())
    for value, truth in zip(got, expected, strict=True):
        error = (value.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"off by {error:.2g} of the largest entry"


def verify_choices(call, got):
    """Assert that the pairs of a matching are the most similar ones, but for rounding."""
    given = call.function.keywords if isinstance(call.function, partial) else {}
    if call.operator == "nearest":
        options = {n: given[n] for n in ("similarity", "b_mask") if n in given}
        regret = nearest_regret(*call.tensors.values(), got[1], **options)
    else:
        token_map = tokenops.TokenMap(*got)
        assert_valid_token_map(token_map)
        token_map.compose(token_map.identity(*token_map.assign.shape, token_map.assign.device))
        if "options" not in given:  # several matches, composed
            return
        names = ("num_prefix", "protected", "split", "similarity")
        options = {n: given["options"][n] for n in names if n in given["options"]}
        regret = matching_regret(*call.tensors.values(), token_map, **options)
    rows = torch.cat([*call.tensors.values()], -2)
    bound = similarity_rounding(rows, options.get("similarity", "cosine"))
    assert (regret <= bound).all(), f"gave away {regret.max():.2g} of similarity"


def describe(case):
    return f"{case.operator}: {case.name}, {case.sizes.tokens} tokens"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*smoke.cases()], ids=describe)
def test_call(case, dtype, backend, device):
    call = case.call(smoke.DTYPES[dtype], device)
    verify(call, smoke.outcome(call))


@pytest.mark.parametrize("name", ["plain", "residual", "list"])
def test_wrong_results_are_found(monkeypatch, name):
    factor = {torch.float32: 1.1, torch.float64: 1.0}

    def unmerge(y, token_map, residual=None):
        several = y if isinstance(y, list) else [y]
        return [tokenops.unmerge(t, token_map) * factor[t.dtype] for t in several]

    module = importlib.import_module("tokenops.ops.merging.samples")
    monkeypatch.setattr(module, "unmerge", unmerge)
    call = smoke.Case("unmerge", name, Sizes()).call(torch.float32, "cpu")
    with pytest.raises(AssertionError, match="of the largest entry"):
        verify(call, smoke.outcome(call))


@pytest.mark.parametrize("case", [("match", "plain"), ("nearest", "cosine")])
def test_wrong_choices_are_found(case):
    call = smoke.Case(*case, Sizes(tokens=12)).call(torch.float32, "cpu")
    verify(call, smoke.outcome(call))
    other = {name: -tensor.flip(1) for name, tensor in call.tensors.items()}
    if "b" in other:
        other["b"] = call.tensors["b"]
    with pytest.raises(AssertionError, match="of similarity"):
        verify(call, smoke.outcome(call._replace(tensors=other)))
