# SPDX-License-Identifier: Apache-2.0
"""What a tile of keys adds to a block of rows, relative to the largest logit so far."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import LN2, add_policy, finite, first_live, logits


@triton.jit
def load_weights(
    bias, plane, at, keys,
    KEYS: tl.constexpr, ACC: tl.constexpr, WEIGHTS: tl.constexpr, POLICY: tl.constexpr,
    LOG_SIZE: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    """``log2 (z p)`` and ``log2 z`` of keys, as far as they are wanted, and which ones are seen."""
    weight = tl.zeros([KEYS], ACC)
    log_size = weight
    seen = at < keys
    if WEIGHTS:
        weight = tl.load(bias + at)
        log_size = weight
        if POLICY and (LOG_SIZE or PADDING):
            log_size = tl.load(bias + plane + at)
    if PADDING:
        seen = log_size > float("-inf")
    return weight, log_size, seen


@triton.jit
def absorb(
    q, k, v, weight, log_size, seen, own, at, keys, slope, log_eps,
    acc, shares, sums, level, most, total, top, seen_keys,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, WEIGHTS: tl.constexpr, POLICY: tl.constexpr,
    PADDING: tl.constexpr, SELF_KEEP: tl.constexpr, EXCLUDE: tl.constexpr, CAUSAL: tl.constexpr,
    EPS: tl.constexpr, VALUES: tl.constexpr, NARROW: tl.constexpr, CLOSELY: tl.constexpr,
    SUM_VALUES: tl.constexpr,
):  # fmt: skip
    """Rows with a tile of keys more: outputs, sums, and what they are relative to."""
    SELF: tl.constexpr = SELF_KEEP and CLOSELY
    LATER: tl.constexpr = POLICY and EPS  # the maximum is that of all seen keys, dropped ones too
    bias = weight
    if LATER:
        bias = log_size
        log_policy = weight - finite(log_size)
    x = logits(
        q, k, bias, log_size, own, at, keys, slope,
        PRECISION, WEIGHTS, SELF and not LATER, CAUSAL, CLOSELY,
    )  # fmt: skip
    unit = slope
    if WEIGHTS:
        unit = 1.0
    largest = tl.max(x, 1)
    if EPS:
        if VALUES:
            place = tl.min(tl.where(x == largest[:, None], at[None, :], 2147483647), 1)
            top = tl.where(largest * unit > most, place, top)
        most = tl.maximum(most, largest * unit)
        new = most
        if NARROW:  # what is kept would vanish beside a dropped key that is much larger
            if LATER:
                largest = tl.max(add_policy(x, log_policy, own, at, SELF), 1)
            new = tl.maximum(level, tl.maximum(most + log_eps, largest * unit))
    else:
        new = tl.maximum(level, largest * unit)
    base = finite(new)
    shrink = tl.exp2(level - base)
    x = x * unit - base[:, None]
    if LATER:
        x = add_policy(x, log_policy, own, at, SELF)
    w = tl.exp2(x)
    total = total * shrink + tl.sum(w, 1)
    if VALUES:
        if EXCLUDE and CLOSELY:
            w = tl.where(own[:, None] == at[None, :], 0, w)
        acc = acc * shrink[:, None]
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if EPS:
        SOME: tl.constexpr = CLOSELY and (CAUSAL or EXCLUDE)  # not each row sees all values
        if SOME:
            ones = tl.full([own.shape[0], KEYS], 1.0, tl.float32)
            if CAUSAL:
                ones = tl.where(at[None, :] <= own[:, None], 1.0, 0.0)
            if PADDING:
                seen_keys += tl.sum(ones * seen.to(tl.float32)[None, :], 1)
            if EXCLUDE:
                ones = tl.where(at[None, :] == own[:, None], 0.0, ones)
            if VALUES:  # they are 0 where a key takes no part
                ones = ones.to(v.dtype)
                shares = tl.dot(ones, v, shares, input_precision=PRECISION, out_dtype=acc.dtype)
        else:
            if PADDING:
                seen_keys += tl.sum(seen.to(tl.float32), 0)
            if VALUES and SUM_VALUES:
                sums += tl.sum(v.to(acc.dtype), 0)
    return acc, shares, sums, new, most, total, top, seen_keys


@triton.jit
def finish(
    acc, shares, sums, level, most, total, top, seen_keys, bias, plane, own, valid, keys,
    live, eps, lse, floor, argmax, stats,
    KEYS: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, EPS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """The output of rows; L is written, and with eps its share and the key of the maximum.

    Without values L is to base 2, and the share of eps is that of each key. The first key that
    takes part, ``live``, is searched for where it is None and needed.
    """
    ACC: tl.constexpr = total.dtype
    if PADDING:
        wrong = total != total
        if live is None:
            first = tl.cast(0, tl.int32)
            if tl.max(wrong.to(tl.int32), 0) > 0:
                first = first_live(bias + plane, keys, KEYS)
        else:
            first = live
        nothing = wrong & (first >= keys)  # a row of NaN that sees nothing is empty
        if CAUSAL:
            nothing = wrong & (first > tl.minimum(own, keys - 1))
        total = tl.where(nothing, 0, total)
        acc = tl.where(nothing[:, None], 0, acc)
        most = tl.where(nothing, float("-inf"), most)
    if EPS:
        part = tl.where(most == float("-inf"), 0, eps * tl.exp2(most - finite(level)))
        total += part
        if not PADDING:
            seen_keys += keys
            if CAUSAL:
                seen_keys = tl.minimum(own + 1, keys).to(tl.float32)
        each = part / tl.maximum(seen_keys, 1.0).to(ACC)
        if VALUES:
            acc += each[:, None] * (shares + sums[None, :])
    empty = total == 0
    inverse = 1 / tl.where(empty, 1, total)
    log = finite(level) + tl.log2(tl.where(empty, 1, total))
    if VALUES:  # else kernels alone will read it, which count in powers of two
        log *= tl.full([], LN2, ACC)
    tl.store(lse + stats, tl.where(empty, float("-inf"), log), mask=valid)
    if EPS and VALUES:
        tl.store(floor + stats, part * inverse, mask=valid)
        tl.store(argmax + stats, tl.where(top < keys, top, -1), mask=valid)
    elif EPS:
        tl.store(floor + stats, each * inverse, mask=valid)
    return acc * inverse[:, None]
