# SPDX-License-Identifier: Apache-2.0
"""Promises that only a CUDA device can keep or break: graphs, streams, no waiting, same bits."""

import pytest
import torch

import tokenops
from tokenops.testing import assert_same_bits, random_attention, random_tokens

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")

CALLS = (
    "nearest", "match", "match, tome order", "merge", "merge_wavg", "unmerge", "compose",
    "policy_attention", "policy_attention, exact", "attention_scores", "attention_scores, columns",
)  # fmt: skip


def calls(dtype=torch.float16):
    """A call of each operator, forward, as functions of tensors that may be filled anew."""
    x = random_tokens(3, 197, 64, dtype=dtype, device=CUDA, seed=1)
    heads = random_attention(
        2, 3, 197, 64, policy="hard", zero_sizes=0.1, dtype=dtype, device=CUDA, seed=2
    )
    size = torch.rand(3, 197, 1, device=CUDA) + 0.5
    token_map = tokenops.match(x, 16, num_prefix=1)
    y = token_map.merge(x)
    q, k = heads["q"], heads["k"]
    return {
        "nearest": (x, lambda: tokenops.nearest(x, x.flip(1))),
        "match": (x, lambda: tokenops.match(x, 16, num_prefix=1).assign),
        "match, tome order": (x, lambda: tokenops.match(x, 16, order="tome").members),
        "merge": (x, lambda: tokenops.merge(x, token_map)),
        "merge_wavg": (x, lambda: tokenops.merge_wavg(x, token_map, size)),
        "unmerge": (y, lambda: tokenops.unmerge(y, token_map, residual=x)),
        "compose": (size, lambda: token_map.compose(token_map.identity(3, 197, CUDA)).members),
        "policy_attention": (q, lambda: tokenops.policy_attention(**heads, eps=1e-6)),
        "policy_attention, exact": (q, lambda: tokenops.policy_attention(**heads)),
        "attention_scores": (q, lambda: tokenops.attention_scores(q, k, query_index=[0])),
        "attention_scores, columns": (q, lambda: tokenops.attention_scores(q, k)),
    }


def flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize("name", CALLS)
def test_capture_in_a_graph(name):
    """What is captured computes the same on new values."""
    filled, call = calls()[name]
    fresh = torch.randn_like(filled)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            captured = flat(call())
        filled.copy_(fresh)
        graph.replay()
        expected = flat(call())
    for got, wanted in zip(captured, expected, strict=True):
        assert_same_bits(got, wanted, name=name)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name):
    _, call = calls()[name]
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_step_waits_for_nothing_and_has_the_same_bits():
    inputs = random_attention(2, 3, 300, 64, policy="soft", dtype=torch.bfloat16, device=CUDA)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def step():
        out = tokenops.policy_attention(**inputs, eps=1e-6)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def test_other_streams():
    x = random_tokens(2, 500, 64, device=CUDA)
    expected = tokenops.match(x, 100).assign
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        got = tokenops.match(x, 100).assign
    stream.synchronize()
    assert_same_bits(got, expected)


def test_pointers_that_are_not_aligned():
    """A view whose first element is no multiple of 16 bytes."""
    memory = torch.randn(2 * 197 * 65 + 1, device=CUDA).half()
    x = memory[1:].view(2, 197, 65)[..., :64]
    assert x.data_ptr() % 16 != 0
    token_map = tokenops.match(x, 16)
    assert_same_bits(token_map.assign, tokenops.match(x.contiguous(), 16).assign)
    assert_same_bits(token_map.merge(x), token_map.merge(x.contiguous()))
