# SPDX-License-Identifier: Apache-2.0
"""Kernels of merging: each writes every element of its result once, without atomics.

A program works on a tile of BLOCK_M rows by BLOCK_C channels of one image. It reduces the segments
of all its rows side by side, in ascending order of the members. Indices come from users: each one
is clamped or masked.

Letters: N tokens in, M tokens out, C channels; m and n index output and input tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- tiles, segments, rows ----


@triton.jit
def _tile(row_tiles, column_tiles, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, first row, column of tiles, and channels of a program."""
    pid = tl.program_id(0)
    column = pid % column_tiles
    tile = pid // column_tiles
    offs_c = column * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tile // row_tiles).to(tl.int64), (tile % row_tiles) * BLOCK_M, column, offs_c


@triton.jit
def _segment(offsets, m, mask_m, N):
    """Start and number of members of output tokens, clamped to ``members``."""
    start = tl.load(offsets + m, mask=mask_m, other=0)
    end = tl.load(offsets + m + 1, mask=mask_m, other=0)
    start = tl.minimum(tl.maximum(start, 0), N)
    end = tl.minimum(tl.maximum(end, start), N)
    return start, end - start  # [BLOCK_M]


@triton.jit
def _member(members, start, count, k, N):
    """The k-th member of each output token, and whether there is one."""
    # Always true, since k >= 0; without it the compiler spills registers of some kernels.
    true = start + k >= start
    n = tl.load(members + start + k, mask=true & (k < count), other=-1)
    return n, (n >= 0) & (n < N)  # [BLOCK_M]


@triton.jit
def _output_of(assign, n, mask_n, M):
    """Output token of input tokens, and whether there is one."""
    m = tl.load(assign + n, mask=mask_n, other=-1)
    return m, (m >= 0) & (m < M)  # [BLOCK_M]


@triton.jit
def _load(base, row, mask_m, row_stride, offs_c, stride, mask_c, OTHER: tl.constexpr):
    """Rows of a matrix; ``OTHER`` where a mask is false."""
    at = row.to(tl.int64)[:, None] * row_stride + (offs_c.to(tl.int64) * stride)[None, :]
    return tl.load(base + at, mask=mask_m[:, None] & mask_c[None, :], other=OTHER)


@triton.jit
def _store(base, row, mask_m, C, offs_c, mask_c, values):
    at = row.to(tl.int64)[:, None] * C + offs_c[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(base + at, values, mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def _upcast(values):
    """Values in the dtype of sums: float64 stays, others become float32."""
    if values.dtype == tl.float64:
        return values
    else:  # noqa: RET505 - the compiler takes one branch of a constant condition
        return values.to(tl.float32)


# ---- merge and merge_wavg ----


@triton.jit
def _accumulate(acc, total, value, weight, factor, REDUCE: tl.constexpr):
    """Reduce one more member, which may be NaN, and sum its weight."""
    value = _upcast(value)
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
def _load_member(
    x, weight, members, start, count, k, N, row_stride, offs_c, stride, mask_c,
    OTHER: tl.constexpr,
):  # fmt: skip
    """The k-th member of each output token in its own dtype, and its weight."""
    n, live = _member(members, start, count, k, N)
    value = _load(x, n, live, row_stride, offs_c, stride, mask_c, OTHER)
    if weight is None:
        return value, live
    else:  # noqa: RET505
        return value, tl.load(weight + n, mask=live, other=0)


@triton.jit
def merge_rows(
    x, offsets, members, weight, scale, out, total_out,
    N, M, C, image_stride, row_stride, stride, row_tiles, column_tiles,
    REDUCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[m] = scale[m] * reduction of weight[n] * x[n] over the members n of m``, or a mean."""
    image, first, column, offs_c = _tile(row_tiles, column_tiles, BLOCK_M, BLOCK_C)
    m = first + tl.arange(0, BLOCK_M)
    mask_m, mask_c = m < M, offs_c < C
    start, count = _segment(offsets + image * (M + 1), m, mask_m, N)
    x += image * image_stride
    members += image * N
    # The identity of the reduction stands for missing members.
    IDENTITY: tl.constexpr = (
        float("-inf") if REDUCE == "amax" else float("inf") if REDUCE == "amin"
        else 1.0 if REDUCE == "prod" else 0.0
    )  # fmt: skip
    acc = _upcast(tl.full([BLOCK_M, BLOCK_C], IDENTITY, x.dtype.element_ty))
    total = tl.zeros([BLOCK_M], acc.dtype)
    if weight is not None:
        weight += image * N
    # Load two members ahead: the compiler would wait for each load that is used immediately.
    a, a_weight = _load_member(
        x, weight, members, start, count, 0, N, row_stride, offs_c, stride, mask_c, IDENTITY
    )  # fmt: skip
    b, b_weight = _load_member(
        x, weight, members, start, count, 1, N, row_stride, offs_c, stride, mask_c, IDENTITY
    )  # fmt: skip
    for k in range(2, tl.max(count, 0) + 2, 2):
        acc, total = _accumulate(acc, total, a, weight, a_weight, REDUCE)
        a, a_weight = _load_member(
            x, weight, members, start, count, k, N, row_stride, offs_c, stride, mask_c, IDENTITY
        )  # fmt: skip
        acc, total = _accumulate(acc, total, b, weight, b_weight, REDUCE)
        b, b_weight = _load_member(
            x, weight, members, start, count, k + 1, N, row_stride, offs_c, stride, mask_c,
            IDENTITY,
        )  # fmt: skip
    if REDUCE == "mean":
        acc /= tl.maximum(count, 1).to(acc.dtype)[:, None]
    if REDUCE == "wavg":
        if weight is None:
            total = count.to(acc.dtype)
        empty = (total == 0)[:, None]
        acc = tl.where(empty, 0, acc / tl.where(empty, 1, total[:, None]))
        once = m < tl.where(column == 0, M, 0)
        tl.store(total_out + image * M + m, total, mask=once)
    if REDUCE == "amax" or REDUCE == "amin" or REDUCE == "prod":
        acc = tl.where((count > 0)[:, None], acc, 0)
    if scale is not None:
        acc *= tl.load(scale + image * M + m, mask=mask_m, other=0)[:, None]
    _store(out + image * M * C, m, mask_m, C, offs_c, mask_c, acc)


# ---- unmerge and pair_dot ----


@triton.jit
def unmerge_rows(
    y, assign, offsets, weight, scale, residual, out,
    N, M, C, image_stride, row_stride, stride,
    residual_image_stride, residual_row_stride, residual_stride, row_tiles, column_tiles,
    MEAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n] = weight[n] * scale[m] * y[m] + residual[n]`` with ``m = assign[n]``."""
    image, first, _column, offs_c = _tile(row_tiles, column_tiles, BLOCK_M, BLOCK_C)
    n = first + tl.arange(0, BLOCK_M)
    mask_n, mask_c = n < N, offs_c < C
    m, live = _output_of(assign + image * N, n, mask_n, M)
    y += image * image_stride
    values = _load(y, m, live, row_stride, offs_c, stride, mask_c, 0)
    if MEAN:
        _start, count = _segment(offsets + image * (M + 1), m, live, N)
        values = _upcast(values)
        values /= tl.maximum(count, 1).to(values.dtype)[:, None]
    if scale is not None:
        values = _upcast(values) * tl.load(scale + image * M + m, mask=live, other=0)[:, None]
    if weight is not None:
        values = _upcast(values) * tl.load(weight + image * N + n, mask=live, other=0)[:, None]
    if residual is not None:
        residual += image * residual_image_stride
        added = _load(
            residual, n, mask_n, residual_row_stride, offs_c, residual_stride, mask_c, 0
        )  # fmt: skip
        values = _upcast(values) + _upcast(added)
    _store(out + image * N * C, n, mask_n, C, offs_c, mask_c, values)


@triton.jit
def pair_dot_rows(
    x, y, assign, out, N, M, C,
    x_image_stride, x_row_stride, x_stride, y_image_stride, y_row_stride, y_stride,
    row_tiles, column_tiles, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out[n] = sum_c x[n, c] * y[m, c]`` with ``m = assign[n]``; 0 for dropped tokens."""
    image, first, _column, offs_c = _tile(row_tiles, column_tiles, BLOCK_M, BLOCK_C)
    n = first + tl.arange(0, BLOCK_M)
    mask_n = n < N
    m, live = _output_of(assign + image * N, n, mask_n, M)
    x += image * x_image_stride
    y += image * y_image_stride
    acc = _upcast(tl.zeros([BLOCK_M, BLOCK_C], x.dtype.element_ty))
    a = _load(x, n, live, x_row_stride, offs_c, x_stride, offs_c < C, 0)
    b = _load(y, m, live, y_row_stride, offs_c, y_stride, offs_c < C, 0)
    for _ in range(0, C, BLOCK_C):
        offs_c += BLOCK_C
        acc += _upcast(a) * _upcast(b)
        a = _load(x, n, live, x_row_stride, offs_c, x_stride, offs_c < C, 0)
        b = _load(y, m, live, y_row_stride, offs_c, y_stride, offs_c < C, 0)
    tl.store(out + image * N + n, tl.sum(acc, 1), mask=mask_n)


# ---- backward of amax, amin and prod ----


@triton.jit
def reduce_backward_rows(
    grad, x, out, assign, offsets, members, suffix, grad_x,
    N, M, C, grad_image_stride, grad_row_stride, grad_stride,
    x_image_stride, x_row_stride, x_stride, out_image_stride, out_row_stride, out_stride,
    output_tiles, row_tiles, column_tiles,
    PROD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the members of a tile of output tokens, or zeros for dropped tokens.

    The first ``output_tiles`` tiles of an image are output tokens, the other ones are input tokens.
    Only output token ``assign[n]`` writes row n, even if ``members`` lists a token twice. For prod,
    ``suffix`` [N, C] holds the product of all later members of the segment.
    """
    image, first, _column, offs_c = _tile(row_tiles, column_tiles, BLOCK_M, BLOCK_C)
    mask_c = offs_c < C
    assign += image * N
    grad_x += image * N * C
    row = tl.arange(0, BLOCK_M)
    if first < output_tiles * BLOCK_M:
        m = first + row
        mask_m = m < M
        start, count = _segment(offsets + image * (M + 1), m, mask_m, N)
        most = tl.max(count, 0)
        members += image * N
        x += image * x_image_stride
        grad_m = _load(
            grad + image * grad_image_stride, m, mask_m, grad_row_stride, offs_c, grad_stride,
            mask_c, 0,
        )  # fmt: skip
        grad_m = _upcast(grad_m)  # [BLOCK_M, BLOCK_C]
        if PROD:
            suffix += image * N * C
            product = tl.full([BLOCK_M, BLOCK_C], 1, grad_m.dtype)
            for back in range(most):
                n, live = _member(members, start, count, most - 1 - back, N)
                to, _live = _output_of(assign, n, live, M)
                _store(suffix, n, live & (to == m), C, offs_c, mask_c, product)
                product *= _upcast(_load(x, n, live, x_row_stride, offs_c, x_stride, mask_c, 1))
            tl.debug_barrier()  # threads read what other threads stored to suffix
            product = tl.full([BLOCK_M, BLOCK_C], 1, grad_m.dtype)
            for k in range(most):
                n, live = _member(members, start, count, k, N)
                to, _live = _output_of(assign, n, live, M)
                own = live & (to == m)
                others = product * _load(suffix, n, own, C, offs_c, 1, mask_c, 0)
                _store(grad_x, n, own, C, offs_c, mask_c, grad_m * others)
                product *= _upcast(_load(x, n, live, x_row_stride, offs_c, x_stride, mask_c, 1))
        else:
            result = _load(
                out + image * out_image_stride, m, mask_m, out_row_stride, offs_c, out_stride,
                mask_c, 0,
            )  # fmt: skip
            ties = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
            for k in range(most):
                n, live = _member(members, start, count, k, N)
                member = _load(x, n, live, x_row_stride, offs_c, x_stride, mask_c, 0)
                same = (member == result) | ((member != member) & (result != result))
                ties += (same & live[:, None]).to(tl.int32)
            share = grad_m / tl.maximum(ties, 1).to(grad_m.dtype)
            for k in range(most):
                n, live = _member(members, start, count, k, N)
                to, _live = _output_of(assign, n, live, M)
                member = _load(x, n, live, x_row_stride, offs_c, x_stride, mask_c, 0)
                same = (member == result) | ((member != member) & (result != result))
                part = tl.where(same, share, 0)
                _store(grad_x, n, live & (to == m), C, offs_c, mask_c, part)
    else:
        n = first - output_tiles * BLOCK_M + row
        mask_n = n < N
        _to, live = _output_of(assign, n, mask_n, M)
        zeros = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        _store(grad_x, n, mask_n & ~live, C, offs_c, mask_c, zeros)


# ---- invert ----


@triton.jit
def invert_image(assign, earlier, composed, offsets, members, N, MIDDLE, M, SIZE: tl.constexpr):
    """Sort the input tokens of an image by output token, and write the map in CSR form.

    Each output token has a sentinel, which is sorted before its members; dropped tokens have one,
    too. The position of an element less the sentinels before it is its position in CSR form: for a
    sentinel an offset, for a token its index in ``members``. With ``earlier`` (indices into MIDDLE
    tokens), the map is composed first.
    """
    image = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    n = at
    mask_n = at < N
    if earlier is not None:
        n = tl.load(earlier + image * N + at, mask=mask_n, other=-1)
        mask_n = (n >= 0) & (n < MIDDLE)
    slot = tl.load(assign + image * MIDDLE + n, mask=mask_n, other=-1)
    live = (slot >= 0) & (slot < M)
    if composed is not None:
        tl.store(composed + image * N + at, tl.where(live, slot, -1), mask=at < N)
    slot = tl.where(live, slot, M)  # slot M is for dropped tokens
    sentinel = at - N
    key = tl.where(at < N, slot * SIZE + at + 1, sentinel * SIZE)
    key = tl.sort(tl.where(sentinel <= M, key, 2147483647))
    slot = key // SIZE
    token = key % SIZE - 1
    is_sentinel = token < 0
    mask = at <= N + M
    tl.store(offsets + image * (M + 1) + slot, at - slot, mask=mask & is_sentinel)
    member = tl.where(slot < M, token, -1)
    tl.store(members + image * N + at - slot - 1, member, mask=mask & (token >= 0))
