# SPDX-License-Identifier: Apache-2.0
"""Arguments and results that the operators of merging share.

Letters: B batch, N tokens in, M tokens out, C channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Index(NamedTuple):
    """A token map: the tensors of a :class:`tokenops.TokenMap`."""

    assign: Tensor  # int32 [B, N], output token of each input token, -1 if dropped
    offsets: Tensor  # int32 [B, M + 1], start of each output token's segment in members
    members: Tensor  # int32 [B, N], input tokens sorted by output token, -1 at the end

    @property
    def num_tokens(self) -> int:
        """Number of output tokens M."""
        return self.offsets.shape[1] - 1


class Inverse(NamedTuple):
    """The members of each output token in CSR form: the last two fields of :class:`Index`."""

    offsets: Tensor
    members: Tensor


class Factors(NamedTuple):
    """Factors of rows in the dtype of sums; None stands for ones."""

    weight: Tensor | None  # [B, N], of each input token
    scale: Tensor | None  # [B, M], of each output token


class Wavg(NamedTuple):
    """Results of ``merge_wavg``."""

    out: Tensor  # [B, M, C] in the dtype of x
    total: Tensor  # [B, M], summed sizes in the dtype of sums
