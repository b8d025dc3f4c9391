# SPDX-License-Identifier: Apache-2.0
"""The same bits in every run; no reads of uninitialized memory; no access out of bounds."""

import itertools
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from chosen import ops
from torch.utils._pytree import tree_leaves

import tokenops
from tokenops import TokenMap, _library
from tokenops.testing import (
    assert_same_bits,
    assert_valid_token_map,
    exact_metric,
    random_attention,
    random_token_map,
    random_tokens,
)
from tokenops.testing.samples import Sizes, calls

# ---- the same bits ----


def results_and_gradients(sizes, operators):
    """Results and gradients of the calls of some operators."""
    results = []
    for call in calls(sizes):
        if call.operator not in operators:
            continue
        leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
        outputs = tree_leaves(call.function(**leaves))
        results += [y.detach() for y in outputs]
        outputs = [y for y in outputs if y.requires_grad]
        if outputs:
            cotangents = [
                torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
                for y in outputs
            ]
            gradients = torch.autograd.grad(
                outputs, leaves.values(), cotangents, allow_unused=True, materialize_grads=True
            )
            results += gradients
    return results


def of_tokens(dtype, device="cpu"):
    """Matching and merging, on inputs large enough for several threads."""
    sizes = Sizes(3, 4, 401, 32, channels=136, dtype=dtype, device=device)
    operators = [n for n in _library.operators if "attention" not in n]
    return results_and_gradients(sizes, operators)


def of_attention(dtype, device="cpu"):
    """Few images and heads, so that threads share the rows of one head; then many."""
    operators = [n for n in _library.operators if "attention" in n]
    few = Sizes(1, 2, 301, 40, channels=1, dtype=dtype, device=device)
    many = Sizes(5, 4, 67, 32, channels=1, dtype=dtype, device=device)
    inputs = random_attention(1, 2, 301, 40, dtype=dtype, device=device)
    _, lse = tokenops.policy_attention(**inputs, return_lse=True)
    q, k = inputs["q"], inputs["k"]
    return [
        *results_and_gradients(few, operators),
        *results_and_gradients(many, operators),
        tokenops.attention_scores(q, k, lse=lse, exclude_self=True),
    ]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(dtype, backend, threads):
    if backend == "triton":
        pytest.skip("does not depend on CPU threads")
    check_threads(of_tokens, dtype, threads)


# The matrix products of PyTorch, and so the reference, depend on the number of threads.
@pytest.mark.isa
@pytest.mark.native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_bits_of_attention_for_any_number_of_threads(dtype, backend, threads):
    check_threads(of_attention, dtype, threads)


def check_threads(function, dtype, threads):
    threads(1)
    expected = function(dtype)
    for number in (2, 3, 7):
        threads(number)
        for i, (a, b) in enumerate(zip(function(dtype), expected, strict=True)):
            assert_same_bits(a, b, name=f"result {i} with {number} threads")


@pytest.mark.parametrize("function", [of_tokens, of_attention], ids=lambda f: f.__name__)
def test_same_bits_from_run_to_run(function, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter runs programs one after the other")
    first, second = function(torch.float32, device), function(torch.float32, device)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert_same_bits(a, b, name=f"result {i}")


@pytest.mark.parametrize("name", [f"{c.operator}-{c.name}" for c in calls(Sizes())])
def test_inputs_are_left_alone(name, backend, device):
    """No call writes into its tensors, and no result shares memory with them."""
    sizes = Sizes(tokens=30, dtype=torch.float32, device=device)
    call = next(c for c in calls(sizes) if f"{c.operator}-{c.name}" == name)
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    options = getattr(call.function, "keywords", {})  # of a partial: masks, positions
    given = {**leaves, **{n: t for n, t in options.items() if isinstance(t, torch.Tensor)}}
    copies = {n: t.detach().clone() for n, t in given.items()}
    results = tree_leaves(call.function(**leaves))
    loss = [y.sum() for y in results if y.requires_grad]
    if loss:
        sum(loss).backward()
    for tensor, before in copies.items():
        assert_same_bits(given[tensor].detach(), before, name=tensor)
    inputs = {t.untyped_storage().data_ptr() for t in given.values()}
    assert all(y.untyped_storage().data_ptr() not in inputs for y in results)


def test_token_maps_are_left_alone(backend, device):
    x, y, size = (random_tokens(2, n, 5, device=device) for n in (30, 22, 30))
    token_map = tokenops.match(x, 8, order="tome")
    fields = [token_map.assign, token_map.offsets, token_map.members]
    copies = [t.clone() for t in fields]
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        token_map.merge(x, reduce=reduce, weight=size[..., 0])
    token_map.merge_wavg(x, size[..., 0])
    token_map.unmerge(y, residual=x)
    for after, before in zip(fields, copies, strict=True):
        assert_same_bits(after, before)


def test_the_identity_copies(backend, device):
    """If nothing merges, results still share no memory with inputs."""
    x = random_tokens(2, 6, 3, device=device)
    token_map = tokenops.match(x, 0)
    for out in (token_map.merge(x), token_map.merge_wavg(x)[0], token_map.unmerge(x)):
        assert out.data_ptr() != x.data_ptr()


# ---- uninitialized memory ----


def test_unwritten_memory_is_poisoned():
    """The fixture that all other tests rely on."""
    assert torch.empty(1000).isnan().all()
    assert (torch.empty(100, dtype=torch.int32) == 2**31 - 1).all()
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return  # another allocator, for example of a sanitizer, fills memory differently
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        for number in (1000, 10_000):  # smaller blocks may be reused from a cache
            assert (torch.empty(number) > 3e38).all()
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


# ---- indices that nobody checked ----

GARBAGE = """
import itertools, sys, torch, tokenops
from chosen import ops
from tokenops import TokenMap, _library
from tokenops.ops.matching.arguments import Request, SplitArgs

if sys.argv[1] != "default":
    tokenops.use_backend(sys.argv[1])
generator = torch.Generator().manual_seed(0)
BATCH, TOKENS, OUTPUTS = 2, 13, 6

def garbage(*shape):
    edges = torch.tensor([-(2**31), -(2**30), -2, -1, 0, 1, 5, 6, 7, 12, 13, 14, 2**30, 2**31 - 1])
    return edges[torch.randint(0, len(edges), shape, generator=generator)].int()

done = 0

def attempt(function):
    global done
    try:
        function()
        done += 1
    except Exception:  # an error is as good as a wrong value
        pass

labels = torch.randint(-1, OUTPUTS, (BATCH, TOKENS), generator=generator)
good = TokenMap.from_assign(labels, OUTPUTS)
rounds = int(sys.argv[2])
for _ in range(rounds):
    fields = good.assign, good.offsets, good.members
    bad = garbage(BATCH, TOKENS), garbage(BATCH, OUTPUTS + 1), garbage(BATCH, TOKENS)
    for choice in itertools.product((0, 1), repeat=3):
        token_map = TokenMap(*(pair[c] for pair, c in zip(zip(fields, bad), choice)))
        index = token_map.assign, token_map.offsets, token_map.members
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(BATCH, TOKENS, 19, generator=generator).to(dtype).requires_grad_()
            y = torch.randn(BATCH, OUTPUTS, 19, generator=generator).to(dtype).requires_grad_()
            size = torch.rand(BATCH, TOKENS, generator=generator, requires_grad=True)
            for reduce in ("sum", "mean", "amax", "amin", "prod"):
                attempt(lambda: token_map.merge(x, reduce=reduce).sum().backward())
            attempt(lambda: token_map.merge(x, reduce="sum", weight=size).sum().backward())
            attempt(lambda: token_map.merge_wavg(x, size)[0].sum().backward())
            attempt(lambda: token_map.merge_wavg(x)[0].sum().backward())
            attempt(lambda: token_map.unmerge(y, residual=x).sum().backward())
            attempt(lambda: ops.unmerge(y, *index, None, None, None, True).sum().backward())
            attempt(lambda: ops.pair_dot(x, y, *index).sum().backward())
        attempt(lambda: token_map.compose(good))
        attempt(lambda: good.compose(token_map))
        attempt(lambda: token_map.key_mask())
        attempt(lambda: token_map.source_matrix())
    attempt(lambda: ops.invert(garbage(BATCH, TOKENS), OUTPUTS))
    metric = torch.randn(BATCH, TOKENS, 8, generator=generator)
    for order, threshold, prefix in itertools.product(("position", "tome"), (None, 0.0), (0, 2)):
        for shape in ((5,), (BATCH, 5)):
            split = garbage(*shape).long(), garbage(*shape).long()
            for r in (0, 3, 5, 12, 13, 20):
                request = Request(r, threshold, None, order)
                for arguments in (
                    SplitArgs(prefix, None, *split), SplitArgs(prefix), SplitArgs(40),
                    SplitArgs(-3), SplitArgs(stride=0),
                ):
                    attempt(lambda: ops.match(metric, "cosine", *request, *arguments))
                request = request._replace(r=-1)
                attempt(lambda: ops.match(metric, "cosine", *request, *SplitArgs(stride=-2)))
assert done > 125 * rounds, done  # most calls return something
print("survived")
"""


def test_garbage_indices_never_crash(backend, quick):
    rounds = "3" if quick else "40"
    command = [sys.executable, "-c", GARBAGE, backend, rounds]
    path = os.pathsep.join(
        filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")])
    )  # of chosen.py
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-2000:]}"
    assert run.stdout.strip() == "survived"


@pytest.mark.isa
def test_wild_labels_affect_only_their_tokens(backend, device):
    """A label out of range drops its token and does not affect other tokens."""
    token_map = random_token_map(1, 20, 6, device=device, seed=1)
    x = random_tokens(1, 20, 9, device=device)
    for wild in (-(2**31), -7, 6, 2**31 - 1):
        assign = token_map.assign.clone()
        assign[0, ::3] = wild
        clean = TokenMap.from_assign(assign.masked_fill(assign == wild, -1), 6)
        offsets, members = ops.invert(assign, 6)
        assert_same_bits(offsets, clean.offsets)
        assert_same_bits(members, clean.members)
        dirty = TokenMap(assign, offsets, members)
        for reduce in ("sum", "mean", "amax", "amin", "prod"):
            assert_same_bits(dirty.merge(x, reduce=reduce), clean.merge(x, reduce=reduce))
        assert_same_bits(dirty.merge_wavg(x)[0], clean.merge_wavg(x)[0])
        y = clean.merge(x)
        assert_same_bits(dirty.unmerge(y, residual=x), clean.unmerge(y, residual=x))


def test_wild_positions_of_the_operators(backend, device):
    """The API rejects or clamps positions out of range; kernels treat them as no position."""
    inputs = random_attention(2, 2, 12, 4, policy="hard", keys=9, device=device)
    q, k, v, policy = inputs.values()
    edges = torch.tensor(
        [-(2**31), -(2**30), -1, 0, 8, 9, 10, 1000, 2**24, 2**30, 2**31 - 1, 3], device=device
    )
    far = edges.int().expand(2, 12).contiguous()
    near = torch.where((edges >= 0) & (edges < 9), edges, torch.where(edges < 0, -1, 9))
    near = near.int().expand(2, 12).contiguous()
    for eps, causal in itertools.product((0.0, 1e-2), (False, True)):
        results = []
        for position in (far, near):
            leaves = [t.clone().requires_grad_() for t in (q, k, v, policy)]
            out, lse, *_ = ops.policy_attention(
                *leaves, None, None, position, True, False, eps, causal, "exact", 0.5
            )
            score = ops.attention_scores(
                *leaves[:2], None, policy, None, None, position, None, True, True, eps, causal, 0.5,
                "mean",
            )  # fmt: skip
            gradients = torch.autograd.grad(out.sum() + score.square().sum(), leaves)
            results.append([out, lse, score, *gradients])
        for got, expected in zip(*results, strict=True):
            assert_same_bits(got, expected)


def test_wild_argmax_of_the_backward(backend, device):
    """An argmax that the forward did not return adds to no key, or to a wrong key."""
    inputs = random_attention(1, 2, 7, 4, policy="soft", device=device)
    q, k, v, policy = inputs.values()
    options = True, False, 1e-2, False, "exact", 0.5
    tensors = q, k, v, policy, None, None, None
    out, lse, p_eps, argmax = ops.policy_attention(*tensors, *options)
    for wild in (-(2**31), -1, 7, 2**24, 2**31 - 1):
        results = ops.policy_attention_backward(
            *tensors, *options, out, lse, p_eps, torch.full_like(argmax, wild), out, lse,
            True, True, False,
        )  # fmt: skip
        assert all(r.isfinite().all() for r in results)


MEMORY = """
import re, sys, torch, tokenops
from pathlib import Path

tokenops.use_backend("native")
torch.set_num_threads(2)
names = "policy", "size"

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s*(\\d+) kB", text)[1]) * 1024

def run(tokens, options, scores):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, 16, generator=generator).requires_grad_() for _ in "qkv")
    policy = torch.rand(1, tokens, generator=generator).requires_grad_()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if scores:
        out = tokenops.attention_scores(q, k, policy=policy, **options)
    else:
        out = tokenops.policy_attention(q, k, v, policy, **options)
    out.square().sum().backward()
    return status("VmHWM") - before

for options in ({}, {"eps": 1e-3, "is_causal": True}):
    for scores in (False, True):
        run(64, options, scores)
        print(run(4096, options, scores))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
@pytest.mark.native_only  # the reference's autograd stores attention maps
def test_memory_of_attention_is_linear(backend):
    """Forward and backward of 4096 tokens; one attention map in float32 has 64 MB."""
    x = torch.zeros(1, 1, 2, 2)
    tokenops.policy_attention(x, x, x)  # raises if the backend cannot serve
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    extra = [int(line) for line in run.stdout.split()]
    assert len(extra) == 4
    assert max(extra) < 16 << 20, f"{extra} bytes"


# ---- extreme values and sizes ----


@pytest.mark.isa
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_extreme_metrics_give_valid_maps(similarity, value, backend, device):
    metric = exact_metric(2, 30, 16, seed=3, device=device)
    metric[:, ::4] *= value
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for options in ({}, {"threshold": 0.0}, {"num_prefix": 2, "order": "tome"}):
            token_map = tokenops.match(metric.to(dtype), 9, similarity=similarity, **options)
            outputs = 30 if "threshold" in options else 21
            assert_valid_token_map(token_map, num_tokens=outputs, partition=True)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_whose_length_is_tiny(dtype, backend, device):
    """The length of a tiny row may be 0 in float32; its similarities are then 0, never huge."""
    metric = random_tokens(1, 12, 64, dtype=dtype, device=device, seed=3)
    metric[0, [0, 3]] *= 1e-40 if dtype == torch.float64 else 1e-25
    a, b = metric[:, 0::2], metric[:, 1::2]
    with tokenops.use_backend("reference"):
        expected, index = tokenops.nearest(a, b)
        token_map = tokenops.match(metric, 2)
    score, found = tokenops.nearest(a, b)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, 1:], index[:, 1:])  # all are equal to the first row
    assert torch.equal(tokenops.match(metric, 2).assign, token_map.assign)


@pytest.mark.isa
def test_offsets_beyond_32_bits(backend, device, tmp_path):
    """Strides that reach past 2**31 elements; on the CPU the memory is a sparse file."""
    size = 2**31 + 64
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "sparse"), True, size, dtype=torch.bfloat16)
    else:
        memory = torch.empty(size, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((1, 9, 8), (0, 2**28, 1))
    near = random_tokens(1, 9, 8, dtype=torch.bfloat16, device=device)
    far.copy_(near)
    token_map = tokenops.match(far, 3)
    assert_same_bits(token_map.assign, tokenops.match(near, 3).assign)
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        assert_same_bits(token_map.merge(far, reduce=reduce), token_map.merge(near, reduce=reduce))
    assert_same_bits(token_map.merge_wavg(far)[0], token_map.merge_wavg(near)[0])
    heads = [t[:, None] for t in (far, near)]
    if backend == "triton":  # tokens of a tile must be close: separate the images instead
        heads = [t.transpose(0, 1)[:, None] for t in (far, near)]
    attended = [tokenops.policy_attention(t, t, t) for t in heads]
    scores = [tokenops.attention_scores(t, t, query_index=[-1]) for t in heads]
    if backend == "native":
        assert_same_bits(*attended)
        assert_same_bits(*scores)
    else:
        torch.testing.assert_close(*attended)
        torch.testing.assert_close(*scores)
    spread = token_map.unmerge(far[:, 3:], residual=far)
    assert_same_bits(spread, token_map.unmerge(near[:, 3:], residual=near))
