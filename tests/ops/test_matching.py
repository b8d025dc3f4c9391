# SPDX-License-Identifier: Apache-2.0
"""match and nearest: the right pairs, in the right order, on every backend, dtype and layout.

If the similarities of a metric are exact in every dtype, indices must equal those of Python loops.
For any other metric, tests bound the regret: the loss of similarity against the best choice.
"""

import math

import brute_force
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenops
from tokenops import TokenMap
from tokenops._library import references
from tokenops.ops.matching.arguments import Request, SplitArgs
from tokenops.testing import (
    LAYOUTS,
    as_layout,
    assert_same_bits,
    assert_valid_token_map,
    assert_within_error_budget,
    exact_metric,
    matching_regret,
    nearest_regret,
    random_tokens,
    similarity_rounding,
    stride_zero,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIMILARITIES = ("cosine", "dot")
ORDERS = ("position", "tome")


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def brute_match(metric, r, indices, **options):
    """Assign [B][N] and live tokens [B] by loops; ``indices`` are [B][Ns] and [B][Nd]."""
    images = zip(brute_force.mean_over_heads(metric), *indices, strict=True)
    return [brute_force.match_image(rows, r, s, d, **options) for rows, s, d in images]


def strided_indices(batch, tokens, k=2):
    destinations = [n for n in range(tokens) if n % k == k - 1]
    sources = [n for n in range(tokens) if n % k != k - 1]
    return [sources] * batch, [destinations] * batch


# ---- nearest ----


@pytest.mark.isa
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest(dtype, layout, heads, similarity, backend, device):
    """Values and gradients, within the error of plain PyTorch in the same dtype."""
    lead = (2,) if heads is None else (2, heads)
    a = random_tokens(*lead, 23, 24, dtype=dtype, device=device, layout=layout, seed=1)
    b = random_tokens(*lead, 40, 24, dtype=dtype, device=device, layout=layout, seed=2)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)).to(device) < 0.8
    score, index = tokenops.nearest(a, b, similarity=similarity, b_mask=mask)
    assert (score.dtype, index.dtype) == (acc(dtype), torch.int32)
    regret = nearest_regret(a, b, index, similarity=similarity, b_mask=mask)
    both = torch.cat([a, b], dim=-2)
    assert (regret <= similarity_rounding(both, similarity)).all()
    assert mask.gather(1, index.long()).all()

    def at_index(a, b):
        """Similarity of the chosen pairs in plain PyTorch, differentiable by autograd."""
        a, b = (x.mean(1) if x.dim() == 4 else x for x in (a.to(acc(a.dtype)), b.to(acc(b.dtype))))
        b = b.gather(1, index.long()[..., None].expand(-1, -1, b.shape[2]))
        if similarity == "cosine":
            a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
        return (a * b).sum(-1)

    def run(function, *values):
        leaves = [v.detach().requires_grad_() for v in values]
        out = function(*leaves)
        weights = random_tokens(*out.shape, 1, dtype=out.dtype, device=device, seed=4)[..., 0]
        return [out.detach(), *torch.autograd.grad(out, leaves, weights)]

    got = run(lambda *x: tokenops.nearest(*x, similarity=similarity, b_mask=mask)[0], a, b)
    plain = run(at_index, a, b)
    truth = run(at_index, a.double(), b.double())
    # Bound of the sum of absolute values of the products that a score adds up.
    lengths = [
        (x.mean(1) if x.dim() == 4 else x).norm(dim=-1).max() for x in (a.double(), b.double())
    ]
    terms = 1.0 if similarity == "cosine" else (lengths[0] * lengths[1]).item()
    results = zip(got, plain, truth, strict=True)
    assert_within_error_budget(*next(results), magnitude=terms, name="score")
    for name, values in zip("ab", results, strict=True):
        assert_within_error_budget(*values, name=f"gradient of {name}")


@pytest.mark.isa
@given(
    similarity=st.sampled_from(SIMILARITIES),
    batch=st.integers(0, 3),
    rows=st.integers(0, 30),
    columns=st.integers(0, 40),
    width=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([None, 1, 2, 4]),
    zero_rows=st.sampled_from([0.0, 0.2]),
    nan_rows=st.sampled_from([0.0, 0.2, 0.8]),
    masks=st.tuples(st.sampled_from([None, 0.0, 0.5]), st.sampled_from([None, 0.0, 0.2, 0.5])),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([x for x in LAYOUTS if x != "expanded"]),
    seed=st.integers(0, 1000),
)
def test_nearest_exactly(
    backend, device, similarity, batch, rows, columns, width, heads, zero_rows, nan_rows, masks,
    dtype, layout, seed,
):  # fmt: skip
    """Ties, NaN, tokens of length zero, masks: indices equal those of the loops."""
    lead = (batch,) if heads is None else (batch, heads)
    a, b = (
        as_layout(
            exact_metric(
                *lead, count, width, similarity=similarity, dtype=dtype, device=device,
                zero_rows=zero_rows, nan_rows=nan_rows, seed=seed + i,
            ),
            layout,
        )
        for i, count in enumerate((rows, columns))
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    a_mask, b_mask = (
        None
        if share is None
        else (torch.rand(batch, count, generator=generator) < share).to(device)
        for share, count in zip(masks, (rows, columns), strict=True)
    )
    score, index = tokenops.nearest(a, b, similarity=similarity, a_mask=a_mask, b_mask=b_mask)
    images = zip(
        brute_force.mean_over_heads(a),
        brute_force.mean_over_heads(b),
        [None] * batch if a_mask is None else a_mask.tolist(),
        [None] * batch if b_mask is None else b_mask.tolist(),
        strict=True,
    )
    expected = [brute_force.nearest_image(*image, similarity) for image in images]
    assert index.tolist() == [i for _, i in expected]
    for got, (wanted, _) in zip(score.tolist(), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("heads", [None, 2])
def test_nearest_gradcheck(heads, similarity, backend, device):
    lead = (2,) if heads is None else (2, heads)
    a = random_tokens(*lead, 4, 3, dtype=torch.float64, device=device, seed=5).requires_grad_()
    b = random_tokens(*lead, 5, 3, dtype=torch.float64, device=device, seed=6).requires_grad_()
    mask = torch.tensor([[True, False, True, True], [True] * 4], device=device)

    def call(a, b):
        score, _ = tokenops.nearest(a, b, similarity=similarity, a_mask=mask)
        return score[mask]

    assert torch.autograd.gradcheck(call, (a, b))
    assert torch.autograd.gradgradcheck(call, (a, b))


def test_nearest_gradient_where_nothing_is_chosen(backend, device):
    """Rows without a candidate, and tokens of length zero, have a gradient of 0, not NaN."""
    a = random_tokens(2, 5, 4, device=device)
    b = random_tokens(2, 3, 4, device=device, seed=1)
    a[0, 1] = 0
    b[0, 2] = 0
    a_mask = torch.tensor([[True] * 5, [False] * 5], device=device)
    b_mask = torch.tensor([[True] * 3, [True] * 3], device=device)
    a.requires_grad_(), b.requires_grad_()
    score, index = tokenops.nearest(a, b, a_mask=a_mask, b_mask=b_mask)
    assert index[1].tolist() == [-1] * 5
    gradients = torch.autograd.grad(score, (a, b), stride_zero(score))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][1] == 0).all()
    assert (gradients[1][1] == 0).all()


def test_nearest_of_only_nan(backend, device):
    a, b = torch.full((1, 2, 4), math.nan, device=device), random_tokens(1, 3, 4, device=device)
    b_mask = torch.tensor([[False, True, True]], device=device)
    score, index = tokenops.nearest(a, b, b_mask=b_mask)
    assert score.tolist() == [[-math.inf, -math.inf]]
    assert index.tolist() == [[1, 1]]


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_nan_rows_spoil_no_other_gradient(similarity, backend, device):
    a, b = random_tokens(1, 6, 4, device=device), random_tokens(1, 5, 4, device=device, seed=1)
    a[0, 1], a[0, 3, 2], b[0, 2], b[0, 4, 0] = math.nan, math.nan, math.nan, math.nan
    fine = torch.tensor([0, 2, 4, 5], device=device), torch.tensor([0, 1, 3], device=device)

    def gradients(a, b):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        score, _ = tokenops.nearest(a, b, similarity=similarity)
        return torch.autograd.grad(torch.where(score.isfinite(), score, 0).sum(), (a, b))

    dirty, clean = gradients(a, b), gradients(a[:, fine[0]], b[:, fine[1]])
    for got, expected, rows in zip(dirty, clean, fine, strict=True):
        torch.testing.assert_close(got[:, rows], expected)


# ---- match: exact inputs, against loops ----


@pytest.mark.isa
@given(
    similarity=st.sampled_from(SIMILARITIES),
    order=st.sampled_from(ORDERS),
    batch=st.integers(0, 3),
    tokens=st.integers(0, 40),
    width=st.sampled_from([1, 4, 16]),
    heads=st.sampled_from([None, None, 1, 2]),
    k=st.integers(1, 5),
    prefix=st.integers(0, 4),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    threshold=st.sampled_from([None, None, -math.inf, -0.5, 0.0, 0.5, 1.0, math.inf]),
    zero_rows=st.sampled_from([0.0, 0.2]),
    nan_rows=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([x for x in LAYOUTS if x != "expanded"]),
    seed=st.integers(0, 1000),
)
def test_match_exactly(
    backend, device, similarity, order, batch, tokens, width, heads, k, prefix, share, threshold,
    zero_rows, nan_rows, dtype, layout, seed,
):  # fmt: skip
    lead = (batch,) if heads is None else (batch, heads)
    metric = exact_metric(
        *lead, tokens, width, similarity=similarity, dtype=dtype, device=device,
        zero_rows=zero_rows, nan_rows=nan_rows, seed=seed,
    )  # fmt: skip
    metric = as_layout(metric, layout)
    prefix = min(prefix, tokens)
    indices = strided_indices(batch, tokens, k)
    mergeable = sum(n >= prefix and n % k != k - 1 for n in range(tokens))
    if not any(n >= prefix and n % k == k - 1 for n in range(tokens)):
        mergeable = 0
    r = math.ceil(share * tokens)
    token_map = tokenops.match(
        metric, r, num_prefix=prefix, split=tokenops.strided(k), threshold=threshold,
        order=order, similarity=similarity,
    )  # fmt: skip
    r = min(r, mergeable)
    expected = brute_match(
        metric, r, indices, prefix=prefix, threshold=threshold, order=order, kind=similarity
    )
    assert token_map.assign.tolist() == [assign for assign, _ in expected]
    outputs = tokens if threshold is not None else tokens - r
    assert_valid_token_map(token_map, num_tokens=outputs, partition=True)
    if threshold is None:
        assert token_map.counts is None
        assert all(live == outputs for _, live in expected)
    else:
        assert token_map.counts.tolist() == [live for _, live in expected]


@st.composite
def splits_by_hand(draw):
    """Disjoint sources and destinations in any order, shared by all images or one list each."""
    tokens = draw(st.integers(1, 24))
    prefix = draw(st.integers(0, min(3, tokens)))
    batch = draw(st.integers(1, 3))
    sources = draw(st.integers(0, tokens - prefix))
    destinations = draw(st.integers(0, tokens - prefix - sources))
    shared = draw(st.booleans())
    rows = [draw(st.permutations(range(prefix, tokens))) for _ in range(1 if shared else batch)]
    sides = (
        [row[:sources] for row in rows],
        [row[sources : sources + destinations] for row in rows],
    )
    return batch, tokens, prefix, shared, sides


@pytest.mark.isa
@given(
    split=splits_by_hand(),
    similarity=st.sampled_from(SIMILARITIES),
    order=st.sampled_from(ORDERS),
    protect=st.sampled_from([None, "shared", "each"]),
    share=st.sampled_from([0.3, 1.0]),
    threshold=st.sampled_from([None, None, -math.inf, 0.0]),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 1000),
)
def test_match_with_protected_tokens_and_given_indices(
    backend, device, split, similarity, order, protect, share, threshold, index_dtype, seed
):
    batch, tokens, prefix, shared, sides = split
    kinds = {"similarity": similarity, "nan_rows": 0.1, "seed": seed}
    metric = exact_metric(batch, tokens, 4, device=device, **kinds)
    mask = None
    if protect is not None:
        shape = (tokens,) if protect == "shared" else (batch, tokens)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device) < 0.3
    pair = tuple(torch.tensor(side, dtype=index_dtype, device=device) for side in sides)
    if shared:
        pair = pair[0][0], pair[1][0]
        sides = [side * batch for side in sides]
    protected = [[]] * batch
    if mask is not None:
        rows = mask.expand(batch, tokens).tolist()
        protected = [[n for n in range(tokens) if row[n]] for row in rows]
    free = [
        len(set(s) - set(p)) if set(d) - set(p) else 0
        for s, d, p in zip(*sides, protected, strict=True)
    ]
    r = math.ceil(share * (min(free) if threshold is None else tokens))
    token_map = tokenops.match(
        metric, r, num_prefix=prefix, protected=mask, split=pair, threshold=threshold,
        order=order, similarity=similarity,
    )  # fmt: skip
    r = min(r, len(sides[0][0])) if sides[1][0] else 0
    options = {"prefix": prefix, "threshold": threshold, "order": order, "kind": similarity}
    expected = [
        brute_force.match_image(rows, r, s, d, protected=p, **options)
        for rows, s, d, p in zip(metric.tolist(), *sides, protected, strict=True)
    ]
    assert token_map.assign.tolist() == [assign for assign, _ in expected]
    outputs = tokens if threshold is not None else tokens - r
    assert_valid_token_map(token_map, num_tokens=outputs, partition=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("r", "prefix", "protected"),
    [(5, 0, [0, 2, 3, 5, 6]), (6, 0, range(12)), (5, 1, [2, 3, 5, 6]), (4, 3, [7, 8, 9, 10])],
    ids=str,
)
def test_protected_sources_merge_as_the_last_resort(r, prefix, protected, order):
    """The operator takes masks that the public function rejects if it can read them."""
    metric = exact_metric(2, 12, 4, seed=3)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[list(protected)] = True
    options = {"protected": protected, "prefix": prefix, "order": order, "kind": "cosine"}
    expected = brute_match(metric, r, strided_indices(2, 12), **options)
    for operator in (torch.ops.tokenops.match, references.match):
        arguments = *Request(r, order=order), *SplitArgs(prefix, mask)
        got = operator(metric, "cosine", *arguments)
        assert got[0].tolist() == [assign for assign, _ in expected]
        assert got[1].shape[1] - 1 == 12 - r


# ---- match: any input, by regret ----


@pytest.mark.isa
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_match_gives_nothing_away(dtype, layout, heads, similarity, backend, device):
    lead = (3,) if heads is None else (3, heads)
    metric = random_tokens(*lead, 197, 24, dtype=dtype, device=device, layout=layout)
    protected = torch.zeros(197, dtype=torch.bool, device=device)
    protected[::10] = True
    bound = similarity_rounding(metric, similarity)
    for options in (
        {},
        {"num_prefix": 1, "order": "tome"},
        {"protected": protected, "num_prefix": 2},
        {"split": tokenops.grid(14, 14, 2, 3), "num_prefix": 1},
        {"split": tokenops.strided(5)},
    ):
        token_map = tokenops.match(metric, 30, similarity=similarity, **options)
        assert_valid_token_map(token_map, num_tokens=167, partition=True)
        options.pop("order", None)
        regret = matching_regret(metric, token_map, similarity=similarity, **options)
        assert (regret <= bound).all()


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(1, 4099, 64), (1, 2, 1500, 70), (5, 611, 16)], ids=str)
def test_match_of_many_tokens(shape, backend, device):
    metric = random_tokens(*shape, device=device)
    tokens = shape[-2]
    for r in (1, tokens // 3, tokens):
        token_map = tokenops.match(metric, r)
        assert token_map.num_tokens == tokens - min(r, (tokens + 1) // 2)
        if tokens < 2000:
            regret = matching_regret(metric, token_map)
            assert (regret <= similarity_rounding(metric)).all()
    a, b = metric[..., ::2, :], metric[..., 1::2, :]
    _, index = tokenops.nearest(a, b)
    assert (nearest_regret(a, b, index) <= similarity_rounding(metric)).all()


def test_autocast_keeps_precision(backend, device):
    metric = random_tokens(2, 64, 32, device=device)
    expected = tokenops.match(metric, 16)
    score, index = tokenops.nearest(metric, metric.flip(1))
    with torch.autocast(device, dtype=torch.bfloat16):
        token_map = tokenops.match(metric, 16)
        cast_score, cast_index = tokenops.nearest(metric, metric.flip(1))
    assert_same_bits(token_map.assign, expected.assign)
    assert_same_bits(cast_score, score)
    assert_same_bits(cast_index, index)


# ---- laws ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("r", [0, 1, 7, 12, 100])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_number_and_order_of_outputs(prefix, r, order, backend, device):
    metric = random_tokens(2, 25, 8, device=device)
    token_map = tokenops.match(metric, r, num_prefix=prefix, order=order)
    sources = len(range(prefix, 25)) - 25 // 2 + prefix // 2
    assert_valid_token_map(token_map, num_tokens=25 - min(r, sources), partition=True)
    front = torch.arange(prefix, device=device).expand(2, -1)
    assert torch.equal(token_map.assign[:, :prefix].long(), front)
    starts = token_map.members.gather(1, token_map.offsets[:, :-1].long())
    if order == "position":
        assert (starts.diff(dim=1) > 0).all()
    if r == 0:
        assert_same_bits(token_map.assign, TokenMap.identity(2, 25, device).assign)
    total = token_map.merge_wavg(random_tokens(2, 25, 3, device=device))[1].sum((1, 2))
    assert total.tolist() == [25, 25]


@pytest.mark.parametrize("similarity", SIMILARITIES)
@given(seed=st.integers(0, 1000), r=st.integers(1, 10), tokens=st.integers(12, 30))
def test_images_are_independent(backend, device, similarity, seed, r, tokens):
    metric = exact_metric(3, tokens, 4, similarity=similarity, device=device, seed=seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed)).to(device)
    options = {"similarity": similarity, "num_prefix": 1}
    together = tokenops.match(metric, r, **options).assign
    assert_same_bits(tokenops.match(metric[order], r, **options).assign, together[order])
    alone = [tokenops.match(metric[i : i + 1], r, **options).assign for i in range(3)]
    assert_same_bits(torch.cat(alone), together)


def test_renaming_tokens_renames_the_map(backend, device):
    """Without ties, groups depend on the tokens and the split, not on token indices."""
    generator = torch.Generator().manual_seed(0)
    metric = random_tokens(1, 20, 8, device=device)
    pair = torch.arange(0, 20, 2, device=device), torch.arange(1, 20, 2, device=device)
    to = torch.randperm(20, generator=generator).to(device)
    moved = torch.empty_like(metric)
    moved[:, to] = metric
    before = tokenops.match(metric, 6, split=pair).assign[0]
    after = tokenops.match(moved, 6, split=(to[pair[0]], to[pair[1]])).assign[0][to]
    assert torch.equal(before[:, None] == before, after[:, None] == after)


def test_width_and_heads_that_add_nothing_change_nothing(backend, device):
    metric = exact_metric(2, 30, 4, device=device, seed=5)
    expected = tokenops.match(metric, 9).assign
    padded = torch.nn.functional.pad(metric, (0, 60))
    assert_same_bits(tokenops.match(padded, 9).assign, expected)
    assert_same_bits(tokenops.match(metric[:, None].expand(2, 4, 30, 4), 9).assign, expected)
    assert_same_bits(tokenops.match(4 * metric, 9).assign, expected)


@pytest.mark.parametrize("width", [0, 1])
def test_narrow_metrics(width, backend, device):
    """All tokens are equal: the lowest sources merge into the lowest destination."""
    metric = torch.ones(2, 7, width, device=device)
    token_map = tokenops.match(metric, 2)
    assert token_map.assign.tolist() == [[0, 0, 0, 1, 2, 3, 4]] * 2


def test_nan_is_chosen_last(backend, device):
    metric = exact_metric(1, 9, 4, seed=6, device=device)
    metric[0, [0, 3]] = math.nan
    token_map = tokenops.match(metric, 4)
    assign = token_map.assign[0].tolist()
    assert assign.count(assign[0]) == 1, "a source that is NaN merges last"
    assert assign.count(assign[3]) == 1, "no source merges into a destination that is NaN"
    assert_valid_token_map(tokenops.match(metric, 5), num_tokens=4, partition=True)


def test_metric_carries_no_gradient(backend, device):
    metric = random_tokens(1, 8, 4, device=device).requires_grad_()
    token_map = tokenops.match(metric, 2)
    assert not token_map.assign.requires_grad


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [63, 64, 65, 80, 130])
def test_mean_over_heads_of_wide_rows(width, dtype, backend, device):
    """Kernels average heads a few vectors at a time, and the tail of a row one by one."""
    keys = random_tokens(2, 5, 23, width, dtype=dtype, layout="packed", device=device)
    score, _ = tokenops.nearest(keys[:, :, ::2], keys[:, :, 1::2])
    mean = torch.nn.functional.normalize(keys.double().mean(1), dim=-1)
    expected = (mean[:, ::2] @ mean[:, 1::2].mT).amax(-1)
    assert (score - expected).abs().max() < 64 * torch.finfo(score.dtype).eps
