# SPDX-License-Identifier: Apache-2.0
"""Attention to many keys: tile by tile, relative to the largest logit so far."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward_tile import absorb, finish, load_weights
from .rows import crossing, key_bias, load_queries, load_tile


@triton.jit
def list_tiles(
    policy, size, mask, work, tiles,
    keys, heads, padded, plane, count,
    policy_b, policy_h, policy_n, size_b, size_n, mask_b, mask_n,
    TINY: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Biases of the keys as ``weigh_keys`` writes them, and which tiles have a key with weight.

    For each row of biases: those tiles, ascending, and how many there are before each tile.
    """
    ACC: tl.constexpr = work.dtype.element_ty
    PART: tl.constexpr = BLOCK // TILE
    row = tl.program_id(0).to(tl.int64)  # image and head
    listed = tiles + row * (2 * count + 1)
    ranks = listed + count
    before = tl.cast(0, tl.int32)
    for start in range(0, padded, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bias, log_size = key_bias(
            policy, size, mask, row // heads, row % heads, at, keys,
            policy_b, policy_h, policy_n, size_b, size_n, mask_b, mask_n, TINY, ACC,
        )  # fmt: skip
        to = work + row * padded + at
        tl.store(to, bias, mask=at < padded)
        if policy is not None:
            tl.store(to + plane, log_size, mask=at < padded)
        live = tl.max((tl.reshape(bias, [PART, TILE]) > float("-inf")).to(tl.int32), 1)  # [PART]
        rank = before + tl.cumsum(live, 0) - live
        tile = start // TILE + tl.arange(0, PART)
        tl.store(listed + rank, tile, mask=(live > 0) & (tile < count))
        tl.store(ranks + tile, rank, mask=tile < count)
        before += tl.sum(live, 0)
    tl.store(ranks + count, before)


@triton.jit
def _tile(
    q, own, acc, shares, sums, level, most, total, top, seen_keys,
    k, v, bias, start, keys, width, value_width, plane, slope, log_eps,
    k_n, k_d, v_n, v_d,
    KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr, POLICY: tl.constexpr, PADDING: tl.constexpr, SELF_KEEP: tl.constexpr,
    EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr, VALUES: tl.constexpr,
    NARROW: tl.constexpr, CLOSELY: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to a block of rows; looked at closely at ends and diagonals."""
    local = tl.arange(0, KEYS)
    at = start + local
    far = tl.cast(start, tl.int64)
    weight, log_size, seen = load_weights(
        bias, plane, at, keys, KEYS, total.dtype, WEIGHTS, POLICY,
        EPS or (SELF_KEEP and CLOSELY), PADDING,
    )  # fmt: skip
    kt = load_tile(
        k + far * k_n, local, k_n, k_d, seen, width, BLOCK_D, WHOLE_D, CLOSELY or PADDING
    )  # [KEYS, BLOCK_D]
    vt = kt
    if VALUES:
        vt = load_tile(
            v + far * v_n, local, v_n, v_d, seen, value_width, BLOCK_V, WHOLE_V, CLOSELY or PADDING
        )  # [KEYS, BLOCK_V]
    return absorb(
        q, kt, vt, weight, log_size, seen, own, at, keys, slope, log_eps,
        acc, shares, sums, level, most, total, top, seen_keys,
        KEYS, PRECISION, WEIGHTS, POLICY, PADDING, SELF_KEEP, EXCLUDE, CAUSAL, EPS, VALUES,
        NARROW, CLOSELY, True,
    )  # fmt: skip


@triton.jit
def attend_long(
    q, k, v, position, work, tiles, out, lse, floor, argmax,
    heads, group, weight_heads, queries, keys, width, value_width, padded, plane, count,
    slope_high, slope_low, eps_high, eps_low, log_eps,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, position_b, position_n,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, PRECISION: tl.constexpr, SIGN: tl.constexpr,
    WEIGHTS: tl.constexpr, POLICY: tl.constexpr, PADDING: tl.constexpr, SELF_KEEP: tl.constexpr,
    EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr, VALUES: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """A block of rows of the output; without values L alone, and the share of eps."""
    ACC: tl.constexpr = lse.dtype.element_ty
    ANYWHERE: tl.constexpr = position is not None
    OWN: tl.constexpr = SELF_KEEP or EXCLUDE or CAUSAL
    blocks = tl.cdiv(queries, ROWS)
    pid = tl.program_id(0)
    row = pid // blocks  # image and head
    block = pid % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    h = row % heads
    b = (row // heads).to(tl.int64)
    key_head = (h // group).to(tl.int64)
    begin = block * ROWS
    local = tl.arange(0, ROWS)
    at = begin + local
    valid = at < queries
    first = begin.to(tl.int64)
    own = at
    if position is not None:
        own = tl.load(position + b * position_b + at.to(tl.int64) * position_n, valid, other=-1)
        own = tl.maximum(tl.minimum(own, keys), -1)
    slope = tl.cast(slope_high, ACC) + tl.cast(slope_low, ACC)
    q_tile = load_queries(
        q + b * q_b + h.to(tl.int64) * q_h + first * q_n,
        local,
        q_n,
        q_d,
        valid,
        width,
        BLOCK_D,
        WHOLE_D,
        SIGN,
        True,
    )  # [ROWS, BLOCK_D]
    k_base = k + b * k_b + key_head * k_h
    v_base = v
    if VALUES:
        v_base = v + b * v_b + key_head * v_h
    weight_row = b
    if weight_heads > 1:
        weight_row = b * weight_heads + h
    bias = work
    if WEIGHTS:
        bias = work + weight_row * padded

    acc = tl.zeros([ROWS, BLOCK_V], ACC)
    shares = tl.zeros([ROWS, BLOCK_V], ACC)  # sums of values that some rows see
    sums = tl.zeros([BLOCK_V], ACC)  # and that all of them do
    level = tl.full([ROWS], float("-inf"), ACC)  # what weights are relative to
    most = level  # the largest logit, with eps
    total = tl.zeros([ROWS], ACC)
    top = tl.full([ROWS], -1, tl.int32)
    seen_keys = tl.zeros([ROWS], tl.float32)
    end = tl.cast(keys, tl.int32)
    if CAUSAL:
        if ANYWHERE:
            end = tl.minimum(end, tl.max(tl.where(valid, own, -1), 0) + 1)
        else:
            end = tl.minimum(end, begin + ROWS)
    full, low, high = crossing(begin, begin + ROWS, end, KEYS, OWN, OWN and ANYWHERE)
    head_tiles, gap, far_tiles = low, high - low, full - (high - low)
    listed = tiles
    if tiles is not None:
        listed = tiles + weight_row * (2 * count + 1)
        head_tiles = tl.load(listed + count + low)
        gap = tl.load(listed + count + high) - head_tiles
        far_tiles = tl.load(listed + count + full) - gap
    for i in range(far_tiles):
        tile = tl.where(i < head_tiles, i, i + gap)
        if tiles is not None:
            tile = tl.load(listed + tile)
        acc, shares, sums, level, most, total, top, seen_keys = _tile(
            q_tile, own, acc, shares, sums, level, most, total, top, seen_keys,
            k_base, v_base, bias, tile * KEYS, keys, width, value_width, plane, slope, log_eps,
            k_n, k_d, v_n, v_d, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V, PRECISION,
            WEIGHTS, POLICY, PADDING, SELF_KEEP, EXCLUDE, CAUSAL, EPS, VALUES, NARROW, False,
        )  # fmt: skip
    for i in range(high - low + tl.cdiv(end, KEYS) - full):
        tile = tl.where(low + i < high, low + i, full + i - (high - low))
        acc, shares, sums, level, most, total, top, seen_keys = _tile(
            q_tile, own, acc, shares, sums, level, most, total, top, seen_keys,
            k_base, v_base, bias, tile * KEYS, keys, width, value_width, plane, slope, log_eps,
            k_n, k_d, v_n, v_d, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V, PRECISION,
            WEIGHTS, POLICY, PADDING, SELF_KEEP, EXCLUDE, CAUSAL, EPS, VALUES, NARROW, True,
        )  # fmt: skip

    stats = row.to(tl.int64) * queries + at  # [B, H, Nq]
    eps = tl.cast(eps_high, ACC) + tl.cast(eps_low, ACC)
    acc = finish(
        acc, shares, sums, level, most, total, top, seen_keys, bias, plane, own, valid, keys,
        None, eps, lse, floor, argmax, stats, KEYS, PADDING, CAUSAL, EPS, VALUES,
    )  # fmt: skip
    if VALUES:
        column = tl.arange(0, BLOCK_V)
        line = heads * value_width
        to = out + (b * queries + first) * line + h * value_width
        to += local[:, None] * line + column[None, :]
        acc = acc.to(q_tile.dtype)
        tl.store(to, acc, mask=valid[:, None] & (column < value_width)[None, :])
