# SPDX-License-Identifier: Apache-2.0
"""Attention to few keys: a program holds all keys and values of a head, for all of its rows.

The keys come in up to four chunks whose widths are powers of two, as 197 = 128 + 64 + 5 of 16. A
chunk of width 0 is none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward_tile import absorb, finish, load_weights
from .rows import first_live, load_queries, load_tile


@triton.jit
def load_chunk(
    base, bias, plane, first, stride, column_stride, keys, width,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Keys or values of a chunk, 0 for those that take no part."""
    x = first
    if CHUNK > 0:
        at = first + tl.arange(0, CHUNK)
        seen = at < keys
        if PADDING:
            seen = tl.load(bias + plane + at) > float("-inf")
        x = load_tile(base, at, stride, column_stride, seen, width, BLOCK, WHOLE, True)
    return x


@triton.jit
def _chunk(
    q, k, v, own, acc, shares, sums, level, most, total, top, seen_keys,
    bias, first, keys, plane, slope, log_eps,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr, POLICY: tl.constexpr,
    PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr,
    EPS: tl.constexpr, NARROW: tl.constexpr, CLOSELY: tl.constexpr,
):  # fmt: skip
    """What a chunk of keys adds to a block of rows."""
    if CHUNK > 0:
        at = first + tl.arange(0, CHUNK)
        weight, log_size, seen = load_weights(
            bias, plane, at, keys, CHUNK, total.dtype, WEIGHTS, POLICY, EPS or SELF_KEEP,
            PADDING and EPS,
        )  # fmt: skip
        acc, shares, sums, level, most, total, top, seen_keys = absorb(
            q, k, v, weight, log_size, seen, own, at, keys, slope, log_eps,
            acc, shares, sums, level, most, total, top, seen_keys,
            CHUNK, PRECISION, WEIGHTS, POLICY, PADDING, SELF_KEEP, EXCLUDE, CAUSAL, EPS, True,
            NARROW, CLOSELY, False,
        )  # fmt: skip
    return acc, shares, sums, level, most, total, top, seen_keys


@triton.jit
def attend_short(
    q, k, v, position, work, out, lse, floor, argmax,
    heads, group, weight_heads, queries, keys, width, value_width, padded, plane, parts,
    slope_high, slope_low, eps_high, eps_low, log_eps,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, position_b, position_n,
    ROWS: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, WEIGHTS: tl.constexpr, POLICY: tl.constexpr,
    PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr,
    EPS: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The output of every ``parts``-th block of rows of a head."""
    ACC: tl.constexpr = lse.dtype.element_ty
    OWN: tl.constexpr = SELF_KEEP or EXCLUDE or CAUSAL
    F1: tl.constexpr = C0
    F2: tl.constexpr = C0 + C1
    F3: tl.constexpr = C0 + C1 + C2
    pid = tl.program_id(0)
    row = pid // parts  # image and head
    h = row % heads
    b = (row // heads).to(tl.int64)
    key_head = (h // group).to(tl.int64)
    slope = tl.cast(slope_high, ACC) + tl.cast(slope_low, ACC)
    eps = tl.cast(eps_high, ACC) + tl.cast(eps_low, ACC)
    weight_row = b
    if weight_heads > 1:
        weight_row = b * weight_heads + h
    bias = work
    if WEIGHTS:
        bias = work + weight_row * padded
    k_base = k + b * k_b + key_head * k_h
    v_base = v + b * v_b + key_head * v_h

    k0 = load_chunk(k_base, bias, plane, 0, k_n, k_d, keys, width, C0, BLOCK_D, WHOLE_D, PADDING)
    k1 = load_chunk(k_base, bias, plane, F1, k_n, k_d, keys, width, C1, BLOCK_D, WHOLE_D, PADDING)
    k2 = load_chunk(k_base, bias, plane, F2, k_n, k_d, keys, width, C2, BLOCK_D, WHOLE_D, PADDING)
    k3 = load_chunk(k_base, bias, plane, F3, k_n, k_d, keys, width, C3, BLOCK_D, WHOLE_D, PADDING)
    v0 = load_chunk(
        v_base, bias, plane, 0, v_n, v_d, keys, value_width, C0, BLOCK_V, WHOLE_V, PADDING
    )
    v1 = load_chunk(
        v_base, bias, plane, F1, v_n, v_d, keys, value_width, C1, BLOCK_V, WHOLE_V, PADDING
    )
    v2 = load_chunk(
        v_base, bias, plane, F2, v_n, v_d, keys, value_width, C2, BLOCK_V, WHOLE_V, PADDING
    )
    v3 = load_chunk(
        v_base, bias, plane, F3, v_n, v_d, keys, value_width, C3, BLOCK_V, WHOLE_V, PADDING
    )
    live = tl.cast(0, tl.int32)
    if PADDING:
        live = first_live(bias + plane, keys, 256)
    sums = tl.zeros([BLOCK_V], ACC)  # of values
    if EPS and not (CAUSAL or EXCLUDE):
        sums += tl.sum(v0.to(ACC), 0)
        if C1 > 0:
            sums += tl.sum(v1.to(ACC), 0)
        if C2 > 0:
            sums += tl.sum(v2.to(ACC), 0)
        if C3 > 0:
            sums += tl.sum(v3.to(ACC), 0)

    local = tl.arange(0, ROWS)
    q_base = q + b * q_b + h.to(tl.int64) * q_h
    for block in range(pid % parts, tl.cdiv(queries, ROWS), parts):
        begin = block * ROWS
        first = begin.to(tl.int64)
        rows = begin + local
        valid = rows < queries
        own = rows
        if position is not None:
            at = position + b * position_b + rows.to(tl.int64) * position_n
            own = tl.maximum(tl.minimum(tl.load(at, mask=valid, other=-1), keys), -1)
        q_tile = load_queries(
            q_base + first * q_n, local, q_n, q_d, valid, width, BLOCK_D, WHOLE_D, SIGN, True
        )  # [ROWS, BLOCK_D]
        acc = tl.zeros([ROWS, BLOCK_V], ACC)
        shares = tl.zeros([ROWS, BLOCK_V], ACC)  # sums of values that some rows see
        level = tl.full([ROWS], float("-inf"), ACC)  # what weights are relative to
        most = level  # the largest logit, with eps
        total = tl.zeros([ROWS], ACC)
        top = tl.full([ROWS], -1, tl.int32)
        seen_keys = tl.zeros([ROWS], tl.float32)
        acc, shares, sums, level, most, total, top, seen_keys = _chunk(
            q_tile, k0, v0, own, acc, shares, sums, level, most, total, top, seen_keys,
            bias, 0, keys, plane, slope, log_eps, C0, PRECISION, WEIGHTS, POLICY, PADDING,
            SELF_KEEP, EXCLUDE, CAUSAL, EPS, NARROW, OWN or C1 == 0,
        )  # fmt: skip
        acc, shares, sums, level, most, total, top, seen_keys = _chunk(
            q_tile, k1, v1, own, acc, shares, sums, level, most, total, top, seen_keys,
            bias, F1, keys, plane, slope, log_eps, C1, PRECISION, WEIGHTS, POLICY, PADDING,
            SELF_KEEP, EXCLUDE, CAUSAL, EPS, NARROW, OWN or C2 == 0,
        )  # fmt: skip
        acc, shares, sums, level, most, total, top, seen_keys = _chunk(
            q_tile, k2, v2, own, acc, shares, sums, level, most, total, top, seen_keys,
            bias, F2, keys, plane, slope, log_eps, C2, PRECISION, WEIGHTS, POLICY, PADDING,
            SELF_KEEP, EXCLUDE, CAUSAL, EPS, NARROW, OWN or C3 == 0,
        )  # fmt: skip
        acc, shares, sums, level, most, total, top, seen_keys = _chunk(
            q_tile, k3, v3, own, acc, shares, sums, level, most, total, top, seen_keys,
            bias, F3, keys, plane, slope, log_eps, C3, PRECISION, WEIGHTS, POLICY, PADDING,
            SELF_KEEP, EXCLUDE, CAUSAL, EPS, NARROW, OWN or True,
        )  # fmt: skip
        stats = row.to(tl.int64) * queries + rows  # [B, H, Nq]
        acc = finish(
            acc, shares, sums, level, most, total, top, seen_keys, bias, plane, own, valid, keys,
            live, eps, lse, floor, argmax, stats, C0, PADDING, CAUSAL, EPS, True,
        )  # fmt: skip
        column = tl.arange(0, BLOCK_V)
        line = heads * value_width
        to = out + (b * queries + first) * line + h * value_width
        to += local[:, None] * line + column[None, :]
        acc = acc.to(q_tile.dtype)
        tl.store(to, acc, mask=valid[:, None] & (column < value_width)[None, :])
