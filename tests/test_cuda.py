# SPDX-License-Identifier: Apache-2.0
"""Tests that need a CUDA device: graphs, streams, no synchronization, same bits."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import tokenops
from tokenops.testing import assert_same_bits, random_attention, random_tokens
from tokenops.testing.samples import Sizes, calls

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")

SIZES = Sizes(3, 3, 197, 64, channels=64, dtype=torch.float16, device=CUDA)
NAMES = [f"{call.operator}-{call.name}" for call in calls(Sizes())]


def call_of(name):
    return next(c for c in calls(SIZES) if f"{c.operator}-{c.name}" == name)


@pytest.mark.parametrize("name", NAMES)
def test_capture_in_a_graph(name):
    """A captured graph computes the same results as eager calls on new values."""
    call = call_of(name)
    filled = next(iter(call.tensors.values()))
    fresh = torch.randn_like(filled)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.inference_mode():
        call.function(**call.tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            captured = tree_leaves(call.function(**call.tensors))
        filled.copy_(fresh)
        graph.replay()
        expected = tree_leaves(call.function(**call.tensors))
    for got, wanted in zip(captured, expected, strict=True):
        assert_same_bits(got, wanted, name=name)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    call = call_of(name)
    call.function(**call.tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.function(**call.tensors)
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
    """A view whose address is not a multiple of 16 bytes."""
    memory = torch.randn(2 * 197 * 65 + 1, device=CUDA).half()
    x = memory[1:].view(2, 197, 65)[..., :64]
    assert x.data_ptr() % 16 != 0
    token_map = tokenops.match(x, 16)
    assert_same_bits(token_map.assign, tokenops.match(x.contiguous(), 16).assign)
    assert_same_bits(token_map.merge(x), token_map.merge(x.contiguous()))
