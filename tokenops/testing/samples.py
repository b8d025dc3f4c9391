# SPDX-License-Identifier: Apache-2.0
"""Samples of operators: arguments of every kind, which all tests about operators iterate over.

The samples of a family are in ``tokenops/ops/<family>/samples.py``, beside the operators' records.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from .inputs import random_token_map, random_tokens

#: Sizes of all samples: images, tokens, output tokens, channels. No two are equal.
B, N, M, C = 2, 7, 4, 3

#: A token map from N to M tokens that drops some.
MAP = random_token_map(B, N, M, dropped=0.2, seed=1)


class Sample(NamedTuple):
    """One call of an operator.

    Attributes:
        operator: Name of the operator.
        name: Kind of the arguments; together with the operator it names the sample.
        arguments: Flat arguments of ``torch.ops.tokenops.<operator>``; tensors that have a gradient
            require it.
    """

    operator: str
    name: str
    arguments: tuple[Any, ...]


def rows(
    tokens: int, dtype: torch.dtype = torch.float32, *, requires_grad: bool = True, seed: int = 0
) -> Tensor:
    """Tokens [B, tokens, C]."""
    x = random_tokens(B, tokens, C, dtype=dtype, seed=seed)
    return x.requires_grad_(requires_grad)


def numbers(tokens: int, seed: int = 5) -> Tensor:
    """A number for each token, [B, tokens]."""
    return random_tokens(B, tokens, 1, seed=seed)[..., 0].contiguous().requires_grad_()


def families() -> list[str]:
    """Names of the operators' families, in the order of their registration."""
    modules = (operator.module for operator in _library.defined.values())
    return list(dict.fromkeys(module.split(".")[-2] for module in modules))


def samples() -> Iterator[Sample]:
    """The samples of all operators."""
    for family in families():
        module = importlib.import_module(f"tokenops.ops.{family}.samples")
        yield from module.samples()
