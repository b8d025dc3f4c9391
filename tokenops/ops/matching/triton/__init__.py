# SPDX-License-Identifier: Apache-2.0
"""Matching by Triton kernels: search for the best pairs, and selection among them."""

from .search_launches import nearest
from .select_launches import match, search, select

__all__ = ["match", "nearest", "search", "select"]
