# SPDX-License-Identifier: Apache-2.0
"""Tools for tests of token operators: error budgets, valid token maps, regret, unusual inputs.

They work with any test framework: a failed check raises an ``AssertionError`` whose message gives
the bound and the error.
"""

from .asserts import assert_same_bits, assert_valid_token_map, assert_within_error_budget
from .inputs import (
    LAYOUTS,
    as_layout,
    exact_metric,
    random_attention,
    random_token_map,
    random_tokens,
    stride_zero,
)
from .matching import matching_regret, nearest_regret, similarity_rounding

__all__ = [
    "LAYOUTS",
    "as_layout",
    "assert_same_bits",
    "assert_valid_token_map",
    "assert_within_error_budget",
    "exact_metric",
    "matching_regret",
    "nearest_regret",
    "random_attention",
    "random_token_map",
    "random_tokens",
    "similarity_rounding",
    "stride_zero",
]
