# SPDX-License-Identifier: Apache-2.0
"""The token map: the output token of each input token, which connects the operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _backend, _checks
from .ops.merging import functional


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The output token of each input token, and the members of each output token.

    Matching, pruning and clustering make token maps; merging applies a map, unmerging inverts it,
    and composing two maps tracks sources. A token map is immutable, a pytree of its tensors, and
    carries no gradient.

    Attributes:
        assign: int32 ``[B, N]``, output token of each input token; ``-1`` means dropped.
        offsets: int32 ``[B, M + 1]``, where the members of each output token start in ``members``.
        members: int32 ``[B, N]``, input tokens sorted by output token and, within one, ascending:
            the order of summation, which makes reductions deterministic. The entries at and after
            ``offsets[b, M]``, as many as there are dropped tokens, are ``-1``.
        counts: int32 ``[B]``, live output tokens of each image, where images differ (matching with
            a threshold, pruning to a count for each image); else None. Output tokens at and after
            ``counts[b]`` are padding without members.

    Example:
        >>> import torch
        >>> from tokenops import TokenMap
        >>> token_map = TokenMap.from_assign(torch.tensor([[0, 1, 0, 2]]), 3)
        >>> token_map.merge(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])).flatten().tolist()
        [2.0, 2.0, 4.0]
    """

    assign: Tensor
    offsets: Tensor
    members: Tensor
    counts: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of output tokens M, padding included. A shape: reading it never synchronizes."""
        return self.offsets.shape[-1] - 1

    @property
    def num_inputs(self) -> int:
        """Number of input tokens N."""
        return self.assign.shape[-1]

    @property
    def _index(self) -> functional.IndexTensors:
        """The tensors of the map that operators take."""
        return self.assign, self.offsets, self.members

    @staticmethod
    def from_assign(assign: Tensor, num_tokens: int, counts: Tensor | None = None) -> TokenMap:
        """Make a token map from labels: k-means, DPC-KNN, union-find, halting masks.

        Args:
            assign: int32 or int64 ``[B, N]``, output token of each input token, ``-1`` to drop it.
            num_tokens: Number of output tokens M.
            counts: int32 or int64 ``[B]``, live output tokens of each image, if images differ.

        Returns:
            The map. The sum and the mean of an output token without members are 0.

        Raises:
            TypeError: If ``assign`` or ``counts`` is not an integer tensor, or ``num_tokens`` not
                an int.
            ValueError: If a shape is wrong, a count is outside ``[0, num_tokens]``, or an index is
                outside ``[-1, num_tokens)`` or, with counts, ``[-1, counts[b])``: padding has no
                members.

        Note:
            On devices where reading values would synchronize, a wrong count is clamped and a wrong
            index drops the token instead, unless ``TOKENOPS_DEBUG=1``. Deterministic.

        Example:
            >>> import torch, tokenops
            >>> tokenops.TokenMap.from_assign(torch.tensor([[1, 0, 1, -1]]), 2).members.tolist()
            [[1, 0, 2, -1]]
        """
        name = "TokenMap.from_assign"
        num_tokens = _checks.check_int(name, "num_tokens", num_tokens)
        _checks.check_index(name, "assign", assign, dims=(2,))
        limit: Tensor | int = num_tokens
        if counts is not None:
            _checks.check_index(name, "counts", counts, dims=(1,))
            _checks.check_shape(name, "counts", counts, [(assign.shape[0],)])
            _checks.check_same_device(name, "counts", counts, assign)
            _checks.check_range(name, "counts", counts, 0, num_tokens + 1)
            # Clamp before the cast: a large int64 must not wrap around into the valid range.
            counts = counts.clamp(0, num_tokens).int()
            limit = counts[:, None]
        _checks.check_range(name, "assign", assign, -1, num_tokens)
        if counts is not None and _checks.values_visible(assign):
            padding = assign >= limit
            if not _checks.holds(~padding.any()):
                image = int(padding.any(1).int().argmax())
                expected = "below counts[b] in each image b, since padding has no members"
                got = f"{int(assign[image].max())} where counts[{image}] is {int(counts[image])}"
                raise _checks.value_mismatch(name, "assign", expected, got)
        assign = assign.clamp(-1, num_tokens).int()
        assign = torch.where(assign < limit, assign, -1).contiguous()
        offsets, members = _backend.dispatch("invert", assign)(assign, num_tokens)
        return TokenMap(assign, offsets, members, counts)

    @staticmethod
    def identity(batch: int, num_tokens: int, device: torch.device | str = "cpu") -> TokenMap:
        """The map that keeps all ``num_tokens`` tokens of ``batch`` images where they are."""
        index = torch.arange(num_tokens, dtype=torch.int32, device=device).repeat(batch, 1)
        offsets = torch.arange(num_tokens + 1, dtype=torch.int32, device=device).repeat(batch, 1)
        return TokenMap(index, offsets, index.clone())

    def compose(self, earlier: TokenMap) -> TokenMap:
        """The map from the inputs of ``earlier`` to the outputs of this map (source tracking).

        Args:
            earlier: Map from N0 to N tokens that was applied before this map from N to M tokens.

        Returns:
            The map from N0 to M tokens: ``[B, N0]`` integers, where ToMe keeps a dense source
            matrix ``[B, M, N0]``.

        Raises:
            TypeError: If ``earlier`` is not a TokenMap.
            ValueError: If the batch, the number of tokens or the device does not fit.

        Example:
            >>> import torch, tokenops
            >>> first = tokenops.TokenMap.from_assign(torch.tensor([[0, 1, 1, 2]]), 3)
            >>> second = tokenops.TokenMap.from_assign(torch.tensor([[0, 0, 1]]), 2)
            >>> second.compose(first).assign.tolist()
            [[0, 0, 0, 1]]
        """
        name = "TokenMap.compose"
        if not isinstance(earlier, TokenMap):
            raise _checks.type_error(name, "earlier", "a TokenMap", earlier)
        batch, tokens = self.assign.shape
        if earlier.assign.shape[0] != batch or earlier.num_tokens != tokens:
            raise _checks.value_mismatch(
                name,
                "earlier",
                f"a map of {batch} images to {tokens} tokens",
                f"a map of {earlier.assign.shape[0]} images to {earlier.num_tokens} tokens",
            )
        _checks.check_same_device(name, "earlier", earlier.assign, self.assign)
        compose = _backend.dispatch("compose", self.assign)
        assign, offsets, members = compose(self.assign, earlier.assign, self.num_tokens)
        return TokenMap(assign, offsets, members, self.counts)

    def source_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense 0/1 matrix ``[B, M, N]`` of which input is in which output (ToMe's source)."""
        return (self.assign[:, None, :] + 1 == self._numbers()[:, None]).to(dtype)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TokenMap:
        """The same map on another device.

        Args:
            device: The device.
            non_blocking: Whether the copy may be asynchronous, as in :meth:`torch.Tensor.to`.

        Returns:
            The map, which shares the tensors that are on the device already.

        Raises:
            TypeError: If ``device`` is not a device, for example a dtype: a map stays int32.
        """
        if isinstance(device, bool) or not isinstance(device, (torch.device, str, int)):
            raise _checks.type_error("TokenMap.to", "device", "a device (maps stay int32)", device)
        return pytree.tree_map_only(  # type: ignore[no-any-return]
            Tensor, lambda t: t.to(device, non_blocking=non_blocking), self
        )

    def key_mask(self) -> Tensor:
        """Bool ``[B, M]``: true for live output tokens, false for padding."""
        if self.counts is None:
            return torch.ones_like(self.offsets[:, 1:], dtype=torch.bool)
        return self._numbers() <= self.counts[:, None]

    def _numbers(self) -> Tensor:
        """1 .. M, int32 [M]; a DTensor if the map is made of DTensors, unlike an arange."""
        return self.offsets.new_ones(self.num_tokens).cumsum(0, dtype=torch.int32)

    @overload
    def merge(self, x: Tensor, *, reduce: str = "mean", weight: Tensor | None = None) -> Tensor: ...
    @overload
    def merge(
        self, x: Sequence[Tensor], *, reduce: str = "mean", weight: Tensor | None = None
    ) -> list[Tensor]: ...
    def merge(
        self,
        x: Tensor | Sequence[Tensor],
        *,
        reduce: str = "mean",
        weight: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Reduce ``x`` ``[B, N, C]`` to ``[B, M, C]``; see :func:`tokenops.merge`."""
        if isinstance(x, Tensor):
            return functional.merge(x, self._index, reduce, weight)
        return functional.merge_many(x, self._index, reduce, weight)

    def merge_wavg(
        self, x: Tensor, size: Tensor | None = None, *, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Size-weighted mean of ``x`` ``[B, N, C]``; see :func:`tokenops.merge_wavg`."""
        return functional.merge_wavg(x, self._index, size, weight)

    @overload
    def unmerge(self, y: Tensor, *, residual: Tensor | None = None) -> Tensor: ...
    @overload
    def unmerge(self, y: Sequence[Tensor], *, residual: Tensor | None = None) -> list[Tensor]: ...
    def unmerge(
        self, y: Tensor | Sequence[Tensor], *, residual: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Give each input token the row of its output token; see :func:`tokenops.unmerge`."""
        if isinstance(y, Tensor):
            return functional.unmerge(y, self._index, residual)
        return functional.unmerge_many(y, self._index, residual)


_FIELDS = ("assign", "offsets", "members", "counts")


def _flatten(token_map: TokenMap) -> tuple[list[Any], None]:
    # Without counts there is no leaf for them: transforms take tensors only.
    leaves = [token_map.assign, token_map.offsets, token_map.members, token_map.counts]
    return [leaf for leaf in leaves if leaf is not None], None


def _flatten_with_keys(token_map: TokenMap) -> tuple[list[Any], None]:
    leaves, context = _flatten(token_map)
    return [(pytree.GetAttrKey(n), leaf) for n, leaf in zip(_FIELDS, leaves, strict=False)], context


def _unflatten(leaves: Any, context: None) -> TokenMap:
    return TokenMap(*leaves)


pytree.register_pytree_node(
    TokenMap,
    _flatten,
    _unflatten,
    serialized_type_name="tokenops.TokenMap",
    flatten_with_keys_fn=_flatten_with_keys,
)

# Lets torch.load(weights_only=True) load a saved map.
torch.serialization.add_safe_globals([TokenMap])
