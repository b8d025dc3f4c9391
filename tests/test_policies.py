# SPDX-License-Identifier: Apache-2.0
"""prune, gumbel_keep, topk_keep and keep_ratio_loss, against lists sorted in plain Python."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import tokenops
from tokenops.testing import as_layout, assert_valid_token_map, random_tokens

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kept_by_score(scores, keep, num_prefix):
    """Kept tokens outside the prefix, best first; NaN ranks last, ties go to the lowest index."""
    ranking = sorted(
        range(num_prefix, len(scores)),
        key=lambda n: (math.isnan(scores[n]), 0.0 if math.isnan(scores[n]) else -scores[n], n),
    )
    return ranking[: max(0, min(keep, len(ranking)))]


def groups_of(scores, keep, num_prefix, order, fuse):
    """Members of each output token of one image."""
    kept = kept_by_score(scores, keep, num_prefix)
    kept = kept if order == "score" else sorted(kept)
    groups = [[n] for n in range(num_prefix)] + [[n] for n in kept]
    dropped = [n for n in range(num_prefix, len(scores)) if n not in kept]
    return [*groups, dropped] if fuse and dropped else groups


def groups_in(token_map):
    """Members of each output token of a map: of live tokens, and of the padding."""
    live, padding = [], []
    for b, starts in enumerate(token_map.offsets.tolist()):
        members = token_map.members[b].tolist()
        groups = [members[i:j] for i, j in itertools.pairwise(starts)]
        count = len(groups) if token_map.counts is None else int(token_map.counts[b])
        live.append(groups[:count])
        padding.append(groups[count:])
    return live, padding


def check_prune(scores, keep, **options):
    """Compare ``prune`` with the lists, for an int and for a tensor with a number per image."""
    token_map = tokenops.prune(scores, keep, **options)
    numbers = keep.tolist() if isinstance(keep, torch.Tensor) else [keep] * len(scores)
    full = {"num_prefix": 0, "order": "position", "fuse": False, **options}
    expected = [
        groups_of(image, number, **full)
        for image, number in zip(scores.tolist(), numbers, strict=True)
    ]
    assert_valid_token_map(token_map)
    live, padding = groups_in(token_map)
    assert live == expected
    assert all(group == [] for image in padding for group in image)
    if isinstance(keep, torch.Tensor):
        assert token_map.num_tokens == scores.shape[1]
        assert token_map.counts.tolist() == [len(image) for image in expected]
    else:
        assert token_map.counts is None
        assert all(len(image) == token_map.num_tokens for image in expected)
    return token_map


# ---- prune ----

#: Few different values, so that ties, zeros of both signs and NaN are common.
VALUES = st.sampled_from([-INF, -2.0, -0.0, 0.0, 1.0, 3.5, INF, NAN])


@given(st.data())
def test_prune_keeps_the_best(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    row = st.lists(VALUES, min_size=tokens, max_size=tokens)
    scores = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    scores = scores.view(batch, tokens)
    number = st.integers(0, tokens + 2)
    keep = data.draw(st.one_of(number, st.lists(number, min_size=batch, max_size=batch)))
    if isinstance(keep, list):
        keep = torch.tensor(keep, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    check_prune(
        scores,
        keep,
        num_prefix=data.draw(st.integers(0, tokens)),
        order=data.draw(st.sampled_from(["position", "score"])),
        fuse=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("order", ["position", "score"])
def test_prune_of_many_tokens(dtype, order, fuse):
    """Half precision has many ties; long rows use other sort algorithms."""
    scores = random_tokens(2, 1, 1501, dtype=dtype)[:, 0]
    scores[:, ::97] = NAN
    check_prune(scores, 777, num_prefix=5, order=order, fuse=fuse)
    check_prune(scores, torch.tensor([3, 1490]), num_prefix=5, order=order, fuse=fuse)


def test_nan_of_either_sign_ranks_last():
    negative = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    assert negative.isnan()
    assert math.copysign(1, negative.item()) < 0
    for nan in (negative.item(), NAN):
        scores = torch.tensor([[nan, -INF, 0.0, nan]])
        assert tokenops.prune(scores, 2, order="score").assign.tolist() == [[-1, 1, 0, -1]]


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_prune_takes_any_strides(layout):
    check_prune(as_layout(random_tokens(1, 3, 17), layout)[0], 6, num_prefix=1)


@pytest.mark.parametrize("keep", [0, 2, 100])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (2, 3)])
def test_prune_of_next_to_nothing(shape, keep):
    scores = torch.randn(shape)
    for num_prefix in {0, shape[1]}:
        for fuse in (False, True):
            check_prune(scores, keep, num_prefix=num_prefix, fuse=fuse)
            check_prune(scores, torch.full(shape[:1], keep), num_prefix=num_prefix, fuse=fuse)


def test_dropping_nothing_in_order_of_position_is_the_identity():
    for fuse in (False, True):
        token_map = tokenops.prune(torch.randn(2, 7), 9, num_prefix=2, fuse=fuse)
        assert token_map.assign.tolist() == [list(range(7))] * 2


def test_merging_gathers_and_unmerging_scatters(backend, device):
    scores, x = torch.randn(3, 19, device=device), torch.randn(3, 19, 5, device=device)
    for order in ("position", "score"):
        token_map = tokenops.prune(scores, 8, num_prefix=2, order=order)
        kept = [
            [0, 1, *(k if order == "score" else sorted(k))]
            for k in (kept_by_score(image, 8, 2) for image in scores.tolist())
        ]
        index = torch.tensor(kept, device=device)[..., None].expand(-1, -1, 5)
        gathered = x.gather(1, index)
        for reduce in ("sum", "mean", "amax"):
            assert torch.equal(tokenops.merge(x, token_map, reduce=reduce), gathered)
        back = torch.zeros_like(x).scatter(1, index, gathered)
        assert torch.equal(tokenops.unmerge(gathered, token_map), back)


def test_merging_gathers_where_counts_differ(backend, device):
    scores, x = torch.randn(3, 9, device=device), torch.randn(3, 9, 4, device=device)
    keep = torch.tensor([0, 3, 8], device=device)
    token_map = tokenops.prune(scores, keep, num_prefix=1)
    out = token_map.merge(x)
    mask = token_map.key_mask()
    assert mask.sum(1).tolist() == [1, 4, 9]
    assert (out[~mask] == 0).all()
    for b, image in enumerate(scores.tolist()):
        kept = [0, *sorted(kept_by_score(image, int(keep[b]), 1))]
        assert torch.equal(out[b, : len(kept)], x[b, kept])


def test_the_fused_token_is_a_weighted_sum(backend, device):
    scores = torch.rand(2, 11, dtype=torch.float64, device=device).requires_grad_()
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True, device=device)
    token_map = tokenops.prune(scores, 4, num_prefix=1, fuse=True)

    def fused(x, scores):
        dropped = token_map.assign == token_map.num_tokens - 1
        weight = torch.where(dropped, scores, 1)
        return tokenops.merge(x, token_map, reduce="sum", weight=weight)

    out = fused(x, scores)
    for b, image in enumerate(scores.tolist()):
        kept = sorted(kept_by_score(image, 4, 1))
        dropped = [n for n in range(1, 11) if n not in kept]
        expected = [x[b, n] for n in [0, *kept]] + [sum(scores[b, n] * x[b, n] for n in dropped)]
        torch.testing.assert_close(out[b], torch.stack(expected))
    assert torch.autograd.gradcheck(fused, (x, scores))


def test_pruning_twice_composes():
    scores, x = torch.randn(2, 12), torch.randn(2, 12, 3)
    first = tokenops.prune(scores, 7, num_prefix=1)
    then = first.merge(scores[..., None])[..., 0]
    second = tokenops.prune(then, 3, num_prefix=1)
    at_once = tokenops.prune(scores, 3, num_prefix=1)
    assert torch.equal(second.compose(first).assign, at_once.assign)
    assert torch.equal(second.merge(first.merge(x)), at_once.merge(x))


def test_scores_get_no_gradient_from_indices():
    scores = torch.randn(2, 6, requires_grad=True)
    token_map = tokenops.prune(scores, 3)
    assert not any(t.requires_grad for t in (token_map.assign, token_map.members))


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert tokenops.prune(torch.randn(1, 5), numpy.int64(2)).num_tokens == 2


# ---- keep decisions ----


def test_the_same_draws_as_gumbel_softmax():
    logits = torch.randn(3, 41, 2)
    cotangent = torch.randn(3, 41, 1)
    for hard in (True, False):
        results = []
        for own in (False, True):
            torch.manual_seed(3)
            leaf = logits.clone().requires_grad_()
            if own:
                keep = tokenops.gumbel_keep(leaf, tau=0.7, hard=hard)
            else:
                both = torch.nn.functional.gumbel_softmax(leaf, tau=0.7, hard=hard)
                keep = both[..., :1]
            results.append((keep.detach(), *torch.autograd.grad(keep, leaf, cotangent)))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_decisions_or_none(use_reentrant):
    """Checkpointing restores default generators; a draw from another generator is an error."""
    logits = torch.randn(2, 9, 2)

    def run(layer):
        leaf = logits.clone().requires_grad_()
        torch.manual_seed(0)
        (layer(leaf) ** 2).sum().backward()
        return leaf.grad

    expected = run(lambda x: tokenops.gumbel_keep(x, hard=False))
    got = run(
        lambda x: checkpoint(
            lambda y: tokenops.gumbel_keep(y, hard=False), x, use_reentrant=use_reentrant
        )
    )
    assert torch.equal(got, expected)
    own = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="generator must be None or a default generator"):
        run(
            lambda x: checkpoint(
                lambda y: tokenops.gumbel_keep(y, generator=own), x, use_reentrant=use_reentrant
            )
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gumbel_decisions_are_exact(dtype):
    logits = (3 * torch.randn(2, 500, 2)).to(dtype)
    keep = tokenops.gumbel_keep(logits)
    assert (keep.dtype, keep.shape) == (dtype, (2, 500, 1))
    assert keep.unique().tolist() == [0, 1]


@pytest.mark.parametrize("shift", [False, True])
def test_gumbel_frequencies(shift):
    """Frequencies of 20000 draws; logits and log-probabilities are equivalent."""
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 1.5]])
    logits = logits.log_softmax(-1) if shift else logits
    share = tokenops.gumbel_keep(logits.repeat(20000, 1)[None]).view(-1, 3).mean(0)
    expected = logits.softmax(-1)[:, 0]
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt()).all()


def test_who_was_dropped_stays_dropped():
    logits, prev = torch.randn(2, 200, 2), torch.rand(2, 200, 1).round().requires_grad_()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    alone = tokenops.gumbel_keep(logits, generator=generators[0])
    keep = tokenops.gumbel_keep(logits, prev, generator=generators[1])
    assert torch.equal(keep, alone * prev)
    (grad,) = torch.autograd.grad(keep.sum(), prev)
    assert torch.equal(grad, alone)


def test_a_generator_of_ones_own():
    logits = torch.randn(2, 50, 2)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, second = (tokenops.gumbel_keep(logits, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, tokenops.gumbel_keep(logits, generator=generator.manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("prev", [False, True])
def test_gumbel_gradients(prev):
    """First and second gradients equal those of the relaxation."""
    logits = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    before = torch.rand(1, 5, 1, dtype=torch.float64).requires_grad_() if prev else None

    def relaxed(logits, before=None):
        generator = torch.Generator().manual_seed(2)
        return tokenops.gumbel_keep(logits, before, tau=0.8, hard=False, generator=generator)

    inputs = (logits, before) if prev else (logits,)
    assert torch.autograd.gradcheck(relaxed, inputs)
    assert torch.autograd.gradgradcheck(relaxed, inputs)
    soft = relaxed(logits)
    hard = tokenops.gumbel_keep(logits, tau=0.8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(hard, (soft >= 0.5).double())
    slope = (soft * (1 - soft) / 0.8).detach()
    (grad,) = torch.autograd.grad(hard.sum(), logits)
    torch.testing.assert_close(grad, torch.cat([slope, -slope], dim=-1))


@pytest.mark.parametrize("noise", [0.0, 1e-45, 104.0])
def test_extreme_noise_and_logits_stay_finite(monkeypatch, noise):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda t, generator=None: t.fill_(noise))
    logits = torch.tensor([[[1.0, 0.0], [-INF, 0.0], [0.0, -INF], [-3e38, 3e38]]])
    logits.requires_grad_()
    for hard in (True, False):
        keep = tokenops.gumbel_keep(logits, hard=hard, tau=0.5)
        assert keep[0, 1:].flatten().tolist() == [0, 1, 0]
        (grad,) = torch.autograd.grad(keep.sum(), logits)
        assert grad.isfinite().all()


@given(st.data())
def test_topk_decides_as_prune_does(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 10))
    row = st.lists(VALUES, min_size=tokens, max_size=tokens)
    scores = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)))
    scores = scores.view(batch, tokens).requires_grad_()
    k = data.draw(st.one_of(st.integers(0, tokens + 1), st.none()))
    k = torch.arange(batch) if k is None else k
    num_prefix = data.draw(st.integers(0, tokens))
    decision = tokenops.topk_keep(scores, k, num_prefix=num_prefix)
    kept = tokenops.prune(scores, k, num_prefix=num_prefix).assign >= 0
    assert torch.equal(decision, kept[..., None].float())
    cotangent = torch.randn(decision.shape)
    (grad,) = torch.autograd.grad(decision, scores, cotangent)
    expected = torch.where(scores.isfinite(), cotangent[..., 0], 0)
    expected[:, :num_prefix] = 0
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_keeps_the_dtype(dtype):
    decision = tokenops.topk_keep(torch.randn(2, 9).to(dtype), 3)
    assert decision.dtype == dtype
    assert decision.sum(1).flatten().tolist() == [3, 3]


# ---- the loss ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_image", [True, False])
def test_ratio_loss(per_image, dtype):
    decisions = [torch.rand(3, n, 1).round().to(dtype) for n in (8, 5)] + [torch.ones(3, 4).half()]
    ratios = [0.75, 0.5, 0.25]
    expected = 0.0
    for decision, ratio in zip(decisions, ratios, strict=True):
        shares = [sum(image) / len(image) for image in decision.flatten(1).tolist()]
        shares = shares if per_image else [sum(shares) / len(shares)]
        expected += sum((share - ratio) ** 2 for share in shares) / len(shares) / len(ratios)
    loss = tokenops.keep_ratio_loss(decisions, tuple(ratios), per_image=per_image)
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("per_image", [True, False])
def test_ratio_loss_gradients(per_image):
    decisions = [torch.rand(2, n, dtype=torch.float64).requires_grad_() for n in (3, 5)]

    def loss(*decisions):
        return tokenops.keep_ratio_loss(decisions, 0.3, per_image=per_image)

    assert torch.autograd.gradcheck(loss, decisions)
    assert torch.autograd.gradgradcheck(loss, decisions)


def test_ratio_loss_of_one_stage_is_that_of_a_list_of_one():
    decision = torch.rand(3, 7, 1)
    alone = tokenops.keep_ratio_loss(decision, 0.5)
    assert alone == tokenops.keep_ratio_loss([decision], [0.5])
    assert alone == tokenops.keep_ratio_loss(decision[..., 0], (0.5,))


def test_ratio_loss_counts_in_single_precision():
    """A sum in half precision would lose a token in 4096."""
    decision = torch.ones(1, 4096, dtype=torch.bfloat16)
    decision[0, 0] = 0
    assert tokenops.keep_ratio_loss(decision, 1.0).item() == pytest.approx(4096**-2, rel=1e-3)


def test_ratio_loss_of_nothing_is_a_number():
    assert tokenops.keep_ratio_loss(torch.zeros(0, 4, 1), 0.5).item() == 0
    assert tokenops.keep_ratio_loss(torch.zeros(2, 0), 0.5).item() == 0.25


# ---- compilers and transforms ----


def everything(scores, logits, keep):
    token_map = tokenops.prune(scores, 4, num_prefix=1, fuse=True)
    some = tokenops.prune(scores, scores.shape[1] // 2, order="score")
    ragged = tokenops.prune(scores, keep, num_prefix=1, fuse=True)
    decision = tokenops.topk_keep(scores, 4, num_prefix=1)
    soft = tokenops.gumbel_keep(logits, decision)
    loss = tokenops.keep_ratio_loss([decision, soft[..., 0]], [0.5, 0.25])
    return token_map.assign, some.members, ragged.assign, ragged.counts, decision, soft, loss


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, tokens in ((2, 12), (3, 17)) if dynamic else ((2, 12),):
        inputs = torch.randn(batch, tokens), torch.randn(batch, tokens, 2), torch.arange(batch)
        results, grads = [], []
        for function in (compiled, everything):
            torch.manual_seed(1)
            scores = inputs[0].clone().requires_grad_()
            results.append(function(scores, *inputs[1:]))
            grads.append(torch.autograd.grad(results[-1][-1], scores))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*grads)


def test_no_value_is_needed():
    """Without values (fake tensors) no check reads one; numbers of tokens to keep are clamped."""
    scores = torch.empty(2, 9, device="meta")
    shapes = [
        tuple(t.shape)
        for t in everything(
            scores,
            scores[..., None].expand(-1, -1, 2),
            torch.empty(2, dtype=torch.int32, device="meta"),
        )
    ]
    assert shapes == [(2, 9), (2, 9), (2, 9), (2,), (2, 9, 1), (2, 9, 1), ()]
    compiled = torch.compile(tokenops.prune, fullgraph=True, backend="aot_eager")
    token_map = compiled(torch.randn(2, 9), torch.tensor([-(2**40), 2**40]), num_prefix=1)
    assert token_map.counts.tolist() == [1, 9]
    assert_valid_token_map(token_map)


def test_exports_with_dynamic_shapes():
    class Module(torch.nn.Module):
        def forward(self, scores, x):
            token_map = tokenops.prune(scores, 4, num_prefix=1, fuse=True)
            return token_map.merge(x, weight=tokenops.topk_keep(scores, 4)) + 1

    inputs = torch.randn(2, 12), torch.randn(2, 12, 3)
    shape = {0: torch.export.Dim("images"), 1: torch.export.Dim("tokens", min=8, max=1024)}
    program = torch.export.export(Module(), inputs, dynamic_shapes=(shape, shape))
    again = torch.randn(5, 31), torch.randn(5, 31, 3)
    torch.testing.assert_close(program.module()(*again), Module()(*again))


def test_vectorizes():
    scores, keep = torch.randn(3, 2, 8), torch.tensor([[0, 3], [8, 1], [2, 2]])

    def assign(scores, keep):
        return tokenops.prune(scores, keep, num_prefix=1, fuse=True).assign

    expected = torch.stack([assign(s, k) for s, k in zip(scores, keep, strict=True)])
    assert torch.equal(torch.vmap(assign)(scores, keep), expected)
    grads = torch.vmap(torch.func.grad(lambda s: (tokenops.topk_keep(s, 3) * 2).sum()))(scores)
    assert torch.equal(grads, torch.full_like(scores, 2))
    draws = torch.vmap(tokenops.gumbel_keep, randomness="different")(torch.zeros(4, 2, 50, 2))
    assert not torch.equal(draws[0], draws[1])


# ---- errors ----

SCORES, LOGITS, STAGE = torch.zeros(2, 6), torch.zeros(2, 6, 2), torch.zeros(2, 6, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tokenops.prune(SCORES.int(), 2), TypeError, "prune: scores must be a floating"),
        (lambda: tokenops.prune(SCORES[0], 2), ValueError, "prune: scores must be 2-D"),
        (lambda: tokenops.prune(STAGE, 2), ValueError, "prune: scores must be 2-D"),
        (lambda: tokenops.prune(SCORES, 2.0), TypeError, "prune: keep must be an int"),
        (lambda: tokenops.prune(SCORES, True), TypeError, "prune: keep must be an int"),
        (lambda: tokenops.prune(SCORES, -1), ValueError, "prune: keep must be >= 0"),
        (lambda: tokenops.prune(SCORES, torch.ones(2)), TypeError, "int32 or int64"),
        (lambda: tokenops.prune(SCORES, torch.ones(3).int()), ValueError, r"of shape \[2\]"),
        (lambda: tokenops.prune(SCORES, torch.ones(2, 1).int()), ValueError, "keep must be 1-D"),
        (lambda: tokenops.prune(SCORES, torch.tensor(3.0)), TypeError, "keep must be an int"),
        (lambda: tokenops.prune(SCORES, torch.tensor([3, -1])), ValueError, "got a minimum of -1"),
        (lambda: tokenops.prune(SCORES, 2, num_prefix=7), ValueError, "num_prefix must be at most"),
        (lambda: tokenops.prune(SCORES, 2, num_prefix=-1), ValueError, "num_prefix must be >= 0"),
        (lambda: tokenops.prune(SCORES, 2, order="tome"), ValueError, "'position', 'score'"),
        (lambda: tokenops.gumbel_keep(SCORES), ValueError, "logits must be 3-D"),
        (lambda: tokenops.gumbel_keep(STAGE), ValueError, r"logits must be of shape \[2, 6, 2\]"),
        (lambda: tokenops.gumbel_keep(LOGITS.int()), TypeError, "logits must be a floating"),
        (lambda: tokenops.gumbel_keep(LOGITS, LOGITS), ValueError, r"prev .* \[2, 6, 1\]"),
        (lambda: tokenops.gumbel_keep(LOGITS, STAGE.bool()), TypeError, "prev must be a floating"),
        (lambda: tokenops.gumbel_keep(LOGITS, tau=0), ValueError, "tau must be above 0"),
        (lambda: tokenops.gumbel_keep(LOGITS, tau=NAN), ValueError, "tau must be finite"),
        (lambda: tokenops.gumbel_keep(LOGITS, tau="1"), TypeError, "tau must be a float"),
        (lambda: tokenops.gumbel_keep(LOGITS, generator=3), TypeError, "generator must be"),
        (lambda: tokenops.topk_keep(SCORES, 1.5), TypeError, "topk_keep: k must be an int"),
        (lambda: tokenops.topk_keep(SCORES, -1), ValueError, "topk_keep: k must be >= 0"),
        (lambda: tokenops.topk_keep(STAGE, 1), ValueError, "topk_keep: scores must be 2-D"),
        (lambda: tokenops.keep_ratio_loss([], 0.5), ValueError, "at least one stage"),
        (lambda: tokenops.keep_ratio_loss(3, 0.5), TypeError, "a tensor or a sequence"),
        (lambda: tokenops.keep_ratio_loss([STAGE], [0.5, 0.5]), ValueError, "each of 1 stages"),
        (lambda: tokenops.keep_ratio_loss(STAGE, 1.5), ValueError, r"ratios must be in \[0, 1\]"),
        (lambda: tokenops.keep_ratio_loss(STAGE, "a"), ValueError, "ratios must be a number"),
        (lambda: tokenops.keep_ratio_loss(STAGE, [None]), TypeError, "ratios must be a float"),
        (lambda: tokenops.keep_ratio_loss(STAGE.bool(), 0.5), TypeError, "decisions must be"),
        (lambda: tokenops.keep_ratio_loss(LOGITS, 0.5), ValueError, r"of shape \[2, 6, 1\]"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
