# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of attention."""

from .backward import policy_attention_backward
from .forward import policy_attention
from .scores import attention_scores

__all__ = ["attention_scores", "policy_attention", "policy_attention_backward"]
