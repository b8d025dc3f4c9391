# SPDX-License-Identifier: Apache-2.0
"""The backward pass of attention: two to four launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ...._triton.launch import Launch, Settings, ceil_div, planned, power_of_two
from ..arguments import InputGrads, Inputs, Needs, OutputGrads, Saved
from . import heuristics
from .backward_dkdv import DkdvOptions, attention_backward_dkdv, weight_grads
from .backward_dq import DqOptions, attention_backward_dq
from .common import split_float
from .spec import BLOCK, Spec, Weights, describe, plan_weights, strides


class BackwardLaunches(NamedTuple):
    """The launches of a call, and the size of the buffer ``work`` that they share."""

    weights: Weights
    dq: Launch
    dkdv: Launch
    weight_grads: Launch | None
    work: int


@planned
def _plan(
    spec: Spec,
    do_strides: tuple[int, ...],
    dropped: bool,
    need_v: bool,
    need_policy: bool,
    need_size: bool,
) -> BackwardLaunches:
    """Plan the launches of a call; ``dropped``: dropped keys get dpolicy too."""
    assert spec.v is not None
    (batch, num_heads, seqlen_q, head_dim), q_strides = spec.q
    (_, kv_heads, seqlen_k, _), k_strides = spec.k
    (_, _, _, head_dim_v), v_strides = spec.v
    spec.check_strides(*do_strides[1::2])  # of N and Dv in [B, N, H, Dv]
    has_eps, itemsize = spec.eps > 0, spec.dtype.itemsize
    width = max(head_dim, head_dim_v)
    # Columns of a gradient that a program has registers for; wider gradients are split.
    max_columns = 128 if itemsize == 2 and width <= 128 else 64
    special = (
        spec.policy or spec.padding or spec.query_position or spec.exclude_self or spec.is_causal
    )
    is_plain = not (special or has_eps) and width <= max_columns
    # Operands up to this width stay in registers, wider ones are read in parts. An element of
    # float32 or float64 takes more registers.
    block_part = max_columns if itemsize == 2 or (itemsize == 4 and is_plain) else 32
    block_d, block_dv = (min(power_of_two(n, 16), max_columns) for n in (head_dim, head_dim_v))
    parts_d = max(ceil_div(head_dim, block_d), 1)
    parts_dv = max(ceil_div(head_dim_v, block_dv), 1)
    kind = spec.arch, itemsize, width, is_plain
    for_dq = heuristics.attention_backward_dq(*kind)
    for_dkdv = heuristics.attention_backward_dkdv(*kind)

    # The buffer has lse2 and delta of each query, with eps also p_eps by key and the part of ds at
    # the maximum; then log2 weights; then, by head and key, sums of ds for dpolicy and for dsize.
    stat_stride = batch * num_heads * seqlen_q
    weight_offset = ceil_div((4 if has_eps else 2) * stat_stride, BLOCK) * BLOCK
    weights = plan_weights(spec, offset=weight_offset)
    sums_numel = batch * num_heads * seqlen_k
    policy_sum_offset = weight_offset + weights.numel
    size_sum_offset = policy_sum_offset + (sums_numel if need_policy else 0)
    work = size_sum_offset + (sums_numel if need_size else 0)

    sizes = (
        *(num_heads // kv_heads, weights.heads, seqlen_q, seqlen_k, head_dim, head_dim_v),
        *(weights.stride, weights.size_offset, weight_offset, stat_stride),
    )
    rest = (
        *(*split_float(spec.scale), *split_float(spec.scale * math.log2(math.e))),
        *(*do_strides, *q_strides, *k_strides, *v_strides, *spec.position_strides),
    )
    options: dict[str, Any] = {
        **spec.options(),
        "EVEN_D": head_dim % block_d == 0,
        "EVEN_DV": head_dim_v % block_dv == 0,
        "SPLIT_D": head_dim > block_part,
        "SPLIT_DV": head_dim_v > block_part,
        "BLOCK_PART": block_part,
    }
    blocks = {"BLOCK_D": block_d, "BLOCK_DV": block_dv}
    dq = Launch(
        attention_backward_dq,
        (batch * num_heads * parts_d * ceil_div(seqlen_q, for_dq.block_m),),
        (num_heads, *sizes, *rest),
        for_dq,
        BLOCK_M=for_dq.block_m,
        BLOCK_N=for_dq.block_n,
        **blocks,
        OPTS=DqOptions(**options, PADDING=spec.padding),
    )
    dkdv = Launch(
        attention_backward_dkdv,
        (batch * kv_heads * max(parts_d, parts_dv) * ceil_div(seqlen_k, for_dkdv.block_n),),
        (kv_heads, *sizes, policy_sum_offset, size_sum_offset, *rest),
        for_dkdv,
        BLOCK_M=for_dkdv.block_m,
        BLOCK_N=for_dkdv.block_n,
        **blocks,
        OPTS=DkdvOptions(
            **options,
            DROPPED=dropped,
            NEED_V=need_v,
            NEED_POLICY=need_policy,
            NEED_SIZE=need_size,
            MAX_EXPONENT=512.0 if itemsize == 8 else 64.0,
        ),
    )
    grads_launch = None
    if need_policy or need_size:
        policy_strides = strides(None if spec.policy is None else spec.policy[1], 3)
        grads_launch = Launch(
            weight_grads,
            (batch * ceil_div(seqlen_k, BLOCK),),
            (
                *(num_heads, seqlen_k, policy_sum_offset, size_sum_offset),
                *(*policy_strides, *strides(spec.size, 2)),
            ),
            Settings(1, BLOCK),
            TINY=spec.tiny,
            BLOCK_N=BLOCK,
            NEED_POLICY=need_policy,
            NEED_SIZE=need_size,
            PER_HEAD=spec.policy is not None and len(spec.policy[0]) == 3,
        )
    return BackwardLaunches(weights, dq, dkdv, grads_launch, work)


def policy_attention_backward(
    inputs: Inputs, saved: Saved, grads: OutputGrads, needs: Needs
) -> InputGrads:
    """Gradients of q, k, v, policy and size."""
    q, k, v, policy, size, key_padding_mask, query_position = inputs[:7]
    need_v, need_policy, need_size = needs
    need_policy = policy is not None and need_policy
    need_size = size is not None and need_size
    dropped = need_policy and inputs.policy_grad == "exact"
    grad_out, grad_lse = grads
    plan = _plan(describe(inputs), grad_out.stride(), dropped, need_v, need_policy, need_size)
    batch, num_heads, seqlen_q, head_dim = q.shape
    _, kv_heads, seqlen_k, head_dim_v = v.shape
    out, lse, p_eps, argmax = (t.contiguous() for t in saved)
    work = lse.new_empty(plan.work)
    dq = q.new_empty(batch, seqlen_q, num_heads, head_dim)
    dk = k.new_empty(batch, seqlen_k, kv_heads, head_dim)
    dv = v.new_empty(batch, seqlen_k if need_v else 0, kv_heads, head_dim_v)
    dpolicy = lse.new_empty(policy.shape if policy is not None and need_policy else (batch, 0))
    dsize = lse.new_empty(batch, seqlen_k if need_size else 0)
    if plan.weights.launch is not None:
        plan.weights.launch(policy, size, key_padding_mask, work)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    plan.dq(grad_out, grad_lse, q, k, v, query_position, out, lse, p_eps, argmax, work, dq)
    plan.dkdv(grad_out, q, k, v, query_position, argmax, work, dk, dv)
    if plan.weight_grads is not None:
        plan.weight_grads(policy, size, work, dpolicy, dsize)
    return InputGrads(dq, dk, dv, dpolicy, dsize)
