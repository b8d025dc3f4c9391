# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokenops
from tokenops.layers import KeepPredictor, MergeStep, PolicyAttention, PolicyBlock

B, N, C, H = 2, 11, 12, 3


def tokens(*shape, seed=0, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (B, N, C)), dtype=torch.float64, generator=generator).to(device)


def weights(seed=1, tokens=N, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, tokens, dtype=torch.float64, generator=generator).to(device)


def double(module: nn.Module, seed=2) -> nn.Module:
    """The module in float64, with weights such that results differ between tokens."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def plain_attention(layer, x, policy=None, size=None, padding=None) -> Tensor:
    """Attention by an explicit map [B, H, N, N], and the projection."""
    qkv = x @ layer.qkv.weight.T + (0 if layer.qkv.bias is None else layer.qkv.bias)
    q, k, v = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))
    logits = q @ k.mT / math.sqrt(q.shape[3])
    weight = x.new_ones(x.shape[0], 1, 1, x.shape[1])
    if policy is not None:
        own = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = own + (1 - own) * policy.reshape(x.shape[0], 1, 1, -1)
    if size is not None:
        weight = weight * size.reshape(x.shape[0], 1, 1, -1)
    if padding is not None:
        weight = weight * ~padding[:, None, None]
    w = logits.exp() * weight
    out = (w / w.sum(-1, keepdim=True)) @ v
    return out.transpose(1, 2).flatten(2) @ layer.proj.weight.T + layer.proj.bias


# ---- PolicyAttention ----


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("given", ["nothing", "policy", "size", "padding", "all"])
def test_attention_is_the_formula(backend, device, given, qkv_bias):
    layer = double(PolicyAttention(C, H, qkv_bias)).to(device)
    x, policy = tokens(device=device).requires_grad_(), weights(device=device).requires_grad_()
    size = (1 + 3 * weights(5, device=device)).requires_grad_()
    padding = torch.zeros(B, N, dtype=torch.bool, device=device)
    padding[0, 7:] = padding[1, 3] = True
    use = {
        "policy": policy if given in ("policy", "all") else None,
        "size": size if given in ("size", "all") else None,
    }
    padding = padding if given in ("padding", "all") else None
    live = ~padding if padding is not None else torch.ones(B, N, dtype=torch.bool, device=device)
    out, keys = layer(x, use["policy"], size=use["size"], key_padding_mask=padding)
    expected = plain_attention(layer, x, use["policy"], use["size"], padding)
    torch.testing.assert_close(out[live], expected[live])
    torch.testing.assert_close(
        keys,
        (x @ layer.qkv.weight[C : 2 * C].T + (layer.qkv.bias[C : 2 * C] if qkv_bias else 0))
        .unflatten(2, (H, -1))
        .transpose(1, 2),
    )
    inputs = [x, *(t for t in use.values() if t is not None), *layer.parameters()]
    target = tokens(seed=3, device=device) * live[..., None]
    got = torch.autograd.grad((out * target).sum(), inputs)
    want = torch.autograd.grad((expected * target).sum(), inputs)
    torch.testing.assert_close(got, want)


def test_attention_is_torch_multihead_attention():
    layer, torch_layer = PolicyAttention(C, H).double(), nn.MultiheadAttention(C, H).double()
    torch_layer.in_proj_weight.data, torch_layer.in_proj_bias.data = (
        layer.qkv.weight.data,
        layer.qkv.bias.data,
    )
    torch_layer.out_proj.weight.data, torch_layer.out_proj.bias.data = (
        layer.proj.weight.data,
        layer.proj.bias.data,
    )
    torch_layer.batch_first = True
    x = tokens()
    padding = weights() > 0.7
    padding[:, 0] = False
    expected = torch_layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(layer(x, key_padding_mask=padding)[0], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_queries_are_rows_of_the_whole(backend, device, dtype, shared, eps):
    layer = double(PolicyAttention(C, H, eps=eps)).to(device)
    x = tokens(device=device).requires_grad_()
    policy = (weights(device=device) > 0.5).double().requires_grad_()
    queries = torch.tensor([[8, 0, 3, 3], [10, 2, 1, 5]], dtype=dtype)  # any order, one twice
    queries = (queries[0] if shared else queries).to(device)
    out, keys = layer(x, policy, queries=queries)
    whole, whole_keys = layer(x, policy)
    rows = queries.long().expand(B, -1)[..., None].expand(-1, -1, C)
    expected = whole.gather(1, rows)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(keys, whole_keys)
    inputs = [x, policy, *layer.parameters()]
    target = tokens(B, 4, C, seed=4, device=device)
    got = torch.autograd.grad((out * target).sum(), inputs)
    want = torch.autograd.grad((expected * target).sum(), inputs)
    torch.testing.assert_close(got, want)
    assert (got[1][policy == 0] != 0).all()  # dropped tokens have gradients, too


def test_queries_may_be_padding_or_none():
    layer = double(PolicyAttention(C, H))
    x, policy = tokens(), weights().requires_grad_()
    queries = torch.tensor([[4, -1, 2], [1, 7, -1]], dtype=torch.int32)
    out, _ = layer(x, policy, queries=queries)
    whole, _ = layer(x, policy)
    torch.testing.assert_close(out[0, [0, 2]], whole[0, [4, 2]])
    torch.testing.assert_close(out[1, :2], whole[1, [1, 7]])
    assert out.isfinite().all()
    assert layer(x, policy, queries=queries[:, :0])[0].shape == (B, 0, C)


def test_queries_of_a_pruned_map_with_counts():
    scores, keep = weights(), torch.tensor([3, 6])
    kept = tokenops.prune(scores, keep, num_prefix=1)
    queries = kept.members[:, : kept.num_tokens]
    assert queries.shape == (B, N)
    layer = double(PolicyAttention(C, H))
    x = tokens()
    policy = tokenops.topk_keep(scores, keep, num_prefix=1)
    out, _ = layer(x, policy, queries=queries)
    removed, _ = layer(kept.merge(x), key_padding_mask=~kept.key_mask())
    torch.testing.assert_close(out[kept.key_mask()], removed[kept.key_mask()])


@pytest.mark.parametrize("mode", ["exact", "kept", "none"])
def test_policy_grad_reaches_the_operator(mode):
    layer = double(PolicyAttention(C, H, policy_grad=mode))
    policy = (weights() > 0.5).double().requires_grad_()
    out = layer(tokens(), policy)[0].square().sum()
    (grad,) = torch.autograd.grad(out, policy, allow_unused=True)
    if mode == "none":
        assert grad is None or (grad == 0).all()
    else:
        assert (grad[policy == 1] != 0).all()
        assert ((grad[policy == 0] != 0) == (mode == "exact")).all()


# ---- PolicyBlock ----


def test_block_is_the_formula():
    block = double(PolicyBlock(C, H, 3.0))
    x, policy = tokens(), weights()
    norm1, norm2 = (
        lambda t, n=n: nn.functional.layer_norm(t, (C,), n.weight, n.bias, 1e-6)
        for n in (block.norm1, block.norm2)
    )
    attended = x + plain_attention(block.attn, norm1(x), policy)
    expected = attended + block.mlp[2](nn.functional.gelu(block.mlp[0](norm2(attended))))
    torch.testing.assert_close(block(x, policy), expected)
    assert block.mlp[0].out_features == 3 * C
    halves, keys = block.attend(x, policy)
    torch.testing.assert_close(halves, attended)
    torch.testing.assert_close(block.feed(halves), expected)
    assert keys.shape == (B, H, N, C // H)


def test_block_with_queries_is_the_masked_block_for_the_kept():
    """For one layer, modes probe and mask agree if the loss reads kept tokens only."""
    block = double(PolicyBlock(C, H))
    x, scores = tokens().requires_grad_(), weights().requires_grad_()
    kept = tokenops.prune(scores, 4, num_prefix=1)
    queries = kept.members[:, : kept.num_tokens]
    policies = [tokenops.topk_keep(scores, 4, num_prefix=1) for _ in range(3)]
    masked = kept.merge(block(x, policies[0]))
    probed = block(x, policies[1], queries=queries)
    torch.testing.assert_close(probed, masked)
    inputs = [x, scores, *block.parameters()]
    target = tokens(B, 5, C, seed=6)
    got = torch.autograd.grad((probed * target).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad((masked * target).sum(), inputs))
    assert (got[1][:, 1:] != 0).all()
    removed = block(kept.merge(x), kept.merge(policies[2]))  # mode gather: the same values
    torch.testing.assert_close(removed, probed)
    (gathered,) = torch.autograd.grad((removed * target).sum(), scores)
    assert ((gathered != 0) == (kept.assign > 0)).all()
    torch.testing.assert_close(gathered[gathered != 0], got[1][gathered != 0])


def test_block_takes_sizes_and_padding():
    block, x = double(PolicyBlock(C, H)), tokens()
    doubled = torch.cat([x, x[:, 3:5]], dim=1)
    size = torch.ones(B, N, 1, dtype=torch.float64)
    size[:, 3:5] = 2
    torch.testing.assert_close(block(x, size=size), block(doubled)[:, :N])
    padding = torch.zeros(B, N + 2, dtype=torch.bool)
    padding[:, N:] = True
    torch.testing.assert_close(block(doubled, key_padding_mask=padding)[:, :N], block(x))


# ---- KeepPredictor ----


def test_predictor_gives_log_probabilities():
    predictor = double(KeepPredictor(C))
    out = predictor(tokens())
    assert out.shape == (B, N, 2)
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(B, N, dtype=torch.float64))
    assert (out.std(1) > 1e-3).all()
    ones = torch.ones(B, N, 1, dtype=torch.float64)
    torch.testing.assert_close(predictor(tokens(), ones), out)
    torch.testing.assert_close(predictor(tokens(), ones[..., 0]), out)


def test_predictor_sees_kept_tokens_and_itself():
    predictor = double(KeepPredictor(C))
    x, policy = tokens(), (weights() > 0.4).double()
    out = predictor(x, policy)
    for n in range(N):
        other = x.clone()
        other[0, n, 0] += 1
        changed = (predictor(other, policy) != out).any(-1)
        assert not changed[1].any()
        assert changed[0, n]
        alone = torch.arange(N) != n
        assert (changed[0][alone] == (policy[0, n] == 1)).all()
    # Removing the dropped tokens by a gather does not change the kept tokens.
    kept = tokenops.prune(policy[:1], int(policy[0].sum()))
    torch.testing.assert_close(predictor(kept.merge(x[:1])), kept.merge(out[:1]))


def test_predictor_survives_an_image_without_kept_tokens():
    predictor = double(KeepPredictor(C))
    x, policy = tokens().requires_grad_(), weights()
    policy[1] = 0
    policy.requires_grad_()
    out = predictor(x, policy)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.square().sum(), [x, policy, *predictor.parameters()]):
        assert grad.isfinite().all()
    torch.testing.assert_close(out[:1], predictor(x[:1], policy[:1]))


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_predictors_of_any_width(dim):
    assert KeepPredictor(dim)(torch.randn(1, 4, dim)).shape == (1, 4, 2)
    assert KeepPredictor(dim)(torch.randn(3, 0, dim)).shape == (3, 0, 2)


def test_predictor_and_gumbel_keep_drop_for_good():
    torch.manual_seed(0)
    predictor, x, policy = KeepPredictor(C), torch.randn(B, N, C), None
    kept = [B * N]
    for _ in range(4):
        policy = tokenops.gumbel_keep(predictor(x, policy), policy)
        kept.append(int(policy.sum()))
    assert kept == sorted(kept, reverse=True)
    tokenops.keep_ratio_loss(policy, 0.5).backward()
    assert all(p.grad.isfinite().all() for p in predictor.parameters())


# ---- MergeStep ----


@pytest.mark.parametrize("order", ["position", "tome"])
@pytest.mark.parametrize("reduce", ["wavg", "mean"])
@pytest.mark.parametrize("sized", [None, 2, 3])
def test_merging_is_match_and_merge(order, reduce, sized):
    x, keys = tokens(), tokens(B, H, N, 4, seed=7)
    size = None if sized is None else (1 + 4 * weights()).float().reshape(B, N, *[1] * (sized - 2))
    out, sizes, token_map = MergeStep(3, num_prefix=1, order=order, reduce=reduce)(x, keys, size)
    expected = tokenops.match(keys, 3, num_prefix=1, order=order)
    assert torch.equal(token_map.assign, expected.assign)
    share = expected.source_matrix(torch.float64)  # [B, M, N]
    count = torch.ones(B, N, 1) if size is None else size.reshape(B, N, 1)
    by = share * count.mT if reduce == "wavg" else share
    torch.testing.assert_close(out, by @ x / by.sum(2, keepdim=True))
    assert sizes.dtype == torch.float32
    torch.testing.assert_close(sizes, (share @ count.double()).float())


def test_merging_layer_after_layer():
    step, x, size = MergeStep(4, num_prefix=1, reduce="mean"), tokens(), None
    for left in (7, 4, 3, 2, 2):
        x, size, token_map = step(x, x, size)
        assert x.shape[1] == token_map.num_tokens == left
        assert size.sum(1).flatten().tolist() == [N, N]


def test_merging_with_half_sizes_counts_on():
    size = torch.full((1, 6, 1), 256.0, dtype=torch.bfloat16)
    for reduce in ("wavg", "mean"):
        _, sizes, _ = MergeStep(3, reduce=reduce)(torch.ones(1, 6, 2), torch.ones(1, 6, 2), size)
        assert sizes.sum() == 6 * 256
        assert sizes.dtype == torch.float32


def test_merging_has_no_parameters():
    assert not list(MergeStep(3).parameters())
    x, metric = tokens().requires_grad_(), tokens(seed=8).requires_grad_()
    out, size, _ = MergeStep(3)(x, metric)
    assert not size.requires_grad
    assert torch.autograd.grad(out.sum(), [x, metric], allow_unused=True)[1] is None


# ---- all of them ----

MODULES = {
    "attention": lambda: PolicyAttention(C, H),
    "block": lambda: PolicyBlock(C, H),
    "predictor": lambda: KeepPredictor(C),
    "merging": lambda: MergeStep(2, num_prefix=1),
}


def call(name: str, module: nn.Module, x: Tensor, policy: Tensor):
    out = module(x, x) if name == "merging" else module(x, policy)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_no_state(name):
    module = MODULES[name]()
    assert not list(module.buffers())
    before = copy.deepcopy(module.state_dict())
    names = {n: sorted(vars(m)) for n, m in module.named_modules()}
    x, policy = tokens().float(), weights().float()
    first = call(name, module, x, policy)
    call(name, module, x[:1, :5], policy[:1, :5])
    assert torch.equal(call(name, module, x, policy), first)
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert {n: sorted(vars(m)) for n, m in module.named_modules()} == names
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(call(name, torch.load(file, weights_only=False), x, policy), first)


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_into_one_graph(name):
    module, x = MODULES[name](), tokens().float().requires_grad_()
    policy = weights().float().requires_grad_()
    expected = call(name, module, x, policy)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = call(name, compiled, x, policy)
    torch.testing.assert_close(out, expected)
    wanted = [x] if name == "merging" else [x, policy]
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
    )


def test_queries_compile_into_one_graph():
    block, x = PolicyBlock(C, H), tokens().float()
    scores = weights().float().requires_grad_()

    def probe(x, scores):
        kept = tokenops.prune(scores, 4, num_prefix=1)
        policy = tokenops.topk_keep(scores, 4, num_prefix=1)
        return block(x, policy, queries=kept.members[:, : kept.num_tokens])

    expected = probe(x, scores)
    torch._dynamo.reset()
    out = torch.compile(probe, fullgraph=True, backend="aot_eager")(x, scores)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), scores),
        torch.autograd.grad(expected.square().sum(), scores),
    )


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_in_half_precision_and_autocast(name, dtype):
    module, x, policy = MODULES[name](), tokens().float(), weights().float()
    exact = call(name, module, x, policy)
    with torch.autocast("cpu", dtype):
        lowered = call(name, module, x, policy)
    narrow = call(name, module.to(dtype), x.to(dtype), policy)
    assert narrow.dtype == dtype
    if name != "merging":  # which tokens are most similar may depend on rounding
        for out in (lowered, narrow):
            assert (out - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", ["attention", "block", "predictor"])
def test_modules_pass_gradcheck(name):
    module = double(MODULES[name]())
    x, policy = tokens(B, 4, C).requires_grad_(), weights(tokens=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: call(name, module, x, p), (x, policy))


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(0, 20), st.integers(1, 4), st.integers(0, 2**31))
def test_modules_take_any_shape(batch, number, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    width = 2 * heads
    x = torch.randn(width, number, batch, generator=generator).permute(2, 1, 0)  # strided
    policy = torch.rand(batch, number, generator=generator)
    x.requires_grad_()
    out = PolicyBlock(width, heads)(x, policy)
    log = KeepPredictor(width)(x, policy)
    merged, size, _ = MergeStep(3)(x, x)
    assert out.shape == (batch, number, width)
    assert log.shape == (batch, number, 2)
    assert merged.shape[:2] == size.shape[:2]
    (out.sum() + log.sum() + merged.sum()).backward()
    assert x.grad.isfinite().all()


# ---- what they refuse ----


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PolicyAttention(10, 3), ValueError, "num_heads must be a divisor of dim = 10"),
        (lambda: PolicyAttention(0, 1), ValueError, "PolicyAttention: dim must be >= 1"),
        (lambda: PolicyAttention(8, 0), ValueError, "num_heads must be >= 1, got int 0"),
        (lambda: PolicyAttention(8.0, 2), TypeError, "dim must be an int, got float 8.0"),
        (lambda: PolicyAttention(8, 2, policy_grad="soft"), ValueError, "one of 'exact'"),
        (lambda: PolicyBlock(9, 2), ValueError, "num_heads must be a divisor of dim = 9"),
        (lambda: KeepPredictor(1), ValueError, "KeepPredictor: dim must be >= 2"),
        (lambda: KeepPredictor("8"), TypeError, "KeepPredictor: dim must be an int"),
        (lambda: MergeStep(3, reduce="amax"), ValueError, "reduce must be one of 'wavg', 'mean'"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


X = torch.zeros(B, N, C)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0],), ValueError, "PolicyAttention: x must be 3-D"),
        (([1.0],), TypeError, "PolicyAttention: x must be a floating-point tensor"),
        ((X, torch.ones(B, N + 1)), ValueError, "policy must be of shape"),
        ((X, -torch.ones(B, N)), ValueError, "policy must be >= 0"),
        ((X, None, torch.ones(B, 3)), TypeError, "queries must be an int32 or int64 tensor"),
        ((X, None, torch.zeros(B + 1, 3).int()), ValueError, r"queries must be of shape \[3\] or"),
        ((X, None, torch.zeros(1, 2, 3).int()), ValueError, "queries must be 1-D or 2-D"),
        ((X, None, torch.tensor([0, N])), ValueError, "queries must be below the 11 tokens of x"),
        ((X, None, torch.zeros(3).int().to("meta")), ValueError, "queries must be on cpu"),
    ],
)
def test_bad_calls_of_attention(arguments, error, message):
    x, policy, queries = (*arguments, None, None)[:3]
    with pytest.raises(error, match=message):
        PolicyAttention(C, H)(x, policy, queries=queries)


def test_bad_calls_of_the_others():
    with pytest.raises(ValueError, match="KeepPredictor: x must be 3-D"):
        KeepPredictor(C)(X[0])
    with pytest.raises(ValueError, match="policy must be of shape"):
        KeepPredictor(C)(X, torch.ones(B, 3))
    with pytest.raises(ValueError, match=r"MergeStep: r must be >= 0, got int -1"):
        MergeStep(-1)(X, X)
    with pytest.raises(ValueError, match="token_map"):
        MergeStep(2)(X, X[:, :5])


def test_layers_are_imported_on_use_only():
    code = "import sys, tokenops; sys.exit('tokenops.layers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
