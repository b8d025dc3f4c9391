# SPDX-License-Identifier: Apache-2.0
"""Drop-in for ToMe: the functions of ``tome.merge`` and ``parse_r`` of ``tome.utils``.

Arguments, results and the order of outputs are as in ToMe; fused operators compute them. Matching
functions return a pair ``(merge, unmerge)``: ``merge(x, mode="mean")`` reduces ``[B, N, C]`` to
``[B, M, C]`` by ``"sum"``, ``"mean"``, ``"amax"``, ``"amin"`` or ``"prod"``; ``unmerge(y)`` maps
back. Both have a ``token_map``, which all functions of tokenops take.

These differences correct errors of ToMe:

* A token of zero length has similarity 0 to every other; in ToMe it is NaN and wins every match.
* ``unmerge`` inverts the layout that ``merge`` makes for a distillation token.
* ``unmerge`` of ``kth_bipartite_soft_matching`` gives all N tokens; the tail that ``merge`` drops
  comes back as zeros instead of being missing.
* Sizes are summed in float32 and rounded once; see :func:`merge_wavg`.

References:
    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import TokenMap, _checks, match, random, strided
from .. import merge as _merge
from .. import merge_wavg as _merge_wavg
from .. import unmerge as _unmerge

__all__ = [
    "bipartite_soft_matching",
    "do_nothing",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "parse_r",
    "random_bipartite_soft_matching",
]


@dataclass(frozen=True, eq=False)
class Merge:
    """Reduces ``x`` ``[B, N, C]`` to ``[B, M, C]`` by a token map; see :func:`tokenops.merge`.

    It also takes integers and bools, which :func:`tokenops.merge` does not, and keeps their dtype:
    sums wrap around and means round down. For bools, ``amax`` and ``sum`` mean any, ``amin`` and
    ``prod`` mean all. An output token without members is 0.
    """

    token_map: TokenMap

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        token_map = _for_batch(self.token_map, x)
        if _is_whole(x):
            return _merge_whole(x, token_map, mode)
        return _merge(x, token_map, reduce=mode)


@dataclass(frozen=True, eq=False)
class Unmerge:
    """Spreads ``x`` ``[B, M, C]`` to ``[B, N, C]`` by a token map; see :func:`tokenops.unmerge`.

    It also takes integers and bools, which :func:`tokenops.unmerge` does not, and keeps their
    dtype.
    """

    token_map: TokenMap

    def __call__(self, x: Tensor) -> Tensor:
        token_map = _for_batch(self.token_map, x)
        return _unmerge_whole(x, token_map) if _is_whole(x) else _unmerge(x, token_map)


@dataclass(frozen=True, eq=False)
class DoNothing:
    """``merge`` and ``unmerge`` when nothing merges: returns its argument itself."""

    batch: int
    num_tokens: int
    device: torch.device

    @property
    def token_map(self) -> TokenMap:
        """The identity, made on access."""
        return TokenMap.identity(self.batch, self.num_tokens, self.device)

    def __call__(self, x: Tensor, mode: str | None = None) -> Tensor:
        return x


Matching: TypeAlias = tuple[Merge, Unmerge] | tuple[DoNothing, DoNothing]


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """Stand-in for ``merge`` and ``unmerge`` that returns ``x`` itself."""
    return x


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Match even tokens to odd ones and merge the ``r`` most similar pairs.

    Args:
        metric: ``[B, N, D]``, or attention keys ``[B, H, N, D]``, which are averaged over heads.
        r: Tokens to merge away, clamped to half of the tokens that may merge; nothing merges if
            it is not positive.
        class_token: Whether token 0 is a class token, which never merges.
        distill_token: Whether token 1 is a distillation token, into which nothing merges.

    Returns:
        ``(merge, unmerge)``, to N - r tokens in the order ``[unmerged | destinations]``. Unmerged
        tokens descend in similarity; with a class token they ascend in index, so that it stays in
        front. With a distillation token, it comes second.

    Raises:
        TypeError: If ``metric`` is not a floating-point tensor or ``r`` not an int.
        ValueError: If ``metric`` has a wrong shape.

    Note:
        Deterministic as :func:`tokenops.match`; ties go to the lowest token index.

    Example:
        >>> from tokenops.compat import tome
        >>> merge, unmerge = tome.bipartite_soft_matching(torch.eye(4)[None], 1)
        >>> merge(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])).flatten().tolist()
        [3.0, 1.5, 4.0]

    References:
        ToMe's ``bipartite_soft_matching``, except that ``unmerge`` inverts the layout of the
        distillation token, that a token of zero length has similarity 0 to every other, and that
        nothing merges among three tokens of which one is a distillation token and none a class
        token: the only destination is the distillation token.
    """
    name = "bipartite_soft_matching"
    tokens = _num_tokens(name, metric)
    # Negative merges nothing, as in ToMe. Sizes are tensors under torch.jit.trace.
    r = _checks.check_int(name, "r", r, minimum=None)
    prefix = int(bool(class_token)) + int(bool(distill_token))
    r = min(r, (tokens - prefix) // 2)
    only_distill = distill_token and not class_token
    if r <= 0 or (only_distill and tokens < 4):
        return _nothing(metric)
    if not only_distill:
        return _pair(match(metric, r, num_prefix=prefix, order="tome"))
    is_distill = torch.arange(tokens, device=metric.device) == 1
    token_map = match(metric, r, protected=is_distill, order="tome")
    # [unmerged | token 1 | destinations] -> [first unmerged | token 1 | unmerged | destinations]
    unmerged = (tokens + 1) // 2 - r
    assign = token_map.assign
    moved = assign + ((assign > 0) & (assign < unmerged))
    return _pair(TokenMap.from_assign(torch.where(assign == unmerged, 1, moved), tokens - r))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> Matching:
    """Keep the last of each ``k`` tokens; merge each other token into the most similar kept token.

    Args:
        metric: ``[B, N, D]``, or attention keys ``[B, H, N, D]``, which are averaged over heads.
        k: Stride of the destinations; nothing merges if it is below 2.

    Returns:
        ``(merge, unmerge)``, to N // k tokens in the order of the destinations. ``merge`` drops the
        last N % k tokens, the tail; ``unmerge`` gives zeros for them.

    Raises:
        TypeError: If ``metric`` is not a floating-point tensor or ``k`` not an int.
        ValueError: If ``metric`` has a wrong shape or fewer than ``k`` tokens.

    Note:
        Deterministic as :func:`tokenops.match`; ties go to the lowest token index.

    Example:
        >>> from tokenops.compat import tome
        >>> merge, unmerge = tome.kth_bipartite_soft_matching(torch.ones(1, 5, 2), 2)
        >>> unmerge(merge(torch.arange(5.0)[None, :, None])).flatten().tolist()
        [1.0, 1.0, 1.0, 3.0, 0.0]

    References:
        ToMe's ``kth_bipartite_soft_matching``, except that ``unmerge`` does not lose the tail and
        that a token of zero length has similarity 0 to every other.
    """
    name = "kth_bipartite_soft_matching"
    tokens = _num_tokens(name, metric)
    k = _checks.check_int(name, "k", k, minimum=None)
    if k <= 1:
        return _nothing(metric)
    split = strided(k)
    if tokens < k:
        raise _checks.value_error(name, "metric", f"of at least k = {k} tokens", metric)
    tail = tokens % k
    whole = metric[..., : tokens - tail, :]
    token_map = match(whole, tokens - tail - tokens // k, split=split, order="tome")
    if tail:
        # The tail is dropped: only the ends of the two lists change.
        assign, members = (
            torch.nn.functional.pad(index, (0, tail), value=-1)
            for index in (token_map.assign, token_map.members)
        )
        token_map = TokenMap(assign, token_map.offsets, members)
    return _pair(token_map)


def random_bipartite_soft_matching(metric: Tensor, r: int) -> Matching:
    """Merge ``r`` tokens drawn at random in each image, each into the most similar of the rest.

    Args:
        metric: ``[B, N, D]``, or attention keys ``[B, H, N, D]``, which are averaged over heads.
        r: Tokens to merge away; nothing merges if it is not positive.

    Returns:
        ``(merge, unmerge)``, to the N - r tokens that were not drawn, in the order of the draw.

    Raises:
        TypeError: If ``metric`` is not a floating-point tensor or ``r`` not an int.
        ValueError: If ``metric`` has a wrong shape or ``r`` is not below N.

    Note:
        Deterministic: the draw takes ``[B, N]`` numbers from the default generator of the metric's
        device, as in ToMe, so the same seed gives the same split. If ``r <= 0``, nothing is drawn.

    References:
        ToMe's ``random_bipartite_soft_matching``, except that a token of zero length has
        similarity 0 to every other.
    """
    name = "random_bipartite_soft_matching"
    tokens = _num_tokens(name, metric)
    r = _checks.check_int(name, "r", r, minimum=None)
    if r <= 0:
        return _nothing(metric)
    if r >= tokens:
        raise _checks.value_error(name, "r", f"below the {tokens} tokens of metric", r)
    return _pair(match(metric, r, split=random(r), order="tome"))


def merge_wavg(
    merge: Callable[..., Tensor], x: Tensor, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Merge ``x`` by a mean that is weighted by size, and sum the sizes.

    Args:
        merge: The ``merge`` of a matching function of this module, computed in one fused pass; or
            any callable ``merge(x, mode="sum")``.
        x: Tokens ``[B, N, C]``.
        size: Number of patches in each token, ``[B, N, 1]``; if None, ones of the dtype of ``x``.

    Returns:
        The means ``[B, M, C]`` of the dtype of ``x``, and the sizes ``[B, M, 1]`` of the dtype of
        ``size``, so that a model in half precision stays in half precision. Sizes are summed in
        float32 and then rounded: float16 is exact up to 2048, bfloat16 up to 256. If sizes may
        exceed this, let the first sizes be ``x.new_ones(B, N, 1, dtype=torch.float32)``; all later
        sizes are then float32, and attention adds ``size.log().to(q.dtype)``.

    Raises:
        TypeError: If ``x`` or ``size`` is not a tensor of numbers.
        ValueError: If a shape does not fit.

    Note:
        Differentiable in ``x`` and ``size``.

    References:
        ToMe's ``merge_wavg``, except that float16 and bfloat16 are summed in float32, and that
        sizes of a wider dtype do not widen ``x``.
    """
    if not isinstance(x, Tensor):
        raise _checks.type_error("merge_wavg", "x", "a tensor", x)
    if size is None:
        size_dtype = x.dtype
    else:
        if not isinstance(size, Tensor):
            raise _checks.type_error("merge_wavg", "size", "a tensor or None", size)
        size_dtype = size.dtype
    if _is_whole(x) or size_dtype not in _checks.FLOATING_DTYPES:
        return _wavg_of_integers(merge, x, size)
    if isinstance(merge, DoNothing):
        return x, torch.ones_like(x[..., :1]) if size is None else size
    token_map = getattr(merge, "token_map", None)
    if isinstance(token_map, TokenMap):
        token_map = _for_batch(token_map, x)
        out, total = _merge_wavg(x, token_map, size)
        if size is not None and size_dtype == torch.float64 != x.dtype:  # summed in the dtype of x
            total = _merge(size, token_map, reduce="sum")
        return out, total.to(size_dtype)
    size = torch.ones_like(x[..., :1]) if size is None else size
    size = size.to(torch.promote_types(size_dtype, torch.float32))
    total = merge(size, mode="sum")
    return (merge(size * x, mode="sum") / total).to(x.dtype), total.to(size_dtype)


def _wavg_of_integers(
    merge: Callable[..., Tensor], x: Tensor, size: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weighted mean if tokens or sizes are integers: sums are exact, means are floating-point."""
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Callable[..., Tensor], x: Tensor, source: Tensor | None = None) -> Tensor:
    """Track the tokens of the first layer that each token is made of.

    Args:
        merge: The ``merge`` of a matching function of this module, or any callable
            ``merge(x, mode="amax")``.
        x: Tokens ``[B, N, C]`` before the merge; only its shape and device are used.
        source: 0/1 matrix before the merge, ``[B, N, N0]``; the identity if None.

    Returns:
        The matrix after the merge, ``[B, M, N0]``; ``TokenMap.compose`` gives the same as
        ``[B, N0]`` integers.

    Raises:
        TypeError: If ``source`` is not a tensor of numbers.
        ValueError: If a shape does not fit.

    References:
        ToMe's ``merge_source``.
    """
    nothing = isinstance(merge, DoNothing)
    if source is None:
        token_map = None if nothing else getattr(merge, "token_map", None)
        if isinstance(token_map, TokenMap):  # equals the merged identity
            return _for_batch(token_map, x).source_matrix(torch.get_default_dtype())
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def parse_r(num_layers: int, r: list[int] | tuple[int, float] | int) -> list[int]:
    """Turn a schedule of ``r`` into one number for each layer.

    Args:
        num_layers: Number of layers L.
        r: A number for all layers; ``(r, inflect)``, a line from ``r * (1 - inflect)`` to
            ``r * (1 + inflect)``, so that +1 rises from 0, -1 falls to 0 and the sum stays about
            ``L * r``; or a list of numbers, filled up with zeros.

    Returns:
        L numbers, rounded towards zero; a list that is longer than L is returned unchanged.

    References:
        ToMe's ``parse_r``, except that a single layer gets ``[r]`` instead of a division by zero.
    """
    if isinstance(r, list):
        return r + [0] * (num_layers - len(r))
    middle, inflect = r if isinstance(r, tuple) else (r, 0.0)
    if num_layers == 1:
        return [int(middle)]
    first = int(middle * (1.0 - inflect))
    slope = 2 * (middle - first) / (num_layers - 1)
    return [int(first + slope * layer) for layer in range(num_layers)]


def _pair(token_map: TokenMap) -> Matching:
    return Merge(token_map), Unmerge(token_map)


def _nothing(metric: Tensor) -> Matching:
    nothing = DoNothing(metric.shape[0], metric.shape[-2], metric.device)
    return nothing, nothing


def _num_tokens(name: str, metric: Tensor) -> int:
    _checks.check_floating(name, "metric", metric, dims=(3, 4))
    return metric.shape[-2]


def _is_whole(x: object) -> bool:
    """Whether ``x`` is a tensor of integers or bools."""
    if not isinstance(x, Tensor) or x.dtype in _checks.FLOATING_DTYPES:
        return False
    return not (x.dtype.is_floating_point or x.dtype.is_complex)


def _merge_whole(x: Tensor, token_map: TokenMap, mode: str) -> Tensor:
    name = "merge"
    _checks.check_choice(name, "mode", mode, ("sum", "mean", "amax", "amin", "prod"))
    shape = (*token_map.assign.shape, x.shape[-1])
    _check_tokens(name, x, shape)
    if x.dtype == torch.bool:
        if mode == "mean":
            raise _checks.type_error(name, "x", "a tensor of numbers for a mean", x)
        mode = {"sum": "amax", "prod": "amin"}.get(mode, mode)
        return _merge_whole(x.to(torch.uint8), token_map, mode).to(torch.bool)
    # An additional row after the output tokens takes the dropped tokens.
    place = torch.where(token_map.assign < 0, token_map.num_tokens, token_map.assign).long()
    out = x.new_zeros(shape[0], token_map.num_tokens + 1, shape[2])
    out = out.scatter_reduce(1, place[..., None].expand(shape), x, mode, include_self=False)
    return out[:, : token_map.num_tokens]


def _unmerge_whole(x: Tensor, token_map: TokenMap) -> Tensor:
    _check_tokens("unmerge", x, (x.shape[0], token_map.num_tokens, x.shape[-1]))
    assign = token_map.assign[..., None].long()  # [B, N, 1]
    if x.shape[1] == 0:  # there is no row to gather
        return x.new_zeros(*token_map.assign.shape, x.shape[2])
    rows = x.gather(1, assign.clamp(min=0).expand(-1, -1, x.shape[2]))
    return torch.where(assign < 0, torch.zeros_like(rows), rows)


def _check_tokens(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    _checks.check_dense(name, "x", x)
    _checks.check_rank(name, "x", x, (3,))
    _checks.check_shape(name, "x", x, [shape])


def _for_batch(token_map: TokenMap, x: Tensor) -> TokenMap:
    """Return the map; if it is of a single image, expand it to the batch of ``x``."""
    if token_map.assign.shape[0] != 1 or not isinstance(x, Tensor) or x.dim() == 0:
        return token_map
    batch = x.shape[0]
    if batch == 1:
        return token_map
    assign, offsets, members = (
        index.expand(batch, -1).contiguous()
        for index in (token_map.assign, token_map.offsets, token_map.members)
    )
    return TokenMap(assign, offsets, members)


# Lets torch.load(weights_only=True) load a saved pair once this module is imported.
torch.serialization.add_safe_globals([Merge, Unmerge, DoNothing])
