# SPDX-License-Identifier: Apache-2.0
"""Merging in Triton: functions named like their operators."""

from __future__ import annotations

from .launches import (
    compose,
    invert,
    merge,
    merge_many,
    merge_reduce_backward,
    merge_wavg,
    pair_dot,
    unmerge,
    unmerge_many,
)

__all__ = [
    "compose",
    "invert",
    "merge",
    "merge_many",
    "merge_reduce_backward",
    "merge_wavg",
    "pair_dot",
    "unmerge",
    "unmerge_many",
]
