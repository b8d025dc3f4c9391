# SPDX-License-Identifier: Apache-2.0
"""The parts of a benchmark case: its sizes, its rivals, and the least work that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import tokenops
from tokenops.splits import Split

from . import rivals
from .timing import Call

#: Backends of tokenops, the preferred one first. Each can be a rival of the default one.
BACKENDS = ("native", "triton", "composed", "reference")
#: Code without tokenops that computes the same. A speed-up is over the fastest of these.
FAIR = ("eager", "compile", "index", "flex", "sdpa+bias")
#: Rivals by name, in the order of columns. ``tokenops`` always runs.
RIVALS = ("tokenops", *BACKENDS, *FAIR)
#: Rivals that run only if they are asked for.
ON_REQUEST = ("native", "composed")
#: Yardsticks compute less than tokenops, or something else.
YARDSTICKS = ("bmm", "bmm+max", "sdpa", "unweighted", "dense", "slicing", "copy")

LEGEND = {
    "tokenops": "tokenops as installed",
    "reference": "tokenops' plain PyTorch reference",
    "eager": "the recipe of ToMe or tomesd in PyTorch operators",
    "compile": "the same under torch.compile(dynamic=False, fullgraph=True), compiled beforehand",
    "index": "index_add_ or index_select of whole rows, by an index that was made beforehand",
    "copy": "a torch copy_ that moves as many bytes, read and written together",
    "bmm": "nothing but the product of the scores, of rows averaged and gathered beforehand",
    "bmm+max": "that product and the maximum of each row",
    "dense": "the model without merging",
    "slicing": "the model that drops its last tokens instead: a wrong result, and no time for it",
}

#: Rivals of attention that differ or that no other operator has.
ATTENTION_LEGEND = {
    "eager": "maps in PyTorch operators: DynamicViT's softmax with a policy, ToMe's logarithms of "
    "sizes, scores as sums over a map of the queries that count and no others",
    "flex": "FlexAttention under torch.compile, the logarithm of the policy added to each score",
    "sdpa+bias": "scaled_dot_product_attention with the logarithm of the weights as a dense mask",
    "sdpa": "scaled_dot_product_attention without any weights",
    "unweighted": "tokenops' own policy_attention without any weights",
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a case of matching or merging."""

    batch: int  # images B
    tokens: int  # tokens N
    width: int  # width D of the metric, or channels C
    r: int  # tokens that merge
    prefix: int = 0  # leading tokens that neither merge nor receive
    heads: int = 0  # heads of a packed qkv that the metric is a view of; 0: the metric has none
    grid: tuple[int, int, int, int] | None = None  # (h, w, sy, sx) of tomesd's split; None: ToMe's

    def describe(self, letter: str) -> str:
        heads = f"H{self.heads} " if self.heads else ""
        grid = " grid {}x{} in {}x{}".format(*self.grid) if self.grid else ""
        return f"B{self.batch} N{self.tokens} {heads}{letter}{self.width} r{self.r}{grid}"

    def tiny(self) -> Shape:
        tokens, grid = (17, None) if self.grid is None else (24, (4, 6, 2, 2))
        return Shape(2, tokens, 8, 4, self.prefix, min(self.heads, 2), grid)

    def split(self) -> Split:
        return tokenops.alternate() if self.grid is None else tokenops.grid(*self.grid)

    def split_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens that are sources [Ns] and destinations [Nd], in ascending order."""
        tokens = torch.arange(self.tokens, device=device)
        if self.grid is None:
            return tokens[0::2], tokens[1::2]
        src, dst = rivals.tomesd_split(*self.grid, device)
        return src.flatten().sort().values, dst.flatten().sort().values


def relative(result: Any, expected: Any) -> float:
    """Largest difference of tensors, or of tuples of them, relative to the largest entry."""
    if not isinstance(expected, Tensor):
        return max(relative(a, b) for a, b in zip(result, expected, strict=True))
    if result.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(result.shape)} and {list(expected.shape)}")
    a, b = result.detach().double(), expected.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


@dataclass
class Work:
    """A case made ready: its inputs exist."""

    #: Makes the call of tokenops, of each rival that is no backend, and of yardsticks but ``copy``.
    rivals: Mapping[str, Callable[[], Call]]
    bytes: int  # least number of bytes that must be read and written
    flops: int  # least number of floating point operations, where they could be the bound
    tolerance: float  # largest difference at which a rival counts as doing the same
    tensor: Tensor  # one of the inputs, for device and dtype
    #: (name, result, expected): how far a rival's result is from that of tokenops.
    difference: Callable[[str, Any, Any], float] = lambda _, a, b: relative(a, b)
    inference: bool = True  # whether to time under torch.inference_mode

    def make(self, name: str) -> Call:
        """The call of a rival, to be made and run in its context."""
        return self.rivals["tokenops" if name in BACKENDS else name]()


def context(name: str) -> AbstractContextManager[None]:
    """The context of a rival: a backward runs on the backend of its forward."""
    return tokenops.use_backend(name) if name in BACKENDS else nullcontext()


@dataclass(frozen=True)
class Case:
    """One line of a table."""

    operator: str  # public operator, perhaps with "_backward" or "_forward_backward"
    name: str  # unique within the operator
    shape: Any  # with the methods describe and tiny
    setup: Callable[[Any, torch.dtype, torch.device], Work]
    device: str = "cpu"  # kind of device whose sizes these are
    skip: Mapping[str, str] = field(default_factory=dict)  # rivals that do not run, and why
    memory: tuple[str, ...] = ()  # rivals whose extra memory is measured too, on the CPU
    on_request: bool = False  # whether it runs only if it is named, or with --variant

    @property
    def sizes(self) -> str:
        """The shape in words: D is the width of a metric or head, C the number of channels."""
        return self.shape.describe("C" if "merge" in self.operator else "D")

    @property
    def public(self) -> str:
        return self.operator.removesuffix("_backward").removesuffix("_forward")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Work:
        return self.setup(self.shape, dtype, device)

    def tiny(self) -> Case:
        """The same case at sizes that take no time."""
        return replace(self, shape=self.shape.tiny())


def cases_of(
    operator: str,
    setup: Callable[..., Work],
    shapes: Mapping[str, Any],
    memory: Mapping[str, tuple[str, ...]] | None = None,
    **options: Any,
) -> list[Case]:
    """Cases of an operator from shapes by name; ``memory`` is by name, too."""
    memory = memory or {}
    return [
        Case(operator, name, shape, setup, memory=memory.get(name, ()), **options)
        for name, shape in shapes.items()
    ]


def recipes(
    eager: Callable[..., Any], make: Callable[[Callable[..., Any]], Call]
) -> dict[str, Callable[[], Call]]:
    """A recipe in PyTorch operators, and the same under ``torch.compile``, as ``make`` calls it."""
    return {
        "eager": lambda: make(eager),
        "compile": lambda: make(torch.compile(eager, dynamic=False, fullgraph=True)),
    }


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def randn(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal random numbers, rounded from float32 to the dtype."""
    return torch.randn(size, generator=generator(device), device=device).to(dtype)


def make_metric(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Metric [B, N, D], or keys [B, H, N, D] as a view of a packed qkv [B, N, 3, H, D]."""
    batch, tokens, heads, width = shape.batch, shape.tokens, shape.heads, shape.width
    if not heads:
        return randn((batch, tokens, width), dtype, device)
    return randn((batch, tokens, 3, heads, width), dtype, device).permute(2, 0, 3, 1, 4)[1]
