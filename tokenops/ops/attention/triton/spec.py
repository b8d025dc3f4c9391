# SPDX-License-Identifier: Apache-2.0
"""Spec, on which the launches of a call depend, and the first launch: log2 weights of the keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import _backend
from ...._triton.launch import Launch, Settings, arch, ceil_div
from ..arguments import Inputs, ScoreInputs
from .common import MAX_BLOCK, input_precision, log2_weights
from .forward_long import log2_weights_and_tiles

#: Keys of a program of the kernels that compute one number per key. Rows of log2 weights are padded
#: to whole blocks.
BLOCK = 256
#: Keys that ``log2_weights_and_tiles`` handles at a time.
LIST_BLOCK = 1024

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides


class Spec(NamedTuple):
    """A call without the values of its tensors. Launches are planned once for each Spec."""

    arch: str
    device: int | None
    dtype: torch.dtype
    q: Layout
    k: Layout
    v: Layout | None
    policy: Layout | None
    size: tuple[int, ...] | None  # strides
    mask: tuple[int, ...] | None  # strides
    query_position: tuple[int, ...] | None  # strides
    self_keep: bool  # False without a policy
    exclude_self: bool
    eps: float
    is_causal: bool
    scale: float

    @property
    def padding(self) -> bool:
        """Whether some keys may be invalid."""
        return self.size is not None or self.mask is not None

    @property
    def tiny(self) -> float:
        """Policies and sizes below this number count as 0."""
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).tiny

    @property
    def position_strides(self) -> tuple[int, ...]:
        """Strides of the query positions, broadcast to [B, Nq]."""
        return strides(self.query_position, 2)

    def options(self) -> dict[str, Any]:
        """Values of :class:`.common.Options`, except EVEN_D."""
        return {
            "INPUT_PRECISION": input_precision(self.arch, self.dtype),
            "WEIGHTS": self.policy is not None or self.padding,
            "SELF_KEEP": self.self_keep,
            "EXCLUDE_SELF": self.exclude_self,
            "CAUSAL": self.is_causal,
            "EPS": self.eps > 0,
        }

    def logit_options(self) -> dict[str, Any]:
        """Values of :class:`.common.LogitOptions`, except EVEN_D."""
        return {
            **self.options(),
            "SCALE_SIGN": (self.scale > 0) - (self.scale < 0),
            "POLICY": self.policy is not None,
            "PADDING": self.padding,
        }

    def check_strides(self, *others: int) -> None:
        """Raise if offsets in a tile of q, k, v, or with ``others``, need more than 32 bits."""
        layouts = self.q, self.k, *(() if self.v is None else (self.v,))
        steps = [*others, *(stride for layout in layouts for stride in layout[1][2:])]
        if max(map(abs, steps)) * MAX_BLOCK >= 2**31:
            raise _backend.UnservedError("tokens lie too far apart for 32-bit offsets in a tile")


def describe(inputs: Inputs | ScoreInputs) -> Spec:
    """The Spec of a call."""
    # Every call comes here: attributes and __new__ of NamedTuples would take 1 us more.
    v, self_keep = None, inputs.self_keep
    if isinstance(inputs, Inputs):
        q, k, v, policy, size, mask, position, _, exclude_self, eps, is_causal, _, scale = inputs
    else:
        q, k, _, policy, size, mask, position, _, _, exclude_self, eps, is_causal, scale, _ = inputs
    fields = (
        arch(q),
        q.device.index,
        q.dtype,
        (q.shape, q.stride()),
        (k.shape, k.stride()),
        None if v is None else (v.shape, v.stride()),
        None if policy is None else (policy.shape, policy.stride()),
        None if size is None else size.stride(),
        None if mask is None else mask.stride(),
        None if position is None else position.stride(),
        self_keep and policy is not None,
        exclude_self,
        eps,
        is_causal,
        scale,
    )
    return tuple.__new__(Spec, fields)


def strides(found: tuple[int, ...] | None, rank: int) -> tuple[int, ...]:
    """Strides of a tensor [..., N] broadcast to a rank: of [B, N] to rank 3 they are B, 0, N."""
    if found is None:
        return (0,) * rank
    return *found[:-1], *(0,) * (rank - len(found)), found[-1]


class Weights(NamedTuple):
    """The log2 weights of keys: the launch that writes them, and how they lie in their buffer."""

    launch: Launch | None = None
    heads: int = 1  # rows per image: 1, or H with a policy per head
    stride: int = 0  # between rows
    size_offset: int = 0  # from log2_weight to log2_size
    numel: int = 0
    num_tiles: int = 0  # of a row, if tiles are listed
    tiles_numel: int = 0

    def __call__(
        self, like: Tensor, policy: Tensor | None, size: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Launch; returns the log2 weights and the list of tiles, None for what a call lacks."""
        if self.launch is None:
            return None, None
        buffer = like.new_empty(self.numel)
        if not self.tiles_numel:
            self.launch(policy, size, mask, buffer)
            return buffer, None
        tiles = like.new_empty(self.tiles_numel, dtype=torch.int32)
        self.launch(policy, size, mask, buffer, tiles)
        return buffer, tiles


def plan_weights(spec: Spec, offset: int = 0, block_n: int = 0) -> Weights:
    """Plan log2 weights at an offset in a buffer, with ``block_n`` also the list of tiles."""
    if spec.policy is None and not spec.padding:
        return Weights()
    (batch, num_heads, _, _), (_, _, seqlen_k, _) = spec.q[0], spec.k[0]
    shape, policy_strides = spec.policy or ((), None)
    heads = num_heads if len(shape) == 3 else 1
    rows, stride = batch * heads, ceil_div(seqlen_k, BLOCK) * BLOCK
    size_offset = rows * stride if spec.policy is not None else 0
    num_tiles = stride // block_n if block_n else 0
    numbers = (
        *(seqlen_k, heads, stride, size_offset, num_tiles if block_n else offset),
        *(*strides(policy_strides, 3), *strides(spec.size, 2), *strides(spec.mask, 2)),
    )
    constants = {"TINY": spec.tiny, "BLOCK_N": block_n or BLOCK}
    if block_n:
        grid, settings = (rows,), Settings(1, LIST_BLOCK)
        launch = Launch(
            log2_weights_and_tiles, grid, numbers, settings, BLOCK=LIST_BLOCK, **constants
        )
    else:
        grid, settings = (rows * (stride // BLOCK),), Settings(1, BLOCK)
        launch = Launch(log2_weights, grid, numbers, settings, **constants)
    tiles_numel = rows * (2 * num_tiles + 1) if block_n else 0
    numel = size_offset + rows * stride
    return Weights(launch, heads, stride, size_offset, numel, num_tiles, tiles_numel)
