# SPDX-License-Identifier: Apache-2.0
"""Attention that keys receive: L of each row, sums over rows by key and head, sums over heads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import (
    BEFORE_3_7,
    Launch,
    Settings,
    arch,
    ceil_div,
    heuristic,
    planned,
    power_of_two,
)
from ..arguments import ScoreInputs
from .forward import BLOCK, Layout, Plan, plan, weigh
from .forward_tile import load_weights
from .rows import LOG2E, crossing, halves, load_queries, load_tile, precision

#: Settings of the sums over rows, by bytes of an element and padded width. Rows are queries of a
#: tile, columns are keys.
_TABLE = {
    (2, 64): Settings(64, 128, 8, 3),
    (2, 128): Settings(64, 128, 8, 2),
    (2, 256): Settings(64, 64, 8, 2),
    (4, 64): Settings(32, 64, 4, 2),
    (4, 128): Settings(16, 32, 4, 1),
    (8, 64): Settings(16, 32, 4, 1),
    (8, 128): Settings(16, 16, 4, 1),
}
if BEFORE_3_7:  # 64 columns spill registers on sm_100
    _TABLE[2, 256] = Settings(64, 32, 8, 2)


@heuristic
def attention_received(itemsize: int, width: int, queries: int) -> Settings:
    """Settings of the sums over rows."""
    found = _TABLE[itemsize, 64 if width <= 64 else 128 if width <= 128 else 256]
    return found if queries > 16 else Settings(16, found.block_n, 4, 1)


@triton.jit
def _receive(
    q, k, weight, log_size, at, received, lse, each, query_weight, position, start, queries, keys,
    width, slope, q_n, q_d, l_n, w_n, position_n,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    SIGN: tl.constexpr, WEIGHTS: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr,
    CAUSAL: tl.constexpr, EPS: tl.constexpr, NATURAL: tl.constexpr, CLOSELY: tl.constexpr,
):  # fmt: skip
    """What a tile of rows gives to a block of keys; looked at closely at ends and diagonals."""
    ACC: tl.constexpr = received.dtype
    rows = start + tl.arange(0, ROWS)
    far = rows.to(tl.int64)
    inside = rows < queries
    q_tile = load_queries(
        q + tl.cast(start, tl.int64) * q_n,
        tl.arange(0, ROWS),
        q_n,
        q_d,
        inside,
        width,
        BLOCK_D,
        WHOLE_D,
        SIGN,
        CLOSELY,
    )  # [ROWS, BLOCK_D]
    s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC)  # [KEYS, ROWS]
    if CLOSELY:
        level = tl.load(lse + far * l_n, mask=inside, other=float("-inf"))
    else:
        level = tl.load(lse + far * l_n)
    # A row of no weight: its shares are exp2(-inf).
    if NATURAL:
        level *= tl.full([], LOG2E, ACC)
    level = tl.where(level == float("-inf"), float("inf"), level)
    own = rows
    if CLOSELY and position is not None:
        own = tl.load(position + far * position_n, mask=inside, other=-1)
        own = tl.maximum(tl.minimum(own, keys), -1)
    if WEIGHTS:
        x = s * slope + (weight[:, None] - level[None, :])
        if SELF_KEEP and CLOSELY:
            kept = s * slope + (log_size[:, None] - level[None, :])
            x = tl.where(at[:, None] == own[None, :], kept, x)
    else:
        x = s * slope - level[None, :]
    y = tl.exp2(x)
    if EPS:
        if CLOSELY:
            y += tl.load(each + rows, mask=inside, other=0)[None, :]
        else:
            y += tl.load(each + rows)[None, :]
    if CLOSELY:
        if CAUSAL:
            y = tl.where(at[:, None] <= own[None, :], y, 0)
        if EXCLUDE:
            y = tl.where(at[:, None] == own[None, :], 0, y)
    if query_weight is not None:
        if CLOSELY:
            w = tl.load(query_weight + far * w_n, mask=inside, other=0)
        else:
            w = tl.load(query_weight + far * w_n)
        return received + y * w[None, :]
    if CLOSELY and EPS:
        y = tl.where(inside[None, :], y, 0)
    return received + y


@triton.jit
def receive(
    q, k, query_weight, position, work, lse, each, out,
    heads, group, weight_heads, queries, keys, width, padded, plane, slope_high, slope_low,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, l_b, l_h, l_n, w_b, w_h, w_n, position_b, position_n,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, WEIGHTS: tl.constexpr, POLICY: tl.constexpr,
    PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr,
    EPS: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """Attention that a block of keys receives from all rows of a head."""
    ACC: tl.constexpr = out.dtype.element_ty
    OWN: tl.constexpr = SELF_KEEP or EXCLUDE or CAUSAL
    ANYWHERE: tl.constexpr = OWN and position is not None
    blocks = tl.cdiv(keys, KEYS)
    pid = tl.program_id(0)
    row = pid // blocks  # image and head
    begin = pid % blocks * KEYS
    h = row % heads
    b = (row // heads).to(tl.int64)
    far_h = h.to(tl.int64)
    local = tl.arange(0, KEYS)
    at = begin + local
    weight_row = b
    if weight_heads > 1:
        weight_row = b * weight_heads + h
    bias = work
    if WEIGHTS:
        bias = work + weight_row * padded
    weight, log_size, seen = load_weights(
        bias, plane, at, keys, KEYS, ACC, WEIGHTS, POLICY, SELF_KEEP, PADDING
    )
    slope = tl.cast(slope_high, ACC) + tl.cast(slope_low, ACC)
    k_tile = load_tile(
        k + b * k_b + (h // group).to(tl.int64) * k_h + begin.to(tl.int64) * k_n, local, k_n, k_d,
        seen, width, BLOCK_D, WHOLE_D, True,
    )  # fmt: skip
    q += b * q_b + far_h * q_h
    lse += b * l_b + far_h * l_h
    if EPS:
        each += row.to(tl.int64) * queries
    if query_weight is not None:
        query_weight += b * w_b + far_h * w_h
    if position is not None:
        position += b * position_b
    received = tl.zeros([KEYS, ROWS], ACC)
    full, low, high = crossing(begin, begin + KEYS, queries, ROWS, OWN, ANYWHERE)
    skip = tl.cast(0, tl.int32)
    if CAUSAL:  # rows before the block see none of it
        skip = tl.cast(low, tl.int32)
    for i in range(skip, full - (high - low)):
        tile = tl.where(i < low, i, i + high - low)
        received = _receive(
            q, k_tile, weight, log_size, at, received, lse, each, query_weight, position,
            tile * ROWS, queries, keys, width, slope, q_n, q_d, l_n, w_n, position_n,
            ROWS, BLOCK_D, WHOLE_D, PRECISION, SIGN, WEIGHTS, SELF_KEEP, EXCLUDE, CAUSAL, EPS,
            NATURAL, False,
        )  # fmt: skip
    for i in range(high - low + tl.cdiv(queries, ROWS) - full):
        tile = tl.where(low + i < high, low + i, full + i - (high - low))
        received = _receive(
            q, k_tile, weight, log_size, at, received, lse, each, query_weight, position,
            tile * ROWS, queries, keys, width, slope, q_n, q_d, l_n, w_n, position_n,
            ROWS, BLOCK_D, WHOLE_D, PRECISION, SIGN, WEIGHTS, SELF_KEEP, EXCLUDE, CAUSAL, EPS,
            NATURAL, True,
        )  # fmt: skip
    total = tl.where(seen, tl.sum(received, 1), 0)
    tl.store(out + row.to(tl.int64) * keys + at, total, mask=at < keys)


@triton.jit
def add_heads(
    received, out,
    heads, keys, divisor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over heads, in their order, or their mean."""
    blocks = tl.cdiv(keys, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    at = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < keys
    total = tl.zeros([BLOCK], received.dtype.element_ty)
    for h in range(heads):
        total += tl.load(received + (b * heads + h) * keys + at, mask=inside, other=0)
    tl.store(out + b * keys + at, total / divisor, mask=inside)


class _Plan(NamedTuple):
    """The launches of a call."""

    rows: Plan
    receive: Launch
    add: Launch | None


@planned
def _plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    query_weight: tuple[int, ...] | None,
    policy: Layout | None,
    size: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    position: tuple[int, ...] | None,
    lse: tuple[int, ...] | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    scale: float,
    head_reduce: str,
) -> _Plan:
    (batch, heads, queries, width), q_strides = q
    (_, key_heads, keys, _), k_strides = k
    rows = plan(
        device, index, dtype, q, k, None, policy, size, mask, position,
        self_keep, exclude_self, eps, is_causal, scale,
    )  # fmt: skip
    weights = rows.weights
    block = power_of_two(width, 16)
    tile = attention_received(dtype.itemsize, block, queries)
    given = lse is not None and eps == 0
    if lse is None or eps > 0:
        lse = heads * queries, queries, 1
    weight_strides = (0, 0, 0) if query_weight is None else query_weight
    if len(weight_strides) == 2:
        weight_strides = weight_strides[0], 0, weight_strides[1]
    at_strides = (0, 0) if position is None else (0, *position)[-2:]
    slope = abs(scale) * math.log2(math.e) or 1.0
    launch = Launch(
        receive,
        (batch * heads * ceil_div(keys, tile.block_n),),
        (
            *(heads, heads // key_heads, weights.heads, queries, keys, width),
            *(weights.padded, weights.plane, *halves(slope)),
            *(*q_strides, *k_strides, *lse, *weight_strides, *at_strides),
        ),
        tile,
        ROWS=tile.block_m,
        KEYS=tile.block_n,
        BLOCK_D=block,
        WHOLE_D=width == block,
        PRECISION=precision(device, dtype),
        SIGN=(scale > 0) - (scale < 0),
        WEIGHTS=weights.launch is not None,
        POLICY=policy is not None,
        PADDING=size is not None or mask is not None,
        SELF_KEEP=self_keep and policy is not None,
        EXCLUDE=exclude_self,
        CAUSAL=is_causal,
        EPS=eps > 0,
        NATURAL=given,
    )
    add = None
    if head_reduce != "none" and heads > 1:
        add = Launch(
            add_heads,
            (batch * ceil_div(keys, BLOCK),),
            (heads, keys, float(heads) if head_reduce == "mean" else 1.0),
            Settings(1, BLOCK),
            BLOCK=BLOCK,
        )
    return _Plan(rows, launch, add)


def attention_scores(inputs: ScoreInputs) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads."""
    q, k, query_weight, policy, size, key_padding_mask, position, lse = inputs[:8]
    self_keep, exclude_self, eps, is_causal, scale, head_reduce = inputs[8:]
    rows, receive_all, add = _plan(
        arch(q),
        q.device.index,
        q.dtype,
        (q.shape, q.stride()),
        (k.shape, k.stride()),
        None if query_weight is None else query_weight.stride(),
        None if policy is None else (policy.shape, policy.stride()),
        None if size is None else size.stride(),
        None if key_padding_mask is None else key_padding_mask.stride(),
        None if position is None else position.stride(),
        None if lse is None else lse.stride(),
        self_keep,
        exclude_self,
        eps,
        is_causal,
        scale,
        head_reduce,
    )
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    received = q.new_empty(batch, heads, keys, dtype=sums)
    work, tiles = weigh(rows.weights, policy, size, key_padding_mask, received)
    each = None
    if lse is None or eps > 0:
        lse = received.new_empty(batch, heads, queries)
        each = received.new_empty(batch, heads, queries) if eps > 0 else None
        rows.attend(q, k, None, position, work, tiles, None, lse, each, None)
    receive_all(q, k, query_weight, position, work, lse, each, received)
    if head_reduce == "none":
        return received
    if add is None:
        return received.view(batch, keys)
    out = received.new_empty(batch, keys)
    add(received, out)
    return out
