# SPDX-License-Identifier: Apache-2.0
"""Drop-in for tomesd: the functions of ``tomesd.merge``.

References:
    Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", CVPR Workshops 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, grid, match
from .tome import Matching, _nothing, _num_tokens, _pair, do_nothing

__all__ = ["bipartite_soft_matching_random2d", "do_nothing"]


def bipartite_soft_matching_random2d(
    metric: Tensor,
    w: int,
    h: int,
    sx: int,
    sy: int,
    r: int,
    no_rand: bool = False,
    generator: torch.Generator | None = None,
) -> Matching:
    """Match the tokens of an image to one destination in each ``sy`` by ``sx`` cell.

    The destinations are the same in the whole batch; the ``r`` most similar pairs of each image
    merge.

    Args:
        metric: ``[B, N, D]``, or attention keys ``[B, H, N, D]``, which are averaged over
            heads; N = w * h, row by row.
        w: Width in tokens.
        h: Height in tokens.
        sx: Width of a cell; it need not divide ``w``. Where it exceeds ``w``, nothing merges.
        sy: Height of a cell; it need not divide ``h``. Where it exceeds ``h``, nothing merges.
        r: Tokens to merge away, clamped to the number of sources; nothing merges if it is not
            positive.
        no_rand: Take the top left token of each cell and draw no random number.
        generator: Source of randomness; the CPU's default generator if None.

    Returns:
        ``(merge, unmerge)``: ``merge(x, mode="mean")`` reduces ``[B, N, C]`` to ``[B, N - r, C]``
        in the order ``[unmerged | destinations]``, unmerged tokens by descending similarity,
        destinations by index; ``unmerge(y)`` maps back. Both have a ``token_map``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If ``w * h`` is not N.

    Note:
        Deterministic as :func:`tokenops.match`; ties go to the lowest token index. The draw takes
        one integer for each cell on the generator's device, as in tomesd, so the same seed gives
        the same destinations.

    Example:
        >>> from tokenops.compat import tomesd
        >>> m, u = tomesd.bipartite_soft_matching_random2d(torch.ones(1, 4, 2), 2, 2, 2, 2, 3, True)
        >>> u(m(torch.arange(4.0)[None, :, None])).flatten().tolist()
        [1.5, 1.5, 1.5, 1.5]

    References:
        Tomesd's ``bipartite_soft_matching_random2d``, except that destinations are ordered by index
        (tomesd uses an unstable sort), that a token of zero length has similarity 0 to every other
        (in tomesd it is NaN and wins every match), and that a draw without a generator is not an
        error.
    """
    _num_tokens("bipartite_soft_matching_random2d", metric)
    r = _checks.check_int("bipartite_soft_matching_random2d", "r", r, minimum=None)
    if r <= 0:
        return _nothing(metric)
    if no_rand:
        generator = None
    elif generator is None:
        generator = torch.default_generator
    return _pair(match(metric, r, split=grid(h, w, sy, sx, generator), order="tome"))
