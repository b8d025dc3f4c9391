# SPDX-License-Identifier: Apache-2.0
"""Matching by compiled CUDA kernels: one launch for small images, else search and select."""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..._library import declare, overloads
from .arguments import Map, Request, SplitArgs


class Lists(NamedTuple):
    """Sources and destinations of a grid, ascending: int32 ``[1, .]`` or ``[B, .]``."""

    src_index: Tensor
    dst_index: Tensor


@declare
def grid_sides(metric: Tensor, split: SplitArgs) -> Lists:
    """List the sources and destinations of a grid."""


@declare
def match_fits(
    metric: Tensor, src_index: Tensor | None, dst_index: Tensor | None, stride: int
) -> bool:
    """Whether :func:`match_image` can match these tokens, which are listed or strided."""


@declare
def match_image(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """Match in one launch, with one thread block per image."""


def match(metric: Tensor, similarity: str, request: Request, split: SplitArgs) -> Map:
    """Bipartite matching; see :func:`tokenops.match`."""
    if split.grid_width > 0 and split.src_index is None and split.dst_index is None:
        # match_image, search and select all take lists: make the lists once.
        src_index, dst_index = grid_sides(metric, *split)
        split = SplitArgs(split.num_prefix, split.protected, src_index, dst_index)
    if match_fits(metric, split.src_index, split.dst_index, split.stride):
        token_map: Map = match_image(metric, similarity, *request, *split)
    else:
        best = overloads[None].search(metric, similarity, *split)
        token_map = overloads[None].select(*best, metric.shape[-2], *request, *split)
    return token_map
