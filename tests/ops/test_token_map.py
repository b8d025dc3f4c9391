# SPDX-License-Identifier: Apache-2.0
"""TokenMap and splits: the meaning of the fields, and the laws that maps obey."""

import copy
import dataclasses
import io
import pickle

import brute_force
import pytest
import torch
from chosen import ops
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import tokenops
from tokenops import TokenMap, _checks
from tokenops.compat import tome
from tokenops.ops.matching import common
from tokenops.testing import (
    assert_same_bits,
    assert_valid_token_map,
    assert_within_error_budget,
    random_token_map,
    random_tokens,
)


@st.composite
def maps(draw, batch=None, num_inputs=None):
    return random_token_map(
        draw(st.integers(0, 3)) if batch is None else batch,
        draw(st.integers(0, 40)) if num_inputs is None else num_inputs,
        draw(st.integers(0, 20)),
        dropped=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )


# ---- making maps ----


@pytest.mark.isa
@given(token_map=maps())
def test_from_assign_inverts(token_map):
    assert_valid_token_map(token_map)


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(1, 5000, 70), (3, 4097, 4096), (2, 3000, 1)], ids=str)
def test_from_assign_inverts_many(shape, device):
    batch, tokens, outputs = shape
    token_map = random_token_map(batch, tokens, outputs, dropped=0.1, device=device)
    for image in range(batch):
        assign, offsets = token_map.assign[image].long(), token_map.offsets[image].long()
        live = assign[assign >= 0]
        assert torch.equal(offsets.diff(), live.bincount(minlength=outputs))
        members = token_map.members[image, : len(live)].long()
        assert torch.equal(
            members, torch.where(assign < 0, outputs, assign).argsort(stable=True)[: len(live)]
        )
        assert (token_map.members[image, len(live) :] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_assign_takes_any_labels(dtype, device):
    labels = torch.tensor([[2, 0, -1, 2], [1, 1, 1, 0]], dtype=dtype, device=device)
    counts = torch.tensor([3, 2], dtype=dtype, device=device)
    token_map = TokenMap.from_assign(labels.mT.contiguous().mT, 3, counts)
    assert_valid_token_map(token_map, num_tokens=3)
    assert token_map.assign.tolist() == labels.tolist()
    assert token_map.counts.tolist() == [3, 2]
    assert token_map.key_mask().tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_counts_and_members_are_kept_in_bounds_where_values_cannot_be_read(
    dtype, device, monkeypatch
):
    monkeypatch.setattr(_checks, "values_visible", lambda value: False)
    wild = 2**31 - 1 if dtype == torch.int32 else 2**32 + 1
    labels = torch.tensor([[2, 0, -1, 1]] * 3, dtype=dtype, device=device)
    counts = torch.tensor([wild, -wild, 2], dtype=dtype, device=device)
    token_map = TokenMap.from_assign(labels, 3, counts)
    assert_valid_token_map(token_map)
    assert token_map.counts.tolist() == [3, 0, 2]
    assert token_map.assign.tolist() == [[2, 0, -1, 1], [-1] * 4, [-1, 0, -1, 1]]


@pytest.mark.parametrize("counts", [[0, 5], [5, 5], [2, 0]])
def test_counts_may_be_anything_up_to_all(counts, device):
    labels = torch.full((2, 4), -1, device=device)
    labels[:, 0] = torch.tensor(counts, device=device).clamp(max=1) - 1
    token_map = TokenMap.from_assign(labels, 5, torch.tensor(counts, device=device))
    assert token_map.counts.tolist() == counts
    assert token_map.key_mask().sum(1).tolist() == counts


def test_from_assign_copies():
    """A map does not change when the labels change afterwards."""
    labels = torch.tensor([[0, 1, 0]], dtype=torch.int32)
    token_map = TokenMap.from_assign(labels, 2)
    labels.fill_(1)
    assert token_map.assign.tolist() == [[0, 1, 0]]


def test_identity(device):
    token_map = TokenMap.identity(2, 5, device)
    assert_valid_token_map(token_map, num_tokens=5, partition=True)
    x = random_tokens(2, 5, 3, device=device)
    for reduce in ("sum", "mean", "amax", "amin", "prod"):
        assert_same_bits(token_map.merge(x, reduce=reduce), x)
    assert_same_bits(token_map.unmerge(x), x)


def test_is_frozen_and_a_pytree():
    token_map = random_token_map(2, 6, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        token_map.assign = token_map.members
    for given_map in (token_map, TokenMap.from_assign(token_map.assign, 4, torch.tensor([3, 4]))):
        leaves, spec = pytree.tree_flatten(given_map)
        assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        back = pytree.tree_unflatten(leaves, spec)
        for field in dataclasses.fields(TokenMap):
            assert getattr(back, field.name) is getattr(given_map, field.name)
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(given_map)[0]]
        assert paths == [".assign", ".offsets", ".members", ".counts"][: len(leaves)]
        spec_again = pytree.treespec_loads(pytree.treespec_dumps(spec))
        assert spec_again == spec


def same(a, b):
    fields = [field.name for field in dataclasses.fields(TokenMap)]
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return all(
        x is y is None
        or (torch.equal(x, y) and x.dtype == y.dtype == torch.int32 and x.device == y.device)
        for x, y in pairs
    )


@pytest.mark.parametrize("counts", [None, [3, 2]])
def test_is_saved_copied_and_loaded(counts, device):
    labels = torch.tensor([[2, 0, -1, 2], [1, 1, 1, 0]], device=device)
    counts = None if counts is None else torch.tensor(counts, device=device)
    token_map = TokenMap.from_assign(labels, 3, counts)
    assert same(copy.deepcopy(token_map), token_map)
    assert copy.deepcopy(token_map).assign is not token_map.assign
    assert same(pickle.loads(pickle.dumps(token_map)), token_map)
    file = io.BytesIO()
    torch.save({"maps": [token_map], "split": tokenops.strided(3)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(loaded["maps"][0], token_map)
    assert loaded["split"] == tokenops.strided(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded["maps"][0].assign = labels


def test_splits_and_pairs_are_saved_and_loaded():
    index = torch.arange(4)
    explicit = tokenops.match(torch.randn(2, 8, 4), 2, split=(index * 2, index * 2 + 1))
    pair = tome.bipartite_soft_matching(torch.randn(2, 8, 4), 2)
    nothing = tome.bipartite_soft_matching(torch.randn(2, 8, 4), 0)
    saved = [tokenops.random(3), tokenops.grid(2, 4, 2, 2), explicit, pair, nothing]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    random, grid, loaded_map, loaded_pair, loaded_nothing = torch.load(file, weights_only=True)
    assert (random, grid) == (saved[0], saved[1])
    assert same(loaded_map, explicit)
    x = torch.randn(2, 8, 3)
    assert torch.equal(loaded_pair[1](loaded_pair[0](x)), pair[1](pair[0](x)))
    assert loaded_nothing[0](x) is x


def test_moves_to_devices_only(device):
    token_map = TokenMap.from_assign(torch.tensor([[1, 0]]), 2, torch.tensor([2]))
    for where in (device, torch.device(device)):
        moved = token_map.to(where, non_blocking=True)
        assert same(moved.to("cpu"), token_map)
        assert moved.counts.device.type == torch.device(device).type
    assert token_map.to("meta").assign.device.type == "meta"
    for wrong in (torch.float16, torch.int64, token_map.assign, None, 1.0, True, [device]):
        with pytest.raises(TypeError, match=r"TokenMap.to: device must be a device .*, got"):
            token_map.to(wrong)


def test_masks_and_matrices_of_empty_maps(device):
    for batch, tokens, outputs in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        labels = torch.full((batch, tokens), -1, device=device)
        counts = torch.zeros(batch, dtype=torch.int64, device=device)
        for given_counts in (None, counts):
            token_map = TokenMap.from_assign(labels, outputs, given_counts)
            mask = token_map.key_mask()
            assert (mask.shape, mask.dtype) == ((batch, outputs), torch.bool)
            assert bool((mask == (given_counts is None)).all())
            assert token_map.source_matrix().shape == (batch, outputs, tokens)


# ---- laws ----


@pytest.mark.isa
@given(data=st.data(), later=maps())
def test_compose_is_the_product_of_matrices(data, later):
    earlier = random_token_map(
        later.assign.shape[0],
        data.draw(st.integers(0, 30)),
        later.num_inputs,
        dropped=data.draw(st.sampled_from([0.0, 0.3])),
        seed=data.draw(st.integers(0, 1000)),
    )
    composed = later.compose(earlier)
    assert_valid_token_map(composed, num_tokens=later.num_tokens)
    product = later.source_matrix() @ earlier.source_matrix()
    assert torch.equal(composed.source_matrix(), product)


def composed_by(later, earlier, num_tokens):
    """The map that the operator ``compose`` makes."""
    token_map = TokenMap(*ops.compose(later, earlier, num_tokens))
    assert_valid_token_map(token_map, num_tokens=num_tokens)
    assert token_map.assign.shape == earlier.shape
    return token_map


@pytest.mark.isa
@pytest.mark.parametrize(("first", "second"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.3), (1.0, 0.3)])
@pytest.mark.parametrize("shape", [(3, 13, 8, 5), (2, 3000, 700, 60), (1, 9, 9, 1)], ids=str)
def test_compose_drops_what_either_map_drops(shape, first, second, backend, device):
    batch, inputs, middle, outputs = shape
    earlier = random_token_map(batch, inputs, middle, dropped=first, device=device, seed=1)
    later = random_token_map(batch, middle, outputs, dropped=second, device=device, seed=2)
    composed = TokenMap(*ops.compose(later.assign, earlier.assign, outputs))
    product = later.source_matrix() @ earlier.source_matrix()
    assert torch.equal(composed.source_matrix(), product)
    inverse = TokenMap.from_assign(composed.assign, outputs)
    assert_same_bits(composed.offsets, inverse.offsets)
    assert_same_bits(composed.members, inverse.members)


@pytest.mark.parametrize("outputs", [0, 3])
@pytest.mark.parametrize("inputs", [0, 1, 7])
@pytest.mark.parametrize("batch", [0, 2])
def test_compose_through_no_tokens(batch, inputs, outputs, backend, device):
    later = torch.empty(batch, 0, dtype=torch.int32, device=device)
    for label in (-1, 0, 2**31 - 1):  # without tokens, no label is in range
        earlier = torch.full((batch, inputs), label, dtype=torch.int32, device=device)
        composed = composed_by(later, earlier, outputs)
        assert (composed.assign == -1).all()
        assert (composed.offsets == 0).all()


@pytest.mark.isa
@pytest.mark.parametrize("wild", [-(2**31), -7, -2, 6, 7, 9, 12, 2**30, 2**31 - 1])
def test_compose_drops_wild_labels(wild, backend, device):
    """In either map; other tokens are unaffected."""
    earlier = random_token_map(2, 20, 9, dropped=0.1, device=device, seed=1).assign
    later = random_token_map(2, 9, 6, dropped=0.1, device=device, seed=2).assign
    bad_later = later.clone()
    bad_later[:, ::2] = wild
    clean_later = torch.where(bad_later == wild, -1, bad_later)
    bad_earlier, clean_earlier = earlier, earlier
    if wild not in range(9):
        bad_earlier = earlier.clone()
        bad_earlier[:, ::3] = wild
        clean_earlier = torch.where(bad_earlier == wild, -1, bad_earlier)
    for before, clean_before in ((earlier, earlier), (bad_earlier, clean_earlier)):
        got = composed_by(bad_later, before, 6)
        expected = composed_by(clean_later, clean_before, 6)
        for field in ("assign", "offsets", "members"):
            assert_same_bits(getattr(got, field), getattr(expected, field))
        to = [
            [later_row[m] if m >= 0 else -1 for m in row]
            for later_row, row in zip(clean_later.tolist(), clean_before.tolist(), strict=True)
        ]
        assert got.assign.tolist() == to


@given(token_map=maps())
def test_source_matrix_is_membership(token_map):
    member = brute_force.membership(token_map.assign, token_map.num_tokens)
    assert torch.equal(token_map.source_matrix(torch.bool), member)
    assert token_map.source_matrix().dtype == torch.float32
    assert token_map.source_matrix(torch.float16).dtype == torch.float16


def test_compose_keeps_counts(backend, device):
    metric = random_tokens(2, 12, 4, device=device)
    first = tokenops.match(metric, 4)
    second = tokenops.match(metric[:, :8], 4, threshold=0.2)
    composed = second.compose(first)
    assert_same_bits(composed.counts, second.counts)
    assert torch.equal(composed.key_mask(), second.key_mask())


@pytest.mark.isa
@given(token_map=maps(), channels=st.integers(1, 20))
def test_unmerge_after_merge_is_constant_on_groups(backend, device, token_map, channels):
    token_map = token_map.to(device)
    batch, tokens = token_map.assign.shape
    x = random_tokens(batch, tokens, channels, device=device)
    merged = token_map.merge(x, reduce="amax")
    spread = token_map.unmerge(merged)
    expected = torch.zeros_like(x)
    for b in range(batch):
        for n, m in enumerate(token_map.assign[b].tolist()):
            if m >= 0:
                expected[b, n] = merged[b, m]
    assert_same_bits(spread, expected)
    # amax is idempotent.
    assert_same_bits(token_map.merge(spread, reduce="amax"), merged)


@given(token_map=maps())
def test_sizes_count_all_tokens(backend, device, token_map):
    token_map = token_map.to(device)
    batch, tokens = token_map.assign.shape
    _, size = token_map.merge_wavg(random_tokens(batch, tokens, 2, device=device))
    assert torch.equal(size[..., 0], token_map.offsets.diff(dim=1).float())
    kept = (token_map.assign >= 0).sum(1)
    assert torch.equal(size.sum((1, 2)), kept.float())


def test_merging_twice_is_merging_by_the_composed_map(backend, device):
    metric = random_tokens(2, 24, 8, dtype=torch.float64, device=device)
    first = tokenops.match(metric, 8, num_prefix=1)
    x, size = first.merge_wavg(metric)
    second = tokenops.match(x, 6, num_prefix=1)
    twice, sizes = second.merge_wavg(x, size)
    once, total = second.compose(first).merge_wavg(metric)
    assert torch.equal(sizes, total)
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-12)


@given(token_map=maps(batch=2), seed=st.integers(0, 100))
def test_order_of_channels_and_outputs_does_not_matter(backend, device, token_map, seed):
    token_map = token_map.to(device)
    generator = torch.Generator().manual_seed(seed)
    x = random_tokens(2, token_map.num_inputs, 19, seed=seed, device=device)
    merged = token_map.merge(x)
    channels = torch.randperm(19, generator=generator).to(device)
    assert_same_bits(token_map.merge(x[..., channels]), merged[..., channels])
    if token_map.num_tokens > 0:
        to = torch.randperm(token_map.num_tokens, generator=generator).to(device)
        renamed = torch.where(token_map.assign >= 0, to[token_map.assign.clamp(min=0)], -1)
        other = TokenMap.from_assign(renamed, token_map.num_tokens)
        assert_same_bits(other.merge(x)[:, to], merged)


def test_permuted_inputs_give_the_same_sums_up_to_rounding(backend, device):
    token_map = random_token_map(2, 50, 7, device=device)
    x = random_tokens(2, 50, 9, device=device)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(device)
    other = TokenMap.from_assign(token_map.assign[:, order], 7)
    truth = brute_force.merge(x.double(), token_map.assign, 7, "sum")
    magnitude = brute_force.merge(x.double().abs(), token_map.assign, 7, "sum")
    assert_within_error_budget(
        other.merge(x[:, order], reduce="sum"),
        token_map.merge(x, reduce="sum"),
        truth,
        magnitude=magnitude,
    )
    assert_same_bits(other.merge(x[:, order], reduce="amax"), token_map.merge(x, reduce="amax"))


# ---- counts ----


@pytest.mark.parametrize("threshold", [-2.0, 0.1, 0.5, 0.9, 2.0])
def test_padding_has_size_zero(threshold, backend, device):
    metric = random_tokens(3, 30, 6, device=device)
    token_map = tokenops.match(metric, 12, threshold=threshold)
    assert_valid_token_map(token_map, num_tokens=30, partition=True)
    x, size = token_map.merge_wavg(random_tokens(3, 30, 5, device=device))
    live = token_map.key_mask()
    assert torch.equal(live, size[..., 0] > 0)
    assert torch.equal(live.sum(1).int(), token_map.counts)
    assert (x[~live] == 0).all()
    if threshold == -2.0:
        assert token_map.counts.tolist() == [18] * 3
        plain = tokenops.match(metric, 12)
        assert_same_bits(token_map.assign, plain.assign)
    if threshold == 2.0:
        assert_same_bits(token_map.assign, TokenMap.identity(3, 30, device).assign)


# ---- splits ----


def resolved_masks(split, batch, tokens, prefix):
    device = torch.device("cpu")
    resolved = split.resolve(batch, tokens, prefix, device)
    src, dst, _ = common.sides("match", batch, tokens, resolved, device)
    masks = []
    for index in (src, dst):
        mask = torch.zeros(batch, tokens, dtype=torch.int)
        masks.append(mask.scatter_add(1, index, torch.ones_like(index, dtype=torch.int)))
        assert (masks[-1] <= 1).all(), "a token is listed twice"
    return masks[0].bool(), masks[1].bool(), resolved


@given(
    tokens=st.integers(0, 40),
    prefix=st.integers(0, 5),
    k=st.integers(1, 6),
    alternate=st.booleans(),
)
def test_strided_and_alternate(tokens, prefix, k, alternate):
    prefix, k = min(prefix, tokens), 2 if alternate else k
    split = tokenops.alternate() if alternate else tokenops.strided(k)
    sources, destinations, resolved = resolved_masks(split, 2, tokens, prefix)
    assert destinations[0].tolist() == [n % k == k - 1 for n in range(tokens)]
    assert sources[0].tolist() == [n % k != k - 1 for n in range(tokens)]
    num_src, num_dst, prefix_src, prefix_dst = common.count_sides("match", tokens, resolved)
    assert num_src - prefix_src == int(sources[0, prefix:].sum())
    assert num_dst - prefix_dst == int(destinations[0, prefix:].sum())


@given(
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    sy=st.integers(1, 7),
    sx=st.integers(1, 7),
    prefix=st.integers(0, 3),
    seed=st.sampled_from([None, 0, 1, 2]),
)
def test_grid_has_one_destination_in_each_whole_cell(h, w, sy, sx, prefix, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    split = tokenops.grid(h, w, sy, sx, generator)
    sources, destinations, resolved = resolved_masks(split, 2, prefix + h * w, prefix)
    assert torch.equal(destinations[0], destinations[1]), "shared across the batch"
    assert not (sources | destinations)[:, :prefix].any()
    assert (sources ^ destinations)[:, prefix:].all()
    cells = destinations[0, prefix:].view(h, w)
    for y in range(h // sy):
        for x in range(w // sx):
            cell = cells[y * sy : (y + 1) * sy, x * sx : (x + 1) * sx]
            assert cell.sum() == 1
            if seed is None:
                assert cell[0, 0]
    assert not cells[h // sy * sy :].any()
    assert not cells[:, w // sx * sx :].any()
    count = common.count_sides("match", prefix + h * w, resolved)
    assert count == (int(sources[0].sum()), int(destinations[0].sum()), 0, 0)
    assert resolved.src_index is None, "kernels evaluate the pattern"


@given(
    tokens=st.integers(0, 30),
    prefix=st.integers(0, 3),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
def test_random_draws_each_token_once(tokens, prefix, share, seed):
    prefix = min(prefix, tokens)
    number = int(share * (tokens - prefix))
    split = tokenops.random(number, torch.Generator().manual_seed(seed))
    sources, destinations, resolved = resolved_masks(split, 3, tokens, prefix)
    assert not (sources | destinations)[:, :prefix].any()
    assert (sources ^ destinations)[:, prefix:].all()
    assert sources.sum(1).tolist() == [number] * 3
    count = common.count_sides("match", tokens, resolved)
    assert count == (number, tokens - prefix - number, 0, 0)


def test_random_splits_come_from_the_generator():
    def draw(split):
        return [resolved_masks(split, 4, 40, 1)[1] for _ in range(2)]

    for make in (
        lambda g: tokenops.random(20, g),
        lambda g: tokenops.grid(3, 13, 1, 13, g),
    ):
        first = draw(make(torch.Generator().manual_seed(7)))
        again = draw(make(torch.Generator().manual_seed(7)))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], first[1]), "each use draws anew"
    images = draw(tokenops.random(20, torch.Generator().manual_seed(7)))[0]
    assert not torch.equal(images[0], images[1]), "each image has its own draw"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    resolved_masks(tokenops.random(20, torch.Generator().manual_seed(7)), 1, 40, 0)
    assert torch.equal(state, torch.get_rng_state()), "the default generator is left alone"


def test_splits_serve_match(backend, device):
    metric = random_tokens(2, 37, 8, device=device)
    for split in (
        tokenops.alternate(),
        tokenops.strided(4),
        tokenops.random(12, torch.Generator().manual_seed(0)),
        tokenops.grid(6, 6, 2, 2),
        tokenops.grid(4, 9, 3, 2, torch.Generator().manual_seed(0)),
        (torch.arange(1, 20, device=device), torch.arange(20, 37, device=device)),
    ):
        for order in ("position", "tome"):
            token_map = tokenops.match(metric, 10, num_prefix=1, split=split, order=order)
            assert_valid_token_map(token_map, num_tokens=27, partition=True)


def test_r_is_clamped_to_the_sources(backend, device):
    metric = random_tokens(1, 10, 4, device=device)
    assert tokenops.match(metric, 99).num_tokens == 5
    assert tokenops.match(metric, 99, num_prefix=1).num_tokens == 6
    assert tokenops.match(metric, 99, split=tokenops.strided(5)).num_tokens == 2
    assert tokenops.match(metric, 99, split=tokenops.strided(1)).num_tokens == 10
    assert tokenops.match(metric, 99, split=tokenops.strided(11)).num_tokens == 10
    assert tokenops.match(metric, 99, split=tokenops.random(3)).num_tokens == 7
    assert tokenops.match(metric, 99, split=tokenops.random(10)).num_tokens == 10
