# SPDX-License-Identifier: Apache-2.0
"""Matching by Triton kernels: a search for the best pairs, and a choice among them."""

from .choice import match, search, select
from .launches import nearest

__all__ = ["match", "nearest", "search", "select"]
