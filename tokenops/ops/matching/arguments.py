# SPDX-License-Identifier: Apache-2.0
"""Arguments and results that the operators of matching share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Request(NamedTuple):
    """Number, thresholds and order of a match.

    Attributes:
        r: Number of sources to merge, at most.
        threshold: Minimum similarity of a pair that merges, for all images; None for no minimum.
        thresholds: Minimum similarity for each image, float32 or float64 ``[B]``; replaces
            ``threshold``.
        order: Order of the output tokens: ``"position"`` or ``"tome"``.
    """

    r: int
    threshold: float | None = None
    thresholds: Tensor | None = None
    order: str = "position"

    def limited(self) -> bool:
        """Whether a threshold limits which pairs merge: counts then depend on values."""
        return self.threshold is not None or self.thresholds is not None


class SplitArgs(NamedTuple):
    """Sources and destinations: two lists of tokens, or a pattern that kernels evaluate.

    The pattern of a stride: token i is a destination if ``i % stride == stride - 1``, else a
    source. The pattern of a grid, where ``grid_width`` is not 0: the tokens after the prefix are
    rows of ``grid_width``; each whole cell of ``cell_height`` by ``stride`` tokens has one
    destination; all other tokens after the prefix are sources.

    Attributes:
        num_prefix: Number of leading tokens that neither merge nor receive.
        protected: Bool ``[N]`` or ``[B, N]``, true for tokens that neither merge nor receive.
        src_index: Listed sources, int32 or int64 ``[Ns]`` or ``[B, Ns]``; None for a pattern.
        dst_index: Listed destinations, int32 or int64 ``[Nd]`` or ``[B, Nd]``.
        stride: Distance between destinations, or the width of a cell.
        grid_width: Tokens in a row of the grid; 0 for a stride.
        cell_height: Rows of a cell.
        cell: Offset ``y * stride + x`` of the destination in each cell, row by row: int32 or int64
            ``[cells]`` or ``[B, cells]``; None for the top left token.
    """

    num_prefix: int = 0
    protected: Tensor | None = None
    src_index: Tensor | None = None
    dst_index: Tensor | None = None
    stride: int = 2
    grid_width: int = 0
    cell_height: int = 1
    cell: Tensor | None = None


class Best(NamedTuple):
    """The best destination of each source; sources are in the order of the split.

    Attributes:
        node_max: Similarity to this destination, float32 or float64 ``[B, Ns]``; -inf if none is
            above -inf.
        node_idx: Index of this destination in the ascending list of destinations, int32
            ``[B, Ns]``; -1 if all destinations are protected.
    """

    node_max: Tensor
    node_idx: Tensor


class Map(NamedTuple):
    """The token map of a match: the fields of :class:`tokenops.TokenMap`."""

    assign: Tensor
    offsets: Tensor
    members: Tensor
    counts: Tensor
