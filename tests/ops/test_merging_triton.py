# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of merging at the edges of tiles: long segments, many rows and channels."""

import itertools

import pytest
import torch
from chosen import ops

import tokenops
from tokenops import TokenMap
from tokenops._library import references
from tokenops.testing import (
    assert_same_bits,
    assert_valid_token_map,
    random_token_map,
    random_tokens,
)

pytest.importorskip("triton")

WILD = (-(2**31), -(2**30), -2, -1, 2**30, 2**31 - 1)


@pytest.fixture(autouse=True)
def _triton(backend):
    if backend != "triton":
        pytest.skip("about the tiles of the Triton kernels")


def segments(*lengths, dropped=0):
    """A map of one image with shuffled tokens and segments of these lengths."""
    labels = [m for m, length in enumerate(lengths) for _ in range(length)] + [-1] * dropped
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return TokenMap.from_assign(torch.tensor([labels])[:, order], len(lengths))


def both(call):
    """Results of the kernels and of the reference."""
    got = call()
    with tokenops.use_backend("reference"):
        expected = call()
    return got, expected


def check(call):
    for got, expected in zip(*both(call), strict=True):
        tolerance = 0.02 if got.dtype in (torch.float16, torch.bfloat16) else 1e-5
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def forward_and_backward(token_map, x, size):
    """Outputs and gradients of all public functions."""

    def call():
        leaf, weight = x.clone().requires_grad_(), size.clone().requires_grad_()
        outputs = [token_map.merge(leaf, reduce=r) for r in ("sum", "mean", "amax", "amin", "prod")]
        outputs += [*token_map.merge_wavg(leaf, weight), token_map.merge(leaf, weight=weight)]
        outputs += [token_map.unmerge(outputs[1], residual=leaf)]
        cotangents = [
            random_tokens(*o.shape, dtype=o.dtype, device=o.device, seed=i)
            for i, o in enumerate(outputs)
        ]
        gradients = torch.autograd.grad(outputs, (leaf, weight), cotangents)
        return [*(o.detach() for o in outputs), *gradients]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(61, 0, 1, 2, 3), (0, 7, 40), (1,) * 9], ids=str)
def test_long_segments(lengths, dtype, backend, device):
    """One segment is much longer than the others of its tile, or there are many segments."""
    token_map = segments(*lengths, dropped=3).to(device)
    x = 0.7 + 0.3 * random_tokens(1, sum(lengths) + 3, 5, dtype=dtype, device=device)
    size = random_tokens(1, sum(lengths) + 3, 1, dtype=torch.float64, device=device).abs() + 0.5
    size = size.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(forward_and_backward(token_map, x, size))


@pytest.mark.parametrize("channels", [65, 250, 384])
def test_blocks_of_channels(channels, backend, device):
    token_map = random_token_map(1, 9, 4, dropped=0.2, device=device, seed=1)
    x = 0.7 + 0.3 * random_tokens(1, 9, channels, device=device)
    check(forward_and_backward(token_map, x, torch.ones(1, 9, 1, device=device)))


@pytest.mark.parametrize("shape", [(1, 1100, 1030, 1), (2, 37, 19, 9), (31, 5, 3, 2)], ids=str)
def test_more_rows_than_a_program_has(shape, backend, device):
    batch, tokens, outputs, channels = shape
    token_map = random_token_map(batch, tokens, outputs, dropped=0.1, device=device, seed=2)
    x = 0.7 + 0.3 * random_tokens(batch, tokens, channels, device=device)
    check(forward_and_backward(token_map, x, torch.ones(batch, tokens, 1, device=device)))


def test_order_of_sums(backend, device):
    """Members are added in ascending order, for any other segments in the tile."""
    token_map = segments(50, 3, 0, 20).to(device)
    x = random_tokens(1, 73, 9, device=device)
    out = token_map.merge(x, reduce="sum")
    expected = torch.zeros_like(out)
    for n, m in enumerate(token_map.assign[0].tolist()):
        expected[0, m] += x[0, n]
    assert_same_bits(out, expected)


def test_transposed_rows(backend, device):
    """Strides of channels other than 1, images that share memory, gradients with strides of 0."""
    token_map = random_token_map(3, 14, 6, dropped=0.2, device=device, seed=3)
    x = 0.7 + 0.3 * random_tokens(3, 66, 14, device=device).mT
    check(forward_and_backward(token_map, x, torch.ones(3, 14, 1, device=device)))
    one = x[:1].expand(3, -1, -1)
    check(lambda: [token_map.merge(one), token_map.unmerge(one[:, :6], residual=one)])
    check(lambda: [ops.merge_reduce_backward(
        torch.ones((), device=device).expand(3, 6, 66), x, token_map.merge(x, reduce="amax"),
        token_map.assign, token_map.offsets, token_map.members, "amax")])  # fmt: skip


def test_strides_of_indices_and_weights(backend, device):
    token_map = random_token_map(3, 14, 6, dropped=0.2, device=device, seed=4)
    strided = TokenMap(*(
        t.mT.contiguous().mT for t in (token_map.assign, token_map.offsets, token_map.members)
    ))  # fmt: skip
    x = random_tokens(3, 14, 5, device=device)
    size = random_tokens(14, 3, 1, device=device).abs().transpose(0, 1)
    for got, expected in zip(
        forward_and_backward(strided, x, size)(),
        forward_and_backward(token_map, x, size.contiguous())(),
        strict=True,
    ):
        assert_same_bits(got, expected)


def test_factors_of_the_operators(backend, device):
    """Arguments that the public functions never combine."""
    token_map = random_token_map(2, 21, 9, dropped=0.2, device=device, seed=5)
    index = token_map.assign, token_map.offsets, token_map.members
    x, y = (random_tokens(2, n, 33, device=device) for n in (21, 9))
    weight, scale = (random_tokens(2, n, 1, device=device)[..., 0] for n in (21, 9))
    for w, s in itertools.product((None, weight), (None, scale)):
        for calls in (
            [(of.merge, x, *index, w, s, "sum") for of in (ops, references)],
            [(of.merge, x, *index, w, s, "mean") for of in (ops, references)],
            [(of.unmerge, y, *index, w, s, x, False) for of in (ops, references)],
            [(of.unmerge, y, *index, w, s, x, True) for of in (ops, references)],
        ):
            torch.testing.assert_close(*(call(*arguments) for call, *arguments in calls))
    torch.testing.assert_close(ops.pair_dot(x, y, *index), references.pair_dot(x, y, *index))


@pytest.mark.parametrize("reduce", ["amax", "amin"])
def test_nan_is_the_extremum(reduce, backend, device):
    """The gradient of NaN goes to the members that are NaN."""
    token_map = TokenMap.from_assign(torch.tensor([[0, 0, 0, 1]], device=device), 2)
    x = torch.tensor([1.0, torch.nan, torch.nan, 2.0], device=device).view(1, 4, 1)
    x.requires_grad_()
    out = token_map.merge(x, reduce=reduce)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert gradient.flatten().tolist() == [0, 0.5, 0.5, 1]


def test_nan_of_dropped_tokens_is_ignored(backend, device):
    """NaN in dropped tokens and in their weights does not affect results."""
    token_map = segments(3, 2, dropped=4).to(device)
    dropped = token_map.assign[0] < 0
    x = 0.7 + 0.3 * random_tokens(1, 9, 5, device=device)
    clean, weight = x.clone(), torch.ones(1, 9, 1, device=device)
    x[0, dropped] = torch.nan
    spoilt = weight.clone()
    spoilt[0, dropped] = torch.nan
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        assert_same_bits(token_map.merge(x, reduce=reduce), token_map.merge(clean, reduce=reduce))
    for got, expected in zip(
        token_map.merge_wavg(x, spoilt), token_map.merge_wavg(clean, weight), strict=True
    ):
        assert_same_bits(got, expected)
    index = token_map.assign, token_map.offsets, token_map.members
    spread = ops.unmerge(clean[:, :2], *index, spoilt[..., 0], None, None, False)
    assert (spread[0, dropped] == 0).all()
    assert (ops.pair_dot(x, clean[:, :2], *index)[0, dropped] == 0).all()


# ---- invalid maps ----


@pytest.mark.parametrize("wild", WILD)
def test_wild_members_are_skipped(wild, backend, device):
    token_map = segments(4, 3, dropped=2).to(device)
    members = token_map.members.clone()
    skipped = int(members[0, 1])
    members[0, 1] = wild
    index = token_map.assign, token_map.offsets, members
    x = random_tokens(1, 9, 3, device=device)
    rest = [int(n) for n in token_map.members[0, :4] if int(n) != skipped]
    out = ops.merge(x, *index, None, None, "sum")
    torch.testing.assert_close(out[0, 0], x[0, rest].sum(0))
    largest = ops.merge(x, *index, None, None, "amax")
    assert_same_bits(largest[0, 0], x[0, rest].amax(0))
    for reduce, result in (("amax", largest), ("prod", out)):
        gradient = ops.merge_reduce_backward(result, x, result, *index, reduce)
        assert gradient[0, rest].isfinite().all()


@pytest.mark.parametrize("wild", WILD)
def test_wild_offsets_are_clamped(wild, backend, device):
    """Only the segments with wrong offsets have wrong results; no row is read out of bounds."""
    token_map = segments(4, 3, 2).to(device)
    offsets = token_map.offsets.clone()
    offsets[0, 1] = wild
    index = token_map.assign, offsets, token_map.members
    x = random_tokens(1, 9, 3, device=device)
    clean = token_map.merge(x, reduce="sum")
    out = ops.merge(x, *index, None, None, "sum")
    assert_same_bits(out[0, 2], clean[0, 2])
    # If clamped to N, segment 0 has all tokens; if clamped to 0, segment 1 starts at token 0.
    m, end = (0, 9) if wild > 0 else (1, 7)
    members = token_map.members[0, :end].long()
    torch.testing.assert_close(out[0, m], x[0, members].sum(0))
    for mean in (False, True):
        assert ops.unmerge(clean, *index, None, None, x, mean).isfinite().all()


@pytest.mark.parametrize("wild", WILD)
def test_wild_labels_are_dropped(wild, backend, device):
    token_map = segments(4, 3, dropped=2).to(device)
    assign = token_map.assign.clone()
    assign[0, 5] = wild
    x = random_tokens(1, 9, 3, device=device)
    y = random_tokens(1, 2, 3, device=device)
    index = assign, token_map.offsets, token_map.members
    assert (ops.unmerge(y, *index, None, None, None, True)[0, 5] == 0).all()
    assert ops.pair_dot(x, y, *index)[0, 5] == 0
    for reduce in ("amax", "prod"):
        out = token_map.merge(x, reduce=reduce)
        gradient = ops.merge_reduce_backward(y, x, out, *index, reduce)
        assert (gradient[0, 5] == 0).all()
        assert gradient.isfinite().all()


def test_shapes_that_do_not_fit_are_refused(backend, device):
    """Kernels would read past the end of a tensor that is too short."""
    token_map = random_token_map(2, 9, 4, device=device)
    index = [token_map.assign, token_map.offsets, token_map.members]
    x, y = random_tokens(2, 9, 3, device=device), random_tokens(2, 4, 3, device=device)
    short = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"members must be of shape \[2, 9\], got \[2, 8\]"):
        ops.merge(x, *index[:2], index[2][:, :8], None, None, "sum")
    for call in (
        lambda: ops.merge(x, *index, short, None, "sum"),
        lambda: ops.merge(x, *index, None, short, "sum"),
        lambda: ops.merge_wavg(x, *index, short),
        lambda: ops.unmerge(y, *index, short, None, None, False),
        lambda: ops.unmerge(y, *index, None, short, None, False),
        lambda: ops.unmerge(y, *index, None, None, y, False),
        lambda: ops.pair_dot(x, x, *index),
        lambda: ops.merge_reduce_backward(x, x, y, *index, "amax"),
    ):
        with pytest.raises(ValueError, match="must be of shape"):
            call()


# ---- the inverse ----


@pytest.mark.parametrize(
    "shape",
    [(2, 0, 0), (2, 0, 5), (2, 5, 0), (0, 5, 5), (3, 1, 40), (2, 60, 3), (2, 127, 128)],
    ids=str,
)
def test_inverse(shape, backend, device):
    batch, tokens, outputs = shape
    labels = torch.randint(-1, max(outputs, 1), (batch, tokens)).int()
    if outputs == 0:
        labels.fill_(-1)
    labels = labels.to(device)
    got, expected = both(lambda: ops.invert(labels, outputs))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    assert_valid_token_map(TokenMap(labels, *got), num_tokens=outputs)


@pytest.mark.parametrize(
    "shape", [(2, 5000, 4000), (1, 3, 9000), (1, 9000, 0), (2, 9000, 1), (1, 0, 9000)], ids=str
)
def test_inverse_of_more_than_one_program_sorts(shape, backend, device):
    batch, tokens, outputs = shape
    labels = torch.randint(-1, outputs + 3, (batch, tokens), device=device).int()
    for a, b in zip(*both(lambda: ops.invert(labels, outputs)), strict=True):
        assert_same_bits(a, b)
