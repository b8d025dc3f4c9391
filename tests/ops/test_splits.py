# SPDX-License-Identifier: Apache-2.0
"""Splits as patterns, thresholds as tensors, and arguments that only operators take."""

import itertools
import math

import pytest
import torch
from chosen import ops
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import tokenops
from tokenops._library import references
from tokenops.ops.matching import reference
from tokenops.ops.matching.arguments import Request, SplitArgs
from tokenops.testing import assert_same_bits, exact_metric, random_tokens

OPS = torch.ops.tokenops
ORDERS = ("position", "tome")
FIELDS = ("assign", "offsets", "members")


def cells_by_hand(h, w, sy, sx, prefix, offsets):
    """Ascending sources and destinations of a grid; ``offsets`` has one offset for each cell."""
    dst = set()
    for number, (y, x) in enumerate(itertools.product(range(h // sy), range(w // sx))):
        offset = min(max(offsets[number], 0), sy * sx - 1)
        dst.add(prefix + (y * sy + offset // sx) * w + x * sx + offset % sx)
    src = [n for n in range(prefix, prefix + h * w) if n not in dst]
    return tuple(torch.tensor(x, dtype=torch.int64) for x in (src, sorted(dst)))


def same_maps(got, expected):
    for name, a, b in zip(("assign", "offsets", "members", "counts"), got, expected, strict=True):
        assert torch.equal(a, b), name


# ---- a grid as a pattern ----


@pytest.mark.isa
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    sy=st.integers(1, 4),
    sx=st.integers(1, 4),
    prefix=st.integers(0, 2),
    batch=st.integers(0, 3),
    order=st.sampled_from(ORDERS),
    share=st.sampled_from([0.0, 0.4, 1.0]),
    drawn=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_grid_is_the_lists_of_its_cells(
    backend, device, h, w, sy, sx, prefix, batch, order, share, drawn, seed
):
    """A grid gives the same bits as the lists of its tokens."""
    tokens = prefix + h * w
    metric = exact_metric(batch, tokens, 4, nan_rows=0.1, device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed) if drawn else None
    offsets = [0] * ((h // sy) * (w // sx))
    if drawn:
        again = torch.Generator().manual_seed(seed)
        offsets = torch.randint(sy * sx, (h // sy, w // sx, 1), generator=again).flatten().tolist()
    pair = cells_by_hand(h, w, sy, sx, prefix, offsets)
    options = {"num_prefix": prefix, "order": order}
    r = math.ceil(share * tokens)
    split = tokenops.grid(h, w, sy, sx, generator)
    got = tokenops.match(metric, r, split=split, **options)
    lists = tuple(side.to(device) for side in pair)
    expected = tokenops.match(metric, r, split=lists, **options)
    for name in FIELDS:
        assert_same_bits(getattr(got, name), getattr(expected, name))
    if drawn:
        assert torch.equal(generator.get_state(), again.get_state()), "one draw from the generator"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("each", [False, True])
def test_offsets_in_cells_are_clamped(each, dtype, order, backend, device):
    """Kernels clamp offsets in cells; each image may have its own offsets."""
    metric = exact_metric(2, 1 + 5 * 7, 4, device=device, seed=3)
    offsets = torch.tensor([[-(2**31), -1, 0, 3, 4, 2**31 - 1], [1, 2, 3, 0, 9, -9]], dtype=dtype)
    cell = offsets.to(device) if each else offsets[0].to(device)
    request = Request(9, order=order)
    expected = []
    for image in range(2):
        own = offsets[image if each else 0].tolist()
        lists = (side.to(device) for side in cells_by_hand(5, 7, 2, 2, 1, own))
        split = SplitArgs(1, None, *lists)
        expected.append(reference.match(metric[image : image + 1], "cosine", request, split))
    split = SplitArgs(1, None, None, None, 2, 7, 2, cell)
    result = ops.match(metric, "cosine", *request, *split)
    same_maps(result, [torch.cat(parts) for parts in zip(*expected, strict=True)])


def test_protected_tokens_of_a_grid(backend, device):
    metric = random_tokens(2, 16, 4, device=device)
    protected = torch.tensor([0, 3]).to(device)
    mask = torch.zeros(16, dtype=torch.bool, device=device).index_fill(0, protected, True)
    token_map = tokenops.match(metric, 10, protected=mask, split=tokenops.grid(4, 4, 2, 2))
    pair = tuple(side.to(device) for side in cells_by_hand(4, 4, 2, 2, 0, [0] * 4))
    expected = tokenops.match(metric, 10, protected=mask, split=pair)
    assert_same_bits(token_map.assign, expected.assign)
    if device == "cpu":
        with pytest.raises(ValueError, match="unprotected sources"):
            tokenops.match(metric, 12, protected=mask, split=tokenops.grid(4, 4, 2, 2))


@pytest.mark.parametrize("size", [(1, 5, 2, 1), (5, 1, 1, 2), (1, 1, 2, 2), (3, 3, 4, 4)], ids=str)
def test_an_image_thinner_than_a_cell_has_no_destination(size, backend, device):
    metric = random_tokens(2, size[0] * size[1], 4, device=device)
    for generator in (None, torch.Generator().manual_seed(0)):
        token_map = tokenops.match(metric, 3, split=tokenops.grid(*size, generator))
        assert token_map.num_tokens == metric.shape[1]
        assert_same_bits(token_map.merge(metric), metric)


# ---- thresholds as tensors ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_threshold_as_a_tensor(dtype, order, backend, device):
    """The same bits as with a float, for one threshold or one per image."""
    metric = random_tokens(3, 31, 8, dtype=dtype, device=device)
    least = [-math.inf, 0.3, 0.6]

    def fields(token_map):
        return token_map.assign, token_map.offsets, token_map.members, token_map.counts

    def match(rows, threshold):
        return fields(tokenops.match(rows, 12, threshold=threshold, order=order))

    expected = [match(metric[i : i + 1], least[i]) for i in range(3)]
    for kind in (torch.float32, torch.float64):
        each = torch.tensor(least, dtype=torch.float32).to(device, kind)
        exact = [match(metric[i : i + 1], each[i].item()) for i in range(3)]
        same_maps(match(metric, each), [torch.cat(x) for x in zip(*exact, strict=True)])
        strided = each.repeat_interleave(2)[::2]
        same_maps(match(metric, strided), match(metric, each))
        one = torch.tensor(0.5, dtype=kind, device=device)
        same_maps(match(metric, one), match(metric, 0.5))
    assert expected[0][3].item() == 31 - 12
    nothing = match(metric, torch.tensor(math.nan, device=device))
    assert nothing[3].tolist() == [31] * 3, "NaN merges nothing"


def test_vmap_over_thresholds(backend, device):
    metric = random_tokens(2, 12, 4, device=device)
    least = torch.linspace(-0.5, 0.5, 3, device=device)

    def counts(threshold):
        return tokenops.match(metric, 5, threshold=threshold).counts

    got = torch.vmap(counts)(least)
    assert torch.equal(got, torch.stack([counts(t) for t in least]))
    each = torch.stack([least, least.flip(0)], dim=1)  # [3, B]
    assert torch.equal(torch.vmap(counts)(each), torch.stack([counts(t) for t in each]))


# ---- the operators themselves ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("pattern", [(2, 0, 1), (3, 4, 2)], ids=["alternate", "grid"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 12])
def test_more_than_there_is_to_merge(tokens, pattern, limit, order, backend, device):
    """At least one output is left, and shapes equal those of the fake."""
    metric = exact_metric(2, tokens, 4, device=device, seed=1)
    for r in (-3, tokens - 1, tokens, tokens + 5):
        request = Request(r, limit, None, order)
        split = SplitArgs(0, None, None, None, *pattern)
        got = ops.match(metric, "cosine", *request, *split)
        outputs = tokens if limit is not None else max(tokens - max(r, 0), min(tokens, 1))
        assert got[1].shape == (2, outputs + 1)
        same_maps(got, reference.match(metric, "cosine", request, split))
        meta = OPS.match(metric.to("meta"), "cosine", *request, *split)
        assert [t.shape for t in meta] == [t.shape for t in got]
        assert (got[0] < max(outputs, 1)).all()
        assert (got[3] <= outputs).all()


@pytest.mark.parametrize("side", ["src", "dst"])
@pytest.mark.parametrize("name", ["match", "search", "select"])
def test_one_list_is_none(name, side, device):
    metric = random_tokens(1, 6, 4, device=device)
    index = torch.tensor([0, 2], device=device)
    split = SplitArgs(**{f"{side}_index": index})
    missing = "dst_index" if side == "src" else "src_index"
    arguments = {
        "match": (metric, "cosine", *Request(1), *split),
        "search": (metric, "cosine", *split),
        "select": (torch.zeros(1, 2, device=device), index[None].int(), 6, *Request(1), *split),
    }[name]
    for target in (device, "meta"):
        moved = [a.to(target) if isinstance(a, torch.Tensor) else a for a in arguments]
        for function in (getattr(OPS, name), getattr(references, name)):
            with pytest.raises((ValueError, RuntimeError), match=f"{missing} must be given"):
                function(*moved)


# ---- own generators and recomputation ----


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["random", "grid"])
def test_recomputation_draws_nothing_else(kind, use_reentrant):
    """Checkpointing restores default generators; a draw from another generator is an error."""
    x = random_tokens(2, 17, 24)

    def run(generator):
        def layer(a):
            if kind == "random":
                split = tokenops.random(6, generator)
            else:
                split = tokenops.grid(4, 4, 2, 2, generator or torch.default_generator)
            token_map = tokenops.match(a, 5, num_prefix=1, split=split)
            return tokenops.unmerge(tokenops.merge(a, token_map) ** 2, token_map)

        leaf = x.clone().requires_grad_()
        out = checkpoint(layer, leaf, use_reentrant=use_reentrant)
        out.sum().backward()
        return (leaf.grad * leaf).sum().item(), 2 * out.sum().item()

    torch.manual_seed(0)
    got, expected = run(None)
    assert got == pytest.approx(expected, rel=1e-5)  # gradient of a square, for any map
    with pytest.raises(ValueError, match=f"{kind}: generator"):
        run(torch.Generator().manual_seed(0))


def test_a_map_from_outside_serves_recomputation():
    """With a generator that is not a default one, match before the checkpoint."""
    x = random_tokens(2, 16, 8).requires_grad_()
    split = tokenops.random(6, torch.Generator().manual_seed(0))
    token_map = tokenops.match(x, 5, split=split)

    def layer(a):
        return tokenops.unmerge(tokenops.merge(a, token_map) ** 2, token_map)

    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert_same_bits(got, expected)
