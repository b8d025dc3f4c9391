# SPDX-License-Identifier: Apache-2.0
"""The forward pass of attention: one to two launches, planned once per kind of call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import _backend
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
from ..arguments import Inputs, Saved
from .forward_long import attend_long, list_tiles
from .forward_short import attend_short
from .rows import MOST_ROWS, halves, precision, weigh_keys

#: Wider heads need tiles that no device has room for, by bytes of an element.
MAX_WIDTH = {2: 256, 4: 128, 8: 128}

#: Up to so many keys a program holds whole rows.
MAX_SHORT = 256

#: Keys that a program weighs, or sums up over heads, at a time, and those where it lists tiles too.
#: Biases are padded to whole blocks.
BLOCK = 256
LIST_BLOCK = 1024

#: Programs that keep a device busy.
_ENOUGH = 512

#: Settings for many keys, by bytes of an element and padded width: the usual ones, and those where
#: rows keep more, with eps or with positions. What is not here has no room in registers.
_LONG = {
    (2, 64): (Settings(128, 32, 4, 3), Settings(64, 32, 4, 2)),
    (2, 128): (Settings(128, 32, 8, 2), Settings(64, 32, 8, 2)),
    (2, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 1)),
    (4, 128): (Settings(16, 32, 4, 1), Settings(16, 16, 4, 1)),
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 32, 4, 1)),
    (8, 128): (Settings(16, 16, 4, 1), Settings(16, 16, 8, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG[4, 64] = Settings(32, 32, 8, 2), Settings(32, 32, 4, 1)

#: The same where products of whole warp groups leave more registers.
_LONG_SM90 = {
    **_LONG,
    (2, 64): (Settings(128, 64, 4, 3), Settings(64, 32, 4, 2)),
    (2, 128): (Settings(128, 64, 8, 2), Settings(64, 32, 4, 2)),
    (2, 256): (Settings(64, 32, 8, 2), Settings(64, 16, 8, 2)),
    (4, 64): (Settings(64, 32, 4, 2), Settings(32, 32, 4, 1)),
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 16, 4, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG_SM90[2, 128] = _LONG_SM90[2, 128][0], Settings(64, 32, 8, 2)
_LONG_SM100 = {
    **_LONG_SM90,
    (4, 64): _LONG[4, 64],
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 32, 8, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG_SM100[4, 64] = _LONG[4, 64][0], Settings(32, 32, 8, 1)
_TABLES = {"sm_90": _LONG_SM90, "sm_100": _LONG_SM100, "sm_103": _LONG_SM100}

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@heuristic
def attention_long(
    device: str, itemsize: int, width: int, queries: int, policy: bool, more: bool
) -> Settings:
    """Settings for many keys."""
    table = _TABLES.get(device, _LONG)
    found = table[itemsize, 64 if width <= 64 else 128 if width <= 128 else 256][more]
    if queries <= 16 and found.block_m > 16:
        return Settings(16, found.block_n, 4, found.num_stages)
    if BEFORE_3_7 and policy and found == Settings(128, 64, 4, 3):
        return replace(found, num_warps=8)
    return found


def chunks(keys: int, most: int) -> tuple[int, int, int, int]:
    """Up to four powers of two, the rest 0, whose sum holds so many keys and little more."""
    found: list[int] = []
    left = keys
    while left > 0:
        below = min(most, 1 << (left.bit_length() - 1))
        if len(found) == 3 or below < 16:
            below = power_of_two(left, 16)
        found.append(below)
        left -= below
    whole = power_of_two(keys, 16)
    if sum(found) >= whole and whole <= most:
        found = [whole]
    first, second, third, fourth = (*found, 0, 0, 0)[:4]
    return first, second, third, fourth


def settings_short(
    device: str,
    dtype: torch.dtype,
    width: int,
    queries: int,
    keys: int,
    own: bool,
    has_eps: bool,
    padding: bool,
) -> Settings | None:
    """Settings for few keys, whose widest chunk are the columns; None where a program has no room.

    Looking at single keys takes registers: those that are a row's ``own``, largest ones with eps.
    """
    if keys == 0 or keys > MAX_SHORT or dtype.itemsize > 2 or width > 64:
        return None
    closely = own or has_eps
    if has_eps and (padding or dtype == torch.float16):
        return None
    if closely and device in ("sm_100", "sm_103"):
        return None
    rows = 32 if BEFORE_3_7 and own and padding else 64
    return Settings(16 if queries <= 16 else rows, 64 if closely else 128, 4, 1)


class Weights(NamedTuple):
    """How the keys' weights are laid out, and the launch that writes them."""

    launch: Launch | None
    size: int  # of what it writes
    tiles: int  # of the list of tiles that it writes too; 0 for none
    heads: int  # 1, or H where each head has its own
    padded: int
    plane: int  # from log2 (z p) to log2 z
    row_tiles: int  # tiles of a row


def plan_weights(
    batch: int, heads: int, keys: int,
    policy: Layout | None, size: tuple[int, ...] | None, mask: tuple[int, ...] | None,
    tiny: float, tile: int,
) -> Weights:  # fmt: skip
    """Biases of keys, if there are any weights; also tiles of so many keys listed, if not 0."""
    if policy is None and size is None and mask is None:
        return Weights(None, 0, 0, 1, 0, 0, 0)
    weight_heads = heads if policy is not None and len(policy[0]) == 3 else 1
    padded = ceil_div(keys, BLOCK) * BLOCK
    rows = batch * weight_heads
    plane = rows * padded if policy is not None else 0
    policy_strides = (0, 0, 0) if policy is None else policy[1]
    if len(policy_strides) == 2:
        policy_strides = policy_strides[0], 0, policy_strides[1]
    strides = (*policy_strides, *(size or (0, 0)), *(mask or (0, 0)))
    total = plane + rows * padded
    if not tile:
        numbers = (keys, weight_heads, padded, plane, 0, *strides)
        grid = (rows * (padded // BLOCK),)
        launch = Launch(weigh_keys, grid, numbers, Settings(1, BLOCK), TINY=tiny, BLOCK=BLOCK)
        return Weights(launch, total, 0, weight_heads, padded, plane, 0)
    count = padded // tile
    launch = Launch(
        list_tiles,
        (rows,),
        (keys, weight_heads, padded, plane, count, *strides),
        Settings(1, LIST_BLOCK),
        TINY=tiny,
        BLOCK=LIST_BLOCK,
        TILE=tile,
    )
    return Weights(launch, total, rows * (2 * count + 1), weight_heads, padded, plane, count)


class Plan(NamedTuple):
    """The launches of a call, and how much they note for one another."""

    weights: Weights
    attend: Launch
    short: bool


@planned
def plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    q: Layout,
    k: Layout,
    v: Layout | None,
    policy: Layout | None,
    size: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    position: tuple[int, ...] | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    scale: float,
) -> Plan:
    """What a call launches; without values L alone and the share of eps, by ``attend_long``."""
    (batch, heads, queries, width), q_strides = q
    (_, key_heads, keys, _), k_strides = k
    value_width, v_strides = (1, (0, 0, 0, 0)) if v is None else (v[0][3], v[1])
    if max(width, value_width) > MAX_WIDTH[dtype.itemsize]:
        raise _backend.UnservedError(f"{dtype} heads are wider than {MAX_WIDTH[dtype.itemsize]}")
    if max(map(abs, (*q_strides[2:], *k_strides[2:], *v_strides[2:]))) * MOST_ROWS >= 2**31:
        raise _backend.UnservedError("tokens lie too far apart for offsets of 32 bits in a tile")
    blocks = power_of_two(width, 16), power_of_two(value_width, 16)
    widest, has_eps = max(blocks), eps > 0
    more = has_eps or position is not None
    long = attention_long(device, dtype.itemsize, widest, queries, policy is not None, more)
    has_weights = policy is not None or size is not None or mask is not None
    self_keep = self_keep and policy is not None
    short = None
    padding = size is not None or mask is not None
    if v is not None and not (has_eps and (exclude_self or is_causal)):
        own = self_keep or exclude_self or is_causal
        short = settings_short(device, dtype, widest, queries, keys, own, has_eps, padding)
    listed = (
        short is None
        and (policy is not None or mask is not None)
        and not has_eps
        and not (position is not None and (self_keep or exclude_self or is_causal))
    )
    double = dtype == torch.float64
    tiny = torch.finfo(torch.float64 if double else torch.float32).tiny
    tile = long.block_n if listed else 0
    weights = plan_weights(batch, heads, keys, policy, size, mask, tiny, tile)
    at_strides = (0, 0) if position is None else (0, *position)[-2:]
    slope = abs(scale) * math.log2(math.e) or 1.0
    log_eps = max(math.log2(eps), -64.0) if has_eps else 0.0
    numbers = (
        *(heads, heads // key_heads, weights.heads, queries, keys, width, value_width),
        *(weights.padded, weights.plane),
    )
    strides = (*q_strides, *k_strides, *v_strides, *at_strides)
    factors = (*halves(slope), *halves(eps), log_eps)
    common: dict[str, Any] = {
        "BLOCK_D": blocks[0],
        "BLOCK_V": blocks[1],
        "WHOLE_D": width == blocks[0],
        "WHOLE_V": value_width == blocks[1],
        "PRECISION": precision(device, dtype),
        "SIGN": (scale > 0) - (scale < 0),
        "WEIGHTS": has_weights,
        "POLICY": policy is not None,
        "PADDING": padding,
        "SELF_KEEP": self_keep,
        "EXCLUDE": exclude_self,
        "CAUSAL": is_causal,
        "EPS": has_eps,
    }
    narrow = {"NARROW": dtype == torch.float16}  # of few exponents
    if short is not None:
        c0, c1, c2, c3 = chunks(keys, short.block_n)
        row_blocks = ceil_div(queries, short.block_m)
        parts = max(1, min(row_blocks, ceil_div(_ENOUGH, max(1, batch * heads))))
        attend = Launch(
            attend_short,
            (batch * heads * parts if queries else 0,),
            (*numbers, parts, *factors, *strides),
            short,
            ROWS=short.block_m,
            C0=c0,
            C1=c1,
            C2=c2,
            C3=c3,
            **common,
            **narrow,
        )
        return Plan(weights, attend, True)
    attend = Launch(
        attend_long,
        (batch * heads * ceil_div(queries, long.block_m),),
        (*numbers, weights.row_tiles, *factors, *strides),
        long,
        ROWS=long.block_m,
        KEYS=long.block_n,
        **common,
        VALUES=v is not None,
        **narrow,
    )
    return Plan(weights, attend, False)


def policy_attention(inputs: Inputs) -> Saved:
    """Output, lse and, with eps, the share of eps and the key of the maximum of each row."""
    q, k, v, policy, size, key_padding_mask, position = inputs[:7]
    self_keep, exclude_self, eps, is_causal, _, scale = inputs[7:]
    weights, attend, short = plan(
        arch(q),
        q.device.index,
        q.dtype,
        (q.shape, q.stride()),
        (k.shape, k.stride()),
        (v.shape, v.stride()),
        None if policy is None else (policy.shape, policy.stride()),
        None if size is None else size.stride(),
        None if key_padding_mask is None else key_padding_mask.stride(),
        None if position is None else position.stride(),
        self_keep,
        exclude_self,
        eps,
        is_causal,
        scale,
    )
    batch, heads, queries, _ = q.shape
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = queries if eps > 0 else 0
    out = q.new_empty(batch, queries, heads, v.shape[3])
    lse = q.new_empty(batch, heads, queries, dtype=sums)
    floor = lse.new_empty(batch, heads, rows)
    argmax = q.new_empty(batch, heads, rows, dtype=torch.int32)
    work, tiles = weigh(weights, policy, size, key_padding_mask, lse)
    if short:
        attend(q, k, v, position, work, out, lse, floor, argmax)
    else:
        attend(q, k, v, position, work, tiles, out, lse, floor, argmax)
    return Saved(out, lse, floor, argmax)


def weigh(
    weights: Weights, policy: Tensor | None, size: Tensor | None, mask: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Biases of the keys and the list of their tiles, None where there is none."""
    launch = weights.launch
    if launch is None:
        return None, None
    work = like.new_empty(weights.size)
    if not weights.tiles:
        launch(policy, size, mask, work)
        return work, None
    tiles = like.new_empty(weights.tiles, dtype=torch.int32)
    launch(policy, size, mask, work, tiles)
    return work, tiles
