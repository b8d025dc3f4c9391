# SPDX-License-Identifier: Apache-2.0
"""Attention with key weights put together from PyTorch's operators, where there is no kernel.

Blocks of images, or of rows of one image, whose maps stay in the cache: a product, few passes in
place, a product. The weights of a row are divided by their sum after the second product. A token's
own key, which a policy spares, is a diagonal that is kept aside while the policy multiplies.

Letters: B batch, H heads of queries, Hkv heads of keys, Nq queries, Nk keys, D width, Dv width of
the values. Nothing here is differentiable by autograd: the operators have backward formulas.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._library import ROWS_AT_LEAST, acc_dtype, map_at_a_time, may_be_true, no_autocast

#: Share of a row's sum above which that sum follows from the logit that has the share; the error
#: of the sum's logarithm is 4e-6 at most, far below that of logits which are products in bfloat16.
SHARE_AT_LEAST = 1e-30

_fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Keys(NamedTuple):
    """What all rows share."""

    k: Tensor  # [B, H, Nk, D] in the type of products, dense; 0 for padding
    exact: Tensor | None  # with eps, in the type of sums: the largest of close logits has its share
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


class _Block(NamedTuple):
    """A block of rows: images and rows of those, and where these have their own keys."""

    images: slice
    rows: slice
    position: Tensor | None  # as in _Keys; None for the diagonal


class _Own:
    """The own keys of a block's rows in a map [b, H, R, Nk]: read, and written in place."""

    def __init__(self, block: _Block, keys: int) -> None:
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


def policy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    policy_grad: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, Nq, H, Dv], L [B, H, Nq] and, with eps, floor and argmax [B, H, Nq] of rows."""
    options = self_keep, exclude_self, eps, is_causal, scale, _product_dtype(q)
    keys = _keys(q, k, policy, size, key_padding_mask, position, *options)
    if _is_fused(q, v, keys):
        inputs = _with_dense_rows(q), keys.k, _values(v, keys)
        attended, lse = _fused_attention(*inputs, 0.0, False, **_fused(q, keys))
        none = lse.new_empty(*lse.shape[:2], 0)
        return attended.transpose(1, 2), lse, none, none.int()
    values, maps = _values(v, keys), _Maps(keys, q.device)
    batch, heads, rows = q.shape[:3]
    out = q.new_empty(batch, rows, heads, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=keys.dtype)
    floor = q.new_empty(batch, heads, rows if eps > 0 else 0, dtype=keys.dtype)
    argmax = torch.empty_like(floor, dtype=torch.int32)
    mean = _mean(values, keys) if eps > 0 else None
    with no_autocast(q.device.type):
        for block in _blocks(q, k, keys):
            i, r = block.images, block.rows
            queries = _rows(q[i, :, r], keys)
            weight, sums = _weights(queries, block, keys, maps)
            lse[i, :, r] = sums.lse
            attended = _product(maps.lower(weight), values[i])
            if mean is not None:
                attended = attended.to(keys.dtype)
                floor[i, :, r] = sums.floor[..., 0]
                argmax[i, :, r] = -1 if sums.argmax is None else sums.argmax
                if not keys.by_row:
                    attended += sums.eps * mean[i]
                attended *= sums.inverse
            out[i, r] = attended.transpose(1, 2)
    return out, lse, floor, argmax


def policy_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    out: Tensor,
    lse: Tensor,
    floor: Tensor,
    argmax: Tensor,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    policy_grad: str,
    scale: float,
    need_v: bool,
    need_policy: bool,
    need_size: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v in the layout [B, N, heads, width], of policy and of size."""
    options = self_keep, exclude_self, eps, is_causal, scale, _product_dtype(q)
    keys = _keys(q, k, policy, size, key_padding_mask, position, *options)
    values, maps = _values(v, keys), _Maps(keys, q.device)
    if _is_fused(q, v, keys) and grad_lse is None and not need_size:
        saved = _with_dense_rows(q), keys.k, values, out.transpose(1, 2), lse
        upward = _with_dense_rows(grad).transpose(1, 2)
        gradients = _fused_backward(upward, *saved, 0.0, False, **_fused(q, keys))
        dq, dk, dv = (
            _per_group(t, heads).transpose(1, 2)
            for t, heads in zip(gradients, (q.shape[1], k.shape[1], k.shape[1]), strict=True)
        )
        return (
            dq,
            dk,
            dv if need_v else dv[:, :0],
            lse.new_empty(q.shape[0], 0),
            lse.new_empty(q.shape[0], 0),
        )
    mean = _mean(values, keys) if eps > 0 else None
    delta = (grad.to(keys.dtype) * out).sum(-1).transpose(1, 2)[..., None]  # [B, H, Nq, 1]
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    # A dropped key may dominate its row beyond all bounds; its share is capped, not infinite.
    limit = math.log(torch.finfo(keys.dtype).max) / 2
    shift = torch.where(lse == -math.inf, math.inf, lse)[..., None]  # rows without weights: 0
    dq = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    # Sums over the blocks of an image, or one product each.
    whole = 0 < q.shape[2] <= _rows_at_a_time(q, k)
    dk = torch.zeros_like(keys.k, dtype=values.dtype if whole else keys.dtype)
    dv = torch.zeros_like(values, dtype=dk.dtype if mean is None else keys.dtype)
    dpolicy, dlog = (lse.new_zeros(dk.shape[:3]) for _ in range(2))
    with no_autocast(q.device.type):
        for block in _blocks(q, k, keys):
            i, r = block.images, block.rows
            own, p = _Own(block, k.shape[2]), None if keys.policy is None else keys.policy[i]
            queries = _rows(q[i, :, r], keys)
            g = _rows(grad[i, r].transpose(1, 2), keys)  # [b, H, R, Dv]
            # exp(s_ij + log z_j - L_i)
            share = _logits(queries, block, keys, maps)
            if p is None and eps == 0:
                torch.softmax(share, -1, out=share)
                if may_be_true(empty := lse[i, :, r] == -math.inf):
                    share.masked_fill_(empty[..., None], 0)
            else:
                share.sub_(shift[i, :, r])
                if p is not None:
                    share.clamp_(max=torch.where(p > 0, math.inf, limit))
                share.exp_()
            t = maps.product(1, g, values[i])  # g_i . v_j
            if exclude_self:
                own.write(t, 0.0)
            if mean is not None:  # g_i . (mean of the values)
                seen, number = _seen(block, keys) if keys.by_row else (None, keys.number[i])
                if seen is None:
                    by_mean = g.to(keys.dtype) @ mean[i].transpose(2, 3)
                else:
                    by_mean = (t * seen).sum(-1, keepdim=True) / number
            t.sub_(delta[i, :, r]).mul_(share)
            if p is not None:
                kept = own.read(t) if self_keep else None
                _times(t, p, dpolicy[i], own, self_keep, need_policy)
                if kept is not None:
                    own.write(t, kept)
            if mean is not None and t.shape[3] > 0:
                tail = floor[i, :, r, None].mul(by_mean - delta[i, :, r])
                t.scatter_add_(3, argmax[i, :, r, None].clamp(0, t.shape[3] - 1).long(), tail)
            if need_size:
                dlog[i] += t.sum(2)
            ds = maps.lower(t)
            dq[i, r] = _product(ds, keys.k[i]).mul_(scale).transpose(1, 2)
            _add_product(dk[i], ds.transpose(2, 3), queries, whole)
            if not need_v:
                continue
            if p is not None:
                kept = own.read(share) if self_keep else None
                share *= p
                if kept is not None:
                    own.write(share, kept)
            if mean is not None and seen is not None:
                share += seen * (floor[i, :, r, None] / number)
            if exclude_self:
                own.write(share, 0.0)
            _add_product(dv[i], maps.lower(share).transpose(2, 3), g, whole)
            if mean is not None and seen is None:
                dv[i] += (floor[i, :, r, None].transpose(2, 3) @ g.to(keys.dtype)) / number
    dk *= scale
    if keys.part is not None:
        dv.masked_fill_(~keys.part, 0)
    dk, dv = (_per_group(t, k.shape[1]).transpose(1, 2).to(q.dtype) for t in (dk, dv))
    dsize = lse.new_empty(q.shape[0], 0)
    if size is not None and need_size:
        live = size > 0
        dsize = dlog.sum(1).div_(torch.where(live, size, 1)).masked_fill_(~live, 0)
    if policy is None or not need_policy:
        dpolicy = lse.new_empty(q.shape[0], 0)
    else:
        dpolicy = dpolicy.sum(1) if policy.dim() == 2 else dpolicy
        if policy_grad == "kept":
            dpolicy = torch.where(policy > 0, dpolicy, 0)
    return dq, dk, dv if need_v else dv[:, :0], dpolicy, dsize


def _times(
    t: Tensor, policy: Tensor, total: Tensor, own: _Own, self_keep: bool, need_policy: bool
) -> None:
    """Multiply a map by the policy, in place; before, add its sums by key to their total."""
    if need_policy:
        if self_keep:  # a row's own key knows no policy
            own.write(t, 0.0)
        total += t.sum(2)
    t *= policy


def attention_scores(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor | None,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    lse: Tensor | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    scale: float,
    head_reduce: str,
) -> Tensor:
    """Attention that each key receives, [B, Nk], or [B, H, Nk] without a reduction over heads."""
    options = self_keep, exclude_self, eps, is_causal, scale, acc_dtype(q)
    keys = _keys(q, k, policy, size, key_padding_mask, position, *options)
    maps = _Maps(keys, q.device)
    score = keys.k.new_zeros(keys.k.shape[:3], dtype=keys.dtype)
    with no_autocast(q.device.type):
        for block in _blocks(q, k, keys):
            i, r = block.images, block.rows
            queries = _rows(q[i, :, r], keys)
            weight, sums = _weights(queries, block, keys, maps, need_lse=False)
            factor = sums.inverse.transpose(2, 3)  # [b, H, 1, R]
            if query_weight is not None:
                of_rows = query_weight[i, ..., r].to(keys.dtype)
                factor = factor * (of_rows[:, None] if of_rows.dim() == 2 else of_rows)[:, :, None]
            received = factor * weight if weight.shape[2] == 1 else factor @ weight
            score[i] += received[:, :, 0]
            if eps > 0 and not keys.by_row:
                spread = (factor @ sums.eps)[:, :, 0] / keys.number[i, 0]  # [b, H, 1]
                score[i] += spread if keys.part is None else spread * keys.part[i, :, :, 0]
    if head_reduce == "none":
        return score
    return score.mean(1) if head_reduce == "mean" else score.sum(1)


# ---- blocks of rows ----


def _keys(
    q: Tensor,
    k: Tensor,
    policy: Tensor | None,
    size: Tensor | None,
    key_padding_mask: Tensor | None,
    position: Tensor | None,
    self_keep: bool,
    exclude_self: bool,
    eps: float,
    is_causal: bool,
    scale: float,
    products: torch.dtype,
) -> _Keys:
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
    return _Keys(
        k,
        k.to(dtype) if eps > 0 else None,
        dtype,
        None if bias is None else bias[:, None, None],
        policy,
        part,
        count,
        position,
        self_keep,
        exclude_self,
        eps,
        is_causal,
        scale,
    )


def _values(v: Tensor, keys: _Keys) -> Tensor:
    """Values [B, H, Nk, Dv] in the type of products, dense; 0 for padding."""
    v = _per_head(_without_padding(v, keys.part).to(keys.k.dtype), keys.k.shape[1])
    return v.contiguous()


def _is_fused(q: Tensor, v: Tensor, keys: _Keys) -> bool:
    """Whether PyTorch's fused attention for CPUs serves: single precision, no weights but sizes.

    In bfloat16 it takes longer than two products and a softmax.
    """
    if q.dtype != torch.float32 or not q.is_cpu or q.shape[3] != v.shape[3]:
        return False
    plain = keys.policy is None and keys.part is None and keys.eps == 0
    masked = keys.is_causal or keys.exclude_self
    if not plain or masked or min(q.numel(), keys.k.numel()) == 0:
        return False
    # Where a row meets a NaN, it computes 0.
    return math.isfinite(q.sum() + keys.k.sum())


def _with_dense_rows(x: Tensor) -> Tensor:
    """The tensor, or a copy whose last dimension is contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _fused(q: Tensor, keys: _Keys) -> dict[str, Any]:
    bias = keys.bias
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], -1)
    return {"attn_mask": bias, "scale": keys.scale}


def _mean(values: Tensor, keys: _Keys) -> Tensor:
    """Mean of the values of keys that take part, [B, H, 1, Dv] in the type of sums."""
    return values.sum(2, keepdim=True, dtype=keys.dtype) / keys.number


def _without_padding(x: Tensor, part: Tensor | None) -> Tensor:
    """Keys or values with 0 for padding, whose NaN would outlast a weight of 0."""
    return x if part is None else torch.where(part, x, 0)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Give each head of queries the keys or values that it shares with its group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_group(x: Tensor, groups: int) -> Tensor:
    """The adjoint of :func:`_per_head`: sums over the heads of each group."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def _blocks(q: Tensor, k: Tensor, keys: _Keys) -> Iterator[_Block]:
    """Several whole images where those are small, else some rows of one."""
    batch, rows, per_row = q.shape[0], q.shape[2], max(1, q.shape[1] * k.shape[2])
    images = max(1, map_at_a_time(q.device) // (per_row * max(1, rows)))
    count = _rows_at_a_time(q, k)
    for image in range(0, batch, images):
        i = slice(image, min(image + images, batch))
        for row in range(0, rows, count):
            r = slice(row, min(row + count, rows))
            position = keys.position
            if position is not None:
                position = position[i if position.shape[0] > 1 else slice(None), :, r]
            yield _Block(i, r, position)


def _rows_at_a_time(q: Tensor, k: Tensor) -> int:
    """Rows of a block, all where whole images fit."""
    rows, per_row = max(1, q.shape[2]), max(1, q.shape[1] * k.shape[2])
    most = map_at_a_time(q.device)
    return rows if per_row * rows <= most else max(ROWS_AT_LEAST, most // per_row)


def _rows(x: Tensor, keys: _Keys) -> Tensor:
    """Rows of a block in the type of products, dense."""
    return x.to(keys.k.dtype).contiguous()


def _product_dtype(q: Tensor) -> torch.dtype:
    """Type of the operands of products: bfloat16 where processors multiply it faster.

    Those products have sums in float32, which they round once.
    """
    if q.dtype == torch.bfloat16 and q.is_cpu and _multiplies_bfloat16():
        return q.dtype
    return acc_dtype(q)


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of matrices of images and heads."""
    flat = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat).view(*a.shape[:3], b.shape[3])


def _add_product(total: Tensor, a: Tensor, b: Tensor, alone: bool) -> None:
    """Add products to a total, which holds zeros if this one comes alone."""
    if alone and total.dtype == a.dtype:
        _product(a, b, out=total)
    else:
        total += _product(a, b)


class _Maps:
    """Memory for the maps of one block after the other: fresh memory costs more than it holds."""

    def __init__(self, keys: _Keys, device: torch.device) -> None:
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
            return _product(rows, keys.transpose(2, 3), out=out)
        return out.copy_(_product(rows, keys.transpose(2, 3), out=self.take(2, *shape)))

    def lower(self, x: Tensor) -> Tensor:
        """A map in the type of products."""
        return x if x.dtype == self._dtypes[2] else self.take(2, *x.shape).copy_(x)


def _logits(rows: Tensor, block: _Block, keys: _Keys, maps: _Maps) -> Tensor:
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


def _not_behind(block: _Block, keys: _Keys) -> Tensor:
    """Bool [1 or b, 1, R, Nk], true for keys up to each row's position."""
    key = torch.arange(keys.k.shape[2], device=keys.k.device)
    at = block.position
    if at is None:
        at = torch.arange(block.rows.start, block.rows.stop, device=key.device)[None, None, :, None]
    return key <= at


def _seen(block: _Block, keys: _Keys) -> tuple[Tensor, Tensor]:
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
    """Of the rows of a block, [b, H, R, 1], but for the first and the last."""

    lse: Tensor  # [b, H, R]
    inverse: Tensor  # of the sum of the weights
    eps: Tensor  # weight of the mean of the values; 0 for a row that sees nothing
    floor: Tensor  # share of eps in the sum
    argmax: Tensor | None  # int32 [b, H, R], with eps alone


def _weights(
    rows: Tensor, block: _Block, keys: _Keys, maps: _Maps, need_lse: bool = True
) -> tuple[Tensor, _Sums]:
    """Weights of the keys, not yet divided by their sum; see the contract's formulas."""
    s = _kept_logits(rows, block, keys, maps)
    if s.is_cpu and keys.eps == 0 and (not need_lse or s.dtype != keys.k.dtype):
        if (lse := _softmax(s, SHARE_AT_LEAST if need_lse else 0)) is not None:
            if keys.exclude_self:
                _Own(block, s.shape[3]).write(s, 0.0)
            one, none = s.new_ones(()), s.new_zeros(())
            return s, _Sums(lse, one.expand(*lse.shape, 1), none, none, None)
        s = _kept_logits(rows, block, keys, maps)
    own = _Own(block, s.shape[3])
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
        seen, number = _seen(block, keys)
        s += seen * (eps / number)
    if keys.exclude_self:
        own.write(s, 0.0)
    argmax = None if argmax is None else torch.where(some, argmax, -1)[..., 0].int()
    return s, _Sums(lse, inverse, eps, eps * inverse, argmax)


def _kept_logits(rows: Tensor, block: _Block, keys: _Keys, maps: _Maps) -> Tensor:
    """The logits; without eps they count the policy, since no dropped key may outdo all others."""
    s = _logits(rows, block, keys, maps)
    if keys.policy is not None and keys.eps == 0:
        dropped = keys.policy[block.images].log()
        _Own(block, s.shape[3]).spare(s, keys.self_keep, lambda: s.add_(dropped))
    return s


def _softmax(s: Tensor, least: float) -> Tensor | None:
    """The softmax of each row, in place, and the logarithm of its sum.

    The sum follows from the first key's logit and its share, which spares two passes for maxima.
    None where such a share is below ``least`` or a row is empty.
    """
    first = s[..., :1].clone()
    torch.softmax(s, -1, out=s)
    share = s[..., :1]
    if share.numel() == 0 or not bool(share.amin() >= least):  # NaN in an empty row
        return None
    return (first - share.log())[..., 0]


def _first(s: Tensor, largest: Tensor, scratch: Tensor) -> Tensor:
    """Place of the first entry that is the largest of its row; PyTorch's max takes twice as long.

    Places are numbers of the type of sums, of which float32 counts to 2^24.
    """
    keys = s.shape[3]
    from_end = torch.arange(keys, 0, -1, dtype=s.dtype, device=s.device)
    found = torch.ge(s, largest, out=scratch).mul_(from_end).amax(-1, keepdim=True)
    return (keys - found).clamp_(max=keys - 1)  # among nothing but NaN none is found
