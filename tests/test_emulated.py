# SPDX-License-Identifier: Apache-2.0
"""How often the compiled CUDA operators launch a kernel, counted where they run on the CPU.

For the library of ``make emulate``; that the kernels compute the right thing is shown there by the
tests of the operators.
"""

import ctypes

import pytest
import torch

import tokenops
from tokenops import _native
from tokenops.testing import random_tokens

_library = ctypes.CDLL(_native.path) if _native.loaded else None
pytestmark = pytest.mark.skipif(
    not hasattr(_library, "tokenops_emulated_launches"), reason="make emulate runs it"
)


def launches(call):
    before = _library.tokenops_emulated_launches()
    with tokenops.use_backend("native"):
        result = call()
    return result, _library.tokenops_emulated_launches() - before


@pytest.mark.parametrize("split", [tokenops.alternate(), tokenops.random(120)])
@pytest.mark.parametrize("tokens", [197, 1025])
def test_a_layer_of_tome_takes_three_launches(tokens, split):
    keys = random_tokens(2, 3, tokens, 64, dtype=torch.bfloat16)
    x, size = random_tokens(2, tokens, 32), torch.ones(2, tokens, 1)
    earlier = tokenops.match(keys, 5, num_prefix=1, split=split)
    x, size = tokenops.merge_wavg(x, earlier, size)
    keys = keys[:, :, 5:]
    token_map, count = launches(lambda: tokenops.match(keys, 8, num_prefix=1, split=split))
    assert count == 1
    (x, size), count = launches(lambda: tokenops.merge_wavg(x, token_map, size))
    assert count == 1
    _, count = launches(lambda: token_map.compose(earlier))
    assert count == 1


def test_several_tensors_take_one_launch():
    token_map = tokenops.TokenMap.from_assign(torch.arange(40)[None] // 2, 20)
    tensors = [random_tokens(1, 40, width) for width in (8, 64, 16)]
    merged, count = launches(lambda: tokenops.merge(tensors, token_map))
    assert count == 1
    spread, count = launches(lambda: tokenops.unmerge(merged, token_map))
    assert count == 1
    assert [t.shape for t in spread] == [t.shape for t in tensors]


def test_large_images_are_searched_elsewhere():
    metric = random_tokens(1, 1100, 8)
    _, count = launches(lambda: tokenops.match(metric, 100))
    assert count == 1
