# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows of attention maps for ``composed.py``: keys with weights, logits, softmax.

Letters: B batch, H heads of queries, Nq queries, Nk keys, D width, Dv width of the values; a block
has b images and R rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import ROWS_AT_LEAST, acc_dtype, block_entries, may_be_true
from .arguments import Inputs, ScoreInputs

#: Smallest softmax probability of the first key from which a row's log-sum-exp is taken, as logit -
#: log(probability). That is off by less than 1e-5, far less than logits from bfloat16 products.
LEAST_PROBABILITY = 1e-30


class Keys(NamedTuple):
    """What all rows share."""

    k: Tensor  # [B, H, Nk, D] in the type of products, dense; 0 for padding
    exact: Tensor | None  # k in the type of sums, with eps: logits in bfloat16 would tie
    dtype: torch.dtype  # type of sums
    bias: Tensor | None  # logarithm of the size, -inf for padding, [B, 1, 1, Nk]
    policy: Tensor | None  # [B, 1 or H, 1, Nk]
    part: Tensor | None  # bool [B, 1, Nk, 1], false for padding; None for all true
    number: Tensor  # keys that take part, one at least, [B, 1, 1, 1]
    position: Tensor | None  # key that stands where each query does, int64 [1 or B, 1, Nq, 1]
    self_keep: bool
    exclude_self: bool
    eps: float
    is_causal: bool
    scale: float

    @property
    def by_row(self) -> bool:
        """Whether each row spreads the share of eps over keys of its own."""
        return self.eps > 0 and (self.is_causal or self.exclude_self)


class Block(NamedTuple):
    """A block of rows: images and rows of those, and where these have their own keys."""

    images: slice
    rows: slice
    position: Tensor | None  # as in Keys; None for the diagonal


class Own:
    """The own keys of a block's rows in a map [b, H, R, Nk]: read, and written in place."""

    def __init__(self, block: Block, keys: int) -> None:
        self._first, self._place = block.rows.start, None
        if block.position is not None:  # [1 or b, 1, R, 1]
            self._there = (block.position >= 0) & (block.position < keys)
            self._place = block.position.clamp(0, max(keys - 1, 0))

    def read(self, x: Tensor) -> Tensor:
        """A copy of the own entries."""
        if x.shape[3] == 0:
            return x
        if self._place is None:
            return x.diagonal(self._first, 2, 3).clone()
        return x.gather(3, self._place.expand(*x.shape[:3], 1))

    def write(self, x: Tensor, value: Tensor | float) -> None:
        """Replace the own entries."""
        if x.shape[3] == 0:
            return
        if self._place is None:
            own = x.diagonal(self._first, 2, 3)
            own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)
            return
        place = self._place.expand(*x.shape[:3], 1)
        x.scatter_(3, place, torch.where(self._there, value, x.gather(3, place)))

    def spare(self, x: Tensor, do: bool, change: Callable[[], object]) -> None:
        """Change a map in place, but for the own entries where so asked."""
        kept = self.read(x) if do else None
        change()
        if kept is not None:
            self.write(x, kept)


def weighted_keys(inputs: Inputs | ScoreInputs, products: torch.dtype) -> Keys:
    """What all rows share; ``products`` is the type of operands of products."""
    q, k, size, policy = inputs.q, inputs.k, inputs.size, inputs.policy
    position, key_padding_mask = inputs.query_position, inputs.key_padding_mask
    dtype = acc_dtype(q)
    part = None if key_padding_mask is None else ~key_padding_mask
    if size is not None:
        part = size > 0 if part is None else part & (size > 0)
    if part is not None and part.is_cpu and bool(part.all()):
        part = None
    bias = None if size is None else size.to(dtype).log()
    count = torch.full((k.shape[0], 1, 1, 1), max(k.shape[2], 1), dtype=dtype, device=k.device)
    if part is not None:
        bias = bias if bias is not None else torch.zeros(part.shape, dtype=dtype, device=k.device)
        bias = bias.masked_fill(~part, -math.inf)
        count = part.sum(1).clamp(min=1).to(dtype)[:, None, None, None]
        part = part[:, None, :, None]
    if policy is not None:
        policy = policy.to(dtype)
        # The inverse of a smaller one is no number: it counts as 0.
        policy = torch.where(policy < torch.finfo(dtype).tiny, 0, policy)
        policy = policy[:, None, None] if policy.dim() == 2 else policy[:, :, None]
    if position is not None:
        position = position.long().view(1, -1) if position.dim() == 1 else position.long()
        position = position[:, None, :, None]
    k = _per_head(_without_padding(k, part).to(products), q.shape[1]).contiguous()
    return Keys(
        k,
        k.to(dtype) if inputs.eps > 0 else None,
        dtype,
        None if bias is None else bias[:, None, None],
        policy,
        part,
        count,
        position,
        inputs.self_keep,
        inputs.exclude_self,
        inputs.eps,
        inputs.is_causal,
        inputs.scale,
    )


def dense_values(v: Tensor, keys: Keys) -> Tensor:
    """Values [B, H, Nk, Dv] in the type of products, dense; 0 for padding."""
    v = _per_head(_without_padding(v, keys.part).to(keys.k.dtype), keys.k.shape[1])
    return v.contiguous()


def mean_value(values: Tensor, keys: Keys) -> Tensor:
    """Mean of the values of keys that take part, [B, H, 1, Dv] in the type of sums."""
    return values.sum(2, keepdim=True, dtype=keys.dtype) / keys.number


def _without_padding(x: Tensor, part: Tensor | None) -> Tensor:
    """Keys or values with 0 for padding, whose NaN would outlast a weight of 0."""
    return x if part is None else torch.where(part, x, 0)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Give each head of queries the keys or values that it shares with its group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def per_group(x: Tensor, groups: int) -> Tensor:
    """The adjoint of :func:`_per_head`: sums over the heads of each group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def blocks(q: Tensor, k: Tensor, keys: Keys) -> Iterator[Block]:
    """Several whole images where those are small, else some rows of one."""
    batch, rows, per_row = q.shape[0], q.shape[2], max(1, q.shape[1] * k.shape[2])
    images = max(1, block_entries(q.device) // (per_row * max(1, rows)))
    count = rows_at_a_time(q, k)
    for image in range(0, batch, images):
        i = slice(image, min(image + images, batch))
        for row in range(0, rows, count):
            r = slice(row, min(row + count, rows))
            position = keys.position
            if position is not None:
                position = position[i if position.shape[0] > 1 else slice(None), :, r]
            yield Block(i, r, position)


def rows_at_a_time(q: Tensor, k: Tensor) -> int:
    """Rows of a block, all where whole images fit."""
    rows, per_row = max(1, q.shape[2]), max(1, q.shape[1] * k.shape[2])
    most = block_entries(q.device)
    return rows if per_row * rows <= most else max(ROWS_AT_LEAST, most // per_row)


def dense_rows(x: Tensor, keys: Keys) -> Tensor:
    """Rows of a block in the type of products, dense."""
    return x.to(keys.k.dtype).contiguous()


def product_dtype(q: Tensor) -> torch.dtype:
    """Type of the operands of products: bfloat16 where processors multiply it faster.

    Those products have sums in float32, which they round once.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and _multiplies_bfloat16():
        return q.dtype
    return acc_dtype(q)


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of matrices of images and heads."""
    flat = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat).view(*a.shape[:3], b.shape[3])


def add_product(total: Tensor, a: Tensor, b: Tensor, alone: bool) -> None:
    """Add ``a @ b`` to the total; with ``alone`` the total is still zero, and is written."""
    if alone and total.dtype == a.dtype:
        product(a, b, out=total)
    else:
        total += product(a, b)


class Maps:
    """Buffers that all blocks reuse: new memory would cost page faults in each block."""

    def __init__(self, keys: Keys, device: torch.device) -> None:
        self._dtypes = keys.dtype, keys.dtype, keys.k.dtype
        self._flat = [torch.empty(0, dtype=dtype, device=device) for dtype in self._dtypes]

    def take(self, which: int, *shape: int) -> Tensor:
        """A map, not initialised: one of two in the type of sums, or the third, of products."""
        if self._flat[which].numel() < math.prod(shape):
            self._flat[which] = self._flat[which].new_empty(math.prod(shape))
        return self._flat[which][: math.prod(shape)].view(shape)

    def product(self, which: int, rows: Tensor, keys: Tensor) -> Tensor:
        """Dot products [b, H, R, Nk] of rows and keys, in the type of sums."""
        shape = *rows.shape[:3], keys.shape[2]
        out = self.take(which, *shape)
        if rows.dtype == out.dtype:
            return product(rows, keys.transpose(2, 3), out=out)
        return out.copy_(product(rows, keys.transpose(2, 3), out=self.take(2, *shape)))

    def lower(self, x: Tensor) -> Tensor:
        """A map in the type of products."""
        return x if x.dtype == self._dtypes[2] else self.take(2, *x.shape).copy_(x)


def logits(rows: Tensor, block: Block, keys: Keys, maps: Maps) -> Tensor:
    """What the rows' softmax is of, before a policy; -inf for what they do not see."""
    k = keys.k if keys.exact is None else keys.exact
    s = maps.product(0, rows.to(k.dtype), k[block.images])  # [b, H, R, Nk]
    if keys.bias is None:
        s *= keys.scale
    else:
        torch.add(keys.bias[block.images], s, alpha=keys.scale, out=s)
    if keys.is_causal:
        s.masked_fill_(~_not_behind(block, keys), -math.inf)
    return s


def _not_behind(block: Block, keys: Keys) -> Tensor:
    """Bool [1 or b, 1, R, Nk], true for keys up to each row's position."""
    key = torch.arange(keys.k.shape[2], device=keys.k.device)
    at = block.position
    if at is None:
        at = torch.arange(block.rows.start, block.rows.stop, device=key.device)[None, None, :, None]
    return key <= at


def seen_keys(block: Block, keys: Keys) -> tuple[Tensor, Tensor]:
    """Which keys each row sees, in the type of sums, and how many, one at least."""
    seen = torch.ones((), dtype=torch.bool, device=keys.k.device)
    if keys.part is not None:
        seen = keys.part[block.images].transpose(2, 3)
    if keys.is_causal:
        seen = seen & _not_behind(block, keys)
    rows = block.rows.stop - block.rows.start
    seen = seen.expand(*torch.broadcast_shapes(seen.shape, (1, 1, rows, keys.k.shape[2])))
    seen = seen.to(keys.dtype)
    return seen, seen.sum(-1, keepdim=True).clamp_(min=1)


class _Sums(NamedTuple):
    """Of the rows of a block, [b, H, R, 1], but for the first and the last.

    Without eps, ``eps`` and ``p_eps`` have no dimension.
    """

    lse: Tensor  # [b, H, R]
    inverse: Tensor  # of the sum of the weights
    eps: Tensor  # weight of the mean of the values; 0 for a row that sees nothing
    p_eps: Tensor  # share of eps in the sum
    argmax: Tensor | None  # int32 [b, H, R], with eps alone


def weigh(
    rows: Tensor, block: Block, keys: Keys, maps: Maps, need_lse: bool = True
) -> tuple[Tensor, _Sums]:
    """Weights of the keys: times ``inverse`` they are the attention; see the contract's formulas.

    Without ``need_lse``, ``lse`` may be infinite or NaN.
    """
    s = _kept_logits(rows, block, keys, maps)
    quick = s.is_cpu and keys.eps == 0 and s.numel() > 0
    if quick and need_lse:
        quick = s.dtype != keys.k.dtype and bool((s[..., 0] > -math.inf).all())
    if quick:
        if (lse := _softmax(s, LEAST_PROBABILITY if need_lse else 0)) is not None:
            if keys.exclude_self:
                Own(block, s.shape[3]).write(s, 0.0)
            one, none = s.new_ones(()), s.new_zeros(())
            return s, _Sums(lse, one.expand(*lse.shape, 1), none, none, None)
        s = _kept_logits(rows, block, keys, maps)
    own = Own(block, s.shape[3])
    policy = None if keys.policy is None else keys.policy[block.images]
    argmax = None
    if s.shape[3] == 0:
        largest = s.new_full((*s.shape[:3], 1), -math.inf)
    else:
        largest = s.amax(-1, keepdim=True)
        if keys.eps > 0:
            argmax = _first(s, largest, maps.take(1, *s.shape))
    some = largest != -math.inf  # a NaN is to be seen
    # PyTorch's softmax takes less time than its exponential function: w_ij / sum_j w_ij.
    torch.softmax(s, -1, out=s)
    if may_be_true(~some):
        s.masked_fill_(~some, 0)
    top = s.amax(-1, keepdim=True) if s.shape[3] > 0 else s.new_zeros(some.shape)
    eps = keys.eps * top  # relative to the largest weight
    total = some.to(s.dtype)
    if policy is not None and keys.eps > 0:
        own.spare(s, keys.self_keep, lambda: s.mul_(policy))
        total = s.sum(-1, keepdim=True)
    total = total + eps
    lse = torch.where(total > 0, largest + total.log() - top.log(), -math.inf)[..., 0]
    inverse = torch.where(total == 0, 1, total).reciprocal_()
    if keys.by_row:
        seen, number = seen_keys(block, keys)
        s += seen * (eps / number)
    if keys.exclude_self:
        own.write(s, 0.0)
    argmax = None if argmax is None else torch.where(some, argmax, -1)[..., 0].int()
    return s, _Sums(lse, inverse, eps, eps * inverse, argmax)


def _kept_logits(rows: Tensor, block: Block, keys: Keys, maps: Maps) -> Tensor:
    """The logits, plus log(policy) if eps is 0.

    A row's maximum is then that of kept keys: a dropped key with a huge logit cannot make the
    others underflow.
    """
    s = logits(rows, block, keys, maps)
    if keys.policy is not None and keys.eps == 0:
        dropped = keys.policy[block.images].log()
        Own(block, s.shape[3]).spare(s, keys.self_keep, lambda: s.add_(dropped))
    return s


def _softmax(s: Tensor, least: float) -> Tensor | None:
    """Softmax of each row, in place; returns its log-sum-exp [b, H, R].

    For any key, lse = logit - log(probability). The first key's saves two passes for the maximum.
    None, with ``s`` overwritten, where that probability is below ``least`` or NaN (an empty row).
    """
    logit = s[..., 0].clone()
    torch.softmax(s, -1, out=s)
    probability = s[..., 0]
    if not bool(probability.amin() >= least):
        return None
    return logit - probability.log()


def _first(s: Tensor, largest: Tensor, scratch: Tensor) -> Tensor:
    """Place of the first entry that is the largest of its row; PyTorch's max takes twice as long.

    Places are numbers of the type of sums, of which float32 counts to 2^24.
    """
    keys = s.shape[3]
    from_end = torch.arange(keys, 0, -1, dtype=s.dtype, device=s.device)
    found = torch.ge(s, largest, out=scratch).mul_(from_end).amax(-1, keepdim=True)
    return (keys - found).clamp_(max=keys - 1)  # among nothing but NaN none is found
