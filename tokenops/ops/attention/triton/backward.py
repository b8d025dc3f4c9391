# SPDX-License-Identifier: Apache-2.0
"""The backward pass of attention: two to four launches, planned once per kind of call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

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
from ..arguments import InputGrads, Inputs, Needs, OutputGrads, Saved
from .backward_keys import attend_backward_keys, sum_heads
from .backward_rows import attend_backward_rows
from .forward import BLOCK
from .rows import MOST_ROWS, halves, precision, weigh_keys

#: Columns of gradients that a program sums: wider heads take several. Half precision has room for
#: all the columns of heads up to this width.
_MOST_COLUMNS = 64
_MOST_HALF_COLUMNS = 128

#: Settings of the passes, by bytes of an element and width; of calls without anything but q, k and
#: v first. Rows are queries of a tile, columns are keys. Registers are what limits them: what fits
#: one architecture fits them all.
_ROWS = {
    (2, 64): (Settings(64, 64, 4, 2), Settings(64, 32, 4, 3)),
    (2, 128): (Settings(64, 64, 8, 2), Settings(64, 32, 8, 2)),
    (2, 256): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(32, 16, 8, 2)),
    (8, 64): (Settings(16, 16, 8, 1), Settings(16, 16, 8, 1)),
}
_KEYS = {
    (2, 64): (Settings(32, 64, 4, 2), Settings(32, 64, 4, 2)),
    (2, 128): (Settings(32, 64, 8, 2), Settings(32, 64, 8, 2)),
    (2, 256): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(16, 32, 8, 2)),
    (8, 64): (Settings(16, 16, 4, 1), Settings(16, 16, 4, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _KEYS[4, 64] = (Settings(32, 32, 8, 2), Settings(16, 32, 8, 2))


@heuristic
def backward_rows(device: str, itemsize: int, width: int, is_plain: bool) -> Settings:
    """Settings of the pass by rows; 64 KB of shared memory do not hold the larger tiles."""
    kind, small = _kind(itemsize, width), not is_plain or device.startswith("gfx")
    found = _ROWS[kind][small]
    if BEFORE_3_7 and small and kind == (2, 64) and device.startswith("sm_8"):
        return replace(found, num_stages=2)  # Triton 3.6 spills registers with three
    return found


@heuristic
def backward_keys(device: str, itemsize: int, width: int, is_plain: bool) -> Settings:
    """Settings of the pass by keys."""
    kind, small = _kind(itemsize, width), not is_plain or device.startswith("gfx")
    found = _KEYS[kind][small]
    if BEFORE_3_7 and small:  # the usual ones spill registers there
        if kind == (2, 64) and device.startswith("sm_8"):
            return replace(found, num_stages=1)
        if kind == (2, 128) and device in ("sm_100", "sm_103"):
            return replace(found, block_n=32)
    return found


def _kind(itemsize: int, width: int) -> tuple[int, int]:
    if itemsize > 2 or width <= 64:
        return itemsize, 64
    return itemsize, 128 if width <= 128 else 256


def _columns(itemsize: int, width: int) -> int:
    """Columns of gradients that a program sums at most."""
    fits = itemsize == 2 and width <= _MOST_HALF_COLUMNS
    return _MOST_HALF_COLUMNS if fits else _MOST_COLUMNS


def _part(itemsize: int, most: int, is_plain: bool) -> int:
    """Columns of products that are summed at a time; operands no wider are held all along.

    Those of float32 and float64 take twice the registers.
    """
    return most if itemsize == 2 or (itemsize == 4 and is_plain) else 32


#: What a call is but for its shapes: self_keep, exclude_self, whether there is eps, is_causal,
#: whether the gradient at dropped keys is wanted, scale, and which of dv, dpolicy, dsize are.
_Options = tuple[bool, bool, bool, bool, bool, float, bool, bool, bool]


class _Plan(NamedTuple):
    """The launches of a call, and how much they note for one another."""

    weigh: Launch | None
    rows: Launch
    keys: Launch
    sum: Launch | None
    work: int


_Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


@planned
def _plan(
    device: str,
    index: int | None,
    dtype: torch.dtype,
    grad: tuple[int, ...],
    q: _Layout,
    k: _Layout,
    v: _Layout,
    policy: _Layout | None,
    size: tuple[int, ...] | None,
    mask: tuple[int, ...] | None,
    position: tuple[int, ...] | None,
    options: _Options,
) -> _Plan:
    (batch, heads, queries, width), q_strides = q
    (_, key_heads, keys, _), k_strides = k
    (_, _, _, value_width), v_strides = v
    steps = (*q_strides[2:], *k_strides[2:], *v_strides[2:], *grad[1::2])
    if max(map(abs, steps)) * MOST_ROWS >= 2**31:
        raise _backend.UnservedError("tokens lie too far apart for offsets of 32 bits in a tile")
    self_keep, exclude, has_eps, causal, dropped, scale, need_v, sum_policy, sum_size = options
    weights = policy is not None or size is not None or mask is not None
    is_plain = not (weights or position or exclude or causal or has_eps)
    most = _columns(dtype.itemsize, max(width, value_width))
    is_plain = is_plain and max(width, value_width) <= most
    part = _part(dtype.itemsize, most, is_plain)
    blocks = [min(power_of_two(n, 16), most) for n in (width, value_width)]
    parts = [
        max(ceil_div(n, block), 1) for n, block in zip((width, value_width), blocks, strict=True)
    ]
    kind = device, dtype.itemsize, max(width, value_width), is_plain
    by_rows, by_keys = backward_rows(*kind), backward_keys(*kind)
    tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny

    # Notes for one another: by row L, delta, and with eps its share by key and at the maximum; the
    # biases of the keys; by key and head what is to be summed over heads.
    stats_plane = batch * heads * queries
    bias_at = ceil_div((4 if has_eps else 2) * stats_plane, BLOCK) * BLOCK
    per_head = policy is not None and len(policy[0]) == 3
    weight_heads = heads if per_head else 1
    padded = ceil_div(keys, BLOCK) * BLOCK
    plane = batch * weight_heads * padded if policy is not None else 0
    bias_end = bias_at + (plane + batch * weight_heads * padded if weights else 0)
    sums = batch * heads * keys
    size_sums_at = bias_end + (sums if sum_policy else 0)
    work = size_sums_at + (sums if sum_size else 0)

    policy_strides = (0, 0, 0) if policy is None else policy[1]
    if len(policy_strides) == 2:
        policy_strides = policy_strides[0], 0, policy_strides[1]
    size_strides = (0, 0) if size is None else size
    mask_strides = (0, 0) if mask is None else mask
    at_strides = (0, 0) if position is None else (0, *position)[-2:]
    strides = (*grad, *q_strides, *k_strides, *v_strides, *at_strides)
    slope = scale * math.log2(math.e)
    numbers = (queries, keys, width, value_width, padded, plane, bias_at, stats_plane)
    factors = *halves(scale), *halves(slope)
    tile = {
        "BLOCK_D": blocks[0],
        "BLOCK_V": blocks[1],
        "WHOLE_D": width % blocks[0] == 0,
        "WHOLE_V": value_width % blocks[1] == 0,
        "SPLIT_D": width > part,
        "SPLIT_V": value_width > part,
        "PART": part,
        "PRECISION": precision(device, dtype),
        "WEIGHTS": weights,
    }
    group = heads // key_heads
    weigh = sum_up = None
    if weights:
        weigh = Launch(
            weigh_keys,
            (batch * weight_heads * (padded // BLOCK),),
            (
                keys,
                weight_heads,
                padded,
                plane,
                bias_at,
                *policy_strides,
                *size_strides,
                *mask_strides,
            ),
            Settings(1, BLOCK),
            TINY=tiny,
            BLOCK=BLOCK,
        )
    rows = Launch(
        attend_backward_rows,
        (batch * heads * parts[0] * ceil_div(queries, by_rows.block_m),),
        (heads, group, weight_heads, *numbers, *factors, *strides),
        by_rows,
        ROWS=by_rows.block_m,
        KEYS=by_rows.block_n,
        **tile,
        PADDING=size is not None or mask is not None,
        SELF_KEEP=self_keep,
        EXCLUDE=exclude,
        CAUSAL=causal,
        EPS=has_eps,
    )
    by_key = Launch(
        attend_backward_keys,
        (batch * key_heads * max(parts) * ceil_div(keys, by_keys.block_n),),
        (key_heads, group, weight_heads, *numbers, bias_end, size_sums_at, *factors, *strides),
        by_keys,
        ROWS=by_keys.block_m,
        KEYS=by_keys.block_n,
        **tile,
        DROPPED=dropped,
        SELF_KEEP=self_keep,
        EXCLUDE=exclude,
        CAUSAL=causal,
        EPS=has_eps,
        NEED_V=need_v,
        SUM_POLICY=sum_policy,
        SUM_SIZE=sum_size,
        LIMIT=512.0 if dtype == torch.float64 else 64.0,
    )
    if sum_policy or sum_size:
        sum_up = Launch(
            sum_heads,
            (batch * ceil_div(keys, BLOCK),),
            (heads, keys, bias_end, size_sums_at, *policy_strides, *size_strides),
            Settings(1, BLOCK),
            TINY=tiny,
            BLOCK=BLOCK,
            SUM_POLICY=sum_policy,
            SUM_SIZE=sum_size,
            PER_HEAD=per_head,
        )
    return _Plan(weigh, rows, by_key, sum_up, work)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size."""
    q, k, v, policy, size, key_padding_mask, position = inputs[:7]
    self_keep, exclude_self, eps, is_causal, policy_grad, scale = inputs[7:]
    out, lse, floor, argmax = saved
    grad, grad_lse = grads
    need_v, need_policy, need_size = needs
    has_policy = policy is not None
    sum_policy, sum_size = has_policy and need_policy, size is not None and need_size
    plan = _plan(
        arch(q),
        q.device.index,
        q.dtype,
        grad.stride(),
        (q.shape, q.stride()),
        (k.shape, k.stride()),
        (v.shape, v.stride()),
        None if policy is None else (policy.shape, policy.stride()),
        None if size is None else size.stride(),
        None if key_padding_mask is None else key_padding_mask.stride(),
        None if position is None else position.stride(),
        (
            self_keep and has_policy,
            exclude_self,
            eps > 0,
            is_causal,
            sum_policy and policy_grad == "exact",
            scale,
            need_v,
            sum_policy,
            sum_size,
        ),
    )
    batch, heads, queries, width = q.shape
    _, key_heads, keys, value_width = v.shape
    work = lse.new_empty(plan.work)
    dq = q.new_empty(batch, queries, heads, width)
    dk = k.new_empty(batch, keys, key_heads, width)
    dv = v.new_empty(batch, keys if need_v else 0, key_heads, value_width)
    dpolicy = lse.new_empty(policy.shape if policy is not None and need_policy else (batch, 0))
    dsize = lse.new_empty(batch, keys if sum_size else 0)
    if plan.weigh is not None:
        plan.weigh(policy, size, key_padding_mask, work)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    out, lse, floor, argmax = (t.contiguous() for t in (out, lse, floor, argmax))
    plan.rows(grad, grad_lse, q, k, v, position, out, lse, floor, argmax, work, dq)
    plan.keys(grad, q, k, v, position, argmax, work, dk, dv)
    if plan.sum is not None:
        plan.sum(policy, size, work, dpolicy, dsize)
    return InputGrads(dq, dk, dv, dpolicy, dsize)
