# SPDX-License-Identifier: Apache-2.0
"""The recipes: what code of token sparsification does without tokenops, in PyTorch operators.

Written from the published descriptions: ToMe (Bolya et al., ICLR 2023, section 3) splits tokens
alternately with strided slices; tomesd (Bolya and Hoffman, CVPR Workshops 2023) takes one
destination of each cell of a grid and splits by index tensors that an argsort makes. Both
materialise the scores of all pairs, sort the sources by their best score, and apply the result with
gathers and ``scatter_reduce``. Everything is computed in the dtype of the data, as they do it.

The same merging by an index of the output row of each input row is one ``index_add_``, and undoing
it one ``index_select``: the way to write it for those who have such an index.

Attention: DynamicViT (Rao et al., NeurIPS 2021, section 3.3) masks the softmax, ToMe adds the
logarithm of sizes, and scores that rank tokens are sums over the rows of a map that has the queries
that count, and no others. Where weights become a bias for a fused kernel, a policy of 0 stands for
1e-6. Nothing that does not depend on the data is made anew in each call.

Letters: B batch, N tokens, Ns sources, Nd destinations, r merged sources, C channels, H heads, D
width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Added to a policy whose logarithm is taken.
LOG_EPS = 1e-6


class Plan(NamedTuple):
    """Which sources merge into which destinations; all int64, ready to be expanded to channels."""

    unmerged: Tensor  # [B, Ns - r, 1], positions among the sources
    merged: Tensor  # [B, r, 1], positions among the sources
    target: Tensor  # [B, r, 1], positions among the destinations


class GridPlan(NamedTuple):
    """The same, with the split itself as index tensors."""

    unmerged: Tensor
    merged: Tensor
    target: Tensor
    sources: Tensor  # [1, Ns, 1], token of each source
    destinations: Tensor  # [1, Nd, 1], token of each destination


def _select(scores: Tensor, r: int, keep_first: bool) -> Plan:
    best, partner = scores.max(dim=-1)  # [B, Ns]
    ranking = best.argsort(dim=-1, descending=True)[..., None]  # [B, Ns, 1]
    merged, unmerged = ranking[:, :r], ranking[:, r:]
    if keep_first:
        unmerged = unmerged.sort(dim=1).values
    return Plan(unmerged, merged, partner[..., None].gather(1, merged))


def tome_match(metric: Tensor, r: int, class_token: bool) -> Plan:
    """ToMe's matching: metric [B, N, D], or keys [B, H, N, D] that are averaged first."""
    if metric.dim() == 4:
        metric = metric.mean(1)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)  # [B, Ns, Nd]
    if class_token:
        scores[:, 0] = -math.inf
    return _select(scores, r, class_token)


def tomesd_split(h: int, w: int, sy: int, sx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources [1, Ns, 1] and destinations [1, Nd, 1]: the top left token of each cell."""
    mark = torch.zeros(h, w, dtype=torch.int64, device=device)
    mark[: h // sy * sy : sy, : w // sx * sx : sx] = -1
    order = mark.reshape(1, h * w, 1).argsort(dim=1)  # destinations first
    count = (h // sy) * (w // sx)
    return order[:, count:], order[:, :count]


def tomesd_match(metric: Tensor, r: int, sources: Tensor, destinations: Tensor) -> GridPlan:
    """tomesd's matching with a split that is there already."""
    batch, _, width = metric.shape
    unit = metric / metric.norm(dim=-1, keepdim=True)
    a = unit.gather(1, sources.expand(batch, -1, width))
    b = unit.gather(1, destinations.expand(batch, -1, width))
    plan = _select(a @ b.transpose(1, 2), r, keep_first=False)
    return GridPlan(*plan, sources, destinations)


def _reduce(sources: Tensor, destinations: Tensor, plan: Plan | GridPlan, mode: str) -> Tensor:
    channels = sources.shape[2]
    kept = sources.gather(1, plan.unmerged.expand(-1, -1, channels))
    moved = sources.gather(1, plan.merged.expand(-1, -1, channels))
    target = plan.target.expand(-1, -1, channels)
    return torch.cat([kept, destinations.scatter_reduce(1, target, moved, reduce=mode)], dim=1)


def tome_merge(x: Tensor, plan: Plan, mode: str) -> Tensor:
    """[B, N, C] -> [B, N - r, C], unmerged sources first, then destinations."""
    return _reduce(x[:, 0::2], x[:, 1::2], plan, mode)


def tomesd_merge(x: Tensor, plan: GridPlan, mode: str) -> Tensor:
    """[B, N, C] -> [B, N - r, C], unmerged sources first, then destinations."""
    batch, _, channels = x.shape
    sources = x.gather(1, plan.sources.expand(batch, -1, channels))
    destinations = x.gather(1, plan.destinations.expand(batch, -1, channels))
    return _reduce(sources, destinations, plan, mode)


def tome_merge_wavg(x: Tensor, size: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Mean weighted by size [B, N, 1], and the new sizes [B, N - r, 1]."""
    total = tome_merge(size, plan, "sum")
    return tome_merge(x * size, plan, "sum") / total, total


def tome_unmerge(y: Tensor, plan: Plan) -> Tensor:
    """[B, N - r, C] -> [B, N, C]."""
    batch, outputs, channels = y.shape
    count = plan.unmerged.shape[1]
    kept, destinations = y[:, :count], y[:, count:]
    moved = destinations.gather(1, plan.target.expand(-1, -1, channels))
    out = torch.zeros(
        batch, outputs + plan.merged.shape[1], channels, dtype=y.dtype, device=y.device
    )
    out[:, 1::2] = destinations
    out.scatter_(1, (2 * plan.unmerged).expand(-1, -1, channels), kept)
    out.scatter_(1, (2 * plan.merged).expand(-1, -1, channels), moved)
    return out


def tomesd_unmerge(y: Tensor, plan: GridPlan) -> Tensor:
    """[B, N - r, C] -> [B, N, C]."""
    batch, outputs, channels = y.shape
    count = plan.unmerged.shape[1]
    kept, destinations = y[:, :count], y[:, count:]
    moved = destinations.gather(1, plan.target.expand(-1, -1, channels))
    sources = plan.sources.expand(batch, -1, 1)
    out = torch.zeros(
        batch, outputs + plan.merged.shape[1], channels, dtype=y.dtype, device=y.device
    )
    out.scatter_(1, plan.destinations.expand(batch, -1, channels), destinations)
    out.scatter_(1, sources.gather(1, plan.unmerged).expand(-1, -1, channels), kept)
    out.scatter_(1, sources.gather(1, plan.merged).expand(-1, -1, channels), moved)
    return out


def index_merge(x: Tensor, row: Tensor, counts: Tensor) -> Tensor:
    """Means [B, M, C] of x [B, N, C] by output row [B * N] and members of each [B, M, 1]."""
    out = x.new_zeros(counts[..., 0].numel(), x.shape[2])
    return out.index_add_(0, row, x.flatten(0, 1)).view(*counts.shape[:2], -1) / counts


def index_merge_wavg(x: Tensor, size: Tensor, row: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Mean weighted by size [B, N, 1] and the new sizes [B, M, 1], by output row [B * N]."""
    batch = x.shape[0]
    out = x.new_zeros(batch * outputs, x.shape[2]).index_add_(0, row, (x * size).flatten(0, 1))
    total = size.new_zeros(batch * outputs, 1).index_add_(0, row, size.flatten(0, 1))
    return (out / total).view(batch, outputs, -1), total.view(batch, outputs, 1)


def index_unmerge(y: Tensor, row: Tensor) -> Tensor:
    """[B, M, C] -> [B, N, C] by output row [B * N]."""
    return y.flatten(0, 1).index_select(0, row).view(y.shape[0], -1, y.shape[2])


def attention_with_policy(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor, own: Tensor, eps: float
) -> Tensor:
    """DynamicViT's attention; the map is float32 meanwhile.

    Args:
        q: ``[B, H, N, D]``, as k and v.
        k: Keys.
        v: Values.
        policy: ``[B, N]``.
        own: Ones on the diagonal, ``[N, N]`` of the policy's type.
        eps: Added to the sum of each row.
    """
    tokens = q.shape[2]
    keep = policy[:, None, None, :]  # [B, 1, 1, N]
    keep = keep + (1 - keep) * own  # [B, 1, N, N]
    logits = (q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)
    weights = (logits - logits.amax(-1, keepdim=True)).float().exp_() * keep
    total = weights.sum(-1, keepdim=True)
    return ((weights + eps / tokens) / (total + eps)).to(v.dtype) @ v


def attention_with_size(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """ToMe's proportional attention: size [B, N]."""
    logits = (q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)
    return (logits + size_bias(size).to(q.dtype)).softmax(-1) @ v


def size_bias(size: Tensor) -> Tensor:
    """What sizes [B, N] add to logits, [B, 1, 1, N]."""
    return size.log()[:, None, None, :]


def policy_bias(policy: Tensor, own: Tensor) -> Tensor:
    """What a policy [B, N] adds to logits, [B, 1, N, N]: nothing where ``own``, bool [N, N], is."""
    return torch.where(own, 0.0, (policy + LOG_EPS).log()[:, None, None, :])


def flex_with_policy() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention under ``torch.compile``, the policy [B, N] a change of the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(dynamic=False, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i == j, score, score + bias[b, j])

        out: Tensor = flex_attention(q, k, v, score_mod=change)
        return out

    # The compiler for CPUs cannot read a bias that the same graph computes.
    return lambda q, k, v, policy: attend(q, k, v, (policy + LOG_EPS).log())


def attention_received(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Mean over heads of what each key receives from queries of weight [B, N]: [B, N]."""
    attention = ((q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)).softmax(-1)
    return (weight[:, None, None].to(q.dtype) @ attention)[:, :, 0].mean(1)


def attention_of_rows(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads of what each key receives from a few queries.

    Args:
        q: These queries alone, ``[B, H, R, D]``.
        k: ``[B, G, N, D]``; the queries of all heads that share keys are one matrix.

    Returns:
        ``[B, N]`` in float32.
    """
    heads, width = q.shape[1], q.shape[3]
    rows = (q / math.sqrt(width)).reshape(q.shape[0], k.shape[1], -1, width)  # [B, G, H / G * R, D]
    attention = (rows @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32)
    return attention.flatten(1, 2).sum(1) / heads
