# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows of attention maps for ``composed.py``: keys with weights, logits, softmax.

A block has b images and R rows. A row's own key is the one at its query's position. Other letters
as in ``arguments``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import ROWS_AT_LEAST, acc_dtype, block_entries, may_be_true
from .arguments import Inputs, ScoreInputs
from .common import per_head, valid_keys

#: Least probability of a row's first key at which lse is computed as its logit - log(probability).
#: The error is less than 1e-5, far less than the error of logits from bfloat16 products.
MIN_PROBABILITY = 1e-30


class Keys(NamedTuple):
    """Keys and their weights, prepared for all blocks."""

    inputs: Inputs | ScoreInputs
    k: Tensor  # [B, H, Nk, D] in the dtype of products, dense; 0 for padding
    k_exact: Tensor | None  # with eps, k in the dtype of sums: bfloat16 logits may tie
    dtype: torch.dtype  # of sums
    log_size: Tensor | None  # [B, 1, 1, Nk], -inf for padding
    policy: Tensor | None  # [B, 1 or H, 1, Nk]
    valid: Tensor | None  # bool [B, Nk], false for padding; None if all keys are valid
    num_valid: Tensor  # [B, 1, 1, 1], at least 1
    query_position: Tensor | None  # int64 [1 or B, 1, Nq, 1]

    @property
    def eps_by_row(self) -> bool:
        """Whether rows spread p_eps over different keys."""
        return self.inputs.eps > 0 and (self.inputs.is_causal or self.inputs.exclude_self)


class Block(NamedTuple):
    """Some rows of some images."""

    images: slice
    rows: slice
    query_position: Tensor | None  # [1 or b, 1, R, 1]; None where row i has the own key i


class OwnKeys:
    """The entries of the own keys of a block's rows in a map [b, H, R, Nk]."""

    def __init__(self, block: Block, keys: int) -> None:
        self._first, self._index = block.rows.start, None
        if block.query_position is not None:
            self._exists = (block.query_position >= 0) & (block.query_position < keys)
            self._index = block.query_position.clamp(0, max(keys - 1, 0))

    def read(self, x: Tensor) -> Tensor:
        """Copy the entries."""
        if x.shape[3] == 0:
            return x
        if self._index is None:
            return x.diagonal(self._first, 2, 3).clone()
        return x.gather(3, self._index.expand(*x.shape[:3], 1))

    def write(self, x: Tensor, value: Tensor | float) -> None:
        """Replace the entries in place."""
        if x.shape[3] == 0:
            return
        if self._index is None:
            own = x.diagonal(self._first, 2, 3)
            own.copy_(value) if isinstance(value, Tensor) else own.fill_(value)
            return
        index = self._index.expand(*x.shape[:3], 1)
        x.scatter_(3, index, torch.where(self._exists, value, x.gather(3, index)))

    @contextmanager
    def restored(self, x: Tensor, condition: bool) -> Iterator[None]:
        """Restore the entries after in-place changes of the map, if a condition holds."""
        entries = self.read(x) if condition else None
        yield
        if entries is not None:
            self.write(x, entries)


def prepare_keys(inputs: Inputs | ScoreInputs, product_dtype: torch.dtype) -> Keys:
    """Keys and their weights for all blocks."""
    q, k, size, policy = inputs.q, inputs.k, inputs.size, inputs.policy
    position = inputs.query_position
    dtype = acc_dtype(q)
    valid = valid_keys(inputs)
    if valid is not None and valid.is_cpu and bool(valid.all()):
        valid = None
    log_size = None if size is None else size.to(dtype).log()
    count = torch.full((k.shape[0], 1, 1, 1), max(k.shape[2], 1), dtype=dtype, device=k.device)
    if valid is not None:
        if log_size is None:
            log_size = torch.zeros(valid.shape, dtype=dtype, device=k.device)
        log_size = log_size.masked_fill(~valid, -math.inf)
        count = valid.sum(1).clamp(min=1).to(dtype)[:, None, None, None]
    if policy is not None:
        policy = policy.to(dtype)
        # 1 / policy overflows for subnormal policies: they count as 0.
        policy = torch.where(policy < torch.finfo(dtype).tiny, 0, policy)
        policy = policy[:, None, None] if policy.dim() == 2 else policy[:, :, None]
    if position is not None:
        position = position.long().view(1, -1) if position.dim() == 1 else position.long()
        position = position[:, None, :, None]
    k = per_head(k, valid, product_dtype, q.shape[1]).contiguous()
    k_exact = k.to(dtype) if inputs.eps > 0 else None
    log_size = None if log_size is None else log_size[:, None, None]
    return Keys(inputs, k, k_exact, dtype, log_size, policy, valid, count, position)


def prepare_values(v: Tensor, keys: Keys) -> Tensor:
    """Values [B, H, Nk, Dv] in the dtype of products, dense; 0 for padding."""
    return per_head(v, keys.valid, keys.k.dtype, keys.k.shape[1]).contiguous()


def mean_value(values: Tensor, keys: Keys) -> Tensor:
    """Mean of the values of valid keys, [B, H, 1, Dv] in the dtype of sums."""
    return values.sum(2, keepdim=True, dtype=keys.dtype) / keys.num_valid


def blocks(q: Tensor, k: Tensor, keys: Keys) -> Iterator[Block]:
    """Blocks of several whole images if those are small, else of some rows of one image."""
    batch, rows, per_row = q.shape[0], q.shape[2], max(1, q.shape[1] * k.shape[2])
    images = max(1, block_entries(q.device) // (per_row * max(1, rows)))
    count = rows_per_block(q, k)
    for image in range(0, batch, images):
        i = slice(image, min(image + images, batch))
        for row in range(0, rows, count):
            r = slice(row, min(row + count, rows))
            position = keys.query_position
            if position is not None:
                position = position[i if position.shape[0] > 1 else slice(None), :, r]
            yield Block(i, r, position)


def rows_per_block(q: Tensor, k: Tensor) -> int:
    """Rows of a block: all rows if a whole image fits."""
    rows, per_row = max(1, q.shape[2]), max(1, q.shape[1] * k.shape[2])
    most = block_entries(q.device)
    return rows if per_row * rows <= most else max(ROWS_AT_LEAST, most // per_row)


def dense_rows(x: Tensor, keys: Keys) -> Tensor:
    """Rows of a block in the dtype of products, dense."""
    return x.to(keys.k.dtype).contiguous()


def product_dtype(q: Tensor) -> torch.dtype:
    """Dtype of the operands of products: bfloat16 where processors multiply it faster.

    Those products accumulate in float32 and round once.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and _multiplies_bfloat16():
        return q.dtype
    return acc_dtype(q)


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix products by image and head."""
    flat = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat).view(*a.shape[:3], b.shape[3])


def add_product(total: Tensor, a: Tensor, b: Tensor, is_zero: bool) -> None:
    """Add ``a @ b`` to a total, or write it if the total is zero."""
    if is_zero and total.dtype == a.dtype:
        product(a, b, out=total)
    else:
        total += product(a, b)


class Buffers:
    """Maps that all blocks reuse, because new memory would cost page faults in each block."""

    def __init__(self, keys: Keys, device: torch.device) -> None:
        self._dtypes = keys.dtype, keys.dtype, keys.k.dtype
        self._flat = [torch.empty(0, dtype=dtype, device=device) for dtype in self._dtypes]

    def take(self, which: int, *shape: int) -> Tensor:
        """Uninitialized buffer: 0 (logits) or 1 in the dtype of sums, 2 in that of products."""
        if self._flat[which].numel() < math.prod(shape):
            self._flat[which] = self._flat[which].new_empty(math.prod(shape))
        return self._flat[which][: math.prod(shape)].view(shape)

    def product(self, which: int, rows: Tensor, keys: Tensor) -> Tensor:
        """``rows @ keys.mT`` [b, H, R, Nk] in the dtype of sums."""
        shape = *rows.shape[:3], keys.shape[2]
        out = self.take(which, *shape)
        if rows.dtype == out.dtype:
            return product(rows, keys.transpose(2, 3), out=out)
        return out.copy_(product(rows, keys.transpose(2, 3), out=self.take(2, *shape)))

    def lower(self, x: Tensor) -> Tensor:
        """A map in the dtype of products."""
        return x if x.dtype == self._dtypes[2] else self.take(2, *x.shape).copy_(x)


def logits(rows: Tensor, block: Block, keys: Keys, buffers: Buffers) -> Tensor:
    """Logits qk + log(size) of a block [b, H, R, Nk]; -inf for keys that a row does not see."""
    scale, k = keys.inputs.scale, keys.k if keys.k_exact is None else keys.k_exact
    qk = buffers.product(0, rows.to(k.dtype), k[block.images])
    if keys.log_size is None:
        qk *= scale
    else:
        torch.add(keys.log_size[block.images], qk, alpha=scale, out=qk)
    if keys.inputs.is_causal:
        qk.masked_fill_(~_causal_mask(block, keys), -math.inf)
    return qk


def _causal_mask(block: Block, keys: Keys) -> Tensor:
    """Bool [1 or b, 1, R, Nk], true for keys up to each row's position."""
    key = torch.arange(keys.k.shape[2], device=keys.k.device)
    position = block.query_position
    if position is None:
        rows = torch.arange(block.rows.start, block.rows.stop, device=key.device)
        position = rows[None, None, :, None]
    return key <= position


def seen_keys(block: Block, keys: Keys) -> tuple[Tensor, Tensor]:
    """Keys that each row sees, as 0 and 1 in the dtype of sums, and their number, at least 1."""
    seen = torch.ones((), dtype=torch.bool, device=keys.k.device)
    if keys.valid is not None:
        seen = keys.valid[block.images, None, None]
    if keys.inputs.is_causal:
        seen = seen & _causal_mask(block, keys)
    rows = block.rows.stop - block.rows.start
    seen = seen.expand(*torch.broadcast_shapes(seen.shape, (1, 1, rows, keys.k.shape[2])))
    seen = seen.to(keys.dtype)
    return seen, seen.sum(-1, keepdim=True).clamp_(min=1)


class RowSums(NamedTuple):
    """Sums of the rows of a block, [b, H, R, 1]; without eps, ``eps`` and ``p_eps`` are 0-D."""

    lse: Tensor  # [b, H, R]
    inverse: Tensor  # 1 / (sum of p + eps)
    eps: Tensor  # factor of the mean of the values relative to p; 0 for a row that sees nothing
    p_eps: Tensor  # eps * inverse
    argmax: Tensor | None  # int32 [b, H, R], with eps alone


def softmax(
    rows: Tensor, block: Block, keys: Keys, buffers: Buffers, need_lse: bool = True
) -> tuple[Tensor, RowSums]:
    """Unnormalized attention p [b, H, R, Nk] of a block: ``p * inverse`` is the attention.

    Without ``need_lse``, ``lse`` may be infinite or NaN.
    """
    eps, self_keep = keys.inputs.eps, keys.inputs.self_keep
    qk = _logits_and_policy(rows, block, keys, buffers)
    own = OwnKeys(block, qk.shape[3])
    quick = qk.is_cpu and eps == 0 and qk.numel() > 0
    if quick and need_lse:
        quick = qk.dtype != keys.k.dtype and bool((qk[..., 0] > -math.inf).all())
    if quick:
        if (lse := _softmax(qk, MIN_PROBABILITY if need_lse else 0)) is not None:
            if keys.inputs.exclude_self:
                own.write(qk, 0.0)
            one, zero = qk.new_ones(()), qk.new_zeros(())
            return qk, RowSums(lse, one.expand(*lse.shape, 1), zero, zero, None)
        qk = _logits_and_policy(rows, block, keys, buffers)
    argmax = None
    if qk.shape[3] == 0:
        m_i = qk.new_full((*qk.shape[:3], 1), -math.inf)
    else:
        m_i = qk.amax(-1, keepdim=True)
        if eps > 0:
            argmax = _argmax(qk, m_i, buffers.take(1, *qk.shape))
    some = m_i != -math.inf  # true for NaN, which must not be hidden
    # p is exp(qk - m_i) * top: PyTorch's softmax takes less time than its exponential function.
    p = torch.softmax(qk, -1, out=qk)
    if may_be_true(~some):
        p.masked_fill_(~some, 0)
    top = p.amax(-1, keepdim=True) if p.shape[3] > 0 else p.new_zeros(some.shape)
    eps_term = eps * top  # eps is relative to the largest weight
    l_i = some.to(p.dtype)
    if keys.policy is not None and eps > 0:
        with own.restored(p, self_keep):
            p *= keys.policy[block.images]
        l_i = p.sum(-1, keepdim=True)
    l_i = l_i + eps_term
    lse = torch.where(l_i > 0, m_i + l_i.log() - top.log(), -math.inf)[..., 0]
    inverse = torch.where(l_i == 0, 1, l_i).reciprocal_()
    if keys.eps_by_row:
        seen, count = seen_keys(block, keys)
        p += seen * (eps_term / count)
    if keys.inputs.exclude_self:
        own.write(p, 0.0)
    argmax = None if argmax is None else torch.where(some, argmax, -1)[..., 0].int()
    return p, RowSums(lse, inverse, eps_term, eps_term * inverse, argmax)


def _logits_and_policy(rows: Tensor, block: Block, keys: Keys, buffers: Buffers) -> Tensor:
    """The logits, plus log(policy) if eps is 0.

    The maximum is then over kept keys: a dropped key with a large logit does not make the
    probabilities of other keys underflow.
    """
    qk = logits(rows, block, keys, buffers)
    if keys.policy is not None and keys.inputs.eps == 0:
        with OwnKeys(block, qk.shape[3]).restored(qk, keys.inputs.self_keep):
            qk += keys.policy[block.images].log()
    return qk


def _softmax(qk: Tensor, min_probability: float) -> Tensor | None:
    """Softmax of each row, in place; returns lse [b, H, R].

    For any key, lse = logit - log(probability). Using the first key saves two passes that find the
    maximum. Returns None, with ``qk`` overwritten, if the probability of the first key is below
    ``min_probability`` or NaN (an empty row).
    """
    logit = qk[..., 0].clone()
    p = torch.softmax(qk, -1, out=qk)[..., 0]
    return logit - p.log() if bool(p.amin() >= min_probability) else None


def _argmax(qk: Tensor, m_i: Tensor, buffer: Tensor) -> Tensor:
    """Index of the first maximum of each row, in half the time of ``torch.max``.

    Indices have the dtype of sums, which is exact to 2^24 at least.
    """
    keys = qk.shape[3]
    from_end = torch.arange(keys, 0, -1, dtype=qk.dtype, device=qk.device)
    found = torch.ge(qk, m_i, out=buffer).mul_(from_end).amax(-1, keepdim=True)
    return (keys - found).clamp_(max=keys - 1)  # nothing is found in a row of NaN only
