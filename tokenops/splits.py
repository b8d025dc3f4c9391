# SPDX-License-Identifier: Apache-2.0
"""Splits of tokens into sources, which may merge away, and destinations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks
from .ops.matching.arguments import SplitArgs


class Split:
    """How tokens divide into sources and destinations; made by the functions of this module."""

    def resolve(
        self, batch: int, num_tokens: int, num_prefix: int, device: torch.device
    ) -> SplitArgs:
        """Apply the split to ``batch`` images of ``num_tokens`` tokens, prefix included."""
        raise NotImplementedError


@dataclass(frozen=True)
class Strided(Split):
    """Every k-th token is a destination; see :func:`strided`."""

    k: int

    def resolve(
        self, batch: int, num_tokens: int, num_prefix: int, device: torch.device
    ) -> SplitArgs:
        """Apply the split; see :meth:`Split.resolve`."""
        return SplitArgs(num_prefix, None, None, None, self.k)


@dataclass(frozen=True)
class Random(Split):
    """Sources drawn at random in each image; see :func:`random`."""

    num_sources: int
    generator: torch.Generator | None = None

    def resolve(
        self, batch: int, num_tokens: int, num_prefix: int, device: torch.device
    ) -> SplitArgs:
        """Apply the split; see :meth:`Split.resolve`."""
        free = num_tokens - num_prefix
        if self.num_sources > free:
            raise _checks.value_error(
                "random", "num_sources", f"at most the {free} tokens outside the prefix",
                self.num_sources,
            )  # fmt: skip
        if self.generator is None:  # with a generator, rand takes no symbolic shapes
            draw = torch.rand(batch, free, device=device)
        else:
            generator = self.generator
            _checks.check_first_pass("random", generator)
            draw = torch.rand(batch, free, generator=generator, device=generator.device)
        index = draw.argsort(dim=1).to(device) + num_prefix
        n = self.num_sources
        return SplitArgs(num_prefix, None, index[:, :n], index[:, n:])


@dataclass(frozen=True)
class Grid(Split):
    """One destination in each cell of a 2-D grid; see :func:`grid`."""

    h: int
    w: int
    sy: int
    sx: int
    generator: torch.Generator | None = None

    def resolve(
        self, batch: int, num_tokens: int, num_prefix: int, device: torch.device
    ) -> SplitArgs:
        """Apply the split; see :meth:`Split.resolve`."""
        if self.h * self.w != num_tokens - num_prefix:
            raise _checks.value_mismatch(
                "grid", "h * w", f"the {num_tokens - num_prefix} tokens outside the prefix",
                f"{self.h} * {self.w} = {self.h * self.w}",
            )  # fmt: skip
        cells = (self.h // self.sy) * (self.w // self.sx)  # 0 if a cell exceeds the image
        cell = None
        generator = self.generator
        if generator is not None:
            _checks.check_first_pass("grid", generator)
            origin = generator.device
            most = self.sy * self.sx
            cell = torch.randint(
                most, (cells,), generator=generator, device=origin, dtype=torch.int32
            )
            if origin != device:
                cell = cell.to(device)
        return SplitArgs(num_prefix, None, None, None, self.sx, self.w, self.sy, cell)


@dataclass(frozen=True, eq=False)
class Explicit(Split):
    """Sources and destinations given by index."""

    src_index: Tensor
    dst_index: Tensor

    def resolve(
        self, batch: int, num_tokens: int, num_prefix: int, device: torch.device
    ) -> SplitArgs:
        """Apply the split; see :meth:`Split.resolve`."""
        a, b = self.src_index, self.dst_index
        for argument, index in (("split[0]", a), ("split[1]", b)):
            _checks.check_index("match", argument, index, dims=(1, 2))
            if index.dim() == 2 and index.shape[0] != batch:
                shape = f"of shape [Ns] or [{batch}, Ns]"
                raise _checks.value_error("match", argument, shape, index)
            if index.device != device:
                raise _checks.value_error("match", argument, f"on {device}", index)
            if index.shape[-1] > num_tokens:
                expected = f"of at most {num_tokens} indices"
                raise _checks.value_error("match", argument, expected, index)
        if _checks.values_visible(a):
            self._check_values(batch, num_tokens, num_prefix)
        return SplitArgs(num_prefix, None, a.long(), b.long())

    def _check_values(self, batch: int, num_tokens: int, num_prefix: int) -> None:
        a, b = (
            index.long().expand(batch, index.shape[-1])
            for index in (self.src_index, self.dst_index)
        )
        both = torch.cat([a, b], dim=1)  # [B, Ns + Nd]
        if not _checks.holds(((both >= num_prefix) & (both < num_tokens)).all()):
            expected = f"indices in [{num_prefix}, {num_tokens}), of tokens outside the prefix"
            got = f"{int(both.min())} to {int(both.max())}"
            raise _checks.value_mismatch("match", "split", expected, got)
        ordered = both.sort(dim=1).values
        if not _checks.holds((ordered[:, 1:] != ordered[:, :-1]).all()):
            raise ValueError(
                "match: split must name each token at most once, got sources and destinations "
                "that overlap or repeat"
            )


def alternate() -> Split:
    """Take even tokens as sources and odd tokens as destinations: ToMe's split.

    Returns:
        The split, for ``match(split=...)``.

    Example:
        >>> import torch, tokenops
        >>> tokenops.match(torch.ones(1, 4, 2), 1, split=tokenops.alternate()).assign.tolist()
        [[0, 0, 1, 2]]

    References:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
    """
    return Strided(2)


def strided(k: int) -> Split:
    """Take every k-th token (k-1, 2k-1, ...) as a destination, and the rest as sources.

    Args:
        k: Stride, at least 1; with 1 there are no sources and nothing merges.

    Returns:
        The split, for ``match(split=...)``.

    Raises:
        TypeError: If ``k`` is not an int.
        ValueError: If ``k`` is below 1.

    Example:
        >>> import torch, tokenops
        >>> tokenops.match(torch.ones(1, 6, 2), 3, split=tokenops.strided(3)).assign.tolist()
        [[0, 0, 0, 0, 1, 2]]

    References:
        ``kth_bipartite_soft_matching`` of ToMe.
    """
    return Strided(_checks.check_int("strided", "k", k, minimum=1))


def random(num_sources: int, generator: torch.Generator | None = None) -> Split:
    """Draw the sources of each image at random; all other tokens are destinations.

    Args:
        num_sources: Number of sources in each image, at most the tokens outside the prefix.
        generator: Source of randomness; the device's default one if None. ``torch.compile`` traces
            the default one only. Activation checkpointing restores the default one before it
            recomputes a forward; any other generator would draw other tokens in the recomputation,
            which is an error.

    Returns:
        The split, for ``match(split=...)``. Each use draws anew.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If ``num_sources`` is negative or, at use, more than there are tokens, or if a
            recomputation would draw other tokens.

    Example:
        >>> import torch, tokenops
        >>> split = tokenops.random(3, torch.Generator().manual_seed(0))
        >>> tokenops.match(torch.ones(1, 5, 2), 3, split=split).num_tokens
        2
    """
    num_sources = _checks.check_int("random", "num_sources", num_sources)
    _checks.check_generator("random", generator)
    return Random(num_sources, generator)


def grid(h: int, w: int, sy: int, sx: int, generator: torch.Generator | None = None) -> Split:
    """Take a destination in each ``sy`` by ``sx`` cell of an ``h`` by ``w`` image: tomesd's split.

    All images of a batch have the same destinations. Tokens at the lower and right border that
    are in no whole cell are sources, so cells need not divide the image. Prefix tokens precede the
    grid.

    Args:
        h: Height in tokens.
        w: Width in tokens.
        sy: Height of a cell.
        sx: Width of a cell. An image that is lower or narrower than a cell has no destination, and
            nothing merges.
        generator: Draws the destination of each cell, anew at each use; None takes the top left
            token, and is the only choice under ``torch.compile``. For activation checkpointing see
            :func:`random`.

    Returns:
        The split, for ``match(split=...)``.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a size is below 1 or, at use, ``h * w`` is not the number of tokens outside
            the prefix, or if a recomputation would draw other tokens.

    Example:
        >>> import torch, tokenops
        >>> split = tokenops.grid(2, 4, 2, 2)  # two cells, whose top left tokens stay
        >>> tokenops.match(torch.ones(1, 8, 2), 6, split=split).assign.tolist()
        [[0, 0, 1, 0, 0, 0, 0, 0]]

    References:
        Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
    """
    h, w, sy, sx = (
        _checks.check_int("grid", argument, value, minimum=1)
        for argument, value in (("h", h), ("w", w), ("sy", sy), ("sx", sx))
    )
    _checks.check_generator("grid", generator)
    return Grid(h, w, sy, sx, generator)


# Lets torch.load(weights_only=True) load splits without a generator.
torch.serialization.add_safe_globals([Strided, Random, Grid, Explicit])
