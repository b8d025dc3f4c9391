# SPDX-License-Identifier: Apache-2.0
"""Composed functions: strides, NaN, malformed indices; the operators' tests also cover them."""

import pytest
import torch
from torch.utils import _pytree as pytree

import tokenops
from tokenops import TokenMap
from tokenops.ops.matching.arguments import Request, SplitArgs
from tokenops.testing import assert_same_bits

OPS = torch.ops.tokenops


@pytest.fixture(autouse=True)
def _composed():
    with tokenops.use_backend("composed"):
        yield


def transposed(q):
    return q.transpose(2, 3).contiguous().transpose(2, 3)


def expanded(q):
    return q[..., :1].expand(q.shape)


@pytest.mark.parametrize("layout", [transposed, expanded])
@pytest.mark.parametrize("weight", ["size", "policy"])
def test_any_strides_of_attention(layout, weight):
    q, k, v = layout(torch.randn(2, 3, 9, 16)), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    weights = {weight: torch.rand(2, 9) + 0.5}
    results = []
    for tensors in ((q, k, v), (q.contiguous(), k, v), (k, layout(q), layout(v))):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = tokenops.policy_attention(*leaves, **weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[0], results[1])
    dense = [t.contiguous().requires_grad_() for t in (k, q, v)]
    dense[2] = layout(v).contiguous().requires_grad_()
    out = tokenops.policy_attention(*dense, **weights)
    torch.testing.assert_close(results[2], [out, *torch.autograd.grad(out.square().sum(), dense)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}, {"size": torch.ones(1, 5)}])
def test_nan_stays_nan(dtype, options):
    """Results that depend on a NaN are NaN."""
    q, k = torch.randn(1, 2, 5, 8, dtype=dtype), torch.randn(1, 2, 5, 8, dtype=dtype)
    q[0, 1, 3, 2] = torch.nan
    out = tokenops.policy_attention(q, k, k, **options)
    touched = out.isnan().any(-1)
    expected = torch.zeros(1, 2, 5, dtype=torch.bool)
    expected[0, 1, 3] = True
    assert torch.equal(touched, expected)
    assert tokenops.attention_scores(q, k, **options).isnan().all()


@pytest.mark.parametrize("offsets", [[0, 3, 1, 4], [2, 1, 3, 4], [0, 9, -7, 2], [4, 4, 0, 0]])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "prod"])
def test_malformed_offsets_read_nothing_out_of_bounds(offsets, reduce):
    x = torch.rand(1, 4, 3)
    index = (
        torch.tensor([[0, 1, 1, 2]], dtype=torch.int32),
        torch.tensor([offsets], dtype=torch.int32),
        torch.tensor([[0, 1, 2, 3]], dtype=torch.int32),
    )
    first = OPS.merge.composed(x, *index, None, None, reduce)
    again = OPS.merge.composed(x, *index, None, None, reduce)
    assert_same_bits(first, again)
    assert (first.abs() <= 4).all()  # sums of at most four values below 1


def test_lists_of_nothing():
    token_map = TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
    index = token_map.assign, token_map.offsets, token_map.members
    for overload in ("default", "composed"):
        assert getattr(OPS.merge_many, overload)([], *index, None, "sum") == []
        assert getattr(OPS.unmerge_many, overload)([], *index, None, False) == []


@pytest.mark.parametrize("weight", [1e-40, 1e-44, 1e38])
def test_means_by_tiny_and_huge_weights(weight):
    token_map = TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2)
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    weights = torch.full((1, 3), weight)
    got = tokenops.merge(x, token_map, weight=weights)
    torch.testing.assert_close(got, torch.full((1, 2, 1), 2.0))


@pytest.mark.parametrize("prefix", [-1, -2, 7, 99])
def test_any_prefix_of_the_bare_operators(prefix):
    metric = torch.randn(2, 6, 4)
    split = SplitArgs(prefix)
    for name, arguments in {
        "match": (metric, "cosine", *Request(2), *split),
        "search": (metric, "cosine", *split),
    }.items():
        results = [
            pytree.tree_leaves(getattr(getattr(OPS, name), overload)(*arguments))
            for overload in ("composed", "default")
        ]
        if name == "match":
            for got, expected in zip(*results, strict=True):
                assert torch.equal(got, expected)
