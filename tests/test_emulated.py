# SPDX-License-Identifier: Apache-2.0
"""Number of kernels that the compiled CUDA operators launch, counted on the CPU.

These tests need the library of ``make emulate``, which also runs the tests of the operators.
"""

import ctypes

import pytest
import torch

import tokenops
from tokenops import _native
from tokenops.ops.matching.arguments import Request, SplitArgs
from tokenops.testing import random_tokens

_library = ctypes.CDLL(_native.path) if _native.loaded else None
ops = torch.ops.tokenops
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


@pytest.mark.parametrize("shape", [(1, 1100, 8), (1, 64, 200)], ids=str)
def test_images_that_do_not_fit_are_searched_elsewhere(shape):
    metric = random_tokens(*shape)
    assert not ops.match_fits(metric, None, None, 2)
    _, count = launches(lambda: tokenops.match(metric, 20))
    assert count == 1
    with pytest.raises(RuntimeError, match="does not fit one block"):
        ops.match_image(metric, "cosine", *Request(20), *SplitArgs())


@pytest.mark.parametrize("rows", [14, 40])
def test_a_grid_is_listed_once(rows):
    metric = random_tokens(1, rows * 32, 8)
    split = tokenops.grid(rows, 32, 2, 2)
    _, count = launches(lambda: tokenops.match(metric, 100, split=split))
    assert count == 2
