# SPDX-License-Identifier: Apache-2.0
"""Search for the most similar rows: inputs, settings and launches of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...._library import acc_dtype
from ...._triton.launch import (
    BEFORE_3_7,
    Launch,
    Settings,
    arch,
    ceil_div,
    heuristic,
    planned,
    power_of_two,
)
from . import search_kernels as kernels

#: Widest rows that are kept whole.
WHOLE = 128
BLOCK_D = 64

#: Every tile of sources reads all candidates again, to compute their lengths or their means over
#: heads. If that is more than so many elements, another kernel prepares the candidates first.
MAX_REREAD = 1 << 26

#: Programs that fill a device; with fewer programs, tiles become smaller.
FULL_DEVICE = 132

#: Architectures with shared memory for all 320 channels of a tile of sources.
_LARGE = ("sm_80", "sm_90")


class Side(NamedTuple):
    """The rows of a tensor that are sources or candidates.

    Row i is ``i * step + first + i // run``, or else row ``list[i]``.

    Attributes:
        rows: Number of rows.
        listed: Strides of images and rows in the list, if there is one.
        run: Rows in a run; one token is left out after each run.
        step: Distance of rows.
        first: First row.
    """

    rows: int
    listed: tuple[int, int] | None = None
    run: int = 2**31 - 1
    step: int = 1
    first: int = 0


class SearchLaunches(NamedTuple):
    """Launches of a search, with the buffers between them.

    Attributes:
        search: Launch of the search.
        rows: Shapes of the prepared rows of both sides, if they are prepared.
        lengths: Shape of the inverse lengths of the candidates, if they are prepared.
        prepare_a: Launch that prepares sources.
        prepare_b: Launch that prepares candidates.
    """

    search: Launch
    rows: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    lengths: tuple[int, int] | None = None
    prepare_a: Launch | None = None
    prepare_b: Launch | None = None


@heuristic
def nearest_tile(device: str, dtype: torch.dtype, exact: bool, width: int, few: bool) -> Settings:
    """Pick the tile of a search.

    Args:
        device: Architecture, as :func:`arch` names it.
        dtype: Dtype of the similarities.
        exact: Whether rows are in half precision.
        width: Width of the rows.
        few: Whether large tiles would leave the device idle.
    """
    if dtype == torch.float64:
        return Settings(16, 16, 4, 1)
    if not exact:
        return Settings(64, 32, 8 if device == "sm_100" else 4, 2)
    if resident(device, width):
        if device == "sm_100":
            return Settings(64, 64, 8, 2)
        if few:
            # Triton 3.6 spills registers of narrow rows with two stages, of wide ones with three.
            deeper = BEFORE_3_7 and device.startswith("sm_8") and width <= BLOCK_D
            return Settings(64, 64, 4, 3 if deeper else 2)
        # With 4 warps, instructions that each warp executes once per tile are half as many.
        return Settings(128, 64, 4 if device == "sm_90" and width <= BLOCK_D else 8, 2)
    if few:
        return Settings(64, 64, 4, 3)
    return Settings(128, 128 if device == "sm_90" else 64, 8, 3)


def resident(device: str, width: int) -> bool:
    """Whether a tile of sources in half precision stays on the chip."""
    return width <= WHOLE or (width <= 5 * BLOCK_D and device in _LARGE)


@planned
def launches(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    heads: int,
    width: int,
    a_strides: tuple[int, int, int],
    b_strides: tuple[int, int, int],
    a: Side,
    b: Side,
    a_mask: tuple[int, int],
    b_mask: tuple[int, int],
    prefix: int,
    protected: bool,
    cosine: bool,
) -> SearchLaunches:
    """Launches for inputs of one kind; strides are those of batch, heads and tokens."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    exact = heads == 1 and dtype in (torch.float16, torch.bfloat16)
    few = batch * ceil_div(a.rows, 128) < FULL_DEVICE
    reread = batch * ceil_div(a.rows, 64 if few else 128) * b.rows * width * heads
    reads_again = width <= WHOLE and reread <= MAX_REREAD
    tile = nearest_tile(device, acc, exact, width, few)
    whole = resident(device, width) if exact else width <= BLOCK_D and acc == torch.float32
    padded = ceil_div(max(b.rows, 1), tile.block_n) * tile.block_n
    precision = "ieee" if device.startswith("gfx") else "tf32x3"
    if whole and width <= WHOLE:
        block_d, blocks_d = power_of_two(width, 16), 1
    else:
        block_d = BLOCK_D if exact else BLOCK_D // 2 if acc == torch.float32 else BLOCK_D // 4
        blocks_d = ceil_div(width, block_d)

    def prepare(side: Side, rows: int, strides: tuple[int, int, int], mask: tuple[int, int],
                before: int) -> Launch:  # fmt: skip
        block = 32
        numbers = (
            side.rows, rows, tokens, width, padded_width, heads, *strides,
            *(side.listed or (0, 0)), *mask, side.run, side.step, side.first, before,
        )  # fmt: skip
        return Launch(
            kernels.prepare, (batch * ceil_div(rows, block),), numbers,
            Settings(block, BLOCK_D, 4, 1), COSINE=cosine, PROTECTED=protected,
            BLOCK_M=block, BLOCK_D=BLOCK_D,
        )  # fmt: skip

    rows = lengths = prepare_a = prepare_b = None
    padded_width = 0
    numbers_a, numbers_b = a_strides, b_strides
    if exact:
        kind = kernels.EXACT
        if not (whole and reads_again):
            lengths = (batch, padded)
            prepare_b = prepare(b, padded, b_strides, b_mask, prefix)
    elif whole and reads_again:
        kind = kernels.MEAN
    else:
        kind = kernels.PREPARED
        padded_width = ceil_div(max(width, 1), block_d) * block_d
        padded_a = ceil_div(a.rows, tile.block_m) * tile.block_m
        rows = (batch, padded_a, padded_width), (batch, padded, padded_width)
        prepare_a = prepare(a, padded_a, a_strides, (0, 0), 0)
        prepare_b = prepare(b, padded, b_strides, b_mask, prefix)
        numbers_a = padded_a * padded_width, 0, padded_width
        numbers_b = padded * padded_width, 0, padded_width
        width = padded_width
    full = width % block_d == 0 and width > 0
    constants = {
        "INPUT": kind.value, "COSINE": cosine, "PROTECTED": protected, "PRECISION": precision,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": block_d,
    }  # fmt: skip
    rest = (
        *(a.listed or (0, 0)), *(b.listed or (0, 0)), *a_mask, *b_mask,
        a.run, b.step, b.first, prefix,
    )  # fmt: skip
    grid = (batch * ceil_div(a.rows, tile.block_m),)
    sizes = a.rows, b.rows, padded, tokens, width
    if whole:
        numbers: tuple[int, ...] = *sizes, heads, *numbers_a, *numbers_b, *rest
        constants["BLOCKS_D"] = blocks_d
    else:
        numbers = *sizes, numbers_a[0], numbers_a[2], numbers_b[0], numbers_b[2], *rest
    kernel = kernels.search_resident if whole else kernels.search_streamed
    search = Launch(kernel, grid, numbers, tile, **constants, FULL=full)
    return SearchLaunches(search, rows, lengths, prepare_a, prepare_b)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens."""
    by = x.stride()
    return (by[0], by[1], by[2]) if len(by) == 4 else (by[0], 0, by[1])


def find_best(
    a: Tensor,
    b: Tensor,
    a_side: Side,
    b_side: Side,
    a_index: Tensor | None,
    b_index: Tensor | None,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    prefix: int,
    protected: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Find the best candidate of each source: its score [B, Na] and its index, int32 [B, Na].

    Args:
        a: ``[B, N, D]`` or ``[B, H, N, D]`` with the sources among its rows.
        b: The same with the candidates.
        a_side: Rows of ``a`` that are sources.
        b_side: Rows of ``b`` that are candidates.
        a_index: Indices of the sources, if they are listed; clamped.
        b_index: Indices of the candidates.
        a_mask: Bool ``[B, Na]``, true for sources that take part.
        b_mask: Bool ``[B, N]`` or ``[N]`` for the rows of ``b``.
        prefix: Number of leading rows of ``b`` that take no part.
        protected: Whether ``b_mask`` is true for rows that take no part.
        cosine: Whether rows are divided by their lengths.
    """
    # Kernels read whole vectors of channels.
    same = a is b
    if a.stride(-1) != 1:
        a = a.contiguous()
    b = a if same else b if b.stride(-1) == 1 else b.contiguous()
    shape = a.shape
    batch, count = shape[0], a_side.rows
    todo = launches(
        arch(a), a.device.index, a.dtype, batch, b.shape[-2],
        shape[1] if len(shape) == 4 else 1, shape[-1], strides(a), strides(b), a_side, b_side,
        by_image(a_mask), by_image(b_mask), prefix, protected, cosine,
    )  # fmt: skip
    acc = acc_dtype(a)
    score = a.new_empty((batch, count), dtype=acc)
    index = a.new_empty((batch, count), dtype=torch.int32)
    inverse = None
    if todo.rows is not None and todo.prepare_a is not None and todo.prepare_b is not None:
        a_rows, b_rows = (a.new_empty(size, dtype=acc) for size in todo.rows)
        todo.prepare_a(a, a_index, None, a_rows, None)
        todo.prepare_b(b, b_index, b_mask, b_rows, None)
        a, b = a_rows, b_rows
    elif todo.lengths is not None and todo.prepare_b is not None:
        inverse = a.new_empty(todo.lengths, dtype=acc)
        todo.prepare_b(b, b_index, b_mask, None, inverse)
    todo.search(a, b, a_index, b_index, a_mask, b_mask, inverse, score, index)
    return score, index


def by_image(x: Tensor | None) -> tuple[int, int]:
    """Strides of images and elements of [B, K], [1, K] or [K]; 0 for all images in common."""
    if x is None:
        return 0, 0
    *lead, last = x.stride()
    return (lead[0] if lead and x.shape[0] > 1 else 0), last


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``; see :func:`tokenops.nearest`."""
    sides = Side(a.shape[-2]), Side(b.shape[-2])
    return find_best(a, b, *sides, None, None, a_mask, b_mask, 0, False, similarity == "cosine")
