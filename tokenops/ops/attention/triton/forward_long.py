# SPDX-License-Identifier: Apache-2.0
"""The forward pass over many keys: FlashAttention's loop, which skips tiles of dropped keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    contiguous_head,
    head_of,
    load_log2_weights,
    load_positions,
    load_queries,
    load_tile,
    masked_range,
    masked_tile,
    store_log2_weights,
    store_tile,
    submatrix,
    visible_keys,
    weight_row,
)
from .online_softmax import finalize, initial_state, update


@triton.jit
def log2_weights_and_tiles(
    policy_ptr, size_ptr, mask_ptr, log2_weight_ptr, tiles_ptr,
    seqlen_k, weight_heads, stride_w, size_offset, num_tiles,
    stride_pb, stride_ph, stride_pn, stride_sb, stride_sn, stride_mb, stride_mn,
    BLOCK: tl.constexpr, TINY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write log2 weights of keys, and the list of the tiles of BLOCK_N keys that have a kept key.

    Grid: one program for each of the B * Hw rows of weights. Its row of ``tiles`` has num_tiles
    entries for the list, ascending, then num_tiles + 1 ranks: the listed tiles before each tile.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles_ptr += row * (2 * num_tiles + 1)
    ranks_ptr = tiles_ptr + num_tiles
    count = tl.cast(0, tl.int32)
    for start in range(0, stride_w, BLOCK):
        log2_weight = store_log2_weights(
            policy_ptr, size_ptr, mask_ptr, log2_weight_ptr, row, weight_heads,
            start + tl.arange(0, BLOCK), seqlen_k, stride_w, size_offset,
            stride_pb, stride_ph, stride_pn, stride_sb, stride_sn, stride_mb, stride_mn, TINY,
        )  # fmt: skip
        kept = tl.reshape(log2_weight, [BLOCK // BLOCK_N, BLOCK_N]) > float("-inf")
        kept = tl.max(kept.to(tl.int32), 1)  # [BLOCK // BLOCK_N]
        rank = count + tl.cumsum(kept, 0) - kept
        tile = start // BLOCK_N + tl.arange(0, BLOCK // BLOCK_N)
        tl.store(tiles_ptr + rank, tile, mask=(kept > 0) & (tile < num_tiles))
        tl.store(ranks_ptr + tile, rank, mask=tile < num_tiles)
        count += tl.sum(kept, 0)
    tl.store(ranks_ptr + num_tiles, count)


@triton.jit
def _attend_tile(
    state, q, k_rows, v_rows, log2_weight_ptr, size_offset, start_n, pos_m, seqlen_k,
    qk_scale, log2_eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, OPTS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of keys and values and add it to the state."""
    LOAD_MASKED: tl.constexpr = MASKED or OPTS.PADDING
    offs = tl.arange(0, BLOCK_N)
    offs_n = start_n + offs
    start = tl.cast(start_n, tl.int64)
    log2_weight, log2_size, mask_n = load_log2_weights(
        log2_weight_ptr, size_offset, offs_n, seqlen_k,
        qk_scale.dtype, OPTS, OPTS.EPS or (OPTS.SELF_KEEP and MASKED), OPTS.PADDING,
    )  # fmt: skip
    k_rows = submatrix(k_rows, start, 0)
    k = load_tile(k_rows, offs, mask_n, BLOCK_D, OPTS.EVEN_D, LOAD_MASKED)  # [BLOCK_N, BLOCK_D]
    v = k
    if OPTS.HAS_V:
        v_rows = submatrix(v_rows, start, 0)
        v = load_tile(v_rows, offs, mask_n, BLOCK_DV, OPTS.EVEN_DV, LOAD_MASKED)
    return update(
        state, q, k, v, log2_weight, log2_size, mask_n, pos_m, offs_n, seqlen_k,
        qk_scale, log2_eps, OPTS, MASKED, True,
    )  # fmt: skip


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, query_position_ptr, log2_weight_ptr, tiles_ptr,
    out_ptr, lse_ptr, p_eps_ptr, argmax_ptr,
    num_heads, group_size, weight_heads, seqlen_q, seqlen_k, head_dim, head_dim_v,
    stride_w, size_offset, num_tiles,
    qk_scale_high, qk_scale_low, eps_high, eps_low, log2_eps,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_posb, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    OPTS: tl.constexpr,
):  # fmt: skip
    """Attention of a block of queries to all keys, tile by tile.

    Grid: B * H * cdiv(Nq, BLOCK_M). A program writes out, lse and, with eps, p_eps and argmax of
    BLOCK_M queries of a head; for scores, without values, only lse to base 2 and p_eps by key.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    ANY_POSITION: tl.constexpr = OPTS.POSITIONS and query_position_ptr is not None
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // num_blocks
    block = pid % num_blocks
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
    pos_m = load_positions(query_position_ptr, stride_posn, offs_m, mask_m, -1, seqlen_k)
    qk_scale = tl.cast(qk_scale_high, ACC) + tl.cast(qk_scale_low, ACC)
    q_rows = head_of(q_ptr, b, h, stride_qb, stride_qh, stride_qn, stride_qd, head_dim)
    q_rows = submatrix(q_rows, start, 0)
    q = load_queries(q_rows, offs, mask_m, BLOCK_D, OPTS, True)  # [BLOCK_M, BLOCK_D]
    k_rows = head_of(k_ptr, b, kv_h, stride_kb, stride_kh, stride_kn, stride_kd, head_dim)
    v_rows = k_rows
    if OPTS.HAS_V:
        v_rows = head_of(v_ptr, b, kv_h, stride_vb, stride_vh, stride_vn, stride_vd, head_dim_v)
    w_row = weight_row(b, h, weight_heads)
    if OPTS.WEIGHTS:
        log2_weight_ptr += w_row * stride_w

    end = visible_keys(pos_m, mask_m, start_m, seqlen_k, BLOCK_M, OPTS.CAUSAL, ANY_POSITION)
    num_full, lo, hi = masked_range(
        start_m, start_m + BLOCK_M, end, BLOCK_N, OPTS.POSITIONS, ANY_POSITION
    )
    before, skipped, num_unmasked = lo, hi - lo, num_full - (hi - lo)  # skipped: masked below
    if tiles_ptr is not None:  # the same three numbers of listed tiles
        tiles_ptr += w_row * (2 * num_tiles + 1)
        before = tl.load(tiles_ptr + num_tiles + lo)
        skipped = tl.load(tiles_ptr + num_tiles + hi) - before
        num_unmasked = tl.load(tiles_ptr + num_tiles + num_full) - skipped
    state = initial_state(tl.zeros([BLOCK_DV], ACC), BLOCK_M, BLOCK_DV)
    for i in range(num_unmasked):
        tile = tl.where(i < before, i, i + skipped)
        if tiles_ptr is not None:
            tile = tl.load(tiles_ptr + tile)
        state = _attend_tile(
            state, q, k_rows, v_rows, log2_weight_ptr, size_offset, tile * BLOCK_N, pos_m,
            seqlen_k, qk_scale, log2_eps, BLOCK_N, BLOCK_D, BLOCK_DV, OPTS, False,
        )  # fmt: skip
    for i in range(hi - lo + tl.cdiv(end, BLOCK_N) - num_full):
        state = _attend_tile(
            state, q, k_rows, v_rows, log2_weight_ptr, size_offset,
            masked_tile(i, num_full, lo, hi) * BLOCK_N, pos_m,
            seqlen_k, qk_scale, log2_eps, BLOCK_N, BLOCK_D, BLOCK_DV, OPTS, True,
        )  # fmt: skip

    rows = bh.to(tl.int64) * seqlen_q + offs_m  # in [B, H, Nq]
    eps = tl.cast(eps_high, ACC) + tl.cast(eps_low, ACC)
    log2_size_ptr = log2_weight_ptr
    if OPTS.PADDING:
        log2_size_ptr += size_offset
    out = finalize(
        state, lse_ptr, p_eps_ptr, argmax_ptr, rows, log2_size_ptr, None, pos_m, mask_m, seqlen_k,
        eps, BLOCK_N, OPTS,
    )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
    if OPTS.HAS_V:
        out_rows = contiguous_head(out_ptr, b, start, h, num_heads, seqlen_q, head_dim_v)
        store_tile(out_rows, out, offs, mask_m, BLOCK_DV)
