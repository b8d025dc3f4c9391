# SPDX-License-Identifier: Apache-2.0
"""Matching in plain PyTorch: the oracle of every kernel.

Letters: B batch, N tokens, Na sources, Nb destinations, D width of the metric.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import acc_dtype, no_autocast
from ..merging.reference import invert
from . import common
from .arguments import Best, Map, Request, SplitArgs

#: Maximum number of scores in a block of rows, so that memory is linear in N.
SCORES_AT_A_TIME = 1 << 24


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length one, zero where their length is zero, and the inverse lengths."""
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    inverse = torch.where(zero, 0, torch.where(zero, 1, squares).rsqrt())
    return x * inverse, inverse


def metric_rows(x: Tensor) -> Tensor:
    """The metric as [B, N, D] in the dtype of sums; of keys [B, H, N, D], the mean over heads."""
    x = x.to(acc_dtype(x))
    return x.mean(1) if x.dim() == 4 else x


def nearest(
    a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """Most similar row of ``b`` for each row of ``a``: score [B, Na] and index [B, Na].

    The score is differentiable by autograd.
    """
    cosine = similarity == "cosine"
    a, b = _comparable(a, cosine), _comparable(b, cosine)
    score, index = _search(a.detach(), b.detach(), b_mask)
    if a_mask is not None:
        score = score.masked_fill(~a_mask, -math.inf)
        index = index.masked_fill(~a_mask, -1)
    if score.numel() == 0 or b.shape[1] == 0:
        return score, index
    # Compute the scores of the chosen pairs again, for autograd, without NaN of other pairs.
    chosen = (score > -math.inf)[..., None]
    pairs = torch.where(chosen, _rows(b, index.clamp(min=0).long()), 0)  # [B, Na, D]
    similar = (torch.where(chosen, a, 0) * pairs).sum(-1)
    return torch.where(chosen[..., 0], similar, score), index


def _comparable(x: Tensor, cosine: bool) -> Tensor:
    """Rows [B, N, D] whose dot products are the similarities."""
    rows = metric_rows(x)
    return unit_rows(rows)[0] if cosine else rows


def _search(a: Tensor, b: Tensor, b_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest dot product of each row of ``a`` with a row of ``b``, and the first such row."""
    batch, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if batch * rows * columns == 0:
        score = a.new_full((batch, rows), -math.inf)
        return score, torch.full_like(score, -1, dtype=torch.int32)
    if b_mask is None:
        b_mask = torch.ones(1, 1, dtype=torch.bool, device=b.device).expand(batch, columns)
    if batch * rows * columns <= SCORES_AT_A_TIME:
        return _search_block(a, b, b_mask)
    # A trace of this loop is for these sizes only; the code above serves any size.
    block = max(1, SCORES_AT_A_TIME // (batch * columns))
    parts = [_search_block(a[:, i : i + block], b, b_mask) for i in range(0, rows, block)]
    return torch.cat([p[0] for p in parts], dim=1), torch.cat([p[1] for p in parts], dim=1)


def _search_block(a: Tensor, b: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    with no_autocast(a.device.type):
        scores = a @ b.transpose(1, 2)  # [B, block, Nb]
    scores = scores.masked_fill(scores.isnan() | ~b_mask[:, None, :], -math.inf)
    score, index = scores.max(dim=2)  # the first maximum
    # If no score is above -inf: the first candidate that is not masked out, else -1.
    first = b_mask.int().argmax(dim=1)
    fallback = torch.where(b_mask.any(dim=1), first, -1)[:, None]
    return score, torch.where(score == -math.inf, fallback, index).int()


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs; see :func:`tokenops.match`."""
    best = search(metric, similarity, split)
    return select(best, metric.shape[-2], request, split)


def search(metric: Tensor, similarity: str, split: SplitArgs) -> Best:
    """Best destination of each source.

    A split must list each token at most once: the result for a token that is listed twice may
    differ between backends.
    """
    x = _comparable(metric, similarity == "cosine")
    batch, tokens, _ = x.shape
    src, dst, _ = common.sides("search", batch, tokens, split, x.device)
    receives = ~common.protected_tokens(batch, tokens, split, x.device).gather(1, dst)
    return Best(*_search(_rows(x, src), _rows(x, dst), receives))


def select(best: Best, num_tokens: int, request: Request, split: SplitArgs) -> Map:
    """The token map of the best pairs."""
    return common.select(best, num_tokens, request, split, invert)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens: [B, N, D], [B, K] -> [B, K, D]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
