# SPDX-License-Identifier: Apache-2.0
"""The backward pass by keys: gradients of keys and values, and sums over queries by key.

``share_ij = exp2(x_ij - L_i)`` is attention before the policy. For a key that is kept the policy is
part of the exponent and divided out of the sums at the end: its weight is at most 1, where the
share of a key with a small policy is beyond all bounds. The share of a dropped key is capped.

``T_ij = share_ij (g_i . v_j - delta_i)``,   ``dp_j = sum T_ij`` (without own keys),
``dk = scale dS^T q``,   ``dv = attention^T g``,   ``dlogz_j = sum dS_ij``
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_rows import dot_in_parts
from .rows import crossing, load_tile


@triton.jit
def _tile(
    k, v, seen, part_d, part_v, bias, log_size, kept, at, dk, dv, dropped_sum, log_sum,
    q, g, stats, position, start, queries, width, value_width, keys, stats_plane, slope,
    k_n, k_d, v_n, v_d, q_n, q_d, g_n, g_d, position_n, argmax,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, SPLIT_D: tl.constexpr, SPLIT_V: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr, DROPPED: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, NEED_V: tl.constexpr, SUM_POLICY: tl.constexpr,
    SUM_SIZE: tl.constexpr, LIMIT: tl.constexpr, CLOSELY: tl.constexpr,
):  # fmt: skip
    """What a tile of queries adds to a block of keys; looked at closely at ends and diagonals."""
    ACC: tl.constexpr = stats.dtype.element_ty
    local = tl.arange(0, ROWS)
    rows = start + local
    far = tl.cast(start, tl.int64)
    inside = rows < queries
    q_tile = load_tile(
        q + far * q_n + part_d * q_d,
        local,
        q_n,
        q_d,
        inside,
        width - part_d,
        BLOCK_D,
        WHOLE_D,
        CLOSELY,
    )  # [ROWS, BLOCK_D]
    g_tile = load_tile(
        g + far * g_n + part_v * g_d,
        local,
        g_n,
        g_d,
        inside,
        value_width - part_v,
        BLOCK_V,
        WHOLE_V,
        CLOSELY,
    )  # [ROWS, BLOCK_V]
    if CLOSELY:
        level = tl.load(stats + rows, mask=inside, other=float("inf"))
        delta = tl.load(stats + stats_plane + rows, mask=inside, other=0)
        own = rows
        if position is not None:
            own = tl.load(position + rows.to(tl.int64) * position_n, mask=inside, other=-1)
    else:
        level = tl.load(stats + rows)
        delta = tl.load(stats + stats_plane + rows)
    if SPLIT_D:
        s = dot_in_parts(
            k,
            k_n,
            k_d,
            seen,
            q + far * q_n,
            q_n,
            q_d,
            inside,
            width,
            KEYS,
            ROWS,
            PART,
            PRECISION,
            ACC,
        )  # [KEYS, ROWS]
    else:
        s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)  # [KEYS, ROWS]
    if WEIGHTS:
        if SELF_KEEP and CLOSELY:
            is_own = at[:, None] == own[None, :]
            x = tl.where(is_own, log_size[:, None], bias[:, None]) - level[None, :]
        else:
            x = bias[:, None] - level[None, :]
        x = s * slope + x
    else:
        x = s * slope - level[None, :]
    if DROPPED:
        x = tl.minimum(x, LIMIT)
    if CLOSELY and CAUSAL:
        visible = at[:, None] <= own[None, :]
        x = tl.where(visible, x, float("-inf"))
    share = tl.exp2(x)
    if SPLIT_V:
        dot = dot_in_parts(
            v, v_n, v_d, seen, g + far * g_n, g_n, g_d, inside, value_width,
            KEYS, ROWS, PART, PRECISION, ACC,
        )  # fmt: skip
    else:
        dot = tl.dot(v, tl.trans(g_tile), input_precision=PRECISION, out_dtype=ACC)
    if EXCLUDE and CLOSELY:
        dot = tl.where(at[:, None] == own[None, :], 0, dot)
    t = share * (dot - delta[None, :])
    ds, attention = t, share
    if DROPPED:
        factor = kept[:, None]
        if SELF_KEEP and CLOSELY:
            factor = tl.where(is_own, 1, factor)
        ds, attention = t * factor, share * factor
    if SUM_POLICY or SUM_SIZE:
        if SELF_KEEP and CLOSELY:
            dropped_sum += tl.sum(tl.where(is_own, 0, t), 1)
            if SUM_SIZE:
                log_sum += tl.sum(tl.where(is_own, t, 0), 1)
        else:
            dropped_sum += tl.sum(t, 1)
    if EPS:
        if CLOSELY:
            spread = tl.load(stats + 2 * stats_plane + rows, mask=inside, other=0)
            at_top = tl.load(stats + 3 * stats_plane + rows, mask=inside, other=0)
            top = tl.load(argmax + rows, mask=inside, other=-1)
        else:
            spread = tl.load(stats + 2 * stats_plane + rows)
            at_top = tl.load(stats + 3 * stats_plane + rows)
            top = tl.load(argmax + rows)
        if CLOSELY and CAUSAL:
            attention += tl.where(visible, spread[None, :], 0)
        else:
            attention += spread[None, :]
        hit = tl.where(at[:, None] == top[None, :], at_top[None, :], 0)
        ds += hit
        if SUM_SIZE:
            log_sum += tl.sum(hit, 1)
    if NEED_V:
        if EXCLUDE and CLOSELY:
            attention = tl.where(at[:, None] == own[None, :], 0, attention)
        dv = tl.dot(
            attention.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION, out_dtype=ACC
        )
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv, dropped_sum, log_sum


@triton.jit
def attend_backward_keys(
    grad, q, k, v, position, argmax, work, dk, dv,
    key_heads, group, weight_heads, queries, keys, width, value_width, padded, plane, bias_at,
    stats_plane, sums_at, size_sums_at, scale_high, scale_low, slope_high, slope_low,
    g_b, g_n, g_h, g_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    position_b, position_n,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE_D: tl.constexpr, WHOLE_V: tl.constexpr, SPLIT_D: tl.constexpr, SPLIT_V: tl.constexpr,
    PART: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHTS: tl.constexpr, DROPPED: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, NEED_V: tl.constexpr, SUM_POLICY: tl.constexpr,
    SUM_SIZE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Dk and dv of a block of keys over all heads that share it; sums by key for each head."""
    ACC: tl.constexpr = work.dtype.element_ty
    ANYWHERE: tl.constexpr = position is not None
    blocks = tl.cdiv(keys, KEYS)
    pid = tl.program_id(0)
    begin = pid % blocks * KEYS
    pid = pid // blocks
    part_d, part_v = tl.cast(0, tl.int32), tl.cast(0, tl.int32)  # columns, from here on
    if SPLIT_D or SPLIT_V:
        # Where one side has fewer parts, programs do one of them again.
        parts_d, parts_v = tl.cdiv(width, BLOCK_D), tl.cdiv(value_width, BLOCK_V)
        parts = tl.maximum(parts_d, parts_v)
        if SPLIT_D:
            part_d = pid % parts % parts_d * BLOCK_D
        if SPLIT_V:
            part_v = pid % parts % parts_v * BLOCK_V
        pid = pid // parts
    key_head = pid % key_heads
    b = (pid // key_heads).to(tl.int64)
    local = tl.arange(0, KEYS)
    at = begin + local
    valid = at < keys
    first = begin.to(tl.int64)
    far_head = key_head.to(tl.int64)
    seen = valid
    slope = tl.cast(slope_high, ACC) + tl.cast(slope_low, ACC)
    scale = tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)
    bias = tl.zeros([KEYS], ACC)
    log_size, kept = bias, bias
    if WEIGHTS:  # log z does not depend on the head
        log_size = tl.load(work + bias_at + plane + b * weight_heads * padded + at)
        seen = log_size > float("-inf")
    k_base = k + b * k_b + far_head * k_h + first * k_n
    v_base = v + b * v_b + far_head * v_h + first * v_n
    if SPLIT_D:
        k_tile = k_base
    else:
        k_tile = load_tile(k_base, local, k_n, k_d, seen, width, BLOCK_D, WHOLE_D, True)
    if SPLIT_V:
        v_tile = v_base
    else:
        v_tile = load_tile(v_base, local, v_n, v_d, seen, value_width, BLOCK_V, WHOLE_V, True)
    dk_sum = tl.zeros([KEYS, BLOCK_D], ACC)
    dv_sum = tl.zeros([KEYS, BLOCK_V], ACC)
    if position is not None:
        position += b * position_b
    OWN: tl.constexpr = SELF_KEEP or EXCLUDE or CAUSAL
    ALL: tl.constexpr = OWN and ANYWHERE
    full, low, high = crossing(begin, begin + KEYS, queries, ROWS, OWN, ALL)
    skip = tl.cast(0, tl.int32)
    if CAUSAL:  # queries before the block see none of it
        skip = tl.cast(low, tl.int32)
    for member in range(group):
        h = key_head * group + member
        row = b * (key_heads * group) + h  # image and head
        stats = work + row * queries
        far_h = tl.cast(h, tl.int64)
        if WEIGHTS:
            weight_row = b
            if weight_heads > 1:
                weight_row = row
            bias = tl.load(work + bias_at + weight_row * padded + at)
            if DROPPED:
                kept = tl.where(bias > float("-inf"), 1, 0).to(ACC)
                bias = tl.where(bias > float("-inf"), bias, log_size)
        dropped_sum = tl.zeros([KEYS], ACC)
        log_sum = tl.zeros([KEYS], ACC)
        q_base = q + b * q_b + far_h * q_h
        g_base = grad + b * g_b + far_h * g_h
        for i in range(skip, full - (high - low)):
            tile = tl.where(i < low, i, i + high - low)
            dk_sum, dv_sum, dropped_sum, log_sum = _tile(
                k_tile, v_tile, seen, part_d, part_v, bias, log_size, kept, at, dk_sum, dv_sum,
                dropped_sum, log_sum, q_base, g_base, stats, position, tile * ROWS, queries, width,
                value_width, keys,
                stats_plane, slope, k_n, k_d, v_n, v_d, q_n, q_d, g_n, g_d, position_n,
                argmax + row * queries, ROWS, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V,
                SPLIT_D, SPLIT_V, PART, PRECISION, WEIGHTS, DROPPED, SELF_KEEP, EXCLUDE, CAUSAL,
                EPS, NEED_V, SUM_POLICY, SUM_SIZE, LIMIT, False,
            )  # fmt: skip
        for i in range(high - low + tl.cdiv(queries, ROWS) - full):
            tile = tl.where(low + i < high, low + i, full + i - (high - low))
            dk_sum, dv_sum, dropped_sum, log_sum = _tile(
                k_tile, v_tile, seen, part_d, part_v, bias, log_size, kept, at, dk_sum, dv_sum,
                dropped_sum, log_sum, q_base, g_base, stats, position, tile * ROWS, queries, width,
                value_width, keys,
                stats_plane, slope, k_n, k_d, v_n, v_d, q_n, q_d, g_n, g_d, position_n,
                argmax + row * queries, ROWS, KEYS, BLOCK_D, BLOCK_V, WHOLE_D, WHOLE_V,
                SPLIT_D, SPLIT_V, PART, PRECISION, WEIGHTS, DROPPED, SELF_KEEP, EXCLUDE, CAUSAL,
                EPS, NEED_V, SUM_POLICY, SUM_SIZE, LIMIT, True,
            )  # fmt: skip
        sums = row * keys + at
        if SUM_POLICY:
            tl.store(work + sums_at + sums, tl.where(seen, dropped_sum, 0), mask=valid)
        if SUM_SIZE:
            if DROPPED:
                dropped_sum *= kept
            log_sum = tl.where(seen, dropped_sum + log_sum, 0)
            tl.store(work + size_sums_at + sums, log_sum, mask=valid)
    column = part_d + tl.arange(0, BLOCK_D)
    line = key_heads * width
    to = (b * keys + first) * line + key_head * width + local[:, None] * line + column[None, :]
    dk_sum = tl.where(seen[:, None], dk_sum * scale, 0).to(dk.dtype.element_ty)
    tl.store(dk + to, dk_sum, mask=valid[:, None] & (column < width)[None, :])
    if NEED_V:
        column = part_v + tl.arange(0, BLOCK_V)
        line = key_heads * value_width
        to = (b * keys + first) * line + key_head * value_width
        to += local[:, None] * line + column[None, :]
        dv_sum = tl.where(seen[:, None], dv_sum, 0).to(dv.dtype.element_ty)
        tl.store(dv + to, dv_sum, mask=valid[:, None] & (column < value_width)[None, :])


@triton.jit
def sum_heads(
    policy, size, work, dpolicy, dsize,
    heads, keys, sums_at, size_sums_at,
    policy_b, policy_h, policy_n, size_b, size_n,
    TINY: tl.constexpr, BLOCK: tl.constexpr, SUM_POLICY: tl.constexpr, SUM_SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Dpolicy and dsize from the sums of each head, added up in the order of the heads."""
    ACC: tl.constexpr = work.dtype.element_ty
    blocks = tl.cdiv(keys, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    far = at.to(tl.int64)
    valid = at < keys
    tiny = tl.full([], TINY, ACC)
    dropped_sum = tl.zeros([BLOCK], ACC)
    log_sum = tl.zeros([BLOCK], ACC)
    policy_at = policy
    if SUM_POLICY:
        policy_at = policy + b * policy_b + far * policy_n
    for h in range(heads):
        sums = (b * heads + h) * keys + at
        if SUM_POLICY:
            t = tl.load(work + sums_at + sums, mask=valid, other=0)
            if PER_HEAD:
                p = tl.load(policy_at + tl.cast(h, tl.int64) * policy_h, mask=valid, other=1)
                tl.store(dpolicy + sums, t / tl.where(p >= tiny, p, 1), mask=valid)
            else:
                dropped_sum += t
        if SUM_SIZE:
            log_sum += tl.load(work + size_sums_at + sums, mask=valid, other=0)
    if SUM_POLICY and not PER_HEAD:
        p = tl.load(policy_at, mask=valid, other=1)
        tl.store(dpolicy + b * keys + at, dropped_sum / tl.where(p >= tiny, p, 1), mask=valid)
    if SUM_SIZE:
        z = tl.load(size + b * size_b + far * size_n, mask=valid, other=1)
        log_sum = tl.where(z >= tiny, log_sum / tl.where(z >= tiny, z, 1), 0)
        tl.store(dsize + b * keys + at, log_sum, mask=valid)
