# SPDX-License-Identifier: Apache-2.0
"""Merging in Triton: functions named like their operators."""

from __future__ import annotations

from .launches import invert, merge, merge_select_backward, merge_wavg, pair_dot, unmerge

__all__ = ["invert", "merge", "merge_select_backward", "merge_wavg", "pair_dot", "unmerge"]
