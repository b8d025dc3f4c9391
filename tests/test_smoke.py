# SPDX-License-Identifier: Apache-2.0
"""Results and gradients of every sample call at small sizes, against the reference.

Run these tests first on a new machine. They are few enough for memory and race checkers.
"""

import importlib

import pytest
import torch

import tokenops
from benchmarks import smoke
from tokenops.testing.samples import Sizes

DTYPES = smoke.DTYPES if torch.cuda.is_available() else ["float32"]


def describe(case):
    return f"{case.operator}: {case.name}, {case.sizes.tokens} tokens"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*smoke.cases()], ids=describe)
def test_call(case, dtype, backend, device):
    call = case.call(smoke.DTYPES[dtype], device)
    smoke.verify(call, smoke.outcome(call))


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
        smoke.verify(call, smoke.outcome(call))


@pytest.mark.parametrize("case", [("match", "plain"), ("nearest", "cosine")])
def test_wrong_choices_are_found(case):
    call = smoke.Case(*case, Sizes(tokens=12)).call(torch.float32, "cpu")
    smoke.verify(call, smoke.outcome(call))
    other = {name: -tensor.flip(1) for name, tensor in call.tensors.items()}
    if "b" in other:
        other["b"] = call.tensors["b"]
    with pytest.raises(AssertionError, match="of similarity"):
        smoke.verify(call, smoke.outcome(call._replace(tensors=other)))
