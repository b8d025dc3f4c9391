# SPDX-License-Identifier: Apache-2.0
"""The forward pass of attention: one or two launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .... import _backend
from ...._triton.launch import Launch, ceil_div, planned, power_of_two
from ..arguments import Inputs, Saved
from . import heuristics
from .common import split_float
from .forward_long import attention_forward
from .forward_short import ShortOptions, attention_forward_short
from .online_softmax import ForwardOptions
from .spec import Spec, Weights, describe, plan_weights

#: Programs that keep a device busy; beyond, a program handles several blocks of queries.
_BUSY = 512


def chunks(seqlen_k: int, widest: int) -> tuple[int, ...]:
    """Widths of up to four chunks, powers of two, that hold ``seqlen_k`` keys and little more."""
    found: list[int] = []
    left = seqlen_k
    while left > 0:
        width = min(widest, 1 << (left.bit_length() - 1))
        if len(found) == 3 or width < 16:
            width = power_of_two(left, 16)
        found.append(width)
        left -= width
    whole = power_of_two(seqlen_k, 16)
    return (whole,) if whole <= min(widest, sum(found)) else tuple(found)


class ForwardLaunches(NamedTuple):
    """The launches of a call."""

    weights: Weights
    attend: Launch
    is_short: bool


@planned
def plan_forward(spec: Spec) -> ForwardLaunches:
    """Plan the launches of a call; for scores, without values, of lse and of p_eps by key."""
    (batch, num_heads, seqlen_q, head_dim), q_strides = spec.q
    (_, kv_heads, seqlen_k, _), k_strides = spec.k
    head_dim_v, v_strides = (1, (0, 0, 0, 0)) if spec.v is None else (spec.v[0][3], spec.v[1])
    dtype, has_eps = spec.dtype, spec.eps > 0
    limit = heuristics.MAX_WIDTH[dtype.itemsize]
    if max(head_dim, head_dim_v) > limit:
        raise _backend.UnservedError(f"{dtype} heads are wider than {limit}")
    spec.check_strides()
    block_d, block_dv = power_of_two(head_dim, 16), power_of_two(head_dim_v, 16)
    uses_positions = spec.self_keep or spec.exclude_self or spec.is_causal
    given_positions = spec.query_position is not None
    kind = spec.arch, dtype, max(block_d, block_dv), seqlen_q
    short = None
    if spec.v is not None and not (has_eps and (spec.exclude_self or spec.is_causal)):
        short = heuristics.attention_forward_short(
            *kind, seqlen_k, uses_positions, has_eps, spec.padding
        )
    long = heuristics.attention_forward(
        *(spec.arch, dtype.itemsize, max(block_d, block_dv), seqlen_q),
        *(spec.policy is not None, has_eps or given_positions),
    )
    # Tiles without a kept key are skipped. But eps needs all keys, and with query positions given
    # any tile may have a query's own key.
    skips_tiles = short is None and not has_eps and not (given_positions and uses_positions)
    skips_tiles = skips_tiles and (spec.policy is not None or spec.mask is not None)
    weights = plan_weights(spec, block_n=long.block_n if skips_tiles else 0)
    # SCALE_SIGN has the sign; for a scale of 0, which it has too, any positive number does.
    qk_scale = abs(spec.scale) * math.log2(math.e) or 1.0
    # The bound keeps exp2(max_i - m_i), at most 1 / exp2(log2_eps), far from overflow.
    log2_eps = max(math.log2(spec.eps), -64.0) if has_eps else 0.0
    sizes = (
        *(num_heads, num_heads // kv_heads, weights.heads, seqlen_q, seqlen_k),
        *(head_dim, head_dim_v, weights.stride, weights.size_offset),
    )
    rest = (
        *(*split_float(qk_scale), *split_float(spec.eps), log2_eps),
        *(*q_strides, *k_strides, *v_strides, *spec.position_strides),
    )
    options: dict[str, Any] = {
        **spec.logit_options(),
        "EVEN_D": head_dim == block_d,
        "EVEN_DV": head_dim_v == block_dv,
        "HAS_V": spec.v is not None,
        "FP16": dtype == torch.float16,
    }
    blocks = {"BLOCK_D": block_d, "BLOCK_DV": block_dv}
    if short is not None:
        widths = chunks(seqlen_k, short.block_n)
        starts = tuple(sum(widths[:c]) for c in range(len(widths)))
        num_programs = max(
            1, min(ceil_div(seqlen_q, short.block_m), ceil_div(_BUSY, max(1, batch * num_heads)))
        )
        attend = Launch(
            attention_forward_short,
            (batch * num_heads * num_programs if seqlen_q else 0,),
            (*sizes, num_programs, *rest),
            short,
            BLOCK_M=short.block_m,
            **blocks,
            OPTS=ShortOptions(**options, STARTS=starts, BLOCKS=widths),
        )
        return ForwardLaunches(weights, attend, True)
    attend = Launch(
        attention_forward,
        (batch * num_heads * ceil_div(seqlen_q, long.block_m),),
        (*sizes, weights.num_tiles, *rest),
        long,
        BLOCK_M=long.block_m,
        BLOCK_N=long.block_n,
        **blocks,
        OPTS=ForwardOptions(**options),
    )
    return ForwardLaunches(weights, attend, False)


def policy_attention(inputs: Inputs) -> Saved:
    """Output, lse and, with eps, p_eps and argmax of each query."""
    q, k, v, policy, size, key_padding_mask, query_position = inputs[:7]
    weights, attend, is_short = plan_forward(describe(inputs))
    batch, num_heads, seqlen_q, _ = q.shape
    out = q.new_empty(batch, seqlen_q, num_heads, v.shape[3])
    sum_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, num_heads, seqlen_q, dtype=sum_dtype)
    eps_rows = seqlen_q if inputs.eps > 0 else 0
    p_eps = lse.new_empty(batch, num_heads, eps_rows)
    argmax = q.new_empty(batch, num_heads, eps_rows, dtype=torch.int32)
    log2_weight, tiles = weights(lse, policy, size, key_padding_mask)
    listed = () if is_short else (tiles,)
    attend(q, k, v, query_position, log2_weight, *listed, out, lse, p_eps, argmax)
    return Saved(out, lse, p_eps, argmax)
