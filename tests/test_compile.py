# SPDX-License-Identifier: Apache-2.0
"""torch.compile(fullgraph=True) and torch.export: one graph, the same results and gradients."""

import threading

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.export import Dim

import tokenops
from tokenops import TokenMap
from tokenops.testing import random_tokens

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit:DeprecationWarning")  # of torch.export


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    # The tests' deterministic algorithms fill empty tensors, which changes the compiled code.
    torch.use_deterministic_algorithms(False)
    yield
    torch._dynamo.reset()


def layer(metric, x, size):
    """A token merging layer: match, merge with sizes, compute, unmerge."""
    token_map = tokenops.match(metric, 5, num_prefix=1)
    y, sizes = tokenops.merge_wavg(x, token_map, size)
    y = torch.nn.functional.gelu(y) * sizes
    return tokenops.unmerge(y, token_map, residual=x), sizes, token_map


def tome_layer(metric, x, size):
    token_map = tokenops.match(metric, metric.shape[1] // 4, order="tome")
    y = token_map.merge(x, weight=size)
    again = tokenops.match(y, 2, order="tome")
    return again.merge(y, reduce="amax"), again.compose(token_map)


def grid_layer(metric, x, size):
    token_map = tokenops.match(metric, 9, split=tokenops.grid(4, 6, 2, 2), similarity="dot")
    return token_map.unmerge(token_map.merge(x)) * size.mean()


def ragged_layer(metric, x, size):
    token_map = tokenops.match(metric, 9, threshold=0.1)
    y, sizes = token_map.merge_wavg(x, size, weight=x[..., :1].exp())
    return y * token_map.key_mask()[..., None], sizes, token_map.counts


def reductions(metric, x, size):
    token_map = tokenops.match(metric, 3, protected=metric[0, :, 0] > 1.5)
    return [token_map.merge(x, reduce=r) for r in ("sum", "mean", "amax", "amin", "prod")]


def pairs(metric, x, size):
    score, index = tokenops.nearest(x, x.flip(1), a_mask=size > 0.2)
    return torch.where(score.isfinite(), score, 0), index


def clusters(metric, x, size):
    labels = metric[..., :4].argmax(-1)
    token_map = TokenMap.from_assign(labels, 4)
    kept = TokenMap.identity(x.shape[0], 4, x.device).compose(token_map)
    return kept.merge(x, weight=size), kept.source_matrix()


def several(metric, x, size):
    """Lists of tensors, those of one dtype by one operator."""
    token_map = tokenops.match(metric, 5, num_prefix=1)
    tensors = token_map.merge([x, metric, 2 * x], reduce="sum", weight=size)
    more = token_map.merge((x, metric.double(), x[..., 1:]), reduce="amax")
    return token_map.unmerge(tensors), more, token_map.merge([x, metric])


def attend(metric, x, size):
    """All arguments of attention, and scores."""
    q = metric.unflatten(2, (2, -1)).transpose(1, 2)
    v = x[:, None].expand(-1, 2, -1, -1)
    padding = size.detach() > 1.5
    weights = {"size": size + 1, "key_padding_mask": padding, "eps": 1e-6, "is_causal": True}
    out, lse = tokenops.policy_attention(q, q, v, size, **weights, return_lse=True)
    score = tokenops.attention_scores(q, q, policy=size, **weights, lse=lse, exclude_self=True)
    by_head = size[:, None].expand(-1, 2, -1)
    more = tokenops.policy_attention(q, q, v, by_head, policy_grad="kept", self_keep=False)
    return out.transpose(1, 2).flatten(2), lse, score, more


def attend_to_kept(metric, x, size):
    """A keep policy from the class token's attention, then kept queries over all keys."""
    q = metric[:, None]
    score = tokenops.attention_scores(q, q, query_index=[0], head_reduce="none")[:, 0]
    kept = score.topk(5).indices
    rows = q.gather(2, kept[:, None, :, None].expand(-1, 1, -1, q.shape[3]))
    out = tokenops.policy_attention(
        rows, q, x[:, None], size > 0.4, query_position=kept, policy_grad="kept"
    )
    rows = [[0], [-1], [0, -1], kept]
    more = [tokenops.attention_scores(q, q, query_index=r, exclude_self=True) for r in rows]
    return out, tokenops.attention_scores(q, q, query_weight=size), score, more


FUNCTIONS = (
    *(layer, tome_layer, grid_layer, ragged_layer, reductions, pairs, clusters),
    *(several, attend, attend_to_kept),
)


def make_inputs(batch=2, tokens=24, channels=6, device="cpu"):
    metric, x, size = (
        random_tokens(batch, tokens, width, device=device, seed=seed)
        for seed, width in enumerate((8, channels, 1))
    )
    return metric, x.requires_grad_(), (size[..., 0].abs() + 0.1).requires_grad_()


def outputs_and_gradients(function, inputs):
    """All results as a flat list, and the gradients of their sum."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    outputs = torch.utils._pytree.tree_leaves(function(*leaves))
    total = sum(
        (o * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum()
        for o in outputs
        if o.requires_grad
    )
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [o.detach() for o in outputs], torch.autograd.grad(total, wanted, materialize_grads=True)


def check(compiled, function, inputs, **tolerance):
    got, expected = (outputs_and_gradients(f, inputs) for f in (compiled, function))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compile(function, backend, device):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    check(compiled, function, make_inputs(device=device))


@pytest.mark.parametrize(
    "function",
    [layer, tome_layer, ragged_layer, clusters, several, attend, attend_to_kept],
    ids=lambda f: f.__name__,
)
def test_compile_with_dynamic_shapes(function):
    """One graph for all sizes."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens, channels in ((2, 24, 6), (3, 31, 5), (4, 40, 9)):
            check(compiled, function, make_inputs(batch, tokens, channels))


def test_compile_with_dynamic_shapes_of_the_reference():
    with tokenops.use_backend("reference"):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch, tokens in ((2, 24), (3, 31)):
            check(compiled, layer, make_inputs(batch, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "dynamic"), [(layer, False), (tome_layer, True), (attend, True)]
)
def test_inductor(function, dynamic):
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for tokens in (24, 31) if dynamic else (24,):
        check(compiled, function, make_inputs(tokens=tokens), rtol=1e-4, atol=1e-5)


def test_choosing_a_backend_compiles_again():
    """A compiled function uses the chosen backend after each change of the choice."""
    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    def function(x):
        return tokenops.match(x, 2).merge(x)

    compiled = torch.compile(function, fullgraph=True, backend=record)
    x = random_tokens(2, 8, 4)
    expected = function(x)
    torch.testing.assert_close(compiled(x), expected)
    with tokenops.use_backend("reference"):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    assert ["tokenops.match.default" in g for g in graphs] == [True, False]


def test_a_compiled_function_follows_the_thread_that_calls_it():
    """Each thread has its own choice, also inside the compiled function."""
    graphs = []

    def record(graph, inputs):
        graphs.append([str(n.target) for n in graph.graph.nodes if "tokenops" in str(n.target)])
        return graph.forward

    @tokenops.use_backend("composed")
    def decorated(x, token_map):
        return token_map.merge(x)

    def function(x, token_map):
        with tokenops.use_backend("reference"):
            y = token_map.merge(x)
        return y + token_map.merge(x) + decorated(x, token_map)

    compiled = torch.compile(function, fullgraph=True, backend=record)
    x = random_tokens(2, 8, 4)
    token_map = tokenops.match(x, 2)
    expected = function(x, token_map)

    def call(name):
        with tokenops.use_backend(name):
            torch.testing.assert_close(compiled(x, token_map), expected)

    for name in ("composed", None, "composed"):
        thread = threading.Thread(target=call, args=(name,))
        thread.start()
        thread.join()
    call(None)
    assert graphs == [
        ["tokenops.merge.composed", "tokenops.merge.composed"],
        ["tokenops.merge.default", "tokenops.merge.composed"],
    ]


def test_floats_compile_anew():
    """Each value of eps and scale recompiles, as in PyTorch's own attention."""
    q, policy = random_tokens(2 * 2, 8, 4).view(2, 2, 8, 4), torch.ones(2, 8)

    def function(eps, scale):
        out = tokenops.policy_attention(q, q, q, policy, eps=eps, scale=scale)
        return out, tokenops.attention_scores(q, q, policy=policy, eps=eps, scale=scale)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for eps, scale in ((0.0, 0.5), (1e-3, 0.5), (1e-2, 0.25), (1e-3, 0.5)):
        torch.testing.assert_close(compiled(eps, scale), function(eps, scale))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_thresholds_do_not_compile_anew(dynamic, backend, device):
    """The second value of a float recompiles, further values do not; a tensor never recompiles."""

    def function(x, threshold):
        token_map = tokenops.match(x, 5, threshold=threshold)
        return token_map.merge(x), token_map.counts

    x = random_tokens(2, 17, 8, device=device)
    for make in (float, lambda t: torch.tensor(t, device=device)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for i in range(4):
            threshold = make(0.05 + 0.1 * i)
            for got, expected in zip(compiled(x, threshold), function(x, threshold), strict=True):
                assert torch.equal(got, expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs <= (2 if make is float else 1)


def test_several_tensors_are_one_node():
    """In the forward graph and in the backward graph."""
    graphs = []

    def record(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    def function(token_map, q, k, v):
        return token_map.unmerge(token_map.merge([q, k, v]))

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    inputs = [random_tokens(2, 8, 4, seed=i).requires_grad_() for i in range(3)]
    sum(out.sum() for out in compiled(tokenops.match(inputs[0], 2), *inputs)).backward()
    for graph in graphs:
        nodes = sorted(node for node in graph if node.startswith("tokenops."))
        assert nodes == ["tokenops.merge_many.default", "tokenops.unmerge_many.default"]
    assert len(graphs) == 2


def test_compiled_vmap(backend, device):
    xs = random_tokens(3 * 2, 8, 4, device=device).view(3, 2, 8, 4)
    mapped = torch.func.vmap(lambda x: tokenops.match(x, 2).merge(x))
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(xs), mapped(xs))


def test_compiled_transforms_that_differentiate():
    xs = random_tokens(3 * 2, 8, 4).view(3, 2, 8, 4)
    mapped = torch.func.vmap(torch.func.grad(lambda x: tokenops.match(x, 2).merge(x).pow(2).sum()))
    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(xs), mapped(xs))


def test_compiled_autocast(backend, device):
    def function(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            token_map = tokenops.match(x, 3)
            heads = x[:, None], x[:, None], x[:, None]
            attended = tokenops.policy_attention(*heads), tokenops.attention_scores(*heads[:2])
            return token_map.merge(x), tokenops.nearest(x, x.flip(1)), attended

    x = random_tokens(2, 12, 8, device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


# ---- export ----


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, metric, x, size):
        return self.function(metric, x, size)


def exported(function, named):
    metric, x, size = (t.detach() for t in make_inputs())
    if named:
        images, tokens = Dim("images", min=2, max=512), Dim("tokens", min=16, max=4096)
    else:
        images = tokens = Dim.AUTO
    dynamic = {0: images, 1: tokens}
    shapes = {"metric": dynamic, "x": dynamic, "size": dynamic}
    return torch.export.export(Module(function), (metric, x, size), dynamic_shapes=shapes)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        *((layer, True), (layer, False), (tome_layer, False), (ragged_layer, True)),
        *((clusters, True), (several, True), (several, False)),
        *((attend, True), (attend, False), (attend_to_kept, True)),
    ],
    ids=lambda p: getattr(p, "__name__", {True: "named", False: "auto"}.get(p)),
)
def test_export_with_dynamic_batch_and_tokens(function, named):
    program = exported(function, named)
    assert any("tokenops." in str(node.target) for node in program.graph.nodes)
    for batch, tokens in ((2, 24), (5, 33), (3, 100)):
        inputs = [t.detach() for t in make_inputs(batch, tokens)]
        got, expected = program.module()(*inputs), function(*inputs)
        flat = [torch.utils._pytree.tree_leaves(r) for r in (got, expected)]
        torch.testing.assert_close(*flat)


def test_exported_programs_keep_token_maps(tmp_path):
    """A token map is a pytree that can be written to a file."""
    program = exported(layer, named=True)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    inputs = [t.detach() for t in make_inputs(3, 40)]
    got, expected = loaded.module()(*inputs), layer(*inputs)
    assert isinstance(got[2], TokenMap)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[2].assign, expected[2].assign)
    assert got[2].num_tokens == 35


@pytest.mark.parametrize("named", [False, True])
def test_export_with_a_share_of_the_tokens(named):
    """PyTorch's solver cannot prove guards with quotients: they must be run-time asserts.

    Without this option, slicing ``x[:, : N - N // 3]`` cannot be exported either.
    """

    class Third(torch.nn.Module):
        def forward(self, x):
            return tokenops.merge(x, tokenops.match(x, x.shape[1] // 3))

    dim = Dim("tokens", min=16, max=600) if named else Dim.DYNAMIC
    options = {"prefer_deferred_runtime_asserts_over_guards": True} if named else {}
    program = torch.export.export(
        Third(), (random_tokens(2, 37, 8),), dynamic_shapes=({1: dim},), **options
    )
    for tokens in (16, 50, 600):
        x = random_tokens(2, tokens, 8)
        torch.testing.assert_close(program.module()(x), Third()(x))
