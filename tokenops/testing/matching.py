# SPDX-License-Identifier: Apache-2.0
"""Regret of a matching: its loss of similarity against the best matching."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..ops.matching import common
from ..splits import Explicit, Split, alternate
from ..token_map import TokenMap
from .asserts import require


def nearest_regret(
    a: Tensor,
    b: Tensor,
    index: Tensor,
    *,
    similarity: str = "cosine",
    b_mask: Tensor | None = None,
) -> Tensor:
    """Best similarity of each row of ``a`` minus its similarity to the chosen row of ``b``.

    Args:
        a: ``[B, Na, D]`` or ``[B, H, Na, D]``, as :func:`tokenops.nearest` takes it.
        b: ``[B, Nb, D]`` or ``[B, H, Nb, D]``.
        index: Chosen rows ``[B, Na]``; -1 for none.
        similarity: ``"cosine"`` or ``"dot"``.
        b_mask: Bool ``[B, Nb]``, true for rows of ``b`` that take part.

    Returns:
        Regret ``[B, Na]`` in float64: 0 for a best row and for -1, inf for a masked or NaN row if
        another row has a finite similarity.

    Example:
        >>> a = torch.tensor([[[1.0, 0.0]]])
        >>> b = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> nearest_regret(a, b, torch.tensor([[0]])).item()
        1.0
    """
    scores = _similarities(a, b, similarity)  # [B, Na, Nb]
    if b_mask is not None:
        scores = scores.masked_fill(~b_mask[:, None, :], -math.inf)
    if scores.shape[2] == 0:
        return torch.zeros(scores.shape[:2], dtype=torch.float64, device=scores.device)
    best = scores.amax(2)
    chosen = scores.gather(2, index.clamp(min=0).long()[..., None])[..., 0]
    return torch.where((index < 0) | (best == chosen), 0, best - chosen)


def matching_regret(
    metric: Tensor,
    token_map: TokenMap,
    *,
    num_prefix: int = 0,
    protected: Tensor | None = None,
    split: Split | tuple[Tensor, Tensor] | None = None,
    similarity: str = "cosine",
) -> Tensor:
    """Largest shortfall of the similarities of the pairs that merged, for each image.

    In the best matching of ``r`` sources, each source merges with its own best similarity, which is
    at least the r-th largest of all best similarities. The shortfall of a pair is the larger of
    these two similarities minus the similarity of the pair.

    Args:
        metric: ``[B, N, D]`` or ``[B, H, N, D]``, as :func:`tokenops.match` took it.
        token_map: Result of :func:`tokenops.match`.
        num_prefix: As given to ``match``.
        protected: As given to ``match``.
        split: As given to ``match``; without a generator, which would draw another split.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        Regret ``[B]`` in float64, at most :func:`similarity_rounding` for a correct kernel.

    Raises:
        AssertionError: If a group cannot come from a bipartite matching: it has two destinations,
            or a protected or prefix token and another token.

    Example:
        >>> import tokenops
        >>> metric = torch.randn(2, 16, 8)
        >>> regret = matching_regret(metric, tokenops.match(metric, 4))
        >>> bool((regret <= similarity_rounding(metric)).all())
        True
    """
    batch, tokens, device = metric.shape[0], metric.shape[-2], metric.device
    src, dst = _split_masks(
        alternate() if split is None else split, batch, tokens, num_prefix, device
    )  # [B, N] each
    token = torch.arange(tokens, device=device)
    free = (token >= num_prefix).expand(batch, tokens)
    if protected is not None:
        free = free & ~protected
    assign = token_map.assign
    together = (assign[:, :, None] == assign[:, None, :]) & (assign[:, :, None] >= 0)  # [B, N, N]
    together = together & (token[:, None] != token)
    alone = ~together.any(2)
    require(bool((free | alone).all()), "a prefix or protected token has merged")
    require(bool((src | dst | alone).all()), "a token outside the split has merged")
    pairs = together & dst[:, None, :]
    require(bool((pairs.sum(2)[src] <= 1).all()), "two destinations are in one segment")
    merged = src & pairs.any(2)
    require(bool((merged | alone | dst).all()), "sources merged without a destination")

    scores = _similarities(metric, metric, similarity)
    scores = scores.masked_fill(~(dst & free)[:, None, :], -math.inf)
    if tokens == 0:
        return torch.zeros(batch, dtype=torch.float64, device=device)
    best = scores.amax(2).masked_fill(~(src & free), -math.inf)  # [B, N]
    chosen = torch.where(pairs, scores, -math.inf).amax(2)
    ranked = best.sort(dim=1, descending=True).values
    bar = ranked.gather(1, (merged.sum(1, keepdim=True) - 1).clamp(min=0))  # [B, 1]
    due = torch.maximum(best, bar)
    shortfall = torch.where(merged & (due != chosen), due - chosen, 0)
    return shortfall.amax(1)


def similarity_rounding(metric: Tensor, similarity: str = "cosine") -> float:
    """Largest difference between two similarities whose order may change by rounding.

    This bounds the error of a sum of D products in any order, and of the means over heads and the
    lengths before it, in the precision in which similarities accumulate: float32, or float64 for
    double inputs.

    Args:
        metric: ``[B, N, D]`` or ``[B, H, N, D]``; rows with NaN or inf are ignored.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        The bound, the same for all pairs of rows.

    Example:
        >>> similarity_rounding(torch.ones(1, 2, 100)) < 1e-4
        True
    """
    eps = torch.finfo(torch.float64 if metric.dtype == torch.float64 else torch.float32).eps
    heads = metric.shape[1] if metric.dim() == 4 else 1
    terms = metric.shape[-1] + 2 * heads + 8
    scale = 1.0
    # If heads cancel, the error of their mean is relative to the heads, not to the mean.
    rows = metric.detach().double()
    rows = rows.abs().mean(1) if metric.dim() == 4 else rows
    lengths = rows.norm(dim=-1)
    lengths = lengths[lengths.isfinite()]
    if lengths.numel() == 0:
        return 0.0
    if similarity == "dot":
        scale = lengths.max().item() ** 2
    elif metric.dim() == 4:
        means = metric.detach().double().mean(1).norm(dim=-1)
        used = means.isfinite() & (means > 0)
        if bool(used.any()):
            scale = (rows.norm(dim=-1)[used] / means[used]).max().item()
    return 2 * terms * eps * scale


def _similarities(a: Tensor, b: Tensor, similarity: str) -> Tensor:
    """All similarities [B, Na, Nb] in float64, NaN as -inf."""
    _checks.check_choice("testing", "similarity", similarity, ("cosine", "dot"))
    rows = [x.detach().double().mean(1) if x.dim() == 4 else x.detach().double() for x in (a, b)]
    if similarity == "cosine":
        lengths = [x.norm(dim=-1, keepdim=True) for x in rows]
        rows = [x / torch.where(n == 0, 1, n) for x, n in zip(rows, lengths, strict=True)]
    scores = rows[0] @ rows[1].mT
    return scores.masked_fill(scores.isnan(), -math.inf)


def _split_masks(
    split: Split | tuple[Tensor, Tensor],
    batch: int,
    tokens: int,
    num_prefix: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Sources and destinations as bool [B, N] each."""
    if not isinstance(split, Split):
        split = Explicit(*split)
    resolved = split.resolve(batch, tokens, num_prefix, device)
    src, dst, _ = common.sides("testing", batch, tokens, resolved, device)
    masks = []
    for index in (src, dst):
        mask = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        masks.append(mask.scatter(1, index, True))
    return masks[0], masks[1]
