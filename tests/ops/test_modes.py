# SPDX-License-Identifier: Apache-2.0
"""All operators in other modes of PyTorch: meta tensors, forward AD, FLOPs, threads, vmap."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
import torch.autograd.forward_ad as fwad
from test_registration import SAMPLES, ops, sample_id
from torch.func import hessian, jacfwd, jacrev, jvp
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import tokenops
from tokenops import TokenMap, _library
from tokenops.compat import dynamicvit, evit, tome, tomesd
from tokenops.testing import random_attention, random_tokens
from tokenops.testing.samples import MAP, B, C, M, N, Sizes, calls

H, D = 2, 8

#: Small calls in float64 of every public function.
CALLS = {f"{call.operator}-{call.name}": call for call in calls(Sizes())}


def tokens(count=N, width=C, seed=0, dtype=torch.float64):
    return random_tokens(B, count, width, seed=seed, dtype=dtype)


def heads(count=N, seed=0, dtype=torch.float64):
    return random_tokens(B, H, count, D, seed=seed, dtype=dtype)


def positional(call):
    """The call as a function of its tensors, with the results that have a gradient.

    The reference decides which have one, since autograd differentiates its plain PyTorch.
    """

    def function(*tensors):
        results = call.function(**dict(zip(call.tensors, tensors, strict=True)))
        floating = [y for y in pytree.tree_leaves(results) if y.is_floating_point()]
        return [torch.where(y == -torch.inf, 0, y) for y in floating]  # -inf: masked sources

    inputs = [x.clone() for x in call.tensors.values()]
    with tokenops.use_backend("reference"):
        results = function(*(x.clone().requires_grad_() for x in inputs))
    has_gradient = [y.requires_grad for y in results]
    return lambda *tensors: tuple(itertools.compress(function(*tensors), has_gradient)), inputs


#: The calls that have a gradient: a function and its inputs.
DIFFERENTIABLE = {
    name: positional(call)
    for name, call in CALLS.items()
    if _library.defined[call.operator].backward is not None
}
BY_NAME = pytest.mark.parametrize("name", DIFFERENTIABLE)


def test_every_public_operator_has_calls():
    assert {call.operator for call in CALLS.values()} == set(_library.operators)


# ---- gradients ----


@BY_NAME
def test_gradients(name, backend):
    """gradcheck and gradgradcheck; finite differences need policies and sizes above 0."""
    function, inputs = DIFFERENTIABLE[name]
    leaves = [torch.where(x == 0, 0.3, x).requires_grad_() for x in inputs]
    assert all(y.requires_grad for y in function(*leaves))  # gradcheck skips other results
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# ---- meta tensors ----


@pytest.mark.parametrize("sample", SAMPLES, ids=sample_id)
def test_meta_tensors_are_laid_out_as_real_ones(sample):
    def describe(tensors):
        return [(t.shape, t.dtype, t.stride()) for t in pytree.tree_leaves(tensors)]

    operator = getattr(ops, sample.operator)
    arguments = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, list(sample.arguments))
    on_meta = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
    results = pytree.tree_leaves(operator(*on_meta))
    assert {t.device.type for t in results} == {"meta"}
    assert describe(results) == describe(operator(*arguments))


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_meta_tensors(name):
    def describe(device):
        call = next(c for c in calls(Sizes(device=device)) if f"{c.operator}-{c.name}" == name)
        results = pytree.tree_leaves(call.function(**call.tensors))
        assert {t.device.type for t in results} == {device}
        return [(t.shape, t.dtype, t.stride()) for t in results]

    assert describe("meta") == describe("cpu")


def other_calls(device):
    """Calls of public functions that have no operator of the same name."""
    x, q = tokens(16).to(device), heads(16).to(device)
    scores, sizes = x[..., 0].abs(), torch.ones(B, 16, 1, device=device)
    kept = torch.arange(4, device=device).expand(B, -1)
    rest = torch.arange(4, 16, device=device).expand(B, -1)
    token_map = TokenMap.from_assign(torch.zeros(B, 16, dtype=torch.int64, device=device), 12)
    yield lambda: tokenops.match(x, 3, split=tokenops.random(8))
    yield lambda: token_map.compose(TokenMap.identity(B, 16, device))
    yield lambda: (token_map.key_mask(), token_map.source_matrix())
    yield lambda: tokenops.prune(scores, 4, num_prefix=1, fuse=True)
    yield lambda: tokenops.topk_keep(scores, 4)
    yield lambda: tokenops.gumbel_keep(x[..., :2])
    yield lambda: tokenops.keep_ratio_loss([sizes], [0.5])
    yield lambda: dynamicvit.softmax_with_policy(q @ q.mT, sizes)
    yield lambda: dynamicvit.attention_with_policy(q, q, q, sizes)
    yield lambda: dynamicvit.batch_index_select(x, kept)
    yield lambda: dynamicvit.batch_index_fill(x, x[:, :4], x[:, 4:], kept, rest)
    yield lambda: dynamicvit.masked_mean(x, sizes)
    yield lambda: evit.class_attention(q, q)
    yield lambda: evit.complement_idx(kept, 16)
    yield lambda: tome.bipartite_soft_matching(x, 3)[0](x)
    yield lambda: tome.kth_bipartite_soft_matching(x, 4)[0](x)
    yield lambda: tome.random_bipartite_soft_matching(x, 3)[0](x)
    yield lambda: tome.merge_wavg(tome.bipartite_soft_matching(x, 3)[0], x)
    yield lambda: tome.merge_source(tome.bipartite_soft_matching(x, 3)[0], x)
    yield lambda: tomesd.bipartite_soft_matching_random2d(x, 4, 4, 2, 2, 3)[0](x)


@pytest.mark.parametrize("number", range(len(list(other_calls("meta")))))
def test_other_functions_take_meta_tensors(number):
    def describe(device):
        results = pytree.tree_leaves(list(other_calls(device))[number]())
        assert {t.device.type for t in results} == {device}
        return [(t.shape, t.dtype, t.stride()) for t in results]

    assert describe("meta") == describe("cpu")


# ---- forward mode ----


@BY_NAME
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("forced", [None, "reference"])
def test_tangents_are_those_of_the_gradients(name, requires_grad, forced):
    """Dual numbers and torch.func.jvp agree with the backward, by a product with a cotangent."""
    function, inputs = DIFFERENTIABLE[name]
    tangents = [torch.randn_like(x) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = pytree.tree_leaves(function(*leaves))
    cotangents = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))

    def product(of_outputs):
        pairs = zip(pytree.tree_leaves(of_outputs), cotangents, strict=True)
        return sum((t * c).sum() for t, c in pairs)

    with tokenops.use_backend(forced), fwad.dual_level():
        duals = [
            fwad.make_dual(x.clone().requires_grad_(requires_grad), t)
            for x, t in zip(inputs, tangents, strict=True)
        ]
        results = pytree.tree_map(lambda y: fwad.unpack_dual(y).tangent, function(*duals))
        torch.testing.assert_close(product(results), expected)
        one = [duals[0], *inputs[1:]]  # the others have no tangent
        assert any(fwad.unpack_dual(y).tangent is not None for y in function(*one))
    with tokenops.use_backend(forced):
        values, results = jvp(function, tuple(inputs), tuple(tangents))
    torch.testing.assert_close(pytree.tree_leaves(values), outputs)
    torch.testing.assert_close(product(results), expected)


@BY_NAME
@pytest.mark.parametrize("forced", ["native", "composed"])
def test_a_forced_backend_without_tangents_says_so(name, forced):
    function, inputs = DIFFERENTIABLE[name]
    message = rf"backend '{forced}' was chosen but cannot serve it: .*forward-mode AD"
    with tokenops.use_backend(forced), fwad.dual_level():
        dual = fwad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(NotImplementedError, match=message):
            function(dual, *inputs[1:])


def test_operators_refuse_tangents():
    """Operators in torch.ops raise an error instead of dropping tangents silently."""
    checked = set()
    for name, _, arguments in SAMPLES:
        if _library.defined[name].backward is None or name in checked:
            continue
        checked.add(name)
        for wants in (False, True):
            with fwad.dual_level():
                first, *rest = pytree.tree_map_only(
                    torch.Tensor,
                    lambda t, w=wants: t.detach().requires_grad_(w and t.is_floating_point()),
                    list(arguments),
                )
                first = pytree.tree_map(lambda t: fwad.make_dual(t, torch.ones_like(t)), first)
                with pytest.raises(NotImplementedError, match=rf"{name}: .* forward-mode AD"):
                    getattr(ops, name)(first, *rest)
    assert checked == {n for n, o in _library.defined.items() if o.backward is not None}


def test_tangents_through_backwards():
    """Forward over reverse with dual numbers; the graph is recorded outside or inside the level."""
    x, t = tokens(), tokens(seed=1)
    for reduce in ("amax", "prod"):

        def gradient(x, r=reduce):
            return torch.autograd.grad(MAP.merge(x, reduce=r).square().sum(), x)[0]

        expected = jvp(torch.func.grad(lambda x, r=reduce: MAP.merge(x, reduce=r).square().sum()),
                       (x,), (t,))[1]  # fmt: skip
        with fwad.dual_level():
            got = gradient(fwad.make_dual(x.clone().requires_grad_(), t))
            torch.testing.assert_close(fwad.unpack_dual(got).tangent, expected)
        leaf = x.clone().requires_grad_()
        out = MAP.merge(leaf, reduce=reduce)
        with fwad.dual_level():
            direction = fwad.make_dual(torch.ones_like(out), torch.randn_like(out))
            got = fwad.unpack_dual(torch.autograd.grad(out, leaf, direction)[0])
            want = torch.func.vjp(lambda x, r=reduce: MAP.merge(x, reduce=r), x)[1]
            torch.testing.assert_close(got.tangent, want(fwad.unpack_dual(direction).tangent)[0])


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin", "prod"])
def test_jacobians_and_hessians_of_reductions(reduce):
    """Forward and reverse mode agree, also if one or two factors are zero."""
    x = tokens()
    x[:, 0], x[0, 2], x[1, :, 1] = 0, 0, 0
    if reduce in ("amax", "amin"):
        x = x + torch.linspace(0, 1e-3, x.numel(), dtype=x.dtype).view(x.shape)  # no ties

    def function(x):
        return MAP.merge(x, reduce=reduce)

    torch.testing.assert_close(jacfwd(function)(x), jacrev(function)(x))

    def loss(x):
        return (function(x) * torch.linspace(-1, 1, B * M * C).view(B, M, C)).sum()

    leaf = x.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(loss, leaf)
    torch.testing.assert_close(hessian(loss)(x), expected)
    torch.testing.assert_close(jacfwd(jacfwd(loss))(x), expected)


def test_the_derivatives_of_a_product():
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 1]]), 2)
    x = torch.tensor([[[2.0], [3.0], [5.0]]])

    def function(x):
        return token_map.merge(x, reduce="prod")

    assert jvp(function, (x,), (torch.ones_like(x),))[1].flatten().tolist() == [5, 1]
    second = hessian(lambda x: function(x).sum())(x).reshape(3, 3)
    assert second.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


# ---- FLOPs ----


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def test_every_operator_has_a_formula():
    with FlopCounterMode(display=False) as counter:
        pass
    packets = {getattr(ops, name) for name in _library.defined}
    assert packets <= set(counter.flop_registry)


def test_finding_the_counter_does_not_import_it():
    code = """
import importlib.util, torch, tokenops
assert importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    tokenops.match(torch.randn(1, 8, 4), 2)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 2 * 4 * 4 * 4


@pytest.mark.parametrize(("queries", "width"), [(N, D), (3, D), (N, 5)])
def test_flops_of_attention(queries, width):
    q, k = heads(queries, dtype=torch.float32), heads(seed=1, dtype=torch.float32)
    v = random_tokens(B, H, N, width, seed=2)
    for t in (q, k, v):
        t.requires_grad_()
    policy = torch.ones(B, N)

    def eager():
        return (q @ k.mT).softmax(-1) @ v

    def ours():
        return tokenops.policy_attention(q, k, v, policy, self_keep=False)

    expected, out = count(eager)
    got, result = count(ours)
    assert got == expected == 2 * B * H * queries * N * (D + width)
    backward, _ = count(lambda: out.sum().backward())
    ours_backward, _ = count(lambda: result.sum().backward())
    logits = 2 * B * H * queries * N * D  # the fused backward recomputes the logits
    assert ours_backward == backward + logits
    if width == D:
        assert ours_backward == 2.5 * got
    assert count(lambda: tokenops.attention_scores(q, k))[0] == logits
    with torch.no_grad():
        row, _ = count(lambda: tokenops.attention_scores(q, k, query_index=[0]))
    assert row == logits // queries


def test_flops_of_grouped_heads():
    inputs = random_attention(B, 4, N, D, key_heads=2)
    assert count(lambda: tokenops.policy_attention(**inputs))[0] == 4 * B * 4 * N * N * D


def test_flops_of_matching():
    x, keys = tokens(), heads()
    cases = {
        lambda: tokenops.match(x, 2): (N - N // 2) * (N // 2) * C,
        lambda: tokenops.match(keys, 2): (N - N // 2) * (N // 2) * D,
        lambda: tokenops.match(x, 1, split=tokenops.strided(3)): (N - N // 3) * (N // 3) * C,
        lambda: tokenops.match(x, 1, split=(INDEX_OF_SOURCES, INDEX_OF_REST)): 3 * 2 * C,
        lambda: tokenops.nearest(x, x[:, :4]): N * 4 * C,
    }
    for call, pairs in cases.items():
        assert count(call)[0] == 2 * B * pairs


INDEX_OF_SOURCES, INDEX_OF_REST = torch.tensor([0, 1, 2]), torch.tensor([3, 5])


def test_merging_counts_as_additions_do():
    x = tokens().requires_grad_()

    def work():
        y, _ = MAP.merge_wavg(x, x[..., 0].exp())
        (MAP.unmerge(y, residual=x) + MAP.unmerge(MAP.merge(x, reduce="amax"))).sum().backward()

    assert count(work)[0] == 0


def test_flops_of_a_chosen_backend():
    q = heads(dtype=torch.float32).requires_grad_()
    for backend in ("native", "composed"):
        with tokenops.use_backend(backend):
            flops, out = count(lambda: tokenops.policy_attention(q, q, q))
        assert flops == 4 * B * H * N * N * D
        assert count(lambda o=out: o.sum().backward())[0] == 2.5 * flops


# ---- one graph, several threads ----


@BY_NAME
def test_threads_share_a_graph(name):
    function, inputs = DIFFERENTIABLE[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = sum(y.square().sum() for y in pytree.tree_leaves(function(*leaves)))
    expected = torch.autograd.grad(total, leaves, retain_graph=True)
    failures = []

    def work():
        try:
            for _ in range(25):
                got = torch.autograd.grad(total, leaves, retain_graph=True)
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- vmap ----

IMAGES = 3


@pytest.mark.parametrize(
    ("name", "mapped"),
    [
        (name, mapped)
        for name, call in CALLS.items()
        for mapped in ("all", "last dimension", "first", "others")[: 2 * min(len(call.tensors), 2)]
    ],
)
def test_vmap(name, mapped, backend, device):
    """A call mapped over some of the tensors equals a loop."""
    call, *more = (
        next(c for c in calls(Sizes(device=device, seed=i)) if f"{c.operator}-{c.name}" == name)
        for i in range(IMAGES)
    )
    names = list(call.tensors)
    dims = {
        "all": [0] * len(names),
        "first": [0] + [None] * (len(names) - 1),
        "others": [None] + [0] * (len(names) - 1),
        "last dimension": [-1] * len(names),
    }[mapped]
    stacked = [
        call.tensors[n] if d is None else torch.stack([c.tensors[n] for c in (call, *more)], d)
        for n, d in zip(names, dims, strict=True)
    ]

    def function(*tensors):
        results = call.function(**dict(zip(names, tensors, strict=True)))
        return tuple(pytree.tree_leaves(results))

    got = torch.func.vmap(function, in_dims=tuple(dims))(*stacked)
    singly = [
        function(*(x if d is None else x.select(d, i) for x, d in zip(stacked, dims, strict=True)))
        for i in range(IMAGES)
    ]
    for y, expected in zip(got, zip(*singly, strict=True), strict=True):
        torch.testing.assert_close(y, torch.stack(expected))


# ---- torch.compile ----


@pytest.mark.parametrize("name", CALLS)
def test_compile(name):
    """One graph with the same results and gradients."""
    torch._dynamo.reset()
    call = CALLS[name]

    def run(function):
        leaves = {
            n: t.clone().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()
        }
        results = pytree.tree_leaves(function(**leaves))
        loss = [y.cos().sum() for y in results if y.requires_grad]
        wanted = [t for t in leaves.values() if t.requires_grad]
        gradients = torch.autograd.grad(sum(loss), wanted, allow_unused=True) if loss else ()
        return [y.detach() for y in results], gradients

    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(call.function))
