# SPDX-License-Identifier: Apache-2.0
"""torch.jit.trace of the drop-ins: a trace gives the eager results, also for other batch sizes.

During tracing, sizes that are read from shapes are tensors.
"""

from __future__ import annotations

import pytest
import torch

from tokenops.compat import dynamicvit, evit, tome, tomesd

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def pair(matching):
    """Merge and unmerge of all kinds of tensors."""

    def call(x):
        merge, unmerge = matching(x)
        merged, size = tome.merge_wavg(merge, x)
        merged, size = merged + unmerge(merged)[:, : merged.shape[1]], size + 1
        whole = merge((x * 100).long(), mode="amax")
        source = tome.merge_source(merge, x)
        return merged, size, merge(x, mode="prod"), whole, unmerge(whole), source

    return call


def layers(x):
    size = None
    for _ in range(3):
        merge, _ = tome.bipartite_soft_matching(x, 2, class_token=True)
        x, size = tome.merge_wavg(merge, x, size)
    return x, size


def heads(x):
    return x.unflatten(2, (2, -1)).transpose(1, 2)


def policy_of(x):
    return (x[..., :1] > 0).to(x.dtype)


def select(x):
    index = torch.arange(3).expand(x.shape[0], -1)
    chosen = dynamicvit.batch_index_select(x, index)
    filled = dynamicvit.batch_index_fill(x, chosen + 1, chosen, index + 3, index)
    return chosen, filled, dynamicvit.batch_index_select(x.long(), index)


def weigh(x):
    logits = heads(x) @ heads(x).mT
    attention = dynamicvit.softmax_with_policy(logits, policy_of(x))
    fused = dynamicvit.attention_with_policy(heads(x), heads(x), heads(x), policy_of(x))
    return attention, fused, dynamicvit.masked_mean(x, policy_of(x))


def drop(x):
    attention = evit.class_attention(heads(x), heads(x))
    out, token_map = evit.drop_tokens(x, attention, 0.5, fuse_token=True)
    index = token_map.members[:, 1:4] - 1
    return attention, out, evit.complement_idx(index, x.shape[1] - 1)


TRACED = {
    "class token": pair(lambda x: tome.bipartite_soft_matching(x, 4, True)),
    "both tokens": pair(lambda x: tome.bipartite_soft_matching(x, 4, True, True)),
    "distillation token": pair(lambda x: tome.bipartite_soft_matching(x, 4, False, True)),
    "no token": pair(lambda x: tome.bipartite_soft_matching(x, 4)),
    "half of them": pair(lambda x: tome.bipartite_soft_matching(x, x.shape[1])),
    "nothing": pair(lambda x: tome.bipartite_soft_matching(x, 0)),
    "count of a tensor": pair(lambda x: tome.bipartite_soft_matching(x, torch.tensor(3))),
    "kth": pair(lambda x: tome.kth_bipartite_soft_matching(x, 3)),
    "grid": pair(lambda x: tomesd.bipartite_soft_matching_random2d(x, 4, 4, 2, 2, 9, no_rand=True)),
    "layers": layers,
    "select": select,
    "weigh": weigh,
    "drop": drop,
}


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_trace_repeats_the_eager_result(name, batch):
    function, generator = TRACED[name], torch.Generator().manual_seed(0)

    def draw(images):
        return torch.randn(images, 16, 8, generator=generator)

    traced = torch.jit.trace(function, (draw(batch),), check_trace=False)
    for images in (batch, 1, 5):
        x = draw(images)
        results, expected = traced(x), function(x)
        assert len(results) == len(expected)
        for got, wanted in zip(results, expected, strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
