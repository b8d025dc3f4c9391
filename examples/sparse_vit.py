# SPDX-License-Identifier: Apache-2.0
"""A small ViT with keep predictors, or with token merging.

The methods ``mask``, ``gather`` and ``probe`` drop tokens in the three modes of training;
docs/policy-gradient.md defines the gradient of each mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenops import TokenMap, gumbel_keep, merge, prune, topk_keep
from tokenops.layers import KeepPredictor, MergeStep, PolicyBlock


class Output(NamedTuple):
    logits: Tensor  # [B, classes]
    decisions: list[Tensor]  # of each stage, [B, patches, 1], 1 for kept tokens
    maps: list[TokenMap]  # of each stage or merging layer; empty in mode mask


class SparseViT(nn.Module):
    """A ViT on the pixels of an image, with a predictor before each layer in ``stages``.

    With a keep ratio of p, stage s = 1, 2, ... keeps ``p ** s`` of all patches, as in DynamicViT.
    """

    def __init__(
        self,
        side: int,
        dim: int,
        heads: int,
        layers: int,
        stages: tuple[int, ...],
        mlp_ratio: float = 2.0,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches, self.stages = side * side, stages
        self.embed = nn.Conv2d(1, dim, 3, padding=1)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, self.patches, dim))
        self.blocks = nn.ModuleList(PolicyBlock(dim, heads, mlp_ratio) for _ in range(layers))
        self.predictors = nn.ModuleList(KeepPredictor(dim) for _ in stages)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, pixels: Tensor, mode: str = "dense", ratio: float = 1.0) -> Output:
        """Classify images [B, 1, side, side]; ``mode``: dense, random, mask, gather or probe."""
        x, policy = self.tokens(pixels), None
        decisions, maps = [], []
        for layer, block in enumerate(self.blocks):
            if mode == "dense" or layer not in self.stages:
                x = block(x, policy)
                continue
            stage = self.stages.index(layer)
            predictor = self.predictors[stage]
            if mode == "mask":
                x, policy = self.mask(block, predictor, x, policy)
            else:
                keep = math.ceil(ratio ** (stage + 1) * self.patches)
                decision, kept = self.choose(predictor, x, policy, keep, mode == "random")
                drop = self.probe if mode == "probe" else self.gather
                x, policy = drop(block, x, decision, kept), merge(decision, kept)
                maps.append(kept)
            decisions.append(policy[:, 1:])
        return Output(self.head(self.norm(x[:, 0])), decisions, maps)

    def tokens(self, pixels: Tensor) -> Tensor:
        patches = self.embed(pixels).flatten(2).mT + self.position
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)

    def mask(
        self, block: PolicyBlock, predictor: KeepPredictor, x: Tensor, policy: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """All tokens stay; attention ignores dropped tokens, whose number is random."""
        before = None if policy is None else policy[:, 1:]
        decision = gumbel_keep(predictor(x[:, 1:], before), before)
        policy = pad(decision, (0, 0, 1, 0), value=1.0)  # the class token stays
        return block(x, policy), policy

    def choose(
        self, predictor: KeepPredictor, x: Tensor, policy: Tensor | None, keep: int, blindly: bool
    ) -> tuple[Tensor, TokenMap]:
        """The policy [B, N, 1] of the remaining tokens, and the map to the kept tokens."""
        patches = x[:, 1:]
        scores = torch.rand(patches.shape[:2]) if blindly else predictor(patches)[..., 0].exp()
        scores = pad(scores, (1, 0))
        decision = topk_keep(scores, keep, num_prefix=1)
        decision = decision if policy is None else decision * policy
        return decision, prune(scores, keep, num_prefix=1)

    def gather(self, block: PolicyBlock, x: Tensor, policy: Tensor, kept: TokenMap) -> Tensor:
        """Remove dropped tokens; the policy of kept tokens is 1 and has a gradient."""
        return block(merge(x, kept), merge(policy, kept))

    def probe(self, block: PolicyBlock, x: Tensor, policy: Tensor, kept: TokenMap) -> Tensor:
        """Dropped tokens are keys in this layer only, so their policy has a gradient too."""
        return block(x, policy, queries=kept.members[:, : kept.num_tokens])

    def merged(self, pixels: Tensor, r: int, reduce: str) -> Output:
        """Logits if each layer merges ``r`` tokens to their mean, or mean weighted by size."""
        step = MergeStep(r, num_prefix=1, reduce=reduce)
        x, size, maps = self.tokens(pixels), None, []
        for block in self.blocks:
            x, keys = block.attend(x, size=size if reduce == "wavg" else None)
            x, size, token_map = step(x, keys, size)
            x = block.feed(x)
            maps.append(token_map)
        return Output(self.head(self.norm(x[:, 0])), [], maps)
