# SPDX-License-Identifier: Apache-2.0
"""Rivals in the benchmarks compute the same as tokenops, without needless work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokenops
from benchmarks import host, machine, rivals
from benchmarks.attention import AttentionShape, make_heads, make_weights
from benchmarks.cases import DTYPES, Shape, context, make_metric, relative
from benchmarks.matching import mean_similarity
from benchmarks.registry import all_cases, find, select

CPU = torch.device("cpu")


def identify(case):
    return f"{case.operator}-{case.name}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(all_cases()), ids=identify)
def test_rivals_agree(case, dtype):
    work = case.tiny().prepare(DTYPES[dtype], CPU)
    assert work.tensor.dtype == DTYPES[dtype]
    assert work.bytes > 0
    backends = machine.backends_of(case.public, work.tensor)
    with torch.inference_mode(work.inference):
        expected = work.make("tokenops")()
        for name in ("reference", "composed", "native", "eager", "index", "sdpa+bias"):
            if name not in {*work.rivals, *backends}:
                continue
            with context(name):
                call = work.make(name)
                result, again = call(), call()
            for value in (result, again):  # a backward must be able to run twice
                assert abs(work.difference(name, value, expected)) <= work.tolerance


@pytest.mark.parametrize(("grid", "prefix"), [(None, 0), (None, 1), ((5, 7, 2, 2), 0)])
def test_recipes_are_what_tokenops_computes(grid, prefix):
    shape = Shape(3, 35, 8, 6, prefix=prefix, grid=grid)
    metric = make_metric(shape, torch.float64, CPU)
    x = torch.randn(3, 35, 5, dtype=torch.float64)
    size = torch.randint(1, 4, (3, 35, 1)).double()
    token_map = tokenops.match(metric, 6, num_prefix=prefix, split=shape.split(), order="tome")
    index = () if grid is None else rivals.tomesd_split(*grid, CPU)
    match = rivals.match(metric, 6, prefix > 0, *index)
    merged = rivals.merge(x, match, "mean")
    back = rivals.unmerge(merged, match)
    if grid is None:  # an argsort that is not stable lists sources and destinations in any order
        weighted, total = rivals.merge_wavg(x, size, match)
        expected, expected_total = tokenops.merge_wavg(x, token_map, size)
        torch.testing.assert_close(merged, tokenops.merge(x, token_map))
        torch.testing.assert_close(weighted, expected)
        torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(back, tokenops.unmerge(tokenops.merge(x, token_map), token_map))


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_attention_recipes_are_what_tokenops_computes(eps):
    shape = AttentionShape(2, 3, 35, 8, weights="hard", keep=0.4, eps=eps)
    q, k, v = make_heads(shape, torch.float64, CPU)
    policy, size = make_weights(shape, CPU), make_weights(replace(shape, weights="size"), CPU)
    weight = make_weights(replace(shape, weights="columns"), CPU)
    # The recipe computes its map in float32.
    own = torch.eye(35)
    out = rivals.attention_with_policy(q, k, v, policy, own, eps)
    expected = tokenops.policy_attention(q, k, v, policy, eps=eps)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out = rivals.attention_with_size(q, k, v, size.double())
    torch.testing.assert_close(out, tokenops.policy_attention(q, k, v, size=size.double()))
    biased = torch.nn.functional.scaled_dot_product_attention
    mask = rivals.log_size(size.double())
    torch.testing.assert_close(out, biased(q, k, v, attn_mask=mask.expand(2, 3, 35, 35)))
    expected = tokenops.policy_attention(q, k, v, policy)
    mask = rivals.log_policy(policy.double(), own.bool())
    torch.testing.assert_close(biased(q, k, v, attn_mask=mask), expected, rtol=1e-4, atol=1e-4)
    expected = tokenops.attention_scores(q, k, query_weight=weight.double())
    torch.testing.assert_close(rivals.attention_received(q, k, weight), expected)
    for rows in (1, 3):
        for key_heads in (1, 3):
            keys = k[:, :key_heads]
            expected = tokenops.attention_scores(q, keys, query_index=range(4, 4 + rows))
            out = rivals.attention_of_rows(q[:, :, 4 : 4 + rows], keys)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", select(["attention_scores"]), ids=lambda c: c.name)
def test_rows_are_timed_against_these_rows_alone(case):
    """A rival computes a map of all queries only if all queries take part."""
    work = case.tiny().prepare(torch.float32, CPU)
    seen = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with torch.inference_mode(), Shapes():
        work.make("eager")()
    shape = case.tiny().shape
    whole = shape.batch * shape.heads * shape.tokens**2
    counts_all = shape.weights == "columns"
    assert (max(seen) >= whole) == counts_all
    assert ("sdpa" in work.rivals) == counts_all


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.35])
def test_hard_policies_keep_their_share_and_the_class_token(keep):
    shape = AttentionShape(4, 1, 197, 8, weights="hard", keep=keep)
    policy = make_weights(shape, CPU)
    assert policy.sum(1).tolist() == [shape.kept] * 4
    assert shape.kept == round(197 * keep)
    assert (policy[:, 0] == 1).all()
    assert not torch.equal(policy[0], policy[1])


def test_packed_heads_are_views_of_the_same_numbers():
    shape = AttentionShape(2, 3, 5, 8)
    plain, packed = (make_heads(replace(shape, packed=p), torch.float32, CPU) for p in (0, 1))
    for a, b in zip(plain, packed, strict=True):
        assert a.is_contiguous()
        assert b.shape == (2, 3, 5, 8)
        assert b.stride() == (5 * 3 * 3 * 8, 8, 3 * 3 * 8, 1)
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["vit-b", "vit-b-packed", "vit-b-keep50-none", "vit-b-size"])
def test_a_step_has_the_gradients_that_the_models_need(name):
    case = find("policy_attention_forward_backward", name).tiny()
    work = case.prepare(torch.float32, CPU)
    learned = case.shape.weights != "size" and case.shape.policy_grad == "exact"
    for rival in ("tokenops", "eager", "sdpa+bias", "sdpa", "unweighted"):
        results = work.make(rival)()
        weighted = rival not in ("sdpa", "unweighted")
        assert len(results) == 4 + (learned and weighted)
        assert all(t.isfinite().all() for t in results)
        assert all(t.abs().max() > 0 for t in results)


def test_a_wrong_policy_gradient_is_noticed():
    work = find("policy_attention_forward_backward", "vit-b-keep50").tiny()
    work = work.prepare(torch.float32, CPU)
    right = work.make("tokenops")()
    wrong = (*right[:-1], right[-1] * (right[-1] > 0))
    assert work.difference("eager", right, right) == 0
    assert work.difference("eager", wrong, right) > work.tolerance


def test_a_worse_matching_is_noticed():
    case = find("match", "vit-b").tiny()
    metric = make_metric(case.shape, torch.float32, CPU)
    work = case.prepare(torch.float32, CPU)
    best = work.make("tokenops")()
    arbitrary = rivals.match(torch.randn_like(metric), case.shape.r, True)
    assert work.difference("eager", arbitrary, best) > work.tolerance
    assert mean_similarity(metric, case.shape, best) <= 1


def test_relative_refuses_other_shapes():
    with pytest.raises(ValueError, match="shapes differ"):
        relative(torch.zeros(2, 1), torch.zeros(1, 2))


def test_packed_keys_are_a_view():
    metric = make_metric(Shape(2, 16, 8, 4, heads=3), torch.float32, CPU)
    assert metric.shape == (2, 3, 16, 8)
    assert not metric.is_contiguous()


def test_recipes_whose_launches_are_counted_run():
    for name, call in host.recipes(CPU).items():
        result = call()
        assert isinstance(result, (torch.Tensor, tuple)), name
