# SPDX-License-Identifier: Apache-2.0
"""Attention that keys receive: lse of each query, sums over queries by head, sums over heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import Launch, Settings, ceil_div, planned, power_of_two
from ..arguments import ScoreInputs
from . import heuristics
from .common import (
    LOG2E,
    LogitOptions,
    Matrix,
    head_of,
    load_log2_weights,
    load_positions,
    load_queries,
    load_row,
    load_tile,
    masked_range,
    masked_tile,
    split_float,
    submatrix,
    unmasked_tile,
    weight_row,
)
from .forward import ForwardLaunches, plan_forward
from .spec import BLOCK, Spec, describe, strides


@dataclass(frozen=True)
class ScoreOptions(LogitOptions):
    """Options of the sums over queries."""

    NATURAL_LSE: bool  # lse is the caller's, to base e


@triton.jit
def _add_tile(
    total, k, q_rows, log2_weight, log2_size, offs_n, lse_ptr, p_eps_key_ptr, query_weight_ptr,
    query_position_ptr, start_m, seqlen_q, seqlen_k, qk_scale, stride_ln, stride_qwn, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, OPTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add p of a tile of queries to ``total`` [BLOCK_N, BLOCK_M]; the caller sums its rows."""
    offs = tl.arange(0, BLOCK_M)
    offs_m = start_m + offs
    offs_m64 = offs_m.to(tl.int64)
    mask_m = offs_m < seqlen_q
    q_rows = submatrix(q_rows, start_m, 0)
    q = load_queries(q_rows, offs, mask_m, BLOCK_D, OPTS, MASKED)  # [BLOCK_M, BLOCK_D]
    qkT = tl.dot(k, tl.trans(q), input_precision=OPTS.INPUT_PRECISION, out_dtype=total.dtype)
    lse2 = load_row(lse_ptr + offs_m64 * stride_ln, mask_m, float("-inf"), MASKED)
    if OPTS.NATURAL_LSE:
        lse2 *= tl.full([], LOG2E, total.dtype)
    # lse2 = inf makes all p of an empty row 0.
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    if MASKED:
        pos_m = load_positions(query_position_ptr, stride_posn, offs_m, mask_m, -1, seqlen_k)
    if OPTS.WEIGHTS:
        log2_pT = qkT * qk_scale + (log2_weight[:, None] - lse2[None, :])
        if OPTS.SELF_KEEP and MASKED:
            kept = qkT * qk_scale + (log2_size[:, None] - lse2[None, :])
            log2_pT = tl.where(offs_n[:, None] == pos_m[None, :], kept, log2_pT)
    else:
        log2_pT = qkT * qk_scale - lse2[None, :]
    pT = tl.exp2(log2_pT)
    if OPTS.EPS:
        pT += load_row(p_eps_key_ptr + offs_m, mask_m, 0, MASKED)[None, :]
    if OPTS.CAUSAL and MASKED:
        pT = tl.where(offs_n[:, None] <= pos_m[None, :], pT, 0)
    if OPTS.EXCLUDE_SELF and MASKED:
        pT = tl.where(offs_n[:, None] == pos_m[None, :], 0, pT)
    if query_weight_ptr is not None:
        query_weight = load_row(query_weight_ptr + offs_m64 * stride_qwn, mask_m, 0, MASKED)
        return total + pT * query_weight[None, :]
    if OPTS.EPS and MASKED:
        pT = tl.where(mask_m[None, :], pT, 0)
    return total + pT


@triton.jit
def attention_column_sums(
    q_ptr, k_ptr, query_weight_ptr, query_position_ptr, log2_weight_ptr, lse_ptr, p_eps_key_ptr,
    out_ptr,
    num_heads, group_size, weight_heads, seqlen_q, seqlen_k, head_dim, stride_w, size_offset,
    qk_scale_high, qk_scale_low,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_lb, stride_lh, stride_ln, stride_qwb, stride_qwh, stride_qwn,
    stride_posb, stride_posn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, OPTS: tl.constexpr,
):  # fmt: skip
    """Attention that a block of keys receives from all queries of a head.

    Grid: B * H * cdiv(Nk, BLOCK_N). A program writes BLOCK_N sums over queries of p, or of p times
    the query's weight if there are any. With eps it adds p_eps by key, which it reads, to p.
    """
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    ANY_POSITION: tl.constexpr = OPTS.POSITIONS and query_position_ptr is not None
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    bh = pid // num_blocks
    start_n = pid % num_blocks * BLOCK_N
    h = bh % num_heads
    b = (bh // num_heads).to(tl.int64)
    h64 = h.to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    offs_n = start_n + offs
    if OPTS.WEIGHTS:
        log2_weight_ptr += weight_row(b, h, weight_heads) * stride_w
    log2_weight, log2_size, mask_n = load_log2_weights(
        log2_weight_ptr, size_offset, offs_n, seqlen_k, ACC, OPTS, OPTS.SELF_KEEP, OPTS.PADDING
    )
    qk_scale = tl.cast(qk_scale_high, ACC) + tl.cast(qk_scale_low, ACC)
    kv_h = h // group_size
    k_rows = head_of(k_ptr, b, kv_h, stride_kb, stride_kh, stride_kn, stride_kd, head_dim)
    k_rows = submatrix(k_rows, start_n, 0)
    k = load_tile(k_rows, offs, mask_n, BLOCK_D, OPTS.EVEN_D, True)  # [BLOCK_N, BLOCK_D]
    q_rows = Matrix(q_ptr + (b * stride_qb + h64 * stride_qh), stride_qn, stride_qd, head_dim)
    lse_ptr += b * stride_lb + h64 * stride_lh
    if OPTS.EPS:
        p_eps_key_ptr += bh.to(tl.int64) * seqlen_q
    if query_weight_ptr is not None:
        query_weight_ptr += b * stride_qwb + h64 * stride_qwh
    if query_position_ptr is not None:
        query_position_ptr += b * stride_posb
    total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    num_full, lo, hi = masked_range(
        start_n, start_n + BLOCK_N, seqlen_q, BLOCK_M, OPTS.POSITIONS, ANY_POSITION
    )
    first = tl.cast(0, tl.int32)
    if OPTS.CAUSAL:  # queries before the block see none of its keys
        first = tl.cast(lo, tl.int32)
    for i in range(first, num_full - (hi - lo)):
        total = _add_tile(
            total, k, q_rows, log2_weight, log2_size, offs_n, lse_ptr, p_eps_key_ptr,
            query_weight_ptr, query_position_ptr, unmasked_tile(i, lo, hi) * BLOCK_M, seqlen_q,
            seqlen_k, qk_scale, stride_ln, stride_qwn, stride_posn, BLOCK_M, BLOCK_D, OPTS, False,
        )  # fmt: skip
    for i in range(hi - lo + tl.cdiv(seqlen_q, BLOCK_M) - num_full):
        total = _add_tile(
            total, k, q_rows, log2_weight, log2_size, offs_n, lse_ptr, p_eps_key_ptr,
            query_weight_ptr, query_position_ptr, masked_tile(i, num_full, lo, hi) * BLOCK_M,
            seqlen_q, seqlen_k, qk_scale, stride_ln, stride_qwn, stride_posn,
            BLOCK_M, BLOCK_D, OPTS, True,
        )  # fmt: skip
    out = tl.where(mask_n, tl.sum(total, 1), 0)
    tl.store(out_ptr + bh.to(tl.int64) * seqlen_k + offs_n, out, mask=offs_n < seqlen_k)


@triton.jit
def reduce_heads(x_ptr, out_ptr, num_heads, seqlen_k, divisor, BLOCK_N: tl.constexpr):
    """Sums over heads, in ascending order, divided by ``divisor``.

    Grid: B * cdiv(Nk, BLOCK_N). A program handles BLOCK_N keys of an image.
    """
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    offs_n = pid % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < seqlen_k
    total = tl.zeros([BLOCK_N], x_ptr.dtype.element_ty)
    for h in range(num_heads):
        total += tl.load(x_ptr + (b * num_heads + h) * seqlen_k + offs_n, mask=mask_n, other=0)
    tl.store(out_ptr + b * seqlen_k + offs_n, total / divisor, mask=mask_n)


class ScoreLaunches(NamedTuple):
    """The launches of a call."""

    forward: ForwardLaunches
    column_sums: Launch
    reduce_heads: Launch | None


@planned
def _plan(
    spec: Spec,
    query_weight: tuple[int, ...] | None,
    lse: tuple[int, ...] | None,
    head_reduce: str,
) -> ScoreLaunches:
    """Plan the launches of a call; ``query_weight`` and ``lse`` are strides."""
    (batch, num_heads, seqlen_q, head_dim), q_strides = spec.q
    (_, kv_heads, seqlen_k, _), k_strides = spec.k
    forward = plan_forward(spec)
    weights = forward.weights
    block_d = power_of_two(head_dim, 16)
    settings = heuristics.attention_scores(spec.dtype.itemsize, block_d, seqlen_q)
    # eps is relative to the maximum of a row, which a given lse does not tell.
    reads_lse = lse is not None and spec.eps == 0
    if lse is None or spec.eps > 0:
        lse = num_heads * seqlen_q, seqlen_q, 1
    column_sums = Launch(
        attention_column_sums,
        (batch * num_heads * ceil_div(seqlen_k, settings.block_n),),
        (
            *(num_heads, num_heads // kv_heads, weights.heads, seqlen_q, seqlen_k, head_dim),
            *(weights.stride, weights.size_offset),
            *split_float(abs(spec.scale) * math.log2(math.e) or 1.0),
            *(*q_strides, *k_strides, *lse, *strides(query_weight, 3), *spec.position_strides),
        ),
        settings,
        BLOCK_M=settings.block_m,
        BLOCK_N=settings.block_n,
        BLOCK_D=block_d,
        OPTS=ScoreOptions(
            **spec.logit_options(), EVEN_D=head_dim == block_d, NATURAL_LSE=reads_lse
        ),
    )
    reduce = None
    if head_reduce != "none" and num_heads > 1:
        divisor = float(num_heads) if head_reduce == "mean" else 1.0
        grid = (batch * ceil_div(seqlen_k, BLOCK),)
        numbers = num_heads, seqlen_k, divisor
        reduce = Launch(reduce_heads, grid, numbers, Settings(1, BLOCK), BLOCK_N=BLOCK)
    return ScoreLaunches(forward, column_sums, reduce)


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads."""
    q, k, query_weight, policy, size, key_padding_mask, query_position, lse = inputs[:8]
    (weights, attend, _), column_sums, reduce = _plan(
        describe(inputs),
        None if query_weight is None else query_weight.stride(),
        None if lse is None else lse.stride(),
        inputs.head_reduce,
    )
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    sum_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    by_head = q.new_empty(batch, num_heads, seqlen_k, dtype=sum_dtype)
    log2_weight, tiles = weights(by_head, policy, size, key_padding_mask)
    p_eps_key = None
    if lse is None or inputs.eps > 0:
        lse = by_head.new_empty(batch, num_heads, seqlen_q)
        p_eps_key = by_head.new_empty(batch, num_heads, seqlen_q) if inputs.eps > 0 else None
        attend(q, k, None, query_position, log2_weight, tiles, None, lse, p_eps_key, None)
    column_sums(q, k, query_weight, query_position, log2_weight, lse, p_eps_key, by_head)
    if inputs.head_reduce == "none":
        return by_head
    if reduce is None:
        return by_head.view(batch, seqlen_k)
    out = by_head.new_empty(batch, seqlen_k)
    reduce(by_head, out)
    return out
