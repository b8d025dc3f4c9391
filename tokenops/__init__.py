# SPDX-License-Identifier: Apache-2.0
"""tokenops: fused kernels for token sparsification of transformers."""

from ._backend import available_backends, use_backend, why_not
from .ops.matching.api import match, nearest
from .ops.merging.api import merge, merge_wavg, unmerge
from .splits import alternate, grid, random, strided
from .token_map import TokenMap

__version__ = "0.1.0"

__all__ = [
    "TokenMap",
    "alternate",
    "available_backends",
    "grid",
    "match",
    "merge",
    "merge_wavg",
    "nearest",
    "random",
    "strided",
    "unmerge",
    "use_backend",
    "why_not",
]
