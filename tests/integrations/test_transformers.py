# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

import tokenops
import tokenops.integrations.transformers as integration
from tokenops.integrations.transformers import apply_patch, last_trace, remove_patch

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 24,
    "patch_size": 4,  # 36 patches
    "initializer_range": 0.3,  # makes attention and the choice of tokens matter
}


def vit(**config) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TINY, **config)).double().eval()


def deit() -> DeiTForImageClassificationWithTeacher:
    torch.manual_seed(0)
    return DeiTForImageClassificationWithTeacher(DeiTConfig(**TINY)).double().eval()


def images(batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 24, 24, dtype=torch.float64, generator=generator)


def plain_groups(metric: Tensor, r: int, prefix: int, order: str) -> list[list[int]]:
    """Groups of merged tokens of one image [N, D], found by comparing every pair."""
    tokens = metric.shape[0]
    even = [i for i in range(0, tokens, 2) if i >= prefix]
    odd = [j for j in range(1, tokens, 2) if j >= prefix]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    similarity = (unit @ unit.T).tolist()
    partner = {i: max(odd, key=lambda j, i=i: similarity[i][j]) for i in even}
    gone = sorted(even, key=lambda i: similarity[i][partner[i]], reverse=True)[:r]
    kept = [[i] for i in range(prefix)] + [[i] for i in even if i not in gone]
    merged = [[j] + [i for i in gone if partner[i] == j] for j in odd]
    groups = [sorted(group) for group in kept + merged]
    return sorted(groups) if order == "position" else groups


def plain_forward(model, pixels, schedule, prefix=1, order="tome", proportional=True):
    """The model with ToMe in plain PyTorch: last hidden state, and groups of patches."""
    base = model.base_model
    x = base.embeddings(pixels)  # [B, N, C]
    batch, tokens, channels = x.shape
    size = torch.ones(batch, tokens, dtype=x.dtype)
    patches = [[[i] for i in range(tokens)] for _ in range(batch)]
    for layer, r in zip(base.layers, schedule, strict=True):
        attention = layer.attention
        normalised = layer.layernorm_before(x)
        q, k, v = (
            project(normalised).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.mT * attention.head_dim**-0.5
        if proportional:
            logits = logits + size.log()[:, None, None, :]
        x = x + attention.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        rows, sizes = [], []
        for b in range(batch):
            groups = plain_groups(k[b].mean(0), r, prefix, order)
            if r == 0:
                groups = [[i] for i in range(x.shape[1])]
            weights = [size[b, group] for group in groups]
            rows += [
                (x[b, group] * weight[:, None]).sum(0) / weight.sum()
                for group, weight in zip(groups, weights, strict=True)
            ]
            sizes.append(torch.stack([weight.sum() for weight in weights]))
            patches[b] = [sorted(p for i in group for p in patches[b][i]) for group in groups]
        x, size = torch.stack(rows).view(batch, -1, channels), torch.stack(sizes)
        x = x + layer.mlp(layer.layernorm_after(x))
    return base.layernorm(x), patches


def hidden(model, pixels: Tensor) -> Tensor:
    return model.base_model(pixels).last_hidden_state


@pytest.mark.parametrize("make", [vit, deit])
@pytest.mark.parametrize("order", ["tome", "position"])
@pytest.mark.parametrize("proportional", [True, False])
def test_equals_plain_pytorch(make, order, proportional):
    model, pixels, schedule = make(), images(), [5, 0, 3, 4]
    prefix = 1 if make is vit else 2
    expected, groups = plain_forward(model, pixels, schedule, prefix, order, proportional)
    apply_patch(model, schedule, order=order, proportional=proportional, track_source=True)
    torch.testing.assert_close(hidden(model, pixels), expected)
    source = last_trace(model).sources[-1]
    for image, of_image in enumerate(groups):
        for token, patches in enumerate(of_image):
            found = (source.assign[image] == token).nonzero().flatten().tolist()
            assert found == patches


def test_equals_the_rivals_of_the_demo():
    rivals = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "rivals.py"))
    model, pixels, schedule = vit(), images(), [5, 0, 30, 4]
    eager, sliced = copy.deepcopy(model), copy.deepcopy(model)
    rivals["replace_layers"](eager, rivals["eager_tome"], schedule)
    rivals["replace_layers"](sliced, rivals["slicing"], schedule)
    apply_patch(model, schedule)
    for _ in range(2):
        merged = hidden(model, pixels)
        torch.testing.assert_close(hidden(eager, pixels), merged)
        assert hidden(sliced, pixels).shape == merged.shape


def test_num_prefix_can_be_chosen():
    model, pixels = vit(), images()
    expected, _ = plain_forward(model, pixels, [4] * 4, prefix=5)
    apply_patch(model, 4, num_prefix=5)
    torch.testing.assert_close(hidden(model, pixels), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_r_zero_is_the_dense_model(attention):
    model, pixels = vit(attn_implementation=attention), images()
    dense = model(pixels).logits
    apply_patch(model, 0)
    assert torch.equal(model(pixels).logits, dense)
    assert last_trace(model).sizes[-1].eq(1).all()


def test_remove_restores_everything():
    model, pixels = vit(), images()
    before, dense = copy.deepcopy(model.state_dict()), model(pixels).logits
    names = [sorted(vars(module)) for module in model.modules()]
    apply_patch(model, 4)
    assert not torch.equal(model(pixels).logits, dense)
    patched = model.state_dict()
    assert list(patched) == list(before)
    assert all(torch.equal(patched[name], before[name]) for name in before)
    remove_patch(model)
    assert torch.equal(model(pixels).logits, dense)
    assert [sorted(vars(module)) for module in model.modules()] == names
    assert not model.vit._forward_pre_hooks
    assert not model.vit._forward_hooks
    apply_patch(model, 4)


@pytest.mark.parametrize(
    ("r", "tokens"),
    [
        (3, [34, 31, 28, 25]),
        ([6, 0, 2], [31, 31, 29, 29]),
        ((4, 1.0), [37, 35, 30, 22]),
        ((4, -1.0), [29, 24, 22, 22]),
        ((4, 0), [33, 29, 25, 21]),
        (100, [19, 10, 6, 4]),
        (np.int64(3), [34, 31, 28, 25]),
        (torch.tensor(3), [34, 31, 28, 25]),
        (list(np.array([6, 0, 2])), [31, 31, 29, 29]),
        ([torch.tensor(6), 0, np.int32(2)], [31, 31, 29, 29]),
        ((np.int64(4), np.float32(1.0)), [37, 35, 30, 22]),
    ],
)
def test_schedules(r, tokens):
    model = vit()
    apply_patch(model, r)
    assert hidden(model, images()).shape[1] == tokens[-1]
    assert [token_map.num_tokens for token_map in last_trace(model).token_maps] == tokens


def test_r_can_be_set_later():
    model = vit()
    patch = apply_patch(model, 3)
    assert patch.r == [3, 3, 3, 3]
    patch.r = (2, 1.0)
    assert patch.r == [0, 1, 2, 4]
    assert hidden(model, images()).shape[1] == 30
    with pytest.raises(ValueError, match=r"r must be >= 0, got int -1"):
        patch.r = -1


def test_the_trace_tells_what_happened():
    model = vit()
    patch = apply_patch(model, 5, track_source=True)
    assert patch.trace is None
    for batch in (2, 3):  # a pass leaves no state behind
        model(images(batch))
        trace = last_trace(model)
        assert patch.trace is trace
        assert len(trace.token_maps) == len(trace.sizes) == len(trace.sources) == 4
        for size, source in zip(trace.sizes, trace.sources, strict=True):
            assert source.num_inputs == 37
            # A partition: each patch is in one token, and the size of a token is its number of
            # patches.
            assert ((source.assign >= 0) & (source.assign < source.num_tokens)).all()
            members = source.source_matrix().sum(2, keepdim=True)
            assert torch.equal(members, size.to(members.dtype))
            assert size.dtype == torch.float32
            assert not size.requires_grad
            assert size.sum(1).eq(37).all()
        composed = trace.token_maps[0]
        for token_map in trace.token_maps[1:]:
            composed = token_map.compose(composed)
        assert torch.equal(composed.assign, trace.sources[-1].assign)


def test_sources_are_tracked_on_request_only():
    model = vit()
    apply_patch(model, 5)
    model(images())
    assert last_trace(model).sources == []


def test_gradients_equal_those_of_plain_pytorch():
    model, pixels = vit().train(), images().requires_grad_()
    inputs = [pixels, *model.vit.parameters()]
    target = torch.randn(2, 21, 32, dtype=torch.float64)
    plain = (plain_forward(model, pixels, [4] * 4)[0] * target).sum()
    expected = torch.autograd.grad(plain, inputs, allow_unused=True)
    apply_patch(model, 4)
    loss = (hidden(model, pixels) * target).sum()
    for got, want in zip(
        torch.autograd.grad(loss, inputs, allow_unused=True), expected, strict=True
    ):
        if want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want)


def test_activation_checkpointing_recomputes_its_own_pass():
    model, pixels = vit().train(), images()
    apply_patch(model, 4, track_source=True)
    weight = model.vit.embeddings.cls_token
    (expected,) = torch.autograd.grad(model(pixels).logits.sum(), weight)
    model.activation_checkpointing_enable()
    loss = model(pixels).logits.sum()
    trace = last_trace(model)
    model(images(batch=3, seed=2))  # another pass in between
    (got,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(got, expected)
    assert len(trace.token_maps) == len(trace.sources) == 4


def counted(monkeypatch, obstacles):
    """Count the calls of policy_attention; ``obstacles`` replace the reasons of ``why_not``."""
    calls = []

    def attention(*args, **kwargs):
        calls.append(kwargs["size"])
        return tokenops.policy_attention(*args, **kwargs)

    monkeypatch.setattr(integration, "policy_attention", attention)
    monkeypatch.setattr(integration, "why_not", lambda *_: obstacles)
    return calls


@pytest.mark.parametrize("other", ["triton", "native"])
def test_the_kernel_counts_sizes_once_there_are_any(monkeypatch, other):
    calls = counted(monkeypatch, {other: "not there"})
    model, pixels = vit(), images()
    patch = apply_patch(model, [0, 4, 0, 4])
    model(pixels)
    assert len(calls) == 2
    assert [size.sum(1).eq(37).all().item() for size in calls] == [True, True]
    patch.proportional = False
    model(pixels)
    patch.proportional, patch.r = True, 0
    model(pixels)
    patch.r = [0, 0, 0, 4]
    model(pixels)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("obstacles", "config", "training"),
    [
        ({"native": "not compiled", "triton": "no GPU"}, {}, False),
        ({}, {"attn_implementation": "eager"}, False),
        ({}, {"attention_probs_dropout_prob": 0.5}, True),
    ],
)
def test_the_bias_counts_sizes_where_the_kernel_cannot(monkeypatch, obstacles, config, training):
    calls = counted(monkeypatch, obstacles)
    model, pixels = vit(**config).train(training), images()
    apply_patch(model, 4)
    model(pixels)
    assert calls == []
    model.eval()
    model(pixels)
    assert len(calls) == (3 if training else 0)


def test_kernel_and_bias_agree(monkeypatch):
    model, pixels = vit().train(), images().requires_grad_()
    apply_patch(model, [5, 0, 7, 4])
    outcomes = []
    for obstacles in ({}, {"native": "not compiled", "triton": "no GPU"}):
        calls = counted(monkeypatch, obstacles)
        logits = model(pixels).logits
        outcomes.append((logits, *torch.autograd.grad(logits.square().sum(), [pixels])))
        assert len(calls) == (0 if obstacles else 3)
    torch.testing.assert_close(*outcomes)


def test_dropout_is_active_in_training_only():
    model = vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    apply_patch(model, 4)
    pixels = images()
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_dtypes(dtype):
    model, pixels = vit(), images()
    apply_patch(model, 4)
    exact = model(pixels).logits
    model = model.to(dtype)
    error = (model(pixels.to(dtype)).logits - exact).abs().max() / exact.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.2)
    assert last_trace(model).sizes[-1].dtype == torch.float32
    model(pixels.to(dtype)).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_autocast():
    model, pixels = vit().float(), images().float()
    apply_patch(model, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(pixels).logits
    assert logits.isfinite().all()
    logits.sum().backward()


def test_hidden_states_and_attentions_can_be_asked_for():
    model = vit(attn_implementation="eager")
    apply_patch(model, 4)
    output = model(images(), output_hidden_states=True, output_attentions=True)
    assert [state.shape[1] for state in output.hidden_states] == [37, 33, 29, 25, 21]
    assert [weights.shape[-1] for weights in output.attentions] == [37, 33, 29, 25]
    sdpa = vit(attn_implementation="sdpa")
    apply_patch(sdpa, 4)
    # transformers' eager attention takes its softmax in float32.
    torch.testing.assert_close(sdpa(images()).logits, output.logits, rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph():
    model, pixels = vit(), images()
    apply_patch(model, 4)
    expected = model(pixels).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels).logits, expected)
    assert last_trace(model).sizes[-1].shape == (2, 21, 1)


def test_a_deep_copy_is_patched_on_its_own():
    model, pixels = vit(), images()
    patch = apply_patch(model, 4)
    expected = model(pixels).logits
    twin = copy.deepcopy(model)
    remove_patch(model)
    assert torch.equal(twin(pixels).logits, expected)
    assert last_trace(twin) is not patch.trace
    with pytest.raises(ValueError, match="must have been patched"):
        last_trace(model)
    remove_patch(twin)
    assert torch.equal(twin(pixels).logits, model(pixels).logits)


def replica(model, weights):
    """A replica with the weights of another model, made as torch.nn.DataParallel makes replicas."""
    parts = dict(weights.named_modules())
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for name, module in model.named_modules():
        for child, part in module.named_children():
            copies[module]._modules[child] = copies[part]
        for parameter, _ in module.named_parameters(recurse=False):
            copies[module]._parameters.pop(parameter, None)
            setattr(copies[module], parameter, getattr(parts[name], parameter).detach())
    return copies[model]


@pytest.mark.parametrize("make", [vit, deit])
def test_a_replica_computes_with_its_own_weights(make):
    model, pixels = make(), images()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    apply_patch(model, 4)
    apply_patch(other, 4)
    expected, own = other(pixels).logits, model(pixels).logits
    assert not torch.allclose(expected, own)
    assert torch.equal(replica(model, other)(pixels).logits, expected)
    assert torch.equal(model(pixels).logits, own)


def test_a_patched_model_is_saved_and_loaded_whole():
    model, pixels = vit(), images()
    apply_patch(model, [5, 0, 3])
    expected = model(pixels).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(pickle.loads(pickle.dumps(pixels))).logits, expected)
        assert len(last_trace(twin).token_maps) == 4
        remove_patch(twin)
        assert not torch.equal(twin(pixels).logits, expected)
    remove_patch(model)
    assert torch.equal(model(pixels).logits, twin(pixels).logits)


def test_the_classes_of_layers_are_kept_in_name_and_kind():
    model = vit()
    layer, attention = model.vit.layers[0], model.vit.layers[0].attention
    kinds, text = (type(layer), type(attention)), repr(model)
    apply_patch(model, 4)
    assert repr(model) == text
    assert isinstance(layer, kinds[0])
    assert isinstance(attention, kinds[1])
    assert type(layer).__name__ == kinds[0].__name__  # FSDP and accelerate select modules by it
    assert type(model.vit.layers[1]) is type(layer)
    remove_patch(model)
    assert (type(layer), type(attention)) == kinds


def test_a_class_that_something_else_changed_is_not_undone():
    model = vit()
    apply_patch(model, 4)
    layer = model.vit.layers[2]
    merging = type(layer)
    layer.__class__ = type("Other", (merging,), {})
    with pytest.raises(ValueError, match="class has changed since"):
        remove_patch(model)
    layer.__class__ = merging
    remove_patch(model)


def test_a_layer_by_itself_stays_dense():
    model = vit()
    tokens = torch.randn(1, 9, 32, dtype=torch.float64)
    dense = model.vit.layers[1](tokens)
    apply_patch(model, 2)
    assert torch.equal(model.vit.layers[1](tokens), dense)


def test_base_models_and_their_heads_share_a_patch():
    torch.manual_seed(0)
    for base in (ViTModel(ViTConfig(**TINY)), DeiTModel(DeiTConfig(**TINY))):
        apply_patch(base, 4)
        assert base(images().float()).last_hidden_state.shape[1] in (21, 22)
    model = vit()
    apply_patch(model, 4)
    with pytest.raises(ValueError, match="patched already"):
        apply_patch(model.vit, 4)
    remove_patch(model.vit)
    with pytest.raises(ValueError, match="must have been patched"):
        remove_patch(model)


def test_models_it_does_not_know():
    with pytest.raises(TypeError, match=r"model must be one of ViTModel.*got Linear"):
        apply_patch(torch.nn.Linear(2, 2), 4)
    with pytest.raises(TypeError, match="got ViTForMaskedImageModeling"):
        apply_patch(ViTForMaskedImageModeling(ViTConfig(**TINY)), 4)
    with pytest.raises(TypeError, match="remove_patch: model must be"):
        remove_patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "r must be >= 0, got int -1"),
        (2.5, TypeError, "r must be an int, got float 2.5"),
        (True, TypeError, "r must be an int, got bool"),
        ("8", TypeError, "r must be an int, got str"),
        (np.array([4, 2]), TypeError, "r must be an int, got ndarray"),
        (
            torch.tensor([4, 2]),
            TypeError,
            "r must be an int or an integer tensor without dimensions",
        ),
        ([0, torch.tensor(2.0)], TypeError, r"r\[1\] must be an int"),
        ((4, True), TypeError, "got tuple"),
        ([1, -2], ValueError, r"r\[1\] must be >= 0"),
        ([1, 2.0], TypeError, r"r\[1\] must be an int, got float"),
        ([1] * 5, ValueError, "at most 4 ints, .* got 5"),
        ((4,), TypeError, r"got tuple \(4,\)"),
        ((4, "a"), TypeError, "got tuple"),
        ((2.0, 1.0), TypeError, r"r\[0\] must be an int"),
        ((4, 2.0), ValueError, r"r\[1\] must be in \[-1, 1\], got float 2.0"),
        ((4, float("nan")), ValueError, r"r\[1\] must be in"),
    ],
)
def test_bad_schedules(r, error, message):
    model = vit()
    with pytest.raises(error, match=message):
        apply_patch(model, r)
    apply_patch(model, 4)  # the failed attempt has left no trace


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_prefix": -1}, ValueError, "num_prefix must be >= 0"),
        ({"num_prefix": 1.0}, TypeError, "num_prefix must be an int"),
        ({"order": "size"}, ValueError, "order must be one of 'tome', 'position', got str 'size'"),
        ({"proportional": 1}, TypeError, "proportional must be a bool, got int 1"),
        ({"track_source": None}, TypeError, "track_source must be a bool"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        apply_patch(vit(), 4, **arguments)


def test_what_a_patched_model_refuses():
    model = vit()
    apply_patch(model, 4)
    with pytest.raises(ValueError, match="must have run"):
        last_trace(model)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        model.vit(images(), attention_mask=torch.ones(2, 37))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"one of sdpa, eager .* got flex_attention"):
        model(images())
    model.set_attn_implementation("sdpa")
    model(images())


def test_a_forward_that_something_else_replaced():
    model = vit()
    model.vit.layers[2].forward = lambda x, mask: x
    with pytest.raises(ValueError, match="forward has been replaced"):
        apply_patch(model, 4)


def test_an_older_layer_structure():
    model = vit()
    del model.vit.layers[0].attention.k_proj
    with pytest.raises(TypeError, match=r"must have k_proj, as in transformers 5\.x"):
        apply_patch(model, 4)


def test_an_older_model_structure():
    """The structure of transformers 4, whose layers are in an encoder."""
    model = vit()
    model.vit.encoder = torch.nn.Module()
    model.vit.encoder.layer = model.vit.layers
    del model.vit.layers
    words = r"must have layers, as in transformers 5\.x, got ViTModel of transformers \d"
    for call in (lambda: apply_patch(model, 4), lambda: remove_patch(model)):
        with pytest.raises(TypeError, match=words):
            call()


def test_transformers_is_imported_on_use_only():
    code = (
        "import sys, tokenops, tokenops.integrations.transformers;"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
