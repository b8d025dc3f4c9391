# SPDX-License-Identifier: Apache-2.0
"""Matching by Triton kernels under the interpreter: code paths of unusual inputs."""

import pytest
import torch

import tokenops
from tokenops import _backend
from tokenops.testing import assert_same_bits, exact_metric, nearest_regret, random_tokens
from tokenops.testing import similarity_rounding as rounding

pytest.importorskip("triton")

interpreted = pytest.mark.skipif(not _backend._interpreting, reason="runs under the interpreter")


@interpreted
@pytest.mark.parametrize("inputs", ["f16 D130", "f16 D400", "f32 D130", "f16 heads D130", "f64"])
def test_widths_that_do_not_stay_on_the_chip(inputs):
    kind, *rest = inputs.split()
    width = int(rest[-1][1:]) if rest else 70
    dtype = {"f16": torch.float16, "f32": torch.float32, "f64": torch.float64}[kind]
    lead = (1, 3) if "heads" in rest else (1,)
    a = random_tokens(*lead, 33, width, dtype=dtype)
    b = random_tokens(*lead, 70, width, dtype=dtype, seed=1)
    mask = torch.arange(70)[None] % 3 > 0
    with tokenops.use_backend("triton"):
        _, index = tokenops.nearest(a, b, b_mask=mask)
    assert mask[0, index[0].long()].all()
    both = torch.cat([a, b], dim=-2)
    assert (nearest_regret(a, b, index, b_mask=mask) <= rounding(both)).all()


@interpreted
def test_lengths_that_are_computed_before(monkeypatch):
    """For large inputs another kernel prepares the candidates."""
    from tokenops.ops.matching.triton import search_launches

    a, keys = exact_metric(2, 90, 16, dtype=torch.float16), exact_metric(2, 2, 90, 16)
    expected = [tokenops.match(x, 20, num_prefix=1).assign for x in (a, keys)]
    monkeypatch.setattr(search_launches, "MAX_REREAD", 0)
    search_launches.launches.cache_clear()
    with tokenops.use_backend("triton"):
        for x, assign in zip((a, keys), expected, strict=True):
            assert_same_bits(tokenops.match(x, 20, num_prefix=1).assign, assign)
    search_launches.launches.cache_clear()


@interpreted
@pytest.mark.parametrize("order", ["position", "tome"])
@pytest.mark.parametrize("k", [2, 7])
def test_more_tokens_than_one_program_sorts(order, k, monkeypatch):
    from tokenops.ops.matching.triton import select_launches

    metric = exact_metric(2, 61, 4, nan_rows=0.1)
    options = {"split": tokenops.strided(k), "order": order, "protected": torch.arange(61) % 5 == 2}
    expected = tokenops.match(metric, 7, **options)
    monkeypatch.setattr(select_launches, "LARGEST", 60)
    with tokenops.use_backend("triton"):
        got = tokenops.match(metric, 7, **options)
    assert_same_bits(got.assign, expected.assign)
    assert_same_bits(got.members, expected.members)
