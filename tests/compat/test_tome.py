# SPDX-License-Identifier: Apache-2.0
"""Drop-in for ToMe, against groups of tokens that plain Python finds in loops."""

from __future__ import annotations

import math

import pytest
import torch

from tokenops import TokenMap
from tokenops.compat import tome

REDUCTIONS = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
    "amax": lambda rows: rows.amax(0),
    "amin": lambda rows: rows.amin(0),
    "prod": lambda rows: rows.prod(0),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def best_pairs(metric, sources, destinations):
    """(similarity, source, destination) of each source, the most similar first."""
    unit = [row / math.sqrt(float(row @ row)) for row in metric.double()]
    pairs = []
    for s in sources:
        similarity, d = max((float(unit[s] @ unit[d]), -d) for d in destinations)
        pairs.append((similarity, s, -d))
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def with_sources(pairs, destination):
    return sorted([destination, *(s for _, s, d in pairs if d == destination)])


def soft_groups(metric, r, class_token, distill_token):
    """Members of each output token of one image, in ToMe's order."""
    tokens = len(metric)
    r = max(0, min(r, (tokens - class_token - distill_token) // 2))
    if r == 0:
        return [[n] for n in range(tokens)]
    sources, destinations = range(class_token * 2, tokens, 2), range(1, tokens, 2)
    pairs = best_pairs(metric, sources, destinations[distill_token:])
    unmerged = [s for _, s, _ in pairs[r:]]
    if class_token:
        unmerged = [0, *sorted(unmerged)]
    groups = [[s] for s in unmerged]
    merged = [with_sources(pairs[:r], d) for d in destinations]
    return groups[:1] + merged[:1] + groups[1:] + merged[1:] if distill_token else groups + merged


def check_pair(matching, groups, tokens):
    """Compare merge, unmerge and the map with ``groups[b][m]``, the members of output m."""
    merge, unmerge = matching
    x = torch.randn(len(groups), tokens, 3, dtype=torch.float64)
    for mode, reduce in REDUCTIONS.items():
        expected = [
            torch.stack([reduce(row[g]) for g in image])
            for row, image in zip(x, groups, strict=True)
        ]
        torch.testing.assert_close(merge(x, mode=mode), torch.stack(expected))
    torch.testing.assert_close(merge(x), merge(x, "mean"))
    torch.testing.assert_close(merge.token_map.merge(x), merge(x))
    y = torch.randn(len(groups), len(groups[0]), 2)
    back = torch.zeros(len(groups), tokens, 2)
    for image, rows, out in zip(groups, y, back, strict=True):
        for group, row in zip(image, rows, strict=True):
            out[group] = row
    assert torch.equal(unmerge(y), back)
    assert torch.equal(unmerge.token_map.unmerge(y), back)


@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("tokens", [4, 5, 8, 13])
@pytest.mark.parametrize("r", [1, 3, 100])
def test_soft_matching_is_tome_in_results_and_order(tokens, r, class_token, distill_token):
    metric = torch.randn(2, tokens, 6)
    groups = [soft_groups(image, r, class_token, distill_token) for image in metric]
    matching = tome.bipartite_soft_matching(metric, r, class_token, distill_token)
    check_pair(matching, groups, tokens)


def test_protected_tokens_stay_alone_in_front():
    merge, _ = tome.bipartite_soft_matching(torch.randn(2, 11, 4), 4, True, True)
    assert merge.token_map.assign[:, :2].tolist() == [[0, 1], [0, 1]]
    assert merge.token_map.offsets[:, :3].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_attention_keys_are_a_metric():
    keys = torch.randn(2, 3, 9, 4)
    merge, _ = tome.bipartite_soft_matching(keys, 3)
    expected, _ = tome.bipartite_soft_matching(keys.mean(1), 3)
    assert torch.equal(merge.token_map.assign, expected.token_map.assign)


def test_token_of_zero_length_does_not_win_every_match():
    metric = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    merge, _ = tome.bipartite_soft_matching(metric, 1)
    assert merge.token_map.assign.tolist() == [[0, 1, 1, 2]]


def test_metric_of_one_image_serves_a_batch():
    merge, unmerge = tome.bipartite_soft_matching(torch.randn(1, 8, 4), 3)
    x, size = torch.randn(3, 8, 2), torch.rand(3, 8, 1) + 0.5
    torch.testing.assert_close(merge(x), torch.cat([merge(image[None]) for image in x]))
    assert unmerge(merge(x)).shape == (3, 8, 2)
    out = tome.merge_wavg(merge, x, size)
    parts = [tome.merge_wavg(merge, a[None], s[None]) for a, s in zip(x, size, strict=True)]
    torch.testing.assert_close(out, tuple(torch.cat(p) for p in zip(*parts, strict=True)))
    assert tome.merge_source(merge, x).shape == (3, 5, 8)


@pytest.mark.parametrize(
    "match",
    [
        lambda metric: tome.bipartite_soft_matching(metric, 0),
        lambda metric: tome.bipartite_soft_matching(metric, -3, class_token=True),
        lambda metric: tome.bipartite_soft_matching(metric[:, :2], 4, class_token=True),
        lambda metric: tome.bipartite_soft_matching(metric[:, :3], 4, distill_token=True),
        lambda metric: tome.kth_bipartite_soft_matching(metric, 1),
        lambda metric: tome.random_bipartite_soft_matching(metric, 0),
    ],
)
def test_nothing_to_merge_returns_the_argument_itself(match):
    state = torch.get_rng_state()
    merge, unmerge = match(torch.ones(2, 7, 4))
    assert torch.equal(torch.get_rng_state(), state)
    tokens = merge.token_map.num_tokens
    x = torch.randn(2, tokens, 4, dtype=torch.bfloat16)
    assert merge(x, mode="sum") is x
    assert unmerge(x) is x
    assert torch.equal(merge.token_map.merge(x), x)
    for callable_ in (merge, tome.do_nothing):
        out, size = tome.merge_wavg(callable_, x)
        assert torch.equal(out, x)
        assert torch.equal(size, torch.ones(2, tokens, 1, dtype=torch.bfloat16))
        assert torch.equal(tome.merge_source(callable_, x), torch.eye(tokens).expand(2, -1, -1))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_kth_matching(k):
    metric = torch.randn(2, 11, 6)
    whole = 11 - 11 % k
    destinations = range(k - 1, whole, k)
    sources = [n for n in range(whole) if n not in destinations]
    groups = []
    for image in metric:
        pairs = best_pairs(image, sources, destinations)
        groups.append([with_sources(pairs, d) for d in destinations])
    # The tail is in no group: merge drops it, and unmerge gives zeros for it.
    check_pair(tome.kth_bipartite_soft_matching(metric, k), groups, 11)


def test_kth_map_of_a_dropped_tail_is_whole():
    merge, _ = tome.kth_bipartite_soft_matching(torch.randn(2, 11, 4), 4)
    expected = TokenMap.from_assign(merge.token_map.assign, 2)
    assert (merge.token_map.assign[:, 8:] == -1).all()
    assert torch.equal(merge.token_map.offsets, expected.offsets)
    assert torch.equal(merge.token_map.members, expected.members)


def test_random_matching_draws_as_tome_draws():
    metric = torch.randn(2, 9, 6)
    torch.manual_seed(5)
    matching = tome.random_bipartite_soft_matching(metric, 4)
    after = torch.rand(3)
    torch.manual_seed(5)
    order = torch.rand(2, 9, 1).argsort(dim=1)[..., 0].tolist()
    assert torch.equal(torch.rand(3), after)
    groups = []
    for image, tokens in zip(metric, order, strict=True):
        pairs = best_pairs(image, tokens[:4], tokens[4:])
        groups.append([with_sources(pairs, d) for d in tokens[4:]])
    check_pair(matching, groups, 9)


@pytest.mark.parametrize("plain", [False, True])
def test_wavg_over_layers_is_the_mean_of_what_was_merged(plain):
    x = first = torch.randn(2, 17, 5, dtype=torch.float64)
    size = source = token_map = None
    for r in (4, 3, 0, 2):
        merge, _ = tome.bipartite_soft_matching(x, r, class_token=True)
        token_map = merge.token_map if token_map is None else merge.token_map.compose(token_map)
        apply = (lambda t, mode, merge=merge: merge(t, mode=mode)) if plain else merge
        source = tome.merge_source(apply, x, source)
        x, size = tome.merge_wavg(apply, x, size)
    assert x.shape == (2, 8, 5)
    assert torch.equal(source, token_map.source_matrix())
    assert torch.equal(size, source.sum(-1, keepdim=True, dtype=torch.float64))
    torch.testing.assert_close(x, source.double() @ first / size)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_keep_growing_in_half_precision(dtype, plain):
    merge, _ = tome.bipartite_soft_matching(torch.ones(1, 2, 4), 1)
    apply = (lambda t, mode: merge(t, mode=mode)) if plain else merge
    size = torch.tensor([[[4096.0], [1.0]]])
    out, size = tome.merge_wavg(apply, torch.tensor([[[1.0], [2.0]]], dtype=dtype), size)
    assert size.tolist() == [[[4097.0]]]
    assert (out.dtype, out.tolist()) == (dtype, [[[1.0]]])


def test_merge_source_takes_the_maximum_of_any_matrix():
    merge, _ = tome.kth_bipartite_soft_matching(torch.ones(1, 5, 2), 2)
    source = torch.rand(1, 5, 7)
    expected = torch.stack([source[0, :3].amax(0), source[0, 3]])
    assert torch.equal(tome.merge_source(merge, torch.ones(1, 5, 2), source)[0], expected)
    # Without an earlier matrix, the dropped tail is in no row.
    assert tome.merge_source(merge, torch.ones(1, 5, 2)).tolist() == [
        [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    ]


def test_gradients_flow_through_the_pair():
    metric = torch.randn(2, 9, 4, requires_grad=True)
    merge, unmerge = tome.bipartite_soft_matching(metric, 3)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 9, 1, dtype=torch.float64).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: tome.merge_wavg(merge, x, s), (x, size))
    assert torch.autograd.gradcheck(lambda x: unmerge(merge(x)), (x,))


def test_compiles_to_one_graph():
    def layer(x, size=None):
        merge, unmerge = tome.bipartite_soft_matching(x, 3, True)
        x, size = tome.merge_wavg(merge, x, size)
        return x, size, unmerge(x), tome.merge_source(merge, unmerge(x))

    x = torch.randn(2, 9, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("num_layers", "r", "expected"),
    [
        (3, 8, [8, 8, 8]),
        (3, (8, 0), [8, 8, 8]),
        (5, (8, -1.0), [16, 12, 8, 4, 0]),
        (5, (8, 1), [0, 4, 8, 12, 16]),
        (4, (5, -0.5), [7, 5, 4, 3]),  # from int(7.5) in steps of -4/3, rounded towards zero
        (4, [3, 2], [3, 2, 0, 0]),
        (2, [3, 2, 1], [3, 2, 1]),
        (1, 8, [8]),
        (1, (8, -1.0), [8]),
        (0, 8, []),
    ],
)
def test_parse_r(num_layers, r, expected):
    assert tome.parse_r(num_layers, r) == expected


def test_parse_r_gives_a_list_of_its_own():
    schedule = [1, 2]
    tome.parse_r(2, schedule).append(3)
    assert schedule == [1, 2]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: tome.bipartite_soft_matching(m, 1.5), TypeError, "r must be an int"),
        (lambda m: tome.bipartite_soft_matching(m.int(), 2), TypeError, "floating-point"),
        (lambda m: tome.bipartite_soft_matching(m[0], 2), ValueError, "3-D or 4-D"),
        (lambda m: tome.kth_bipartite_soft_matching(m, 2.5), TypeError, "k must be an int"),
        (lambda m: tome.kth_bipartite_soft_matching(m, 9), ValueError, "at least k = 9 tokens"),
        (lambda m: tome.random_bipartite_soft_matching(m, 8), ValueError, "below the 8 tokens"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(2, 8, 4))


# ---- integers and bools ----

WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
BY_PYTHON = {
    "sum": sum,
    "amax": max,
    "amin": min,
    "prod": math.prod,
    "mean": lambda values: sum(values) // len(values),
}


def wrapped(value, dtype):
    """An integer after it has wrapped around in a narrower dtype."""
    if dtype == torch.bool:
        return bool(value)
    info = torch.iinfo(dtype)
    return (value - info.min) % (info.max - info.min + 1) + info.min


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("mode", BY_PYTHON)
@pytest.mark.parametrize("tokens", [4, 11])
def test_whole_numbers_keep_their_dtype(dtype, mode, tokens):
    merge, unmerge = tome.bipartite_soft_matching(torch.randn(2, tokens, 4), 3, True)
    lowest = 0 if dtype in (torch.bool, torch.uint8) else -3
    x = torch.randint(lowest, 4 if dtype != torch.bool else 2, (2, 3, tokens)).to(dtype).mT
    if dtype == torch.bool and mode == "mean":
        with pytest.raises(TypeError, match="merge: x must be a tensor of numbers for a mean"):
            merge(x, mode=mode)
        return
    assign, out = merge.token_map.assign.tolist(), merge(x, mode=mode)
    assert out.dtype == dtype
    for image, to in enumerate(assign):
        for m in range(merge.token_map.num_tokens):
            members = [n for n in range(tokens) if to[n] == m]
            for c in range(3):
                values = [int(x[image, n, c]) for n in members]
                if mode == "mean":  # of the sum after it has wrapped around
                    expected = wrapped(sum(values), dtype) // len(values)
                else:
                    expected = wrapped(BY_PYTHON[mode](values), dtype)
                assert out[image, m, c].item() == expected
    back = unmerge(out)
    assert back.dtype == dtype
    assert torch.equal(back, torch.stack([y[to] for y, to in zip(out, assign, strict=True)]))


def test_whole_numbers_are_exact_beyond_double():
    merge, unmerge = tome.bipartite_soft_matching(torch.ones(1, 4, 2), 2)
    big = 2**62 + 1
    x = torch.tensor([[[1], [big], [2], [-big]]])
    assert merge(x, mode="sum").flatten().tolist() == [big + 3, -big]
    assert unmerge(merge(x, mode="amax")).flatten().tolist() == [big, big, big, -big]


@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_whole_numbers_of_a_map_of_one_image(batch, channels):
    merge, unmerge = tome.bipartite_soft_matching(torch.ones(1, 6, 2), 2)
    x = torch.arange(batch * 6 * channels).view(batch, 6, channels)
    out = merge(x, mode="amin")
    assert out.shape == (batch, 4, channels)
    assert torch.equal(out.double(), merge(x.double(), mode="amin"))
    assert torch.equal(unmerge(out), unmerge(out.double()).long())


def test_dropped_whole_numbers_are_zero():
    merge, unmerge = tome.kth_bipartite_soft_matching(torch.ones(1, 5, 2), 2)
    mask = torch.tensor([[[1], [7], [3], [5], [9]]])
    assert merge(mask, mode="amin").flatten().tolist() == [1, 5]
    assert unmerge(merge(mask, mode="amin")).flatten().tolist() == [1, 1, 1, 5, 0]


@pytest.mark.parametrize("whole", [torch.int64, torch.bool])
def test_errors_of_whole_numbers(whole):
    merge, unmerge = tome.bipartite_soft_matching(torch.ones(2, 8, 4), 2)
    x = torch.ones(2, 8, 3, dtype=whole)
    for call, error, words in (
        (lambda: merge(x, mode="median"), ValueError, "merge: mode must be one of"),
        (lambda: merge(x[0]), ValueError, "merge: x must be 3-D"),
        (lambda: merge(x[:, 1:]), ValueError, r"merge: x must be of shape \[2, 8, 3\]"),
        (lambda: unmerge(x), ValueError, r"unmerge: x must be of shape \[2, 6, 3\]"),
        (lambda: merge(x.cfloat()), TypeError, "merge: x must be a floating-point tensor"),
        (lambda: merge(x.tolist()), TypeError, "merge: x"),
    ):
        with pytest.raises(error, match=words):
            call()


# ---- sizes ----


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("r", [0, 3])
@pytest.mark.parametrize("size_dtype", [None, torch.float16, torch.bfloat16, torch.float32,
                                        torch.float64, torch.int64])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sizes_keep_the_dtype_that_came(dtype, size_dtype, r, plain):
    merge, _ = tome.bipartite_soft_matching(torch.randn(2, 9, 4), r)
    apply = (lambda t, mode: merge(t, mode=mode)) if plain else merge
    x = torch.randn(2, 9, 3).to(dtype)
    size = None if size_dtype is None else torch.randint(1, 9, (2, 9, 1)).to(size_dtype)
    out, total = tome.merge_wavg(apply, x, size)
    assert total.dtype == (size_dtype or dtype)
    assert out.is_floating_point()
    if size_dtype != torch.int64:
        assert out.dtype == dtype
    exact = torch.ones(2, 9, 1) if size is None else size
    expected = merge(exact.double(), mode="sum")
    assert torch.equal(total.double(), expected)
    mean = merge(exact.double() * x.double(), mode="sum") / expected
    eps = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * (dtype != torch.float64)
    bound = merge(exact.double() * x.double().abs(), mode="sum") / expected
    assert ((out.double() - mean).abs() <= (4 * eps * bound)).all()


def test_double_sizes_are_summed_in_double():
    merge, _ = tome.bipartite_soft_matching(torch.ones(1, 2, 4), 1)
    size = torch.tensor([[[2.0**24], [1.0]]], dtype=torch.float64)
    for dtype in (torch.float16, torch.float32, torch.float64):
        total = tome.merge_wavg(merge, torch.ones(1, 2, 1, dtype=dtype), size)[1]
        assert total.item() == 2**24 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_proportional_attention_in_the_dtype_of_a_model(dtype):
    qkv = torch.nn.Linear(8, 24).to(dtype)
    x, size = torch.randn(2, 17, 8).to(dtype), None
    for _ in range(3):
        q, k, v = qkv(x).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        logits = q @ k.mT / 2
        logits = logits if size is None else logits + size.log()[:, None].mT
        x = x + (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x, size = tome.merge_wavg(tome.bipartite_soft_matching(k, 3, True)[0], x, size)
    assert x.dtype == size.dtype == dtype
    assert size.sum(1).eq(17).all()


def test_whole_tokens_have_exact_sums_and_floating_means():
    merge, _ = tome.bipartite_soft_matching(torch.ones(1, 4, 2), 1)
    x = torch.tensor([[[1], [3], [5], [8]]])
    out, size = tome.merge_wavg(merge, x)
    assert (out.dtype, size.dtype) == (torch.get_default_dtype(), torch.int64)
    assert size.flatten().tolist() == [1, 2, 1]
    assert out.flatten().tolist() == [5.0, 2.0, 8.0]
