# SPDX-License-Identifier: Apache-2.0
"""The eager recipes: what merging code does without tokenops, in plain PyTorch operators.

Written from the published descriptions: ToMe (Bolya et al., ICLR 2023, section 3) splits tokens
alternately with strided slices; tomesd (Bolya and Hoffman, CVPR Workshops 2023) takes one
destination of each cell of a grid and splits by index tensors that an argsort makes. Both
materialise the scores of all pairs, sort the sources by their best score, and apply the result with
gathers and ``scatter_reduce``. Everything is computed in the dtype of the data, as they do it.

Letters: B batch, N tokens, Ns sources, Nd destinations, r merged sources, C channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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


def tomesd_match(metric: Tensor, r: int, h: int, w: int, sy: int, sx: int) -> GridPlan:
    """tomesd's matching with the top left token of each cell as the destination."""
    batch, tokens, width = metric.shape
    mark = torch.zeros(h, w, dtype=torch.int64, device=metric.device)
    mark[: h // sy * sy : sy, : w // sx * sx : sx] = -1
    order = mark.reshape(1, tokens, 1).argsort(dim=1)  # destinations first
    count = (h // sy) * (w // sx)
    destinations, sources = order[:, :count], order[:, count:]
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
