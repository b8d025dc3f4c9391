# SPDX-License-Identifier: Apache-2.0
"""Unusual inputs, with the same values in every dtype and layout and on every device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._library import acc_dtype
from ..token_map import TokenMap

#: Ways to lay out the same values in memory, for :func:`as_layout`.
LAYOUTS = ("contiguous", "sliced", "transposed", "expanded", "packed")


def as_layout(x: Tensor, layout: str) -> Tensor:
    """Copy values to memory with other strides.

    Args:
        x: ``[B, N, C]`` or ``[B, H, N, D]``.
        layout: ``"contiguous"``; ``"sliced"``: every other row and channel of a larger tensor, from
            an odd start; ``"transposed"``: stride 1 in the tokens, not in the channels;
            ``"expanded"``: the first image repeated, with stride 0; ``"packed"``: the middle third
            of a packed qkv ``[B, N, 3, (H,) D]``.

    Returns:
        A view of new memory. Its values are those of ``x``, under ``"expanded"`` of ``x[:1]``.

    Raises:
        ValueError: If ``layout`` is unknown.

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
        dtype: Dtype to which the values are rounded.
        device: Device of the tokens.
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
    """A metric whose similarities are exact in every dtype: many ties, and large gaps.

    Backends must agree on every index of such a metric. For ``"dot"`` the entries are small
    integers; for ``"cosine"`` they are plus or minus a power of two, and the width is such that
    lengths are powers of two as well. Heads differ, and their mean is exact.

    Args:
        *shape: ``B, N, D`` or ``B, H, N, D``. For ``"cosine"``, D must be a power of 4 (1, 4, 16);
            H must be a power of 2.
        similarity: ``"cosine"`` or ``"dot"``.
        dtype: Dtype of the metric; the values are the same in every dtype.
        device: Device of the metric.
        zero_rows: Share of rows that are zero.
        nan_rows: Share of rows that have a NaN.
        seed: Seed of the values.

    Returns:
        The metric.

    Raises:
        ValueError: If rounding cannot be avoided for this D or H.

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
    uniform = torch.rand(batch, tokens, 1, generator=generator)
    rows = rows.masked_fill(uniform < zero_rows, 0)
    is_nan = (uniform >= zero_rows) & (uniform < zero_rows + nan_rows)
    if width > 0:
        rows[..., :1] = rows[..., :1].masked_fill(is_nan, math.nan)
    if len(shape) == 4:
        # Opposite deviations cancel exactly in the mean over heads.
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
        device: Device of the map.
        seed: Seed of the labels.

    Returns:
        The map.

    Example:
        >>> random_token_map(2, 8, 3).num_tokens
        3
    """
    generator = _generator(seed)
    assign = torch.randint(0, max(num_tokens, 1), (batch, num_inputs), generator=generator)
    uniform = torch.rand(batch, num_inputs, generator=generator)
    assign = assign.masked_fill(uniform < (dropped if num_tokens else 2.0), -1)
    return TokenMap.from_assign(assign.to(device), num_tokens)


#: Policies that :func:`random_attention` makes.
POLICIES = ("soft", "hard", "bool", "column", "per-head", "none kept")


def random_attention(
    batch: int,
    heads: int,
    tokens: int,
    width: int,
    *,
    keys: int | None = None,
    key_heads: int | None = None,
    value_width: int | None = None,
    policy: str | None = None,
    zero_sizes: float | None = None,
    padding: float = 0.0,
    logits: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of :func:`tokenops.policy_attention` by name.

    Args:
        batch: Number of images B.
        heads: Number of heads H of the queries.
        tokens: Number of queries.
        width: Width D of queries and keys.
        keys: Number of keys; as many as queries by default.
        key_heads: Number of heads of keys and values; H by default.
        value_width: Width of the values; D by default.
        policy: ``"soft"``: between 0 and 1; ``"hard"``: about half 0 and the rest 1; ``"bool"``;
            ``"column"``: soft and ``[B, Nk, 1]``; ``"per-head"``: soft with zeros, ``[B, H, Nk]``;
            ``"none kept"``: zeros. No policy by default.
        zero_sizes: Share of keys whose size is 0. No sizes by default.
        padding: Share of keys that are padding. The first key never is.
        logits: Standard deviation of the logits.
        dtype: Dtype of q, k and v. Policy and size have the dtype of sums.
        device: Device of all tensors.
        layout: One of :data:`LAYOUTS`, for q, k and v.
        seed: Seed of the values.

    Returns:
        ``q``, ``k``, ``v`` and, if requested, ``policy``, ``size``, ``key_padding_mask``.

    Raises:
        ValueError: If ``policy`` is unknown.

    Example:
        >>> import tokenops
        >>> tokenops.policy_attention(**random_attention(2, 3, 5, 4, policy="hard")).shape
        torch.Size([2, 3, 5, 4])
    """
    keys = tokens if keys is None else keys
    key_heads = heads if key_heads is None else key_heads
    shapes = {
        "q": (batch, heads, tokens, width),
        "k": (batch, key_heads, keys, width),
        "v": (batch, key_heads, keys, width if value_width is None else value_width),
    }
    inputs = {}
    for i, (name, shape) in enumerate(shapes.items()):
        values = torch.randn(shape, generator=_generator(3 * seed + i), dtype=torch.float64)
        values = values * logits if name == "q" else values
        inputs[name] = as_layout(values.to(device=device, dtype=dtype), layout)
    generator, sums = _generator(seed + 1), acc_dtype(inputs["q"])

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if policy is not None:
        _checks.check_choice("random_attention", "policy", policy, POLICIES)
        p = uniform(batch, *([heads] if policy == "per-head" else []), keys)
        p = p.masked_fill(uniform(*p.shape) < 0.3, 0) if policy == "per-head" else p
        p = (p < 0.5).double() if policy in ("hard", "bool") else p
        p = torch.zeros_like(p) if policy == "none kept" else p
        p = p[..., None] if policy == "column" else p
        inputs["policy"] = p.to(device, torch.bool if policy == "bool" else sums)
    if zero_sizes is not None:
        size = torch.exp(4 * uniform(batch, keys) - 1)
        size = size.masked_fill(uniform(batch, keys) < zero_sizes, 0)
        inputs["size"] = size.to(device, sums)
    if padding > 0:
        padded = uniform(batch, keys) < padding
        padded[:, :1] = False
        inputs["key_padding_mask"] = padded.to(device)
    return inputs


def stride_zero(x: Tensor, value: float = 1.0) -> Tensor:
    """A constant of the shape of ``x`` with strides of 0, like the gradient of ``sum()``.

    Args:
        x: Tensor whose shape, dtype and device to take.
        value: The constant.

    Returns:
        A 0-D tensor, expanded.

    Example:
        >>> stride_zero(torch.zeros(2, 3)).stride()
        (0, 0)
    """
    return x.new_full((), value).expand(x.shape)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
