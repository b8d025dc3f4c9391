# SPDX-License-Identifier: Apache-2.0
"""Launches of merging's kernels: one per operator, planned once for each kind of inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from ..arguments import Factors, Index, Inverse, Wavg
from . import kernels

#: Bytes of a vector load, and threads of a program.
VECTOR = 16
THREADS = 128

#: Programs that keep a large device busy; with fewer programs, tiles are smaller.
FULL_DEVICE = 528

#: A program sorts one image to invert its map, if input and output tokens together are fewer.
SORTED = 8192

#: Most elements of a tile of prod's backward that Triton 3.6 keeps in registers.
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
    """Tile of rows by channels. Memory limits the kernels, so the bytes per thread decide.

    Args:
        device: Architecture as :func:`arch` returns it.
        dtype: Dtype of the rows.
        images: Number of images.
        rows: Rows of an image.
        channels: Channels of a row.
        split: Whether several programs share the channels of a row.
        strides: Strides of the channels of all tensors; strides of 1 allow vector loads.
    """
    block_c = 64
    for wide in (256, 128):  # if at most an eighth is padding
        if 8 * ceil_div(channels, wide) * wide <= 9 * channels:
            block_c = wide
            break
    if channels == 1:
        block_c = 1
    vectors_per_thread = 4, 1
    if dtype.itemsize > 2 and device not in ("sm_90", "sm_100"):  # more would spill registers
        vectors_per_thread = 2, 2 if dtype.itemsize == 8 else 1
    many, few = (
        Settings(
            min(max(vectors * THREADS * VECTOR // (dtype.itemsize * block_c), 1), 512),
            block_c,
            THREADS // 32,
            1,
        )
        for vectors in vectors_per_thread
    )
    programs = images * ceil_div(rows, many.block_m) * (ceil_div(channels, block_c) if split else 1)
    vectors = strides.count(1) == len(strides) or channels == 1
    return many if vectors and programs >= FULL_DEVICE else few


def _launch(
    kernel: Any,
    tile: Settings,
    images: int,
    rows: int,
    channels: int,
    numbers: tuple[int, ...],
    **constants: Any,
) -> Launch:
    """A launch with a program for each tile; it appends row_tiles and column_tiles to numbers."""
    row_tiles = ceil_div(rows, tile.block_m)
    column_tiles = max(ceil_div(channels, tile.block_n), 1)
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_C": tile.block_n}
    grid = (images * row_tiles * column_tiles,)
    return Launch(kernel, grid, (*numbers, row_tiles, column_tiles), tile, **constants)


def _checked(name: str, tensor: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype that a kernel reads.

    Raises:
        ValueError: If its shape is wrong: the kernel would read out of bounds.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, got {list(tensor.shape)}")
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _dense(name: str, tensor: Tensor, shape: _Shape, dtype: torch.dtype = torch.int32) -> Tensor:
    tensor = _checked(name, tensor, shape, dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _dense_factors(name: str, x: Tensor, factors: Factors, inputs: int, outputs: int) -> Factors:
    weight, scale = factors
    if weight is None and scale is None:
        return factors
    if weight is not None:
        weight = _dense(f"{name}: weight", weight, (x.shape[0], inputs), acc_dtype(x))
    if scale is not None:
        scale = _dense(f"{name}: scale", scale, (x.shape[0], outputs), acc_dtype(x))
    return Factors(weight, scale)


# Plans are cached by all arguments, also by those that a function does not read: Triton compiles a
# launch for one device, and for tensors that are there or None.

# ---- merge ----


@planned
def _merge_plan(
    device: str,
    device_index: int | None,
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
    numbers = tokens, outputs, channels, *strides
    return _launch(kernels.merge_rows, tile, images, outputs, channels, numbers, REDUCE=reduce)


def _merge(
    name: str, x: Tensor, index: Index, factors: Factors, total: Tensor | None, reduce: str
) -> Tensor:
    shape = x.shape
    images, tokens, channels = shape
    outputs = index.num_tokens
    offsets = _dense(f"{name}: offsets", index.offsets, (images, outputs + 1))
    members = _dense(f"{name}: members", index.members, (images, tokens))
    weight, scale = _dense_factors(name, x, factors, tokens, outputs)
    out = x.new_empty((images, outputs, channels))
    launch = _merge_plan(
        arch(x), x.device.index, x.dtype, shape, x.stride(), outputs,
        weight is not None, scale is not None, reduce,
    )  # fmt: skip
    launch(x, offsets, members, weight, scale, out, total)
    return out


def merge(x: Tensor, index: Index, factors: Factors, reduce: str) -> Tensor:
    """Reduce the members of each output token."""
    if reduce not in ("sum", "mean"):
        factors = Factors(None, None)
    return _merge("merge", x, index, factors, None, reduce)


def merge_many(x: list[Tensor], index: Index, weight: Tensor | None, reduce: str) -> list[Tensor]:
    """Merge each tensor of a list, a launch for each."""
    return [merge(t, index, Factors(weight, None), reduce) for t in x]


def merge_wavg(x: Tensor, index: Index, size: Tensor | None) -> Wavg:
    """Size-weighted mean of the members of each output token, and the summed sizes."""
    total = x.new_empty((x.shape[0], index.num_tokens), dtype=acc_dtype(x))
    return Wavg(_merge("merge_wavg", x, index, Factors(size, None), total, "wavg"), total)


# ---- unmerge ----


@planned
def _unmerge_plan(
    device: str,
    device_index: int | None,
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
    channel_strides = strides[2:] + (residual_strides or ())[2:]
    tile = _merging(device, dtype, images, tokens, channels, True, channel_strides)
    numbers = tokens, outputs, channels, *strides, *(residual_strides or (0, 0, 0))
    return _launch(kernels.unmerge_rows, tile, images, tokens, channels, numbers, MEAN=mean)


def unmerge(
    y: Tensor, index: Index, factors: Factors, residual: Tensor | None, mean: bool
) -> Tensor:
    """Give each input token the row of its output token."""
    shape = y.shape
    images, outputs, channels = shape
    tokens = index.assign.shape[1]
    assign = _dense("unmerge: assign", index.assign, (images, tokens))
    offsets = _dense("unmerge: offsets", index.offsets, (images, outputs + 1))
    weight, scale = _dense_factors("unmerge", y, factors, tokens, outputs)
    residual_strides = None
    if residual is not None:
        residual = _checked("unmerge: residual", residual, (images, tokens, channels), y.dtype)
        residual_strides = residual.stride()
    out = y.new_empty((images, tokens, channels))
    launch = _unmerge_plan(
        arch(y), y.device.index, y.dtype, shape, y.stride(), tokens,
        weight is not None, scale is not None, residual_strides, mean,
    )  # fmt: skip
    launch(y, assign, offsets, weight, scale, residual, out)
    return out


def unmerge_many(y: list[Tensor], index: Index, weight: Tensor | None, mean: bool) -> list[Tensor]:
    """Unmerge each tensor of a list, a launch for each."""
    return [unmerge(t, index, Factors(weight, None), None, mean) for t in y]


# ---- pair_dot ----


@planned
def _pair_dot_plan(
    device: str,
    device_index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    outputs: int,
    x_strides: _Shape,
    y_strides: _Shape,
) -> Launch:
    images, tokens, channels = shape
    tile = _merging(device, dtype, images, tokens, channels, False, x_strides[2:] + y_strides[2:])
    numbers = tokens, outputs, channels, *x_strides, *y_strides
    # A program makes whole rows: there is one column of tiles.
    return _launch(kernels.pair_dot_rows, tile, images, tokens, 1, numbers)


def pair_dot(x: Tensor, y: Tensor, index: Index) -> Tensor:
    """Dot products of input rows with the rows of their output tokens."""
    shape = x.shape
    images, tokens, channels = shape
    outputs = index.num_tokens
    if y.dtype != x.dtype:
        raise ValueError(f"pair_dot: y must be of dtype {x.dtype} as x, got {y.dtype}")
    y = _checked("pair_dot: y", y, (images, outputs, channels), x.dtype)
    assign = _dense("pair_dot: assign", index.assign, (images, tokens))
    out = x.new_empty((images, tokens), dtype=acc_dtype(x))
    launch = _pair_dot_plan(
        arch(x), x.device.index, x.dtype, shape, outputs, x.stride(), y.stride()
    )
    launch(x, y, assign, out)
    return out


# ---- backward of amax, amin and prod ----


@planned
def _reduce_backward_plan(
    device: str,
    device_index: int | None,
    dtype: torch.dtype,
    shape: _Shape,
    outputs: int,
    grad_strides: _Shape,
    x_strides: _Shape,
    out_strides: _Shape,
    prod: bool,
) -> Launch:
    images, tokens, channels = shape
    channel_strides = grad_strides[2:] + x_strides[2:] + out_strides[2:]
    tile = _merging(device, dtype, images, outputs, channels, True, channel_strides)
    if prod and BEFORE_3_7:
        tile = replace(tile, block_m=max(min(tile.block_m, MOST_PROD // tile.block_n), 1))
    output_tiles = ceil_div(outputs, tile.block_m)
    # Tiles of output tokens, then tiles of input tokens, to find the dropped ones.
    rows = (output_tiles + ceil_div(tokens, tile.block_m)) * tile.block_m
    numbers = tokens, outputs, channels, *grad_strides, *x_strides, *out_strides, output_tiles
    return _launch(kernels.reduce_backward_rows, tile, images, rows, channels, numbers, PROD=prod)


def merge_reduce_backward(
    grad: Tensor, x: Tensor, out: Tensor, index: Index, reduce: str
) -> Tensor:
    """Gradient of amax, amin and prod with respect to ``x``."""
    name = "merge_reduce_backward"
    shape, dtype = x.shape, x.dtype
    images, tokens, channels = shape
    outputs = index.num_tokens
    grad = _checked(f"{name}: grad", grad, (images, outputs, channels), dtype)
    out = _checked(f"{name}: out", out, (images, outputs, channels), dtype)
    assign = _dense(f"{name}: assign", index.assign, (images, tokens))
    offsets = _dense(f"{name}: offsets", index.offsets, (images, outputs + 1))
    members = _dense(f"{name}: members", index.members, (images, tokens))
    grad_x = x.new_empty(shape)
    suffix = None
    if reduce == "prod":
        suffix = grad_x if dtype == acc_dtype(x) else x.new_empty(shape, dtype=acc_dtype(x))
    launch = _reduce_backward_plan(
        arch(x), x.device.index, dtype, shape, outputs, grad.stride(), x.stride(), out.stride(),
        reduce == "prod",
    )  # fmt: skip
    launch(grad, x, out, assign, offsets, members, suffix, grad_x)
    return grad_x


# ---- invert and compose ----


@planned
def _invert_plan(
    device: str, device_index: int | None, images: int, tokens: int, middle: int, outputs: int
) -> Launch:
    size = power_of_two(tokens + outputs + 1, 16)
    settings = Settings(size, 1, max(1, min(size // 128, 16)), 1)
    return Launch(kernels.invert_image, (images,), (tokens, middle, outputs), settings, SIZE=size)


def invert(assign: Tensor, num_tokens: int) -> Inverse:
    """The members of each output token in CSR form."""
    images, tokens = assign.shape
    if tokens + num_tokens >= SORTED:
        return _invert_by_sort(assign, num_tokens)
    assign = _dense("invert: assign", assign, (images, tokens))
    offsets = assign.new_empty((images, num_tokens + 1))
    members = assign.new_empty((images, tokens))
    launch = _invert_plan(arch(assign), assign.device.index, images, tokens, tokens, num_tokens)
    launch(assign, None, None, offsets, members)
    return Inverse(offsets, members)


def compose(assign: Tensor, earlier: Tensor, num_tokens: int) -> Index:
    """The map through ``earlier`` and ``assign``."""
    images, tokens = earlier.shape
    middle = assign.shape[1]
    if tokens + num_tokens >= SORTED:
        composed = common.compose_assign(assign, earlier, num_tokens)
        return Index(composed, *_invert_by_sort(composed, num_tokens))
    assign = _dense("compose: assign", assign, (images, middle))
    earlier = _dense("compose: earlier", earlier, (images, tokens))
    composed = earlier.new_empty((images, tokens))
    offsets = earlier.new_empty((images, num_tokens + 1))
    members = earlier.new_empty((images, tokens))
    launch = _invert_plan(arch(assign), assign.device.index, images, tokens, middle, num_tokens)
    launch(assign, earlier, composed, offsets, members)
    return Index(composed, offsets, members)


def _invert_by_sort(assign: Tensor, num_tokens: int) -> Inverse:
    """:func:`invert` by PyTorch's sort, for maps of any size."""
    live = (assign >= 0) & (assign < num_tokens)
    slot, order = torch.where(live, assign, num_tokens).sort(dim=1, stable=True)
    slots = torch.arange(num_tokens + 1, dtype=slot.dtype, device=slot.device)
    slots = slots.repeat(slot.shape[0], 1)
    offsets = torch.searchsorted(slot, slots, out_int32=True)  # the first token of each slot
    return Inverse(offsets, torch.where(slot < num_tokens, order, -1).int())
