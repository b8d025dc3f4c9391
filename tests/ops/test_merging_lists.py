# SPDX-License-Identifier: Apache-2.0
"""merge and unmerge of a list of tensors: the same results as a call for each tensor."""

import functools

import pytest
import torch

import tokenops
from tokenops import TokenMap
from tokenops.testing import (
    LAYOUTS,
    as_layout,
    assert_same_bits,
    random_token_map,
    random_tokens,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def merging(reduce, weighted=False):
    def call(token_map, x, weight):
        return tokenops.merge(x, token_map, reduce=reduce, weight=weight if weighted else None)

    return call


#: Functions of a map, a tensor or list of tensors, and a weight.
CALLS = {
    **{reduce: merging(reduce) for reduce in ("sum", "mean", "amax", "amin", "prod")},
    **{f"{reduce}-weight": merging(reduce, weighted=True) for reduce in ("sum", "mean", "amax")},
    "unmerge": lambda token_map, y, weight: tokenops.unmerge(y, token_map),
}
SUMS = ("sum", "sum-weight", "mean", "unmerge")  # whose kernels have a differentiable backward


def make_map(device, seed=1):
    return random_token_map(3, 13, 6, dropped=0.15, device=device, seed=seed)


def make_tensors(name, token_map, widths, dtype=torch.float32, layouts=("contiguous",)):
    """A tensor for each width, with alternating layouts."""
    batch = token_map.assign.shape[0]
    rows = token_map.num_tokens if name == "unmerge" else token_map.num_inputs
    return [
        as_layout(
            random_tokens(batch, rows, width, dtype=dtype, seed=i).to(token_map.assign.device),
            layouts[i % len(layouts)],
        )
        for i, width in enumerate(widths)
    ]


def make_weight(token_map, dtype=torch.float32):
    weight = random_tokens(*token_map.assign.shape, 1, seed=50, dtype=dtype).abs() + 0.5
    return weight.to(token_map.assign.device)


def assert_as_one_by_one(name, token_map, tensors, weight):
    together = CALLS[name](token_map, tensors, weight)
    assert type(together) is list
    assert len(together) == len(tensors)
    for i, (got, tensor) in enumerate(zip(together, tensors, strict=True)):
        assert got.device == tensor.device
        assert_same_bits(got, CALLS[name](token_map, tensor, weight), name=f"result {i}")


# ---- values ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_a_list_is_a_call_for_each(name, dtype, backend, device):
    """Tensors of different widths and layouts."""
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, (21, 8, 64, 1, 200), dtype, LAYOUTS)
    assert_as_one_by_one(name, token_map, tensors, make_weight(token_map))


@pytest.mark.parametrize("number", [0, 1, 2, 8, 9, 12, 17])
@pytest.mark.parametrize("name", CALLS)
def test_any_number_of_tensors(name, number, backend, device):
    token_map = make_map(device)
    for widths in ([24] * number, [1 + 5 * i for i in range(number)]):
        tensors = make_tensors(name, token_map, widths)
        assert_as_one_by_one(name, token_map, tensors, make_weight(token_map))


@pytest.mark.parametrize("name", CALLS)
def test_mixed_dtypes(name, backend, device):
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, [9] * 6)
    dtypes = (*DTYPES, torch.float32, torch.bfloat16)
    tensors = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    assert_as_one_by_one(name, token_map, tensors, make_weight(token_map))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 0), (2, 0, 3), (2, 5, 0), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_empty(name, shape, backend, device):
    token_map = random_token_map(*shape, device=device)
    for widths in ((4, 3), (0, 4, 0), (0, 0)):
        tensors = make_tensors(name, token_map, widths)
        assert_as_one_by_one(name, token_map, tensors, make_weight(token_map))


@pytest.mark.parametrize("name", CALLS)
def test_tuples_and_parameters(name, backend, device):
    token_map = make_map(device)
    weight = make_weight(token_map)
    tensors = make_tensors(name, token_map, (5, 7))
    expected = CALLS[name](token_map, tensors, weight)
    for given in (tuple(tensors), [torch.nn.Parameter(t) for t in tensors]):
        out = CALLS[name](token_map, given, weight)
        assert type(out) is list
        for a, b in zip(out, expected, strict=True):
            assert_same_bits(a, b)
    assert CALLS[name](token_map, (), weight) == []


def test_methods_are_the_functions(backend, device):
    token_map = make_map(device)
    weight = make_weight(token_map)
    x, y = (make_tensors(name, token_map, (5, 7, 5)) for name in ("sum", "unmerge"))
    pairs = [
        (token_map.merge(x), tokenops.merge(x, token_map)),
        (
            token_map.merge(x, reduce="sum", weight=weight),
            tokenops.merge(x, token_map, reduce="sum", weight=weight),
        ),
        (token_map.unmerge(y), tokenops.unmerge(y, token_map)),
    ]
    for method, function in pairs:
        for a, b in zip(method, function, strict=True):
            assert_same_bits(a, b)


def test_autocast_keeps_the_dtypes(backend, device):
    token_map = make_map(device)
    tensors = make_tensors("sum", token_map, (5, 5))
    plainly = token_map.merge(tensors, reduce="sum")
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = token_map.merge(tensors, reduce="sum")
    for a, b in zip(cast, plainly, strict=True):
        assert_same_bits(a, b)


# ---- gradients ----


def leaves_of(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(outputs, leaves, used=None):
    """Gradients of the leaves for random gradients of all outputs, or of the used outputs."""
    cotangents = [
        random_tokens(*o.shape, dtype=o.dtype, device=o.device, seed=70 + i)
        for i, o in enumerate(outputs)
    ]
    used = range(len(outputs)) if used is None else used
    return torch.autograd.grad(
        [outputs[i] for i in used], leaves, [cotangents[i] for i in used], materialize_grads=True
    )


def assert_gradients_as_one_by_one(name, token_map, tensors, weight, used=None):
    """Gradients have equal bits, except those of the weight, whose sums have another order."""
    *leaves, factor = leaves_of([*tensors, weight])
    together = gradients(CALLS[name](token_map, leaves, factor), [*leaves, factor], used)
    singly = gradients(
        [CALLS[name](token_map, leaf, factor) for leaf in leaves], [*leaves, factor], used
    )
    for i in range(len(leaves)):
        if used is None or i in used:
            assert_same_bits(together[i], singly[i], name=f"gradient {i}")
        else:  # the backward of a list gets zeros for unused outputs
            assert (together[i] == 0).all()
    tolerance = 1e-12 if weight.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(together[-1], singly[-1], rtol=tolerance, atol=tolerance)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, dtype, backend, device):
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, (21, 8, 64, 21), dtype)
    weight = make_weight(token_map, torch.float64 if dtype == torch.float64 else torch.float32)
    assert_gradients_as_one_by_one(name, token_map, tensors, weight)


@pytest.mark.parametrize("used", [(0,), (1,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_some_outputs(name, used, backend, device):
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, (5, 9, 5), torch.float64)
    weight = make_weight(token_map, torch.float64)
    assert_gradients_as_one_by_one(name, token_map, tensors, weight, used)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_many(name, backend, device):
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, [1 + i for i in range(12)], torch.float64)
    weight = make_weight(token_map, torch.float64)
    assert_gradients_as_one_by_one(name, token_map, tensors, weight)


@pytest.mark.parametrize("name", CALLS)
def test_only_required_gradients(name, backend, device):
    """An input that alone requires a gradient gets the same gradient as together with others."""
    token_map = make_map(device)
    inputs = [*make_tensors(name, token_map, (5, 9)), make_weight(token_map)]

    def call(x, y, weight):
        return CALLS[name](token_map, [x, y], weight)

    leaves = leaves_of(inputs)
    together = gradients(call(*leaves), leaves)
    for i in range(3 if name.endswith("weight") else 2):
        given = [t.detach() for t in inputs]
        given[i].requires_grad_()
        outputs = call(*given)
        used = [j for j, out in enumerate(outputs) if out.requires_grad]
        (alone,) = gradients(outputs, [given[i]], used)
        assert_same_bits(alone, together[i])


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_views(name, backend, device):
    """Views of one packed tensor, one of them twice in the list."""
    token_map = make_map(device)
    (packed,) = make_tensors(name, token_map, [3 * 8])
    weight = make_weight(token_map)

    def gradient(call):
        leaf = packed.clone().requires_grad_()
        q, k, _ = leaf.chunk(3, dim=-1)
        return gradients(call([q, k, q]), [leaf])[0]

    call = functools.partial(CALLS[name], token_map, weight=weight)
    together = gradient(lambda views: call(views))
    singly = gradient(lambda views: [call(view) for view in views])
    torch.testing.assert_close(together, singly)
    assert (together[..., 16:] == 0).all()


def test_gradient_of_the_weight_alone(backend, device):
    token_map = make_map(device)
    x = make_tensors("sum", token_map, (5, 9), torch.float64)
    weight = make_weight(token_map, torch.float64).requires_grad_()
    together = tokenops.merge(x, token_map, reduce="sum", weight=weight)
    singly = [tokenops.merge(t, token_map, reduce="sum", weight=weight) for t in x]
    got, expected = (gradients(outputs, [weight])[0] for outputs in (together, singly))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_ties_share_the_gradient(backend, device):
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 0, 1]], device=device), 2)
    column = torch.tensor([[[2.0], [2.0], [1.0], [3.0]]], device=device)
    x = [column.clone().requires_grad_(), (-column).requires_grad_()]
    outputs = tokenops.merge(x, token_map, reduce="amax")
    got = torch.autograd.grad([o.sum() for o in outputs], x)
    assert [g.flatten().tolist() for g in got] == [[0.5, 0.5, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, backend, device):
    token_map = random_token_map(2, 6, 3, dropped=0.2, device=device, seed=4)
    tensors = make_tensors(name, token_map, (2, 1), torch.float64)
    leaves = leaves_of([*tensors, make_weight(token_map, torch.float64)])
    leaves = leaves if name.endswith("weight") else leaves[:2]

    def call(x, y, weight=None):
        return tuple(CALLS[name](token_map, [x, y], weight))

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(("name", "power"), [*((name, 3) for name in SUMS), ("sum-weight", 1)])
def test_double_backward(name, power, backend, device):
    """As for single calls. The gradient of a linear function depends on the weight only."""
    token_map = make_map(device)
    tensors = make_tensors(name, token_map, (5, 9), torch.float64)

    def twice(call):
        leaves = leaves_of([*tensors, make_weight(token_map, torch.float64)])
        outputs = call(leaves[:2], leaves[2])
        total = sum((o if power == 1 else o.pow(power)).sum() for o in outputs)
        first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        second = sum(g.pow(2).sum() for g in first)
        return torch.autograd.grad(second, leaves, materialize_grads=True)

    call = functools.partial(CALLS[name], token_map)
    together = twice(call)
    singly = twice(lambda x, weight: [call(t, weight) for t in x])
    for a, b in zip(together, singly, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- backends ----


def test_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setattr(tokenops._backend, "_interpreting", False)
    token_map = make_map("cpu")
    x, y = (make_tensors(name, token_map, (3, 3)) for name in ("sum", "unmerge"))
    for name, call in (
        ("merge", lambda: token_map.merge(x)),
        ("unmerge", lambda: token_map.unmerge(y)),
    ):
        message = rf"{name}: backend 'triton' was chosen but cannot serve it"
        with tokenops.use_backend("triton"), pytest.raises(NotImplementedError, match=message):
            call()
