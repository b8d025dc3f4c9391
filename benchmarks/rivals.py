# SPDX-License-Identifier: Apache-2.0
"""The recipes: token reduction without tokenops, in PyTorch operators.

Written from the published descriptions. ToMe (Bolya et al., ICLR 2023, section 3) splits tokens
alternately by strided slices. tomesd (Bolya and Hoffman, CVPR Workshops 2023) takes one destination
of each cell of a grid and splits by index tensors that an argsort makes. Both store the scores of
all pairs, sort the sources by their best score, and merge by gathers and ``scatter_reduce``. They
compute in the dtype of the data, and so do these.

With an index of the output row of each input row, the same merging is one ``index_add_`` and its
inverse one ``index_select``: the shortest code for users who have the index.

Attention: DynamicViT (Rao et al., NeurIPS 2021, section 3.3) masks the softmax; ToMe adds the
logarithm of sizes; scores that rank tokens are sums over the rows of a map of the queries that
count. Where weights become a bias of a fused kernel, a policy of 0 stands for 1e-6. Tensors that
do not depend on the data are made beforehand.

Letters: B batch, N tokens, Ns sources, Nd destinations, r merged sources, M outputs, C channels,
H heads, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Added to a policy before its logarithm is taken.
LOG_EPS = 1e-6


class Match(NamedTuple):
    """The merge of sources into destinations; all int64, ready to be expanded to channels."""

    unmerged: Tensor  # [B, Ns - r, 1], positions among the sources
    merged: Tensor  # [B, r, 1], positions among the sources
    target: Tensor  # [B, r, 1], positions among the destinations
    # tomesd's split; ToMe's has no index
    src_index: Tensor | None = None  # [1, Ns, 1], token of each source
    dst_index: Tensor | None = None  # [1, Nd, 1], token of each destination


def _expand(index: Tensor, like: Tensor) -> Tensor:
    """An index [B or 1, L, 1] for all channels of a tensor [B, ., C]."""
    return index.expand(like.shape[0], -1, like.shape[2])


def _split(x: Tensor, src_index: Tensor | None, dst_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sources [B, Ns, C] and destinations [B, Nd, C]."""
    if src_index is None or dst_index is None:
        return x[:, 0::2], x[:, 1::2]
    return x.gather(1, _expand(src_index, x)), x.gather(1, _expand(dst_index, x))


def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Best cosine similarity [B, Na] of each row of a [B, Na, D] to a row of b, and its index."""
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
    return (a @ b.transpose(1, 2)).max(dim=-1)


def tomesd_split(h: int, w: int, sy: int, sx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sources [1, Ns, 1] and destinations [1, Nd, 1]: the top left token of each cell."""
    mark = torch.zeros(h, w, dtype=torch.int64, device=device)
    mark[: h // sy * sy : sy, : w // sx * sx : sx] = -1
    order = mark.reshape(1, h * w, 1).argsort(dim=1)  # destinations first
    count = (h // sy) * (w // sx)
    return order[:, count:], order[:, :count]


def match(
    metric: Tensor,
    r: int,
    class_token: bool,
    src_index: Tensor | None = None,
    dst_index: Tensor | None = None,
) -> Match:
    """The match of a metric [B, N, D], or of keys [B, H, N, D] that are averaged first.

    ToMe's, or with the index of a split tomesd's. With a class token, unmerged sources keep their
    order.
    """
    if metric.dim() == 4:
        metric = metric.mean(1)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    src, dst = _split(unit, src_index, dst_index)
    scores = src @ dst.transpose(1, 2)  # [B, Ns, Nd]
    if class_token:
        scores[:, 0] = -math.inf
    node_max, node_idx = scores.max(dim=-1)  # [B, Ns]
    ranking = node_max.argsort(dim=-1, descending=True)[..., None]  # [B, Ns, 1]
    merged, unmerged = ranking[:, :r], ranking[:, r:]
    if class_token:
        unmerged = unmerged.sort(dim=1).values
    return Match(unmerged, merged, node_idx[..., None].gather(1, merged), src_index, dst_index)


def merge(x: Tensor, match: Match, mode: str) -> Tensor:
    """[B, N, C] -> [B, N - r, C], unmerged sources first, then destinations."""
    src, dst = _split(x, match.src_index, match.dst_index)
    kept = src.gather(1, _expand(match.unmerged, src))
    moved = src.gather(1, _expand(match.merged, src))
    merged = dst.scatter_reduce(1, _expand(match.target, src), moved, reduce=mode)
    return torch.cat([kept, merged], dim=1)


def merge_wavg(x: Tensor, size: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Mean weighted by size [B, N, 1], and the new sizes [B, N - r, 1]."""
    total = merge(size, match, "sum")
    return merge(x * size, match, "sum") / total, total


def unmerge(y: Tensor, match: Match) -> Tensor:
    """[B, N - r, C] -> [B, N, C]."""
    count = match.unmerged.shape[1]
    kept, dst = y[:, :count], y[:, count:]
    moved = dst.gather(1, _expand(match.target, y))
    out = y.new_zeros(y.shape[0], y.shape[1] + moved.shape[1], y.shape[2])
    if match.src_index is None or match.dst_index is None:
        out[:, 1::2] = dst
        unmerged, merged = 2 * match.unmerged, 2 * match.merged
    else:
        out.scatter_(1, _expand(match.dst_index, y), dst)
        src_index = match.src_index.expand(y.shape[0], -1, 1)
        unmerged, merged = (src_index.gather(1, i) for i in (match.unmerged, match.merged))
    out.scatter_(1, _expand(unmerged, y), kept)
    return out.scatter_(1, _expand(merged, y), moved)


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
    """DynamicViT's attention with a policy [B, N] and a map in float32; ``own`` is eye(N)."""
    keep = policy[:, None, None, :]  # [B, 1, 1, N]
    keep = keep + (1 - keep) * own  # [B, 1, N, N]
    qk = (q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)
    p = (qk - qk.amax(-1, keepdim=True)).float().exp_() * keep
    return ((p + eps / q.shape[2]) / (p.sum(-1, keepdim=True) + eps)).to(v.dtype) @ v


def attention_with_size(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """ToMe's proportional attention: size [B, N]."""
    qk = (q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)
    return (qk + log_size(size).to(q.dtype)).softmax(-1) @ v


def log_size(size: Tensor) -> Tensor:
    """The term that sizes [B, N] add to logits, [B, 1, 1, N]."""
    return size.log()[:, None, None, :]


def log_policy(policy: Tensor, own: Tensor) -> Tensor:
    """The term that a policy [B, N] adds to logits, [B, 1, N, N]: 0 on the diagonal ``own``."""
    return torch.where(own, 0.0, (policy + LOG_EPS).log()[:, None, None, :])


def flex_with_policy() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention under ``torch.compile``; the policy [B, N] changes the scores."""
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(dynamic=False, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
        def add(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return torch.where(m == n, score, score + log[b, n])

        out: Tensor = flex_attention(q, k, v, score_mod=add)
        return out

    # The compiler for CPUs cannot read a tensor that the same graph computes.
    return lambda q, k, v, policy: attend(q, k, v, (policy + LOG_EPS).log())


def attention_received(q: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    """Mean over heads of the attention of each key from queries of weight [B, N]: [B, N]."""
    p = ((q / math.sqrt(q.shape[3])) @ k.transpose(-2, -1)).softmax(-1)
    return (weight[:, None, None].to(q.dtype) @ p)[:, :, 0].mean(1)


def attention_of_rows(q: Tensor, k: Tensor) -> Tensor:
    """Mean over heads of the attention of each key from a few queries: [B, N] in float32.

    ``q`` is [B, H, R, D], ``k`` [B, G, N, D]; queries of all heads that share keys are one matrix.
    """
    heads, width = q.shape[1], q.shape[3]
    rows = (q / math.sqrt(width)).reshape(q.shape[0], k.shape[1], -1, width)  # [B, G, H / G * R, D]
    p = (rows @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float32)
    return p.flatten(1, 2).sum(1) / heads
