# SPDX-License-Identifier: Apache-2.0
"""Drop-in for tomesd, against groups of tokens that plain Python finds in loops."""

from __future__ import annotations

import math

import pytest
import torch

from tokenops.compat import tome, tomesd

match_2d = tomesd.bipartite_soft_matching_random2d


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def expected_groups(metric, destinations, r):
    """Members of each output token of one image: unmerged by similarity, then destinations."""
    unit = [row / math.sqrt(float(row @ row)) for row in metric.double()]
    ranking = []
    for s in sorted(set(range(len(metric))) - set(destinations)):
        similarity, d = max((float(unit[s] @ unit[d]), -d) for d in destinations)
        ranking.append((-similarity, s, -d))
    ranking.sort()
    unmerged = [[s] for _, s, _ in ranking[r:]]
    return unmerged + [
        sorted([d, *(s for _, s, best in ranking[:r] if best == d)]) for d in destinations
    ]


def in_cells(w, h, sx, sy, draw):
    """Ascending indices of the destinations; ``draw[row][column]`` is the offset in a cell."""
    return sorted(
        (row * sy + place // sx) * w + column * sx + place % sx
        for row, places in enumerate(draw)
        for column, place in enumerate(places)
    )


def check(matching, metric, destinations, r):
    merge, unmerge = matching
    groups = [expected_groups(image, destinations, r) for image in metric]
    x = torch.randn(*metric.shape[:2], 3)
    for mode in ("sum", "mean", "amax", "amin", "prod"):
        reduce = getattr(torch, mode)
        rows = [
            torch.stack([reduce(a[g], 0) for g in image])
            for a, image in zip(x, groups, strict=True)
        ]
        torch.testing.assert_close(merge(x, mode=mode), torch.stack(rows))
    torch.testing.assert_close(merge(x), merge(x, mode="mean"))
    y = merge(x)
    back = torch.empty_like(x)
    for image, row, out in zip(groups, y, back, strict=True):
        for m, group in enumerate(image):
            out[group] = row[m]
    assert torch.equal(unmerge(y), back)
    assert torch.equal(merge.token_map.merge(x), y)
    assert torch.equal(unmerge.token_map.unmerge(y), back)


@pytest.mark.parametrize("r", [1, 7, 1000])
@pytest.mark.parametrize(
    ("w", "h", "sx", "sy"), [(6, 4, 2, 2), (7, 5, 2, 2), (5, 8, 3, 1), (3, 3, 3, 2), (4, 2, 1, 1)]
)
@pytest.mark.parametrize("no_rand", [False, True])
def test_results_and_order(w, h, sx, sy, r, no_rand):
    metric = torch.randn(2, w * h, 6)
    cells = (h // sy, w // sx)
    generator = torch.Generator().manual_seed(3)
    matching = match_2d(metric, w, h, sx, sy, r, no_rand, generator)

    # The draw, and the state of the generator after it, must be that of one randint.
    again = torch.Generator().manual_seed(3)
    draw = torch.zeros(cells, dtype=torch.int64)
    if not no_rand:
        draw = torch.randint(sy * sx, size=(*cells, 1), generator=again)[..., 0]
    assert torch.equal(generator.get_state(), again.get_state())

    destinations = in_cells(w, h, sx, sy, draw.tolist())
    check(matching, metric, destinations, min(r, w * h - len(destinations)))


def test_generator_is_optional():
    metric = torch.randn(2, 24, 6)
    torch.manual_seed(1)
    merge, _ = match_2d(metric, 6, 4, 2, 2, 9)
    expected, _ = match_2d(metric, 6, 4, 2, 2, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(merge.token_map.assign, expected.token_map.assign)


@pytest.mark.parametrize("r", [0, -2])
def test_nothing_to_merge_returns_the_argument_itself(r):
    generator = torch.Generator()
    state = generator.get_state()
    merge, unmerge = match_2d(torch.randn(2, 6, 4), 3, 2, 2, 2, r, generator=generator)
    x = torch.randn(2, 6, 5)
    assert merge(x, mode="mean") is x
    assert unmerge(x) is x
    assert torch.equal(merge.token_map.merge(x), x)
    assert torch.equal(generator.get_state(), state)
    assert tomesd.do_nothing(x, mode="mean") is x


def test_token_of_zero_length_does_not_win_every_match():
    metric = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    merge, _ = match_2d(metric, 2, 2, 2, 2, 1, no_rand=True)
    assert merge.token_map.assign.tolist() == [[2, 0, 2, 1]]


def test_pair_serves_the_functions_of_tome():
    metric = torch.randn(2, 16, 4)
    merge, _ = match_2d(metric, 4, 4, 2, 2, 8, no_rand=True)
    x, size = tome.merge_wavg(merge, metric)
    torch.testing.assert_close(x, merge(metric))
    assert torch.equal(size, tome.merge_source(merge, metric).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((4, 4, 2, 2, 3), ValueError, "12 tokens"),
        ((4, 3, 2, 0, 3), ValueError, "sy must be >= 1"),
        ((4, 3, 2, 2, 2.5), TypeError, "r must be an int"),
        ((4, 3, 2, 2, 3, False, 7), TypeError, "generator"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        match_2d(torch.ones(1, 12, 4), *arguments)
