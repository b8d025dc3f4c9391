# SPDX-License-Identifier: Apache-2.0
"""Registration with PyTorch: schema, shapes, autograd and vmap, for all kinds of arguments."""

import itertools

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap
from torch.library import opcheck
from torch.utils import _pytree as pytree

import tokenops
from tokenops import TokenMap, _library
from tokenops.testing import (
    assert_same_bits,
    assert_within_error_budget,
    random_attention,
    random_token_map,
    random_tokens,
)
from tokenops.testing.samples import MAP, B, C, M, N, rows, samples

ops = torch.ops.tokenops


def sample_id(sample):
    return f"{sample.operator}-{sample.name}"


INDEX = (MAP.assign, MAP.offsets, MAP.members)
SAMPLES = list(samples())


@pytest.mark.parametrize(
    "sample",
    [s for s in SAMPLES if "nan" not in s.name],  # opcheck treats NaN as a difference
    ids=sample_id,
)
def test_opcheck(sample):
    opcheck(getattr(ops, sample.operator).default, sample.arguments)


@pytest.mark.isa
@pytest.mark.parametrize(
    "sample",
    [  # attention in half precision is compared with users' code, not with maps in float32
        s for s in SAMPLES if s.name != "half" or not s.operator.startswith("policy_attention")
    ],
    ids=sample_id,
)
def test_operator_does_what_its_reference_does(sample):
    """Also operators that only backward formulas call."""
    reference = _library.defined[sample.operator].reference

    def run(function, widen=False):
        values = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, list(sample.arguments))
        if widen:
            values = pytree.tree_map_only(
                torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, values
            )
        return pytree.tree_leaves(function(*values))

    for got, plain, truth in zip(
        run(getattr(ops, sample.operator)), run(reference), run(reference, widen=True), strict=True
    ):
        if got.is_floating_point():
            assert_within_error_budget(
                got, plain, truth, magnitude=truth.nan_to_num(0, 0, 0).abs().sum()
            )
        else:
            assert_same_bits(got, plain)


def test_every_operator_has_samples():
    assert {sample.operator for sample in SAMPLES} == set(_library.defined)
    names = [sample_id(sample) for sample in SAMPLES]
    assert len(set(names)) == len(names)


def test_public_operators_are_functions():
    for name in _library.operators:
        assert callable(getattr(tokenops, name))
        assert name in tokenops.__all__


# ---- vmap ----

IMAGES = 3


def stack_of_maps(device):
    maps = [random_token_map(B, N, M, dropped=0.2, device=device, seed=i) for i in range(IMAGES)]
    fields = zip(*((m.assign, m.offsets, m.members) for m in maps), strict=True)
    return TokenMap(*map(torch.stack, fields))


def loop(function, in_dims, *arguments):
    """The result of vmap, by a loop."""
    results = []
    for i in range(IMAGES):
        taken = []
        for argument, dim in zip(arguments, in_dims, strict=True):
            if isinstance(argument, TokenMap) and dim is not None:
                fields = argument.assign, argument.offsets, argument.members
                taken.append(TokenMap(*(f.select(dim, i) for f in fields)))
            else:
                taken.append(argument if dim is None else argument.select(dim, i))
        results.append(function(*taken))
    if isinstance(results[0], tuple):
        return tuple(torch.stack(r) for r in zip(*results, strict=True))
    return torch.stack(results)


def check_vmap(function, in_dims, *arguments):
    got = vmap(function, in_dims=in_dims)(*arguments)
    torch.testing.assert_close(got, loop(function, in_dims, *arguments), rtol=0, atol=0)


X_DIMS = {0: (IMAGES, B, N, C), 2: (B, N, IMAGES, C), None: (B, N, C)}


@pytest.mark.parametrize(
    ("x_dim", "map_dim"),
    [pair for pair in itertools.product(X_DIMS, (0, None)) if any(d is not None for d in pair)],
)
def test_vmap_of_merging(x_dim, map_dim, backend, device):
    x = torch.randn(X_DIMS[x_dim], generator=torch.Generator().manual_seed(0)).to(device)
    token_map = MAP.to(device) if map_dim is None else stack_of_maps(device)
    in_dims = x_dim, map_dim
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        check_vmap(lambda x, m, r=reduce: m.merge(x, reduce=r), in_dims, x, token_map)
    check_vmap(lambda x, m: m.merge(x, weight=x[..., 0]), in_dims, x, token_map)
    check_vmap(lambda x, m: m.merge_wavg(x, x[..., :1].abs()), in_dims, x, token_map)
    check_vmap(lambda x, m: m.unmerge(x[:, :M], residual=x), in_dims, x, token_map)
    check_vmap(lambda x, m: m.source_matrix() @ x, in_dims, x, token_map)


@pytest.mark.parametrize(("x_dim", "map_dim"), [(0, 0), (0, None), (2, 0), (None, 0)])
def test_vmap_of_merging_several(x_dim, map_dim, backend, device):
    """Some tensors of a list may be mapped and others not."""
    x = torch.randn(X_DIMS[x_dim], generator=torch.Generator().manual_seed(0)).to(device)
    token_map = MAP.to(device) if map_dim is None else stack_of_maps(device)
    fixed = random_tokens(B, N, 5, device=device, seed=3)
    weight = fixed[..., 0]
    in_dims = x_dim, map_dim

    def tensors(x):
        return [x, fixed, x[..., 1:]]

    for reduce in ("sum", "mean", "amax", "prod"):
        check_vmap(
            lambda x, m, r=reduce: tuple(m.merge(tensors(x), reduce=r)), in_dims, x, token_map
        )
    for factor in (lambda x: weight, lambda x: x[..., 0]):
        check_vmap(
            lambda x, m, f=factor: tuple(m.merge(tensors(x), reduce="sum", weight=f(x))),
            in_dims,
            x,
            token_map,
        )
    check_vmap(lambda x, m: tuple(m.unmerge([t[:, :M] for t in tensors(x)])), in_dims, x, token_map)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, None)], ids=str)
def test_vmap_of_matching(dims, backend, device):
    metric = torch.randn((IMAGES, B, 12, 4), generator=torch.Generator().manual_seed(1)).to(device)
    protected = torch.rand((IMAGES, B, 12), generator=torch.Generator().manual_seed(2)) < 0.2
    protected = protected.to(device)
    metric = metric[0] if dims[0] is None else metric.movedim(0, dims[0])

    def fields(token_map):
        return token_map.assign, token_map.offsets, token_map.members

    for mask in (protected, protected[:, 0]):  # [B, N] or [N] in each call
        mask = mask[0] if dims[1] is None else mask
        check_vmap(lambda x, p: fields(tokenops.match(x, 2, protected=p)), dims, metric, mask)
    other = metric.flip(0, -1) if dims[1] is None else metric.flip(-1)
    if dims[1] is None and dims[0] is not None:
        other = other.select(dims[0], 0)
    elif dims[0] is None:
        other = torch.stack([other] * IMAGES)
    check_vmap(tokenops.nearest, dims, metric, other)


def test_vmap_of_splits(backend, device):
    metric = random_tokens(B, 12, 4, device=device)
    sources = torch.stack([torch.arange(i, i + 5, device=device) for i in range(IMAGES)])
    destinations = torch.tensor([9, 10, 11], device=device)
    check_vmap(
        lambda s, d: tokenops.match(metric, 2, split=(s, d)).assign,
        (0, None),
        sources,
        destinations,
    )
    labels = torch.stack([torch.arange(12, device=device).expand(B, -1) % i for i in (2, 3, 4)])
    check_vmap(lambda a: TokenMap.from_assign(a, 4).members, (0,), labels)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0), (1, 0)], ids=str)
def test_vmap_of_attention(dims, backend, device):
    """Mapped over tokens, weights or both; positions are shared by all images or not."""
    q, k, v = (
        torch.randn((IMAGES, B, 2, N, C), generator=torch.Generator().manual_seed(i)).to(device)
        for i in range(3)
    )
    policy = torch.rand((IMAGES, B, N), generator=torch.Generator().manual_seed(4)).round()
    policy, places = policy.to(device), torch.arange(N, device=device)
    position = torch.arange(IMAGES * N, device=device).view(IMAGES, N) % N
    if dims[0] != 0:
        q, k, v = (t[0] if dims[0] is None else t.movedim(0, 1) for t in (q, k, v))
    if dims[1] is None:
        policy, position = policy[0], position[0]

    def attend(q, k, v, policy, position):
        out, lse = tokenops.policy_attention(
            q, k, v, policy, query_position=position, eps=1e-3, size=policy + 1, return_lse=True
        )
        shared = tokenops.policy_attention(q, k, v, query_position=places, is_causal=True)
        score = tokenops.attention_scores(q, k, policy=policy, query_weight=policy + 1, lse=lse)
        return out, lse, shared, score, tokenops.attention_scores(q, k, query_index=[0, -1])

    in_dims = (dims[0],) * 3 + (dims[1],) * 2
    arguments = q, k, v, policy, position
    got = vmap(attend, in_dims=in_dims)(*arguments)
    torch.testing.assert_close(got, loop(attend, in_dims, *arguments))


def test_vmap_returns_token_maps(backend, device):
    metrics = random_tokens(IMAGES * B, 12, 4, device=device).view(IMAGES, B, 12, 4)
    token_maps = vmap(lambda m: tokenops.match(m, 3))(metrics)
    assert isinstance(token_maps, TokenMap)
    assert token_maps.assign.shape == (IMAGES, B, 12)
    assert token_maps.counts is None
    counted = vmap(lambda m: tokenops.match(m, 3, threshold=0.3))(metrics)
    assert counted.counts.shape == (IMAGES, B)


# ---- derivatives by transforms ----


def loss(x, metric):
    """A sum over several differentiable operators."""
    token_map = tokenops.match(metric, 2)
    y, size = token_map.merge_wavg(x, x[..., :1].exp())
    score, _ = tokenops.nearest(x, metric)
    heads = x[:, None], metric[:, None], x[:, None]
    policy = metric[..., 0] > 0
    score = score.sum() + tokenops.policy_attention(*heads, policy, eps=1e-2).pow(2).sum()
    score = score + tokenops.attention_scores(*heads[:2], policy=policy)[:, ::2].sum()
    total = token_map.unmerge(y, residual=x).pow(2).sum() + (size * y).sum() + score
    return total + sum(token_map.merge(x, reduce=r).pow(2).sum() for r in ("mean", "amax"))


def test_batched_gradients():
    """``torch.autograd.grad(is_grads_batched=True)`` maps over the backward formulas."""
    for reduce in ("sum", "mean", "amax", "prod"):
        x = rows(N)
        out = MAP.merge(x, reduce=reduce)
        directions = torch.eye(out.numel()).view(-1, *out.shape)
        (batched,) = torch.autograd.grad(
            out, x, directions, retain_graph=True, is_grads_batched=True
        )
        singly = [torch.autograd.grad(out, x, d, retain_graph=True)[0] for d in directions]
        torch.testing.assert_close(batched, torch.stack(singly))


def test_batched_gradients_of_several():
    for reduce in ("sum", "mean", "amax", "prod"):
        x = rows(N), rows(N, seed=7)
        outs = MAP.merge(x, reduce=reduce)
        directions = torch.randn(5, *outs[0].shape, generator=torch.Generator().manual_seed(1))
        batched = torch.autograd.grad(
            outs, x, (directions, -directions), retain_graph=True, is_grads_batched=True
        )
        singly = [torch.autograd.grad(outs, x, (d, -d), retain_graph=True) for d in directions]
        for got, expected in zip(batched, zip(*singly, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(expected))


def test_batched_gradients_of_attention():
    inputs = random_attention(B, 2, N, C, policy="hard", zero_sizes=0.0)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    out = tokenops.policy_attention(**leaves, eps=1e-3)
    directions = torch.randn(5, *out.shape, generator=torch.Generator().manual_seed(1))
    tensors = list(leaves.values())
    batched = torch.autograd.grad(
        out, tensors, directions, retain_graph=True, is_grads_batched=True
    )
    singly = [torch.autograd.grad(out, tensors, d, retain_graph=True) for d in directions]
    for got, expected in zip(batched, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script:DeprecationWarning")  # in torch.func.jvp
def test_transforms_that_differentiate():
    """The reference serves torch.func.grad, vjp, jvp and their compositions."""
    metric = random_tokens(B, N, C, seed=7)
    xs = torch.stack([random_tokens(B, N, C, seed=i) for i in range(IMAGES)])
    expected = []
    for x in xs:
        leaf = x.clone().requires_grad_()
        expected += torch.autograd.grad(loss(leaf, metric), leaf)
    gradient = grad(loss)(xs[0], metric)
    torch.testing.assert_close(gradient, expected[0])
    together = vmap(grad(loss), in_dims=(0, None))(xs, metric)
    torch.testing.assert_close(together, torch.stack(expected))
    of_sum = grad(lambda xs: vmap(loss, in_dims=(0, None))(xs, metric).sum())(xs)
    torch.testing.assert_close(of_sum, together)
    _, forward = jvp(lambda x: loss(x, metric), (xs[0],), (xs[1],))
    torch.testing.assert_close(forward, (gradient * xs[1]).sum(), rtol=1e-4, atol=1e-4)
    jacobian = jacrev(lambda x: MAP.merge(x, reduce="mean"))(xs[0])
    assert jacobian.shape == (B, M, C, B, N, C)


def test_transforms_that_differentiate_several():
    xs = [random_tokens(B, N, C, seed=i) for i in range(2)]

    def loss(x, y):
        return sum(out.pow(2).sum() for out in MAP.unmerge(MAP.merge([x, y], reduce="sum")))

    leaves = [x.clone().requires_grad_() for x in xs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(grad(loss, argnums=(0, 1))(*xs), expected)


def test_transforms_refuse_a_backend_that_cannot_serve_them(backend, device):
    x, token_map = random_tokens(B, N, C, device=device), MAP.to(device)
    if backend != "reference":
        message = rf"merge: backend '{backend}' was chosen but cannot serve it: only the reference"
        with pytest.raises(NotImplementedError, match=message):
            grad(lambda x: token_map.merge(x).sum())(x)
        assert vmap(token_map.merge)(x[None]).shape == (1, B, M, C)
    else:
        assert grad(lambda x: token_map.merge(x).sum())(x).shape == x.shape
