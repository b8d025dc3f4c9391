# SPDX-License-Identifier: Apache-2.0
"""Drop-in for DynamicViT, against its formulas in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenops.compat import dynamicvit
from tokenops.testing import as_layout, assert_within_error_budget

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def softmax(attn, policy, eps):
    """The formula in the dtype of the logits, differentiable by autograd."""
    tokens = attn.shape[-1]
    eye = torch.eye(tokens, dtype=attn.dtype)
    keep = policy.reshape(-1, 1, 1, tokens).to(attn.dtype)
    weight = (attn - attn.amax(-1, keepdim=True)).exp() * (keep + (1 - keep) * eye)
    return (weight + eps / tokens) / (weight.sum(-1, keepdim=True) + eps)


def policies(batch, tokens):
    return {
        "hard": (torch.rand(batch, tokens, 1) < 0.5).double(),
        "soft": torch.rand(batch, tokens, 1, dtype=torch.float64),
        "nothing": torch.zeros(batch, tokens, 1, dtype=torch.float64),
        "everything": torch.ones(batch, tokens, 1, dtype=torch.float64),
    }


def value_and_gradients(function, *inputs, cotangent):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))


# ---- softmax_with_policy ----


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.0])
@pytest.mark.parametrize("kind", ["hard", "soft", "nothing", "everything"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_softmax_is_the_formula(tokens, kind, eps):
    attn = 3 * torch.randn(2, 3, tokens, tokens, dtype=torch.float64)
    policy = policies(2, tokens)[kind]
    cotangent = torch.randn_like(attn)
    results = [
        value_and_gradients(lambda a, p, f=f: f(a, p, eps), attn, policy, cotangent=cotangent)
        for f in (dynamicvit.softmax_with_policy, softmax)
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_softmax_rounds_as_the_formula_does(kind, dtype):
    attn = (2 * torch.randn(2, 3, 29, 29)).to(dtype)
    policy = policies(2, 29)[kind].float()
    cotangent = torch.randn(2, 3, 29, 29).to(dtype)
    actual = value_and_gradients(dynamicvit.softmax_with_policy, attn, policy, cotangent=cotangent)
    assert [t.dtype for t in actual] == [dtype, dtype, torch.float32]

    def single(attn, policy):
        return softmax(attn.float(), policy, 1e-6).to(attn.dtype)

    def double(attn, policy):
        return softmax(attn, policy, 1e-6)

    same = value_and_gradients(single, attn, policy, cotangent=cotangent)
    truth = value_and_gradients(double, attn.double(), policy.double(), cotangent=cotangent)
    # Each entry of a gradient is a difference of terms as large as the gradient sent back.
    magnitudes = (1.0, cotangent.abs().max().item() * 4, cotangent.abs().max().item() * 4 * 29 * 3)
    for a, s, t, magnitude in zip(actual, same, truth, magnitudes, strict=True):
        assert_within_error_budget(a, s, t, magnitude=magnitude)


@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_softmax_derivatives(eps):
    attn = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    policy = policies(2, 4)["soft"].requires_grad_()

    def function(attn, policy):
        return dynamicvit.softmax_with_policy(attn, policy, eps)

    assert torch.autograd.gradcheck(function, (attn, policy))
    assert torch.autograd.gradgradcheck(function, (attn, policy))


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_a_dropped_token_has_a_gradient(eps):
    """The central difference at 0 uses negative policies, which the formula allows."""
    attn, cotangent = torch.randn(2, 1, 2, 5, 5, dtype=torch.float64).unbind()
    policy = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)[None, :, None]
    _, _, grad = value_and_gradients(
        lambda a, p: dynamicvit.softmax_with_policy(a, p, eps), attn, policy, cotangent=cotangent
    )
    for j in range(5):
        step = torch.zeros_like(policy)
        step[0, j] = 1e-6
        ends = [(softmax(attn, policy + s, eps) * cotangent).sum() for s in (step, -step)]
        assert grad[0, j].item() == pytest.approx(((ends[0] - ends[1]) / 2e-6).item(), rel=1e-6)
    assert (grad[0, [1, 3, 4]].abs() > 1e-3).all()


def test_softmax_keeps_its_arguments_only():
    attn = torch.randn(1, 2, 40, 40, requires_grad=True)
    policy = torch.ones(1, 40, 1, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dynamicvit.softmax_with_policy(attn, policy)
    assert sum(saved.values()) == attn.numel() + policy.numel()


def test_softmax_leaves_its_arguments_as_they_are():
    attn, policy = torch.randn(1, 2, 6, 6), torch.rand(1, 6, 1)
    copies = attn.clone(), policy.clone()
    dynamicvit.softmax_with_policy(attn, policy)
    assert torch.equal(attn, copies[0])
    assert torch.equal(policy, copies[1])


def test_softmax_in_double_is_double():
    attn = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    out = dynamicvit.softmax_with_policy(attn, torch.ones(1, 3, 1), eps=0.0)
    torch.testing.assert_close(out, attn.softmax(-1), rtol=1e-14, atol=0)


def test_without_eps_a_dropped_key_cannot_dominate():
    attn = torch.tensor([[0.0, 900.0, 1.0], [0.0, 0.0, 900.0], [0.0, 900.0, 0.0]])[None, None]
    attn.requires_grad_()
    policy = torch.tensor([[1.0, 0.0, 1.0]]).requires_grad_()
    out = dynamicvit.softmax_with_policy(attn, policy, eps=0.0)
    torch.testing.assert_close(out[0, 0, 0, [0, 2]], torch.tensor([0.0, 1.0]).softmax(0))
    torch.testing.assert_close(out[0, 0, 2], torch.tensor([0.5, 0.0, 0.5]))
    grads = torch.autograd.grad((out * torch.randn(3, 3)).sum(), (attn, policy))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("eps", "value"), [(1e-6, 0.25), (0.0, 0.0)])
def test_a_row_without_logits(eps, value):
    attn = torch.randn(1, 2, 4, 4)
    attn[0, :, 1] = -INF
    attn.requires_grad_()
    policy = torch.ones(1, 4, 1, requires_grad=True)
    out = dynamicvit.softmax_with_policy(attn, policy, eps)
    torch.testing.assert_close(out[0, :, 1], torch.full((2, 4), value))
    torch.testing.assert_close(out[0, :, 0], attn[0, :, 0].softmax(-1), atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad((out * torch.randn(4, 4)).sum(), (attn, policy))
    assert all(g.isfinite().all() for g in grads)


def test_nan_logits_show():
    attn = torch.zeros(1, 1, 3, 3)
    attn[0, 0, 1, 2] = math.nan
    out = dynamicvit.softmax_with_policy(attn, torch.ones(1, 3, 1))
    assert out.isnan().any(-1).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 0)])
def test_softmax_of_nothing(shape):
    attn = torch.zeros(shape, requires_grad=True)
    policy = torch.ones(shape[0], shape[2], requires_grad=True)
    out = dynamicvit.softmax_with_policy(attn, policy)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (attn, policy))
    assert [g.shape for g in grads] == [attn.shape, policy.shape]


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_softmax_takes_any_strides(layout):
    attn, policy = torch.randn(2, 2, 7, 7), torch.rand(2, 7, 1).bool()
    expected = dynamicvit.softmax_with_policy(attn, policy.float())
    for p in (policy.float(), policy, policy[..., 0]):
        out = dynamicvit.softmax_with_policy(as_layout(attn, layout), p)
        torch.testing.assert_close(out, expected)


# ---- attention_with_policy ----


@pytest.mark.parametrize("kind", ["hard", "soft", "nothing"])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_fused_attention_is_the_product(kind, eps):
    q, k, v, cotangent = torch.randn(4, 2, 3, 11, 5, dtype=torch.float64).unbind()
    policy = policies(2, 11)[kind]

    def product(q, k, v, policy):
        return softmax(q @ k.mT * 0.3, policy, eps) @ v

    def fused(q, k, v, policy):
        return dynamicvit.attention_with_policy(q, k, v, policy, eps, scale=0.3)

    results = [
        value_and_gradients(f, q, k, v, policy, cotangent=cotangent) for f in (fused, product)
    ]
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_fused_attention_of_a_packed_qkv():
    """As in DynamicViT's ``Attention``, with and without a policy."""
    x = torch.randn(2, 9, 12)
    q, k, v = torch.randn(2, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    attn = q @ k.transpose(-2, -1) * 4**-0.5
    policy = torch.rand(2, 9, 1).round()
    for p, weights in (
        (None, attn.softmax(-1)),
        (policy, dynamicvit.softmax_with_policy(attn, policy)),
    ):
        out = dynamicvit.attention_with_policy(q, k, v, p).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(out, (weights @ v).transpose(1, 2).reshape(x.shape))


# ---- tokens by index ----


@given(st.data())
def test_select_and_fill_are_loops(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    inner = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]))
    kind = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def rows(n):
        return torch.randn(batch, n, *inner).mul(5).to(dtype)

    def indices():
        n = data.draw(st.integers(0, 5))
        row = st.lists(st.integers(0, tokens - 1), min_size=n, max_size=n)
        images = data.draw(st.sampled_from([1, batch]))
        drawn = data.draw(st.lists(row, min_size=images, max_size=images))
        return torch.tensor(drawn, dtype=kind).view(images, n)

    x, idx1, idx2 = rows(tokens), indices(), indices()
    x1, x2 = rows(idx1.shape[1]), rows(idx2.shape[1])
    before = x.clone()
    taken = dynamicvit.batch_index_select(x, idx1)
    filled = dynamicvit.batch_index_fill(x, x1, x2, idx1, idx2)
    assert torch.equal(x, before)
    assert taken.dtype == filled.dtype == dtype
    for b in range(batch):
        expected = x[b].clone()
        for new, idx in ((x1, idx1), (x2, idx2)):
            for m, n in enumerate(idx.expand(batch, -1)[b].tolist()):
                if new is x1:
                    assert torch.equal(taken[b, m], x[b, n])
                expected[n] = new[b, m]
        assert torch.equal(filled[b], expected)


def test_fill_puts_back_what_select_took():
    x = torch.randn(3, 10, 4)
    order = torch.rand(3, 10).argsort(1)
    idx1, idx2 = order[:, :6], order[:, 6:]
    parts = (dynamicvit.batch_index_select(x, i) for i in (idx1, idx2))
    out = dynamicvit.batch_index_fill(torch.zeros_like(x), *parts, idx1, idx2)
    assert torch.equal(out, x)


def test_index_gradients():
    """Also for repeated indices."""
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    x1 = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    x2 = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    idx1, idx2 = torch.tensor([[0, 2, 0], [3, 3, 3]]), torch.tensor([[2, 1], [0, 0]])
    assert torch.autograd.gradcheck(lambda x: dynamicvit.batch_index_select(x, idx1), (x,))
    assert torch.autograd.gradcheck(
        lambda x, x1, x2: dynamicvit.batch_index_fill(x, x1, x2, idx1, idx2), (x, x1, x2)
    )


@pytest.mark.parametrize("index", [-1, 4, 2**40, -(2**40)])
def test_an_index_outside_is_an_error(index):
    x, ones = torch.randn(2, 4, 3), torch.ones(2, 1, 3)
    good, bad = torch.tensor([[0], [1]]), torch.tensor([[0], [index]])
    for call, argument in (
        (lambda: dynamicvit.batch_index_select(x, bad), "idx"),
        (lambda: dynamicvit.batch_index_select(x.long(), bad), "idx"),
        (lambda: dynamicvit.batch_index_fill(x, ones, ones, bad, good), "idx1"),
        (lambda: dynamicvit.batch_index_fill(x, ones, ones, good, bad), "idx2"),
    ):
        with pytest.raises(ValueError, match=rf"{argument} must be in \[0, 4\)"):
            call()
    compiled = torch.compile(
        dynamicvit.batch_index_select, fullgraph=True, backend="aot_eager", dynamic=False
    )
    nearest = 0 if index < 0 else 3
    for rows in (x, x.long()):
        assert torch.equal(compiled(rows, bad)[1, 0], rows[1, nearest])


# ---- masked_mean ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_masked_mean(dtype):
    x = torch.randn(3, 17, 5).to(dtype)
    policy = torch.rand(3, 17, 1).round()
    out = dynamicvit.masked_mean(x, policy)
    assert (out.dtype, out.shape) == (dtype, (3, 1, 5))
    rows = [x[b, policy[b, :, 0] > 0].double().mean(0) for b in range(3)]
    torch.testing.assert_close(out[:, 0], torch.stack(rows).to(dtype))
    assert torch.equal(dynamicvit.masked_mean(x, policy[..., 0]), out)


def test_masked_mean_of_large_halves():
    """The sum of the tokens overflows float16, and their number is not exact in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        x, policy = torch.full((1, 4096, 2), 64.0, dtype=dtype), torch.ones(1, 4096, 1, dtype=dtype)
        policy[0, :3] = 0
        assert dynamicvit.masked_mean(x, policy).flatten().tolist() == [64, 64]


def test_masked_mean_of_nothing_is_zero():
    x = torch.randn(2, 5, 3, requires_grad=True)
    policy = torch.tensor([[0.0] * 5, [1.0] * 5]).requires_grad_()
    out = dynamicvit.masked_mean(x, policy)
    assert out[0].tolist() == [[0, 0, 0]]
    cotangent = torch.randn_like(out)
    dx, dpolicy = torch.autograd.grad(out, (x, policy), cotangent)
    assert (dx[0] == 0).all()
    torch.testing.assert_close(dpolicy[0], (x[0] * cotangent[0]).sum(-1))
    torch.testing.assert_close(dpolicy[1], ((x[1] - out[1]) * cotangent[1]).sum(-1) / 5)
    assert (
        dynamicvit.masked_mean(torch.zeros(2, 0, 3), torch.zeros(2, 0)).tolist() == [[[0] * 3]] * 2
    )


def test_masked_mean_derivatives():
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    policy = torch.rand(2, 4, 1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(dynamicvit.masked_mean, (x, policy))
    assert torch.autograd.gradgradcheck(dynamicvit.masked_mean, (x, policy))


# ---- all of it ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()

    def function(attn, policy, x, idx):
        y = dynamicvit.softmax_with_policy(attn, policy) @ x[:, None]
        some = dynamicvit.batch_index_select(x, idx)
        filled = dynamicvit.batch_index_fill(x, some, some[:, :1], idx, idx[:, :1])
        return y, filled, dynamicvit.masked_mean(filled, policy)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (7, 12) if dynamic else (7,):
        inputs = (
            torch.randn(2, 3, tokens, tokens),
            torch.rand(2, tokens, 1),
            torch.randn(2, tokens, 4),
        )
        idx = torch.rand(2, tokens).argsort(1)[:, :3]
        results = []
        for f in (compiled, function):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = f(*leaves, idx)
            loss = sum(o.pow(2).sum() for o in out)
            results.append((*out, *torch.autograd.grad(loss, leaves)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_compiled_softmax_has_its_gradients(dtype):
    """In the dtype of sums the last conversion is a no-op, which compilers may treat as a view."""
    torch._dynamo.reset()
    inputs = torch.randn(2, 3, 7, 7).to(dtype), torch.rand(2, 7, 1).to(dtype)
    compiled = torch.compile(dynamicvit.softmax_with_policy, fullgraph=True, backend="aot_eager")
    cotangent = torch.randn(2, 3, 7, 7).to(dtype)
    got = value_and_gradients(compiled, *inputs, cotangent=cotangent)
    expected = value_and_gradients(dynamicvit.softmax_with_policy, *inputs, cotangent=cotangent)
    for a, b in zip(got, expected, strict=True):
        assert b.abs().max() > 0
        assert torch.equal(a, b)


def test_softmax_vectorizes():
    attn, policy = torch.randn(3, 2, 2, 5, 5), torch.rand(3, 2, 5, 1)
    mapped = torch.vmap(dynamicvit.softmax_with_policy)(attn, policy)
    parts = [dynamicvit.softmax_with_policy(a, p) for a, p in zip(attn, policy, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(parts))


ATTN, POLICY, X, IDX = (
    torch.zeros(2, 3, 4, 4),
    torch.ones(2, 4, 1),
    torch.zeros(2, 4, 5),
    torch.zeros(2, 1).int(),
)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: dynamicvit.softmax_with_policy(ATTN.int(), POLICY), TypeError, "attn must be"),
        (lambda: dynamicvit.softmax_with_policy(ATTN[0], POLICY), ValueError, "attn must be 4-D"),
        (lambda: dynamicvit.softmax_with_policy(ATTN[..., :2], POLICY), ValueError, r"H, N, N\]"),
        (lambda: dynamicvit.softmax_with_policy(ATTN, POLICY, -1.0), ValueError, "eps must be"),
        (lambda: dynamicvit.softmax_with_policy(ATTN, POLICY[:, 1:]), ValueError, "policy must"),
        (lambda: dynamicvit.softmax_with_policy(ATTN, None), TypeError, "policy must be a tensor"),
        (lambda: dynamicvit.attention_with_policy(ATTN, ATTN, ATTN, -POLICY), ValueError, ">= 0"),
        (lambda: dynamicvit.batch_index_select(X[0, 0], IDX), ValueError, r"\[B, N, ...\]"),
        (lambda: dynamicvit.batch_index_select(X, IDX.float()), TypeError, "idx must be an int32"),
        (lambda: dynamicvit.batch_index_select(X, IDX[0]), ValueError, "idx must be 2-D"),
        (lambda: dynamicvit.batch_index_select(X, IDX.repeat(2, 1)), ValueError, r"\[2, M\]"),
        (lambda: dynamicvit.batch_index_select(X[:, :0], IDX), ValueError, r"in \[0, 0\)"),
        (lambda: dynamicvit.batch_index_fill(X, X, X, IDX, IDX), ValueError, r"x1 .* \[2, 1, 5\]"),
        (lambda: dynamicvit.masked_mean(X.int(), POLICY), TypeError, "x must be a floating-point"),
        (lambda: dynamicvit.masked_mean(X[0], POLICY), ValueError, "x must be 3-D"),
        (lambda: dynamicvit.masked_mean(X, POLICY[:1]), ValueError, r"\[2, 4, 1\] or \[2, 4\]"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
