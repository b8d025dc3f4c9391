# SPDX-License-Identifier: Apache-2.0
"""Modules of a vision transformer that drops, weighs or merges tokens.

They have parameters, but no buffers and no state that a call leaves behind. Policies, sizes and
token maps are arguments and results.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from . import TokenMap, _checks, match, merge, merge_wavg, policy_attention
from .compat.dynamicvit import masked_mean

POLICY_GRADS = ("exact", "kept", "none")
REDUCTIONS = ("wavg", "mean")


class PolicyAttention(nn.Module):
    """Multi-head self-attention whose keys carry weights: a keep policy, a token size, or both.

    A packed projection to queries, keys and values, :func:`tokenops.policy_attention`, and a
    projection of the heads' outputs; names and layout of the parameters are those of timm's ViT.

    Args:
        dim: Channels C.
        num_heads: Heads H, a divisor of ``dim``.
        qkv_bias: Whether the packed projection has a bias.
        eps: Weight of the values' mean; 1e-6 is DynamicViT's.
        policy_grad: Gradient of the policy, as in :func:`tokenops.policy_attention`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If ``num_heads`` does not divide ``dim``, or a value does not fit.

    Example:
        >>> import torch
        >>> from tokenops.layers import PolicyAttention
        >>> attention, x = PolicyAttention(32, num_heads=4), torch.randn(1, 5, 32)
        >>> attention(x, torch.ones(1, 5), queries=torch.tensor([0, 3]))[0].shape
        torch.Size([1, 2, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        eps: float = 0.0,
        policy_grad: str = "exact",
    ) -> None:
        super().__init__()
        name = "PolicyAttention"
        dim = _checks.check_int(name, "dim", dim, minimum=1)
        num_heads = _checks.check_int(name, "num_heads", num_heads, minimum=1)
        if dim % num_heads != 0:
            raise _checks.value_error(name, "num_heads", f"a divisor of dim = {dim}", num_heads)
        _checks.check_choice(name, "policy_grad", policy_grad, POLICY_GRADS)
        self.num_heads = num_heads
        self.eps = eps
        self.policy_grad = policy_grad
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        policy: Tensor | None = None,
        *,
        size: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        queries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of all tokens, or of some of them, to all tokens.

        Args:
            x: Tokens ``[B, N, C]``.
            policy: ``[B, N]``, ``[B, N, 1]`` or ``[B, H, N]``, bool or floating, at least 0. A
                token always attends to itself.
            size: Number of patches in each token, ``[B, N]`` or ``[B, N, 1]``.
            key_padding_mask: Bool ``[B, N]``, true for padding.
            queries: int32 or int64 ``[Nq]`` or ``[B, Nq]``: only these tokens attend, and only they
                are projected to queries. The tokens that ``prune`` kept are
                ``token_map.members[:, :token_map.num_tokens]``. A negative index is padding, whose
                output row is undefined.

        Returns:
            ``[B, N, C]``, or ``[B, Nq, C]`` with ``queries``; and the keys ``[B, H, N, D]``, the
            metric for merging tokens.

        Raises:
            TypeError: If an argument has a wrong type or dtype.
            ValueError: If a shape, device or value does not fit.

        Note:
            Differentiable in ``x``, ``policy``, ``size`` and the parameters.
        """
        _checks.check_floating("PolicyAttention", "x", x, dims=(3,))
        if queries is None:
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = self._project(x, queries)
        out = policy_attention(
            *(q, k, v, policy),
            size=size,
            key_padding_mask=key_padding_mask,
            query_position=queries,
            eps=self.eps,
            policy_grad=self.policy_grad,
        )
        return self.proj(out.transpose(1, 2).flatten(2)), k

    def _project(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project some tokens to queries, and all tokens to keys and values."""
        (to_q, to_kv), bias = self.qkv.weight.tensor_split((x.shape[2],)), self.qkv.bias
        q_bias, kv_bias = (None, None) if bias is None else bias.tensor_split((x.shape[2],))
        q = linear(_rows(x, queries), to_q, q_bias).unflatten(2, (self.num_heads, -1))
        kv = linear(x, to_kv, kv_bias).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)
        return q.transpose(1, 2), k, v


class PolicyBlock(nn.Module):
    """A transformer block with :class:`PolicyAttention`: ``x + attention``, then ``x + MLP``.

    Both are preceded by a layer norm, as in ViT. :meth:`attend` and :meth:`feed` are the two halves
    of the block, between which tokens can be merged or dropped.

    Args:
        dim: Channels C.
        num_heads: Heads H, a divisor of ``dim``.
        mlp_ratio: Width of the MLP's hidden layer in multiples of ``dim``.
        qkv_bias: Whether the packed projection has a bias.
        eps: As in :class:`PolicyAttention`.
        policy_grad: As in :class:`PolicyAttention`.

    Example:
        >>> import torch
        >>> from tokenops.layers import PolicyBlock
        >>> PolicyBlock(32, num_heads=4)(torch.randn(1, 5, 32), torch.ones(1, 5)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        eps: float = 0.0,
        policy_grad: str = "exact",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PolicyAttention(dim, num_heads, qkv_bias, eps=eps, policy_grad=policy_grad)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self,
        x: Tensor,
        policy: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        **weights: Tensor | None,
    ) -> Tensor:
        """The tokens after the block, ``[B, N, C]``, or ``[B, Nq, C]`` with ``queries``.

        Arguments as in :class:`PolicyAttention`; ``size`` and ``key_padding_mask`` are ``weights``.
        With ``queries`` only the rows of these tokens are computed: all other tokens are keys, but
        are not updated.
        """
        return self.feed(self.attend(x, policy, queries=queries, **weights)[0])

    def attend(
        self,
        x: Tensor,
        policy: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        **weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attention and residual, and the keys, which are the metric of :class:`MergeStep`."""
        out, keys = self.attn(self.norm1(x), policy, queries=queries, **weights)
        return (x if queries is None else _rows(x, queries)) + out, keys

    def feed(self, x: Tensor) -> Tensor:
        """MLP and residual."""
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class KeepPredictor(nn.Module):
    """Log-probabilities of keeping and of dropping each token.

    Half of the features come from the token itself, half are the mean over the kept tokens of the
    image; without kept tokens the mean is 0, not NaN.

    Args:
        dim: Channels C.

    Example:
        >>> import torch
        >>> from tokenops.layers import KeepPredictor
        >>> KeepPredictor(32)(torch.randn(1, 5, 32)).exp().sum(-1).round(decimals=4).tolist()
        [[1.0, 1.0, 1.0, 1.0, 1.0]]

    References:
        The prediction module of DynamicViT (Rao et al., NeurIPS 2021, section 3.2).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        dim = _checks.check_int("KeepPredictor", "dim", dim, minimum=2)
        half = dim // 2
        self.norm = nn.LayerNorm(dim)
        self.local = nn.Sequential(nn.Linear(dim, half), nn.GELU())
        self.context = nn.Sequential(nn.Linear(dim, half), nn.GELU())
        self.decide = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 2))

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """Predict for each token; leave out the prefix.

        Args:
            x: Tokens ``[B, N, C]``.
            policy: ``[B, N]`` or ``[B, N, 1]``, share of each token that is kept so far; 1 if None.

        Returns:
            ``[B, N, 2]``: log-probability of keeping (index 0) and of dropping (index 1), as
            :func:`tokenops.gumbel_keep` takes them.

        Note:
            Differentiable in ``x``, ``policy`` and the parameters.
        """
        _checks.check_floating("KeepPredictor", "x", x, dims=(3,))
        x = self.norm(x)
        context = self.context(x)
        policy = torch.ones_like(context[..., 0]) if policy is None else policy
        mean = masked_mean(context, policy).expand_as(context)
        seen = torch.cat([self.local(x), mean], dim=2)
        return self.decide(seen).log_softmax(-1)  # type: ignore[no-any-return]


class MergeStep(nn.Module):
    """Merge the ``r`` most similar tokens, between the halves of a block.

    It has no parameters. ToMe evaluates with ``reduce="wavg"`` and passes the sizes to attention;
    for training, its authors advise the plain mean (ToMe issue #13) and no sizes in attention.

    Args:
        r: Tokens to merge away, clamped to the number of sources.
        num_prefix: Leading tokens (class, distillation, registers) that never merge.
        order: ``"position"`` or ``"tome"``, as in :func:`tokenops.match`.
        reduce: ``"wavg"``: tokens count by their size; ``"mean"``: each token counts once.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a number is negative or ``reduce`` unknown.

    Example:
        >>> import torch
        >>> from tokenops.layers import MergeStep
        >>> x, size, token_map = MergeStep(2)(torch.randn(1, 5, 8), torch.randn(1, 5, 4))
        >>> x.shape, size.sum().item()
        (torch.Size([1, 3, 8]), 5.0)

    References:
        ToMe (Bolya et al., ICLR 2023, section 3).
    """

    def __init__(
        self, r: int, *, num_prefix: int = 0, order: str = "position", reduce: str = "wavg"
    ) -> None:
        super().__init__()
        _checks.check_choice("MergeStep", "reduce", reduce, REDUCTIONS)
        self.r = _checks.check_int("MergeStep", "r", r)
        self.num_prefix = _checks.check_int("MergeStep", "num_prefix", num_prefix)
        self.order, self.reduce = order, reduce

    def forward(
        self, x: Tensor, metric: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor, TokenMap]:
        """Merge the tokens that are most similar by ``metric``.

        Args:
            x: Tokens ``[B, N, C]``.
            metric: ``[B, N, D]``, or keys ``[B, H, N, D]``, which are averaged over heads.
            size: Number of patches in each token, ``[B, N]`` or ``[B, N, 1]``; ones if None.

        Returns:
            Tokens ``[B, M, C]``, sizes ``[B, M, 1]``, and the map of N to M tokens.

        Note:
            Differentiable in ``x``, and in ``size`` through the returned sizes and, if ``reduce``
            is ``"wavg"``, the returned tokens.
        """
        token_map = match(metric, self.r, num_prefix=self.num_prefix, order=self.order)
        if self.reduce == "wavg":
            return *merge_wavg(x, token_map, size), token_map
        if size is None:
            size = torch.ones(x.shape[:2], device=x.device)
        counts = size.float().reshape(*x.shape[:2], 1)  # half dtypes cannot hold large counts
        return merge(x, token_map), merge(counts, token_map, reduce="sum"), token_map


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, R, C]`` of ``x``; row 0 where the index is negative."""
    name = "PolicyAttention"
    _checks.check_index(name, "queries", index, dims=(1, 2))
    batch, tokens, channels = x.shape
    _checks.check_shape(name, "queries", index, [(index.shape[-1],), (batch, index.shape[-1])])
    _checks.check_same_device(name, "queries", index, x)
    if _checks.values_visible(index) and not _checks.holds((index < tokens).all()):
        got = f"a maximum of {int(index.max())}"
        raise _checks.value_mismatch(name, "queries", f"below the {tokens} tokens of x", got)
    index = index.clamp(0, max(tokens - 1, 0)).long().expand(batch, -1)
    return x.gather(1, index[..., None].expand(-1, -1, channels))
