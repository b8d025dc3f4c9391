# SPDX-License-Identifier: Apache-2.0
"""Online softmax over tiles of keys with log2 weights and eps: state, update and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .common import LN2, LogitOptions


@dataclass(frozen=True)
class ForwardOptions(LogitOptions):
    """Options of the kernels of the forward pass."""

    EVEN_DV: bool  # BLOCK_DV is the width of v
    HAS_V: bool  # without v, for scores, only lse and p_eps by key are written
    FP16: bool  # p is rounded to float16, which has a small range


class SoftmaxState(NamedTuple):
    """Running values of a block of queries; all but acc, m_i and l_i serve eps."""

    acc: tl.tensor  # [BLOCK_M, BLOCK_DV] sum of p @ v
    v_sum_m: tl.tensor  # [BLOCK_M, BLOCK_DV] sum of the values that a query sees, in masked tiles
    v_sum: tl.tensor  # [BLOCK_DV] sum of values in other tiles, the same for all queries
    m_i: tl.tensor  # [BLOCK_M] running maximum: p = exp2(qk - m_i); with eps max_i, unless FP16
    max_i: tl.tensor  # [BLOCK_M] what eps refers to: maximum without the policy, over all keys
    l_i: tl.tensor  # [BLOCK_M] sum of p
    argmax: tl.tensor  # [BLOCK_M] the first key where qk is max_i
    num_keys: tl.tensor  # [BLOCK_M] number of keys that a query sees


@triton.jit
def initial_state(v_sum, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """The state before the first tile."""
    ACC: tl.constexpr = v_sum.dtype
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    m_i = tl.full([BLOCK_M], float("-inf"), ACC)
    argmax = tl.full([BLOCK_M], -1, tl.int32)
    l_i, num_keys = tl.zeros([BLOCK_M], ACC), tl.zeros([BLOCK_M], tl.float32)
    return SoftmaxState(acc, acc, v_sum, m_i, m_i, l_i, argmax, num_keys)


@triton.jit
def finite(x):
    """0 instead of -inf, because -inf - -inf is NaN."""
    return tl.where(x == float("-inf"), 0, x)


@triton.jit
def logits(
    q, k, log2_weight, log2_size, pos_m, offs_n, seqlen_k, qk_scale,
    OPTS: tl.constexpr, SELF_KEEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile qk [BLOCK_M, BLOCK_N], -inf where a key is not seen; q k^T, unscaled, without WEIGHTS.

    Under SELF_KEEP a query's own key has log2_size in the place of log2_weight.
    """
    qk = tl.dot(q, tl.trans(k), input_precision=OPTS.INPUT_PRECISION, out_dtype=qk_scale.dtype)
    if OPTS.WEIGHTS:
        if SELF_KEEP:  # both sums have the layout of the product, weights have not
            is_self = pos_m[:, None] == offs_n[None, :]
            unweighted = qk * qk_scale + log2_size[None, :]
            qk = tl.where(is_self, unweighted, qk * qk_scale + log2_weight[None, :])
        else:
            qk = qk * qk_scale + log2_weight[None, :]
    if MASKED and (OPTS.CAUSAL or not OPTS.WEIGHTS):
        if OPTS.CAUSAL and OPTS.WEIGHTS:  # log2_weight is -inf where a key is not valid
            visible = offs_n[None, :] <= pos_m[:, None]
        elif OPTS.CAUSAL:
            visible = offs_n[None, :] <= tl.minimum(pos_m, seqlen_k - 1)[:, None]
        else:
            visible = (offs_n < seqlen_k)[None, :]
        qk = tl.where(visible, qk, float("-inf"))
    return qk


@triton.jit
def add_policy(qk, log2_policy, pos_m, offs_n, SELF_KEEP: tl.constexpr):
    """Add the policy to qk, except at a query's own key under SELF_KEEP."""
    weighted = qk + log2_policy[None, :]
    if SELF_KEEP:
        weighted = tl.where(pos_m[:, None] == offs_n[None, :], qk, weighted)
    return weighted


@triton.jit
def update(
    state, q, k, v, log2_weight, log2_size, mask_n, pos_m, offs_n, seqlen_k, qk_scale, log2_eps,
    OPTS: tl.constexpr, MASKED: tl.constexpr, SUM_V: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the state; SUM_V: add its values to v_sum, which eps needs."""
    acc, v_sum_m, v_sum, m_i, max_i, l_i, argmax, num_keys = state
    SELF_KEEP: tl.constexpr = OPTS.SELF_KEEP and MASKED
    # eps refers to the maximum over dropped keys too, so the policy is added after the maximum.
    LATE_POLICY: tl.constexpr = OPTS.POLICY and OPTS.EPS
    if LATE_POLICY:
        log2_policy = log2_weight - finite(log2_size)
        log2_weight = log2_size
    qk = logits(
        q, k, log2_weight, log2_size, pos_m, offs_n, seqlen_k, qk_scale,
        OPTS, SELF_KEEP and not LATE_POLICY, MASKED,
    )  # fmt: skip
    scale = qk_scale
    if OPTS.WEIGHTS:
        scale = 1.0  # logits() has scaled qk
    tile_max = tl.max(qk, 1)
    if OPTS.EPS:
        if OPTS.HAS_V:
            first = tl.where(qk == tile_max[:, None], offs_n[None, :], 2147483647)  # the last int32
            argmax = tl.where(tile_max * scale > max_i, tl.min(first, 1), argmax)
        max_i = tl.maximum(max_i, tile_max * scale)
        m_new = max_i
        if OPTS.FP16:  # relative to a much larger dropped key, p of kept keys would underflow
            if LATE_POLICY:
                tile_max = tl.max(add_policy(qk, log2_policy, pos_m, offs_n, SELF_KEEP), 1)
            m_new = tl.maximum(m_i, tl.maximum(max_i + log2_eps, tile_max * scale))
    else:
        m_new = tl.maximum(m_i, tile_max * scale)
    base = finite(m_new)
    alpha = tl.exp2(m_i - base)
    qk = qk * scale - base[:, None]
    if LATE_POLICY:
        qk = add_policy(qk, log2_policy, pos_m, offs_n, SELF_KEEP)
    p = tl.exp2(qk)
    l_i = l_i * alpha + tl.sum(p, 1)
    if OPTS.HAS_V:
        if OPTS.EXCLUDE_SELF and MASKED:
            p = tl.where(pos_m[:, None] == offs_n[None, :], 0, p)
        acc = acc * alpha[:, None]
        acc = tl.dot(
            p.to(v.dtype), v, acc, input_precision=OPTS.INPUT_PRECISION, out_dtype=acc.dtype
        )
    if OPTS.EPS:
        if MASKED and (OPTS.CAUSAL or OPTS.EXCLUDE_SELF):  # queries see different keys
            ones = tl.full([pos_m.shape[0], offs_n.shape[0]], 1.0, tl.float32)
            if OPTS.CAUSAL:
                ones = tl.where(offs_n[None, :] <= pos_m[:, None], 1.0, 0.0)
            if OPTS.PADDING:
                num_keys += tl.sum(ones * mask_n.to(tl.float32)[None, :], 1)
            if OPTS.EXCLUDE_SELF:
                ones = tl.where(offs_n[None, :] == pos_m[:, None], 0.0, ones)
            if OPTS.HAS_V:  # v is 0 where a key is not valid
                v_sum_m = tl.dot(
                    ones.to(v.dtype), v, v_sum_m,
                    input_precision=OPTS.INPUT_PRECISION, out_dtype=acc.dtype,
                )  # fmt: skip
        else:
            if OPTS.PADDING:
                num_keys += tl.sum(mask_n.to(tl.float32), 0)
            if OPTS.HAS_V and SUM_V:
                v_sum += tl.sum(v.to(acc.dtype), 0)
    return SoftmaxState(acc, v_sum_m, v_sum, m_new, max_i, l_i, argmax, num_keys)


@triton.jit
def first_valid_key(log2_size_ptr, seqlen_k, BLOCK_N: tl.constexpr):
    """The first valid key, Nk if there is none."""
    first = tl.cast(seqlen_k, tl.int32)
    for start_n in range(0, seqlen_k, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        log2_size = tl.load(log2_size_ptr + offs_n, mask=offs_n < seqlen_k, other=float("-inf"))
        valid = tl.where(log2_size > float("-inf"), offs_n, seqlen_k)
        first = tl.minimum(first, tl.min(valid, 0))
    return first


@triton.jit
def finalize(
    state, lse_ptr, p_eps_ptr, argmax_ptr, rows, log2_size_ptr, first_valid, pos_m, mask_m,
    seqlen_k, eps, BLOCK_N: tl.constexpr, OPTS: tl.constexpr,
):  # fmt: skip
    """The output of a block of queries; writes lse and, with eps, p_eps and argmax.

    Without values, for scores, lse is to base 2, and p_eps is divided by the number of keys.
    ``first_valid`` is the first valid key; if it is None, it is searched for when needed.
    """
    acc, v_sum_m, v_sum, m_i, max_i, l_i, argmax, num_keys = state
    ACC: tl.constexpr = l_i.dtype
    if OPTS.PADDING:  # a query that sees no key is empty even if it is NaN
        is_nan = l_i != l_i
        if first_valid is None:
            first_valid = tl.cast(0, tl.int32)
            if tl.max(is_nan.to(tl.int32), 0) > 0:
                first_valid = first_valid_key(log2_size_ptr, seqlen_k, BLOCK_N)
        no_key = is_nan & (first_valid >= seqlen_k)
        if OPTS.CAUSAL:
            no_key = is_nan & (first_valid > tl.minimum(pos_m, seqlen_k - 1))
        l_i = tl.where(no_key, 0, l_i)
        acc = tl.where(no_key[:, None], 0, acc)
        max_i = tl.where(no_key, float("-inf"), max_i)
    if OPTS.EPS:
        eps_sum = tl.where(max_i == float("-inf"), 0, eps * tl.exp2(max_i - finite(m_i)))
        l_i += eps_sum
        if not OPTS.PADDING:
            num_keys += seqlen_k
            if OPTS.CAUSAL:
                num_keys = tl.minimum(pos_m + 1, seqlen_k).to(tl.float32)
        eps_key = eps_sum / tl.maximum(num_keys, 1.0).to(ACC)
        if OPTS.HAS_V:
            acc += eps_key[:, None] * (v_sum_m + v_sum[None, :])
    empty = l_i == 0
    inverse = 1 / tl.where(empty, 1, l_i)
    lse = finite(m_i) + tl.log2(tl.where(empty, 1, l_i))
    if OPTS.HAS_V:
        lse *= tl.full([], LN2, ACC)
    tl.store(lse_ptr + rows, tl.where(empty, float("-inf"), lse), mask=mask_m)
    if OPTS.EPS and OPTS.HAS_V:
        tl.store(p_eps_ptr + rows, eps_sum * inverse, mask=mask_m)
        tl.store(argmax_ptr + rows, tl.where(argmax < seqlen_k, argmax, -1), mask=mask_m)
    elif OPTS.EPS:
        tl.store(p_eps_ptr + rows, eps_key * inverse, mask=mask_m)
    return acc * inverse[:, None]
