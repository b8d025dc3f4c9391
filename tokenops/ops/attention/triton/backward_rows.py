# SPDX-License-Identifier: Apache-2.0
"""The backward pass by rows: gradients of queries, and what the pass by keys asks of each row.

In base 2, with ``x_ij = slope q_i . k_j + log2 z_j``, the weight ``w_ij = exp2(x_ij - L_i) p_j`` is
``exp2`` of one sum once ``log2 p_j`` is part of the key's bias. With ``delta_i = g_i . o_i - gL_i``

``dS_ij = w_ij (g_i . v_j - delta_i)``,   ``dq_i = scale sum_j dS_ij k_j``

and with eps ``floor_i (mean of g_i . v_j - delta_i)`` more at the key of the row's maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LOG2E, crossing, load_tile


@triton.jit
def dot_in_parts(
    a, a_n, a_d, a_keep, b, b_n, b_d, b_keep, width,
    A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """``a b^T`` [A, B] of rows too wide to be held, some columns at a time."""
    products = tl.zeros([A, B], ACC)
    for column in range(0, width, BLOCK):
        left = width - column
        x = load_tile(a + column * a_d, tl.arange(0, A), a_n, a_d, a_keep, left, BLOCK, False, True)
        y = load_tile(b + column * b_d, tl.arange(0, B), b_n, b_d, b_keep, left, BLOCK, False, True)
        products = tl.dot(
            x, tl.trans(y.to(x.dtype)), products, input_precision=PRECISION, out_dtype=ACC
        )
    return products


@triton.jit
def _tile(
    q, g, valid, part, level, delta, own, dq, sums, count,
    k, v, bias, start, keys, width, value_width, plane, slope,
    q_n, q_d, g_n, g_d, k_n, k_d, v_n, v_d,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, SPLIT_D: tl.constexpr, SPLIT_V: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr, PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, CLOSELY: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to a block of queries; looked at closely at ends and diagonals."""
    local = tl.arange(0, KEYS)
    at = start + local
    far = tl.cast(start, tl.int64)
    inside = at < keys
    seen = inside
    if PADDING:
        log_size = tl.load(bias + plane + at)
        seen = log_size > float("-inf")
    ACC: tl.constexpr = level.dtype
    kt = load_tile(
        k + far * k_n + part * k_d,
        local,
        k_n,
        k_d,
        seen,
        width - part,
        BLOCK_D,
        WHOLE_D,
        CLOSELY or PADDING,
    )  # [KEYS, BLOCK_D]
    if SPLIT_D:
        s = dot_in_parts(
            q, q_n, q_d, valid, k + far * k_n, k_n, k_d, seen, width,
            ROWS, KEYS, PART, PRECISION, ACC,
        )  # fmt: skip
    else:
        s = tl.dot(q, tl.trans(kt), input_precision=PRECISION, out_dtype=ACC)
    if WEIGHTS:
        weight = tl.load(bias + at)
        if SELF_KEEP and CLOSELY:
            log_size = tl.load(bias + plane + at)
            is_own = own[:, None] == at[None, :]
            x = tl.where(is_own, log_size[None, :], weight[None, :]) - level[:, None]
        else:
            x = weight[None, :] - level[:, None]
        x = s * slope + x
    else:
        x = s * slope - level[:, None]
    if CLOSELY:
        visible = inside[None, :]
        if PADDING:
            visible = seen[None, :]
        if CAUSAL:
            visible = visible & (at[None, :] <= own[:, None])
        x = tl.where(visible, x, float("-inf"))
    w = tl.exp2(x)
    if SPLIT_V:
        dot = dot_in_parts(
            v + far * v_n,
            v_n,
            v_d,
            seen,
            g,
            g_n,
            g_d,
            valid,
            value_width,
            KEYS,
            ROWS,
            PART,
            PRECISION,
            ACC,
        )
        dot = tl.trans(dot)
    else:
        vt = load_tile(
            v + far * v_n,
            local,
            v_n,
            v_d,
            seen,
            value_width,
            BLOCK_V,
            WHOLE_V,
            CLOSELY or PADDING,
        )  # [KEYS, BLOCK_V]
        dot = tl.dot(g, tl.trans(vt), input_precision=PRECISION, out_dtype=ACC)
    if EXCLUDE and CLOSELY:
        dot = tl.where(own[:, None] == at[None, :], 0, dot)
    if EPS:
        if CLOSELY and CAUSAL:
            sums += tl.sum(tl.where(visible, dot, 0), 1)
        else:
            sums += tl.sum(dot, 1)
        if PADDING:
            if CLOSELY and CAUSAL:
                count += tl.sum(visible.to(tl.int32), 1)
            else:
                count += tl.sum(seen.to(tl.int32), 0)
    ds = (w * (dot - delta[:, None])).to(kt.dtype)
    dq = tl.dot(ds, kt, dq, input_precision=PRECISION, out_dtype=ACC)
    return dq, sums, count


@triton.jit
def attend_backward_rows(
    grad, grad_lse, q, k, v, position, out, lse, floor, argmax, work, dq,
    heads, group, weight_heads, queries, keys, width, value_width, padded, plane, bias_at,
    stats_plane, scale_high, scale_low, slope_high, slope_low,
    g_b, g_n, g_h, g_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    position_b, position_n,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, SPLIT_D: tl.constexpr, SPLIT_V: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr, PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Dq of a block of queries; L, delta, and with eps its share by key and at the maximum."""
    ACC: tl.constexpr = work.dtype.element_ty
    ANYWHERE: tl.constexpr = position is not None
    blocks = tl.cdiv(queries, ROWS)
    pid = tl.program_id(0)
    block = pid % blocks
    row = pid // blocks  # image and head
    part = tl.cast(0, tl.int32)  # columns of dq, from here on
    if SPLIT_D:
        parts = tl.cdiv(width, BLOCK_D)
        part = row % parts * BLOCK_D
        row = row // parts
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
        own = tl.minimum(own, keys)

    slope = tl.cast(slope_high, ACC) + tl.cast(slope_low, ACC)
    scale = tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)
    far_h = h.to(tl.int64)
    q_base = q + b * q_b + far_h * q_h + first * q_n
    g_base = grad + b * g_b + far_h * g_h + first * g_n
    line = heads * value_width
    o_base = out + (b * queries + first) * line + h * value_width
    if SPLIT_D:
        q_tile = q_base
    else:
        q_tile = load_tile(q_base, local, q_n, q_d, valid, width, BLOCK_D, WHOLE_D, True)
    if SPLIT_V:
        g_tile = g_base
        delta = tl.zeros([ROWS], ACC)
        for c in range(0, value_width, BLOCK_V):
            x = load_tile(
                g_base + c * g_d, local, g_n, g_d, valid, value_width - c, BLOCK_V, False, True
            )
            y = load_tile(o_base + c, local, line, 1, valid, value_width - c, BLOCK_V, False, True)
            delta += tl.sum(x.to(ACC) * y.to(ACC), 1)
    else:
        g_tile = load_tile(g_base, local, g_n, g_d, valid, value_width, BLOCK_V, WHOLE_V, True)
        o_tile = load_tile(o_base, local, line, 1, valid, value_width, BLOCK_V, WHOLE_V, True)
        delta = tl.sum(g_tile.to(ACC) * o_tile.to(ACC), 1)
    stats = row.to(tl.int64) * queries + at  # [B, H, Nq]
    if grad_lse is not None:
        delta -= tl.load(grad_lse + stats, mask=valid, other=0)
    level = tl.load(lse + stats, mask=valid, other=float("-inf"))
    # A row of no weight: all shares are exp2(-inf).
    level = tl.where(level == float("-inf"), float("inf"), level * tl.full([], LOG2E, ACC))
    tl.store(work + stats, level, mask=valid)
    tl.store(work + stats_plane + stats, delta, mask=valid)

    k_base = k + b * k_b + key_head * k_h
    v_base = v + b * v_b + key_head * v_h
    weight_row = b
    if weight_heads > 1:
        weight_row = b * weight_heads + h
    bias = work + bias_at + weight_row * padded
    acc = tl.zeros([ROWS, BLOCK_D], ACC)
    sums = tl.zeros([ROWS], ACC)
    count = tl.zeros([ROWS], tl.int32)
    OWN: tl.constexpr = SELF_KEEP or EXCLUDE or CAUSAL
    ALL: tl.constexpr = OWN and ANYWHERE
    end = tl.cast(keys, tl.int32)
    if CAUSAL:
        if ANYWHERE:
            end = tl.minimum(end, tl.max(tl.where(valid, own, -1), 0) + 1)
        else:
            end = tl.minimum(end, begin + ROWS)
    full, low, high = crossing(begin, begin + ROWS, end, KEYS, OWN, ALL)
    for i in range(full - (high - low)):
        tile = tl.where(i < low, i, i + high - low)
        acc, sums, count = _tile(
            q_tile, g_tile, valid, part, level, delta, own, acc, sums, count,
            k_base, v_base, bias, tile * KEYS, keys, width, value_width, plane, slope,
            q_n, q_d, g_n, g_d, k_n, k_d, v_n, v_d, ROWS, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V,
            SPLIT_D, SPLIT_V, PART, PRECISION, WEIGHTS, PADDING, SELF_KEEP, EXCLUDE, CAUSAL,
            EPS, False,
        )  # fmt: skip
    for i in range(high - low + tl.cdiv(end, KEYS) - full):
        tile = tl.where(low + i < high, low + i, full + i - (high - low))
        acc, sums, count = _tile(
            q_tile, g_tile, valid, part, level, delta, own, acc, sums, count,
            k_base, v_base, bias, tile * KEYS, keys, width, value_width, plane, slope,
            q_n, q_d, g_n, g_d, k_n, k_d, v_n, v_d, ROWS, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V,
            SPLIT_D, SPLIT_V, PART, PRECISION, WEIGHTS, PADDING, SELF_KEEP, EXCLUDE, CAUSAL,
            EPS, True,
        )  # fmt: skip

    if EPS:
        if not PADDING:
            count = tl.zeros([ROWS], tl.int32) + keys
            if CAUSAL:
                count = tl.minimum(own + 1, keys)
        count = tl.maximum(count, 1).to(ACC)
        share = tl.load(floor + stats, mask=valid, other=0)
        at_top = share * (sums / count - delta)
        tl.store(work + 2 * stats_plane + stats, share / count, mask=valid)
        tl.store(work + 3 * stats_plane + stats, at_top, mask=valid)
        top = tl.load(argmax + stats, mask=valid, other=-1)
        there = valid & (top >= 0) & (top < keys)
        top = tl.where(there, top, 0).to(tl.int64)
        acc += at_top[:, None] * load_tile(
            k_base + part * k_d, top, k_n, k_d, there, width - part, BLOCK_D, WHOLE_D, True
        ).to(ACC)
    column = part + tl.arange(0, BLOCK_D)
    line = heads * width
    to = dq + (b * queries + first) * line + h * width + local[:, None] * line + column[None, :]
    tl.store(to, (acc * scale).to(dq.dtype.element_ty), valid[:, None] & (column < width)[None, :])
