# SPDX-License-Identifier: Apache-2.0
"""tokenops: fused kernels for token sparsification of transformers."""

from . import _backend, _native
from ._backend import available_backends, why_not
from ._choice import use_backend
from .ops.attention.api import attention_scores, policy_attention
from .ops.matching.api import match, nearest
from .ops.merging.api import merge, merge_wavg, unmerge
from .policies import gumbel_keep, keep_ratio_loss, prune, topk_keep
from .splits import alternate, grid, strided
from .splits import random as random  # not in __all__, where it would hide the standard module
from .token_map import TokenMap

__version__ = "0.1.0"

_backend.step_aside(*_backend.SLOWER.get(_native.isa, ()))

__all__ = [
    "TokenMap",
    "alternate",
    "attention_scores",
    "available_backends",
    "grid",
    "gumbel_keep",
    "keep_ratio_loss",
    "match",
    "merge",
    "merge_wavg",
    "nearest",
    "policy_attention",
    "prune",
    "strided",
    "topk_keep",
    "unmerge",
    "use_backend",
    "why_not",
]
