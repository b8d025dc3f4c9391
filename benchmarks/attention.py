# SPDX-License-Identifier: Apache-2.0
"""Cases of attention: with a keep policy, with token sizes, and the scores that keys receive.

Forward, or forward and backward together: a step runs the operator and takes the gradients of
queries, keys and values, and of the policy where it has one. The class token is always kept, and
sizes have no gradient, as in the models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import tokenops

from . import rivals
from .cases import Work, cases_of, generator, randn, recipes
from .timing import Call

#: Largest difference, relative to the largest entry, up to which a rival counts as doing the same.
#: The recipes round attention maps to the dtype of the data, and a policy of 0 has no logarithm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a case of attention."""

    batch: int  # images B
    heads: int  # heads H
    tokens: int  # tokens N, queries as well as keys
    width: int  # width D of a head
    #: "soft": a policy between 0 and 1; "hard": one of 0 and 1; "size": sizes of tokens. Of scores:
    #: "class": from the class token; "last": from the last queries; "columns": from all queries,
    #: each with a weight.
    weights: str = "soft"
    keep: float = 1.0  # share of the tokens that a hard policy keeps
    eps: float = 0.0  # as in policy_attention
    policy_grad: str = "exact"  # as in policy_attention
    packed: bool = False  # whether q, k and v are views of a packed qkv [B, N, 3, H, D]
    key_heads: int = 0  # heads of keys and values that heads share; 0: each has its own
    rows: int = 1  # number of the last queries

    def describe(self, letter: str) -> str:
        heads = f"{self.heads}/{self.key_heads}" if self.key_heads else self.heads
        special = {"hard": f"keep {self.keep:g}", "last": f"last {self.rows}"}
        text = f"B{self.batch} H{heads} N{self.tokens} {letter}{self.width}"
        text += f" {special.get(self.weights, self.weights)}"
        text += f" eps {self.eps:g}".replace("e-0", "e-") if self.eps else ""
        text += " packed qkv" if self.packed else ""
        return text + (f" policy_grad {self.policy_grad}" if self.policy_grad != "exact" else "")

    def tiny(self) -> AttentionShape:
        heads, key_heads = (4, 2) if self.key_heads else (2, 0)
        sizes = {"heads": heads, "key_heads": key_heads, "rows": min(self.rows, 3)}
        return replace(self, batch=2, tokens=17, width=16, **sizes)

    @property
    def counted(self) -> slice:
        """Queries that count in scores."""
        if self.weights == "class":
            return slice(0, 1)
        return slice(self.tokens - self.rows if self.weights == "last" else 0, self.tokens)

    @property
    def kept(self) -> int:
        """Number of keys with a weight above 0."""
        return round(self.keep * self.tokens) if self.weights == "hard" else self.tokens

    @property
    def skips_exactly(self) -> bool:
        """Whether dropped keys take no part at all: a case about the work that this saves."""
        return self.weights == "hard" and self.eps == 0

    def forward_flops(self) -> int:
        """Least work forward: logits, of all keys where eps needs their maximum, and values."""
        return self.products((self.tokens if self.eps > 0 else self.kept) + self.kept)

    def backward_flops(self) -> int:
        """Least work backward in memory linear in N.

        Logits once more and the products of gradients and values, of all keys for an exact gradient
        of the policy; then the gradients of q, k and v, of kept keys.
        """
        columns = self.tokens if self.policy_grad == "exact" else self.kept
        return self.products(2 * columns + 3 * self.kept)

    def products(self, columns: int) -> int:
        """FLOPs of the products [N, D] x [D, columns] of all heads."""
        return 2 * self.batch * self.heads * self.tokens * columns * self.width


def make_heads(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, D]: contiguous, or views of a packed qkv."""
    size = (shape.batch, shape.tokens, 3, shape.heads, shape.width)
    q, k, v = randn(size, dtype, device).permute(2, 0, 3, 1, 4)
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


def setup_attention(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, backward: bool = False
) -> Work:
    q, k, v = make_heads(shape, dtype, device)
    weights = make_weights(shape, device)
    by_size = shape.weights == "size"
    learned = backward and not by_size and shape.policy_grad != "none"
    grad = randn(tuple(q.shape), dtype, device)
    if shape.packed:  # the next layer joins heads, and so does its gradient
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    if backward:
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        weights.requires_grad_(learned)
    own = torch.eye(shape.tokens, device=device)
    diagonal = own.bool()

    def ours(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Any:
        if by_size:
            return tokenops.policy_attention(q, k, v, size=w)
        eps, policy_grad = shape.eps, shape.policy_grad
        return tokenops.policy_attention(q, k, v, w, eps=eps, policy_grad=policy_grad)

    def with_policy(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return rivals.attention_with_policy(q, k, v, w, own, shape.eps)

    def biased(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        log = rivals.log_size(w) if by_size else rivals.log_policy(w, diagonal)
        bias = log.to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1)  # [B, H, N, N]
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def timed(attend: Callable[..., Any], weighted: bool = True) -> Call:
        """A call with gradients of q, k and v, and of weights where they count and are learned."""
        arguments = (q, k, v, weights) if weighted else (q, k, v)
        leaves = arguments if learned else (q, k, v)
        if not backward:
            return lambda: attend(*arguments)

        def step() -> tuple[Tensor, ...]:
            out = attend(*arguments)
            return (out.detach(), *torch.autograd.grad(out, leaves, grad))

        return step

    made = {
        "tokenops": lambda: timed(ours),
        **recipes(rivals.attention_with_size if by_size else with_policy, timed),
        "flex": lambda: timed(rivals.flex_with_policy()),
        "sdpa+bias": lambda: timed(biased),
        "sdpa": lambda: timed(scaled_dot_product_attention, weighted=False),
        "unweighted": lambda: timed(tokenops.policy_attention, weighted=False),
    }
    if by_size or shape.skips_exactly or (backward and device.type == "cpu"):
        del made["flex"]  # it has no backward on the CPU
    if shape.skips_exactly:
        del made["compile"]
    passes = 3 if backward else 1
    return Work(
        rivals=made,
        bytes=passes * (4 * q.numel() * q.element_size() + 4 * weights.numel()),
        flops=shape.forward_flops() + (shape.backward_flops() if backward else 0),
        tolerance=TOLERANCE[dtype],
        tensor=q,
        inference=not backward,
    )


def setup_scores(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> Work:
    q, k, v = make_heads(shape, dtype, device)
    rows = range(shape.tokens)[shape.counted]
    made: dict[str, Callable[[], Call]] = {}
    if shape.weights == "columns":
        weights = make_weights(shape, device)
        made["tokenops"] = lambda: lambda: tokenops.attention_scores(q, k, query_weight=weights)
        made |= recipes(rivals.attention_received, lambda recipe: lambda: recipe(q, k, weights))
        # it attends from all queries, too
        made["sdpa"] = lambda: lambda: scaled_dot_product_attention(q, k, v)
    else:
        some = q[:, :, shape.counted]
        made["tokenops"] = lambda: lambda: tokenops.attention_scores(q, k, query_index=rows)
        made |= recipes(rivals.attention_of_rows, lambda recipe: lambda: recipe(some, k))
    elements = len(rows) * q[0, :, 0].numel() + k[0].numel()
    return Work(
        rivals=made,
        bytes=shape.batch * (elements * q.element_size() + 4 * shape.tokens),
        flops=shape.products(len(rows)),  # the logits of the rows that count
        tolerance=TOLERANCE[dtype],
        tensor=q,
    )


_EPS = 1e-6  # DynamicViT's
_VIT_B = AttentionShape(16, 12, 197, 64)
_VIT_L = AttentionShape(1, 16, 1025, 64)
_VIT_B_8 = replace(_VIT_B, batch=8)
_CPU = {
    "vit-b": replace(_VIT_B, eps=_EPS),
    "vit-l-512": replace(_VIT_L, eps=_EPS),
    "vit-b-packed": replace(_VIT_B, eps=_EPS, packed=True),
    "vit-b-hard": replace(_VIT_B, weights="hard", keep=0.5, eps=_EPS),
    "vit-l-512-hard": replace(_VIT_L, weights="hard", keep=0.5, eps=_EPS),
    "vit-b-size": replace(_VIT_B, weights="size"),
    "vit-l-512-size": replace(_VIT_L, weights="size"),
    "vit-b-keep70": replace(_VIT_B, weights="hard", keep=0.7),
    "vit-b-keep50": replace(_VIT_B, weights="hard", keep=0.5),
    "vit-b-keep35": replace(_VIT_B, weights="hard", keep=0.35),
    "vit-l-512-keep50": replace(_VIT_L, weights="hard", keep=0.5),
}
# Where tokens are removed, a hard policy needs no gradient.
_STEPS = {
    name + suffix: replace(shape, policy_grad=policy_grad)
    for name, shape in _CPU.items()
    for suffix, policy_grad in (("", "exact"), ("-none", "none"))
    if policy_grad == "exact" or shape.skips_exactly
}
_DECODERS = {
    "vit-b-8": _VIT_B_8,
    "vit-l-336": AttentionShape(1, 16, 577, 64),
    "llama-7b": AttentionShape(1, 32, 2048, 128),
    "qwen2-7b": AttentionShape(1, 28, 4096, 128, key_heads=4),
}
_LAST = {
    f"{name}-last{rows}": replace(shape, weights="last", rows=rows)
    for name, shape in _DECODERS.items()
    for rows in (1, 64)
}
_ON_REQUEST = {
    "vit-b-8": replace(_VIT_B_8, eps=_EPS),
    "vit-b-8-size": replace(_VIT_B_8, weights="size"),
}
_VIT_B_256, _VIT_L_32 = replace(_VIT_B, batch=256), replace(_VIT_L, batch=32)
_VLM = AttentionShape(8, 16, 2880, 64)
_CUDA = {
    "vit-b-256": replace(_VIT_B_256, eps=_EPS),
    "vit-l-512-32": replace(_VIT_L_32, eps=_EPS),
    "vit-b-256-size": replace(_VIT_B_256, weights="size"),
    "vit-l-512-32-size": replace(_VIT_L_32, weights="size"),
    "vlm-576": AttentionShape(32, 16, 576, 64),
    "vlm-2880": _VLM,
    "vlm-2880-keep50": replace(_VLM, weights="hard", keep=0.5),
}
_LARGE = {"n16384-10": AttentionShape(2, 10, 16384, 64, eps=_EPS)}
_TOO_LARGE = dict.fromkeys(
    ("reference", "eager", "compile", "sdpa+bias"),
    "not run: it stores several attention maps of 2.1 GB each in float32",
)


def _scored(name: str, shape: AttentionShape) -> dict[str, AttentionShape]:
    """Shapes of scores by the class token and by all queries."""
    return {f"{name}-{kind}": replace(shape, weights=kind) for kind in ("class", "columns")}


_forward = partial(cases_of, "policy_attention", setup_attention)
_step = partial(
    cases_of, "policy_attention_forward_backward", partial(setup_attention, backward=True)
)
_scores = partial(cases_of, "attention_scores", setup_scores)
_SCORED_L = _scored("vit-l-512", _VIT_L)

CASES = (
    *_forward(_CPU),
    *_step(_STEPS, {"vit-l-512": ("tokenops", "eager", "sdpa")}),
    *_step(
        {"n8192": AttentionShape(1, 8, 8192, 64, eps=_EPS)},
        {"n8192": ("tokenops", "sdpa")},
        skip=_TOO_LARGE,
    ),
    *_scores(_scored("vit-b", _VIT_B)),
    *_scores(_SCORED_L, dict.fromkeys(_SCORED_L, ("tokenops", "eager"))),
    *_scores(_LAST),
    *_forward(_ON_REQUEST, on_request=True),
    *_step(_ON_REQUEST, on_request=True),
    *_scores(_scored("vit-b-8", _VIT_B_8), on_request=True),
    *_forward(_CUDA, device="cuda"),
    *_forward(_LARGE, skip=_TOO_LARGE, device="cuda"),
    *_step(_CUDA, device="cuda"),
    *_step(_LARGE, skip=_TOO_LARGE, device="cuda"),
    *_scores({"vit-b-256-class": replace(_VIT_B_256, weights="class")}, device="cuda"),
    *_scores({"vlm-2880-columns": replace(_VLM, weights="columns")}, device="cuda"),
)
