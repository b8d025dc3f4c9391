# SPDX-License-Identifier: Apache-2.0
"""Attention with dropped, padded and empty rows and keys; symmetries; derivatives; autocast."""

import math

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import attend, check_exactly
from hypothesis import given
from hypothesis import strategies as st

import tokenops
from tokenops.testing import assert_same_bits, random_attention, random_tokens

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- random inputs and options, against whole maps ----


@pytest.mark.isa
@given(
    batch=st.integers(0, 2),
    groups=st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2)]),
    queries=st.integers(0, 20),
    keys=st.one_of(st.none(), st.integers(0, 40)),
    widths=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    policy=st.sampled_from([None, "soft", "hard", "bool", "column", "per-head", "none kept"]),
    zero_sizes=st.sampled_from([None, 0.0, 0.3, 1.0]),
    padding=st.sampled_from([0.0, 0.3, 0.9]),
    logits=st.sampled_from([0.1, 1.0, 30.0]),
    eps=st.sampled_from([0.0, 0.0, 1e-6, 1e-2]),
    self_keep=st.booleans(),
    causal=st.booleans(),
    policy_grad=st.sampled_from(["exact", "exact", "kept", "none"]),
    positions=st.sampled_from([None, None, "shared", "each"]),
    seed=st.integers(0, 1000),
)
def test_anything(
    backend, device, batch, groups, queries, keys, widths, policy, zero_sizes, padding, logits,
    eps, self_keep, causal, policy_grad, positions, seed,
):  # fmt: skip
    heads, key_heads = groups
    inputs = random_attention(
        batch, heads, queries, widths[0], keys=keys, key_heads=key_heads, value_width=widths[1],
        policy=policy, zero_sizes=zero_sizes, padding=padding, logits=logits,
        dtype=torch.float64, device=device, seed=seed,
    )  # fmt: skip
    options = {"eps": eps, "is_causal": causal, "policy_grad": policy_grad}
    keys = queries if keys is None else keys
    options["self_keep"] = self_keep and (keys == queries or positions is not None)
    if positions is not None:
        shape = (queries,) if positions == "shared" else (batch, queries)
        generator = torch.Generator().manual_seed(seed)
        position = torch.randint(-2, keys + 2, shape, generator=generator)
        options["query_position"] = position.to(device)
    check_exactly(inputs, options)


# ---- the gradient of a policy that is zero ----


# Without self_keep and eps, a row without a kept key has weight 0 and no derivative.
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("hard", "per-head", "none kept")),
        *((kind, {"eps": 1e-2}) for kind in ("hard", "per-head", "none kept")),
        *((kind, {"self_keep": False}) for kind in ("hard", "per-head")),
    ],
    ids=str,
)
def test_gradient_at_dropped_keys_by_differences(kind, options, backend, device):
    """The gradient is the one-sided derivative at policy 0."""
    inputs = random_attention(2, 2, 9, 5, policy=kind, dtype=torch.float64, seed=2, device=device)
    grad, grad_lse = oracle.cotangents(inputs)

    def loss(policy):
        out, lse = attend(**{**inputs, "policy": policy}, **options)
        return (out * grad).sum() + (lse.clamp(min=-1e3) * grad_lse).sum()

    policy = inputs["policy"].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(policy), policy)
    policy = policy.detach()
    dropped = (policy == 0).nonzero()
    assert len(dropped) > 5
    # One-sided differences, as no policy is negative; exact for cubic polynomials.
    h, weights = 1e-5, (-11 / 6, 3.0, -3 / 2, 1 / 3)
    for at in map(tuple, dropped.tolist()):
        difference = 0.0
        for step, weight in enumerate(weights):
            moved = policy.clone()
            moved[at] = step * h
            difference += weight * loss(moved).item() / h
        assert gradient[at].item() == pytest.approx(difference, rel=1e-6, abs=1e-6)
        assert gradient[at] != 0


@pytest.mark.parametrize(
    ("dtype", "above", "p"),
    [
        (torch.float32, 40.0, math.exp(40)),
        (torch.float32, 50.0, 2.0**64),
        (torch.float32, 1e4, 2.0**64),
        (torch.float64, 350.0, math.exp(350)),
        (torch.float64, 360.0, 2.0**512),
        (torch.float64, 1e4, 2.0**512),
    ],
    ids=str,
)
def test_share_of_a_dropped_key_is_capped(dtype, above, p, backend, device):
    """The probability of a dropped key with a much larger logit is clamped, as is the gradient."""

    def column(*values):
        return torch.tensor(values, dtype=dtype, device=device).view(1, 1, -1, 1).requires_grad_()

    q, k, v = column(above, 0), column(0, 1), column(1, 3)
    policy = torch.tensor([[1.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
    out = tokenops.policy_attention(q, k, v, policy, scale=1.0)
    assert out[0, 0, 0, 0] == 1
    grads = torch.autograd.grad(out[0, 0, 0, 0], (policy, q, k, v))
    # p * (v_dropped - out); the weight of a query's own key does not depend on the policy
    assert grads[0][0, 1].item() == pytest.approx(p * (3 - 1), rel=1e-4)
    assert grads[0][0, 0] == 0
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["q", "k", "v", "policy", "size"])
def test_gradient_through_the_maximum_by_differences(name, backend, device):
    """With a large eps the maximum of each row affects the result."""
    inputs = random_attention(
        1, 2, 7, 4, policy="soft", zero_sizes=0.0, dtype=torch.float64, seed=3, device=device
    )
    grad, grad_lse = oracle.cotangents(inputs)

    def loss(value):
        out, lse = attend(**{**inputs, name: value}, eps=0.5)
        return (out * grad).sum() + (lse * grad_lse).sum()

    value = inputs[name].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(value), value)
    value, h = value.detach(), 1e-5
    for i in range(value.numel()):
        steps = []
        for step in (-h, h):
            moved = value.flatten().clone()
            moved[i] += step
            steps.append(loss(moved.view(value.shape)).item())
        difference = (steps[1] - steps[0]) / (2 * h)
        assert gradient.flatten()[i].item() == pytest.approx(difference, rel=1e-6, abs=1e-6)


def test_modes_of_the_policy_gradient(backend, device):
    """Only the gradient of the policy differs, and only at dropped keys."""
    inputs = random_attention(2, 2, 21, 6, policy="hard", dtype=torch.float64, device=device)
    grads = oracle.cotangents(inputs)
    modes = {
        mode: oracle.results(attend, inputs, *grads, policy_grad=mode)
        for mode in ("exact", "kept", "none")
    }
    for mode in ("kept", "none"):
        for name in ("out", "lse", "q", "k", "v"):
            torch.testing.assert_close(modes[mode][name], modes["exact"][name], rtol=0, atol=0)
    kept = inputs["policy"] > 0
    exact = modes["exact"]["policy"]
    assert (exact[~kept] != 0).all()
    assert_same_bits(modes["kept"]["policy"], torch.where(kept, exact, 0))
    assert modes["none"]["policy"] is None


def test_removing_tokens_is_policy_grad_kept(backend, device):
    """Attention among kept tokens alone has the values and gradients of ``policy_grad="kept"``."""
    inputs = random_attention(
        1, 2, 24, 6, policy="hard", zero_sizes=0.0, dtype=torch.float64, device=device
    )
    kept = inputs["policy"][0].nonzero()[:, 0]
    grad = random_tokens(1, 2, 24, 6, dtype=torch.float64, seed=4, device=device)
    grad[:, :, inputs["policy"][0] == 0] = 0
    masked = oracle.results(attend, inputs, grad, policy_grad="kept")

    few = {n: t.index_select(2 if t.dim() == 4 else 1, kept) for n, t in inputs.items()}
    removed = oracle.results(attend, few, grad[:, :, kept])
    for name, value in removed.items():
        if name in ("out", "lse", "q", "k", "v"):
            got = masked[name].index_select(2, kept)
        else:
            got = masked[name].index_select(1, kept)
        torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-13, msg=name)
    for name in ("k", "v"):  # only the own row of a dropped key attends to it, and has no gradient
        dropped = inputs["policy"][0] == 0
        assert (masked[name][:, :, dropped] == 0).all()


# ---- rows without a gradient ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("which", ["dropped", "some heads", "one", "none", "lse alone"])
def test_rows_without_a_gradient(which, eps, dtype, backend, device):
    inputs = random_attention(
        2, 3, 45, 8, policy="hard", zero_sizes=0.1, padding=0.1, dtype=dtype, seed=5, device=device
    )
    grad, grad_lse = oracle.cotangents(inputs)
    if which == "dropped":
        grad = grad * inputs["policy"][:, None, :, None].to(dtype)
        grad_lse = None
    elif which == "some heads":
        grad[0, 1], grad[1, 0], grad[1, 2, :30] = 0, 0, 0
        grad_lse = None
    elif which == "one":
        row = grad[1, 2, 40].clone()
        grad.zero_()[1, 2, 40] = row
        grad_lse = None
    elif which == "none":
        grad, grad_lse = torch.zeros_like(grad), None
    else:
        grad = torch.zeros_like(grad)
    options = {"eps": eps, "is_causal": which == "some heads"}
    if dtype == torch.float64:
        got = check_exactly(inputs, options, grad, grad_lse)
    else:
        got = oracle.results(attend, inputs, grad, grad_lse, **options)
    silent = (grad == 0).all(-1)
    if grad_lse is not None:
        silent &= grad_lse == 0
    assert silent.any()
    assert (got["q"][silent] == 0).all()
    assert all(t.isfinite().all() for name, t in got.items() if name != "lse")
    if which == "none":
        assert all((got[name] == 0).all() for name in inputs if name in got)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_gradient_of_the_output_at_all(dtype, backend, device):
    """The gradient comes through lse alone, or is zero."""
    inputs = random_attention(1, 2, 11, 4, policy="hard", dtype=dtype, device=device)
    q = inputs["q"].requires_grad_()
    out, lse = attend(**inputs)
    (gradient,) = torch.autograd.grad(lse.sum(), q, retain_graph=True)
    expected = oracle.attention(**inputs)[1]
    (wanted,) = torch.autograd.grad(expected.sum(), q)
    torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=1e-3)
    (gradient,) = torch.autograd.grad(out.sum() * 0, q)
    assert (gradient == 0).all()


# ---- empty rows and padding ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("why", ["dropped", "padded", "size", "padded, eps", "size, eps", "hidden"])
def test_empty_rows(why, causal, dtype, backend, device):
    """Output 0, lse -inf, gradients 0; the other image is unaffected."""
    inputs = random_attention(
        2, 2, 13, 6, policy="hard", zero_sizes=0.0, padding=0.2, dtype=dtype, device=device
    )
    options = {"self_keep": False, "eps": 1e-3 if "eps" in why else 0.0, "is_causal": causal}
    empty = torch.zeros(2, 13, dtype=torch.bool, device=device)
    if why == "dropped":
        inputs["policy"][0] = 0
        empty[0] = True
    elif why.startswith("padded"):
        inputs["key_padding_mask"][0] = True
        empty[0] = True
    elif why.startswith("size"):
        inputs["size"][0] = 0
        empty[0] = True
    else:
        options["query_position"] = torch.arange(-4, 9, device=device)
        options["is_causal"] = True
        empty[:, :4] = True
    if causal or why == "hidden":  # all other rows see the first key
        inputs["policy"][1, 0] = 1
        if why == "hidden":
            inputs["policy"][0, 0] = 1
    grads = oracle.cotangents(inputs)
    got = oracle.results(attend, inputs, *grads, **options)
    rows = empty[:, None].expand(2, 2, 13)
    assert (got["out"][rows] == 0).all()
    assert (got["lse"][rows] == -math.inf).all()
    assert got["lse"][~rows].isfinite().all()
    assert (got["q"][rows] == 0).all()
    for name, t in got.items():
        assert not t.isnan().any(), name
        if name not in ("out", "lse"):
            assert t.isfinite().all(), name
            if why != "hidden":
                assert (t[0] == 0).all(), name
    if why == "hidden":
        return
    alone = {n: t[1:] for n, t in inputs.items()}
    expected = oracle.results(attend, alone, *(g[1:] for g in grads), **options)
    for name, t in expected.items():
        torch.testing.assert_close(got[name][1:], t, msg=name)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_size_zero_is_padding(eps, dtype, backend, device):
    """The same bits as with a mask; the gradient of a size of 0 is 0."""
    inputs = random_attention(
        2, 4, 37, 8, key_heads=2, policy="per-head", zero_sizes=0.3, dtype=dtype, device=device
    )
    gone = inputs["size"] == 0
    masked = {**inputs, "size": inputs["size"].masked_fill(gone, 3.0), "key_padding_mask": gone}
    grads = oracle.cotangents(inputs)
    by_size, by_mask = (oracle.results(attend, x, *grads, eps=eps) for x in (inputs, masked))
    for name in by_size:
        assert_same_bits(by_size[name], by_mask[name], name=name)
    assert (by_size["size"][gone] == 0).all()
    assert (by_size["size"][~gone] != 0).any()
    for name in ("k", "v"):
        assert (by_size[name].mT[gone[:, None, None].expand(by_size[name].mT.shape)] == 0).all()
    assert (by_size["policy"].mT[gone] == 0).all()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["mask", "size"])
def test_padding_may_hold_anything(how, garbage, eps, dtype, backend, device):
    inputs = random_attention(
        2, 4, 21, 8, key_heads=2, policy="hard", zero_sizes=0.3, padding=0.3, dtype=dtype,
        device=device,
    )  # fmt: skip
    gone = inputs["key_padding_mask"] if how == "mask" else inputs["size"] == 0
    dirty = dict(inputs)
    for name in ("k", "v"):
        dirty[name] = inputs[name].masked_fill(gone[:, None, :, None], garbage)
    grads = oracle.cotangents(inputs)
    clean, got = (oracle.results(attend, x, *grads, eps=eps) for x in (inputs, dirty))
    for name, expected in clean.items():
        assert_same_bits(got[name], expected, name=name)

    weight = torch.linspace(-1, 2, 21, device=device, dtype=torch.float32)
    for x in (inputs, dirty):
        leaves = [x["q"].clone().requires_grad_(), x["k"].clone().requires_grad_()]
        rest = {n: t for n, t in x.items() if n not in ("q", "k", "v")}
        score = tokenops.attention_scores(*leaves, eps=eps, **rest)
        values = [score, *torch.autograd.grad(score, leaves, weight.to(score).expand(2, 21))]
        if x is inputs:
            expected = values
    for a, b in zip(values, expected, strict=True):
        assert_same_bits(a, b)


def test_padding_counts_for_nothing(backend, device):
    """Padding affects neither the maximum nor the mean of the values."""
    inputs = random_attention(2, 2, 12, 5, policy="soft", dtype=torch.float64, device=device)
    longer = {}
    for name, t in inputs.items():
        tail = torch.full_like(t[..., :7, :] if t.dim() == 4 else t[..., :7], 50.0)
        longer[name] = torch.cat([t, tail], 2 if t.dim() == 4 else 1)
    padded = torch.arange(19, device=device).expand(2, -1) >= 12
    longer["q"] = inputs["q"]
    position = torch.arange(12, device=device)
    for options in ({}, {"eps": 0.1}, {"is_causal": True, "eps": 0.1}, {"self_keep": False}):
        got = tokenops.policy_attention(
            **longer, key_padding_mask=padded, query_position=position, **options
        )
        expected = tokenops.policy_attention(**inputs, **options)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---- never NaN ----

EXTREME = (
    {"self_keep": True, "eps": 0.0},
    {"self_keep": False, "eps": 0.0},
    {"self_keep": True, "eps": 1e-30},
    {"self_keep": False, "eps": 1e-6, "is_causal": True},
)


@pytest.mark.isa
@pytest.mark.parametrize("options", EXTREME, ids=str)
def test_many_awkward_images_without_a_nan(options, backend, device, quick):
    """Logits up to 1e4 and beyond, dropped and padded keys, sizes from 1e-3 to 1e4, in float32."""
    thorough = backend == "reference" or not quick
    images, heads, tokens, width = 10_000 if thorough else 300, 2, 6, 4
    generator = torch.Generator().manual_seed(0)

    def lots(*shape):
        return torch.rand(shape, generator=generator)

    def choice(values, *shape):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    inputs = {
        name: torch.randn(images, heads, tokens, width, generator=generator)
        * choice([0.0, 1.0, 100.0], images, 1, tokens, 1)
        for name in ("q", "k")
    }
    inputs["v"] = torch.randn(images, heads, tokens, width, generator=generator)
    policy = choice([0.0, 0.0, 1.0, 1.0, 1e-6, 1e-30, 1e-40, 0.3], images, tokens)
    policy = torch.where(lots(images, 1) < 0.1, 0, policy)
    size = 10 ** (7 * lots(images, tokens) - 3)
    size = torch.where(lots(images, tokens) < 0.1, 0, size)
    padded = (lots(images, tokens) < 0.2) | (lots(images, 1) < 0.05)
    inputs |= {"policy": policy, "size": size, "key_padding_mask": padded}
    inputs = {n: t.to(device) for n, t in inputs.items()}
    grad = torch.randn(images, heads, tokens, width, generator=generator).to(device)
    grad_lse = torch.randn(images, heads, tokens, generator=generator).to(device)
    got = oracle.results(attend, inputs, grad, grad_lse, **options)
    lse = got.pop("lse")
    assert not lse.isnan().any()
    assert not (lse == math.inf).any()
    empty = lse == -math.inf
    assert (got["out"][empty] == 0).all()
    assert (got["q"][empty] == 0).all()
    for name, t in got.items():
        bad = (~t.isfinite()).flatten(1).any(1)
        assert not bad.any(), f"{name} of {bad.sum()} images, the first one {bad.int().argmax()}"
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("q", "k", "policy", "size")}
    score = tokenops.attention_scores(
        **leaves, key_padding_mask=inputs["key_padding_mask"], **options
    )
    gradients = torch.autograd.grad(score, list(leaves.values()), grad[:, 0, :, 0])
    assert all(t.isfinite().all() for t in (score, *gradients))


# ---- symmetries ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_are_independent(dtype, backend, device):
    inputs = random_attention(
        3, 2, 33, 8, policy="per-head", zero_sizes=0.1, padding=0.2, dtype=dtype, device=device
    )
    grads = oracle.cotangents(inputs)
    together = oracle.results(attend, inputs, *grads, eps=1e-3)
    for i in range(3):
        alone = oracle.results(
            attend, {n: t[i : i + 1] for n, t in inputs.items()},
            *(g[i : i + 1] for g in grads), eps=1e-3,
        )  # fmt: skip
        for name, t in alone.items():
            torch.testing.assert_close(together[name][i : i + 1], t, msg=name)


def test_order_of_keys_does_not_matter(backend, device):
    inputs = random_attention(
        2, 2, 25, 8, policy="hard", zero_sizes=0.2, dtype=torch.float64, device=device
    )
    order = torch.randperm(25, generator=torch.Generator().manual_seed(6)).to(device)
    grads = oracle.cotangents(inputs)
    moved = {
        n: t if n == "q" else t.index_select(2 if t.dim() == 4 else 1, order)
        for n, t in inputs.items()
    }
    position = order.argsort()  # of each query's own key
    got = oracle.results(attend, moved, *grads, eps=1e-2, query_position=position)
    expected = oracle.results(attend, inputs, *grads, eps=1e-2)
    for name, t in expected.items():
        if name in ("k", "v", "policy", "size"):
            t = t.index_select(2 if t.dim() == 4 else 1, order)
        torch.testing.assert_close(got[name], t, rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.isa
@pytest.mark.parametrize("factor", [1e-6, 1e-18, 1e-30])
def test_policies_count_relative_to_one_another(factor, backend, device):
    """Without eps and self_keep, a factor of the policy changes only lse, even if it is tiny."""
    inputs = random_attention(2, 2, 21, 6, policy="soft", zero_sizes=0.0, device=device)
    smaller = {**inputs, "policy": inputs["policy"] * factor}
    grad, _ = oracle.cotangents(inputs)
    expected, got = (oracle.results(attend, x, grad, self_keep=False) for x in (inputs, smaller))
    expected["lse"] = expected["lse"] + math.log(factor)
    for name, t in expected.items():
        scaled = got[name] * factor if name == "policy" else got[name]
        torch.testing.assert_close(scaled, t, rtol=1e-4, atol=1e-5, msg=name)


def test_a_size_is_so_many_equal_tokens(backend, device):
    """A key of size 3 equals three copies of it: ToMe's proportional attention."""
    inputs = random_attention(1, 2, 6, 4, keys=5, dtype=torch.float64, device=device)
    size = torch.tensor([[1.0, 3.0, 2.0, 1.0, 4.0]], dtype=torch.float64, device=device)
    repeats = size[0].long()
    many = {n: t if n == "q" else t.repeat_interleave(repeats, 2) for n, t in inputs.items()}
    got = tokenops.policy_attention(**inputs, size=size, return_lse=True)
    expected = tokenops.policy_attention(**many, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_weights_it_is_scaled_dot_product_attention(backend, device):
    for causal in (False, True):
        inputs = random_attention(2, 4, 50, 16, key_heads=2, device=device)
        got = tokenops.policy_attention(**inputs, is_causal=causal)
        q, k, v = (inputs[n] for n in "qkv")
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
        torch.testing.assert_close(got, expected)


# ---- derivatives ----


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        ({}, {}),
        ({"policy": "soft", "key_heads": 1}, {"eps": 1e-2}),
        ({"policy": "per-head", "zero_sizes": 0.0}, {"is_causal": True}),
        ({"policy": "soft", "padding": 0.3, "value_width": 2}, {"self_keep": False, "eps": 0.3}),
    ],
    ids=str,
)
def test_gradcheck(kinds, options, backend, device):
    kinds = {**kinds, "seed": 9, "dtype": torch.float64, "device": device}
    inputs = random_attention(1, 2, 4, 3, **kinds)
    if "policy" in inputs:  # finite differences must not make it negative
        inputs["policy"] = inputs["policy"] + 0.1
    names = [n for n, t in inputs.items() if t.is_floating_point()]
    rest = {n: t for n, t in inputs.items() if n not in names}

    def call(*values):
        return attend(**dict(zip(names, values, strict=True)), **rest, **options)

    values = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("mode", ["exact", "kept", "none"])
def test_second_derivatives_know_the_mode(mode, backend, device):
    inputs = random_attention(
        1, 2, 5, 3, policy="hard", dtype=torch.float64, seed=10, device=device
    )
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    grads = []
    for function in (attend, oracle.attention):
        out, lse = function(**leaves, policy_grad=mode)
        first = torch.autograd.grad(
            out.pow(2).sum() + lse.sum(), list(leaves.values()), create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        total = sum(g.pow(2).sum() for g in first if g is not None)
        grads.append(torch.autograd.grad(total, list(leaves.values()), materialize_grads=True))
    for name, a, b in zip(leaves, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, backend, device):
    """q, k and v get the lower precision, as in PyTorch's own attention."""
    inputs = random_attention(2, 2, 19, 8, policy="hard", zero_sizes=0.0, device=device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    with torch.autocast(device, dtype=dtype):
        out, lse = attend(**leaves, eps=1e-6)
        q, k, v = (leaves[n] for n in "qkv")
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
        score = tokenops.attention_scores(q, k, policy=leaves["policy"])
    assert (out.dtype, lse.dtype, score.dtype) == (dtype, torch.float32, torch.float32)
    lowered = {n: t.to(dtype) if n in "qkv" else t for n, t in leaves.items()}
    expected, expected_lse = attend(**lowered, eps=1e-6)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    got = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    wanted = torch.autograd.grad(expected.float().square().sum(), list(leaves.values()))
    for name, a, b in zip(leaves, got, wanted, strict=True):
        assert a.dtype == torch.float32
        assert_same_bits(a, b, name=name)


def test_autocast_spares_double(backend, device):
    inputs = random_attention(1, 1, 5, 4, dtype=torch.float64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert tokenops.policy_attention(**inputs).dtype == torch.float64
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs.values())
    assert sdpa.dtype == torch.float64
