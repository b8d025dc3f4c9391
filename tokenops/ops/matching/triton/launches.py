# SPDX-License-Identifier: Apache-2.0
"""How the most similar rows are searched for: the kernels' inputs, settings and launches."""

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
from . import kernels

#: Widest rows that are kept whole.
WHOLE = 128
CHUNK = 64

#: What the kernel may do again for each tile of sources rather than launch another one before:
#: elements of candidates that it takes the lengths, or the means over heads, of.
AGAIN = 1 << 26

#: Programs that fill a device; fewer than that, and tiles become smaller.
FULL_DEVICE = 132

#: Architectures with shared memory for all 320 channels of a tile of sources.
_LARGE = ("sm_80", "sm_90")


class Side(NamedTuple):
    """Which rows of a tensor take part.

    Attributes:
        rows: How many.
        listed: Strides of the list of indices, if there is one.
        group: So many rows take part and one does not, in turn.
        step: Or one in so many does,
        first: from this one on.
    """

    rows: int
    listed: tuple[int, int] | None = None
    group: int = 2**31 - 1
    step: int = 1
    first: int = 0


class Plan(NamedTuple):
    """Launches of a search, with the buffers between them.

    Attributes:
        search: The search itself.
        rows: Shapes of the prepared rows of both sides, if they are prepared.
        lengths: Shape of the inverse lengths of the candidates, if they come first.
        prepare_a: Prepares sources.
        prepare_b: Prepares candidates.
    """

    search: Launch
    rows: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    lengths: tuple[int, int] | None = None
    prepare_a: Launch | None = None
    prepare_b: Launch | None = None


@heuristic
def nearest_tile(device: str, dtype: torch.dtype, exact: bool, width: int, few: bool) -> Settings:
    """Tile of a search.

    Args:
        device: As :func:`arch` names it.
        dtype: Of the sums.
        exact: Whether rows are in half precision.
        width: Of the rows.
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
            deeper = BEFORE_3_7 and device.startswith("sm_8") and width <= CHUNK
            return Settings(64, 64, 4, 3 if deeper else 2)
        # Half the warps do more for each of the instructions that a tile costs once.
        return Settings(128, 64, 4 if device == "sm_90" and width <= CHUNK else 8, 2)
    if few:
        return Settings(64, 64, 4, 3)
    return Settings(128, 128 if device == "sm_90" else 64, 8, 3)


def resident(device: str, width: int) -> bool:
    """Whether a tile of sources in half precision stays on the chip."""
    return width <= WHOLE or (width <= 5 * CHUNK and device in _LARGE)


@planned
def plan(
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
    a_mask: tuple[int, ...],
    b_mask: tuple[int, int],
    prefix: int,
    protected: bool,
    cosine: bool,
) -> Plan:
    """Launches for inputs of one kind; strides are those of batch, heads and tokens."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    exact = heads == 1 and dtype in (torch.float16, torch.bfloat16)
    few = batch * ceil_div(a.rows, 128) < FULL_DEVICE
    again = (
        width <= WHOLE
        and batch * ceil_div(a.rows, 64 if few else 128) * b.rows * width * heads <= AGAIN
    )
    tile = nearest_tile(device, acc, exact, width, few)
    whole = resident(device, width) if exact else width <= CHUNK and acc == torch.float32
    padded = ceil_div(max(b.rows, 1), tile.block_n) * tile.block_n
    precision = "ieee" if device.startswith("gfx") else "tf32x3"
    if whole and width <= WHOLE:
        chunk, chunks = power_of_two(width, 16), 1
    else:
        chunk = CHUNK if exact else CHUNK // 2 if acc == torch.float32 else CHUNK // 4
        chunks = ceil_div(width, chunk)

    def prepare(side: Side, rows: int, strides: tuple[int, int, int], mask: tuple[int, int],
                before: int) -> Launch:  # fmt: skip
        block = 32
        numbers = (
            side.rows, rows, tokens, width, padded_width, heads, *strides,
            *(side.listed or (0, 0)), *mask, side.group, side.step, side.first, before,
        )  # fmt: skip
        return Launch(
            kernels.prepare, (batch * ceil_div(rows, block),), numbers,
            Settings(block, CHUNK, 4, 1), COSINE=cosine, PROTECTED=protected,
            BLOCK=block, CHUNK=CHUNK,
        )  # fmt: skip

    rows = lengths = prepare_a = prepare_b = None
    padded_width = 0
    numbers_a, numbers_b = a_strides, b_strides
    if exact:
        kind = kernels.EXACT
        if not (whole and again):
            lengths = (batch, padded)
            prepare_b = prepare(b, padded, b_strides, b_mask, prefix)
    elif whole and again:
        kind = kernels.MEAN
    else:
        kind = kernels.PREPARED
        padded_width = ceil_div(max(width, 1), chunk) * chunk
        high = ceil_div(a.rows, tile.block_m) * tile.block_m
        rows = (batch, high, padded_width), (batch, padded, padded_width)
        prepare_a = prepare(a, high, a_strides, (0, 0), 0)
        prepare_b = prepare(b, padded, b_strides, b_mask, prefix)
        numbers_a = high * padded_width, 0, padded_width
        numbers_b = padded * padded_width, 0, padded_width
        width = padded_width
    full = width % chunk == 0 and width > 0
    constants = {
        "INPUT": kind.value, "COSINE": cosine, "PROTECTED": protected, "PRECISION": precision,
        "ROWS": tile.block_m, "COLUMNS": tile.block_n, "CHUNK": chunk,
    }  # fmt: skip
    rest = (
        *(a.listed or (0, 0)), *(b.listed or (0, 0)), *a_mask, *b_mask,
        a.group, b.step, b.first, prefix,
    )  # fmt: skip
    grid = (batch * ceil_div(a.rows, tile.block_m),)
    if whole:
        sizes = a.rows, b.rows, padded, tokens, width, heads
        constants["CHUNKS"] = chunks
        search = Launch(
            kernels.search_resident,
            grid,
            (*sizes, *numbers_a, *numbers_b, *rest),
            tile,
            **constants,
            FULL=full,
        )
    else:
        strides = numbers_a[0], numbers_a[2], numbers_b[0], numbers_b[2]
        numbers = a.rows, b.rows, padded, tokens, width, *strides, *rest
        search = Launch(kernels.search_streamed, grid, numbers, tile, **constants, FULL=full)
    return Plan(search, rows, lengths, prepare_a, prepare_b)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens."""
    by = x.stride()
    return (by[0], by[1], by[2]) if len(by) == 4 else (by[0], 0, by[1])


def find_best(
    a: Tensor,
    b: Tensor,
    a_side: Side,
    b_side: Side,
    a_listed: Tensor | None,
    b_listed: Tensor | None,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    prefix: int,
    protected: bool,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Score and place of the best candidate for each source: [B, Na] and int32 [B, Na].

    Args:
        a: ``[B, N, D]`` or ``[B, H, N, D]`` with the sources among its rows.
        b: Likewise with the candidates.
        a_side: Which rows of ``a`` are sources.
        b_side: Which rows of ``b`` are candidates.
        a_listed: Indices of the sources, if they are listed; clamped.
        b_listed: Indices of the candidates.
        a_mask: Bool ``[B, Na]``, true for sources that take part.
        b_mask: Bool ``[B, N]`` or ``[N]`` for the rows of ``b``.
        prefix: So many first rows of ``b`` do not count.
        protected: Whether ``b_mask`` is true for rows that do not count.
        cosine: Whether rows are divided by their lengths.
    """
    # Kernels read whole vectors of channels.
    same = a is b
    if a.stride(-1) != 1:
        a = a.contiguous()
    b = a if same else b if b.stride(-1) == 1 else b.contiguous()
    shape = a.shape
    batch, count = shape[0], a_side.rows
    todo = plan(
        arch(a), a.device.index, a.dtype, batch, b.shape[-2],
        shape[1] if len(shape) == 4 else 1, shape[-1], strides(a), strides(b), a_side, b_side,
        (0, 0) if a_mask is None else a_mask.stride(), _mask_strides(b_mask),
        prefix, protected, cosine,
    )  # fmt: skip
    acc = acc_dtype(a)
    score = a.new_empty((batch, count), dtype=acc)
    index = a.new_empty((batch, count), dtype=torch.int32)
    inverse = None
    if todo.rows is not None and todo.prepare_a is not None and todo.prepare_b is not None:
        rows_a, rows_b = (a.new_empty(size, dtype=acc) for size in todo.rows)
        todo.prepare_a(a, a_listed, None, rows_a, None)
        todo.prepare_b(b, b_listed, b_mask, rows_b, None)
        a, b = rows_a, rows_b
    elif todo.lengths is not None and todo.prepare_b is not None:
        inverse = a.new_empty(todo.lengths, dtype=acc)
        todo.prepare_b(b, b_listed, b_mask, None, inverse)
    todo.search(a, b, a_listed, b_listed, a_mask, b_mask, inverse, score, index)
    return score, index


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    by = mask.stride()
    return (0, by[0]) if len(by) == 1 else (by[0], by[1])


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``; see the operator's schema."""
    sides = Side(a.shape[-2]), Side(b.shape[-2])
    return find_best(a, b, *sides, None, None, a_mask, b_mask, 0, False, similarity == "cosine")
