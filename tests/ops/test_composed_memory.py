# SPDX-License-Identifier: Apache-2.0
"""Composed functions compute similarities and attention in blocks, never all pairs at once."""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tokenops
from tokenops import _library
from tokenops.testing import random_tokens

N = 8192
PAIRS = N // 2 * (N // 2) * 4  # bytes of scores of one half of the tokens with the other half


class Largest(TorchDispatchMode):
    """Replaces operators by functions of one kind; records the bytes of the largest tensor."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.bytes = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tokenops":
            name = func._schema.name.partition("::")[2]
            with self:
                return getattr(_library.defined[name], self.kind)(*args)
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def attend(**options):
    """Forward and backward of half the tokens, as queries and as keys."""
    q = random_tokens(1, N // 2, 8)[:, None].requires_grad_()
    out = tokenops.policy_attention(q, q, q, **options)
    torch.autograd.grad(out.sum(), q)


def weights():
    return torch.rand(1, N // 2, generator=torch.Generator().manual_seed(0)) + 0.5


CALLS = {
    "match": lambda: tokenops.match(random_tokens(1, N, 8), 1000, num_prefix=1),
    "match, grid": lambda: tokenops.match(
        random_tokens(1, N, 8), 1000, split=tokenops.grid(64, 128, 2, 2)
    ),
    "nearest": lambda: tokenops.nearest(*random_tokens(2, N // 2, 8)[:, None]),
    "policy": lambda: attend(policy=weights().requires_grad_()),
    "policy, causal": lambda: attend(policy=weights(), is_causal=True, eps=1e-6),
    "size": lambda: attend(size=weights()),
    "scores": lambda: tokenops.attention_scores(*random_tokens(2, N // 2, 8)[:, None, None]),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_grows_with_the_number_of_pairs(name):
    with tokenops.use_backend(None), Largest("composed") as largest:
        CALLS[name]()
    assert 0 < largest.bytes <= PAIRS // 4


def test_the_bound_is_below_all_pairs():
    with tokenops.use_backend(None), Largest("reference") as largest:
        CALLS["scores"]()
    assert largest.bytes >= PAIRS
