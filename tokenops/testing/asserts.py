# SPDX-License-Identifier: Apache-2.0
"""Assertions about results: within an error budget, the same bits, a valid token map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from ..token_map import TokenMap


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
    ``u = eps(dtype) * |t| + eps(float32) * magnitude`` (``eps(float64)`` for double). The budget
    is ``max(|actual - t| / u) <= factor * max(|reference - t| / u) + 1``: no tolerance is chosen,
    neither per test nor per dtype. For double, where ``t`` itself is rounded, the error of the
    reference counts as at least one unit. Where the reference is infinite or NaN, the kernel must
    be the same infinity or NaN.

    Args:
        actual: Result of the kernel.
        same_dtype_reference: Result of a plain implementation on the same inputs, of the same
            shape, dtype and device.
        float64_reference: Result of a plain implementation on the inputs cast to float64; the
            truth, so it must have been checked on its own.
        factor: How many times the reference's error the kernel may have.
        magnitude: Sum of the absolute values of the terms of each element, if these may cancel: a
            number, or a tensor that broadcasts. The largest ``|t|`` by default.
        name: Name of the result in the message.

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
        raise AssertionError(f"{name}: float64_reference must be float64, same shape, got {got64}")
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
    if not bool((kernel_units <= budget).all()):  # also true for NaN
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
        actual: The result.
        expected: The tensor that it must equal.
        name: Name of the result in the message.

    Raises:
        AssertionError: If shape, dtype or any bit differs.

    Example:
        >>> assert_same_bits(torch.ones(2), torch.ones(2))
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, wanted = _checks.describe(actual), _checks.describe(expected)
        raise AssertionError(f"{name}: must be {wanted}, got {got}")
    if actual.numel() == 0:
        return
    views = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (actual, expected)]
    differing = (views[0] != views[1]).view(actual.numel(), -1).any(1)
    if bool(differing.any()):
        at = int(differing.int().argmax())
        values = [t.reshape(-1)[at].item() for t in (actual, expected)]
        raise AssertionError(
            f"{name}: {int(differing.sum())} of {actual.numel()} elements differ, the first one at "
            f"flat index {at}: got {values[0]!r}, expected {values[1]!r}"
        )


def assert_valid_token_map(
    token_map: TokenMap, *, num_tokens: int | None = None, partition: bool = False
) -> None:
    """Assert that the fields of a token map are valid and consistent.

    Args:
        token_map: The map to check.
        num_tokens: Number of output tokens that it must have; any if None.
        partition: Also check the guarantees of ``match``: no token is dropped, each live output
            token has a member, and padding has none.

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
        require(field.dtype == torch.int32, f"{name} is {field.dtype}, not int32")
        require(field.is_contiguous(), f"{name} is not contiguous")
        require(field.device == assign.device, f"{name} is on {field.device}")
    batch, tokens = assign.shape
    outputs = token_map.num_tokens
    require(num_tokens in (None, outputs), f"{outputs} output tokens, not {num_tokens}")
    require(offsets.shape == (batch, outputs + 1), f"offsets of shape {list(offsets.shape)}")
    require(members.shape == (batch, tokens), f"members of shape {list(members.shape)}")
    if token_map.counts is not None:
        require(token_map.counts.shape == (batch,), f"counts of shape {token_map.counts.shape}")
    live = [outputs] * batch if token_map.counts is None else token_map.counts.tolist()
    rows = zip(assign.tolist(), offsets.tolist(), members.tolist(), live, strict=True)
    for image, (to, starts, listed, alive) in enumerate(rows):
        where = f"image {image}"
        require(all(-1 <= m < outputs for m in to), f"{where}: assign out of [-1, {outputs})")
        require(0 <= alive <= outputs, f"{where}: {alive} live tokens of {outputs}")
        inverse = [[n for n in range(tokens) if to[n] == m] for m in range(outputs)]
        ends = [sum(map(len, inverse[:m])) for m in range(outputs + 1)]
        require(starts == ends, f"{where}: offsets {starts}, where assign makes {ends}")
        flat = [n for group in inverse for n in group]
        flat += [-1] * (tokens - len(flat))
        require(listed == flat, f"{where}: members {listed}, where assign makes {flat}")
        if partition:
            require(-1 not in to, f"{where}: dropped tokens in {to}")
            filled = [bool(group) for group in inverse]
            require(all(filled[:alive]), f"{where}: a live output token without members")
            require(not any(filled[alive:]), f"{where}: a padded output token with members")


def require(condition: bool, message: str) -> None:
    """Raise an error for a wrong token map unless a condition holds."""
    if not condition:
        raise AssertionError(f"token map: {message}")


def _first(condition: Tensor) -> Sequence[int]:
    """Index of the first true element."""
    return tuple(int(i) for i in condition.nonzero()[0])
