# SPDX-License-Identifier: Apache-2.0
"""Samples and calls of all operators, over which tests and tools iterate.

Each family has its own in ``tokenops/ops/<family>/samples.py``, beside the operators' records.
A *sample* is a list of arguments of an operator in ``torch.ops.tokenops``; a *call* is a call of
the public function, for any sizes, dtype and device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
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
        name: Kind of the arguments; with the operator it identifies the sample.
        arguments: Flat arguments of ``torch.ops.tokenops.<operator>``; differentiable tensors
            require a gradient.
    """

    operator: str
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """Sizes, dtype and device of calls.

    Attributes:
        batch: Images B.
        heads: Attention heads H.
        tokens: Tokens N.
        width: Width D of a head, and of the metric.
        value_width: Width of the values' heads; D by default.
        channels: Channels C of tokens.
        dtype: Dtype of tokens; weights have the dtype of sums.
        device: Device of all tensors.
        seed: Seed of the values. Token maps, masks and positions do not depend on it.
    """

    batch: int = 2
    heads: int = 2
    tokens: int = 7
    width: int = 8
    value_width: int | None = None
    channels: int = 3
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"
    seed: int = 0

    @property
    def r(self) -> int:
        """Number of tokens that merge."""
        return self.tokens // 4 + 1

    @property
    def outputs(self) -> int:
        """Number M of output tokens."""
        return self.tokens - self.r

    def rows(self, tokens: int, channels: int, seed: int = 0) -> Tensor:
        """Tokens [B, tokens, channels]."""
        return random_tokens(
            self.batch, tokens, channels, dtype=self.dtype, device=self.device,
            seed=16 * self.seed + seed,
        )  # fmt: skip

    def weights(self, tokens: int, seed: int = 9) -> Tensor:
        """Positive numbers [B, tokens] in the dtype of sums."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.rows(tokens, 1, seed)[..., 0].to(dtype).abs() + 0.5


class Call(NamedTuple):
    """One call of a public function.

    Attributes:
        operator: Name of the operator that serves the call.
        name: Kind of the call; with the operator it identifies the call.
        function: Takes the tensors by name and returns a tensor, or a list or tuple of tensors.
        tensors: Tensors by name; the function is differentiable in the floating-point ones if the
            operator has a gradient.
        chooses: Whether results are choices among rounded similarities, which may differ in another
            dtype or backend; regret is then compared, not results.
    """

    operator: str
    name: str
    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    chooses: bool = False


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


def _modules() -> Iterator[ModuleType]:
    for family in families():
        yield importlib.import_module(f"tokenops.ops.{family}.samples")


def samples() -> Iterator[Sample]:
    """The samples of all operators."""
    for module in _modules():
        yield from module.samples()


def calls(sizes: Sizes) -> Iterator[Call]:
    """The calls of all public functions that operators serve."""
    for module in _modules():
        yield from module.calls(sizes)
