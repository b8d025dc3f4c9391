# SPDX-License-Identifier: Apache-2.0
"""Launches of the kernels that select the sources that merge, and the operators of matching."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...._triton.launch import BEFORE_3_7, Launch, Settings, planned, power_of_two
from .. import common
from ..arguments import Best, Map, Request, SplitArgs
from . import select_kernels as kernels
from .search_launches import Side, by_image, find_best

_invert = torch.ops.tokenops.invert.default

#: Most tokens of an image that one program sorts.
LARGEST = 4096

#: Tokens of a grid that a program reads at a time.
GRID_BLOCK = 512


class SidesLaunch(NamedTuple):
    """How the sides of images of one kind are found.

    Attributes:
        src: Rows of the metric that are sources.
        dst: Rows of the metric that are destinations.
        launch: Lists both sides of a grid, or sorts listed destinations; None for a stride.
        images: Number of images with sides of their own; 1 for all images in common.
        strides: Strides of ``Sides.src`` (image, source), ``Sides.role`` (image) and ``Sides.dst``
            (image).
    """

    src: Side
    dst: Side
    launch: Launch | None
    images: int = 1
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)


class Sides(NamedTuple):
    """The sides of a split, for all images in common or for each image; no tensors for a stride.

    Attributes:
        found_by: How they were found.
        src: Sources, ``[Ns]``, ``[1, Ns]`` or ``[B, Ns]``.
        role: Role of each token, int32 ``[1, N]`` or ``[B, N]``; see the kernels.
        dst: Destinations in ascending order, int32 ``[1, Nd]`` or ``[B, Nd]``.
    """

    found_by: SidesLaunch
    src: Tensor | None = None
    role: Tensor | None = None
    dst: Tensor | None = None


@planned
def stride_sides(tokens: int, stride: int) -> SidesLaunch:
    """Sides of a stride."""
    src = Side(tokens - tokens // stride, None, max(stride - 1, 1))
    return SidesLaunch(src, Side(tokens // stride, None, step=stride, first=stride - 1), None)


@planned
def listed_sides(
    index: int | None,
    tokens: int,
    src_shape: tuple[int, ...],
    src_strides: tuple[int, int],
    dst_shape: tuple[int, ...],
    dst_strides: tuple[int, int],
) -> SidesLaunch:
    """Sides that are listed; ``index`` is the device's, part of the key of a plan."""
    images = max(shape[0] if len(shape) == 2 else 1 for shape in (src_shape, dst_shape))
    own = int(images > 1)
    num_src, num_dst = src_shape[-1], dst_shape[-1]
    blocks = power_of_two(num_src, 32), power_of_two(num_dst, 32)
    launch = Launch(
        kernels.list_sides, (images,), (num_src, num_dst, tokens, *src_strides, *dst_strides),
        Settings(*blocks, _warps(blocks[1])),
        BITS_S=blocks[0].bit_length() - 1, BITS_D=blocks[1].bit_length() - 1,
    )  # fmt: skip
    src, dst = Side(num_src, src_strides), Side(num_dst, (own * num_dst, 1))
    return SidesLaunch(src, dst, launch, images, (*src_strides, own * tokens, own * num_dst))


@planned
def grid_sides(
    index: int | None,
    tokens: int,
    num_prefix: int,
    stride: int,
    grid_width: int,
    cell_height: int,
    cells: int,
    cell_images: int,
    cell_strides: tuple[int, int],
) -> SidesLaunch:
    """Sides of a grid; ``cell_images`` is the number of images with cells of their own."""
    own = int(cell_images > 1)
    columns = max(grid_width // stride, 1)
    rows = cells // columns
    count = tokens - num_prefix - cells
    numbers = (
        count, cells, tokens, num_prefix, grid_width, cell_height, stride, rows, columns,
        *cell_strides,
    )  # fmt: skip
    launch = Launch(
        kernels.list_grid,
        (rows + 1, cell_images),
        numbers,
        Settings(GRID_BLOCK, 1),
        BLOCK=GRID_BLOCK,
    )
    src, dst = Side(count, (own * count, 1)), Side(cells, (own * cells, 1))
    strides = own * count, 1, own * tokens, own * cells
    return SidesLaunch(src, dst, launch, cell_images, strides)


@planned
def select_launch(
    index: int | None,
    batch: int,
    tokens: int,
    r: int,
    num_prefix: int,
    protected: tuple[int, int],
    sides: SidesLaunch,
    stride: int,
    threshold: float | None,
    thresholds: int | None,
    tome: bool,
) -> Launch:
    """Launch of the selection; ``thresholds`` is the stride of thresholds for each image."""
    limited = threshold is not None or thresholds is not None
    outputs = tokens if limited else tokens - r
    src, dst = sides.src, sides.dst
    num_merged = min(r, src.rows) if dst.rows > 0 else 0
    block, block_s = power_of_two(tokens, 32), power_of_two(src.rows, 32)
    numbers = (
        tokens, outputs, src.rows, dst.rows, num_merged, num_prefix, stride,
        src.run if sides.launch is None else 1, *sides.strides, *protected, thresholds or 0,
        threshold or 0.0,
    )  # fmt: skip
    in_tome_order = tome and r > 0
    return Launch(
        kernels.select_image, (batch,), numbers,
        Settings(block, block_s, _warps(block, in_tome_order)),
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


def _find_sides(operator: str, like: Tensor, tokens: int, split: SplitArgs) -> Sides:
    """Find the sides of a split, on the device of a tensor."""
    index, new = like.device.index, functools.partial(like.new_empty, dtype=torch.int32)
    common.check_split(operator, split)
    src, dst, stride, cell = split.src_index, split.dst_index, split.stride, split.cell
    if src is not None and dst is not None:
        found = listed_sides(index, tokens, src.shape, by_image(src), dst.shape, by_image(dst))
        given: tuple[Tensor | None, Tensor] = src, dst
    elif split.grid_width == 0:
        return Sides(stride_sides(tokens, stride))
    else:
        found = grid_sides(
            index, tokens, common.prefix_of(tokens, split.num_prefix), stride, split.grid_width,
            split.cell_height, common.count_sides(operator, tokens, split).num_dst,
            1 if cell is None or cell.dim() == 1 else cell.shape[0], by_image(cell),
        )  # fmt: skip
        src = new((found.images, found.src.rows))
        given = cell, src
    role = like.new_full((found.images, tokens), -1, dtype=torch.int32)
    sorted_dst = new((found.images, found.dst.rows))
    if found.launch is not None:
        found.launch(*given, role, sorted_dst)
    return Sides(found, src, role, sorted_dst)


def _select(best: Best, sides: Sides, tokens: int, request: Request, split: SplitArgs) -> Map:
    node_max, node_idx = best
    batch, thresholds, r = (
        node_max.shape[0],
        request.thresholds,
        common.mergeable(tokens, request.r),
    )
    launch = select_launch(
        node_max.device.index, batch, tokens, r, split.num_prefix, by_image(split.protected),
        sides.found_by, split.stride, request.threshold,
        None if thresholds is None else thresholds.stride(0), request.order == "tome",
    )  # fmt: skip
    new = functools.partial(node_max.new_empty, dtype=torch.int32)
    outputs = tokens if request.limited() else tokens - r
    found = Map(new((batch, tokens)), new((batch, outputs + 1)), new((batch, tokens)), new(batch))
    launch(
        node_max, node_idx, sides.src, sides.role, sides.dst, split.protected, thresholds, *found
    )
    return found


def _search(metric: Tensor, similarity: str, sides: Sides, split: SplitArgs) -> Best:
    src, dst = sides.found_by.src, sides.found_by.dst
    return Best(*find_best(
        metric, metric, src, dst, sides.src, sides.dst, None, split.protected, split.num_prefix,
        True, similarity == "cosine",
    ))  # fmt: skip


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    tokens = metric.shape[-2]
    if _is_large(metric, tokens):
        return select(search(metric, similarity, split), tokens, request, split)
    sides = _find_sides("match", metric, tokens, split)
    return _select(_search(metric, similarity, sides, split), sides, tokens, request, split)


def search(metric: Tensor, similarity: str, split: SplitArgs) -> Best:
    """Best destination of each source."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    if split.src_index is not None and tokens > LARGEST:
        src, dst, _ = common.sides("search", batch, tokens, split, metric.device)
        rows = Side(src.shape[1], by_image(src)), Side(dst.shape[1], by_image(dst))
        sides = Sides(SidesLaunch(*rows, None), src, None, dst)
    else:
        sides = _find_sides("search", metric, tokens, split)
    return _search(metric, similarity, sides, split)


def select(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs.

    PyTorch's sorts serve images that are too large for one program, where the search takes most of
    the time, and double scores, which the keys of the kernel cannot hold.
    """
    if _is_large(best.node_max, num_tokens):
        return common.select(best, num_tokens, request, split, _invert)
    best = Best(*(x.contiguous() for x in best))
    sides = _find_sides("select", best.node_max, num_tokens, split)
    return _select(best, sides, num_tokens, request, split)


def _is_large(x: Tensor, tokens: int) -> bool:
    return tokens == 0 or tokens > LARGEST or x.dtype == torch.float64
