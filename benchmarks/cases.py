# SPDX-License-Identifier: Apache-2.0
"""What a benchmark case is: its sizes, its rivals, and the least work that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

import tokenops
from tokenops.ops.matching.common import sides
from tokenops.splits import Split

from .timing import Rival

#: Rivals by name, in the order of columns. ``tokenops`` is always there.
RIVALS = ("tokenops", "reference", "triton", "eager", "compile", "index", "flex", "sdpa+bias")

#: Those that stand for code without tokenops: the fastest of them is what a speed-up is over.
FAIR = ("eager", "compile", "index", "flex", "sdpa+bias")

#: Yardsticks are no rivals: they do less, or something else.
YARDSTICKS = ("copy", "bmm", "bmm+max", "sdpa", "unweighted")

LEGEND = {
    "tokenops": "tokenops as installed",
    "reference": "tokenops' plain PyTorch reference",
    "eager": "the recipe of ToMe or tomesd in PyTorch operators",
    "compile": "the same under torch.compile(dynamic=False, fullgraph=True), compiled beforehand",
    "index": "index_add_ or index_select of whole rows, by an index that was made beforehand",
    "copy": "a torch copy_ that moves as many bytes, read and written together",
    "bmm": "nothing but the product of the scores, of rows averaged and gathered beforehand",
    "bmm+max": "that product and the maximum of each row",
}

#: What some of them are where attention is timed, and who is there besides.
ATTENTION_LEGEND = {
    "eager": "maps in PyTorch operators: DynamicViT's softmax with a policy, ToMe's logarithms of "
    "sizes, scores as sums over a map of the queries that count and no others",
    "flex": "FlexAttention under torch.compile, the logarithm of the policy added to each score",
    "sdpa+bias": "scaled_dot_product_attention with the logarithm of the weights as a dense mask",
    "sdpa": "scaled_dot_product_attention without any weights",
    "unweighted": "tokenops' own policy_attention without any weights",
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sizes(Protocol):
    """Sizes of a case: :class:`Shape`, or what else an operator needs."""

    def describe(self, letter: str) -> str:
        """Sizes in words; ``letter`` stands for the width."""

    def tiny(self) -> Sizes:
        """Sizes of the same kind that take no time."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a case.

    Attributes:
        batch: Images B.
        tokens: Tokens N.
        width: Width D of the metric, or channels C.
        r: Tokens that merge.
        prefix: Leading tokens that take no part.
        heads: Attention heads of a packed qkv that the metric is a view of; 0 without.
        grid: ``(h, w, sy, sx)`` for tomesd's split; None for ToMe's.
    """

    batch: int
    tokens: int
    width: int
    r: int
    prefix: int = 0
    heads: int = 0
    grid: tuple[int, int, int, int] | None = None

    def describe(self, letter: str) -> str:
        """Sizes in words; ``letter`` stands for the width."""
        words = [f"B{self.batch}", f"N{self.tokens}"]
        words += [f"H{self.heads}"] if self.heads else []
        words += [f"{letter}{self.width}", f"r{self.r}"]
        if self.grid is not None:
            words.append("grid {}x{} in {}x{}".format(*self.grid))
        return " ".join(words)

    def tiny(self) -> Shape:
        """Sizes of the same kind that take no time."""
        tokens, grid = (17, None) if self.grid is None else (24, (4, 6, 2, 2))
        return Shape(2, tokens, 8, 4, self.prefix, min(self.heads, 2), grid)

    def split(self) -> Split:
        """The split into sources and destinations."""
        return tokenops.alternate() if self.grid is None else tokenops.grid(*self.grid)

    def num_sources(self) -> int:
        """Number of sources, those in the prefix included."""
        if self.grid is None:
            return (self.tokens + 1) // 2
        h, w, sy, sx = self.grid
        return self.tokens - (h // sy) * (w // sx)

    def split_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens that are sources [Ns] and destinations [Nd], in the order of the recipes."""
        token = torch.arange(self.tokens, device=device)
        if self.grid is None:
            return token[0::2], token[1::2]
        resolved = self.split().resolve(self.batch, self.tokens, self.prefix, device)
        src, dst, _ = sides("benchmarks", 1, self.tokens, resolved, device)
        return src[0], dst[0]


@dataclass
class Work:
    """A case made ready: its inputs exist, its rivals can be made.

    Attributes:
        rivals: Makes each rival, and each yardstick but ``copy``, by name. One by one, so that a
            rival that cannot run (no compiler, say) does not keep the others from running.
        bytes: Least number of bytes that must be read and written.
        flops: Least number of floating point operations, where they could be the bound.
        difference: ``(name, result, expected)``: how far a rival's result is from tokenops'.
        tolerance: Largest difference at which a rival counts as doing the same.
        tensor: One of the inputs; tells device and dtype.
        inference: Whether to time under ``torch.inference_mode``.
    """

    rivals: Mapping[str, Callable[[], Rival]]
    bytes: int
    flops: int
    difference: Callable[[str, Any, Any], float]
    tolerance: float
    tensor: Tensor
    inference: bool = True


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        operator: What is timed: a public operator, ``_backward`` appended for its backward,
            ``_forward_backward`` for both together.
        name: Name of the case, unique within the operator.
        shape: Sizes.
        setup: Makes the work from the shape, a dtype and a device.
        skip: Rivals and yardsticks that do not run, with the reason.
        memory: Rivals whose extra memory is measured besides.
        device: Kind of device whose sizes these are.
    """

    operator: str
    name: str
    shape: Sizes
    setup: Callable[[Any, torch.dtype, torch.device], Work]
    skip: Mapping[str, str] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    device: str = "cpu"

    @property
    def sizes(self) -> str:
        """The shape in words: D is the width of a metric or head, C the number of channels."""
        return self.shape.describe("C" if "merge" in self.operator else "D")

    @property
    def public(self) -> str:
        """The public operator behind what is timed."""
        return self.operator.removesuffix("_backward").removesuffix("_forward")

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Work:
        """Make the inputs, from a fixed seed."""
        return self.setup(self.shape, dtype, device)

    def tiny(self) -> Case:
        """The same case at sizes that take no time."""
        return replace(self, shape=self.shape.tiny())


def triton_rival(operator: str, ours: Callable[[], Any], tensor: Tensor) -> dict[str, Any]:
    """Triton's kernel of an operator where a compiled one serves CUDA tensors, else nothing.

    Choosing it lets later calls of the compiled one pass through Python: compare CUDA graphs.
    """
    blocked = tokenops.why_not(operator, tensor)
    if not tensor.is_cuda or blocked.keys() & {"native", "triton"}:
        return {}
    return {"triton": lambda: Rival(ours, lambda: tokenops.use_backend("triton"))}


def use_reference() -> tokenops.use_backend:
    """Context in which tokenops runs on its reference."""
    return tokenops.use_backend("reference")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under ``torch.compile``, for its exact shapes and without graph breaks."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def generator(device: torch.device) -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator(device).manual_seed(0)


def make_metric(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Metric [B, N, D], or keys [B, H, N, D] as a view of a packed qkv [B, N, 3, H, D]."""
    batch, tokens, width, random = shape.batch, shape.tokens, shape.width, generator(device)
    if not shape.heads:
        return torch.randn(batch, tokens, width, generator=random, device=device).to(dtype)
    size = (batch, tokens, 3, shape.heads, width)
    qkv = torch.randn(size, generator=random, device=device).to(dtype)
    return qkv.permute(2, 0, 3, 1, 4)[1]
