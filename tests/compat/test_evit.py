# SPDX-License-Identifier: Apache-2.0
"""Drop-in for EViT, against its block in loops over tokens."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenops.compat import evit
from tokenops.testing import assert_valid_token_map


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def drop_image(x, attn, keep, num_prefix, fuse, order):
    """Tokens and kept indices of one image, in loops; x [N, C], attn [N - num_prefix]."""
    values = attn.tolist()
    ranking = sorted(range(len(values)), key=lambda n: (-values[n], n))
    kept, dropped = ranking[:keep], sorted(ranking[keep:])
    kept = kept if order == "score" else sorted(kept)
    rows = [*x[:num_prefix], *(x[num_prefix + n] for n in kept)]
    if fuse and dropped:
        rows.append(sum(attn[n] * x[num_prefix + n] for n in dropped))
    return torch.stack(rows), kept


@pytest.mark.parametrize("num_prefix", [1, 2, 5])
def test_class_attention_is_a_row_of_the_map(num_prefix):
    q, k = torch.randn(2, 2, 3, 13, 8, dtype=torch.float64).unbind()
    q.requires_grad_()
    k.requires_grad_()
    results = []
    for scale in (None, 0.2):
        attn = (q @ k.mT * (8**-0.5 if scale is None else scale)).softmax(-1)
        results = [
            evit.class_attention(q, k, scale, num_prefix),
            attn[:, :, 0, num_prefix:].mean(1),
        ]
        torch.testing.assert_close(*results)
        cotangent = torch.randn_like(results[0])
        grads = [torch.autograd.grad(r, (q, k), cotangent) for r in results]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("order", ["score", "position"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("num_prefix", [0, 1, 3])
@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 0.7, 0.9])
def test_dropping_is_evit_s(keep_rate, num_prefix, fuse, order):
    x = torch.randn(3, 14 + num_prefix, 5)
    attn = torch.rand(3, 14).softmax(-1)
    keep = math.ceil(keep_rate * 14)
    out, token_map = evit.drop_tokens(
        x, attn, keep_rate, fuse_token=fuse, num_prefix=num_prefix, order=order
    )
    assert_valid_token_map(token_map)
    for b in range(3):
        expected, kept = drop_image(x[b], attn[b], keep, num_prefix, fuse, order)
        torch.testing.assert_close(out[b], expected)
        assert torch.equal(out[b, : num_prefix + keep], expected[: num_prefix + keep])
        idx = token_map.members[b, num_prefix : num_prefix + keep] - num_prefix
        assert idx.tolist() == kept


def test_a_number_of_tokens_overrides_the_rate():
    x, attn = torch.randn(2, 9, 3), torch.rand(2, 8)
    out, _ = evit.drop_tokens(x, attn, 0.5, 3)
    assert out.shape == (2, 4, 3)


@pytest.mark.parametrize("options", [{}, {"keep_rate": 0.9}, {"tokens": 8}, {"tokens": 50}])
def test_dropping_nothing_leaves_the_order(options):
    x, attn = torch.randn(2, 9, 3), torch.rand(2, 8)
    out, token_map = evit.drop_tokens(x, attn, fuse_token=True, **options)
    assert out is x
    assert token_map.assign.tolist() == [list(range(9))] * 2


def test_the_fused_token_is_not_normalised():
    x, attn = torch.ones(1, 4, 2), torch.tensor([[0.5, 0.125, 0.25]])
    out, _ = evit.drop_tokens(x, attn, tokens=1, fuse_token=True)
    assert out[0, -1].tolist() == [0.375, 0.375]


@pytest.mark.parametrize("num_prefix", [1, 2])
def test_gradients_reach_queries_and_keys_through_the_fused_token(num_prefix):
    q, k = torch.randn(2, 2, 2, 7, 4, dtype=torch.float64).unbind()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, q, k)]

    def function(x, q, k):
        attn = evit.class_attention(q, k, num_prefix=num_prefix)
        return evit.drop_tokens(x, attn, 0.5, fuse_token=True, num_prefix=num_prefix)[0]

    assert torch.autograd.gradcheck(function, leaves)
    grads = torch.autograd.grad(function(*leaves)[:, -1].sum(), leaves)
    assert all((g.abs() > 0).any() for g in grads)
    attn = torch.rand(2, 7 - num_prefix)
    plain, _ = evit.drop_tokens(leaves[0], attn, 0.5, num_prefix=num_prefix)
    (grad,) = torch.autograd.grad(plain.sum(), leaves[0])
    assert grad.unique().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Kept tokens are unchanged, and the fused token is summed in float32."""
    x, attn = torch.randn(2, 300, 4).to(dtype), torch.rand(2, 299).softmax(-1)
    out, _ = evit.drop_tokens(x, attn, 0.1, fuse_token=True)
    assert out.dtype == dtype
    for b in range(2):
        expected, _ = drop_image(x[b].double(), attn[b].double(), 30, 1, True, "score")
        assert torch.equal(out[b, :31].double(), expected[:31])
        torch.testing.assert_close(out[b, 31], expected[31].to(dtype))


# ---- complement_idx ----


@given(st.data())
def test_complement_is_that_of_sets(data):
    dim = data.draw(st.integers(0, 9))
    shape = data.draw(st.sampled_from([(), (2,), (2, 3), (0,)]))
    count = data.draw(st.integers(0, dim))
    rows = math.prod(shape)
    orders = [data.draw(st.permutations(range(dim)))[:count] for _ in range(rows)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    idx = torch.tensor(orders, dtype=dtype).view(*shape, count)
    complement = evit.complement_idx(idx, dim)
    assert complement.dtype == torch.int64
    assert complement.shape == (*shape, dim - count)
    expected = [sorted(set(range(dim)) - set(row)) for row in orders]
    assert complement.reshape(rows, dim - count).tolist() == expected


def test_kept_and_complement_are_the_two_halves_of_a_map():
    x, attn = torch.randn(2, 12, 3), torch.rand(2, 11)
    _, token_map = evit.drop_tokens(x, attn, tokens=4, fuse_token=True)
    idx = token_map.members[:, 1:5] - 1
    assert torch.equal(evit.complement_idx(idx, 11) + 1, token_map.members[:, 5:].long())


# ---- all of it ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()

    def function(x, attn):
        out, token_map = evit.drop_tokens(x, attn, tokens=4, fuse_token=True)
        idx = token_map.members[:, 1:5] - 1
        return out, evit.complement_idx(idx, attn.shape[1])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 14) if dynamic else (9,):
        x, attn = torch.randn(2, tokens, 3), torch.rand(2, tokens - 1)
        torch.testing.assert_close(compiled(x, attn), function(x, attn))


def test_a_layer_compiles_to_one_graph():
    torch._dynamo.reset()

    def layer(x, q, k):
        return evit.drop_tokens(x, evit.class_attention(q, k), 0.6, fuse_token=True)[0]

    x, (q, k) = torch.randn(2, 11, 6), torch.randn(2, 2, 3, 11, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x, q, k), layer(x, q, k))


X, ATTN, IDX = torch.zeros(2, 5, 3), torch.zeros(2, 4), torch.tensor([[0, 5]])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: evit.drop_tokens(X, ATTN, 0.0), ValueError, r"keep_rate must be in \(0, 1\]"),
        (lambda: evit.drop_tokens(X, ATTN, 1.1), ValueError, "keep_rate must be"),
        (lambda: evit.drop_tokens(X, ATTN, math.nan), ValueError, "keep_rate must be"),
        (lambda: evit.drop_tokens(X, ATTN, 0.5, 0), ValueError, "tokens must be >= 1"),
        (lambda: evit.drop_tokens(X, ATTN, 0.5, 1.5), TypeError, "must be an int"),
        (lambda: evit.drop_tokens(X, X[..., 0], 0.5), ValueError, r"cls_attn .* \[2, 4\]"),
        (lambda: evit.drop_tokens(X, None, 0.5), TypeError, "cls_attn must be"),
        (lambda: evit.drop_tokens(X, ATTN.int(), 0.5), TypeError, "cls_attn must be a floating"),
        (lambda: evit.drop_tokens(X[0], ATTN, 0.5), ValueError, "x must be 3-D"),
        (lambda: evit.drop_tokens(X, ATTN, 0.5, num_prefix=-1), ValueError, "num_prefix must"),
        (lambda: evit.drop_tokens(X, ATTN, 0.5, num_prefix=6), ValueError, "at most N = 5"),
        (lambda: evit.drop_tokens(X, ATTN, 0.5, order="tome"), ValueError, "order must be one of"),
        (lambda: evit.class_attention(X, X), ValueError, "q must be 4-D"),
        (lambda: evit.class_attention(X[None], X[None], None, -1), ValueError, "num_prefix must"),
        (lambda: evit.complement_idx(IDX.float(), 6), TypeError, "idx must be an int32 or int64"),
        (lambda: evit.complement_idx(IDX, 5), ValueError, r"idx must be in \[0, 5\), got values"),
        (lambda: evit.complement_idx(-IDX, 6), ValueError, r"idx must be in \[0, 6\)"),
        (lambda: evit.complement_idx(IDX, 1), ValueError, "K at most dim = 1"),
        (lambda: evit.complement_idx(torch.tensor(1), 3), ValueError, "idx must be of shape"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
