# SPDX-License-Identifier: Apache-2.0
"""What implementations of merging share, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def route(assign: Tensor, earlier: Tensor, num_tokens: int) -> Tensor:
    """Output token of each input token through two maps: [B, N], [B, N0] -> int32 [B, N0]."""
    tokens = assign.shape[1]
    slot = torch.where((earlier >= 0) & (earlier < tokens), earlier, tokens).long()
    through = torch.nn.functional.pad(assign, (0, 1), value=-1).gather(1, slot)
    return torch.where((through >= 0) & (through < num_tokens), through, -1)
