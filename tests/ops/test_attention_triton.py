# SPDX-License-Identifier: Apache-2.0
"""Attention over several tiles: whole tiles, diagonals and tails; heads wider than a tile."""

import math

import pytest
import torch
from attention_oracle import check_exactly

from tokenops import _backend
from tokenops.testing import random_attention

KINDS = {
    "plain": ({}, {}),
    "hard": ({"policy": "hard"}, {}),
    "per head, eps": ({"policy": "per-head", "key_heads": 1}, {"eps": 1e-2}),
    "padding": ({"padding": 0.3, "zero_sizes": 0.2, "policy": "soft"}, {"eps": 1e-2}),
    "causal": ({"policy": "hard"}, {"is_causal": True}),
    "causal, padding": ({"padding": 0.3}, {"is_causal": True, "eps": 1e-3}),
}


@pytest.mark.parametrize(("width", "value_width"), [(8, 5), (80, 120)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_over_tiles(kind, width, value_width, backend, device):
    kinds, options = KINDS[kind]
    inputs = random_attention(
        1, 2, 75, width, value_width=value_width, dtype=torch.float64, device=device, **kinds
    )
    check_exactly(inputs, options)


@pytest.fixture
def split_float():
    """The function that splits a number into two of float32; its module needs Triton."""
    pytest.importorskip("triton")
    from tokenops.ops.attention.triton.common import split_float

    return split_float


@pytest.mark.parametrize(
    "number", [0.0, 1.0, -1 / 3, math.pi * 1e30, 1e-30, torch.finfo(torch.float32).max]
)
def test_a_number_is_the_sum_of_two_of_float32(number, split_float):
    high, low = split_float(number)
    assert high == torch.tensor(number, dtype=torch.float32).item()
    assert abs(high + low - number) <= 2**-52 * abs(number)
    assert abs(low) <= 2**-23 * abs(number)


@pytest.mark.parametrize("number", [1e39, -1e39, math.inf, 1.7e308])
def test_no_kernel_takes_numbers_beyond_float32(number, split_float):
    with pytest.raises(_backend.UnservedError, match="beyond float32"):
        split_float(number)
