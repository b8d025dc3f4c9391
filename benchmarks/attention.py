# SPDX-License-Identifier: Apache-2.0
"""Workloads of attention: with a keep policy, with token sizes, and the scores that keys receive.

Forward, or forward and backward together: a step runs the operator and takes the gradients of
queries, keys and values, and of the policy where it has one. The class token is always kept, and
sizes have no gradient, as in the models.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenops

from . import rivals
from .cases import Work, compiled, generator, use_reference
from .merging import relative
from .timing import Rival

#: Largest difference, relative to the largest entry, up to which a rival counts as doing the same.
#: The recipes round attention maps to the type of the data, and a logarithm of a policy needs a
#: number above 0 to start from.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

#: Who attends to all keys as if there were no weights; no gradient reaches the policy.
UNWEIGHTED = ("sdpa", "unweighted")

#: A function of q, k, v and the keys' weights.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a case of attention.

    Attributes:
        batch: Images B.
        heads: Heads H.
        tokens: Tokens N, queries as well as keys.
        width: Width D of a head.
        weights: ``"soft"``: a policy between 0 and 1; ``"hard"``: one of 0 and 1; ``"size"``: sizes
            of tokens. Scores: ``"class"``: those that the class token gives; ``"last"``: those
            of the last queries; ``"columns"``: those of all queries, each with a weight.
        keep: Share of the tokens that a hard policy keeps.
        eps: As in ``policy_attention``.
        policy_grad: As in ``policy_attention``.
        packed: Whether q, k and v are views of a packed qkv [B, N, 3, H, D].
        key_heads: Heads of keys and values that heads share; 0: each has its own.
        rows: Queries that count where these are the last ones.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    weights: str = "soft"
    keep: float = 1.0
    eps: float = 0.0
    policy_grad: str = "exact"
    packed: bool = False
    key_heads: int = 0
    rows: int = 1

    def describe(self, letter: str) -> str:
        """Sizes in words; ``letter`` stands for the width."""
        heads = f"H{self.heads}/{self.key_heads}" if self.key_heads else f"H{self.heads}"
        words = [f"B{self.batch}", heads, f"N{self.tokens}", f"{letter}{self.width}"]
        special = {"hard": f"keep {self.keep:g}", "last": f"last {self.rows}"}
        words.append(special.get(self.weights, self.weights))
        words += [f"eps {self.eps:g}".replace("e-0", "e-")] if self.eps else []
        words += ["packed qkv"] if self.packed else []
        words += [f"policy_grad {self.policy_grad}"] if self.policy_grad != "exact" else []
        return " ".join(words)

    def tiny(self) -> AttentionShape:
        """Sizes of the same kind that take no time."""
        heads, key_heads = (4, 2) if self.key_heads else (2, 0)
        rows = min(self.rows, 3)
        return replace(
            self, batch=2, heads=heads, key_heads=key_heads, rows=rows, tokens=17, width=16
        )

    @property
    def counted(self) -> slice:
        """Queries whose attention is counted in scores."""
        if self.weights == "class":
            return slice(0, 1)
        return slice(self.tokens - self.rows if self.weights == "last" else 0, self.tokens)

    @property
    def kept(self) -> int:
        """Number of keys with a weight above 0."""
        return round(self.keep * self.tokens) if self.weights == "hard" else self.tokens

    @property
    def skips_exactly(self) -> bool:
        """Whether dropped keys take no part at all: a case about the work that this avoids."""
        return self.weights == "hard" and self.eps == 0

    def forward_flops(self) -> int:
        """Least work forward: logits, of all keys where eps wants their maximum, and values."""
        logits = self.tokens if self.eps > 0 else self.kept
        return self._products(logits + self.kept)

    def backward_flops(self) -> int:
        """Least work backward in memory linear in N.

        Logits once more and products of gradients and values, of all keys where the policy has an
        exact gradient; then the gradients of q, k and v, of kept keys.
        """
        columns = self.tokens if self.policy_grad == "exact" else self.kept
        return self._products(2 * columns + 3 * self.kept)

    def score_flops(self) -> int:
        """Least work of scores: the logits of the rows that count."""
        rows = self.counted.stop - self.counted.start
        return 2 * self.batch * self.heads * rows * self.tokens * self.width

    def _products(self, columns: int) -> int:
        return 2 * self.batch * self.heads * self.tokens * columns * self.width


def make_heads(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, D]: contiguous, or views of a packed qkv."""
    size = (shape.batch, shape.tokens, 3, shape.heads, shape.width)
    qkv = torch.randn(size, generator=generator(device), device=device).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if shape.key_heads:
        k, v = k[:, : shape.key_heads], v[:, : shape.key_heads]
    return (q, k, v) if shape.packed else (q.contiguous(), k.contiguous(), v.contiguous())


def make_weights(shape: AttentionShape, device: torch.device) -> Tensor:
    """Weights of keys, or of queries, [B, N] in float32."""
    random = generator(device)
    rows = (shape.batch, shape.tokens)
    if shape.weights == "size":
        return torch.randint(1, 5, rows, generator=random, device=device).float()
    weights = torch.rand(rows, generator=random, device=device)
    if shape.weights == "hard":
        weights[:, 0] = 1  # above all others: the class token
        best = weights.topk(shape.kept, dim=1).indices
        return torch.zeros_like(weights).scatter_(1, best, 1.0)
    return weights


def _attend(shape: AttentionShape, device: torch.device) -> dict[str, Callable[[], Attend]]:
    """What makes each rival's function of q, k, v and the keys' weights."""
    own = torch.eye(shape.tokens, device=device)
    diagonal = own.bool()

    def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
        if shape.weights == "size":
            return tokenops.policy_attention(q, k, v, size=w)
        eps, policy_grad = shape.eps, shape.policy_grad
        return tokenops.policy_attention(q, k, v, w, eps=eps, policy_grad=policy_grad)

    def eager(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        if shape.weights == "size":
            return rivals.attention_with_size(q, k, v, w)
        return rivals.attention_with_policy(q, k, v, w, own, shape.eps)

    def biased(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        bias = rivals.size_bias(w) if shape.weights == "size" else rivals.policy_bias(w, diagonal)
        bias = bias.to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1)  # [B, H, N, N]
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    made: dict[str, Callable[[], Attend]] = {
        "tokenops": lambda: ours,
        "reference": lambda: ours,
        "eager": lambda: eager,
        "compile": lambda: compiled(eager),
        "flex": rivals.flex_with_policy,
        "sdpa+bias": lambda: biased,
        "sdpa": lambda: lambda q, k, v, w: scaled_dot_product_attention(q, k, v),
        "unweighted": lambda: lambda q, k, v, w: tokenops.policy_attention(q, k, v),
    }
    left_out = set()
    if shape.weights == "size" or shape.skips_exactly:
        left_out.add("flex")
    if shape.skips_exactly:
        left_out.add("compile")
    return {name: make for name, make in made.items() if name not in left_out}


def _context(name: str) -> Callable[[], AbstractContextManager[Any]]:
    return use_reference if name == "reference" else nullcontext


def _difference(name: str, result: Any, expected: Any) -> float:
    """The largest among the results of a call."""
    if isinstance(expected, Tensor):
        result, expected = (result,), (expected,)
    return max(relative(a, b) for a, b in zip(result, expected, strict=True))


def setup_attention(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of ``policy_attention``."""
    q, k, v = make_heads(shape, dtype, device)
    weights = make_weights(shape, device)

    def rival(name: str, make: Callable[[], Attend]) -> Rival:
        attend = make()
        return Rival(lambda: attend(q, k, v, weights), _context(name))

    return Work(
        rivals={n: partial(rival, n, make) for n, make in _attend(shape, device).items()},
        bytes=4 * q.numel() * q.element_size() + weights.numel() * weights.element_size(),
        flops=shape.forward_flops(),
        difference=_difference,
        tolerance=TOLERANCE[dtype],
        tensor=q,
    )


def setup_attention_step(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of ``policy_attention`` forward and backward."""
    q, k, v = (t.requires_grad_() for t in make_heads(shape, dtype, device))
    weights = make_weights(shape, device)
    learned = shape.weights != "size" and shape.policy_grad != "none"
    weights.requires_grad_(learned)
    flow = torch.randn(q.shape, generator=generator(device), device=device).to(dtype)
    if shape.packed:  # the next layer joins heads, and so does its gradient
        flow = flow.transpose(1, 2).contiguous().transpose(1, 2)

    def rival(name: str, make: Callable[[], Attend]) -> Rival:
        attend = make()
        leaves = (q, k, v, weights) if learned and name not in UNWEIGHTED else (q, k, v)

        def step() -> tuple[Tensor, ...]:
            out = attend(q, k, v, weights)
            return (out.detach(), *torch.autograd.grad(out, leaves, flow))

        return Rival(step, _context(name))

    made = _attend(shape, device)
    if device.type == "cpu":
        made.pop("flex", None)  # it has no backward there
    moved = 12 * q.numel() * q.element_size()
    return Work(
        rivals={n: partial(rival, n, make) for n, make in made.items()},
        bytes=moved + 3 * weights.numel() * weights.element_size(),
        flops=shape.forward_flops() + shape.backward_flops(),
        difference=_difference,
        tolerance=TOLERANCE[dtype],
        tensor=q,
        inference=False,
    )


def setup_scores(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Work:
    """Work of ``attention_scores``."""
    q, k, v = make_heads(shape, dtype, device)
    weights = make_weights(shape, device)
    counted = shape.counted
    rows = range(counted.start, counted.stop)
    columns = shape.weights == "columns"

    def ours() -> Tensor:
        if columns:
            return tokenops.attention_scores(q, k, query_weight=weights)
        return tokenops.attention_scores(q, k, query_index=rows)

    def recipe(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Rival:
        if columns:
            function = make(rivals.attention_received)
            return Rival(lambda: function(q, k, weights))
        function = make(rivals.attention_of_rows)
        return Rival(lambda: function(q[:, :, counted], k))

    made = {
        "tokenops": lambda: Rival(ours),
        "reference": lambda: Rival(ours, use_reference),
        "eager": lambda: recipe(lambda function: function),
        "compile": lambda: recipe(compiled),
    }
    if columns:  # it attends from all queries, too
        made["sdpa"] = lambda: Rival(lambda: scaled_dot_product_attention(q, k, v))
    elements = len(rows) * q[0, :, 0].numel() + k[0].numel()
    return Work(
        rivals=made,
        bytes=shape.batch * (elements * q.element_size() + 4 * shape.tokens),
        flops=shape.score_flops(),
        difference=_difference,
        tolerance=TOLERANCE[dtype],
        tensor=q,
    )
