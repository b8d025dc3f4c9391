# SPDX-License-Identifier: Apache-2.0
"""Shared by the attention kernels: options, log2 weights of keys, tiles and the loops over them.

``qk_ij = qk_scale q_i . k_j + log2_weight_j`` is a logit times ``log2(e)``: ``qk_scale`` is the
scale times ``log2(e)`` and ``log2_weight = log2(size policy)``. Then ``p = exp2(qk - lse2)``.
Letters: B batch, H query heads, Hkv key heads, Nq queries, Nk keys, D width, Dv width of values.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .... import _backend

#: Most rows or keys of a tile; offsets within a tile have 32 bits.
MAX_BLOCK = 256

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Options:
    """Compile-time options of a kernel, which it takes as one constant.

    Each kernel has a subclass with the options that it reads, because another value of any option
    compiles it anew.
    """

    INPUT_PRECISION: str  # of tl.dot
    EVEN_D: bool  # BLOCK_D divides the width of q and k
    WEIGHTS: bool  # there is a policy, a size or a mask, so that log2_weight is not 0
    SELF_KEEP: bool  # the policy does not apply to the key at a query's position
    EXCLUDE_SELF: bool  # the key at a query's position adds no value
    CAUSAL: bool  # a query sees keys up to its position
    EPS: bool  # eps > 0: its share is spread over the keys that a query sees

    @property
    def POSITIONS(self) -> bool:
        """Whether it matters where a query stands among the keys."""
        return self.SELF_KEEP or self.EXCLUDE_SELF or self.CAUSAL


@dataclass(frozen=True)
class LogitOptions(Options):
    """Options of the kernels of the forward pass and of scores."""

    SCALE_SIGN: int  # sign of the scale, which q is multiplied by; qk_scale is positive
    POLICY: bool  # there is a policy, so that log2_weight and log2_size differ
    PADDING: bool  # there are sizes or a mask, so that some keys may be invalid


@dataclass(frozen=True)
class BackwardOptions(Options):
    """Options of the kernels of the backward pass."""

    EVEN_DV: bool  # BLOCK_DV divides the width of v
    SPLIT_D: bool  # q and k are too wide for registers: products read BLOCK_PART columns at a time
    SPLIT_DV: bool  # the same for v and do
    BLOCK_PART: int  # columns that dot_in_parts reads at a time


def input_precision(arch: str, dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 keeps its precision, as three products of tf32."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def split_float(number: float) -> tuple[float, float]:
    """A number as the sum of two float32 numbers, because kernels take no float64 argument."""
    if abs(number) > torch.finfo(torch.float32).max:
        raise _backend.UnservedError(f"the kernels take no number beyond float32, got {number:g}")
    high: float = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


class Matrix(NamedTuple):
    """A matrix in global memory: its first element, strides of rows and columns, and width."""

    ptr: tl.tensor
    stride_n: tl.tensor
    stride_d: tl.tensor
    width: tl.tensor


@triton.jit
def head_of(ptr, b, h, stride_b, stride_h, stride_n, stride_d, width):
    """The matrix [N, D] of a head of a tensor."""
    return Matrix(ptr + b * stride_b + tl.cast(h, tl.int64) * stride_h, stride_n, stride_d, width)


@triton.jit
def contiguous_head(ptr, b, start_n, h, num_heads, seqlen, width):
    """The matrix of a head of a contiguous tensor [B, N, H, D], from row ``start_n`` on."""
    stride_n = num_heads * width
    return Matrix(ptr + (b * seqlen + start_n) * stride_n + h * width, stride_n, 1, width)


@triton.jit
def submatrix(x, row, column):
    """The matrix from a row and a column on."""
    width = x.width - column
    ptr = x.ptr + tl.cast(row, tl.int64) * x.stride_n + column * x.stride_d
    return Matrix(ptr, x.stride_n, x.stride_d, width)


@triton.jit
def load_tile(
    x, offs, mask, BLOCK: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of a matrix, 0 where the mask is False and past the last column."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = x.ptr + offs[:, None] * x.stride_n + offs_d[None, :] * x.stride_d  # [rows, BLOCK]
    if EVEN:
        if MASKED:
            return tl.load(ptrs, mask=mask[:, None], other=0)
        return tl.load(ptrs)
    inside = (offs_d < x.width)[None, :]
    if MASKED:
        inside = inside & mask[:, None]
    return tl.load(ptrs, mask=inside, other=0)


@triton.jit
def load_queries(
    x, offs_m, mask_m, BLOCK_D: tl.constexpr, OPTS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Queries times the sign of the scale, so that a larger product is a larger logit."""
    q = load_tile(x, offs_m, mask_m, BLOCK_D, OPTS.EVEN_D, MASKED)  # [BLOCK_M, BLOCK_D]
    if OPTS.SCALE_SIGN < 0:
        q = -q
    if OPTS.SCALE_SIGN == 0:
        q = (q * 0).to(q.dtype)  # NaN stays NaN
    return q


@triton.jit
def load_log2_weights(
    log2_weight_ptr, size_offset, offs_n, seqlen_k,
    ACC: tl.constexpr, OPTS: tl.constexpr, NEED_SIZE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """log2_weight, log2_size if needed, and the mask of keys inside, with PADDING of valid ones."""
    log2_weight = tl.zeros(offs_n.shape, ACC)
    log2_size = log2_weight
    mask_n = offs_n < seqlen_k
    if OPTS.WEIGHTS:
        log2_weight = tl.load(log2_weight_ptr + offs_n)
        log2_size = log2_weight
        if OPTS.POLICY and (NEED_SIZE or PADDING):
            log2_size = tl.load(log2_weight_ptr + size_offset + offs_n)
    if PADDING:
        mask_n = log2_size > float("-inf")
    return log2_weight, log2_size, mask_n


@triton.jit
def dot_in_parts(a, mask_a, b, mask_b, ACC: tl.constexpr, OPTS: tl.constexpr):
    """``a @ b^T`` of matrices in memory, BLOCK_PART columns at a time."""
    M: tl.constexpr = mask_a.shape[0]
    N: tl.constexpr = mask_b.shape[0]
    BLOCK: tl.constexpr = OPTS.BLOCK_PART
    dot = tl.zeros([M, N], ACC)
    for start_d in range(0, a.width, BLOCK):
        x = load_tile(submatrix(a, 0, start_d), tl.arange(0, M), mask_a, BLOCK, False, True)
        y = load_tile(submatrix(b, 0, start_d), tl.arange(0, N), mask_b, BLOCK, False, True)
        y = tl.trans(y.to(x.dtype))
        dot = tl.dot(x, y, dot, input_precision=OPTS.INPUT_PRECISION, out_dtype=ACC)
    return dot


@triton.jit
def load_row(ptrs, mask, other, MASKED: tl.constexpr):
    """One number a row, ``other`` where the mask is False."""
    if MASKED:
        return tl.load(ptrs, mask=mask, other=other)
    return tl.load(ptrs)


@triton.jit
def store_tile(x, tile, offs, mask, BLOCK: tl.constexpr):
    """Write rows of a contiguous matrix where the mask is True."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = x.ptr + (offs[:, None] * x.stride_n + offs_d[None, :])  # [rows, BLOCK]
    tile = tile.to(x.ptr.dtype.element_ty)
    tl.store(ptrs, tile, mask=mask[:, None] & (offs_d < x.width)[None, :])


@triton.jit
def load_positions(ptr, stride, offs_m, mask_m, low, high):
    """Positions of queries; given ones are clamped to ``low`` and ``high`` that are not None."""
    pos_m = offs_m
    if ptr is not None:
        pos_m = tl.load(ptr + offs_m.to(tl.int64) * stride, mask=mask_m, other=-1)
        if high is not None:
            pos_m = tl.minimum(pos_m, high)
        if low is not None:
            pos_m = tl.maximum(pos_m, low)
    return pos_m


@triton.jit
def weight_row(b, h, weight_heads):
    """Row of the log2 weights: of an image or, with a policy per head, of a head."""
    row = b
    if weight_heads > 1:
        row = b * weight_heads + h
    return row


@triton.jit
def store_log2_weights(
    policy_ptr, size_ptr, mask_ptr, log2_weight_ptr, row, weight_heads, offs_n, seqlen_k,
    stride_w, size_offset,
    stride_pb, stride_ph, stride_pn, stride_sb, stride_sn, stride_mb, stride_mn,
    TINY: tl.constexpr,
):  # fmt: skip
    """Write log2(size policy), which is returned, and, if there is a policy, log2(size) of keys.

    Both are -inf for keys that are masked, of size 0 or past the end.
    """
    ACC: tl.constexpr = log2_weight_ptr.dtype.element_ty
    b, h = row // weight_heads, row % weight_heads
    offs = offs_n.to(tl.int64)
    tiny = tl.full([], TINY, ACC)
    mask_n = offs_n < seqlen_k
    if mask_ptr is not None:
        masked = tl.load(mask_ptr + b * stride_mb + offs * stride_mn, mask=mask_n, other=1)
        mask_n = mask_n & (masked == 0)
    log2_size = tl.zeros(offs_n.shape, ACC)
    if size_ptr is not None:
        size = tl.load(size_ptr + b * stride_sb + offs * stride_sn, mask=mask_n, other=0)
        mask_n = mask_n & (size >= tiny)
        log2_size = tl.log2(tl.where(mask_n, size, 1).to(ACC))
    log2_size = tl.where(mask_n, log2_size, float("-inf"))
    log2_weight = log2_size
    if policy_ptr is not None:
        policy_ptr += b * stride_pb + h * stride_ph
        policy = tl.load(policy_ptr + offs * stride_pn, mask=mask_n, other=0)
        kept = policy >= tiny
        log2_weight = log2_size + tl.log2(tl.where(kept, policy, 1).to(ACC))
        log2_weight = tl.where(kept, log2_weight, float("-inf"))
    ptrs = log2_weight_ptr + row * stride_w + offs_n
    tl.store(ptrs, log2_weight, mask=offs_n < stride_w)
    if policy_ptr is not None:
        tl.store(ptrs + size_offset, log2_size, mask=offs_n < stride_w)
    return log2_weight


@triton.jit
def log2_weights(
    policy_ptr, size_ptr, mask_ptr, log2_weight_ptr,
    seqlen_k, weight_heads, stride_w, size_offset, weight_offset,
    stride_pb, stride_ph, stride_pn, stride_sb, stride_sn, stride_mb, stride_mn,
    TINY: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write log2(size policy) of keys and, ``size_offset`` behind it, log2(size).

    Grid: B * Hw * cdiv(Nk, BLOCK_N), with Hw rows of weights per image: 1, or H.
    """
    blocks = tl.cdiv(stride_w, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    store_log2_weights(
        policy_ptr, size_ptr, mask_ptr, log2_weight_ptr + weight_offset, row, weight_heads,
        (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N), seqlen_k, stride_w, size_offset,
        stride_pb, stride_ph, stride_pn, stride_sb, stride_sn, stride_mb, stride_mn, TINY,
    )  # fmt: skip


@triton.jit
def masked_range(
    start, end, length, BLOCK: tl.constexpr, POSITIONS: tl.constexpr, ANY_POSITION: tl.constexpr
):  # fmt: skip
    """Number of full tiles of a sequence, and which of them, [lo, hi), need masks.

    A tile needs masks where a block [start, end) of the other sequence crosses the diagonal. With
    ANY_POSITION every tile may, so none is returned as full: callers mask all that are not.
    """
    num_full = length // BLOCK
    lo, hi = num_full, num_full
    if ANY_POSITION:
        num_full, lo, hi = 0, 0, 0
    elif POSITIONS:
        lo = tl.minimum(start // BLOCK, num_full)
        hi = tl.minimum(tl.cdiv(end, BLOCK), num_full)
    return num_full, lo, hi


@triton.jit
def unmasked_tile(i, lo, hi):
    """The i-th tile without masks: tiles before lo, then tiles from hi on."""
    return tl.where(i < lo, i, i + hi - lo)


@triton.jit
def masked_tile(i, num_full, lo, hi):
    """The i-th tile with masks: tiles [lo, hi), then those that are not full."""
    return tl.where(lo + i < hi, lo + i, num_full + i - (hi - lo))


@triton.jit
def visible_keys(
    pos_m, mask_m, start_m, seqlen_k, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    ANY_POSITION: tl.constexpr,
):  # fmt: skip
    """Number of leading keys that some query of a block may see."""
    num_keys = tl.cast(seqlen_k, tl.int32)
    if CAUSAL:
        if ANY_POSITION:
            num_keys = tl.minimum(num_keys, tl.max(tl.where(mask_m, pos_m, -1), 0) + 1)
        else:
            num_keys = tl.minimum(num_keys, start_m + BLOCK_M)
    return num_keys
