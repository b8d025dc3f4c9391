# SPDX-License-Identifier: Apache-2.0
"""Kernels that find, for each source, the most similar candidate.

A candidate that takes no part (masked, protected, past the end) has similarity NaN to every source:
``score > best`` is false for NaN, so the loops need no other test. Each element of a tile keeps its
best score and the number of the tile that had it, so that a score costs one comparison and two
selects; the elements of a row are compared once, at the end.

Letters: Na sources, Nb candidates, D width. Rows come in one of three forms, INPUT:

- ``EXACT``: rows of one head in half precision, as they are. Tensor cores multiply them exactly; a
  candidate's inverse length scales each of its scores, a source's scales only the largest one.
- ``MEAN``: rows in any precision; the kernel averages their heads and divides by their lengths.
- ``PREPARED``: contiguous, padded rows that ``prepare`` wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = tl.constexpr(0)
MEAN = tl.constexpr(1)
PREPARED = tl.constexpr(2)

NONE = tl.constexpr(2**31 - 1)  # the index of no candidate: the largest, for minima


@triton.jit
def _inverse_length(squares):
    """One over the root of a sum of squares, 0 for a row of length zero."""
    zero = squares == 0
    if squares.dtype == tl.float64:
        inverse = 1 / tl.sqrt(tl.where(zero, 1, squares))
    else:  # the approximate root flushes the smallest squares to 0
        tiny = squares < 2.0**-100
        inverse = tl.rsqrt(tl.where(zero, 1, tl.where(tiny, squares * 2.0**100, squares)))
        inverse = tl.where(tiny, inverse * 2.0**50, inverse)
    return tl.where(zero, 0, inverse)


@triton.jit
def tokens_of(index, image, index_b, index_n, offs, count, tokens, run, step, first):
    """Token of each source or candidate: from a list, or by the formula of a Side."""
    if index is not None:
        pointers = index + image * index_b + offs.to(tl.int64) * index_n
        token = tl.load(pointers, mask=offs < count, other=0).to(tl.int64)
        token = tl.minimum(tl.maximum(token, 0), tokens - 1)
    else:
        token = offs * step + first
        if run is not None:
            token += offs // run
        token = token.to(tl.int64)
    return token


@triton.jit
def _takes_part(mask, image, mask_b, mask_n, token, inside, prefix, PROTECTED: tl.constexpr):
    """Whether a candidate takes part: it is neither in the prefix nor masked out."""
    takes_part = inside & (token >= prefix)
    if mask is not None:
        masked = tl.load(mask + image * mask_b + token * mask_n, mask=inside, other=0) != 0
        takes_part = takes_part & (masked != PROTECTED)
    return takes_part


@triton.jit
def _factor(
    squares, mask, image, mask_b, mask_n, token, inside, prefix,
    COSINE: tl.constexpr, PROTECTED: tl.constexpr,
):  # fmt: skip
    """Factor of a candidate's scores: 1 or its inverse length; NaN if it takes no part."""
    factor = tl.full(squares.shape, 1, squares.dtype)
    if COSINE:
        factor = _inverse_length(squares)
    takes_part = _takes_part(mask, image, mask_b, mask_n, token, inside, prefix, PROTECTED)
    return tl.where(takes_part, factor, float("nan"))


@triton.jit
def _mean(pointers, head_stride, heads, mask, ACC: tl.constexpr):
    """Mean of rows over their heads, 0 where the mask is false."""
    total = tl.zeros(mask.shape, ACC)
    for _ in range(heads):
        total += tl.load(pointers, mask=mask, other=0).to(ACC)
        pointers += head_stride
    return total / heads


@triton.jit
def prepare(
    x, index, mask, rows, inverse,
    count, padded, tokens, width, padded_width, heads, x_b, x_h, x_n,
    index_b, index_n, mask_b, mask_n, run, step, first, prefix,
    COSINE: tl.constexpr, PROTECTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write scaled rows, or inverse lengths if ``rows`` is None; NaN where one takes no part."""
    tiles = tl.cdiv(padded, BLOCK_M)
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = offs_m < count
    token = tokens_of(index, image, index_b, index_n, offs_m, count, tokens, run, step, first)
    takes_part = _takes_part(mask, image, mask_b, mask_n, token, inside, prefix, PROTECTED)
    x_rows = x + image * x_b + token[:, None] * x_n  # [BLOCK_M, 1]
    offs_d = tl.arange(0, BLOCK_D)
    ACC: tl.constexpr = tl.float32 if rows is None else rows.dtype.element_ty
    factor = tl.full([BLOCK_M], 1, ACC)
    if COSINE:
        squares = tl.zeros([BLOCK_M], ACC)
        for start_d in range(0, width, BLOCK_D):
            d = (start_d + offs_d)[None, :]
            inside_d = takes_part[:, None] & (d < width)
            value = _mean(x_rows + d, x_h, heads, inside_d, ACC)
            squares += tl.sum(value * value, 1)
        factor = _inverse_length(squares)
    factor = tl.where(takes_part, factor, float("nan"))
    offs_out = image * padded + offs_m  # [BLOCK_M]
    if rows is None:
        tl.store(inverse + offs_out, factor, mask=offs_m < padded)
    else:
        for start_d in range(0, padded_width, BLOCK_D):
            d = (start_d + offs_d)[None, :]
            inside_d = takes_part[:, None] & (d < width)
            value = _mean(x_rows + d, x_h, heads, inside_d, ACC) * factor[:, None]
            out = rows + offs_out[:, None] * padded_width + d
            tl.store(out, value, mask=(offs_m < padded)[:, None] & (d < padded_width))


@triton.jit
def _store_best(
    best, best_tile, scale, b_index, a_mask, b_mask, score, index, image, offs_m,
    Na, Nb, tokens, b_index_b, b_index_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    step, first, prefix, PROTECTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Reduce each row of a tile to its best score and candidate, and store both."""
    offs_tile = tl.arange(0, BLOCK_N)
    largest = tl.max(best, 1)  # [BLOCK_M]
    candidate = best_tile * BLOCK_N + offs_tile[None, :]
    candidate = tl.min(tl.where(best == largest[:, None], candidate, NONE), 1)
    # Where no score is above -inf: the first candidate that takes part, else -1.
    fallback = NONE
    start_n = 0
    while (fallback == NONE) & (start_n < Nb):
        offs_n = start_n + offs_tile
        inside = offs_n < Nb
        token = tokens_of(
            b_index, image, b_index_b, b_index_n, offs_n, Nb, tokens, None, step, first
        )
        takes_part = _takes_part(
            b_mask, image, b_mask_b, b_mask_n, token, inside, prefix, PROTECTED
        )
        fallback = tl.min(tl.where(takes_part, offs_n, NONE), 0)
        start_n += BLOCK_N
    fallback = tl.where(fallback == NONE, -1, fallback)
    final = largest * scale
    found = final > float("-inf")
    final = tl.where(found, final, float("-inf"))
    candidate = tl.where(found, candidate, fallback)
    if a_mask is not None:
        allowed = tl.load(
            a_mask + image * a_mask_b + offs_m.to(tl.int64) * a_mask_n, mask=offs_m < Na, other=0
        )
        final = tl.where(allowed != 0, final, float("-inf"))
        candidate = tl.where(allowed != 0, candidate, -1)
    tl.store(score + image * Na + offs_m, final, mask=offs_m < Na)
    tl.store(index + image * Na + offs_m, candidate, mask=offs_m < Na)


@triton.jit
def search_resident(
    a, b, a_index, b_index, a_mask, b_mask, inverse, score, index,
    Na, Nb, padded, tokens, width, heads, a_b, a_h, a_n, b_b, b_h, b_n,
    a_index_b, a_index_n, b_index_b, b_index_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    run, step, first, prefix,
    INPUT: tl.constexpr, COSINE: tl.constexpr, PROTECTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Search with a tile of sources kept on the chip; candidates come in tiles of whole rows."""
    ACC: tl.constexpr = score.dtype.element_ty
    tiles_m = tl.cdiv(Na, BLOCK_M)
    pid = tl.program_id(0)
    image = (pid // tiles_m).to(tl.int64)
    offs_m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_tile = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]

    if INPUT == PREPARED:
        a_token = offs_m.to(tl.int64)
    else:
        a_token = tokens_of(a_index, image, a_index_b, a_index_n, offs_m, Na, tokens, run, 1, 0)
    a_ptrs = a + image * a_b + a_token[:, None] * a_n + offs_d  # [BLOCK_M, BLOCK_D]
    sources = ()
    a_squares = tl.zeros([BLOCK_M], ACC)
    for c in tl.static_range(BLOCKS_D):
        inside_a = (offs_m < Na)[:, None]
        if not FULL:
            inside_a = inside_a & (c * BLOCK_D + offs_d < width)
        if INPUT == MEAN:
            a_rows = _mean(a_ptrs, a_h, heads, inside_a & (offs_d < BLOCK_D), ACC)
        else:
            a_rows = tl.load(a_ptrs, mask=inside_a, other=0)
        if COSINE and INPUT != PREPARED:
            a_rows_acc = a_rows.to(ACC)
            a_squares += tl.sum(a_rows_acc * a_rows_acc, 1)
        sources += (a_rows,)  # type: ignore[assignment]
        a_ptrs += BLOCK_D
    scale = tl.full([BLOCK_M], 1, ACC)
    if COSINE and INPUT == EXACT:
        scale = _inverse_length(a_squares)
    if COSINE and INPUT == MEAN:
        sources = (a_rows * _inverse_length(a_squares)[:, None],)  # type: ignore[assignment]

    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), ACC)
    best_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    offs_n = offs_tile
    if INPUT == PREPARED:
        b_token = offs_n.to(tl.int64)
    else:
        b_token = tokens_of(
            b_index, image, b_index_b, b_index_n, offs_n, Nb, tokens, None, step, first
        )
    b_base = b + image * b_b + offs_d  # [1, BLOCK_D]
    b_ptrs = b_base + b_token[:, None] * b_n  # [BLOCK_N, BLOCK_D]
    tile_stride = tl.cast(step, tl.int64) * BLOCK_N * b_n
    if INPUT == PREPARED:
        tile_stride = tl.cast(b_n, tl.int64) * BLOCK_N
    for tile in range(tl.cdiv(Nb, BLOCK_N)):
        inside = offs_n < Nb
        scores = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        b_squares = tl.zeros([BLOCK_N], ACC)
        for c in tl.static_range(BLOCKS_D):
            inside_b = inside[:, None]
            if not FULL:
                inside_b = inside_b & (c * BLOCK_D + offs_d < width)
            if INPUT == MEAN:
                b_rows = _mean(b_ptrs, b_h, heads, inside_b & (offs_d < BLOCK_D), ACC)
            elif INPUT == PREPARED:
                b_rows = tl.load(b_ptrs)
            else:
                b_rows = tl.load(b_ptrs + c * BLOCK_D, mask=inside_b, other=0)
            if COSINE and (INPUT == MEAN or (INPUT == EXACT and inverse is None)):
                b_rows_acc = b_rows.to(ACC)
                b_squares += tl.sum(b_rows_acc * b_rows_acc, 1)
            if INPUT == MEAN:
                factor = _factor(
                    b_squares, b_mask, image, b_mask_b, b_mask_n, b_token, inside, prefix,
                    COSINE, PROTECTED,
                )  # fmt: skip
                b_rows *= factor[:, None]
            scores = tl.dot(sources[c], tl.trans(b_rows), scores, input_precision=PRECISION)
        if INPUT == EXACT:
            if inverse is None:
                factor = _factor(
                    b_squares, b_mask, image, b_mask_b, b_mask_n, b_token, inside, prefix,
                    COSINE, PROTECTED,
                )  # fmt: skip
            else:
                factor = tl.load(inverse + image * padded + offs_n)
            scores *= factor[None, :]
        better = scores > best
        best = tl.where(better, scores, best)
        best_tile = tl.where(better, tile, best_tile)
        offs_n += BLOCK_N
        if b_index is not None and INPUT != PREPARED:
            b_token = tokens_of(
                b_index, image, b_index_b, b_index_n, offs_n, Nb, tokens, None, step, first
            )
            b_ptrs = b_base + b_token[:, None] * b_n
        else:
            b_token += BLOCK_N * step
            b_ptrs += tile_stride
    _store_best(
        best, best_tile, scale, b_index, a_mask, b_mask, score, index, image, offs_m,
        Na, Nb, tokens, b_index_b, b_index_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
        step, first, prefix, PROTECTED, BLOCK_N,
    )  # fmt: skip


@triton.jit
def search_streamed(
    a, b, a_index, b_index, a_mask, b_mask, inverse, score, index,
    Na, Nb, padded, tokens, width, a_b, a_n, b_b, b_n,
    a_index_b, a_index_n, b_index_b, b_index_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    run, step, first, prefix,
    INPUT: tl.constexpr, COSINE: tl.constexpr, PROTECTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Search rows of any width: both sides come in chunks, in one loop over tiles and chunks."""
    ACC: tl.constexpr = score.dtype.element_ty
    tiles_m = tl.cdiv(Na, BLOCK_M)
    pid = tl.program_id(0)
    image = (pid // tiles_m).to(tl.int64)
    offs_m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_tile = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    chunks = tl.cdiv(width, BLOCK_D)

    if INPUT == PREPARED:
        a_token = offs_m.to(tl.int64)
    else:
        a_token = tokens_of(a_index, image, a_index_b, a_index_n, offs_m, Na, tokens, run, 1, 0)
    inside_m = (offs_m < Na)[:, None]
    a_base = a + image * a_b + a_token[:, None] * a_n + offs_d  # [BLOCK_M, BLOCK_D]
    scale = tl.full([BLOCK_M], 1, ACC)
    if COSINE and INPUT == EXACT:
        squares = tl.zeros([BLOCK_M], ACC)
        for c in range(chunks):
            inside_a = inside_m & (c * BLOCK_D + offs_d < width)
            rows = tl.load(a_base + c * BLOCK_D, mask=inside_a, other=0).to(ACC)
            squares += tl.sum(rows * rows, 1)
        scale = _inverse_length(squares)

    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), ACC)
    best_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    scores = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    b_base = b + image * b_b + offs_d
    tile, chunk = 0, 0
    for _ in range(tl.cdiv(Nb, BLOCK_N) * chunks):
        offs_n = tile * BLOCK_N + offs_tile
        if INPUT == PREPARED:
            b_token = offs_n.to(tl.int64)
        else:
            b_token = tokens_of(
                b_index, image, b_index_b, b_index_n, offs_n, Nb, tokens, None, step, first
            )
        b_ptrs = b_base + b_token[:, None] * b_n + chunk * BLOCK_D  # [BLOCK_N, BLOCK_D]
        if INPUT == PREPARED:
            a_rows = tl.load(a_base + chunk * BLOCK_D)
            b_rows = tl.load(b_ptrs)
        else:
            inside_a, inside_b = inside_m, (offs_n < Nb)[:, None]
            if not FULL:
                inside_a = inside_a & (chunk * BLOCK_D + offs_d < width)
                inside_b = inside_b & (chunk * BLOCK_D + offs_d < width)
            a_rows = tl.load(a_base + chunk * BLOCK_D, mask=inside_a, other=0)
            b_rows = tl.load(b_ptrs, mask=inside_b, other=0)
        if b_rows.dtype == tl.float64:  # not every device has a matrix product of float64
            scores += tl.sum(a_rows[:, None, :] * b_rows[None, :, :], 2)
        else:
            scores = tl.dot(a_rows, tl.trans(b_rows), scores, input_precision=PRECISION)
        chunk += 1
        if chunk == chunks:
            if INPUT == EXACT:
                scores *= tl.load(inverse + image * padded + offs_n)[None, :]
            better = scores > best
            best = tl.where(better, scores, best)
            best_tile = tl.where(better, tile, best_tile)
            scores = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            chunk = 0
            tile += 1
    _store_best(
        best, best_tile, scale, b_index, a_mask, b_mask, score, index, image, offs_m,
        Na, Nb, tokens, b_index_b, b_index_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
        step, first, prefix, PROTECTED, BLOCK_N,
    )  # fmt: skip
