# SPDX-License-Identifier: Apache-2.0
"""Kernels that list the sides of a split, and that select the sources that merge.

One program makes the token map of an image by sorting keys that no two tokens share, so ties need
no further code. The r-th smallest key of the sources is that of the last source to merge. A sort of
all tokens by root then brings the members of each segment together. By position, a segment stands
where its first member, the leader, does: the sort by root finds the leaders, and a second sort, by
leader, gives the map. In ToMe's order, the sort by root gives the map.

Root of a token: its destination if it merges, else itself. Role of a token: for a source, its index
in the list; for a destination, -2 minus its index; -1 for other tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .search_kernels import tokens_of

LAST_32 = tl.constexpr(2**31 - 1)  # keys that sort last
LAST_64 = tl.constexpr(2**63 - 1)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _bit(j: tl.constexpr, BITS: tl.constexpr):
    """Bit j of the indices of a vector that has a dimension for each bit."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - j - 1) + [2] + [1] * j)


@triton.jit
def _exchange(x, stage: tl.constexpr, j: tl.constexpr, BITS: tl.constexpr):
    """Order the pairs of integers whose indices differ in bit j.

    The partner of an integer is the sum of both minus the integer, modulo 2**32 or 2**64.
    """
    partner = tl.sum(x, BITS - 1 - j, keep_dims=True) - x
    upper = _bit(j, BITS)
    if stage < BITS:  # neighbouring runs are sorted in opposite directions
        upper = upper ^ _bit(stage, BITS)
    return tl.where((x > partner) != (upper == 1), partner, x)


@triton.jit
def _sort(keys, BITS: tl.constexpr):
    """Bitonic sort of 2**BITS integers, ascending.

    In place of ``tl.sort``, which spills up to 81 registers for 4096 tokens on sm_90 (Triton 3.7.1)
    where this sort spills none, and takes 5 times longer under the interpreter (256 integers).
    """
    x = tl.reshape(keys, [2] * BITS)
    for stage in tl.static_range(1, BITS + 1):
        for step in tl.static_range(stage):
            x = _exchange(x, stage, stage - 1 - step, BITS)
    return tl.reshape(x, keys.shape)


@triton.jit
def list_sides(
    src, dst, role, sorted_dst,
    num_src, num_dst, tokens, src_b, src_n, dst_b, dst_n,
    BITS_S: tl.constexpr, BITS_D: tl.constexpr,
):  # fmt: skip
    """Sort listed destinations, and store the role of each listed token."""
    image = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, 1 << BITS_S)
    token = tokens_of(src, image, src_b, src_n, index, num_src, tokens, None, 1, 0)
    tl.store(role + image * tokens + token, index, mask=index < num_src)

    index = tl.arange(0, 1 << BITS_D)
    token = tokens_of(dst, image, dst_b, dst_n, index, num_dst, tokens, None, 1, 0).to(tl.int32)
    tl.store(role + image * tokens + token, -2 - index, mask=index < num_dst)
    key = _sort(tl.where(index < num_dst, token, LAST_32), BITS_D)
    tl.store(sorted_dst + image * num_dst + index, key, mask=index < num_dst)


@triton.jit
def list_grid(
    cell, src, role, dst,
    num_src, num_dst, tokens, prefix, width, height, step, rows, columns, cell_b, cell_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """List both sides of a grid, and store the role of each token.

    One program for each row of cells, which has ``columns`` destinations, and one for the tokens
    below the last row of cells.
    """
    band = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    start = band * height * width
    end = tl.where(band < rows, start + height * width, tokens - prefix)
    found = band * columns  # destinations before this block
    for first in range(start, end, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        y, x = offs // width - band * height, offs % width
        column = x // step
        inside = (offs < end) & (band < rows) & (column < columns)
        offset = tl.zeros([BLOCK], tl.int64)  # of the destination in its cell
        if cell is not None:
            pointers = cell + image * cell_b + (band * columns + column).to(tl.int64) * cell_n
            offset = tl.load(pointers, mask=inside, other=0).to(tl.int64)
            offset = tl.minimum(tl.maximum(offset, 0), height * step - 1)
        is_dst = inside & (y * step + x % step == offset)
        one = is_dst.to(tl.int32)
        before = found + tl.cumsum(one, 0) - one
        is_src = (offs < end) & (is_dst == 0)
        tl.store(dst + image * num_dst + before, offs + prefix, mask=is_dst)
        tl.store(src + image * num_src + offs - before, offs + prefix, mask=is_src)
        roles = tl.where(is_dst, -2 - before, offs - before)
        tl.store(role + image * tokens + prefix + offs, roles, mask=offs < end)
        found += tl.sum(one, 0)


@triton.jit
def _source_key(
    node_max, node_idx, protected, image, index, token, prefix, is_src, num_src,
    protected_b, protected_n,
):  # fmt: skip
    """Key of a source; the smallest keys merge: grade, falling score, token (13 bits with padding).

    The grade is 0 for a source, 1 if it is protected, 2 if it is in the prefix, 3 for other tokens.
    """
    offs = image * num_src + index
    score = tl.load(node_max + offs, mask=is_src, other=0)
    best = tl.load(node_idx + offs, mask=is_src, other=-1)
    grade = (token < prefix).to(tl.int32) * 2
    if protected is not None:
        pointers = protected + image * protected_b + token.to(tl.int64) * protected_n
        is_protected = tl.load(pointers, mask=is_src, other=0) != 0
        grade = tl.maximum(grade, is_protected.to(tl.int32))
    score = tl.where(grade > 0, float("-inf"), tl.where(score == 0, 0.0, score))  # -0.0 is 0.0
    bits = score.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    falling = LAST_32 - rising.to(tl.int64)  # 32 bits
    grade = tl.where(is_src, grade, 3)
    key = (grade.to(tl.int64) << 45) | (falling << 13) | token.to(tl.int64)
    return key, grade, score, best, falling


@triton.jit
def select_image(
    node_max, node_idx, src, role, dst, protected, thresholds, assign, offsets, members, counts,
    tokens, outputs, num_src, num_dst, r, prefix, stride, run, src_b, src_n, role_b, dst_b,
    protected_b, protected_n, thresholds_b, threshold,
    LIMITED: tl.constexpr, TOME: tl.constexpr, BITS: tl.constexpr, BITS_S: tl.constexpr,
):  # fmt: skip
    """The token map of an image, from the best destination of each of its sources."""
    BLOCK: tl.constexpr = 1 << BITS
    image = tl.program_id(0).to(tl.int64)
    # The key of the last source that merges.
    index = tl.arange(0, 1 << BITS_S)
    if src is None:
        token = index + index // run
    else:  # tokens_of would do, but its inlined line numbers make ptxas spill on sm_100
        pointers = src + image * src_b + index.to(tl.int64) * src_n
        token = tl.load(pointers, mask=index < num_src, other=0).to(tl.int64)
        token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int32)
    key, _, _, _, _ = _source_key(
        node_max, node_idx, protected, image, index, token, prefix, index < num_src, num_src,
        protected_b, protected_n,
    )  # fmt: skip
    last = tl.sum(tl.where(index == r - 1, _sort(key, BITS_S), 0), 0)  # 0 if r is 0

    # Which tokens merge, and the root of each token.
    token = tl.arange(0, BLOCK)
    inside = token < tokens
    if role is None:
        dst_rank = token // stride
        is_dst = token - dst_rank * stride == stride - 1
        is_src = inside & (is_dst == 0)
        index = token - dst_rank
    else:
        index = tl.load(role + image * role_b + token, mask=inside, other=-1)
        is_src = index >= 0
        is_dst = index < -1
        dst_rank = -2 - index
    key, grade, score, best, falling = _source_key(
        node_max, node_idx, protected, image, index, token, prefix, is_src, num_src,
        protected_b, protected_n,
    )  # fmt: skip
    merged = is_src & (key <= last) & (grade < 2)
    if LIMITED:
        if thresholds is not None:
            threshold = tl.load(thresholds + image * thresholds_b).to(tl.float32)
        merged = merged & (score >= threshold) & (grade == 0) & (best >= 0)
    best = tl.maximum(best, 0)
    if role is None:
        target = best * stride + stride - 1
    else:
        target = tl.load(dst + image * dst_b + best, mask=merged & (best < num_dst), other=0)
    root = tl.where(merged, target, token)

    # Sort the tokens by root, and the roots in the order of the output tokens.
    offs = tl.arange(0, BLOCK)
    if TOME:
        # Prefix 0, tokens of neither side 1, sources 2, destinations 3 with what merges into them.
        kind = tl.where(is_dst, 3, tl.where(is_src, 2, 1))
        target_rank = best
        if role is not None:
            target_rank = -2 - tl.load(role + image * role_b + target, mask=merged, other=-2)
        within = tl.where(is_dst, dst_rank, token).to(tl.int64)
        within = tl.where(is_src & (prefix == 0), falling, within)
        in_prefix = token < prefix
        kind = tl.where(merged, 3, kind)
        within = tl.where(merged, target_rank.to(tl.int64), within)
        in_prefix = tl.where(merged, target < prefix, in_prefix)
        kind = tl.where(in_prefix, 0, kind)
        within = tl.where(in_prefix, root.to(tl.int64), within)
        key = (kind.to(tl.int64) << 56) | (within << 24) | (root << 12).to(tl.int64) | token
        key = _sort(tl.where(inside, key, LAST_64), BITS)
        root = ((key >> 12) & 0xFFF).to(tl.int32)
        token = (key & 0xFFF).to(tl.int32)
    else:
        key = _sort(tl.where(inside, root * BLOCK + token, LAST_32), BITS)
        root, token = key // BLOCK, key % BLOCK
    before = tl.gather(root, tl.maximum(offs - 1, 0), 0)
    starts = (offs == 0) | (root != before)
    if not TOME:
        start = tl.associative_scan(tl.where(starts, offs, 0), 0, _larger)
        leader = tl.gather(token, start, 0)
        key = _sort(tl.where(offs < tokens, leader * BLOCK + token, LAST_32), BITS)
        root, token = key // BLOCK, key % BLOCK
        starts = root == token
    inside = offs < tokens
    starts = starts & inside
    output = tl.cumsum(starts.to(tl.int32), 0) - 1
    # If too few sources could merge, there are more segments than outputs: drop the last ones.
    kept = inside & (output < outputs)
    offs_out = image * tokens + offs
    tl.store(members + offs_out, tl.where(kept, token, -1), mask=inside)
    tl.store(assign + image * tokens + token, tl.where(kept, output, -1), mask=inside)
    offsets += image * (outputs + 1)
    tl.store(offsets + output, offs, mask=starts & kept)
    live = tl.sum((starts & kept).to(tl.int32), 0)
    after = live + offs  # offsets of the padding
    total = tl.sum(kept.to(tl.int32), 0)
    tl.store(offsets + after, tl.zeros_like(after) + total, mask=after <= outputs)
    tl.store(counts + image, live)
