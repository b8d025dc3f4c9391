# SPDX-License-Identifier: Apache-2.0
"""Trains a small ViT to classify digits, then to drop tokens: ``make train ARGS=...``.

A dense model is trained on scikit-learn's 8x8 digits, with a token for each pixel. Copies of it are
trained with keep predictors, in the three modes of docs/policy-gradient.md, and one copy with token
merging in every layer. All are tested with the tokens removed. Prints accuracies, and time and
memory of a training step beside the eager method; draws the kept pixels.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import measure
import torch
from kept_picture import draw
from sklearn.datasets import load_digits
from sparse_vit import Output, SparseViT
from table import print_columns
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

import tokenops

SIDE, STAGES = 8, (1, 3)
SMALL = {"side": SIDE, "dim": 48, "heads": 3, "layers": 5, "stages": STAGES}
#: For time and memory: the width of DeiT-Ti, and its number of patches for 384 x 384 pixels.
LARGE = {"side": 24, "dim": 192, "heads": 3, "layers": 4, "stages": STAGES, "mlp_ratio": 4.0}
#: The modes, with the factor of the predictors' learning rate. With random masks, slow predictors
#: stay undecided while the model adapts to random tokens. With a choice by rank, fast predictors
#: saturate: all scores become 1.
MODES = {"mask": 20.0, "gather": 5.0, "probe": 5.0}
RATIO = 0.5  # to train for
RATIOS = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)  # to test
MERGED = 10  # tokens in each layer
BATCH = 64
CPU = torch.device("cpu")

#: Computes the model's output for a batch of images.
Forward = Callable[[Tensor], Output]


class Digits(NamedTuple):
    """Images [n, 1, 8, 8] in [0, 1] and labels [n], to train on and to test with."""

    train_images: Tensor
    train_labels: Tensor
    images: Tensor
    labels: Tensor


class Budget(NamedTuple):
    """Numbers of training images, test images, epochs and timed runs."""

    images: int = 1347
    test: int = 450
    dense: int = 30
    sparse: int = 12
    repeats: int = 7


def main() -> None:
    options = parse_options()
    budget = Budget(2 * BATCH, BATCH, 1, 1, 1) if options.quick else Budget()
    digits = load(options.seed, budget)
    torch.manual_seed(options.seed)
    total = budget.dense + (len(MODES) + 1) * budget.sparse
    progress = tqdm(total=total, leave=False, unit="epoch", disable=None)  # None: terminals only

    def fit(
        model: SparseViT, forward: Forward, epochs: int, rate: float, faster: float = 1.0
    ) -> None:
        for _ in train(model, forward, digits, epochs, rate, faster):
            progress.update()
        model.eval()

    progress.set_description("dense")
    dense = SparseViT(**SMALL)
    fit(dense, dense, budget.dense, 2e-3)
    models = {}
    for mode, faster in MODES.items():
        progress.set_description(mode)
        model = models[mode] = copy.deepcopy(dense)
        fit(model, lambda x, m=model, mode=mode: m(x, mode, RATIO), budget.sparse, 1e-3, faster)
    progress.set_description("merging")
    merging = copy.deepcopy(dense)
    fit(merging, lambda x: merging.merged(x, MERGED, "mean"), budget.sparse, 1e-3)
    progress.close()

    trained, tested = len(digits.train_labels), len(digits.labels)
    print(f"{trained} training digits, {tested} test digits; ViT of {SMALL['layers']} layers,")
    print(f"{SIDE * SIDE} tokens and a class token; predictors before layers 2 and 4\n")
    print_ratios(dense, models, digits)
    print_merging(dense, merging, digits)
    picture = options.out / "kept_tokens.png"
    draw_kept(models, digits, picture)
    for name, config, batch in (("8 x 8 patches", SMALL, BATCH), ("24 x 24 patches", LARGE, 2)):
        if options.quick and config is LARGE:
            config, batch = {**LARGE, "layers": 2, "stages": (1,)}, 1
        print_steps(name, config, batch, budget.repeats)
    print("\nms: median of a step; peak MB: of its tensors; probe is against mask, eager")
    print(f"picture: {picture}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and training (0)")
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="(build/train)")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch each, to check that it runs"
    )
    return parser.parse_args()


def load(seed: int, budget: Budget) -> Digits:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.split((budget.test, len(order) - budget.test))
    train = train[: budget.images]
    return Digits(images[train], labels[train], images[test], labels[test])


def train(
    model: SparseViT, forward: Forward, digits: Digits, epochs: int, rate: float, faster: float
) -> Iterator[int]:
    """Train the model in place, predictors at ``faster`` times the rate; yield after each epoch."""
    predictors = list(model.predictors.parameters())
    known = {id(p) for p in predictors}
    rest = [p for p in model.parameters() if id(p) not in known]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": predictors}], weight_decay=0.05)
    batches = len(digits.train_labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [rate, faster * rate], total_steps=epochs * batches, pct_start=0.15
    )
    model.train()
    for epoch in range(epochs):
        for chosen in torch.randperm(len(digits.train_labels)).split(BATCH)[:batches]:
            images = shifted(digits.train_images[chosen])
            optimizer.zero_grad()
            loss_of(forward(images), digits.train_labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        yield epoch


def loss_of(output: Output, labels: Tensor) -> Tensor:
    """Cross entropy, plus the loss on the keep ratio where the ratio is random."""
    loss = cross_entropy(output.logits, labels, label_smoothing=0.1)
    if output.decisions and not output.maps:
        ratios = [RATIO ** (stage + 1) for stage in range(len(output.decisions))]
        loss = loss + 10 * tokenops.keep_ratio_loss(output.decisions, ratios)
    return loss


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to a pixel."""
    down, right = torch.randint(0, 3, (2, len(images), 1))
    rows = (down + torch.arange(SIDE))[:, :, None]  # [B, 8, 1]
    columns = (right + torch.arange(SIDE))[:, None]
    batch = torch.arange(len(images))[:, None, None]
    return pad(images, (1, 1, 1, 1))[batch, 0, rows, columns][:, None]


@torch.no_grad()
def accuracy(forward: Forward, digits: Digits) -> float:
    """Share of correctly classified test images, in percent."""
    right = forward(digits.images).logits.argmax(1) == digits.labels
    return 100 * right.float().mean().item()


def print_ratios(dense: SparseViT, models: dict[str, SparseViT], digits: Digits) -> None:
    """Accuracy of all models by the share of tokens that are kept."""
    torch.manual_seed(0)
    rows = [("keep ratio", "tokens by stage", "at random", *models)]
    unpruned = [accuracy(model, digits) for model in (dense, *models.values())]
    rows.append(("1", tokens_of(1.0), *(f"{value:.1f}" for value in unpruned)))
    for ratio in RATIOS:
        drawn = [accuracy(lambda x, p=ratio: dense(x, "random", p), digits) for _ in range(5)]
        of_models = (
            accuracy(lambda x, m=m, p=ratio: m(x, "gather", p), digits) for m in models.values()
        )
        cells = (f"{value:.1f}" for value in (statistics.mean(drawn), *of_models))
        rows.append((f"{ratio:g}", tokens_of(ratio), *cells))
    print_columns(rows)
    print("\nTest accuracy in percent with tokens removed: random tokens of the dense model, or")
    print(f"tokens chosen by the models that were trained for {RATIO:g} in each mode.\n")


def tokens_of(ratio: float) -> str:
    return ", ".join(str(1 + math.ceil(ratio**s * SIDE * SIDE)) for s in range(len(STAGES) + 1))


@torch.no_grad()
def print_merging(dense: SparseViT, merging: SparseViT, digits: Digits) -> None:
    """Accuracy with merging, of the dense model and of the model trained with merging."""
    left = merging.merged(digits.images[:1], MERGED, "mean").maps[-1].num_tokens
    runs = {
        "none": (dense, 1 + SIDE * SIDE),
        "mean by size, dense model": (lambda x: dense.merged(x, MERGED, "wavg"), left),
        "plain mean, trained model": (lambda x: merging.merged(x, MERGED, "mean"), left),
    }
    rows = [("merging", "tokens left", "accuracy")]
    for name, (run, tokens) in runs.items():
        rows.append((name, f"{tokens}", f"{accuracy(run, digits):.1f}"))
    print_columns(rows)
    print(f"\n{MERGED} tokens merged in each layer.")


@torch.no_grad()
def draw_kept(models: dict[str, SparseViT], digits: Digits, path: Path) -> None:
    """Draw the pixels that each model keeps of one test image of each digit."""
    chosen = torch.stack([(digits.labels == digit).nonzero()[0, 0] for digit in range(10)])
    images = digits.images[chosen]
    stages = {}
    for name, model in models.items():
        first, second = model(images, "gather", RATIO).maps
        both = second.compose(first)
        stage = (first.assign >= 0).int() + (both.assign >= 0)
        stages[name] = stage[:, 1:].reshape(-1, SIDE, SIDE).numpy()
    caption = (
        f"By mode of training: {RATIO:g} of the pixels kept after one layer (yellow: dropped), "
        f"{RATIO**2:g} after three (blue: dropped)"
    )
    draw(images[:, 0].numpy(), stages, path, caption)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, policy: Tensor | None, *, eps: float, **_: Any
) -> Tensor:
    """DynamicViT's attention in PyTorch operators, with its maps [B, H, N, N]."""
    logits = q @ k.mT / math.sqrt(q.shape[3])  # [B, H, N, N]
    tokens = q.shape[2]
    own = torch.eye(tokens)
    keep = torch.ones(1) if policy is None else policy.reshape(-1, 1, 1, tokens)
    keep = own + (1 - own) * keep
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * keep
    attention = (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps)
    return attention @ v


def print_steps(name: str, config: dict[str, Any], batch: int, repeats: int) -> None:
    """Time and memory of a training step by mode, with tokenops and with eager attention."""
    torch.manual_seed(0)
    model = SparseViT(**config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    images, labels = torch.rand(batch, 1, config["side"], config["side"]), torch.arange(batch) % 10

    def make_step(mode: str, eager: bool) -> Callable[[], None]:
        def step() -> None:
            attention = mock.patch("tokenops.layers.policy_attention", eager_attention)
            with attention if eager else nullcontext():
                optimizer.zero_grad()
                loss_of(model(images, mode, RATIO), labels).backward()
                optimizer.step()

        return step

    steps = {
        (mode, eager): make_step(mode, eager)
        for mode in MODES
        for eager in (True, False)
        if not (mode == "probe" and eager)  # the eager method has no probe
    }
    for step in steps.values():
        step()
    samples = measure.interleave(steps, repeats, CPU, lambda: None)
    rows = [("", "ms", "against eager", "peak MB", "against eager")]
    ms, peaks = {}, {}
    for mode, eager in steps:
        kept = measure.undisturbed(samples[mode, eager])
        ms[mode, eager] = 1e3 * statistics.median(s.seconds for s in kept)
        peaks[mode, eager] = measure.peak_bytes(steps[mode, eager], CPU) / 1e6
        base = (mode, True) if (mode, True) in ms else ("mask", True)
        rows.append(
            (
                f"{mode}, {'eager' if eager else 'tokenops'}",
                f"{ms[mode, eager]:.1f}",
                "" if eager else f"{ms[base] / ms[mode, eager]:.2f}x",
                f"{peaks[mode, eager]:.1f}",
                "" if eager else f"{peaks[base] / peaks[mode, eager]:.2f}x",
            )
        )
    print(f"\nA training step: {name}, {config['dim']} channels, batch {batch}")
    print_columns(rows)
    if min(sum(s.clean for s in one) for one in samples.values()) < 3:
        print("BUSY MACHINE: few undisturbed runs, so the least disturbed third")


if __name__ == "__main__":
    main()
