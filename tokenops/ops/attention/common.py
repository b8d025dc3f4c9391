# SPDX-License-Identifier: Apache-2.0
"""Functions that the reference and the composed functions of attention share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import Inputs, Needs, ScoreInputs


def valid_keys(inputs: Inputs | ScoreInputs) -> Tensor | None:
    """Bool [B, Nk], false for padding and for keys of size 0; None if all keys are valid."""
    valid = None if inputs.key_padding_mask is None else ~inputs.key_padding_mask
    if inputs.size is None:
        return valid
    return inputs.size > 0 if valid is None else valid & (inputs.size > 0)


def per_head(x: Tensor, valid: Tensor | None, dtype: torch.dtype, heads: int) -> Tensor:
    """Keys or values [B, H, Nk, D] of each query head; 0 for padding, which may hold NaN."""
    if valid is not None:
        x = torch.where(valid[:, None, :, None], x, 0)
    x = x.to(dtype)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def per_key_head(x: Tensor, heads: int) -> Tensor:
    """Sum over the query heads of each key head: the adjoint of the repetition in `per_head`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2)


def max_exponent(dtype: torch.dtype) -> float:
    """Maximum log-probability of a dropped key: the square of the probability stays finite."""
    return math.log(torch.finfo(dtype).max) / 2


def reduce_heads(scores: Tensor, head_reduce: str) -> Tensor:
    """Reduce scores [B, H, Nk] to [B, Nk]; ``"none"`` returns them unchanged."""
    if head_reduce == "none":
        return scores
    return scores.mean(1) if head_reduce == "mean" else scores.sum(1)


def weight_grads(
    dpolicy: Tensor, dlog_size: Tensor, inputs: Inputs, needs: Needs
) -> tuple[Tensor, Tensor]:
    """Gradients of policy and size from gradients by head [B, H, Nk] of policy and log(size)."""
    policy, size = inputs.policy, inputs.size
    dsize = dlog_size[..., :0].sum(1)  # [B, 0]
    if size is not None and needs.need_size:
        dsize = torch.where(size > 0, dlog_size.sum(1) / torch.where(size > 0, size, 1), 0)
    if policy is None or not needs.need_policy:
        return dlog_size[..., :0].sum(1), dsize
    if policy.dim() == 2:
        dpolicy = dpolicy.sum(1)
    return torch.where(policy > 0, dpolicy, 0) if inputs.policy_grad == "kept" else dpolicy, dsize
