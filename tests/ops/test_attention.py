# SPDX-License-Identifier: Apache-2.0
"""policy_attention: values and gradients against whole maps in float64; precision; layouts."""

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import attend, check_exactly

import tokenops
from tokenops.ops.attention import reference
from tokenops.ops.attention.arguments import Inputs, Needs, OutputGrads, ScoreInputs
from tokenops.testing import (
    LAYOUTS,
    assert_same_bits,
    assert_within_error_budget,
    random_attention,
    random_tokens,
    stride_zero,
)

HALF = (torch.bfloat16, torch.float16)

#: For each case: options of ``random_attention``, and options of the call.
CASES = {
    "plain": ({}, {}),
    "soft": ({"policy": "soft"}, {}),
    "hard": ({"policy": "hard"}, {}),
    "hard, own dropped": ({"policy": "hard"}, {"self_keep": False}),
    "bool": ({"policy": "bool"}, {}),
    "column": ({"policy": "column"}, {"eps": 1e-6}),
    "per head": ({"policy": "per-head"}, {}),
    "per head, eps": ({"policy": "per-head"}, {"eps": 1e-2}),
    "hard, eps": ({"policy": "hard"}, {"eps": 1e-6}),
    "hard, own dropped, eps": ({"policy": "hard"}, {"eps": 1e-2, "self_keep": False}),
    "none kept": ({"policy": "none kept"}, {}),
    "none kept, eps": ({"policy": "none kept"}, {"eps": 1e-6}),
    "none kept, own dropped, eps": (
        {"policy": "none kept"}, {"eps": 1e-6, "self_keep": False},
    ),
    "eps alone": ({}, {"eps": 1e-2}),
    "size": ({"zero_sizes": 0.0}, {}),
    "size with zeros": ({"zero_sizes": 0.3}, {}),
    "size, hard, eps": ({"zero_sizes": 0.2, "policy": "hard"}, {"eps": 1e-2}),
    "padding": ({"padding": 0.4}, {}),
    "padding, size, soft, eps": (
        {"padding": 0.3, "zero_sizes": 0.2, "policy": "soft"}, {"eps": 1e-2},
    ),
    "padding, hard": ({"padding": 0.3, "policy": "hard"}, {}),
    "wide logits": ({"logits": 60.0}, {}),
    "wide logits, hard": ({"logits": 60.0, "policy": "hard"}, {}),
    "wide logits, hard, eps": ({"logits": 60.0, "policy": "hard"}, {"eps": 1e-2}),
    "causal": ({}, {"is_causal": True}),
    "causal, hard": ({"policy": "hard"}, {"is_causal": True}),
    "causal, hard, own dropped, padding, eps": (
        {"policy": "hard", "padding": 0.2}, {"is_causal": True, "self_keep": False, "eps": 1e-2},
    ),
    "causal, all": (
        {"policy": "per-head", "padding": 0.2, "zero_sizes": 0.2, "key_heads": 2},
        {"is_causal": True, "eps": 1e-3},
    ),
    "grouped": ({"key_heads": 2, "policy": "hard"}, {}),
    "one key head": ({"key_heads": 1, "policy": "per-head", "zero_sizes": 0.1}, {"eps": 1e-6}),
    "kept": ({"policy": "hard"}, {"policy_grad": "kept"}),
    "kept, soft": ({"policy": "per-head"}, {"policy_grad": "kept", "eps": 1e-2}),
    "no policy gradient": ({"policy": "soft"}, {"policy_grad": "none"}),
    "narrow values": ({"value_width": 3, "policy": "hard"}, {}),
    "wide values": ({"value_width": 37, "policy": "soft"}, {"eps": 1e-2}),
    "scale": ({"policy": "soft"}, {"scale": 0.7}),
    "negative scale": ({"policy": "hard"}, {"scale": -0.3}),
    "no scale": ({"policy": "hard"}, {"scale": 0.0}),
}  # fmt: skip


def widened(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, backend, device):
    kinds, options = CASES[case]
    inputs = random_attention(2, 4, 19, 8, dtype=torch.float64, device=device, seed=1, **kinds)
    check_exactly(inputs, options)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES)
def test_several_tiles(case, backend, device):
    """More queries and keys than in a tile of the kernels."""
    kinds, options = CASES[case]
    inputs = random_attention(1, 2, 131, 20, dtype=torch.float64, device=device, seed=2, **kinds)
    check_exactly(inputs, options)


EVERYTHING = {"policy": "per-head", "zero_sizes": 0.1, "padding": 0.1, "key_heads": 1}


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 5, 32, 64, 80])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 64, 197])
def test_sizes(tokens, width, backend, device):
    kinds = {"dtype": torch.float64, "device": device}
    inputs = random_attention(2, 2, tokens, width, seed=3, **kinds, **EVERYTHING)
    check_exactly(inputs, {"eps": 1e-3})
    kinds |= {"value_width": width + 3, "policy": "hard"}
    inputs = random_attention(1, 2, tokens, width, seed=4, **kinds)
    check_exactly(inputs, {})


@pytest.mark.isa
@pytest.mark.parametrize("grads", [(0.0, 0.0, 0.0), (0.0, 1.5, -2.0)])
def test_queries_and_keys_without_width(grads, backend):
    """All keys have the same weight; the gradients of q and k are empty."""
    q = torch.zeros(1, 1, 3, 0, requires_grad=True)
    k = torch.zeros(1, 1, 4, 0, requires_grad=True)
    v = random_tokens(1, 4, 2)[:, None].requires_grad_()
    out = tokenops.policy_attention(q, k, v, self_keep=False)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape))
    grad = torch.tensor(grads)[:, None].expand(out.shape)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    assert dq.shape == q.shape
    assert dk.shape == k.shape
    torch.testing.assert_close(dv, (grad.sum(2, keepdim=True) / 4).expand(dv.shape))


@pytest.mark.isa
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (1100, 90), (90, 1100)])
def test_many_tokens(queries, keys, options, backend, device):
    """More queries than in one pass of the kernels, or more keys than in one block of rows."""
    inputs = random_attention(
        1, 1, queries, 12, keys=keys, dtype=torch.float64, device=device, seed=5, policy="hard"
    )
    check_exactly(inputs, {"self_keep": queries == keys, **options})


@pytest.mark.isa
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("policy", [None, "hard", "per-head"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 23), (23, 5), (7, 0), (0, 7), (1, 1), (0, 0)])
def test_queries_and_keys_that_differ_in_number(
    queries, keys, policy, eps, causal, backend, device
):
    inputs = random_attention(
        2, 2, queries, 6, keys=keys, dtype=torch.float64, device=device, seed=6, policy=policy
    )
    options = {"eps": eps, "is_causal": causal, "self_keep": queries == keys}
    check_exactly(inputs, options)


def positions(kind, batch, queries, keys):
    generator = torch.Generator().manual_seed(8)
    if kind == "last":
        return torch.arange(keys - queries, keys)
    if kind == "unsorted":
        return torch.randperm(keys, generator=generator)[:queries]
    if kind == "each":
        rows = [torch.randperm(keys, generator=generator)[:queries] for _ in range(batch)]
        return torch.stack(rows).int()
    if kind == "repeated":
        return torch.randint(0, keys, (batch, queries), generator=generator)
    # "nowhere": before the keys and after them, also far away.
    edges = torch.tensor([-(2**31), -7, -1, 0, 1, keys - 1, keys, keys + 3, 2**31 - 1, 2**40])
    return edges[torch.randint(0, len(edges), (batch, queries), generator=generator)]


@pytest.mark.isa
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-2])
@pytest.mark.parametrize("kind", ["last", "unsorted", "each", "repeated", "nowhere"])
def test_query_position(kind, eps, causal, backend, device):
    position = positions(kind, 2, 9, 31).to(device)
    common = {"keys": 31, "dtype": torch.float64, "device": device, "seed": 8}
    for kinds in (
        {"policy": "hard"},
        {"policy": "per-head", "zero_sizes": 0.2, "key_heads": 1, "padding": 0.2},
    ):
        inputs = random_attention(2, 2, 9, 6, **common, **kinds)
        options = {"query_position": position, "eps": eps, "is_causal": causal}
        check_exactly(inputs, options)


def test_query_position_counts_from_zero_by_default(backend, device):
    inputs = random_attention(2, 2, 13, 4, policy="hard", device=device)
    default = torch.arange(13, device=device)
    for options in ({}, {"is_causal": True, "eps": 1e-3}):
        expected = tokenops.policy_attention(**inputs, **options)
        for position in (default, default.int().expand(2, -1)):
            got = tokenops.policy_attention(**inputs, **options, query_position=position)
            torch.testing.assert_close(got, expected)


def test_kept_queries_among_all_keys(backend, device):
    """Rows of some queries equal the same rows of all queries, gradients included."""
    inputs = random_attention(2, 3, 29, 8, policy="hard", dtype=torch.float64, device=device)
    kept = torch.stack([torch.randperm(29)[:11] for _ in range(2)]).to(device)
    grad = random_tokens(2, 3, 11, 8, dtype=torch.float64, seed=9, device=device)
    index = kept[:, None, :, None].expand(2, 3, 11, 8)

    def some(q, **rest):
        rows = q.gather(2, index)
        return tokenops.policy_attention(rows, **rest, query_position=kept, return_lse=True)

    def whole(**inputs):
        out, lse = tokenops.policy_attention(**inputs, return_lse=True)
        return out.gather(2, index), lse.gather(2, index[..., 0])

    got, expected = (oracle.results(f, inputs, grad) for f in (some, whole))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12, msg=name)


# ---- the reference in blocks ----


@pytest.mark.parametrize("rows", [5, 1000])
@pytest.mark.parametrize("case", CASES)
def test_formulas_in_blocks_of_rows(case, rows, monkeypatch):
    """Forward, backward and scores of the registered reference, a few rows at a time."""
    kinds, options = CASES[case]
    inputs = random_attention(2, 4, 19, 8, dtype=torch.float64, seed=1, **kinds)
    monkeypatch.setattr(reference, "BLOCK_ENTRIES", 2 * 4 * 19 * rows)
    arguments = {n: inputs.get(n) for n in Inputs._fields} | {
        "self_keep": True, "exclude_self": False, "eps": 0.0, "is_causal": False,
        "policy_grad": "exact", "scale": 8**-0.5, **options,
    }  # fmt: skip
    policy = arguments["policy"]
    if policy is not None:
        shape = policy.shape[:2] if policy.shape[2:] == (1,) else policy.shape
        arguments["policy"] = policy.double().view(shape)
    grad, grad_lse = oracle.cotangents(inputs)
    grads = OutputGrads(grad.transpose(1, 2), grad_lse)
    needs = Needs(True, policy is not None and arguments["policy_grad"] != "none", True)
    rest = {n: t for n, t in arguments.items() if n in ScoreInputs._fields}
    rest |= {"query_weight": None, "lse": None, "head_reduce": "sum"}
    with torch.no_grad():
        results = reference.policy_attention(Inputs(**arguments))
        backward = reference.policy_attention_backward(Inputs(**arguments), results, grads, needs)
        score = reference.attention_scores(ScoreInputs(**rest))
    got = {"out": results[0].transpose(1, 2), "lse": results[1]}
    got |= {n: t.transpose(1, 2) for n, t in zip("qkv", backward, strict=False)}
    truth = oracle.results(oracle.attention, inputs, grad, grad_lse, **options)
    for name, t in (("policy", backward[3]), ("size", backward[4])):
        if name in truth:
            got[name] = None if truth[name] is None else t.view(truth[name].shape)
    sums = oracle.magnitudes(**inputs, grad=grad, grad_lse=grad_lse, **options)
    oracle.assert_exact(got, truth, sums)
    maps = {n: t for n, t in options.items() if n != "policy_grad"}
    weights = {n: t for n, t in inputs.items() if n != "v"}
    expected = oracle.scores(**weights, head_reduce="sum", **maps)
    torch.testing.assert_close(score, expected, rtol=1e-10, atol=1e-12)


# ---- precision ----


def check_budget(inputs, options):
    """Errors against float64 are at most twice those of users' code in the same dtype.

    This holds for the largest error and for the mean square. Each term of a sum may have a rounding
    of the dtype, which users' attention maps have.
    """
    grad, grad_lse = oracle.cotangents(inputs)
    got = oracle.results(attend, inputs, grad, grad_lse, **options)
    plain = oracle.results(oracle.recipe, inputs, grad, grad_lse, **options)
    wide = widened(inputs)
    truth = oracle.results(oracle.attention, wide, grad.double(), grad_lse, **options)
    sums = oracle.magnitudes(**wide, grad=grad, grad_lse=grad_lse, **options)
    eps = torch.finfo(inputs["q"].dtype).eps
    terms = eps / torch.finfo(torch.float32).eps
    wrong = []
    for name, expected in truth.items():
        try:
            assert_within_error_budget(
                got[name], plain[name], expected, magnitude=terms * sums[name], name=name
            )
        except AssertionError as error:
            wrong.append(str(error))
        unit = torch.finfo(got[name].dtype).eps * expected.abs() + eps * sums[name] + 1e-280
        errors = [((x[name] - expected) / unit).square().mean().sqrt() for x in (got, plain)]
        if not errors[0] <= 2 * errors[1] + 0.25:  # 0.25: the result's own rounding
            units = f"{errors[0]:.3g} units in the mean, the reference by {errors[1]:.3g}"
            wrong.append(f"{name}: off by {units}")
    assert not wrong, "\n".join(wrong)


BUDGETED = [
    name
    for name, (kinds, options) in CASES.items()
    if kinds.get("policy") not in ("bool", "none kept") and options.get("policy_grad") is None
    # Rows that see no kept key are 0/0 in users' code.
    if not (options.get("self_keep") is False and options.get("eps", 0) == 0)
    # With all weight on dropped keys, rows are also 0/0.
    if name != "wide logits, hard" and "causal, hard, own" not in name
]


@pytest.mark.isa
@pytest.mark.parametrize("case", BUDGETED)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_precision(dtype, case, backend, device):
    kinds, options = CASES[case]
    kinds = {**kinds, "logits": min(kinds.get("logits", 1.0), 8.0)}
    for tokens, width in ((23, 24), (90, 40)):
        inputs = random_attention(2, 4, tokens, width, dtype=dtype, device=device, seed=10, **kinds)
        check_budget(inputs, options)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(197, 64), (64, 80), (17, 1), (33, 5), (2, 32)])
def test_precision_of_sizes(tokens, width, dtype, backend, device):
    common = {"dtype": dtype, "device": device}
    kinds = {"policy": "per-head", "zero_sizes": 0.1, "key_heads": 1}
    check_budget(random_attention(1, 2, tokens, width, seed=11, **common, **kinds), {})
    kinds = {"policy": "hard", "value_width": width + 3}
    inputs = random_attention(1, 2, tokens, width, seed=12, **common, **kinds)
    check_budget(inputs, {"eps": 1e-6})


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
def test_dtypes_and_layout_of_results(dtype, backend, device):
    """The dtype of sums for lse; the output is [B, N, H, D] in memory, for the next layer."""
    inputs = random_attention(2, 3, 9, 5, policy="soft", dtype=dtype, device=device, zero_sizes=0.0)
    inputs = {n: t.requires_grad_() for n, t in inputs.items()}
    out, lse = tokenops.policy_attention(**inputs, return_lse=True)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert (out.dtype, lse.dtype) == (dtype, sums)
    assert (out.shape, lse.shape) == ((2, 3, 9, 5), (2, 3, 9))
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    out.sum().backward()
    for name, t in inputs.items():
        assert (t.grad.dtype, t.grad.shape) == (t.dtype, t.shape), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_policies_and_sizes_of_other_dtypes(dtype, backend, device):
    inputs = random_attention(2, 2, 9, 4, policy="hard", zero_sizes=0.0, device=device)
    inputs["size"] = inputs["size"].round()
    other = {n: inputs[n].to(dtype).requires_grad_() for n in ("policy", "size")}
    out = tokenops.policy_attention(**{**inputs, **other})
    torch.testing.assert_close(out, tokenops.policy_attention(**inputs))
    gradients = torch.autograd.grad(out.pow(2).sum(), list(other.values()))
    assert [g.dtype for g in gradients] == [dtype, dtype]


# ---- layouts ----


def assert_same(actual, expected, backend, name):
    """Equal bits for kernels, which pack operands; PyTorch's matrix products depend on strides."""
    if backend == "native":
        assert_same_bits(actual, expected, name=name)
    else:
        torch.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}")


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype, layout, backend, device):
    kinds = {"policy": "hard", "key_heads": 2, "dtype": dtype, "device": device, "seed": 13}
    inputs = random_attention(2, 4, 21, 12, layout=layout, **kinds)
    dense = {n: t.clone(memory_format=torch.contiguous_format) for n, t in inputs.items()}
    grad, _ = oracle.cotangents(inputs)
    got, expected = (oracle.results(attend, x, grad, eps=1e-3) for x in (inputs, dense))
    for name, value in expected.items():
        assert_same(got[name], value, backend, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_qkv(dtype, backend, device):
    """q, k and v are views of one tensor, and their gradients add up to one tensor."""
    packed = random_tokens(2, 17, 3 * 4 * 8, dtype=dtype, device=device).view(2, 17, 3, 4, 8)
    policy = (torch.arange(17, device=device) % 3 > 0).float().expand(2, 17)

    def gradient(dense):
        leaf = packed.clone().requires_grad_()
        q, k, v = leaf.permute(2, 0, 3, 1, 4)
        if dense:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = tokenops.policy_attention(q, k, v, policy, eps=1e-6).transpose(1, 2).flatten(2)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)

    for got, expected in zip(gradient(False), gradient(True), strict=True):
        assert_same(got, expected, backend, "packed")


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layouts_of_gradients(dtype, backend, device):
    """The gradient of ``sum()`` has stride 0; that of a transposed output is transposed."""
    inputs = random_attention(2, 2, 18, 8, policy="hard", dtype=dtype, device=device)
    grad, _ = oracle.cotangents(inputs)
    views = [
        (grad, "dense"),
        (grad.transpose(1, 2).contiguous().transpose(1, 2), "as the output"),
        (grad.mT.contiguous().mT, "transposed"),
        (grad[:1].expand(grad.shape), "one for all"),
        (stride_zero(grad, 0.5), "stride 0"),
        (grad[..., :1].expand(grad.shape), "stride 0 in a row"),
    ]
    for view, name in views:
        got = oracle.results(attend, inputs, view)
        expected = oracle.results(attend, inputs, view.clone().contiguous())
        for key, value in expected.items():
            assert_same(got[key], value, backend, f"{key} of a gradient {name}")


def test_weights_of_any_layout(backend, device):
    inputs = random_attention(
        3, 2, 14, 4, policy="per-head", zero_sizes=0.2, padding=0.3, device=device
    )
    expected = tokenops.policy_attention(**inputs)
    for name in ("policy", "size", "key_padding_mask"):
        wide = inputs[name][..., None].repeat_interleave(3, -1)[..., 1]
        turned = inputs[name].mT.contiguous().mT
        for view in (wide, turned):
            assert not view.is_contiguous()
            assert_same_bits(tokenops.policy_attention(**{**inputs, name: view}), expected)
    one = {n: inputs[n][:1].expand(inputs[n].shape) for n in ("policy", "size", "key_padding_mask")}
    dense = {n: t.clone().contiguous() for n, t in one.items()}
    assert_same_bits(
        tokenops.policy_attention(**{**inputs, **one}),
        tokenops.policy_attention(**{**inputs, **dense}),
    )
