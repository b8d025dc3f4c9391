# SPDX-License-Identifier: Apache-2.0
"""The examples: token dropping in the training example, and the rivals of the demo."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tokenops

EXAMPLES = Path(__file__).parents[1] / "examples"
REMOVING = ("gather", "probe", "random")


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    import train_dynamicvit

    yield train_dynamicvit
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def model(example):
    torch.manual_seed(0)
    model = example.SparseViT(6, 24, 3, 4, (1, 3)).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def images(batch: int = 3, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 1, side, side, dtype=torch.float64, generator=generator)


def test_keeping_all_is_the_dense_model(model):
    expected = model(images()).logits
    for mode in REMOVING:
        output = model(images(), mode, 1.0)
        torch.testing.assert_close(output.logits, expected)
        assert [m.num_tokens for m in output.maps] == [37, 37]
    torch.testing.assert_close(model.merged(images(), 0, "wavg").logits, expected)
    torch.testing.assert_close(model.merged(images(), 0, "mean").logits, expected)


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.1])
def test_probing_and_removing_give_the_same(model, ratio):
    probed, removed = model(images(), "probe", ratio), model(images(), "gather", ratio)
    torch.testing.assert_close(probed.logits, removed.logits)
    counts = [1 + math.ceil(ratio * 36), 1 + math.ceil(ratio**2 * 36)]
    assert [m.num_tokens for m in removed.maps] == counts
    for one, other in zip(probed.maps, removed.maps, strict=True):
        assert torch.equal(one.assign, other.assign)
    for output in (probed, removed):
        assert [d.shape[1] + 1 for d in output.decisions] == counts
        assert all((decision == 1).all() for decision in output.decisions)


def test_masking_ignores_dropped_tokens(model):
    """Masking tokens gives the same class token as removing them."""
    torch.manual_seed(3)
    output = model(images(1), "mask", 0.5)
    first, second = (d[0, :, 0].detach() for d in output.decisions)
    assert set(first.tolist()) == set(second.tolist()) == {0.0, 1.0}
    assert (second <= first).all()
    x = model.tokens(images(1))
    for layer, block in enumerate(model.blocks):
        if layer in model.stages:
            kept = (first if layer == 1 else second).bool()
            alive = kept if layer == 1 else kept[first.bool()]
            x = torch.cat([x[:, :1], x[:, 1:][:, alive]], dim=1)
        x = block(x)
    torch.testing.assert_close(output.logits, model.head(model.norm(x[:, 0])))


@pytest.mark.parametrize("mode", ["mask", "gather", "probe"])
def test_predictors_learn_in_each_mode(example, model, mode):
    torch.manual_seed(3)
    output = model(images(), mode, 0.5)
    example.loss_of(output, torch.arange(3)).backward()
    for predictor in model.predictors:
        assert all(p.grad.isfinite().all() for p in predictor.parameters())
        assert any((p.grad != 0).any() for p in predictor.parameters())


@pytest.mark.parametrize("mode", ["gather", "probe"])
def test_gradient_of_dropped_tokens(model, mode):
    """Scores of dropped tokens have a gradient in mode probe, and none in mode gather."""
    scores = []
    model.predictors[0].register_forward_hook(lambda *call: scores.append(call[2]))
    output = model(images(), mode, 0.5)
    (grad,) = torch.autograd.grad(output.logits.square().sum(), scores[0])
    kept = output.maps[0].assign[:, 1:] >= 0
    assert (grad[kept][:, 0] != 0).all()
    assert (grad[~kept][:, 0] != 0).all() == (mode == "probe")


@pytest.mark.parametrize("mode", ["dense", "mask", "gather", "probe"])
def test_loss_asks_for_a_ratio_where_it_can_vary(example, model, mode):
    torch.manual_seed(3)
    output, labels = model(images(), mode, 0.5), torch.arange(3)
    plain = torch.nn.functional.cross_entropy(output.logits, labels, label_smoothing=0.1)
    extra = (example.loss_of(output, labels) - plain).item()
    wanted = [0.5, 0.25] if mode == "mask" else []
    shares = [d.mean(1).flatten() for d in output.decisions]
    terms = [(share - r).square().mean().item() for share, r in zip(shares, wanted, strict=False)]
    assert extra == pytest.approx(10 * sum(terms) / 2)
    assert (extra > 0) == (mode == "mask")


@pytest.mark.parametrize("reduce", ["mean", "wavg"])
def test_merging_counts(model, reduce):
    output = model.merged(images(), 8, reduce)
    assert [m.num_tokens for m in output.maps] == [29, 21, 13, 7]
    for token_map in output.maps:
        assert (token_map.assign[:, 0] == 0).all()
        assert token_map.assign[:, 1:].ge(1).all()  # nothing merges with the class token


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("with_policy", [True, False])
def test_eager_attention_is_the_same_attention(example, eps, with_policy):
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64, generator=generator)
    policy = torch.rand(2, 9, 1, dtype=torch.float64, generator=generator) if with_policy else None
    inputs = [t.requires_grad_() for t in (q, k, v, policy) if t is not None]
    outcomes = []
    for attention in (example.eager_attention, tokenops.policy_attention):
        out = attention(q, k, v, policy, eps=eps)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*outcomes)


def test_shifted_moves_each_image_by_a_pixel_at_most(example):
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8)
    moved = example.shifted(image.expand(60, -1, -1, -1))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))[0, 0]
    places = {
        (y, x)
        for one in moved[:, 0]
        for y in range(3)
        for x in range(3)
        if torch.equal(one, padded[y : y + 8, x : x + 8])
    }
    assert moved.shape == (60, 1, 8, 8)
    assert len(places) == 9


def test_training_learns_and_repeats(example):
    budget = example.Budget(images=96, test=32)
    digits = example.load(0, budget)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = example.SparseViT(8, 24, 2, 2, (1,))
        before = example.loss_of(model(digits.train_images), digits.train_labels).item()
        forward = lambda x, model=model: model(x, "gather", 0.5)  # noqa: E731
        epochs = list(example.train(model, forward, digits, 12, 5e-3, 1.0))
        after = example.loss_of(model(digits.train_images), digits.train_labels).item()
        assert len(epochs) == 12
        assert after < before
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_splits_do_not_overlap(example):
    digits = example.load(0, example.Budget())
    assert len(digits.train_labels) == 1347
    assert len(digits.labels) == 450
    rows = torch.cat([digits.train_images, digits.images]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert not torch.equal(example.load(1, example.Budget()).labels, digits.labels)


def test_the_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "--quick", "--out", str(tmp_path)])
    example.main()
    printed = capsys.readouterr().out
    for words in ("| keep ratio |", "| merging ", "| mask, tokenops ", "| probe, tokenops "):
        assert words in printed
    assert (tmp_path / "kept_tokens.png").read_bytes().startswith(b"\x89PNG")


# ---- the demo's rivals ----


@pytest.fixture
def merging_vit():
    """A small vision transformer as in the demo, and the rivals of the demo."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        image_size=20, patch_size=4,
    )  # fmt: skip
    sys.path.insert(0, str(EXAMPLES))
    import rivals

    yield transformers.ViTModel(config, add_pooling_layer=False).eval(), rivals
    sys.path.remove(str(EXAMPLES))


@torch.inference_mode()
def test_the_bound_attends_as_the_merging_model_does(merging_vit, monkeypatch):
    from tokenops.integrations.transformers import apply_patch

    model, rivals = merging_vit
    pixels, attended = torch.rand(2, 3, 20, 20), []
    original = tokenops.policy_attention

    def counting(q, *tensors, **options):
        attended.append((q.shape[2], options["size"].shape[1]))
        return original(q, *tensors, **options)

    counts = {}
    for name in ("tokenops", "bound"):
        attended.clear()
        runs = copy.deepcopy(model)
        if name == "tokenops":
            monkeypatch.setattr("tokenops.integrations.transformers.policy_attention", counting)
            apply_patch(runs, [4, 4, 4])
        else:
            monkeypatch.setattr(tokenops, "policy_attention", counting)
            object.__setattr__(runs, "vit", runs)
            rivals.replace_layers(runs, rivals.slicing, [4, 4, 4])
        left = runs(pixels).last_hidden_state.shape[1]
        counts[name] = [left, *attended]
    assert counts["tokenops"] == counts["bound"] == [14, (22, 22), (18, 18)]


@torch.inference_mode()
def test_eager_tome_is_what_tokenops_merges(merging_vit):
    from tokenops.integrations.transformers import apply_patch

    model, rivals = merging_vit
    pixels = torch.rand(2, 3, 20, 20)
    eager, merged = copy.deepcopy(model), copy.deepcopy(model)
    object.__setattr__(eager, "vit", eager)
    rivals.replace_layers(eager, rivals.eager_tome, [4, 4, 4])
    apply_patch(merged, [4, 4, 4])
    expected = eager(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(merged(pixels).last_hidden_state[:, 0], expected)
