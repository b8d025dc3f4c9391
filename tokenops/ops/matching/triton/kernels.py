# SPDX-License-Identifier: Apache-2.0
"""Kernels that find, for each row of one side, the most similar row of the other.

A candidate that does not count (masked, past the end) has NaN for its similarity to everything, and
``s > best`` is false for NaN: nothing else in the loops need know about it. Every place of a tile
keeps the best value it saw and the tile it saw it in, so that a score costs a comparison and two
selections; places of a row are compared once, at the end.

Letters: Na sources, Nb candidates, D width. Similarities come from one of three inputs:

- ``EXACT``: rows of one head in half precision as they are. Tensor cores make their products exact;
  the candidate's inverse length multiplies the result, the source's only the largest.
- ``MEAN``: rows in any precision whose heads are averaged and whose lengths are divided by here.
- ``PREPARED``: what ``prepare`` wrote, contiguous and padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

EXACT = tl.constexpr(0)
MEAN = tl.constexpr(1)
PREPARED = tl.constexpr(2)

NONE = tl.constexpr(2**31 - 1)


@triton.jit
def _inverse_length(squares):
    """One over the root of a sum of squares, 0 for a row of length zero."""
    zero = squares == 0
    if squares.dtype == tl.float64:
        inverse = 1 / tl.sqrt(tl.where(zero, 1, squares))
    else:  # the approximate root takes the smallest squares for 0
        tiny = squares < 2.0**-100
        inverse = tl.rsqrt(tl.where(zero, 1, tl.where(tiny, squares * 2.0**100, squares)))
        inverse = tl.where(tiny, inverse * 2.0**50, inverse)
    return tl.where(zero, 0, inverse)


@triton.jit
def _tokens(listed, image, listed_b, listed_n, place, count, tokens, group, step, first):
    """Token of each place of a side: as listed, or by rule."""
    if listed is not None:
        at = listed + image * listed_b + place.to(tl.int64) * listed_n
        token = tl.load(at, mask=place < count, other=0).to(tl.int64)
        token = tl.minimum(tl.maximum(token, 0), tokens - 1)
    else:
        token = place * step + first
        if group is not None:
            token += place // group
        token = token.to(tl.int64)
    return token


@triton.jit
def _counts(mask, image, mask_b, mask_n, token, inside, prefix, PROTECTED: tl.constexpr):
    """Which candidates count: those behind the prefix that are not masked out."""
    counts = inside & (token >= prefix)
    if mask is not None:
        set_ = tl.load(mask + image * mask_b + token * mask_n, mask=inside, other=0) != 0
        counts = counts & (set_ != PROTECTED)
    return counts


@triton.jit
def _mean(pointers, head_stride, heads, keep, ACC: tl.constexpr):
    """Rows averaged over their heads, 0 where they are not kept."""
    total = tl.zeros(keep.shape, ACC)
    for _ in range(heads):
        total += tl.load(pointers, mask=keep, other=0).to(ACC)
        pointers += head_stride
    return total / heads


@triton.jit
def prepare(
    x, listed, mask, rows, inverse,
    count, padded, tokens, width, padded_width, heads, x_b, x_h, x_n,
    listed_b, listed_n, mask_b, mask_n, group, step, first, prefix,
    COSINE: tl.constexpr, PROTECTED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows to compare, or inverse lengths where ``rows`` is None; NaN for what does not count."""
    tiles = tl.cdiv(padded, BLOCK)
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    place = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    token = _tokens(listed, image, listed_b, listed_n, place, count, tokens, group, step, first)
    counts = _counts(mask, image, mask_b, mask_n, token, inside, prefix, PROTECTED)
    at = x + image * x_b + token[:, None] * x_n  # [BLOCK, 1]
    column = tl.arange(0, CHUNK)
    ACC: tl.constexpr = tl.float32 if rows is None else rows.dtype.element_ty
    factor = tl.full([BLOCK], 1, ACC)
    if COSINE:
        squares = tl.zeros([BLOCK], ACC)
        for start in range(0, width, CHUNK):
            d = (start + column)[None, :]
            keep = counts[:, None] & (d < width)
            value = _mean(at + d, x_h, heads, keep, ACC)
            squares += tl.sum(value * value, 1)
        factor = _inverse_length(squares)
    factor = tl.where(counts, factor, float("nan"))
    to = image * padded + place  # [BLOCK]
    if rows is None:
        tl.store(inverse + to, factor, mask=place < padded)
    else:
        for start in range(0, padded_width, CHUNK):
            d = (start + column)[None, :]
            keep = counts[:, None] & (d < width)
            value = _mean(at + d, x_h, heads, keep, ACC) * factor[:, None]
            out = rows + to[:, None] * padded_width + d
            tl.store(out, value, mask=(place < padded)[:, None] & (d < padded_width))


@triton.jit
def _store_best(
    best, at, scale, b_listed, a_mask, b_mask, score, index, image, place,
    Na, Nb, tokens, b_listed_b, b_listed_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    step, first, prefix, PROTECTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compare the places of each row and write the row's best score and candidate."""
    columns = tl.arange(0, COLUMNS)
    largest = tl.max(best, 1)  # [ROWS]
    candidate = at * COLUMNS + columns[None, :]
    candidate = tl.min(tl.where(best == largest[:, None], candidate, NONE), 1)
    # No finite similarity: the first candidate that counts, or none at all.
    fallback = NONE
    start = 0
    while (fallback == NONE) & (start < Nb):
        other = start + columns
        inside = other < Nb
        token = _tokens(
            b_listed, image, b_listed_b, b_listed_n, other, Nb, tokens, None, step, first
        )
        counts = _counts(b_mask, image, b_mask_b, b_mask_n, token, inside, prefix, PROTECTED)
        fallback = tl.min(tl.where(counts, other, NONE), 0)
        start += COLUMNS
    fallback = tl.where(fallback == NONE, -1, fallback)
    final = largest * scale
    found = final > float("-inf")
    final = tl.where(found, final, float("-inf"))
    candidate = tl.where(found, candidate, fallback)
    if a_mask is not None:
        allowed = (
            tl.load(
                a_mask + image * a_mask_b + place.to(tl.int64) * a_mask_n,
                mask=place < Na, other=0,
            )
            != 0
        )  # fmt: skip
        final = tl.where(allowed, final, float("-inf"))
        candidate = tl.where(allowed, candidate, -1)
    tl.store(score + image * Na + place, final, mask=place < Na)
    tl.store(index + image * Na + place, candidate, mask=place < Na)


@triton.jit
def search_resident(
    a, b, a_listed, b_listed, a_mask, b_mask, inverse, score, index,
    Na, Nb, padded, tokens, width, heads, a_b, a_h, a_n, b_b, b_h, b_n,
    a_listed_b, a_listed_n, b_listed_b, b_listed_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    group, step, first, prefix,
    INPUT: tl.constexpr, COSINE: tl.constexpr, PROTECTED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The sources of a tile stay on the chip; the candidates come by in tiles of whole rows."""
    ACC: tl.constexpr = score.dtype.element_ty
    blocks = tl.cdiv(Na, ROWS)
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    place = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    d = tl.arange(0, CHUNK)[None, :]

    if INPUT == PREPARED:
        token = place.to(tl.int64)
    else:
        token = _tokens(a_listed, image, a_listed_b, a_listed_n, place, Na, tokens, group, 1, 0)
    a_at = a + image * a_b + token[:, None] * a_n + d  # [ROWS, CHUNK]
    sources = ()
    squares = tl.zeros([ROWS], ACC)
    for c in tl.static_range(CHUNKS):
        keep = (place < Na)[:, None]
        if not FULL:
            keep = keep & (c * CHUNK + d < width)
        if INPUT == MEAN:
            rows = _mean(a_at, a_h, heads, keep & (d < CHUNK), ACC)
        else:
            rows = tl.load(a_at, mask=keep, other=0)
        if COSINE and INPUT != PREPARED:
            wide = rows.to(ACC)
            squares += tl.sum(wide * wide, 1)
        sources += (rows,)  # type: ignore[assignment]
        a_at += CHUNK
    scale = tl.full([ROWS], 1, ACC)
    if COSINE and INPUT == EXACT:
        scale = _inverse_length(squares)
    if COSINE and INPUT == MEAN:
        sources = (rows * _inverse_length(squares)[:, None],)  # type: ignore[assignment]

    best = tl.full([ROWS, COLUMNS], float("-inf"), ACC)
    at = tl.zeros([ROWS, COLUMNS], tl.int32)
    other = columns
    if INPUT == PREPARED:
        to = other.to(tl.int64)
    else:
        to = _tokens(b_listed, image, b_listed_b, b_listed_n, other, Nb, tokens, None, step, first)
    b_base = b + image * b_b + d  # [1, CHUNK]
    b_at = b_base + to[:, None] * b_n  # [COLUMNS, CHUNK]
    tile_stride = tl.cast(step, tl.int64) * COLUMNS * b_n
    if INPUT == PREPARED:
        tile_stride = tl.cast(b_n, tl.int64) * COLUMNS
    for tile in range(tl.cdiv(Nb, COLUMNS)):
        inside = other < Nb
        scores = tl.zeros([ROWS, COLUMNS], ACC)
        lengths = tl.zeros([COLUMNS], ACC)
        for c in tl.static_range(CHUNKS):
            seen = inside[:, None]
            if not FULL:
                seen = seen & (c * CHUNK + d < width)
            if INPUT == MEAN:
                values = _mean(b_at, b_h, heads, seen & (d < CHUNK), ACC)
            elif INPUT == PREPARED:
                values = tl.load(b_at)
            else:
                values = tl.load(b_at + c * CHUNK, mask=seen, other=0)
            if COSINE and (INPUT == MEAN or (INPUT == EXACT and inverse is None)):
                exact = values.to(ACC)
                lengths += tl.sum(exact * exact, 1)
            if INPUT == MEAN:
                factor = tl.full([COLUMNS], 1, ACC)
                if COSINE:
                    factor = _inverse_length(lengths)
                counts = _counts(b_mask, image, b_mask_b, b_mask_n, to, inside, prefix, PROTECTED)
                values *= tl.where(counts, factor, float("nan"))[:, None]
            scores = tl.dot(sources[c], tl.trans(values), scores, input_precision=PRECISION)
        if INPUT == EXACT:
            if inverse is None:
                factor = tl.full([COLUMNS], 1, ACC)
                if COSINE:
                    factor = _inverse_length(lengths)
                counts = _counts(b_mask, image, b_mask_b, b_mask_n, to, inside, prefix, PROTECTED)
                factor = tl.where(counts, factor, float("nan"))
            else:
                factor = tl.load(inverse + image * padded + other)
            scores *= factor[None, :]
        better = scores > best
        best = tl.where(better, scores, best)
        at = tl.where(better, tile, at)
        other += COLUMNS
        if b_listed is not None and INPUT != PREPARED:
            to = _tokens(
                b_listed, image, b_listed_b, b_listed_n, other, Nb, tokens, None, step, first
            )
            b_at = b_base + to[:, None] * b_n
        else:
            to += COLUMNS * step
            b_at += tile_stride
    _store_best(
        best, at, scale, b_listed, a_mask, b_mask, score, index, image, place,
        Na, Nb, tokens, b_listed_b, b_listed_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
        step, first, prefix, PROTECTED, COLUMNS,
    )  # fmt: skip


@triton.jit
def search_streamed(
    a, b, a_listed, b_listed, a_mask, b_mask, inverse, score, index,
    Na, Nb, padded, tokens, width, a_b, a_n, b_b, b_n,
    a_listed_b, a_listed_n, b_listed_b, b_listed_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
    group, step, first, prefix,
    INPUT: tl.constexpr, COSINE: tl.constexpr, PROTECTED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rows of any width: both sides come by in chunks, in one loop over tiles and chunks."""
    ACC: tl.constexpr = score.dtype.element_ty
    blocks = tl.cdiv(Na, ROWS)
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    place = (pid % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    d = tl.arange(0, CHUNK)[None, :]
    chunks = tl.cdiv(width, CHUNK)

    if INPUT == PREPARED:
        token = place.to(tl.int64)
    else:
        token = _tokens(a_listed, image, a_listed_b, a_listed_n, place, Na, tokens, group, 1, 0)
    here = (place < Na)[:, None]
    a_base = a + image * a_b + token[:, None] * a_n + d  # [ROWS, CHUNK]
    scale = tl.full([ROWS], 1, ACC)
    if COSINE and INPUT == EXACT:
        squares = tl.zeros([ROWS], ACC)
        for c in range(chunks):
            keep = here & (c * CHUNK + d < width)
            wide = tl.load(a_base + c * CHUNK, mask=keep, other=0).to(ACC)
            squares += tl.sum(wide * wide, 1)
        scale = _inverse_length(squares)

    best = tl.full([ROWS, COLUMNS], float("-inf"), ACC)
    at = tl.zeros([ROWS, COLUMNS], tl.int32)
    scores = tl.zeros([ROWS, COLUMNS], ACC)
    b_base = b + image * b_b + d
    tile, chunk = 0, 0
    for _ in range(tl.cdiv(Nb, COLUMNS) * chunks):
        other = tile * COLUMNS + columns
        if INPUT == PREPARED:
            to = other.to(tl.int64)
        else:
            to = _tokens(
                b_listed, image, b_listed_b, b_listed_n, other, Nb, tokens, None, step, first
            )
        b_at = b_base + to[:, None] * b_n + chunk * CHUNK  # [COLUMNS, CHUNK]
        if INPUT == PREPARED:
            x = tl.load(a_base + chunk * CHUNK)
            y = tl.load(b_at)
        else:
            keep_a, keep_b = here, (other < Nb)[:, None]
            if not FULL:
                keep_a = keep_a & (chunk * CHUNK + d < width)
                keep_b = keep_b & (chunk * CHUNK + d < width)
            x = tl.load(a_base + chunk * CHUNK, mask=keep_a, other=0)
            y = tl.load(b_at, mask=keep_b, other=0)
        if y.dtype == tl.float64:  # not every device multiplies matrices of them
            scores += tl.sum(x[:, None, :] * y[None, :, :], 2)
        else:
            scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
        chunk += 1
        if chunk == chunks:
            if INPUT == EXACT:
                scores *= tl.load(inverse + image * padded + other)[None, :]
            better = scores > best
            best = tl.where(better, scores, best)
            at = tl.where(better, tile, at)
            scores = tl.zeros([ROWS, COLUMNS], ACC)
            chunk = 0
            tile += 1
    _store_best(
        best, at, scale, b_listed, a_mask, b_mask, score, index, image, place,
        Na, Nb, tokens, b_listed_b, b_listed_n, a_mask_b, a_mask_n, b_mask_b, b_mask_n,
        step, first, prefix, PROTECTED, COLUMNS,
    )  # fmt: skip
