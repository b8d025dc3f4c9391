# SPDX-License-Identifier: Apache-2.0
"""merge, merge_wavg and unmerge: values and gradients, on every backend, dtype and layout."""

import functools

import brute_force
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenops
from tokenops import TokenMap
from tokenops.testing import (
    LAYOUTS,
    as_layout,
    assert_same_bits,
    assert_within_error_budget,
    random_token_map,
    random_tokens,
    stride_zero,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("sum", "mean", "amax", "amin", "prod")


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- all calls, by tokenops and by brute force ----


class Operation:
    """A call, the same call by brute force, and the names of its floating-point inputs."""

    def __init__(self, call, brute, *inputs):
        self.call, self.brute, self.inputs = call, brute, inputs


def weighted(reduce):
    return Operation(
        lambda m, x, weight: (tokenops.merge(x, m, reduce=reduce, weight=weight),),
        lambda a, n, x, weight: (brute_force.merge(x, a, n, reduce, weight),),
        "x",
        "weight",
    )


def plain(reduce):
    return Operation(
        lambda m, x: (tokenops.merge(x, m, reduce=reduce),),
        lambda a, n, x: (brute_force.merge(x, a, n, reduce),),
        "x",
    )


OPERATIONS = {
    **{reduce: plain(reduce) for reduce in REDUCTIONS},
    **{f"{reduce}-weight": weighted(reduce) for reduce in REDUCTIONS},
    "wavg": Operation(
        lambda m, x: tokenops.merge_wavg(x, m),
        lambda a, n, x: brute_force.merge_wavg(x, a, n),
        "x",
    ),
    "wavg-size": Operation(
        lambda m, x, size: tokenops.merge_wavg(x, m, size),
        lambda a, n, x, size: brute_force.merge_wavg(x, a, n, size),
        "x",
        "size",
    ),
    "wavg-size-weight": Operation(
        lambda m, x, size, weight: tokenops.merge_wavg(x, m, size, weight=weight),
        lambda a, n, x, size, weight: brute_force.merge_wavg(x, a, n, size, weight),
        "x",
        "size",
        "weight",
    ),
    "unmerge": Operation(
        lambda m, y: (tokenops.unmerge(y, m),),
        lambda a, n, y: (brute_force.unmerge(y, a),),
        "y",
    ),
    "unmerge-residual": Operation(
        lambda m, y, residual: (tokenops.unmerge(y, m, residual=residual),),
        lambda a, n, y, residual: (brute_force.unmerge(y, a, residual),),
        "y",
        "residual",
    ),
}


def make_inputs(operation, token_map, channels, dtype, device, layout="contiguous", seed=0):
    """Inputs of an operation by name; sizes and weights are positive, in the dtype of sums."""
    batch, tokens = token_map.assign.shape
    rows = {"x": tokens, "residual": tokens, "y": token_map.num_tokens}
    inputs = {}
    for i, name in enumerate(operation.inputs):
        if name in rows:
            value = random_tokens(batch, rows[name], channels, dtype=dtype, seed=seed + i)
        else:
            value = random_tokens(batch, tokens, 1, dtype=acc(dtype), seed=seed + i).abs() + 0.5
        inputs[name] = as_layout(value.to(device), layout)
    return inputs


def values_and_gradients(call, inputs, cotangents=None):
    """Outputs, gradients of all inputs, and the (given or random) gradients of the outputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = call(**leaves)
    if cotangents is None:
        cotangents = [
            random_tokens(*out.shape, dtype=out.dtype, device=out.device, seed=70 + i)
            for i, out in enumerate(outputs)
        ]
    # Sizes that count tokens do not require a gradient.
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs], materialize_grads=True
    )
    return [o.detach() for o in outputs], list(gradients), cotangents


def terms_of_factors(token_map, x, cotangents, share):
    """Terms [B, N, 1] of ``sum_c x g`` and ``sum_c mean(x) g`` for positive arguments."""
    member = brute_force.membership(token_map.assign, token_map.num_tokens).double()
    total = (member @ (share * torch.ones_like(x[..., :1]))).clamp(min=1e-9)  # [B, M, 1]
    dot = (x * (member.mT @ (cotangents[0] / total))).sum(-1, keepdim=True)
    terms = dot + member.mT @ (member @ (share * dot) / total)
    terms = terms * max(1.0, share.max().item() if share.numel() else 0.0)
    return terms + (x * (member.mT @ cotangents[0])).sum(-1, keepdim=True)


def magnitudes(brute, token_map, inputs, cotangents):
    """Largest sum of absolute terms of each result and gradient: the scale of rounding errors."""
    positive = {name: value.double().abs() for name, value in inputs.items()}
    weights = [c.double().abs() for c in cotangents]
    outputs, gradients, _ = values_and_gradients(brute, positive, weights)
    if "x" in inputs:
        # Gradients of sizes and weights of a mean also subtract the mean. Those of amax and amin
        # sum over channels in which the absolute values may select another member.
        share = positive.get("size", 1.0) * positive.get(
            "weight", torch.ones_like(inputs["x"][..., :1])
        )
        for i, name in enumerate(inputs):
            if name in ("size", "weight"):
                gradients[i] = gradients[i] + terms_of_factors(
                    token_map, positive["x"], weights, share
                )
    return [[v.max().item() if v.numel() else 0.0 for v in part] for part in (outputs, gradients)]


def check(operation, token_map, inputs, layout="contiguous"):
    """Compare the errors of a call with those of the reference; the truth is float64."""
    call = functools.partial(operation.call, token_map)
    brute = functools.partial(operation.brute, token_map.assign, token_map.num_tokens)
    with tokenops.use_backend("reference"):
        reference, reference_gradients, cotangents = values_and_gradients(call, inputs)
    cotangents = [as_layout(c, layout) for c in cotangents]
    outputs, gradients, _ = values_and_gradients(call, inputs, cotangents)
    truth, true_gradients, _ = values_and_gradients(
        brute,
        {name: value.double() for name, value in inputs.items()},
        [c.double() for c in cotangents],
    )
    sizes = magnitudes(brute, token_map, inputs, cotangents)
    names = [f"output {i}" for i in range(len(outputs))] + [f"gradient of {n}" for n in inputs]
    for name, got, plain, true, magnitude in zip(
        names,
        outputs + gradients,
        reference + reference_gradients,
        truth + true_gradients,
        sizes[0] + sizes[1],
        strict=True,
    ):
        assert_within_error_budget(got, plain, true, magnitude=magnitude, name=name)


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients(name, dtype, layout, backend, device):
    operation = OPERATIONS[name]
    token_map = random_token_map(3, 13, 6, dropped=0.15, device=device, seed=1)
    inputs = make_inputs(operation, token_map, 21, dtype, device, layout)
    if layout == "expanded":  # images share memory, tokens differ
        assert all(value.stride(0) == 0 for value in inputs.values())
    check(operation, token_map, inputs, "contiguous" if layout == "expanded" else layout)


@pytest.mark.isa
@pytest.mark.parametrize("channels", [1, 8, 64, 200])
@pytest.mark.parametrize("name", OPERATIONS)
def test_widths(name, channels, backend, device):
    operation = OPERATIONS[name]
    token_map = random_token_map(2, 40, 9, device=device, seed=2)
    for dtype in (torch.float32, torch.bfloat16):
        check(operation, token_map, make_inputs(operation, token_map, channels, dtype, device))


@given(
    name=st.sampled_from(sorted(OPERATIONS)),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 40),
    outputs=st.integers(0, 20),
    channels=st.integers(1, 35),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([x for x in LAYOUTS if x != "expanded"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    backend, device, name, batch, tokens, outputs, channels, dropped, dtype, layout, seed
):
    operation = OPERATIONS[name]
    token_map = random_token_map(batch, tokens, outputs, dropped=dropped, device=device, seed=seed)
    inputs = make_inputs(operation, token_map, channels, dtype, device, layout, seed)
    check(operation, token_map, inputs, layout)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 0, 4), (2, 0, 3, 4), (2, 5, 3, 0)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_empty(name, shape, backend, device):
    batch, tokens, outputs, channels = shape
    operation = OPERATIONS[name]
    token_map = random_token_map(batch, tokens, outputs, device=device)
    inputs = make_inputs(operation, token_map, channels, torch.float32, device)
    check(operation, token_map, inputs)
    call = functools.partial(operation.call, token_map)
    outputs, gradients, _ = values_and_gradients(call, inputs)
    assert all(not o.isnan().any() for o in (*outputs, *gradients))


# ---- the reference against brute force, in float64 ----


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_is_the_formula(name, device):
    operation = OPERATIONS[name]
    token_map = random_token_map(3, 30, 11, dropped=0.1, device=device, seed=3)
    inputs = make_inputs(operation, token_map, 5, torch.float64, device)
    with tokenops.use_backend("reference"):
        got = values_and_gradients(functools.partial(operation.call, token_map), inputs)
    brute = functools.partial(operation.brute, token_map.assign, token_map.num_tokens)
    expected = values_and_gradients(brute, inputs, got[2])
    for a, b in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        # Sizes are float32, unless x and size are float64.
        torch.testing.assert_close(a.double(), b, rtol=1e-12, atol=1e-12)


# ---- derivatives of any order ----


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name, backend, device):
    operation = OPERATIONS[name]
    token_map = random_token_map(2, 6, 3, dropped=0.2, device=device, seed=4)
    inputs = make_inputs(operation, token_map, 2, torch.float64, device)
    leaves = tuple(value.requires_grad_() for value in inputs.values())

    def call(*values):
        return operation.call(token_map, *values)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_prod_has_derivatives_at_zeros(backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1, 1, 1, 2, -1]], device=device), 3)
    x = random_tokens(1, 7, 2, dtype=torch.float64, device=device)
    x[0, 0, 0] = x[0, 2, 0] = x[0, 3, 0] = x[0, 5, :] = 0
    call = functools.partial(tokenops.merge, token_map=token_map, reduce="prod")
    x.requires_grad_()
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
    (gradient,) = torch.autograd.grad(call(x).sum(), x)
    assert gradient[0, 0, 0] == x[0, 1, 0]
    assert gradient[0, 2, 0] == 0  # the segment has a second zero
    assert gradient[0, 5, 0] == 1


def test_prod_under_functional_transforms():
    """Forward over reverse and reverse over forward, also at zeros."""
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1, 1, 1, 2, -1]]), 3)
    x = random_tokens(1, 7, 1, dtype=torch.float64)
    x[0, 0] = x[0, 2] = x[0, 3] = 0
    call = functools.partial(tokenops.merge, token_map=token_map, reduce="prod")
    expected = torch.autograd.functional.jacobian(call, x)
    assert torch.equal(torch.func.jacfwd(call)(x), expected)
    assert torch.equal(torch.func.jacrev(call)(x), expected)
    expected = torch.autograd.functional.hessian(lambda x: call(x).sum(), x)
    assert expected[0, 2, 0, 0, 3, 0] == x[0, 4, 0]  # derivative by both zeros of a segment
    assert torch.equal(torch.func.hessian(lambda x: call(x).sum())(x), expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_stride_zero_gradients(name, backend, device):
    operation = OPERATIONS[name]
    token_map = random_token_map(2, 11, 5, dropped=0.1, device=device, seed=5)
    inputs = make_inputs(operation, token_map, 19, torch.float32, device)
    call = functools.partial(operation.call, token_map)
    outputs, _, _ = values_and_gradients(call, inputs)
    expanded = [stride_zero(o, 0.5) for o in outputs]
    dense = [e.contiguous() for e in expanded]
    _, got, _ = values_and_gradients(call, inputs, expanded)
    _, expected, _ = values_and_gradients(call, inputs, dense)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_required_gradients(name, backend, device):
    """An input that alone requires a gradient gets the same gradient as together with others."""
    operation = OPERATIONS[name]
    token_map = random_token_map(2, 9, 4, device=device, seed=6)
    inputs = make_inputs(operation, token_map, 5, torch.float32, device)
    _, together, _ = values_and_gradients(functools.partial(operation.call, token_map), inputs)
    for i, wanted in enumerate(inputs):
        rest = {name: value for name, value in inputs.items() if name != wanted}
        call = functools.partial(operation.call, token_map, **rest)
        _, alone, _ = values_and_gradients(call, {wanted: inputs[wanted]})
        assert_same_bits(alone[0], together[i])


@pytest.mark.parametrize("reduce", ["amax", "amin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_share_the_gradient(reduce, dtype, backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 0, 0, 1, 1]], device=device), 2)
    x = torch.tensor([[[1.0], [2.0], [2.0], [1.0], [3.0], [3.0]]], dtype=dtype, device=device)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(tokenops.merge(x, token_map, reduce=reduce).sum(), x)
    chosen = [0, 0.5, 0.5, 0, 0.5, 0.5] if reduce == "amax" else [0.5, 0, 0, 0.5, 0.5, 0.5]
    assert gradient.flatten().tolist() == chosen


# ---- special values ----


@pytest.mark.isa
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_nan_stays_in_its_group(reduce, backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 1, 0, 1, 2]], device=device), 3)
    x = random_tokens(1, 5, 37, device=device)
    clean = tokenops.merge(x, token_map, reduce=reduce)
    for member in (0, 2):
        dirty = x.clone()
        dirty[0, member] = torch.nan
        out = tokenops.merge(dirty, token_map, reduce=reduce)
        assert out[0, 0].isnan().all()
        assert_same_bits(out[:, 1:], clean[:, 1:])
        spread = tokenops.unmerge(out, token_map)
        assert spread.isnan().any(2).tolist() == [[True, False, True, False, False]]


@pytest.mark.isa
@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_infinities_and_signed_extremes(reduce, backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1, 1, 2]], device=device), 4)
    inf = torch.inf
    column = torch.tensor([inf, -1.0, -inf, -inf, -2.0], device=device)
    x = column[None, :, None].expand(1, 5, 18).contiguous()
    out = tokenops.merge(x, token_map, reduce=reduce)[0, :, 0].tolist()
    assert out == ([inf, -inf, -2.0, 0.0] if reduce == "amax" else [-1.0, -inf, -2.0, 0.0])


def test_half_overflows_only_at_the_end(backend, device):
    """Half precision accumulates in float32: large terms that cancel do not overflow."""
    token_map = TokenMap.from_assign(torch.zeros(1, 3, dtype=torch.int64, device=device), 1)
    x = torch.tensor([[[60000.0], [60000.0], [-60000.0]]], dtype=torch.float16, device=device)
    assert tokenops.merge(x, token_map, reduce="sum").item() == 60000
    assert tokenops.merge(x[:, :2], TokenMap.from_assign(token_map.assign[:, :2], 1)) == 60000
    assert tokenops.merge(x.abs(), token_map, reduce="sum").item() == torch.inf


def test_sizes_count_exactly(backend, device):
    """In bfloat16, ToMe's sizes stop growing at 256."""
    token_map = TokenMap.from_assign(torch.zeros(1, 1000, dtype=torch.int64, device=device), 1)
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16, device=device)
    out, size = tokenops.merge_wavg(x, token_map)
    assert size.dtype == torch.float32
    assert size.flatten().tolist() == [1000]
    assert out.flatten().tolist() == [1, 1]
    again, total = tokenops.merge_wavg(out, TokenMap.identity(1, 1, device), size)
    assert total.flatten().tolist() == [1000]
    assert_same_bits(again, out)


def test_types_of_sizes(backend, device):
    """float64 if both the tokens and the sizes are float64, else float32."""
    token_map = random_token_map(1, 4, 2, device=device)
    x, size = torch.ones(1, 4, 2, device=device), torch.ones(1, 4, 1, device=device)
    for wide, given_size, expected in (
        (x, None, torch.float32),
        (x.double(), None, torch.float32),
        (x, size.double(), torch.float32),
        (x.double(), size, torch.float32),
        (x.double(), size.double(), torch.float64),
        (x.bfloat16(), size.bfloat16(), torch.float32),
    ):
        out, total = tokenops.merge_wavg(wide, token_map, given_size)
        assert (out.dtype, total.dtype) == (wide.dtype, expected)


def test_residual_of_another_dtype(backend, device):
    """The result has the dtype of ``y + residual``."""
    token_map = random_token_map(2, 9, 4, device=device)
    y = random_tokens(2, 4, 5, device=device)
    residual = random_tokens(2, 9, 5, device=device, seed=1)
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64)):
        a, b = y.to(dtypes[0]), residual.to(dtypes[1])
        out = tokenops.unmerge(a, token_map, residual=b)
        assert_same_bits(out, tokenops.unmerge(a, token_map) + b)


def test_weightless_groups_are_zero(backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1]], device=device), 3)
    x = random_tokens(1, 3, 4, device=device).requires_grad_()
    size = torch.tensor([[0.0, 0.0, 2.0]], device=device, requires_grad=True)
    out, total = tokenops.merge_wavg(x, token_map, size)
    mean = tokenops.merge(x, token_map, weight=size)
    for result in (out, mean):
        assert (result[0, 0] == 0).all()
        assert (result[0, 2] == 0).all()
        torch.testing.assert_close(result[0, 1], x[0, 2])
    assert total.flatten().tolist() == [0, 2, 0]
    gradients = torch.autograd.grad(out.sum() + mean.sum(), (x, size))
    assert all(g.isfinite().all() for g in gradients)


# ---- arguments ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["amax", "amin", "prod"])
def test_weighted_values_of_half_types_are_rounded_once(reduce, dtype, backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1, 1]], device=device), 2)
    x = torch.tensor([[[1.0], [1.0], [300.0], [0.01]]], device=device).to(dtype).requires_grad_()
    weight = torch.tensor([[0.50001, 0.5, 1e3, 1e-3]], device=device).requires_grad_()
    out = tokenops.merge(x, token_map, reduce=reduce, weight=weight)
    assert out.dtype == dtype
    out.sum().backward()
    exact, w = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    rows = (exact * w[..., None]).view(1, 2, 2, 1)
    expected = rows.prod(2) if reduce == "prod" else getattr(rows, reduce)(2)
    expected.sum().backward()
    # The largest product overflows float16, and the first two products differ only in float32.
    assert torch.equal(out.double().isinf(), expected.to(dtype).isinf())
    for got, wanted in ((out, expected), (x.grad, exact.grad), (weight.grad, w.grad)):
        assert got.dtype in (dtype, torch.float32)
        wanted = wanted.to(got.dtype)
        torch.testing.assert_close(got, wanted, rtol=2 * torch.finfo(got.dtype).eps, atol=0)


def test_weight_and_size_come_with_or_without_a_last_dimension(backend, device):
    token_map = random_token_map(2, 9, 4, device=device, seed=7)
    x = random_tokens(2, 9, 5, device=device)
    weight = random_tokens(2, 9, 1, device=device, seed=1).abs()
    for call in (
        lambda w: tokenops.merge(x, token_map, weight=w),
        lambda w: tokenops.merge_wavg(x, token_map, w)[0],
        lambda w: tokenops.merge_wavg(x, token_map, None, weight=w)[0],
    ):
        assert_same_bits(call(weight), call(weight[..., 0]))
        assert call(weight.bfloat16()).dtype == x.dtype


def test_methods_are_the_functions(backend, device):
    token_map = random_token_map(2, 9, 4, device=device, seed=8)
    x, y = random_tokens(2, 9, 5, device=device), random_tokens(2, 4, 5, device=device)
    size = torch.rand(2, 9, device=device)
    assert_same_bits(
        token_map.merge(x, reduce="amax", weight=size),
        tokenops.merge(x, token_map, reduce="amax", weight=size),
    )
    for a, b in zip(
        token_map.merge_wavg(x, size, weight=size),
        tokenops.merge_wavg(x, token_map, size, weight=size),
        strict=True,
    ):
        assert_same_bits(a, b)
    assert_same_bits(token_map.unmerge(y, residual=x), tokenops.unmerge(y, token_map, residual=x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_keeps_the_dtype(dtype, backend, device):
    token_map = random_token_map(2, 9, 4, device=device, seed=9)
    x = random_tokens(2, 9, 5, dtype=dtype, device=device)
    weight = torch.rand(2, 9, device=device)
    plainly = [
        tokenops.merge(x, token_map, weight=weight),
        tokenops.merge(x, token_map, reduce="prod"),
        *tokenops.merge_wavg(x, token_map, weight),
        tokenops.unmerge(x[:, :4], token_map, residual=x),
    ]
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = [
            tokenops.merge(x, token_map, weight=weight),
            tokenops.merge(x, token_map, reduce="prod"),
            *tokenops.merge_wavg(x, token_map, weight),
            tokenops.unmerge(x[:, :4], token_map, residual=x),
        ]
    for a, b in zip(cast, plainly, strict=True):
        assert_same_bits(a, b)


@pytest.mark.isa
@pytest.mark.parametrize(
    "channels", [768, 760, 761]
)  # whole cache lines, half cache lines, and neither
def test_passes_larger_than_the_cache(channels, backend, device):
    """Results of more than 32 MiB may bypass the caches when stored: bits must not differ."""
    batch, tokens = 30, 197
    token_map = random_token_map(batch, tokens, 181, device=device, seed=2)
    x = random_tokens(batch, tokens, channels, device=device, seed=3)
    y = random_tokens(batch, 181, channels, device=device, seed=4)
    size = random_tokens(batch, tokens, 1, device=device, seed=5).abs() + 0.5

    def results(part):
        one = TokenMap(*(t[part] for t in (token_map.assign, token_map.offsets, token_map.members)))
        return [
            *(one.merge(x[part], reduce=r) for r in ("sum", "mean", "amax", "prod")),
            *one.merge_wavg(x[part], size[part]),
            one.unmerge(y[part]),
            one.unmerge(y[part], residual=x[part]),
        ]

    whole = results(slice(None))
    for image in (0, batch - 1):  # one image fits in the caches
        for one, all_ in zip(results(slice(image, image + 1)), whole, strict=True):
            assert_same_bits(one[0], all_[image])
