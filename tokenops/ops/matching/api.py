# SPDX-License-Identifier: Apache-2.0
"""Bipartite similarity matching of tokens."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ... import _backend, _checks, _library
from ..._library import acc_dtype
from ...splits import Explicit, Split, Strided
from ...token_map import TokenMap
from . import common, schema  # noqa: F401 - registers the operators
from .arguments import Request, SplitArgs

SIMILARITIES = ("cosine", "dot")
ORDERS = ("position", "tome")

_ALTERNATE = Strided(2)


def nearest(
    a: Tensor,
    b: Tensor,
    *,
    similarity: str = "cosine",
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the most similar row of ``b`` for each row of ``a``, without the similarity matrix.

    ``score[i] = max_j sim(a[i], b[j])``, and ``index[i]`` is the lowest ``j`` that attains it. The
    cosine similarity of a row of length zero is 0; a NaN similarity counts as -inf.

    Args:
        a: ``[B, Na, D]``, or attention keys ``[B, H, Na, D]`` whose mean over heads is compared;
            float16, bfloat16, float32 or float64; any strides.
        b: ``[B, Nb, D]`` or ``[B, H, Nb, D]``, of the rank and dtype of ``a``.
        similarity: ``"cosine"`` or ``"dot"``.
        a_mask: Bool ``[B, Na]``, true for rows of ``a`` that take part.
        b_mask: Bool ``[B, Nb]``, true for rows of ``b`` that take part.

    Shape:
        ``[B, Na, D], [B, Nb, D] -> [B, Na], [B, Na]`` for B images, Na and Nb tokens of width D;
        attention keys have an additional dimension of H heads.

    Returns:
        ``score`` ``[B, Na]`` in float32 (float64 for double inputs) and ``index``, int32
        ``[B, Na]``; -inf and -1 for a row that is masked out or has no candidate.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices do not fit, or ``similarity`` is unknown.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        ``score`` is differentiable in ``a`` and ``b`` at the chosen pairs, to any order.
        Deterministic for any number of threads; backends may choose differently where two
        similarities differ by less than their rounding.

    Example:
        >>> import torch, tokenops
        >>> a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> tokenops.nearest(a, a.flip(1))[1].tolist()
        [[1, 0]]

    References:
        The node similarity of ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023,
        section 3).
    """
    _checks.check_floating("nearest", "a", a, dims=(3, 4))
    _checks.check_floating("nearest", "b", b, dims=(3, 4))
    if b.dtype != a.dtype:
        raise _checks.type_error("nearest", "b", f"of dtype {a.dtype} as a", b)
    expected = (*a.shape[:-2], b.shape[-2], a.shape[-1])
    _checks.check_shape("nearest", "b", b, [expected])
    _checks.check_same_device("nearest", "b", b, a)
    _check_heads("nearest", "a", a)
    _checks.check_choice("nearest", "similarity", similarity, SIMILARITIES)
    for argument, mask, rows in (("a_mask", a_mask, a), ("b_mask", b_mask, b)):
        if mask is not None:
            _checks.check_bool("nearest", argument, mask)
            _checks.check_shape("nearest", argument, mask, [(rows.shape[0], rows.shape[-2])])
            _checks.check_same_device("nearest", argument, mask, a)
    score, index = _backend.dispatch("nearest", a)(a, b, a_mask, b_mask, similarity)
    return score, index


def match(
    metric: Tensor,
    r: int,
    *,
    num_prefix: int = 0,
    protected: Tensor | None = None,
    split: Split | tuple[Tensor, Tensor] = _ALTERNATE,
    threshold: float | Tensor | None = None,
    order: str = "position",
    similarity: str = "cosine",
) -> TokenMap:
    """Match tokens by similarity: the ``r`` best sources merge into their best destinations.

    For each source, ``node_max`` is the largest similarity to a destination and ``node_idx`` the
    lowest destination that has it; the similarity matrix is not stored. The ``r`` sources with the
    largest ``node_max`` merge; ties go to the lowest token index.

    Args:
        metric: ``[B, N, D]``, or attention keys ``[B, H, N, D]`` whose mean over heads is the
            metric; float16, bfloat16, float32 or float64; any strides, for example a view of a
            packed qkv.
        r: Number of tokens to merge away, clamped to the number of sources outside the prefix. To
            export an ``r`` that is a share of N, where N is a named ``Dim``, pass
            ``prefer_deferred_runtime_asserts_over_guards=True`` to ``torch.export.export``.
        num_prefix: Number of leading tokens (class, distillation, registers) that neither merge
            nor receive.
        protected: Bool ``[N]`` or ``[B, N]``, true for tokens that neither merge nor receive. The
            number of output tokens cannot depend on values, so without a ``threshold`` each image
            needs ``r`` unprotected sources and an unprotected destination. If ``protected`` cannot
            be checked without waiting for the device, protected sources merge as a last resort.
        split: Sources and destinations: ``alternate()`` (ToMe), ``strided(k)``, ``random(n)``,
            ``grid(h, w, sy, sx)`` (tomesd), or a pair of index tensors ``([Ns] or [B, Ns],
            [Nd] or [B, Nd])``, which list tokens outside the prefix, each at most once. Unlisted
            tokens stay as they are.
        threshold: Minimum similarity of a pair that merges; at most ``r`` pairs merge. Counts then
            differ between images: the map has N output tokens, of which ``counts`` are live. A
            floating-point tensor of shape ``[]`` or ``[B]`` may change its values under CUDA
            graphs; a NaN threshold merges nothing. The cosine of equal tokens may round to just
            below 1. If a float is an argument of a compiled function, its second value recompiles
            the function; further values do not.
        order: Order of the output tokens. ``"position"``: by the index of their first members.
            ``"tome"``: prefix, unmerged sources, destinations, as ToMe concatenates them.
        similarity: ``"cosine"`` or ``"dot"``.

    Shape:
        ``[B, N, D] -> assign [B, N]`` for B images and N tokens of width D; attention keys have an
        additional dimension of H heads. A split has Ns sources and Nd destinations.

    Returns:
        A map of N tokens to N - r; with a ``threshold``, to N, padded.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape, device or value does not fit.
        NotImplementedError: If an explicitly chosen backend cannot serve the call.

    Note:
        Not differentiable; indices carry no gradient. Deterministic for any number of threads;
        backends may choose differently where two similarities differ by less than their rounding.

    Example:
        >>> import torch, tokenops
        >>> metric = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 0.5]]])
        >>> tokenops.match(metric, 1).assign.tolist()
        [[0, 0, 1, 2]]

    References:
        ``bipartite_soft_matching`` of ToMe (Bolya et al., "Token Merging: Your ViT But Faster",
        ICLR 2023, section 3).
    """
    _checks.check_floating("match", "metric", metric, dims=(3, 4))
    _check_heads("match", "metric", metric)
    r = _checks.check_int("match", "r", r)
    num_prefix = _checks.check_int("match", "num_prefix", num_prefix)
    batch, tokens = metric.shape[0], metric.shape[-2]
    if num_prefix > tokens:
        raise _checks.value_error("match", "num_prefix", f"at most N = {tokens}", num_prefix)
    _checks.check_choice("match", "order", order, ORDERS)
    _checks.check_choice("match", "similarity", similarity, SIMILARITIES)
    thresholds = None
    if threshold is not None:
        threshold, thresholds = _check_threshold(threshold, metric)
    if protected is not None:
        _checks.check_bool("match", "protected", protected)
        _checks.check_shape("match", "protected", protected, [(tokens,), (batch, tokens)])
        _checks.check_same_device("match", "protected", protected, metric)
    resolved = _resolve(split, batch, tokens, num_prefix, metric.device)
    if protected is not None:
        resolved = resolved._replace(protected=protected)
    num_src, num_dst, prefix_src, prefix_dst = common.count_sides("match", tokens, resolved)
    r = min(r, num_src - prefix_src if num_dst > prefix_dst else 0)
    request = Request(r, threshold, thresholds, order)
    if protected is not None and not request.limited():
        _check_enough_tokens(r, batch, tokens, protected, resolved)
    arguments = metric.detach(), similarity, *request, *resolved
    if _library.distribute is not None:
        arguments = _library.distribute(arguments)
    assign, offsets, members, counts = _backend.dispatch("match", metric)(*arguments)
    return TokenMap(assign, offsets, members, counts if request.limited() else None)


def _resolve(
    split: object, batch: int, tokens: int, num_prefix: int, device: torch.device
) -> SplitArgs:
    if isinstance(split, (tuple, list)) and len(split) == 2:
        split = Explicit(*split)
    if not isinstance(split, Split):
        expected = "a split or a pair of index tensors (source_index, destination_index)"
        raise _checks.type_error("match", "split", expected, split)
    return split.resolve(batch, tokens, num_prefix, device)


def _check_heads(name: str, argument: str, x: Tensor) -> None:
    if x.dim() == 4 and x.shape[1] == 0:
        raise _checks.value_error(name, argument, "of at least one head", x)


def _check_threshold(threshold: object, metric: Tensor) -> tuple[float | None, Tensor | None]:
    """A threshold for all images as a float, or one for each image as a tensor ``[B]``."""
    batch = metric.shape[0]
    if isinstance(threshold, Tensor):
        if not threshold.dtype.is_floating_point:
            raise _checks.type_error("match", "threshold", "of a floating-point dtype", threshold)
        _checks.check_shape("match", "threshold", threshold, [(), (batch,)])
        _checks.check_same_device("match", "threshold", threshold, metric)
        return None, threshold.detach().to(acc_dtype(metric)).expand(batch)
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        expected = "a float, a floating-point tensor or None"
        raise _checks.type_error("match", "threshold", expected, threshold)
    if threshold != threshold:  # NaN, in a form that torch.compile traces
        raise _checks.value_error("match", "threshold", "a number", threshold)
    if torch.compiler.is_dynamo_compiling():  # a constant would specialize the graph
        each: Tensor = metric.new_zeros(batch, dtype=acc_dtype(metric)) + threshold  # type: ignore[assignment]
        return None, each
    return float(threshold), None


def _check_enough_tokens(
    r: int, batch: int, tokens: int, protected: Tensor, split: SplitArgs
) -> None:
    """Check that each image has r sources and a destination that may merge."""
    if not _checks.values_visible(protected) or r == 0:
        return
    token = torch.arange(tokens, device=protected.device)
    free = ((token >= split.num_prefix) & ~protected).expand(batch, tokens)
    if split.src_index is None and split.grid_width == 0:
        is_dst = token % split.stride == split.stride - 1
        src, dst = free & ~is_dst, free & is_dst
    else:
        sides = common.sides("match", batch, tokens, split, token.device)
        src, dst = free.gather(1, sides.src), free.gather(1, sides.dst)
    enough = (src.sum(1) >= r) & dst.any(1)  # [B]
    if not _checks.holds(enough.all()):
        image = int(enough.int().argmin())
        raise ValueError(
            f"match: r must be at most the number of unprotected sources, with at least one "
            f"unprotected destination, in each image; got r = {r} and, in image {image}, "
            f"{int(src[image].sum())} sources and {int(dst[image].sum())} "
            f"destinations (threshold=-inf allows this, with a padded map)"
        )
