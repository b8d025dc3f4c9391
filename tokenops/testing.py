# SPDX-License-Identifier: Apache-2.0
"""Tools for tests of token operators: error budgets, valid token maps, regret, awkward inputs.

Nothing here knows a test framework: a violated promise is an ``AssertionError`` whose message says
what was promised and by how much it was missed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks
from .splits import Explicit, Split, alternate
from .token_map import TokenMap

__all__ = [
    "LAYOUTS",
    "as_layout",
    "assert_same_bits",
    "assert_valid_token_map",
    "assert_within_error_budget",
    "exact_metric",
    "matching_regret",
    "nearest_regret",
    "random_token_map",
    "random_tokens",
    "similarity_rounding",
    "stride_zero",
]

#: Ways to lay out the same values in memory, for :func:`as_layout`.
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded", "packed")


def assert_within_error_budget(
    actual: Tensor,
    same_dtype_reference: Tensor,
    float64_reference: Tensor,
    *,
    factor: float = 2.0,
    magnitude: Tensor | float | None = None,
    name: str = "result",
) -> None:
    """Assert that a kernel errs at most ``factor`` times as much as plain PyTorch, plus rounding.

    Errors count in units of rounding: with ``t`` the float64 truth, one unit at an element is
    ``u = eps(dtype) * |t| + eps(float32) * magnitude`` (``eps(float64)`` for double). The promise
    is ``max(|actual - t| / u) <= factor * max(|reference - t| / u) + 1``: no tolerance is chosen,
    neither per test nor per dtype. For double, whose truth is rounded itself, the reference counts
    as off by one unit at least. Where the reference is infinite or NaN, the kernel must be the same
    infinity or NaN.

    Args:
        actual: Result of the kernel.
        same_dtype_reference: Result of a plain implementation on the same inputs, of the same
            shape, dtype and device.
        float64_reference: Result of a plain implementation on the inputs cast to float64; the
            truth, so it must have been checked on its own.
        factor: How many times the reference's error the kernel may have.
        magnitude: Sum of the absolute values of the terms that each element is a sum of, where they
            may cancel: a number or something that broadcasts. The largest ``|t|`` by default.
        name: What the message calls the result.

    Raises:
        AssertionError: If shape, dtype or device differ or the error exceeds the budget.

    Example:
        >>> x = torch.rand(100, dtype=torch.float64)
        >>> half = x.half()
        >>> assert_within_error_budget(half + half, 2 * half, 2 * half.double())
    """
    for what in ("shape", "dtype", "device"):
        got, expected = getattr(actual, what), getattr(same_dtype_reference, what)
        if got != expected:
            raise AssertionError(f"{name}: {what} {got} where the reference has {expected}")
    if float64_reference.dtype != torch.float64 or float64_reference.shape != actual.shape:
        got64 = _checks.describe(float64_reference)
        raise AssertionError(f"{name}: the truth must be float64 of the same shape, got {got64}")
    if actual.numel() == 0:
        return
    kernel, plain = actual.detach().double(), same_dtype_reference.detach().double()
    truth = float64_reference.detach()
    finite = plain.isfinite() & truth.isfinite()
    same = (kernel == plain) | (kernel.isnan() & plain.isnan())
    if not bool((finite | same).all()):
        where = _first(~(finite | same))
        raise AssertionError(
            f"{name}: {kernel[where].item()} at {list(where)}, where the reference has "
            f"{plain[where].item()} and float64 {truth[where].item()}"
        )
    if not bool(finite.any()):
        return
    if magnitude is None:
        magnitude = truth[finite].abs().max()
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    unit = torch.finfo(actual.dtype).eps * truth.abs()
    unit = unit + torch.finfo(accumulation).eps * torch.as_tensor(magnitude, device=unit.device)
    unit = unit + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    kernel_units = torch.where(finite, (kernel - truth).abs() / unit, 0)
    plain_units = torch.where(finite, (plain - truth).abs() / unit, 0)
    plain_error = max(plain_units.max().item(), float(actual.dtype == torch.float64))
    budget = factor * plain_error + 1
    if not bool((kernel_units <= budget).all()):  # a NaN is no less than the budget either
        where = _first(~(kernel_units <= budget))
        raise AssertionError(
            f"{name}: off by {kernel_units[where].item():.3g} units of rounding at {list(where)}, "
            f"the reference by at most {plain_error:.3g}, so {budget:.3g} are allowed "
            f"(got {kernel[where].item()!r}, reference {plain[where].item()!r}, "
            f"float64 {truth[where].item()!r})"
        )


def assert_same_bits(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Assert that two tensors are the same bit for bit, NaN and the sign of zero included.

    Args:
        actual: What came.
        expected: What must come.
        name: What the message calls the result.

    Raises:
        AssertionError: If shape, dtype or any bit differs.

    Example:
        >>> assert_same_bits(torch.ones(2), torch.ones(2))
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, wanted = _checks.describe(actual), _checks.describe(expected)
        raise AssertionError(f"{name}: got {got} where there must be {wanted}")
    if actual.numel() == 0:
        return
    views = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (actual, expected)]
    differing = (views[0] != views[1]).view(actual.numel(), -1).any(1)
    if bool(differing.any()):
        at = int(differing.int().argmax())
        values = [t.reshape(-1)[at].item() for t in (actual, expected)]
        raise AssertionError(
            f"{name}: {int(differing.sum())} of {actual.numel()} elements differ, the first one at "
            f"flat index {at}: {values[0]!r} and not {values[1]!r}"
        )


def assert_valid_token_map(
    token_map: TokenMap, *, num_tokens: int | None = None, partition: bool = False
) -> None:
    """Assert that the fields of a token map have the right form and say the same thing.

    Args:
        token_map: The map to check.
        num_tokens: Number of output tokens that it must have, any when None.
        partition: Also demand what ``match`` promises: no token is dropped, each live output
            token has a member and each padded one has none.

    Raises:
        AssertionError: If dtypes, shapes or strides are not those of a token map, an index is out
            of range, ``offsets`` and ``members`` are not the inverse of ``assign``, or members do
            not ascend.

    Example:
        >>> from tokenops import TokenMap
        >>> assert_valid_token_map(TokenMap.from_assign(torch.tensor([[0, 1, 0]]), 2))
    """
    assign, offsets, members = token_map.assign, token_map.offsets, token_map.members
    fields = {"assign": assign, "offsets": offsets, "members": members}
    if token_map.counts is not None:
        fields["counts"] = token_map.counts
    for name, field in fields.items():
        _require(field.dtype == torch.int32, f"{name} is {field.dtype}, not int32")
        _require(field.is_contiguous(), f"{name} is not contiguous")
        _require(field.device == assign.device, f"{name} is on {field.device}")
    batch, tokens = assign.shape
    outputs = token_map.num_tokens
    _require(num_tokens in (None, outputs), f"{outputs} output tokens, not {num_tokens}")
    _require(offsets.shape == (batch, outputs + 1), f"offsets of shape {list(offsets.shape)}")
    _require(members.shape == (batch, tokens), f"members of shape {list(members.shape)}")
    if token_map.counts is not None:
        _require(token_map.counts.shape == (batch,), f"counts of shape {token_map.counts.shape}")
    live = [outputs] * batch if token_map.counts is None else token_map.counts.tolist()
    rows = zip(assign.tolist(), offsets.tolist(), members.tolist(), live, strict=True)
    for image, (to, starts, listed, alive) in enumerate(rows):
        where = f"image {image}"
        _require(all(-1 <= m < outputs for m in to), f"{where}: assign out of [-1, {outputs})")
        _require(0 <= alive <= outputs, f"{where}: {alive} live tokens of {outputs}")
        inverse = [[n for n in range(tokens) if to[n] == m] for m in range(outputs)]
        ends = [sum(map(len, inverse[:m])) for m in range(outputs + 1)]
        _require(starts == ends, f"{where}: offsets {starts}, where assign makes {ends}")
        flat = [n for group in inverse for n in group]
        flat += [-1] * (tokens - len(flat))
        _require(listed == flat, f"{where}: members {listed}, where assign makes {flat}")
        if partition:
            _require(-1 not in to, f"{where}: dropped tokens in {to}")
            filled = [bool(group) for group in inverse]
            _require(all(filled[:alive]), f"{where}: a live output token without members")
            _require(not any(filled[alive:]), f"{where}: a padded output token with members")


def nearest_regret(
    a: Tensor,
    b: Tensor,
    index: Tensor,
    *,
    similarity: str = "cosine",
    b_mask: Tensor | None = None,
) -> Tensor:
    """How much more similar the best row of ``b`` is than the chosen one, in float64.

    Args:
        a: ``[B, Na, D]`` or ``[B, H, Na, D]``, as :func:`tokenops.nearest` takes it.
        b: ``[B, Nb, D]`` or ``[B, H, Nb, D]``.
        index: Chosen rows ``[B, Na]``; -1 where there was nothing to choose.
        similarity: ``"cosine"`` or ``"dot"``.
        b_mask: Bool ``[B, Nb]``, true for rows of ``b`` that take part.

    Returns:
        Regret ``[B, Na]`` in float64: 0 for a best row and for -1, infinite for a masked or NaN row
        where a finite similarity was to be had.

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
    """How much similarity a matching gave away, in float64.

    Of the ``r`` sources that merged in an image, each was merged with a similarity. With the best
    choice of destinations and of sources, none would be lower than the larger one of its own best
    similarity and the r-th largest of all best similarities. The regret is the largest shortfall.

    Args:
        metric: ``[B, N, D]`` or ``[B, H, N, D]``, as :func:`tokenops.match` took it.
        token_map: What it returned.
        num_prefix: As it was given to ``match``.
        protected: As it was given to ``match``.
        split: As it was given to ``match``; one without a generator, so that it is the same again.
        similarity: ``"cosine"`` or ``"dot"``.

    Returns:
        Regret ``[B]`` in float64, at most :func:`similarity_rounding` for a correct kernel.

    Raises:
        AssertionError: If a group is none that a bipartite matching makes: two destinations, a
            protected or prefix token together with another one.

    Example:
        >>> import tokenops
        >>> metric = torch.randn(2, 16, 8)
        >>> regret = matching_regret(metric, tokenops.match(metric, 4))
        >>> bool((regret <= similarity_rounding(metric)).all())
        True
    """
    batch, tokens, device = metric.shape[0], metric.shape[-2], metric.device
    source, destination = _split_masks(
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
    _require(bool((free | alone).all()), "a prefix or protected token is in a group")
    _require(bool((source | destination | alone).all()), "a token of neither set is in a group")
    pairs = together & destination[:, None, :]
    groups = pairs.sum(2)[source]
    _require(bool((groups <= 1).all()), "two destinations are in one group")
    merged = source & pairs.any(2)
    _require(bool((merged | alone | destination).all()), "sources merged without a destination")

    scores = _similarities(metric, metric, similarity)
    scores = scores.masked_fill(~(destination & free)[:, None, :], -math.inf)
    if tokens == 0:
        return torch.zeros(batch, dtype=torch.float64, device=device)
    best = scores.amax(2).masked_fill(~(source & free), -math.inf)  # [B, N]
    chosen = torch.where(pairs, scores, -math.inf).amax(2)
    ranked = best.sort(dim=1, descending=True).values
    bar = ranked.gather(1, (merged.sum(1, keepdim=True) - 1).clamp(min=0))  # [B, 1]
    due = torch.maximum(best, bar)
    shortfall = torch.where(merged & (due != chosen), due - chosen, 0)
    return shortfall.amax(1)


def similarity_rounding(metric: Tensor, similarity: str = "cosine") -> float:
    """Largest difference of two similarities that rounding may turn around.

    The bound is that of a sum of D products in any order, of the means over heads and of the
    lengths before it, in the precision that similarities accumulate in: float32, or float64 for
    double inputs.

    Args:
        metric: ``[B, N, D]`` or ``[B, H, N, D]``; NaN and infinite rows do not count.
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
    # A mean over heads that cancel is off by a part of the heads, not of the mean.
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


def as_layout(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides.

    Args:
        x: ``[B, N, C]`` or ``[B, H, N, D]``.
        layout: ``"contiguous"``; ``"sliced"``: every other row and channel of a larger tensor, from
            an odd start; ``"transposed"``: stride 1 in the tokens, not in the channels;
            ``"expanded"``: the first image for all, stride 0; ``"packed"``: the middle third of a
            packed qkv ``[B, N, 3, (H,) D]``.

    Returns:
        A view of new memory. Its values are those of ``x``, under ``"expanded"`` of ``x[:1]``.

    Raises:
        ValueError: If there is no layout of this name.

    Example:
        >>> as_layout(torch.zeros(2, 3, 4), "transposed").stride()
        (12, 1, 3)
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "sliced":
        large = x.new_zeros(*x.shape[:-2], 2 * x.shape[-2] + 1, 2 * x.shape[-1] + 3)
        view = large[..., 1::2, 3::2]
    elif layout == "transposed":
        view = x.new_zeros(x.mT.shape).mT
    elif layout == "expanded":
        return x[:1].clone().expand(x.shape)
    elif layout == "packed":
        if x.dim() == 4:
            batch, heads, tokens, width = x.shape
            view = x.new_zeros(batch, tokens, 3, heads, width)[:, :, 1].transpose(1, 2)
        else:
            view = x.new_zeros(x.shape[0], x.shape[1], 3, x.shape[2])[:, :, 1]
    else:
        raise _checks.value_error("as_layout", "layout", f"one of {LAYOUTS}", layout)
    view.copy_(x)
    return view


def random_tokens(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> Tensor:
    """Normally distributed tokens, the same ones in every dtype, layout and on every device.

    Args:
        *shape: ``B, N, C`` or ``B, H, N, D``.
        dtype: Type that the values are rounded to.
        device: Where they go.
        layout: One of :data:`LAYOUTS`.
        seed: Seed of the values.

    Returns:
        The tokens.

    Example:
        >>> random_tokens(2, 3, 4, layout="expanded").shape
        torch.Size([2, 3, 4])
    """
    values = torch.randn(shape, generator=_generator(seed), dtype=torch.float64)
    return as_layout(values.to(device=device, dtype=dtype), layout)


def exact_metric(
    *shape: int,
    similarity: str = "cosine",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    zero_rows: float = 0.0,
    nan_rows: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """A metric whose similarities no precision rounds: full of ties, with large gaps between them.

    Backends must then agree on every index. For ``"dot"`` the entries are small integers; for
    ``"cosine"`` they are plus or minus a power of two, in so many dimensions that lengths are
    powers of two as well. Heads differ, and their mean is exact.

    Args:
        *shape: ``B, N, D`` or ``B, H, N, D``. For ``"cosine"``, D must be a power of 4 (1, 4, 16);
            H must be a power of 2.
        similarity: ``"cosine"`` or ``"dot"``.
        dtype: Type of the metric; the values are the same in every one.
        device: Where they go.
        zero_rows: Share of rows that are zero.
        nan_rows: Share of rows with a NaN in them.
        seed: Seed of the values.

    Returns:
        The metric.

    Raises:
        ValueError: If D or H makes rounding inevitable.

    Example:
        >>> exact_metric(1, 2, 4).abs().amax(-1).log2().frac().tolist()
        [[0.0, 0.0]]
    """
    *_, tokens, width = shape
    batch, heads = shape[0], shape[1] if len(shape) == 4 else 1
    if similarity == "cosine" and width not in {4**k for k in range(8)}:
        raise _checks.value_error("exact_metric", "shape", "of a width that is a power of 4", shape)
    if heads & (heads - 1):
        raise _checks.value_error("exact_metric", "shape", "of 1, 2, 4, 8, ... heads", shape)
    generator = _generator(seed)

    def draw(low: int, high: int, *sizes: int) -> Tensor:
        return torch.randint(low, high + 1, sizes, generator=generator, dtype=torch.float64)

    if similarity == "cosine":
        signs = 2 * draw(0, 1, batch, tokens, width) - 1
        rows = signs * 2 ** draw(-1, 1, batch, tokens, 1)
    else:
        rows = draw(-2, 2, batch, tokens, width)
    lots = torch.rand(batch, tokens, 1, generator=generator)
    rows = rows.masked_fill(lots < zero_rows, 0)
    broken = (lots >= zero_rows) & (lots < zero_rows + nan_rows)
    if width > 0:
        rows[..., :1] = rows[..., :1].masked_fill(broken, math.nan)
    if len(shape) == 4:
        # Opposite deviations cancel in the mean over heads, and without rounding.
        deviation = draw(-2, 2, batch, heads // 2, tokens, width)
        deviation = torch.cat([deviation, -deviation], dim=1) if heads > 1 else deviation.sum(1)
        rows = rows[:, None] + (deviation if heads > 1 else deviation[:, None])
    return rows.to(device=device, dtype=dtype)


def random_token_map(
    batch: int,
    num_inputs: int,
    num_tokens: int,
    *,
    dropped: float = 0.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> TokenMap:
    """A token map with random groups, some of them empty.

    Args:
        batch: Number of images B.
        num_inputs: Number of input tokens N.
        num_tokens: Number of output tokens M; with 0, all tokens are dropped.
        dropped: Share of dropped tokens.
        device: Where it goes.
        seed: Seed of the labels.

    Returns:
        The map.

    Example:
        >>> random_token_map(2, 8, 3).num_tokens
        3
    """
    generator = _generator(seed)
    assign = torch.randint(0, max(num_tokens, 1), (batch, num_inputs), generator=generator)
    lots = torch.rand(batch, num_inputs, generator=generator)
    assign = assign.masked_fill(lots < (dropped if num_tokens else 2.0), -1)
    return TokenMap.from_assign(assign.to(device), num_tokens)


def stride_zero(x: Tensor, value: float = 1.0) -> Tensor:
    """A constant of the shape of ``x`` with all strides 0, the gradient that ``sum()`` sends back.

    Args:
        x: Tensor whose shape, dtype and device to take.
        value: The constant.

    Returns:
        One number, expanded.

    Example:
        >>> stride_zero(torch.zeros(2, 3)).stride()
        (0, 0)
    """
    return x.new_full((), value).expand(x.shape)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(f"token map: {message}")


def _first(condition: Tensor) -> Sequence[int]:
    """Index of the first true element."""
    return tuple(int(i) for i in condition.nonzero()[0])


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
    if resolved.source_index is None or resolved.destination_index is None:
        is_destination = torch.arange(tokens, device=device) % resolved.stride
        is_destination = (is_destination == resolved.stride - 1).expand(batch, tokens)
        return ~is_destination, is_destination
    masks = []
    for index in (resolved.source_index, resolved.destination_index):
        mask = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
        masks.append(mask.scatter(1, index.expand(batch, -1), True))
    return masks[0], masks[1]
