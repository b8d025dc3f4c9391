# SPDX-License-Identifier: Apache-2.0
"""The backward kernel of dq, which also writes what the kernel of dk and dv reads of each query.

``p_ij = exp2(qk_ij - lse2_i)``,   ``dp_ij = do_i . v_j``,   ``delta_i = do_i . out_i - dlse_i``,
``ds_ij = p_ij (dp_ij - delta_i)``,   ``dq_i = scale sum_j ds_ij k_j``

With eps, ``p_eps_i (mean_j dp_ij - delta_i)`` is added to ds at the key of the row's maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import (
    LOG2E,
    BackwardOptions,
    contiguous_head,
    dot_in_parts,
    head_of,
    load_positions,
    load_tile,
    masked_range,
    masked_tile,
    submatrix,
    unmasked_tile,
    visible_keys,
    weight_row,
)


@dataclass(frozen=True)
class DqOptions(BackwardOptions):
    """Options of the kernel of dq."""

    PADDING: bool  # there are sizes or a mask, so that some keys may be invalid


@triton.jit
def _dq_tile(
    dq, dp_sum, num_keys, q, do, q_rows, do_rows, k_rows, v_rows, log2_weight_ptr, size_offset,
    start_n, start_d, lse2, delta, pos_m, mask_m, seqlen_k, qk_scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OPTS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to dq and, with eps, to the sum of dp and the number of keys."""
    ACC: tl.constexpr = lse2.dtype
    LOAD_MASKED: tl.constexpr = MASKED or OPTS.PADDING
    offs = tl.arange(0, BLOCK_N)
    offs_n = start_n + offs
    start = tl.cast(start_n, tl.int64)
    mask_n = offs_n < seqlen_k
    if OPTS.PADDING:
        mask_n = tl.load(log2_weight_ptr + size_offset + offs_n) > float("-inf")
    k = load_tile(
        submatrix(k_rows, start, start_d), offs, mask_n, BLOCK_D, OPTS.EVEN_D, LOAD_MASKED
    )  # [BLOCK_N, BLOCK_D]
    if OPTS.SPLIT_D:
        k_rows = submatrix(k_rows, start, 0)
        qk = dot_in_parts(q_rows, mask_m, k_rows, mask_n, ACC, OPTS)  # [BLOCK_M, BLOCK_N]
    else:
        qk = tl.dot(q, tl.trans(k), input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    if OPTS.WEIGHTS:
        log2_weight = tl.load(log2_weight_ptr + offs_n)
        if OPTS.SELF_KEEP and MASKED:
            log2_size = tl.load(log2_weight_ptr + size_offset + offs_n)
            is_self = pos_m[:, None] == offs_n[None, :]
            log2_w = tl.where(is_self, log2_size[None, :], log2_weight[None, :])
        else:
            log2_w = log2_weight[None, :]
        shift = log2_w - lse2[:, None]
        log2_p = qk * qk_scale + shift
    else:
        log2_p = qk * qk_scale - lse2[:, None]
    if MASKED:
        visible = mask_n[None, :]
        if OPTS.CAUSAL:
            visible = visible & (offs_n[None, :] <= pos_m[:, None])
        log2_p = tl.where(visible, log2_p, float("-inf"))
    p = tl.exp2(log2_p)
    v_rows = submatrix(v_rows, start, 0)
    if OPTS.SPLIT_DV:
        dp = tl.trans(dot_in_parts(v_rows, mask_n, do_rows, mask_m, ACC, OPTS))
    else:
        v = load_tile(v_rows, offs, mask_n, BLOCK_DV, OPTS.EVEN_DV, LOAD_MASKED)
        dp = tl.dot(do, tl.trans(v), input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    if OPTS.EXCLUDE_SELF and MASKED:
        dp = tl.where(pos_m[:, None] == offs_n[None, :], 0, dp)
    if OPTS.EPS:
        if MASKED and OPTS.CAUSAL:
            dp_sum += tl.sum(tl.where(visible, dp, 0), 1)
            if OPTS.PADDING:
                num_keys += tl.sum(visible.to(tl.int32), 1)
        else:
            dp_sum += tl.sum(dp, 1)
            if OPTS.PADDING:
                num_keys += tl.sum(mask_n.to(tl.int32), 0)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    dq = tl.dot(ds, k, dq, input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    return dq, dp_sum, num_keys


@triton.jit
def attention_backward_dq(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, query_position_ptr, out_ptr, lse_ptr, p_eps_ptr,
    argmax_ptr, work_ptr, dq_ptr,
    num_heads, group_size, weight_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
    stride_w, size_offset, weight_offset, stat_stride,
    scale_high, scale_low, qk_scale_high, qk_scale_low,
    stride_dob, stride_don, stride_doh, stride_dod, stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_posb, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OPTS: tl.constexpr,
):  # fmt: skip
    """Gradient dq of a block of queries.

    Grid: B * H * cdiv(D, BLOCK_D) * cdiv(Nq, BLOCK_M), the third factor 1 where D is not split. A
    program goes over all keys and writes BLOCK_D columns of dq of BLOCK_M queries. To ``work`` it
    writes their lse2 and delta, with eps also p_eps by key and the part of ds at the maximum.
    """
    ACC: tl.constexpr = work_ptr.dtype.element_ty
    ANY_POSITION: tl.constexpr = OPTS.POSITIONS and query_position_ptr is not None
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % num_blocks
    bh = pid // num_blocks
    start_d = tl.cast(0, tl.int32)
    if OPTS.SPLIT_D:
        num_parts = tl.cdiv(head_dim, BLOCK_D)
        start_d = bh % num_parts * BLOCK_D
        bh = bh // num_parts
    if OPTS.CAUSAL:
        block = num_blocks - 1 - block  # first those that see most keys
    h = bh % num_heads
    b = (bh // num_heads).to(tl.int64)
    kv_h = (h // group_size).to(tl.int64)
    start_m = block * BLOCK_M
    offs = tl.arange(0, BLOCK_M)
    offs_m = start_m + offs
    mask_m = offs_m < seqlen_q
    start = start_m.to(tl.int64)
    if query_position_ptr is not None:
        query_position_ptr += b * stride_posb
    pos_m = load_positions(query_position_ptr, stride_posn, offs_m, mask_m, None, seqlen_k)
    qk_scale = tl.cast(qk_scale_high, ACC) + tl.cast(qk_scale_low, ACC)
    scale = tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)

    h64 = h.to(tl.int64)
    q_rows = head_of(q_ptr, b, h64, stride_qb, stride_qh, stride_qn, stride_qd, head_dim)
    q_rows = submatrix(q_rows, start, 0)
    do_rows = head_of(do_ptr, b, h64, stride_dob, stride_doh, stride_don, stride_dod, head_dim_v)
    do_rows = submatrix(do_rows, start, 0)
    out_rows = contiguous_head(out_ptr, b, start, h, num_heads, seqlen_q, head_dim_v)
    q, do = None, None
    if not OPTS.SPLIT_D:
        q = load_tile(q_rows, offs, mask_m, BLOCK_D, OPTS.EVEN_D, True)  # [BLOCK_M, BLOCK_D]
    if OPTS.SPLIT_DV:
        delta = tl.zeros([BLOCK_M], ACC)
        for start_dv in range(0, head_dim_v, BLOCK_DV):
            x = load_tile(submatrix(do_rows, 0, start_dv), offs, mask_m, BLOCK_DV, False, True)
            y = load_tile(submatrix(out_rows, 0, start_dv), offs, mask_m, BLOCK_DV, False, True)
            delta += tl.sum(x.to(ACC) * y.to(ACC), 1)
    else:
        do = load_tile(do_rows, offs, mask_m, BLOCK_DV, OPTS.EVEN_DV, True)  # [BLOCK_M, BLOCK_DV]
        out = load_tile(out_rows, offs, mask_m, BLOCK_DV, OPTS.EVEN_DV, True)
        delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    rows = bh.to(tl.int64) * seqlen_q + offs_m  # in [B, H, Nq]
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=mask_m, other=0)
    lse = tl.load(lse_ptr + rows, mask=mask_m, other=float("-inf"))
    # lse2 = inf makes all p of an empty row 0.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * tl.full([], LOG2E, ACC))
    tl.store(work_ptr + rows, lse2, mask=mask_m)
    tl.store(work_ptr + stat_stride + rows, delta, mask=mask_m)

    k_rows = head_of(k_ptr, b, kv_h, stride_kb, stride_kh, stride_kn, stride_kd, head_dim)
    v_rows = head_of(v_ptr, b, kv_h, stride_vb, stride_vh, stride_vn, stride_vd, head_dim_v)
    w_row = weight_row(b, h, weight_heads)
    log2_weight_ptr = work_ptr + weight_offset + w_row * stride_w
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dp_sum = tl.zeros([BLOCK_M], ACC)
    num_keys = tl.zeros([BLOCK_M], tl.int32)
    end = visible_keys(pos_m, mask_m, start_m, seqlen_k, BLOCK_M, OPTS.CAUSAL, ANY_POSITION)
    num_full, lo, hi = masked_range(
        start_m, start_m + BLOCK_M, end, BLOCK_N, OPTS.POSITIONS, ANY_POSITION
    )
    for i in range(num_full - (hi - lo)):
        dq, dp_sum, num_keys = _dq_tile(
            dq, dp_sum, num_keys, q, do, q_rows, do_rows, k_rows, v_rows,
            log2_weight_ptr, size_offset, unmasked_tile(i, lo, hi) * BLOCK_N, start_d,
            lse2, delta, pos_m, mask_m, seqlen_k, qk_scale, BLOCK_N, BLOCK_D, BLOCK_DV, OPTS, False,
        )  # fmt: skip
    for i in range(hi - lo + tl.cdiv(end, BLOCK_N) - num_full):
        dq, dp_sum, num_keys = _dq_tile(
            dq, dp_sum, num_keys, q, do, q_rows, do_rows, k_rows, v_rows,
            log2_weight_ptr, size_offset, masked_tile(i, num_full, lo, hi) * BLOCK_N, start_d,
            lse2, delta, pos_m, mask_m, seqlen_k, qk_scale, BLOCK_N, BLOCK_D, BLOCK_DV, OPTS, True,
        )  # fmt: skip

    if OPTS.EPS:
        if not OPTS.PADDING:
            num_keys = tl.zeros([BLOCK_M], tl.int32) + seqlen_k
            if OPTS.CAUSAL:
                num_keys = tl.minimum(pos_m + 1, seqlen_k)
        num_keys = tl.maximum(num_keys, 1).to(ACC)
        p_eps = tl.load(p_eps_ptr + rows, mask=mask_m, other=0)
        ds_argmax = p_eps * (dp_sum / num_keys - delta)
        tl.store(work_ptr + 2 * stat_stride + rows, p_eps / num_keys, mask=mask_m)
        tl.store(work_ptr + 3 * stat_stride + rows, ds_argmax, mask=mask_m)
        argmax = tl.load(argmax_ptr + rows, mask=mask_m, other=-1)
        found = mask_m & (argmax >= 0) & (argmax < seqlen_k)
        argmax = tl.where(found, argmax, 0).to(tl.int64)
        dq += ds_argmax[:, None] * load_tile(
            submatrix(k_rows, 0, start_d), argmax, found, BLOCK_D, OPTS.EVEN_D, True
        ).to(ACC)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    dq_rows = contiguous_head(dq_ptr, b, start, h, num_heads, seqlen_q, head_dim)
    ptrs = dq_rows.ptr + offs[:, None] * dq_rows.stride_n + offs_d[None, :]
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(ptrs, dq, mask=mask_m[:, None] & (offs_d < head_dim)[None, :])
