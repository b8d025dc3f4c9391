# SPDX-License-Identifier: Apache-2.0
"""Matching by Triton kernels: a search for the best pairs, and a choice among them."""

from .search import nearest
from .select import match

__all__ = ["match", "nearest"]
