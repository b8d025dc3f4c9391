# SPDX-License-Identifier: Apache-2.0
"""Merging's launches: one per operator, planned once for each kind of inputs."""

from __future__ import annotations

from dataclasses import replace

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
from .. import common
from ..arguments import Index, Inverse, Wavg
from . import kernels

#: Bytes of a vector load, and threads of a program.
VECTOR = 16
THREADS = 128

#: Programs that keep a large device busy; fewer than that, and tiles become smaller.
FULL_DEVICE = 528

#: Inputs and outputs together that one program inverts are fewer.
SORTED = 8192

#: Elements of a tile of the gradient of products that Triton 3.6 keeps in registers.
MOST_PROD = 2048

_Shape = tuple[int, ...]


@heuristic
def _merging(
    device: str,
    dtype: torch.dtype,
    images: int,
    rows: int,
    channels: int,
    split: bool,
    strides: tuple[int, ...],
) -> Settings:
    """Tile of rows by channels: what counts is bytes on their way.

    Args:
        device: As :func:`arch` names it.
        dtype: Of the rows.
        images: Number of images.
        rows: Of an image.
        channels: Of a row.
        split: Whether programs share the channels of a row.
        strides: Of the channels of all tensors of rows; vectors are loaded if they are 1.
    """
    columns = 64
    for wide in (256, 128):
        if 8 * ceil_div(channels, wide) * wide <= 9 * channels:
            columns = wide
            break
    if channels == 1:
        columns = 1
    amounts = 4, 1
    if dtype.itemsize > 2 and device not in ("sm_90", "sm_100"):  # their registers overflow
        amounts = 2, 2 if dtype.itemsize == 8 else 1
    many, few = (
        Settings(
            min(max(vectors * THREADS * VECTOR // (dtype.itemsize * columns), 1), 512),
            columns,
            THREADS // 32,
            1,
        )
        for vectors in amounts
    )
    programs = images * ceil_div(rows, many.block_m) * (ceil_div(channels, columns) if split else 1)
    vectors = strides.count(1) == len(strides) or channels == 1
    return many if vectors and programs >= FULL_DEVICE else few


def _grid(images: int, tile: Settings, rows: int, channels: int) -> tuple[_Shape, int, int]:
    """Grid, tiles of an image, blocks of a row."""
    tiles, blocks = ceil_div(rows, tile.block_m), max(ceil_div(channels, tile.block_n), 1)
    return (images * tiles * blocks,), tiles, blocks


def _tensor(name: str, tensor: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    """A tensor as kernels trust it to be.

    Raises:
        ValueError: If its shape is another one, so that they would read past its end.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, got {list(tensor.shape)}")
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _dense(name: str, tensor: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    tensor = _tensor(name, tensor, shape, dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


@planned
def _merge_plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    strides: _Shape,
    outputs: int,
    weighted: bool,
    scaled: bool,
    reduce: str,
) -> Launch:
    images, tokens, channels = shape
    tile = _merging(device, dtype, images, outputs, channels, True, strides[2:])
    grid, tiles, blocks = _grid(images, tile, outputs, channels)
    numbers = tokens, outputs, channels, *strides, tiles, blocks
    return Launch(
        kernels.merge_rows,
        grid,
        numbers,
        tile,
        REDUCE=reduce,
        ROWS=tile.block_m,
        COLUMNS=tile.block_n,
    )


def _merge(
    name: str,
    x: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    reduce: str,
) -> Tensor:
    shape = x.shape
    images, tokens, channels = shape
    outputs = index.num_tokens
    offsets = _dense(f"{name}: offsets", index.offsets, (images, outputs + 1), torch.int32)
    members = _dense(f"{name}: members", index.members, (images, tokens), torch.int32)
    if weight is not None:
        weight = _dense(f"{name}: weight", weight, (images, tokens), acc_dtype(x))
    if scale is not None:
        scale = _dense(f"{name}: scale", scale, (images, outputs), acc_dtype(x))
    out = x.new_empty((images, outputs, channels))
    launch = _merge_plan(
        arch(x), x.device.index, x.dtype, shape, x.stride(), outputs,
        weight is not None, scale is not None, reduce,
    )  # fmt: skip
    launch(x, offsets, members, weight, scale, out, total)
    return out


def merge(
    x: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    reduce: str,
) -> Tensor:
    """Fold of the members of each output token; see the operator's schema."""
    if reduce not in ("sum", "mean"):  # the others know no factors
        weight = scale = None
    return _merge("merge", x, index, weight, scale, None, reduce)


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Mean weighted by sizes, and their sums; see the operator's schema."""
    total = x.new_empty((x.shape[0], index.num_tokens), dtype=acc_dtype(x))
    return Wavg(_merge("merge_wavg", x, index, size, None, total, "wavg"), total)


@planned
def _unmerge_plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    strides: _Shape,
    tokens: int,
    weighted: bool,
    scaled: bool,
    residual_strides: _Shape | None,
    mean: bool,
) -> Launch:
    images, outputs, channels = shape
    columns = strides[2:] + (residual_strides or ())[2:]
    tile = _merging(device, dtype, images, tokens, channels, True, columns)
    grid, tiles, blocks = _grid(images, tile, tokens, channels)
    numbers = tokens, outputs, channels, *strides, *(residual_strides or (0, 0, 0)), tiles, blocks
    return Launch(
        kernels.unmerge_rows,
        grid,
        numbers,
        tile,
        MEAN=mean,
        ROWS=tile.block_m,
        COLUMNS=tile.block_n,
    )


def unmerge(
    y: Tensor,
    index: Index,
    weight: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    mean: bool,
) -> Tensor:
    """Row of the output token of each input token; see the operator's schema."""
    shape = y.shape
    images, outputs, channels = shape
    tokens = index.assign.shape[1]
    assign = _dense("unmerge: assign", index.assign, (images, tokens), torch.int32)
    offsets = _dense("unmerge: offsets", index.offsets, (images, outputs + 1), torch.int32)
    residual_strides = None
    if weight is not None:
        weight = _dense("unmerge: weight", weight, (images, tokens), acc_dtype(y))
    if scale is not None:
        scale = _dense("unmerge: scale", scale, (images, outputs), acc_dtype(y))
    if residual is not None:
        residual = _tensor("unmerge: residual", residual, (images, tokens, channels), y.dtype)
        residual_strides = residual.stride()
    out = y.new_empty((images, tokens, channels))
    launch = _unmerge_plan(
        arch(y), y.device.index, y.dtype, shape, y.stride(), tokens,
        weight is not None, scale is not None, residual_strides, mean,
    )  # fmt: skip
    launch(y, assign, offsets, weight, scale, residual, out)
    return out


def merge_many(
    x: list[Tensor],
    index: Index,
    weight: Tensor | None,
    reduce: str,
) -> list[Tensor]:
    """Several tensors by one map, a launch for each."""
    return [merge(t, index, weight, None, reduce) for t in x]


def unmerge_many(
    y: list[Tensor],
    index: Index,
    weight: Tensor | None,
    mean: bool,
) -> list[Tensor]:
    """Several tensors by one map, a launch for each."""
    return [unmerge(t, index, weight, None, None, mean) for t in y]


@planned
def _pair_dot_plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    outputs: int,
    x_strides: _Shape,
    y_strides: _Shape,
) -> Launch:
    images, tokens, channels = shape
    tile = _merging(device, dtype, images, tokens, channels, False, x_strides[2:] + y_strides[2:])
    grid, tiles, _ = _grid(images, tile, tokens, 0)
    numbers = tokens, outputs, channels, *x_strides, *y_strides, tiles
    return Launch(
        kernels.pair_dot_rows, grid, numbers, tile, ROWS=tile.block_m, COLUMNS=tile.block_n
    )


def pair_dot(x: Tensor, y: Tensor, index: Index) -> Tensor:
    """Dot products of input rows with the rows of their output tokens; see the schema."""
    shape = x.shape
    images, tokens, channels = shape
    outputs = index.num_tokens
    if y.dtype != x.dtype:
        raise ValueError(f"pair_dot: y must be of dtype {x.dtype} as x, got {y.dtype}")
    y = _tensor("pair_dot: y", y, (images, outputs, channels), x.dtype)
    assign = _dense("pair_dot: assign", index.assign, (images, tokens), torch.int32)
    out = x.new_empty((images, tokens), dtype=acc_dtype(x))
    launch = _pair_dot_plan(
        arch(x), x.device.index, x.dtype, shape, outputs, x.stride(), y.stride()
    )
    launch(x, y, assign, out)
    return out


@planned
def _reduce_backward_plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    outputs: int,
    grad_strides: _Shape,
    x_strides: _Shape,
    best_strides: _Shape,
    prod: bool,
) -> Launch:
    images, tokens, channels = shape
    columns = grad_strides[2:] + x_strides[2:] + best_strides[2:]
    tile = _merging(device, dtype, images, outputs, channels, True, columns)
    if prod and BEFORE_3_7:
        tile = replace(tile, block_m=max(min(tile.block_m, MOST_PROD // tile.block_n), 1))
    group_tiles = ceil_div(outputs, tile.block_m)
    # Tiles of output tokens, then tiles of input tokens, among which the dropped ones are.
    rows = (group_tiles + ceil_div(tokens, tile.block_m)) * tile.block_m
    grid, tiles, blocks = _grid(images, tile, rows, channels)
    numbers = (
        tokens, outputs, channels, *grad_strides, *x_strides, *best_strides,
        group_tiles, tiles, blocks,
    )  # fmt: skip
    return Launch(
        kernels.reduce_backward_rows,
        grid,
        numbers,
        tile,
        PROD=prod,
        ROWS=tile.block_m,
        COLUMNS=tile.block_n,
    )


def merge_reduce_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    index: Index,
    reduce: str,
) -> Tensor:
    """Gradient of amax, amin and prod; see the operator's schema."""
    name = "merge_reduce_backward"
    shape, dtype = x.shape, x.dtype
    images, tokens, channels = shape
    outputs = index.num_tokens
    grad = _tensor(f"{name}: grad", grad, (images, outputs, channels), dtype)
    out = _tensor(f"{name}: out", out, (images, outputs, channels), dtype)
    assign = _dense(f"{name}: assign", index.assign, (images, tokens), torch.int32)
    offsets = _dense(f"{name}: offsets", index.offsets, (images, outputs + 1), torch.int32)
    members = _dense(f"{name}: members", index.members, (images, tokens), torch.int32)
    result = x.new_empty(shape)
    after = None
    if reduce == "prod":
        after = result if dtype == acc_dtype(x) else x.new_empty(shape, dtype=acc_dtype(x))
    launch = _reduce_backward_plan(
        arch(x), x.device.index, dtype, shape, outputs, grad.stride(), x.stride(), out.stride(),
        reduce == "prod",
    )  # fmt: skip
    launch(grad, x, out, assign, offsets, members, after, result)
    return result


@planned
def _invert_plan(
    device: str, index: int | None, images: int, tokens: int, middle: int, outputs: int
) -> Launch:
    size = power_of_two(tokens + outputs + 1, 16)
    settings = Settings(size, 1, max(1, min(size // 128, 16)), 1)
    return Launch(kernels.invert_image, (images,), (tokens, middle, outputs), settings, SIZE=size)


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """Members of each output token, one after the other; see the operator's schema."""
    images, tokens = assign.shape
    if tokens + num_tokens >= SORTED:
        return _invert_many(assign, num_tokens)
    assign = _dense("invert: assign", assign, (images, tokens), torch.int32)
    offsets = assign.new_empty((images, num_tokens + 1))
    members = assign.new_empty((images, tokens))
    launch = _invert_plan(arch(assign), assign.device.index, images, tokens, tokens, num_tokens)
    launch(assign, None, None, offsets, members)
    return Inverse(offsets, members)


def compose(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    """A map through another one, and its inverse; see the operator's schema."""
    images, tokens = earlier.shape
    middle = assign.shape[1]
    if tokens + num_tokens >= SORTED:
        composed = common.route(assign, earlier, num_tokens)
        return Index(composed, *_invert_many(composed, num_tokens))
    assign = _dense("compose: assign", assign, (images, middle), torch.int32)
    earlier = _dense("compose: earlier", earlier, (images, tokens), torch.int32)
    composed = earlier.new_empty((images, tokens))
    offsets = earlier.new_empty((images, num_tokens + 1))
    members = earlier.new_empty((images, tokens))
    launch = _invert_plan(arch(assign), assign.device.index, images, tokens, middle, num_tokens)
    launch(assign, earlier, composed, offsets, members)
    return Index(composed, offsets, members)


def _invert_many(assign: Tensor, num_tokens: int) -> Inverse:
    """What :func:`invert` does, by PyTorch's sort of any size."""
    live = (assign >= 0) & (assign < num_tokens)
    slot, order = torch.where(live, assign, num_tokens).sort(dim=1, stable=True)
    first = torch.arange(num_tokens + 1, dtype=slot.dtype, device=slot.device)
    first = first.repeat(slot.shape[0], 1)
    offsets = torch.searchsorted(slot, first, out_int32=True)
    return Inverse(offsets, torch.where(slot < num_tokens, order, -1).int())
