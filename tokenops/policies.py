# SPDX-License-Identifier: Apache-2.0
"""Which tokens to keep: pruning by score, keep decisions with gradients, and their loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend, _checks
from ._library import acc_dtype
from .token_map import TokenMap

ORDERS = ("position", "score")


def prune(
    scores: Tensor,
    keep: int | Tensor,
    *,
    num_prefix: int = 0,
    order: str = "position",
    fuse: bool = False,
) -> TokenMap:
    """Keep the tokens with the highest scores and drop the rest, or fuse the rest into one token.

    With ``rank_n`` the number of tokens outside the prefix that score higher than token n, or equal
    at a lower index, token n is kept iff ``rank_n < keep``. ``merge(x, prune(...))`` gathers the
    kept tokens, ``unmerge`` scatters them back.

    Args:
        scores: ``[B, N]``; float16, bfloat16, float32 or float64; any strides. Scores of the prefix
            are ignored; NaN ranks last.
        keep: Number of tokens to keep in addition to the prefix, clamped to N - ``num_prefix``. An
            int, or int32 or int64 ``[B]`` with a number for each image; the map then has N output
            tokens, of which ``counts`` are live and the rest is padding
            (``token_map.key_mask()``).
        num_prefix: Leading tokens (class, distillation, registers) that are always kept, in front.
        order: ``"position"``: kept tokens in the order of the input. ``"score"``: by descending
            score, as in DynamicViT and EViT.
        fuse: Assign the dropped tokens to an additional output token, directly after the kept ones;
            there is none if nothing is dropped.

    Returns:
        A map of N tokens to ``num_prefix + keep``, or one more if ``fuse`` is set and tokens are
        dropped; to N, padded, if ``keep`` is a tensor. Without ``fuse``, dropped tokens have
        ``assign`` -1. EViT's fused token is ``merge(x, token_map, reduce="sum", weight=w)`` with
        ``w`` 1 for kept tokens and the score for the others.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or device does not fit, or a number is negative (negative
            entries of a tensor count as 0 where reading them would wait for the device).

    Note:
        Not differentiable; indices carry no gradient. :func:`topk_keep` keeps the same tokens and
        has a gradient. Deterministic: the same bits from run to run; ties go to the lowest index.

    Example:
        >>> import torch, tokenops
        >>> token_map = tokenops.prune(torch.tensor([[0.1, 0.5, 0.2, 0.9]]), 2)
        >>> token_map.assign.tolist()
        [[-1, 0, -1, 1]]
        >>> token_map.merge(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])).flatten().tolist()
        [2.0, 4.0]

    References:
        DynamicViT (Rao et al., NeurIPS 2021, section 3.3); ``fuse`` from EViT (Liang et al., ICLR
        2022, section 3.2).
    """
    num_prefix = _check_scores("prune", scores, num_prefix)
    keep = _check_keep("prune", "keep", keep, scores, num_prefix)
    _checks.check_choice("prune", "order", order, ORDERS)
    tokens = scores.shape[1]
    free = tokens - num_prefix
    limit = num_prefix + (keep[:, None] if isinstance(keep, Tensor) else keep)
    rank = _ranks(scores, num_prefix)  # [B, N]
    kept = rank < limit
    place = rank if order == "score" else kept.cumsum(1, dtype=torch.int32) - 1
    assign = torch.where(kept, place, limit if fuse else -1).int()
    counts = None
    if isinstance(keep, Tensor):
        num_tokens, counts = tokens, (num_prefix + keep + (keep < free if fuse else 0)).int()
    else:
        num_tokens = num_prefix + keep + (1 if fuse and keep < free else 0)
    offsets, members = _backend.dispatch("invert", assign)(assign, num_tokens)
    return TokenMap(assign, offsets, members, counts)


def gumbel_keep(
    logits: Tensor,
    prev: Tensor | None = None,
    *,
    tau: float = 1.0,
    hard: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw keep decisions with the gradient of their relaxation (straight-through Gumbel-softmax).

    With Gumbel noise ``g`` and ``y = softmax((logits + g) / tau)``, the decision is 1 iff
    ``y_0 >= y_1``, times ``prev``. It is exactly 0 or 1; its gradient is that of ``y_0``.

    Args:
        logits: ``[B, N, 2]``; float16, bfloat16, float32 or float64; logits or log-probabilities of
            keeping (index 0) and of dropping (index 1).
        prev: Decisions of the previous stage, floating ``[B, N, 1]``: dropped tokens stay dropped.
        tau: Temperature, above 0.
        hard: Round to 0 or 1; if False, return ``y_0`` itself.
        generator: Source of randomness; the device's default one when None. ``torch.compile`` and
            activation checkpointing support the default one only.

    Returns:
        ``[B, N, 1]`` in the dtype of ``logits``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or device does not fit, ``tau`` is not above 0, or activation
            checkpointing would draw again from a generator that is not a default one.

    Note:
        Differentiable in ``logits`` and ``prev``, twice and more. Deterministic for a given state
        of the generator, which draws ``[B, N, 2]`` exponential numbers in float32; with float32
        logits, the decisions equal those of :func:`torch.nn.functional.gumbel_softmax` from the
        same state.

    Example:
        >>> import torch, tokenops
        >>> logits = torch.tensor([[[99.0, 0.0], [0.0, 99.0]]])
        >>> tokenops.gumbel_keep(logits).flatten().tolist()
        [1.0, 0.0]

    References:
        Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, section 2;
        DynamicViT (Rao et al., NeurIPS 2021, section 3.2).
    """
    name = "gumbel_keep"
    _checks.check_floating(name, "logits", logits, dims=(3,))
    batch, tokens = logits.shape[:2]
    _checks.check_shape(name, "logits", logits, [(batch, tokens, 2)])
    if prev is not None:
        _checks.check_floating(name, "prev", prev, dims=(3,))
        _checks.check_shape(name, "prev", prev, [(batch, tokens, 1)])
        _checks.check_same_device(name, "prev", prev, logits)
    tau = _checks.check_real(name, "tau", tau)
    if tau <= 0:
        raise _checks.value_error(name, "tau", "above 0", tau)
    _checks.check_generator(name, generator)
    if generator is not None:
        _checks.check_first_pass(name, generator)
    noisy = logits.to(acc_dtype(logits)) + _gumbel_like(logits, generator)
    lead = noisy[..., :1] - noisy[..., 1:]
    keep = (lead / tau).sigmoid()
    if hard:
        # The difference is exactly 0, so the decision is exact; 1 - y + y could be rounded.
        keep = (lead >= 0).to(keep.dtype) + (keep - keep.detach())
    keep = keep.to(logits.dtype)
    return keep if prev is None else keep * prev.to(logits.dtype)


def topk_keep(scores: Tensor, k: int | Tensor, *, num_prefix: int = 0) -> Tensor:
    """Keep decisions for the ``k`` highest scores, with a straight-through gradient.

    The value is 1 for the tokens that ``prune(scores, k)`` keeps and 0 for the others; the gradient
    is passed on to the scores unchanged.

    Args:
        scores: ``[B, N]``; float16, bfloat16, float32 or float64. Scores of the prefix are
            ignored; NaN ranks last.
        k: Number of tokens to keep in addition to the prefix, clamped to N - ``num_prefix``: an
            int, or int32 or int64 ``[B]``.
        num_prefix: Leading tokens that are always kept.

    Returns:
        ``[B, N, 1]`` in the dtype of ``scores``, exactly 0 or 1.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or device does not fit, or a number is negative.

    Note:
        Differentiable in ``scores``, as the identity; scores that are infinite, NaN or of the
        prefix get a gradient of 0. Deterministic: the same bits from run to run; ties go to the
        lowest index.

    Example:
        >>> import torch, tokenops
        >>> scores = torch.tensor([[0.1, 0.5, 0.2, 0.9]], requires_grad=True)
        >>> tokenops.topk_keep(scores, 2).flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]

    References:
        The straight-through estimator of Bengio et al., "Estimating or Propagating Gradients
        Through Stochastic Neurons for Conditional Computation", arXiv 1308.3432, section 4.
    """
    num_prefix = _check_scores("topk_keep", scores, num_prefix)
    k = _check_keep("topk_keep", "k", k, scores, num_prefix)
    limit = num_prefix + (k[:, None] if isinstance(k, Tensor) else k)
    kept = (_ranks(scores, num_prefix) < limit)[:, num_prefix:]
    free = scores[:, num_prefix:]
    free = torch.where(free.isfinite(), free, 0)  # inf - inf would be NaN
    decision = kept.to(scores.dtype) + (free - free.detach())
    prefix = torch.ones_like(scores[:, :num_prefix])
    return torch.cat([prefix, decision], dim=1)[..., None]


def keep_ratio_loss(
    decisions: Tensor | Sequence[Tensor],
    ratios: float | Sequence[float],
    *,
    per_image: bool = True,
) -> Tensor:
    """Squared difference between the share of kept tokens and a target ratio.

    ``mean_s mean_b (mean_n decisions_s[b, n] - ratio_s)^2`` over stages s and images b; without
    ``per_image``, ``mean_s (mean_bn decisions_s[b, n] - ratio_s)^2``, which lets the share differ
    by image.

    Args:
        decisions: Keep decisions ``[B, N, 1]`` or ``[B, N]`` of each stage, floating, without the
            prefix; a single tensor is one stage.
        ratios: Share of tokens to keep at each stage, between 0 and 1; a single number applies
            to every stage.
        per_image: Whether each image should keep this share, or the batch as a whole.

    Returns:
        A 0-D tensor in float32 (float64 for double decisions).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape does not fit, there are no stages, or a ratio is not in [0, 1].

    Note:
        Differentiable in ``decisions``, twice. Deterministic: the same bits from run to run.

    Example:
        >>> import torch, tokenops
        >>> decisions = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
        >>> tokenops.keep_ratio_loss(decisions, 0.5).item()
        0.125
        >>> tokenops.keep_ratio_loss(decisions, 0.75, per_image=False).item()
        0.0

    References:
        DynamicViT (Rao et al., NeurIPS 2021, section 3.3), the ratio loss; ``per_image=False`` is
        its ``dynamic`` mode.
    """
    name = "keep_ratio_loss"
    if isinstance(decisions, Tensor):
        decisions = [decisions]
    if not isinstance(decisions, Sequence) or isinstance(decisions, str):
        raise _checks.type_error(name, "decisions", "a tensor or a sequence of them", decisions)
    if len(decisions) == 0:
        raise _checks.value_error(name, "decisions", "of at least one stage", decisions)
    if not isinstance(ratios, Sequence):
        ratios = [ratios] * len(decisions)
    if isinstance(ratios, str) or len(ratios) != len(decisions):
        expected = f"a number, or one for each of {len(decisions)} stages"
        raise _checks.value_error(name, "ratios", expected, ratios)
    terms = []
    for decision, ratio in zip(decisions, ratios, strict=True):
        _checks.check_floating(name, "decisions", decision, dims=(2, 3))
        if decision.dim() == 3:
            _checks.check_shape(name, "decisions", decision, [(*decision.shape[:2], 1)])
        ratio = _checks.check_real(name, "ratios", ratio)
        if not 0 <= ratio <= 1:
            raise _checks.value_error(name, "ratios", "in [0, 1]", ratio)
        shares = _mean(decision.flatten(1).to(acc_dtype(decision)), 1)  # [B]
        if per_image:
            terms.append(_mean((shares - ratio) ** 2, 0))
        else:
            terms.append((_mean(shares, 0) - ratio) ** 2)
    return torch.stack(terms).mean()


def _mean(x: Tensor, dim: int) -> Tensor:
    """Mean over a dimension; 0 if the dimension is empty."""
    return x.sum(dim) / max(x.shape[dim], 1)


def _ranks(scores: Tensor, num_prefix: int) -> Tensor:
    """Rank of each token by descending score, prefix first: int32 [B, N]."""
    scores = scores.detach()
    # Ascending sorts put NaN last, but a radix sort may put first a NaN whose sign was flipped.
    keys = torch.where(scores.isnan(), math.nan, -scores)
    if num_prefix > 0:
        keys[:, :num_prefix].fill_(-math.inf)
    order = keys.argsort(dim=1, stable=True)
    # The members of a map that is a permutation are its inverse permutation.
    rank: Tensor = _backend.dispatch("invert", order)(order.int(), order.shape[1])[1]
    return rank


def _gumbel_like(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel noise in float32, always finite."""
    noise = torch.empty_like(
        logits,
        dtype=torch.float32,
        device=None if generator is None else generator.device,
        memory_format=torch.contiguous_format,
    )
    noise.exponential_(generator=generator)
    return -noise.clamp(min=torch.finfo(torch.float32).tiny).log().to(logits.device)


def _check_scores(name: str, scores: Tensor, num_prefix: int) -> int:
    _checks.check_floating(name, "scores", scores, dims=(2,))
    num_prefix = _checks.check_int(name, "num_prefix", num_prefix)
    if num_prefix > scores.shape[1]:
        raise _checks.value_error(name, "num_prefix", f"at most N = {scores.shape[1]}", num_prefix)
    return num_prefix


def _check_keep(
    name: str, argument: str, keep: int | Tensor, scores: Tensor, num_prefix: int
) -> int | Tensor:
    """Check the number of tokens to keep, and clamp it to the tokens outside the prefix."""
    free = scores.shape[1] - num_prefix
    if not isinstance(keep, Tensor) or keep.dim() == 0:
        return min(_checks.check_int(name, argument, keep), free)
    _checks.check_index(name, argument, keep, dims=(1,))
    _checks.check_shape(name, argument, keep, [(scores.shape[0],)])
    _checks.check_same_device(name, argument, keep, scores)
    if _checks.values_visible(keep) and not _checks.holds((keep >= 0).all()):
        least = int(keep.min())
        raise _checks.value_mismatch(name, argument, ">= 0 everywhere", f"a minimum of {least}")
    return keep.clamp(0, free)
