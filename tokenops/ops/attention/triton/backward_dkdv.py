# SPDX-License-Identifier: Apache-2.0
"""The backward kernel of dk and dv, and the sums over queries that make dpolicy and dsize.

``dk_j = scale sum_i ds_ij q_i``,   ``dv_j = sum_i p_ij do_i``,
``policy_j dpolicy_j = sum_i ds_ij`` without queries whose own key is j (under self_keep),
``size_j dsize_j = sum_i ds_ij``

For a kept key p includes the policy, so that it is at most 1, and the sum is divided by the policy
at the end: p divided by a small policy could overflow. For a dropped key p is taken without the
policy, clamped, and used for dpolicy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import (
    BackwardOptions,
    dot_in_parts,
    head_of,
    load_positions,
    load_row,
    load_tile,
    masked_range,
    masked_tile,
    submatrix,
    unmasked_tile,
)


@dataclass(frozen=True)
class DkdvOptions(BackwardOptions):
    """Options of the kernel of dk and dv."""

    DROPPED: bool  # dpolicy is wanted at dropped keys too
    NEED_V: bool
    NEED_POLICY: bool
    NEED_SIZE: bool
    MAX_EXPONENT: float  # clamps p of a dropped key, so that squared gradients do not overflow


@triton.jit
def _dkdv_tile(
    dk, dv, ds_sum, ds_other, k, v, k_rows, v_rows, q_rows, do_rows,
    log2_weight, log2_size, kept, offs_n, mask_n, start_m, start_d, start_dv,
    stats_ptr, stat_stride, argmax_ptr, query_position_ptr, stride_posn, seqlen_q, qk_scale,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OPTS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to dk, dv and the sums of ds by key.

    Matrices are transposed, [BLOCK_N, BLOCK_M]. ``ds_sum`` sums the ds that dpolicy and dsize need;
    ``ds_other`` those that dsize alone needs, of own keys under SELF_KEEP and of eps.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    offs = tl.arange(0, BLOCK_M)
    offs_m = start_m + offs
    start = tl.cast(start_m, tl.int64)
    mask_m = offs_m < seqlen_q
    q = load_tile(
        submatrix(q_rows, start, start_d), offs, mask_m, BLOCK_D, OPTS.EVEN_D, MASKED
    )  # [BLOCK_M, BLOCK_D]
    do = load_tile(
        submatrix(do_rows, start, start_dv), offs, mask_m, BLOCK_DV, OPTS.EVEN_DV, MASKED
    )  # [BLOCK_M, BLOCK_DV]
    q_rows, do_rows = submatrix(q_rows, start, 0), submatrix(do_rows, start, 0)
    lse2 = load_row(stats_ptr + offs_m, mask_m, float("inf"), MASKED)
    delta = load_row(stats_ptr + stat_stride + offs_m, mask_m, 0, MASKED)
    if MASKED:
        pos_m = load_positions(query_position_ptr, stride_posn, offs_m, mask_m, None, None)
    if OPTS.SPLIT_D:
        qkT = dot_in_parts(k_rows, mask_n, q_rows, mask_m, ACC, OPTS)  # [BLOCK_N, BLOCK_M]
    else:
        qkT = tl.dot(k, tl.trans(q), input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    if MASKED:
        is_self = offs_n[:, None] == pos_m[None, :]
    if OPTS.WEIGHTS:
        if OPTS.SELF_KEEP and MASKED:
            log2_w = tl.where(is_self, log2_size[:, None], log2_weight[:, None])
        else:
            log2_w = log2_weight[:, None]
        shift = log2_w - lse2[None, :]
        log2_pT = qkT * qk_scale + shift
    else:
        log2_pT = qkT * qk_scale - lse2[None, :]
    if OPTS.DROPPED:
        log2_pT = tl.minimum(log2_pT, OPTS.MAX_EXPONENT)
    if OPTS.CAUSAL and MASKED:
        visible = offs_n[:, None] <= pos_m[None, :]
        log2_pT = tl.where(visible, log2_pT, float("-inf"))
    pT = tl.exp2(log2_pT)
    if OPTS.SPLIT_DV:
        dpT = dot_in_parts(v_rows, mask_n, do_rows, mask_m, ACC, OPTS)  # [BLOCK_N, BLOCK_M]
    else:
        dpT = tl.dot(v, tl.trans(do), input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    if OPTS.EXCLUDE_SELF and MASKED:
        dpT = tl.where(is_self, 0, dpT)
    dsT = pT * (dpT - delta[None, :])
    undropped_dsT = dsT  # of a dropped key as if its policy were 1
    if OPTS.DROPPED:
        factor = kept[:, None]
        if OPTS.SELF_KEEP and MASKED:
            factor = tl.where(is_self, 1, factor)
        dsT, pT = dsT * factor, pT * factor
    if OPTS.NEED_POLICY or OPTS.NEED_SIZE:
        if OPTS.SELF_KEEP and MASKED:
            ds_sum += tl.sum(tl.where(is_self, 0, undropped_dsT), 1)
            if OPTS.NEED_SIZE:
                ds_other += tl.sum(tl.where(is_self, undropped_dsT, 0), 1)
        else:
            ds_sum += tl.sum(undropped_dsT, 1)
    if OPTS.EPS:
        p_eps_key = load_row(stats_ptr + 2 * stat_stride + offs_m, mask_m, 0, MASKED)
        ds_argmax = load_row(stats_ptr + 3 * stat_stride + offs_m, mask_m, 0, MASKED)
        argmax = load_row(argmax_ptr + offs_m, mask_m, -1, MASKED)
        if OPTS.CAUSAL and MASKED:
            pT += tl.where(visible, p_eps_key[None, :], 0)
        else:
            pT += p_eps_key[None, :]
        ds_eps = tl.where(offs_n[:, None] == argmax[None, :], ds_argmax[None, :], 0)
        dsT += ds_eps
        if OPTS.NEED_SIZE:
            ds_other += tl.sum(ds_eps, 1)
    if OPTS.NEED_V:
        if OPTS.EXCLUDE_SELF and MASKED:
            pT = tl.where(is_self, 0, pT)
        dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    return dk, dv, ds_sum, ds_other


@triton.jit
def attention_backward_dkdv(
    do_ptr, q_ptr, k_ptr, v_ptr, query_position_ptr, argmax_ptr, work_ptr, dk_ptr, dv_ptr,
    kv_heads, group_size, weight_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
    stride_w, size_offset, weight_offset, stat_stride, policy_sum_offset, size_sum_offset,
    scale_high, scale_low, qk_scale_high, qk_scale_low,
    stride_dob, stride_don, stride_doh, stride_dod, stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_posb, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OPTS: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of a block of keys, over all query heads that share them.

    Grid: B * Hkv * parts * cdiv(Nk, BLOCK_N); parts are the blocks of columns of dk or of dv,
    whichever has more. A program goes over all queries of its heads and writes BLOCK_D columns of
    dk and BLOCK_DV columns of dv; to ``work``, by head and key, the sums of ds that dpolicy and
    dsize need. Several programs may write the same columns, then with the same numbers.
    """
    ACC: tl.constexpr = work_ptr.dtype.element_ty
    ANY_POSITION: tl.constexpr = OPTS.POSITIONS and query_position_ptr is not None
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % num_blocks * BLOCK_N
    pid = pid // num_blocks
    start_d, start_dv = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    if OPTS.SPLIT_D or OPTS.SPLIT_DV:
        parts_d, parts_dv = tl.cdiv(head_dim, BLOCK_D), tl.cdiv(head_dim_v, BLOCK_DV)
        num_parts = tl.maximum(parts_d, parts_dv)
        if OPTS.SPLIT_D:
            start_d = pid % num_parts % parts_d * BLOCK_D
        if OPTS.SPLIT_DV:
            start_dv = pid % num_parts % parts_dv * BLOCK_DV
        pid = pid // num_parts
    kv_h = pid % kv_heads
    b = (pid // kv_heads).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    offs_n = start_n + offs
    in_range = offs_n < seqlen_k
    start, kv_h64 = start_n.to(tl.int64), kv_h.to(tl.int64)
    mask_n = in_range
    qk_scale = tl.cast(qk_scale_high, ACC) + tl.cast(qk_scale_low, ACC)
    scale = tl.cast(scale_high, ACC) + tl.cast(scale_low, ACC)
    log2_weight = tl.zeros([BLOCK_N], ACC)
    log2_size, kept = log2_weight, log2_weight
    if OPTS.WEIGHTS:  # log2_size is the same for all heads
        log2_size_ptr = work_ptr + weight_offset + size_offset + b * weight_heads * stride_w
        log2_size = tl.load(log2_size_ptr + offs_n)
        mask_n = log2_size > float("-inf")
    k_rows = head_of(k_ptr, b, kv_h64, stride_kb, stride_kh, stride_kn, stride_kd, head_dim)
    k_rows = submatrix(k_rows, start, 0)
    v_rows = head_of(v_ptr, b, kv_h64, stride_vb, stride_vh, stride_vn, stride_vd, head_dim_v)
    v_rows = submatrix(v_rows, start, 0)
    k, v = None, None
    if not OPTS.SPLIT_D:
        k = load_tile(k_rows, offs, mask_n, BLOCK_D, OPTS.EVEN_D, True)  # [BLOCK_N, BLOCK_D]
    if not OPTS.SPLIT_DV:
        v = load_tile(v_rows, offs, mask_n, BLOCK_DV, OPTS.EVEN_DV, True)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)
    if query_position_ptr is not None:
        query_position_ptr += b * stride_posb
    num_full, lo, hi = masked_range(
        start_n, start_n + BLOCK_N, seqlen_q, BLOCK_M, OPTS.POSITIONS, ANY_POSITION
    )
    first = tl.cast(0, tl.int32)
    if OPTS.CAUSAL:  # queries before the block see none of its keys
        first = tl.cast(lo, tl.int32)
    for member in range(group_size):
        h = kv_h * group_size + member
        bh = b * (kv_heads * group_size) + h
        stats_ptr = work_ptr + bh * seqlen_q
        if OPTS.WEIGHTS:
            w_row = b
            if weight_heads > 1:
                w_row = bh
            log2_weight = tl.load(work_ptr + weight_offset + w_row * stride_w + offs_n)
            if OPTS.DROPPED:
                kept = tl.where(log2_weight > float("-inf"), 1, 0).to(ACC)
                log2_weight = tl.where(log2_weight > float("-inf"), log2_weight, log2_size)
        ds_sum = tl.zeros([BLOCK_N], ACC)
        ds_other = tl.zeros([BLOCK_N], ACC)
        q_rows = head_of(q_ptr, b, h, stride_qb, stride_qh, stride_qn, stride_qd, head_dim)
        do_rows = head_of(do_ptr, b, h, stride_dob, stride_doh, stride_don, stride_dod, head_dim_v)
        for i in range(first, num_full - (hi - lo)):
            dk, dv, ds_sum, ds_other = _dkdv_tile(
                dk, dv, ds_sum, ds_other, k, v, k_rows, v_rows, q_rows, do_rows,
                log2_weight, log2_size, kept, offs_n, mask_n,
                unmasked_tile(i, lo, hi) * BLOCK_M, start_d, start_dv,
                stats_ptr, stat_stride, argmax_ptr + bh * seqlen_q, query_position_ptr, stride_posn,
                seqlen_q, qk_scale, BLOCK_M, BLOCK_D, BLOCK_DV, OPTS, False,
            )  # fmt: skip
        for i in range(hi - lo + tl.cdiv(seqlen_q, BLOCK_M) - num_full):
            dk, dv, ds_sum, ds_other = _dkdv_tile(
                dk, dv, ds_sum, ds_other, k, v, k_rows, v_rows, q_rows, do_rows,
                log2_weight, log2_size, kept, offs_n, mask_n,
                masked_tile(i, num_full, lo, hi) * BLOCK_M, start_d, start_dv,
                stats_ptr, stat_stride, argmax_ptr + bh * seqlen_q, query_position_ptr, stride_posn,
                seqlen_q, qk_scale, BLOCK_M, BLOCK_D, BLOCK_DV, OPTS, True,
            )  # fmt: skip
        keys = bh * seqlen_k + offs_n  # in [B, H, Nk]
        if OPTS.NEED_POLICY:
            ptrs = work_ptr + policy_sum_offset + keys
            tl.store(ptrs, tl.where(mask_n, ds_sum, 0), mask=in_range)
        if OPTS.NEED_SIZE:
            if OPTS.DROPPED:
                ds_sum *= kept
            ds_sum = tl.where(mask_n, ds_sum + ds_other, 0)
            tl.store(work_ptr + size_sum_offset + keys, ds_sum, mask=in_range)
    offs_d = start_d + tl.arange(0, BLOCK_D)
    stride_n = kv_heads * head_dim  # dk and dv are contiguous
    at = (b * seqlen_k + start_n) * stride_n + kv_h * head_dim
    at = at + offs[:, None] * stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    dk = tl.where(mask_n[:, None], dk * scale, 0).to(dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + at, dk, mask=in_range[:, None] & (offs_d < head_dim)[None, :])
    if OPTS.NEED_V:
        offs_d = start_dv + tl.arange(0, BLOCK_DV)
        stride_n = kv_heads * head_dim_v
        at = (b * seqlen_k + start_n) * stride_n + kv_h * head_dim_v
        at += offs[:, None] * stride_n + offs_d[None, :]  # [BLOCK_N, BLOCK_DV]
        dv = tl.where(mask_n[:, None], dv, 0).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + at, dv, mask=in_range[:, None] & (offs_d < head_dim_v)[None, :])


@triton.jit
def weight_grads(
    policy_ptr, size_ptr, work_ptr, dpolicy_ptr, dsize_ptr,
    num_heads, seqlen_k, policy_sum_offset, size_sum_offset,
    stride_pb, stride_ph, stride_pn, stride_sb, stride_sn,
    TINY: tl.constexpr, BLOCK_N: tl.constexpr, NEED_POLICY: tl.constexpr, NEED_SIZE: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Gradients dpolicy and dsize: ds summed over heads, in order, divided by policy or size.

    Grid: B * cdiv(Nk, BLOCK_N). A program handles BLOCK_N keys of an image.
    """
    ACC: tl.constexpr = work_ptr.dtype.element_ty
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    offs_n = pid % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = offs_n.to(tl.int64)
    mask_n = offs_n < seqlen_k
    tiny = tl.full([], TINY, ACC)
    policy_sum = tl.zeros([BLOCK_N], ACC)
    size_sum = tl.zeros([BLOCK_N], ACC)
    if NEED_POLICY:
        policy_ptr = policy_ptr + b * stride_pb + offs * stride_pn
    for h in range(num_heads):
        keys = (b * num_heads + h) * seqlen_k + offs_n  # in [B, H, Nk]
        if NEED_POLICY:
            ds_sum = tl.load(work_ptr + policy_sum_offset + keys, mask=mask_n, other=0)
            if PER_HEAD:
                head_ptr = policy_ptr + tl.cast(h, tl.int64) * stride_ph
                policy = tl.load(head_ptr, mask=mask_n, other=1)
                ptrs = dpolicy_ptr + keys
                tl.store(ptrs, ds_sum / tl.where(policy >= tiny, policy, 1), mask=mask_n)
            else:
                policy_sum += ds_sum
        if NEED_SIZE:
            size_sum += tl.load(work_ptr + size_sum_offset + keys, mask=mask_n, other=0)
    if NEED_POLICY and not PER_HEAD:
        policy = tl.load(policy_ptr, mask=mask_n, other=1)
        ptrs = dpolicy_ptr + b * seqlen_k + offs_n
        tl.store(ptrs, policy_sum / tl.where(policy >= tiny, policy, 1), mask=mask_n)
    if NEED_SIZE:
        size = tl.load(size_ptr + b * stride_sb + offs * stride_sn, mask=mask_n, other=1)
        dsize = tl.where(size >= tiny, size_sum / tl.where(size >= tiny, size, 1), 0)
        tl.store(dsize_ptr + b * seqlen_k + offs_n, dsize, mask=mask_n)
