# SPDX-License-Identifier: Apache-2.0
"""The forward pass over few keys: a program holds all keys and values of a head.

Up to four chunks hold the keys. Their widths are powers of two: 128, 64 and 16 for 197 keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .common import (
    contiguous_head,
    head_of,
    load_log2_weights,
    load_positions,
    load_queries,
    load_tile,
    store_tile,
    submatrix,
    weight_row,
)
from .online_softmax import ForwardOptions, finalize, first_valid_key, initial_state, update


@dataclass(frozen=True)
class ShortOptions(ForwardOptions):
    """Options of the kernel for few keys."""

    STARTS: tuple[int, ...]  # first key of each chunk
    BLOCKS: tuple[int, ...]  # width of each chunk


@triton.jit
def _load_chunk(
    x, log2_size_ptr, start_n, seqlen_k,
    BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """Keys or values of a chunk, 0 for those that are not valid."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < seqlen_k
    if PADDING:
        mask_n = tl.load(log2_size_ptr + offs_n) > float("-inf")
    return load_tile(x, offs_n, mask_n, BLOCK, EVEN, True)


@triton.jit
def _attend_chunk(
    state, q, k, v, log2_weight_ptr, size_offset, start_n, pos_m, seqlen_k, qk_scale, log2_eps,
    BLOCK_N: tl.constexpr, OPTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a chunk of keys to the state."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    log2_weight, log2_size, mask_n = load_log2_weights(
        log2_weight_ptr, size_offset, offs_n, seqlen_k,
        qk_scale.dtype, OPTS, OPTS.EPS or OPTS.SELF_KEEP, OPTS.PADDING and OPTS.EPS,
    )  # fmt: skip
    return update(
        state, q, k, v, log2_weight, log2_size, mask_n, pos_m, offs_n, seqlen_k,
        qk_scale, log2_eps, OPTS, MASKED, False,
    )  # fmt: skip


@triton.jit
def attention_forward_short(
    q_ptr, k_ptr, v_ptr, query_position_ptr, log2_weight_ptr,
    out_ptr, lse_ptr, p_eps_ptr, argmax_ptr,
    num_heads, group_size, weight_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
    stride_w, size_offset, num_programs,
    qk_scale_high, qk_scale_low, eps_high, eps_low, log2_eps,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_posb, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OPTS: tl.constexpr,
):  # fmt: skip
    """Attention of blocks of queries to all keys, which are loaded once.

    Grid: B * H * num_programs. A program handles every ``num_programs``-th block of BLOCK_M queries
    of a head and writes their out, lse and, with eps, p_eps and argmax.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    NUM_CHUNKS: tl.constexpr = len(OPTS.BLOCKS)
    pid = tl.program_id(0)
    bh = pid // num_programs
    h = bh % num_heads
    b = (bh // num_heads).to(tl.int64)
    kv_h = (h // group_size).to(tl.int64)
    if query_position_ptr is not None:
        query_position_ptr += b * stride_posb
    qk_scale = tl.cast(qk_scale_high, ACC) + tl.cast(qk_scale_low, ACC)
    eps = tl.cast(eps_high, ACC) + tl.cast(eps_low, ACC)
    if OPTS.WEIGHTS:
        log2_weight_ptr += weight_row(b, h, weight_heads) * stride_w
    log2_size_ptr = log2_weight_ptr
    first_valid = None
    if OPTS.PADDING:
        log2_size_ptr += size_offset
        first_valid = first_valid_key(log2_size_ptr, seqlen_k, 256)  # all keys at once
    k_rows = head_of(k_ptr, b, kv_h, stride_kb, stride_kh, stride_kn, stride_kd, head_dim)
    v_rows = head_of(v_ptr, b, kv_h, stride_vb, stride_vh, stride_vn, stride_vd, head_dim_v)
    ks: tl.tuple = ()
    vs: tl.tuple = ()
    for c in tl.static_range(NUM_CHUNKS):
        k = _load_chunk(
            k_rows, log2_size_ptr, OPTS.STARTS[c], seqlen_k,
            OPTS.BLOCKS[c], BLOCK_D, OPTS.EVEN_D, OPTS.PADDING,
        )  # [chunk, BLOCK_D]  # fmt: skip
        ks = ks + (k,)  # noqa: RUF005
    for c in tl.static_range(NUM_CHUNKS):
        v = _load_chunk(
            v_rows, log2_size_ptr, OPTS.STARTS[c], seqlen_k,
            OPTS.BLOCKS[c], BLOCK_DV, OPTS.EVEN_DV, OPTS.PADDING,
        )  # [chunk, BLOCK_DV]  # fmt: skip
        vs = vs + (v,)  # noqa: RUF005
    v_sum = tl.zeros([BLOCK_DV], ACC)
    if OPTS.EPS and not (OPTS.CAUSAL or OPTS.EXCLUDE_SELF):
        for c in tl.static_range(NUM_CHUNKS):
            v_sum += tl.sum(vs[c].to(ACC), 0)

    offs = tl.arange(0, BLOCK_M)
    q_head = head_of(q_ptr, b, h, stride_qb, stride_qh, stride_qn, stride_qd, head_dim)
    for block in range(pid % num_programs, tl.cdiv(seqlen_q, BLOCK_M), num_programs):
        start_m = block * BLOCK_M
        start = start_m.to(tl.int64)
        offs_m = start_m + offs
        mask_m = offs_m < seqlen_q
        pos_m = load_positions(query_position_ptr, stride_posn, offs_m, mask_m, -1, seqlen_k)
        q_rows = submatrix(q_head, start, 0)
        q = load_queries(q_rows, offs, mask_m, BLOCK_D, OPTS, True)  # [BLOCK_M, BLOCK_D]
        state = initial_state(v_sum, BLOCK_M, BLOCK_DV)
        for c in tl.static_range(NUM_CHUNKS):
            state = _attend_chunk(
                state, q, ks[c], vs[c], log2_weight_ptr, size_offset, OPTS.STARTS[c], pos_m,
                seqlen_k, qk_scale, log2_eps,
                OPTS.BLOCKS[c], OPTS, OPTS.POSITIONS or c == NUM_CHUNKS - 1,
            )  # fmt: skip
        rows = bh.to(tl.int64) * seqlen_q + offs_m  # in [B, H, Nq]
        out = finalize(
            state, lse_ptr, p_eps_ptr, argmax_ptr, rows, log2_size_ptr, first_valid, pos_m, mask_m,
            seqlen_k, eps, 256, OPTS,
        )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
        out_rows = contiguous_head(out_ptr, b, start, h, num_heads, seqlen_q, head_dim_v)
        store_tile(out_rows, out, offs, mask_m, BLOCK_DV)
