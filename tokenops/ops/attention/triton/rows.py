# SPDX-License-Identifier: Apache-2.0
"""What the kernels of attention share: weights of keys, tiles of a sequence, precision.

Logits count in powers of two: ``x_ij = slope q_i . k_j + log2 z_j`` with
``slope = scale log2(e)``. Letters: B batch, H heads of queries, Hkv heads of keys, Nq queries,
Nk keys, D width, Dv width of the values. A row is one query of one head.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl

from .... import _backend

#: Rows or keys of a tile at most; offsets within one have 32 bits.
MOST_ROWS = 256

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))


def precision(arch: str, dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 keeps its precision, three products of tf32 each."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"


def halves(number: float) -> tuple[float, float]:
    """A number as the sum of two that float32 holds: kernels take no double."""
    if abs(number) > torch.finfo(torch.float32).max:
        raise _backend.UnservedError(f"the kernels take no number beyond float32, as {number:g}")
    high: float = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


@triton.jit
def key_bias(
    policy, size, mask, b, h, at, keys,
    policy_b, policy_h, policy_n, size_b, size_n, mask_b, mask_n,
    TINY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``log2 (z p)`` and ``log2 z`` of keys, -inf for those without such a weight."""
    far = at.to(tl.int64)
    tiny = tl.full([], TINY, ACC)
    seen = at < keys
    if mask is not None:
        seen = seen & (tl.load(mask + b * mask_b + far * mask_n, mask=seen, other=1) == 0)
    log_size = tl.zeros(at.shape, ACC)
    if size is not None:
        z = tl.load(size + b * size_b + far * size_n, mask=seen, other=0)
        seen = seen & (z >= tiny)
        log_size = tl.log2(tl.where(seen, z, 1).to(ACC))
    log_size = tl.where(seen, log_size, float("-inf"))
    bias = log_size
    if policy is not None:
        p = tl.load(policy + b * policy_b + h * policy_h + far * policy_n, mask=seen, other=0)
        kept = p >= tiny
        bias = tl.where(kept, log_size + tl.log2(tl.where(kept, p, 1).to(ACC)), float("-inf"))
    return bias, log_size


@triton.jit
def weigh_keys(
    policy, size, mask, work,
    keys, heads, padded, plane, bias_at,
    policy_b, policy_h, policy_n, size_b, size_n, mask_b, mask_n,
    TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Biases of the keys: ``log2 (z p)``, behind them ``log2 z`` where there is a policy.

    -inf is the bias of a key without weight: padding, size 0 and what is past the end.
    """
    blocks = tl.cdiv(padded, BLOCK)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)  # image and head
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    bias, log_size = key_bias(
        policy, size, mask, row // heads, row % heads, at, keys,
        policy_b, policy_h, policy_n, size_b, size_n, mask_b, mask_n, TINY, work.dtype.element_ty,
    )  # fmt: skip
    to = work + bias_at + row * padded + at
    tl.store(to, bias, mask=at < padded)
    if policy is not None:
        tl.store(to + plane, log_size, mask=at < padded)


@triton.jit
def crossing(begin, end, length, TILE: tl.constexpr, OWN: tl.constexpr, ANYWHERE: tl.constexpr):
    """Tiles of a sequence: how many whole ones, and which of them [low, high) need a close look.

    Those are the tiles that a block [begin, end) of the other sequence has its own tokens in; all
    of them where tokens stand anywhere.
    """
    full = length // TILE
    low, high = full, full
    if ANYWHERE:
        full, low, high = 0, 0, 0
    elif OWN:
        low = tl.minimum(begin // TILE, full)
        high = tl.minimum(tl.cdiv(end, TILE), full)
    return full, low, high


@triton.jit
def load_tile(
    base, rows, row_stride, stride, keep, width,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix, 0 where they are not kept and past its width."""
    column = tl.arange(0, BLOCK)
    at = base + rows[:, None] * row_stride + column[None, :] * stride  # [rows, BLOCK]
    if WHOLE:
        if MASKED:
            return tl.load(at, mask=keep[:, None], other=0)
        return tl.load(at)
    inside = (column < width)[None, :]
    if MASKED:
        inside = inside & keep[:, None]
    return tl.load(at, mask=inside, other=0)


@triton.jit
def load_queries(
    base, rows, row_stride, stride, keep, width,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, SIGN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries times the sign of the scale: larger products are larger logits then."""
    q = load_tile(base, rows, row_stride, stride, keep, width, BLOCK, WHOLE, MASKED)
    if SIGN < 0:
        q = -q
    if SIGN == 0:
        q = (q * 0).to(q.dtype)
    return q


@triton.jit
def logits(
    q, k, bias, log_size, own, at, keys, slope,
    PRECISION: tl.constexpr, WEIGHTS: tl.constexpr, SELF_KEEP: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSELY: tl.constexpr,
):  # fmt: skip
    """Logits of a tile with the keys' bias, or with their log size where a key is a row's own.

    -inf for what is not seen. Without weights of keys they are products yet, to be multiplied by
    the slope.
    """
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=slope.dtype)
    if WEIGHTS:
        if SELF_KEEP and CLOSELY:  # the choice between two sums, in the layout of the product
            is_own = own[:, None] == at[None, :]
            x = tl.where(is_own, x * slope + log_size[None, :], x * slope + bias[None, :])
        else:
            x = x * slope + bias[None, :]
    if CLOSELY and (CAUSAL or not WEIGHTS):
        if CAUSAL and WEIGHTS:  # a bias is -inf where a key is not seen
            visible = at[None, :] <= own[:, None]
        elif CAUSAL:
            visible = at[None, :] <= tl.minimum(own, keys - 1)[:, None]
        else:
            visible = (at < keys)[None, :]
        x = tl.where(visible, x, float("-inf"))
    return x


@triton.jit
def finite(x):
    """0 instead of -inf, which must not be subtracted from itself."""
    return tl.where(x == float("-inf"), 0, x)


@triton.jit
def add_policy(x, log_policy, own, at, SELF_KEEP: tl.constexpr):
    """Logits with the policy, but for a row's own key."""
    weighted = x + log_policy[None, :]
    if SELF_KEEP:
        weighted = tl.where(own[:, None] == at[None, :], x, weighted)
    return weighted


@triton.jit
def first_live(log_size, keys, BLOCK: tl.constexpr):
    """The first key that takes part; the number of keys if there is none."""
    first = tl.cast(keys, tl.int32)
    for start in range(0, keys, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = tl.load(log_size + at, mask=at < keys, other=float("-inf")) > float("-inf")
        first = tl.minimum(first, tl.min(tl.where(live, at, keys), 0))
    return first
