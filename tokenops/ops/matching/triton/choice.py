# SPDX-License-Identifier: Apache-2.0
"""Which sources merge, and the map that they make: one program per image, one launch.

Everything is decided by sorting keys that no two tokens share, so that ties need no care: first
those of the sources, whose r-th is the last to merge; then those of the tokens by group. In order
of position a group stands where its first member, the leader, does: a first sort by group finds the
leaders, a second one by leader is the map. In ToMe's order one sort is enough.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import BEFORE_3_7, Launch, Settings, planned, power_of_two
from .. import common
from ..arguments import Best, Map, Request, SplitArgs
from .launches import Side, find_best

_invert = torch.ops.tokenops.invert.default

#: Most tokens of an image that one program sorts.
LARGEST = 4096

#: Tokens of a grid that a program looks at, at a time.
GRID_BLOCK = 512

LAST_32 = tl.constexpr(2**31 - 1)
LAST_64 = tl.constexpr(2**63 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _bit(j: tl.constexpr, BITS: tl.constexpr):
    """Bit j of the positions of a vector that has a dimension for each bit."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - j - 1) + [2] + [1] * j)


@triton.jit
def _exchange(x, stage: tl.constexpr, j: tl.constexpr, BITS: tl.constexpr):
    """Put pairs that differ in bit j of their positions in order.

    The partner of an integer is what is missing to the sum of both, modulo the word.
    """
    partner = tl.sum(x, BITS - 1 - j, keep_dims=True) - x
    upper = _bit(j, BITS)
    if stage < BITS:  # neighbouring runs are sorted in opposite directions
        upper = upper ^ _bit(stage, BITS)
    return tl.where((x > partner) != (upper == 1), partner, x)


@triton.jit
def _sort(keys, BITS: tl.constexpr):
    """Bitonic sort of 2**BITS integers, ascending."""
    x = tl.reshape(keys, [2] * BITS)
    for stage in tl.static_range(1, BITS + 1):
        for step in tl.static_range(stage):
            x = _exchange(x, stage, stage - 1 - step, BITS)
    return tl.reshape(x, keys.shape)


@triton.jit
def list_sides(
    sources, destinations, slot, ascending,
    Ns, Nd, tokens, sources_b, sources_n, destinations_b, destinations_n,
    BITS: tl.constexpr, BITS_D: tl.constexpr,
):  # fmt: skip
    """Sort listed destinations, and note in ``slot`` what each listed token is.

    Its place among the sources, or -2 - its place among the destinations as listed.
    """
    image = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, 1 << BITS)
    at = sources + image * sources_b + place.to(tl.int64) * sources_n
    token = tl.load(at, mask=place < Ns, other=0).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), tokens - 1)
    tl.store(slot + image * tokens + token, place, mask=place < Ns)

    place = tl.arange(0, 1 << BITS_D)
    at = destinations + image * destinations_b + place.to(tl.int64) * destinations_n
    token = tl.load(at, mask=place < Nd, other=0).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int32)
    tl.store(slot + image * tokens + token, -2 - place, mask=place < Nd)
    key = _sort(tl.where(place < Nd, token, LAST_32), BITS_D)
    tl.store(ascending + image * Nd + place, key, mask=place < Nd)


@triton.jit
def list_grid(
    cell, sources, slot, ascending,
    Ns, Nd, tokens, prefix, width, height, step, rows, columns, cell_b, cell_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List both sides of a grid, and note in ``slot`` what each token is, as ``list_sides`` does.

    A program for each row of cells, which has ``columns`` destinations, and one for what is below.
    """
    band = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    start = band * height * width
    end = tl.where(band < rows, start + height * width, tokens - prefix)
    found = band * columns
    for first in range(start, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        y, x = place // width - band * height, place % width
        column = x // step
        inside = (place < end) & (band < rows) & (column < columns)
        drawn = tl.zeros([BLOCK], tl.int64)
        if cell is not None:
            at = cell + image * cell_b + (band * columns + column).to(tl.int64) * cell_n
            drawn = tl.load(at, mask=inside, other=0).to(tl.int64)
            drawn = tl.minimum(tl.maximum(drawn, 0), height * step - 1)
        is_destination = inside & (y * step + x % step == drawn)
        one = is_destination.to(tl.int32)
        before = found + tl.cumsum(one, 0) - one
        is_source = (place < end) & (is_destination == 0)
        tl.store(ascending + image * Nd + before, place + prefix, mask=is_destination)
        tl.store(sources + image * Ns + place - before, place + prefix, mask=is_source)
        noted = tl.where(is_destination, -2 - before, place - before)
        tl.store(slot + image * tokens + prefix + place, noted, mask=place < end)
        found += tl.sum(one, 0)


@triton.jit
def _key(score, choice, protected, image, place, token, prefix, here, Ns, protected_b, protected_n):
    """What sources merge by, the smallest first: grade, falling score, token.

    Eligible sources have grade 0, protected ones 1, those of the prefix 2; the rest 3.
    """
    at = image * Ns + place
    s = tl.load(score + at, mask=here, other=0)
    c = tl.load(choice + at, mask=here, other=-1)
    grade = (token < prefix).to(tl.int32) * 2
    if protected is not None:
        set_ = tl.load(
            protected + image * protected_b + token.to(tl.int64) * protected_n, mask=here, other=0
        )
        grade = tl.maximum(grade, (set_ != 0).to(tl.int32))
    s = tl.where(grade > 0, float("-inf"), tl.where(s == 0, 0.0, s))  # -0.0 equals 0.0
    bits = s.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    falling = LAST_32 - rising.to(tl.int64)  # 32 bits
    grade = tl.where(here, grade, 3)
    key = (grade.to(tl.int64) << 45) | (falling << 13) | token.to(tl.int64)
    return key, grade, s, c, falling


@triton.jit
def choose(
    score, choice, sources, slot, ascending, protected, thresholds, assign, offsets, members,
    counts, tokens, outputs, Ns, Nd, r, prefix, stride, group, sources_b, sources_n, slot_b,
    ascending_b, protected_b, protected_n, thresholds_b, threshold,
    LIMITED: tl.constexpr, TOME: tl.constexpr, BITS: tl.constexpr, BITS_S: tl.constexpr,
):  # fmt: skip
    """The whole map of an image, from the best destination of each of its sources."""
    BLOCK: tl.constexpr = 1 << BITS
    image = tl.program_id(0).to(tl.int64)
    # The key of the last source to merge.
    place = tl.arange(0, 1 << BITS_S)
    if sources is None:
        token = place + place // group
    else:
        at = sources + image * sources_b + place.to(tl.int64) * sources_n
        token = tl.load(at, mask=place < Ns, other=0).to(tl.int64)
        token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int32)
    key, _, _, _, _ = _key(
        score, choice, protected, image, place, token, prefix, place < Ns, Ns,
        protected_b, protected_n,
    )  # fmt: skip
    last = tl.sum(tl.where(place == r - 1, _sort(key, BITS_S), 0), 0)  # 0 where r is

    # The token that stands for each token's group: its destination if it merges, else itself.
    token = tl.arange(0, BLOCK)
    here = token < tokens
    if slot is None:
        rank = token // stride
        is_destination = token - rank * stride == stride - 1
        is_source = here & (is_destination == 0)
        place = token - rank
    else:
        noted = tl.load(slot + image * slot_b + token, mask=here, other=-1)
        is_source = noted >= 0
        is_destination = noted < -1
        place = noted
        rank = -2 - noted
    key, grade, s, c, falling = _key(
        score, choice, protected, image, place, token, prefix, is_source, Ns,
        protected_b, protected_n,
    )  # fmt: skip
    merged = is_source & (key <= last) & (grade < 2)
    if LIMITED:
        if thresholds is not None:
            threshold = tl.load(thresholds + image * thresholds_b).to(tl.float32)
        merged = merged & (s >= threshold) & (grade == 0) & (c >= 0)
    c = tl.maximum(c, 0)
    if slot is None:
        target = c * stride + stride - 1
    else:
        target = tl.load(ascending + image * ascending_b + c, mask=merged & (c < Nd), other=0)
    stands = tl.where(merged, target, token)

    # Tokens by group, groups in the order of the outputs.
    position = tl.arange(0, BLOCK)
    if TOME:
        # Prefix 0, neither source nor destination 1, source 2, destination 3.
        kind = tl.where(is_destination, 3, tl.where(is_source, 2, 1))
        target_rank = c
        if slot is not None:
            target_rank = -2 - tl.load(slot + image * slot_b + target, mask=merged, other=-2)
        within = tl.where(is_destination, rank, token).to(tl.int64)
        within = tl.where(is_source & (prefix == 0), falling, within)
        in_front = token < prefix
        kind = tl.where(merged, 3, kind)
        within = tl.where(merged, target_rank.to(tl.int64), within)
        in_front = tl.where(merged, target < prefix, in_front)
        kind = tl.where(in_front, 0, kind)
        within = tl.where(in_front, stands.to(tl.int64), within)
        key = (kind.to(tl.int64) << 56) | (within << 24) | (stands << 12).to(tl.int64) | token
        key = _sort(tl.where(here, key, LAST_64), BITS)
        owner = ((key >> 12) & 0xFFF).to(tl.int32)
        token = (key & 0xFFF).to(tl.int32)
        before = tl.gather(owner, tl.maximum(position - 1, 0), 0)
        starts = (position == 0) | (owner != before)
    else:
        key = _sort(tl.where(here, stands * BLOCK + token, LAST_32), BITS)
        owner, token = key // BLOCK, key % BLOCK
        before = tl.gather(owner, tl.maximum(position - 1, 0), 0)
        starts = (position == 0) | (owner != before)
        start = tl.associative_scan(tl.where(starts, position, 0), 0, _larger)
        leader = tl.gather(token, start, 0)
        key = _sort(tl.where(position < tokens, leader * BLOCK + token, LAST_32), BITS)
        owner, token = key // BLOCK, key % BLOCK
        starts = owner == token
    here = position < tokens
    starts = starts & here
    number = tl.cumsum(starts.to(tl.int32), 0) - 1
    # More outputs than there should be, for want of sources, are dropped.
    kept = here & (number < outputs)
    to = image * tokens + position
    tl.store(members + to, tl.where(kept, token, -1), mask=here)
    tl.store(assign + image * tokens + token, tl.where(kept, number, -1), mask=here)
    to = offsets + image * (outputs + 1)
    tl.store(to + number, position, mask=starts & kept)
    live = tl.sum((starts & kept).to(tl.int32), 0)
    after = live + position
    total = tl.sum(kept.to(tl.int32), 0)
    tl.store(to + after, tl.zeros_like(after) + total, mask=after <= outputs)
    tl.store(counts + image, live)


class Split(NamedTuple):
    """The sides of images of one kind.

    Attributes:
        sources: Rows of the metric that are sources.
        destinations: Rows that are destinations.
        list: Sorts sides that are listed, or lists those of a grid; None where they alternate.
        images: How many images have sides of their own.
        by: Strides of images and sources in the list of sources, of images in the notes of tokens
            and in the sorted destinations.
    """

    sources: Side
    destinations: Side
    list: Launch | None
    images: int
    by: tuple[int, int, int, int]


_Listed = tuple[tuple[int, ...], tuple[int, int], tuple[int, ...], tuple[int, int]]


@planned
def plan_split(index: int | None, tokens: int, listed: _Listed | None, stride: int) -> Split:
    """Sides of a split; ``listed`` is shapes and strides of sources, then of destinations."""
    if listed is None:
        sources = Side(tokens - tokens // stride, None, max(stride - 1, 1))
        destinations = Side(tokens // stride, None, step=stride, first=stride - 1)
        return Split(sources, destinations, None, 1, (0, 0, 0, 0))
    shape_s, by_s, shape_d, by_d = listed
    images = max(shape[0] if len(shape) == 2 else 1 for shape in (shape_s, shape_d))
    own = int(images > 1)
    count_s, count_d = shape_s[-1], shape_d[-1]
    blocks = power_of_two(count_s, 32), power_of_two(count_d, 32)
    bits = blocks[0].bit_length() - 1, blocks[1].bit_length() - 1
    launch = Launch(
        list_sides, (images,), (count_s, count_d, tokens, *by_s, *by_d),
        Settings(*blocks, _warps(blocks[1])), BITS=bits[0], BITS_D=bits[1],
    )  # fmt: skip
    destinations = Side(count_d, (own * count_d, 1))
    by = *by_s, own * tokens, own * count_d
    return Split(Side(count_s, by_s), destinations, launch, images, by)


@planned
def plan_grid(
    index: int | None,
    tokens: int,
    num_prefix: int,
    stride: int,
    grid_width: int,
    cell_height: int,
    cells: int,
    cell: tuple[int, ...] | None,
) -> Split:
    """Sides of a grid; ``cell`` is the images that have places of their own, if so, and strides."""
    *lead, cell_b, cell_n = cell or (0, 0)
    images = max([1, *lead])
    own = int(images > 1)
    columns = max(grid_width // stride, 1)
    rows = cells // columns
    count = tokens - num_prefix - cells
    numbers = count, cells, tokens, num_prefix, grid_width, cell_height, stride, rows, columns
    launch = Launch(
        list_grid,
        (rows + 1, images),
        (*numbers, cell_b, cell_n),
        Settings(GRID_BLOCK, 1),
        BLOCK=GRID_BLOCK,
    )
    sources, destinations = Side(count, (own * count, 1)), Side(cells, (own * cells, 1))
    return Split(sources, destinations, launch, images, (own * count, 1, own * tokens, own * cells))


@planned
def plan_choice(
    index: int | None,
    batch: int,
    tokens: int,
    r: int,
    num_prefix: int,
    protected: tuple[int, int],
    split: Split,
    stride: int,
    threshold: float | None,
    by_thresholds: int | None,
    tome: bool,
) -> Launch:
    """The choice among the best pairs of a split; ``by_thresholds`` is a stride, if there are."""
    limited = threshold is not None or by_thresholds is not None
    outputs = tokens if limited else tokens - r
    sources, destinations = split.sources, split.destinations
    limit = min(r, sources.rows) if destinations.rows > 0 else 0
    block, block_s = power_of_two(tokens, 32), power_of_two(sources.rows, 32)
    numbers = (
        tokens, outputs, sources.rows, destinations.rows, limit, num_prefix, stride,
        sources.group if split.list is None else 1, *split.by, *protected, by_thresholds or 0,
        threshold or 0.0,
    )  # fmt: skip
    in_tome_order = tome and r > 0
    return Launch(
        choose, (batch,), numbers, Settings(block, block_s, _warps(block, in_tome_order)),
        LIMITED=limited, TOME=in_tome_order,
        BITS=block.bit_length() - 1, BITS_S=block_s.bit_length() - 1,
    )  # fmt: skip


def _warps(block: int, wide: bool = False) -> int:
    """Warps that sort a block of keys, of 64 bits each if ``wide``."""
    warps = 4 if block <= 512 else 8 if block <= 1024 else 32
    if wide and block == 2048:  # each of 32 warps would have 32 registers on sm_90, too few
        warps = 16
    if wide and BEFORE_3_7:  # other numbers spill registers on sm_80
        warps = {512: 8, 4096: 16}.get(block, warps)
    return warps if torch.version.hip is None else min(warps, 16)  # waves of 64 threads


class Found(NamedTuple):
    """The sides of a split: how they are found, and where they are not by rule, what was found.

    Attributes:
        split: Their plan.
        sources: Tokens of the sources.
        slot: What each token is.
        ascending: Destinations in order.
    """

    split: Split
    sources: Tensor | None = None
    slot: Tensor | None = None
    ascending: Tensor | None = None


def _find_split(operator: str, like: Tensor, tokens: int, split: SplitArgs) -> Found:
    index, new = like.device.index, functools.partial(like.new_empty, dtype=torch.int32)
    common.check_split(operator, split)
    src, dst, stride, cell = split.src_index, split.dst_index, split.stride, split.cell
    if src is not None and dst is not None:
        listed = src.shape, _by_image(src), dst.shape, _by_image(dst)
        plan = plan_split(index, tokens, listed, stride)
        sources = src
        given: tuple[Tensor | None, Tensor] = src, dst
    elif split.grid_width == 0:
        return Found(plan_split(index, tokens, None, stride))
    else:
        num_prefix = common.prefix_of(tokens, split.num_prefix)
        cells = common.count_sides(operator, tokens, split).num_dst
        plan = plan_grid(
            index, tokens, num_prefix, stride, split.grid_width, split.cell_height, cells,
            None if cell is None else (*cell.shape[:-1], *_by_image(cell)),
        )  # fmt: skip
        sources = new((plan.images, plan.sources.rows))
        given = cell, sources
    slot = like.new_full((plan.images, tokens), -1, dtype=torch.int32)
    ascending = new((plan.images, plan.destinations.rows))
    if plan.list is not None:
        plan.list(*given, slot, ascending)
    return Found(plan, sources, slot, ascending)


def _choose(best: Best, found: Found, tokens: int, request: Request, split: SplitArgs) -> Map:
    node_max, node_idx = best
    batch, protected, thresholds = node_max.shape[0], split.protected, request.thresholds
    r = common.mergeable(tokens, request.r)
    launch = plan_choice(
        node_max.device.index, batch, tokens, r, split.num_prefix,
        (0, 0) if protected is None else _by_image(protected), found.split, split.stride,
        request.threshold, None if thresholds is None else thresholds.stride(0),
        request.order == "tome",
    )  # fmt: skip
    new = functools.partial(node_max.new_empty, dtype=torch.int32)
    outputs = tokens if request.limited() else tokens - r
    result = Map(new((batch, tokens)), new((batch, outputs + 1)), new((batch, tokens)), new(batch))
    launch(
        node_max, node_idx, found.sources, found.slot, found.ascending, protected, thresholds,
        *result,
    )  # fmt: skip
    return result


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    tokens = metric.shape[-2]
    if _is_large(metric, tokens):
        return select(search(metric, similarity, split), tokens, request, split)
    found = _find_split("match", metric, tokens, split)
    return _choose(_find_best(metric, similarity, found, split), found, tokens, request, split)


def search(metric: Tensor, similarity: str, split: SplitArgs) -> Best:
    """Best destination of each source."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    if split.src_index is not None and tokens > LARGEST:
        src, dst, _ = common.sides("search", batch, tokens, split, metric.device)
        sides = Side(src.shape[1], _by_image(src)), Side(dst.shape[1], _by_image(dst))
        found = Found(Split(*sides, None, 0, (0, 0, 0, 0)), src, None, dst)
    else:
        found = _find_split("search", metric, tokens, split)
    return _find_best(metric, similarity, found, split)


def _find_best(metric: Tensor, similarity: str, found: Found, split: SplitArgs) -> Best:
    a, b = found.split.sources, found.split.destinations
    return Best(*find_best(
        metric, metric, a, b, found.sources, found.ascending, None, split.protected,
        split.num_prefix, True, similarity == "cosine",
    ))  # fmt: skip


def select(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs.

    By PyTorch's sorts, beside which the search is most of the work, for images that are too large
    to sort in one program, and for double scores, which no key holds exactly.
    """
    if _is_large(best.node_max, num_tokens):
        return common.select(best, num_tokens, request, split, _invert)
    best = Best(*(x.contiguous() for x in best))
    found = _find_split("select", best.node_max, num_tokens, split)
    return _choose(best, found, num_tokens, request, split)


def _is_large(x: Tensor, tokens: int) -> bool:
    return tokens == 0 or tokens > LARGEST or x.dtype == torch.float64


def _by_image(index: Tensor) -> tuple[int, int]:
    by = index.stride()
    if len(by) == 1:
        return 0, by[0]
    return (0 if index.shape[0] == 1 else by[0]), by[1]
