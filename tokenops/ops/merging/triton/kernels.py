# SPDX-License-Identifier: Apache-2.0
"""Kernels of merging: each writes every element of its result once, by no atomics.

A program works on a tile of rows by channels of one image and goes through the members of all its
rows side by side, in ascending order. Indices come from users: each one is clamped or masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- where a program works ----


@triton.jit
def _place(tiles, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, first row and block of channels of a program, and its channels."""
    program = tl.program_id(0)
    block = program % blocks
    tile = program // blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    return (tile // tiles).to(tl.int64), (tile % tiles) * ROWS, block, column


@triton.jit
def _groups(offsets, m, keep, tokens):
    """Start and number of the members of output tokens; within ``members`` at any rate."""
    start = tl.load(offsets + m, mask=keep, other=0)
    end = tl.load(offsets + m + 1, mask=keep, other=0)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(end, start), tokens)
    return start, end - start  # [rows]


@triton.jit
def _member(members, start, count, k, tokens):
    """The k-th member of each output token, and whether there is one."""
    # Always so, as k is not negative; without it the compiler spills a register of some kernels.
    here = start + k >= start
    n = tl.load(members + start + k, mask=here & (k < count), other=-1)
    return n, (n >= 0) & (n < tokens)  # [rows]


@triton.jit
def _load(base, row, live, row_stride, column, stride, inside, OTHER: tl.constexpr):
    """Rows of a matrix, and another value where they are not live and past its channels."""
    at = row.to(tl.int64)[:, None] * row_stride + (column.to(tl.int64) * stride)[None, :]
    return tl.load(base + at, mask=live[:, None] & inside[None, :], other=OTHER)


@triton.jit
def _store(base, row, live, channels, column, inside, values):
    at = row.to(tl.int64)[:, None] * channels + column[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(base + at, values, mask=live[:, None] & inside[None, :])


@triton.jit
def _wide(values):
    """Values in the type of sums."""
    if values.dtype == tl.float64:
        return values
    else:  # noqa: RET505 - what is constant decides which one is compiled
        return values.to(tl.float32)


# ---- merge and merge_wavg ----


@triton.jit
def _fold(acc, total, value, weight, factor, REDUCE: tl.constexpr):
    """One member more; NaN stays NaN. Weights are summed up beside."""
    value = _wide(value)
    if weight is not None:
        value *= factor[:, None]
        total += factor
    if REDUCE == "prod":
        acc *= value
    elif REDUCE == "amax":
        acc = tl.where((value > acc) | (value != value), value, acc)
    elif REDUCE == "amin":
        acc = tl.where((value < acc) | (value != value), value, acc)
    else:
        acc += value
    return acc, total


@triton.jit
def _fetch(
    x, weight, members, start, count, k, tokens, row_stride, column, stride, inside,
    OTHER: tl.constexpr,
):  # fmt: skip
    """The k-th member of each output token as it is stored, and its weight."""
    n, live = _member(members, start, count, k, tokens)
    value = _load(x, n, live, row_stride, column, stride, inside, OTHER)
    if weight is None:
        return value, live
    else:  # noqa: RET505
        return value, tl.load(weight + n, mask=live, other=0)


@triton.jit
def merge_rows(
    x, offsets, members, weight, scale, out, total_out,
    tokens, outputs, channels, image_stride, row_stride, stride, tiles, blocks,
    REDUCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[m] = scale[m] * fold over the members n of m of weight[n] * x[n]``, or a mean."""
    image, first, block, column = _place(tiles, blocks, ROWS, COLUMNS)
    m = first + tl.arange(0, ROWS)
    keep, inside = m < outputs, column < channels
    start, count = _groups(offsets + image * (outputs + 1), m, keep, tokens)
    x += image * image_stride
    members += image * tokens
    # What leaves a fold as it is stands for a member that is not there.
    NONE: tl.constexpr = (
        float("-inf") if REDUCE == "amax" else float("inf") if REDUCE == "amin"
        else 1.0 if REDUCE == "prod" else 0.0
    )  # fmt: skip
    acc = _wide(tl.full([ROWS, COLUMNS], NONE, x.dtype.element_ty))
    total = tl.zeros([ROWS], acc.dtype)
    if weight is not None:
        weight += image * tokens
    # Two members are on their way while the ones before are added; loads that are used at once
    # would be put one after the other.
    a, a_weight = _fetch(
        x, weight, members, start, count, 0, tokens, row_stride, column, stride, inside, NONE
    )  # fmt: skip
    b, b_weight = _fetch(
        x, weight, members, start, count, 1, tokens, row_stride, column, stride, inside, NONE
    )  # fmt: skip
    for k in range(2, tl.max(count, 0) + 2, 2):
        acc, total = _fold(acc, total, a, weight, a_weight, REDUCE)
        a, a_weight = _fetch(
            x, weight, members, start, count, k, tokens, row_stride, column, stride, inside, NONE
        )  # fmt: skip
        acc, total = _fold(acc, total, b, weight, b_weight, REDUCE)
        b, b_weight = _fetch(
            x, weight, members, start, count, k + 1, tokens, row_stride, column, stride, inside,
            NONE,
        )  # fmt: skip
    if REDUCE == "mean":
        acc /= tl.maximum(count, 1).to(acc.dtype)[:, None]
    if REDUCE == "wavg":
        if weight is None:
            total = count.to(acc.dtype)
        empty = (total == 0)[:, None]
        acc = tl.where(empty, 0, acc / tl.where(empty, 1, total[:, None]))
        once = m < tl.where(block == 0, outputs, 0)
        tl.store(total_out + image * outputs + m, total, mask=once)
    if REDUCE == "amax" or REDUCE == "amin" or REDUCE == "prod":
        acc = tl.where((count > 0)[:, None], acc, 0)
    if scale is not None:
        acc *= tl.load(scale + image * outputs + m, mask=keep, other=0)[:, None]
    _store(out + image * outputs * channels, m, keep, channels, column, inside, acc)


# ---- unmerge and pair_dot ----


@triton.jit
def _target(assign, n, keep, outputs):
    """Output token of input tokens, and whether they have one."""
    m = tl.load(assign + n, mask=keep, other=-1)
    return m, (m >= 0) & (m < outputs)  # [rows]


@triton.jit
def unmerge_rows(
    y, assign, offsets, weight, scale, residual, out,
    tokens, outputs, channels, image_stride, row_stride, stride,
    residual_image_stride, residual_row_stride, residual_stride, tiles, blocks,
    MEAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[n] = weight[n] * scale[m] * y[m] + residual[n]`` with ``m = assign[n]``."""
    image, first, _block, column = _place(tiles, blocks, ROWS, COLUMNS)
    n = first + tl.arange(0, ROWS)
    keep, inside = n < tokens, column < channels
    m, live = _target(assign + image * tokens, n, keep, outputs)
    y += image * image_stride
    values = _load(y, m, live, row_stride, column, stride, inside, 0)
    if MEAN:
        _start, count = _groups(offsets + image * (outputs + 1), m, live, tokens)
        values = _wide(values)
        values /= tl.maximum(count, 1).to(values.dtype)[:, None]
    if scale is not None:
        values = _wide(values) * tl.load(scale + image * outputs + m, mask=live, other=0)[:, None]
    if weight is not None:
        values = _wide(values) * tl.load(weight + image * tokens + n, mask=live, other=0)[:, None]
    if residual is not None:
        residual += image * residual_image_stride
        added = _load(
            residual, n, keep, residual_row_stride, column, residual_stride, inside, 0
        )  # fmt: skip
        values = _wide(values) + _wide(added)
    _store(out + image * tokens * channels, n, keep, channels, column, inside, values)


@triton.jit
def pair_dot_rows(
    x, y, assign, out, tokens, outputs, channels,
    x_image_stride, x_row_stride, x_stride, y_image_stride, y_row_stride, y_stride, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``out[n] = sum_c x[n, c] * y[m, c]`` with ``m = assign[n]``; 0 for dropped tokens."""
    image, first, _block, column = _place(tiles, 1, ROWS, COLUMNS)
    n = first + tl.arange(0, ROWS)
    keep = n < tokens
    m, live = _target(assign + image * tokens, n, keep, outputs)
    x += image * x_image_stride
    y += image * y_image_stride
    acc = _wide(tl.zeros([ROWS, COLUMNS], x.dtype.element_ty))
    a = _load(x, n, live, x_row_stride, column, x_stride, column < channels, 0)
    b = _load(y, m, live, y_row_stride, column, y_stride, column < channels, 0)
    for _ in range(0, channels, COLUMNS):
        column += COLUMNS
        acc += _wide(a) * _wide(b)
        a = _load(x, n, live, x_row_stride, column, x_stride, column < channels, 0)
        b = _load(y, m, live, y_row_stride, column, y_stride, column < channels, 0)
    tl.store(out + image * tokens + n, tl.sum(acc, 1), mask=keep)


# ---- backward of amax, amin and prod ----


@triton.jit
def reduce_backward_rows(
    grad, x, best, assign, offsets, members, after, out,
    tokens, outputs, channels, grad_image_stride, grad_row_stride, grad_stride,
    x_image_stride, x_row_stride, x_stride, best_image_stride, best_row_stride, best_stride,
    group_tiles, tiles, blocks, PROD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the members of a tile of output tokens, or zeros for dropped tokens.

    A row is written by the output token that ``assign`` names alone, whatever ``members`` holds. Of
    products, ``after`` [tokens, channels] keeps those of all later members in between.
    """
    image, first, _block, column = _place(tiles, blocks, ROWS, COLUMNS)
    inside = column < channels
    assign += image * tokens
    out += image * tokens * channels
    row = tl.arange(0, ROWS)
    if first < group_tiles * ROWS:
        m = first + row
        keep = m < outputs
        start, count = _groups(offsets + image * (outputs + 1), m, keep, tokens)
        most = tl.max(count, 0)
        members += image * tokens
        x += image * x_image_stride
        slope = _load(
            grad + image * grad_image_stride, m, keep, grad_row_stride, column, grad_stride,
            inside, 0,
        )  # fmt: skip
        slope = _wide(slope)  # [rows, columns]
        if PROD:
            after += image * tokens * channels
            product = tl.full([ROWS, COLUMNS], 1, slope.dtype)
            for back in range(most):
                n, live = _member(members, start, count, most - 1 - back, tokens)
                to, _there = _target(assign, n, live, outputs)
                _store(after, n, live & (to == m), channels, column, inside, product)
                product *= _wide(_load(x, n, live, x_row_stride, column, x_stride, inside, 1))
            tl.debug_barrier()
            product = tl.full([ROWS, COLUMNS], 1, slope.dtype)
            for k in range(most):
                n, live = _member(members, start, count, k, tokens)
                to, _there = _target(assign, n, live, outputs)
                own = live & (to == m)
                others = product * _load(after, n, own, channels, column, 1, inside, 0)
                _store(out, n, own, channels, column, inside, slope * others)
                product *= _wide(_load(x, n, live, x_row_stride, column, x_stride, inside, 1))
        else:
            value = _load(
                best + image * best_image_stride, m, keep, best_row_stride, column, best_stride,
                inside, 0,
            )  # fmt: skip
            ties = tl.zeros([ROWS, COLUMNS], tl.int32)
            for k in range(most):
                n, live = _member(members, start, count, k, tokens)
                member = _load(x, n, live, x_row_stride, column, x_stride, inside, 0)
                same = (member == value) | ((member != member) & (value != value))
                ties += (same & live[:, None]).to(tl.int32)
            share = slope / tl.maximum(ties, 1).to(slope.dtype)
            for k in range(most):
                n, live = _member(members, start, count, k, tokens)
                to, _there = _target(assign, n, live, outputs)
                member = _load(x, n, live, x_row_stride, column, x_stride, inside, 0)
                same = (member == value) | ((member != member) & (value != value))
                part = tl.where(same, share, 0)
                _store(out, n, live & (to == m), channels, column, inside, part)
    else:
        n = first - group_tiles * ROWS + row
        keep = n < tokens
        _to, live = _target(assign, n, keep, outputs)
        zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
        _store(out, n, keep & ~live, channels, column, inside, zeros)


# ---- invert ----


@triton.jit
def invert_image(
    assign, earlier, composed, offsets, members, tokens, middle, outputs, SIZE: tl.constexpr
):
    """Sort input tokens by output token, with a mark before the first one of each.

    A place behind so many marks is behind so many marks too many; a mark's place, without the
    marks before it, is an offset. Tokens may first go through another map, ``earlier``.
    """
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    through = at
    there = at < tokens
    if earlier is not None:
        through = tl.load(earlier + image * tokens + at, mask=there, other=-1)
        there = (through >= 0) & (through < middle)
    slot = tl.load(assign + image * middle + through, mask=there, other=-1)
    live = (slot >= 0) & (slot < outputs)
    if composed is not None:
        tl.store(composed + image * tokens + at, tl.where(live, slot, -1), mask=at < tokens)
    slot = tl.where(live, slot, outputs)  # the last one if dropped
    mark = at - tokens
    key = tl.where(at < tokens, slot * SIZE + at + 1, mark * SIZE)
    key = tl.sort(tl.where(mark <= outputs, key, 2147483647))
    slot = key // SIZE
    token = key % SIZE - 1
    is_mark = token < 0
    here = at <= tokens + outputs
    tl.store(offsets + image * (outputs + 1) + slot, at - slot, mask=here & is_mark)
    member = tl.where(slot < outputs, token, -1)
    tl.store(members + image * tokens + at - slot - 1, member, mask=here & (token >= 0))
