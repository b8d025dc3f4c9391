# SPDX-License-Identifier: Apache-2.0
"""attention_scores: values and gradients against whole maps in float64."""

import math

import attention_oracle as oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenops
from tokenops.testing import (
    LAYOUTS,
    assert_same_bits,
    assert_within_error_budget,
    random_attention,
    random_tokens,
)

REDUCTIONS = ("mean", "sum", "none")

#: For each case: options of ``random_attention``, and options of the call.
CASES = {
    "plain": ({}, {}),
    "soft": ({"policy": "soft"}, {}),
    "hard": ({"policy": "hard"}, {}),
    "hard, own dropped, eps": ({"policy": "hard"}, {"self_keep": False, "eps": 1e-2}),
    "bool": ({"policy": "bool"}, {"eps": 1e-6}),
    "column, size": ({"policy": "column", "zero_sizes": 0.2}, {"eps": 1e-2}),
    "per head": ({"policy": "per-head", "padding": 0.2}, {}),
    "exclude": ({}, {"exclude_self": True}),
    "exclude, hard": ({"policy": "hard"}, {"exclude_self": True}),
    "exclude, per head, eps": ({"policy": "per-head"}, {"exclude_self": True, "eps": 1e-2}),
    "exclude, own dropped": (
        {"policy": "soft"}, {"exclude_self": True, "self_keep": False, "eps": 1e-2},
    ),
    "size with zeros": ({"zero_sizes": 0.3}, {"exclude_self": True}),
    "padding": ({"padding": 0.4}, {"eps": 1e-2}),
    "causal": ({}, {"is_causal": True}),
    "causal, grouped": ({"key_heads": 2, "policy": "hard"}, {"is_causal": True}),
    "causal, grouped, exclude, eps": (
        {"key_heads": 1, "policy": "per-head", "padding": 0.1, "zero_sizes": 0.1},
        {"is_causal": True, "exclude_self": True, "eps": 1e-3},
    ),
    "wide logits": ({"logits": 60.0, "policy": "hard"}, {}),
    "none kept": ({"policy": "none kept"}, {}),
    "none kept, exclude": ({"policy": "none kept"}, {"exclude_self": True}),
    "none kept, eps": ({"policy": "none kept"}, {"self_keep": False, "eps": 1e-2}),
    "scale": ({"policy": "hard"}, {"scale": 0.7}),
}  # fmt: skip


def scores_inputs(*sizes, **kinds):
    return {n: t for n, t in random_attention(*sizes, **kinds).items() if n != "v"}


def weights(kind, heads, *rows, dtype=torch.float64, device="cpu"):
    """Weights of queries, some 0 and some negative."""
    shape = {None: None, "shared": rows[1:], "each": rows, "per head": (rows[0], heads, rows[1])}
    if kind is None:
        return None
    w = torch.randn(shape[kind], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return w.masked_fill(torch.arange(w.shape[-1]) % 4 == 1, 0).to(device, dtype)


def gradients(function, inputs, grad, **options):
    leaves = {
        n: t.detach().requires_grad_(t.is_floating_point() and n in oracle.GRADIENTS)
        for n, t in inputs.items()
        if t is not None
    }
    score = function(**leaves, **options)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(
        score, list(wanted.values()), grad.to(score.dtype), materialize_grads=True
    )
    return {"score": score.detach(), **dict(zip(wanted, grads, strict=True))}


def cotangent(inputs, head_reduce, seed=5):
    batch, heads, keys = inputs["q"].shape[0], inputs["q"].shape[1], inputs["k"].shape[2]
    device = inputs["q"].device
    g = random_tokens(batch, heads, keys, dtype=torch.float64, device=device, seed=seed)
    return g if head_reduce == "none" else g[:, 0]


def check(inputs, **options):
    """Scores and gradients in float64 are off by at most 1e-10 of the sum of their terms."""
    grad = cotangent(inputs, options.get("head_reduce", "mean"))
    got = gradients(tokenops.attention_scores, inputs, grad, **options)
    truth = gradients(oracle.scores, inputs, grad, **options)
    sums = oracle.score_magnitudes(
        **{n: t for n, t in inputs.items() if t is not None}, grad=grad, **options
    )
    oracle.assert_exact(got, truth, sums)


@pytest.mark.isa
@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients(case, backend, device):
    kinds, options = CASES[case]
    inputs = scores_inputs(2, 4, 19, 8, dtype=torch.float64, device=device, seed=1, **kinds)
    kinds_of_weights = (None, "shared", "each", "per head")
    for i, weight in enumerate(kinds_of_weights):
        w = weights(weight, 4, 2, 19, device=device)
        check({**inputs, "query_weight": w}, head_reduce=REDUCTIONS[i % 3], **options)


@pytest.mark.isa
@pytest.mark.parametrize("head_reduce", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, "shared", "each", "per head"])
def test_reductions_and_weights(weight, head_reduce, backend, device):
    kinds = {"policy": "hard", "key_heads": 2, "dtype": torch.float64, "seed": 2}
    inputs = scores_inputs(2, 4, 67, 12, device=device, **kinds)
    w = weights(weight, 4, 2, 67, device=device)
    check({**inputs, "query_weight": w}, head_reduce=head_reduce)


INDICES = {
    "class token": [0],
    "last": [-1],
    "first": range(3),
    "tuple": (5, 2, -1, 16),
    "repeated": [3, 3, -14, 0],
    "none": [],
    "tensor": torch.tensor([7, -2, 0]),
    "int32": torch.tensor([16, -17], dtype=torch.int32),
    "each": torch.tensor([[0, 5, -1], [9, 9, 2]]),
}


@pytest.mark.isa
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"exclude_self": True}], ids=str)
@pytest.mark.parametrize("index", INDICES)
def test_query_index(index, options, backend, device):
    """Only these queries take part, with their own positions and weights."""
    index = INDICES[index]
    index = index.to(device) if isinstance(index, torch.Tensor) else index
    rows = index.shape[-1] if isinstance(index, torch.Tensor) else len(index)
    for kinds in ({}, {"policy": "hard", "key_heads": 1}, {"policy": "per-head", "padding": 0.2}):
        inputs = scores_inputs(2, 2, 17, 6, dtype=torch.float64, device=device, seed=3, **kinds)
        for weight in (None, "shared", "per head"):
            w = weights(weight, 2, 2, rows, device=device)
            check({**inputs, "query_weight": w}, query_index=index, **options)


def test_query_index_is_a_choice_of_weights(backend, device):
    """The index of a row is equivalent to a weight of 1 for this row and 0 for all others."""
    inputs = scores_inputs(2, 3, 23, 8, policy="hard", device=device)
    for row in (0, 7, -1):
        w = torch.zeros(23, device=device)
        w[row] = 1
        got = tokenops.attention_scores(**inputs, query_index=[row])
        expected = tokenops.attention_scores(**inputs, query_weight=w)
        torch.testing.assert_close(got, expected)
        tensor = tokenops.attention_scores(**inputs, query_index=torch.tensor([row], device=device))
        torch.testing.assert_close(tensor, got)


@pytest.mark.parametrize("query_index", [None, [0], [-1], torch.tensor([0])], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_one_query_among_several_keys(query_index, eps, backend, device):
    """Its own key is unknown: self_keep has no effect."""
    inputs = random_attention(2, 4, 9, 8, policy="hard", key_heads=2, device=device)
    q, k, policy = (inputs[n] for n in ("q", "k", "policy"))
    row = q[:, :, :1]
    index = query_index.to(device) if isinstance(query_index, torch.Tensor) else query_index
    got = tokenops.attention_scores(row, k, query_index=index, policy=policy, eps=eps)
    double = {"policy": policy.double(), "eps": eps, "self_keep": False}
    expected = oracle.scores(row.double(), k.double(), **double)
    torch.testing.assert_close(got, expected.float())
    one = tokenops.attention_scores(q[:, :, :1], k[:, :, :1], policy=policy[:, :1], eps=eps)
    torch.testing.assert_close(one, torch.ones_like(one))  # one query and one key: its own
    with pytest.raises(ValueError, match=r"attention_scores: self_keep must be False unless"):
        tokenops.attention_scores(q[:, :, :2], k, policy=policy)
    with pytest.raises(ValueError, match=r"policy_attention: self_keep .* or a query_position"):
        tokenops.policy_attention(row, k, k, policy)


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 5, 32, 64, 80])
@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 64, 197])
def test_sizes(tokens, width, backend, device):
    kinds = {"policy": "per-head", "zero_sizes": 0.1, "key_heads": 1, "dtype": torch.float64}
    check(scores_inputs(2, 2, tokens, width, device=device, seed=4, **kinds), eps=1e-3)


@pytest.mark.isa
@pytest.mark.parametrize(
    ("queries", "keys"), [(5, 23), (23, 5), (7, 0), (0, 7), (1100, 60), (60, 1100)]
)
def test_queries_and_keys_that_differ_in_number(queries, keys, backend, device):
    common = {"keys": keys, "dtype": torch.float64, "device": device, "seed": 5}
    for kinds in ({}, {"policy": "hard"}):
        inputs = scores_inputs(1, 2, queries, 6, **common, **kinds)
        for options in ({}, {"is_causal": True, "eps": 1e-2}):
            check(inputs, self_keep=False, **options)


@pytest.mark.isa
@given(
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    queries=st.integers(0, 20),
    keys=st.one_of(st.none(), st.integers(0, 30)),
    width=st.integers(1, 18),
    policy=st.sampled_from([None, "soft", "hard", "bool", "column", "per-head", "none kept"]),
    zero_sizes=st.sampled_from([None, 0.0, 0.3]),
    padding=st.sampled_from([0.0, 0.3, 0.9]),
    eps=st.sampled_from([0.0, 0.0, 1e-6, 1e-2]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    weight=st.sampled_from([None, "shared", "each", "per head"]),
    rows=st.one_of(st.none(), st.integers(0, 4)),
    head_reduce=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 1000),
)
def test_anything(
    backend, device, groups, queries, keys, width, policy, zero_sizes, padding, eps, flags, weight,
    rows, head_reduce, seed,
):  # fmt: skip
    heads, key_heads = groups
    inputs = scores_inputs(
        2, heads, queries, width, keys=keys, key_heads=key_heads, policy=policy,
        zero_sizes=zero_sizes, padding=padding, dtype=torch.float64, device=device,
        seed=seed,
    )  # fmt: skip
    self_keep, exclude_self, causal = flags
    options = {"eps": eps, "exclude_self": exclude_self, "is_causal": causal}
    options |= {"self_keep": self_keep and keys in (None, queries), "head_reduce": head_reduce}
    if rows is not None and queries > 0:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(-queries, queries, (2, rows), generator=generator)
        options["query_index"] = index.to(device)
    count = rows if "query_index" in options else queries
    w = weights(weight, heads, 2, count, device=device)
    check({**inputs, "query_weight": w}, **options)


# ---- sums of scores ----


def test_rows_give_away_all_of_their_weight(backend, device):
    inputs = scores_inputs(
        2, 4, 31, 8, key_heads=2, policy="hard", dtype=torch.float64, device=device
    )
    w = weights("each", 4, 2, 31, device=device)
    for options in ({}, {"eps": 0.1}, {"is_causal": True}):
        score = tokenops.attention_scores(**inputs, query_weight=w, **options)
        torch.testing.assert_close(score.sum(1), w.sum(1), rtol=1e-12, atol=1e-12)
        ones = tokenops.attention_scores(**inputs, head_reduce="none", **options)
        torch.testing.assert_close(
            ones.sum(2), torch.full_like(ones.sum(2), 31), rtol=1e-12, atol=1e-12
        )
    less = tokenops.attention_scores(**inputs, exclude_self=True).sum(1)
    assert (less < 31).all()


def test_scores_of_what_takes_no_part(backend, device):
    inputs = scores_inputs(2, 2, 15, 4, policy="hard", zero_sizes=0.3, padding=0.3, device=device)
    score = tokenops.attention_scores(**inputs)
    gone = inputs["key_padding_mask"] | (inputs["size"] == 0)
    assert (score[gone] == 0).all()
    empty = {**inputs, "key_padding_mask": torch.ones(2, 15, dtype=torch.bool, device=device)}
    for eps in (0.0, 1e-3):
        assert (tokenops.attention_scores(**empty, eps=eps) == 0).all()
    inputs["policy"].zero_()
    assert (tokenops.attention_scores(**inputs, self_keep=False) == 0).all()


def test_scores_are_sums_of_the_applied_attention(backend, device):
    """With one-hot values, the output is the attention map."""
    inputs = random_attention(
        2, 3, 14, 5, policy="per-head", zero_sizes=0.0, dtype=torch.float64, device=device
    )
    inputs["v"] = torch.eye(14, dtype=torch.float64, device=device).expand(2, 3, 14, 14)
    for options in ({}, {"eps": 0.1}, {"is_causal": True, "eps": 0.1}):
        attention = tokenops.policy_attention(**inputs, **options)  # [B, H, Nq, Nk]
        rest = {n: t for n, t in inputs.items() if n != "v"}
        score = tokenops.attention_scores(**rest, head_reduce="none", **options)
        torch.testing.assert_close(score, attention.sum(2), rtol=1e-12, atol=1e-12)


# ---- reuse of lse ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_reuse_of_lse(case, dtype, backend, device):
    """Results and gradients are the same up to rounding; lse gets no gradient."""
    kinds, options = CASES[case]
    inputs = random_attention(2, 4, 19, 8, dtype=dtype, device=device, seed=6, **kinds)
    plain = {n: v for n, v in options.items() if n != "exclude_self"}
    _, lse = tokenops.policy_attention(**inputs, **plain, return_lse=True)
    rest = {n: t for n, t in inputs.items() if n != "v"}
    for index in (None, [2, -1], torch.tensor([[0], [7]], device=device)):
        grad = cotangent(rest, "mean")
        expected, got = (
            gradients(tokenops.attention_scores, rest, grad, query_index=index, **options, **more)
            for more in ({}, {"lse": lse.requires_grad_()})
        )
        tolerance = {"rtol": 1e-11, "atol": 1e-11}
        if dtype != torch.float64:
            tolerance = {"rtol": 2e-4, "atol": 2e-4}
        if "wide" in case:
            tolerance = {"rtol": 1e-2, "atol": 1e-2}
        for name, t in expected.items():
            torch.testing.assert_close(got[name], t, **tolerance, msg=name)


# ---- precision ----


BUDGETED = [
    name
    for name, (kinds, options) in CASES.items()
    if kinds.get("policy") not in ("bool", "none kept") and kinds.get("logits", 0.0) < 10
]


@pytest.mark.isa
@pytest.mark.parametrize("case", BUDGETED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(dtype, case, backend, device):
    """Errors are at most twice those of users' code; all terms have one sign."""
    kinds, options = CASES[case]
    for index in (None, [0, -1]):
        inputs = scores_inputs(2, 4, 90, 40, dtype=dtype, device=device, seed=7, **kinds)
        got = tokenops.attention_scores(**inputs, query_index=index, **options)
        plain = oracle.recipe_scores(**inputs, query_index=index, **options)
        wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        truth = oracle.scores(**wide, query_index=index, **options)
        assert got.dtype == torch.float32
        assert_within_error_budget(got, plain, truth, magnitude=truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_reduce", REDUCTIONS)
def test_precision_of_gradients(head_reduce, dtype, backend, device):
    """Gradients of q and k have their dtype, and are computed in float32 at least."""
    kinds = {"policy": "soft", "key_heads": 2, "zero_sizes": 0.1, "device": device}
    inputs = scores_inputs(2, 4, 50, 16, dtype=dtype, seed=8, **kinds)
    w = weights("each", 4, 2, 50, dtype=torch.float32).to(device)
    inputs["query_weight"] = w
    grad = cotangent(inputs, head_reduce).float().to(device)
    wide = {n: t.double() for n, t in inputs.items()}
    results = [
        gradients(f, x, grad, head_reduce=head_reduce)
        for f, x in (
            (tokenops.attention_scores, inputs),
            (oracle.recipe_scores, inputs),
            (oracle.scores, wide),
        )
    ]
    for name in results[0]:
        got, plain, truth = (r[name] for r in results)
        assert got.dtype == inputs.get(name, got).dtype
        assert_within_error_budget(got, plain, truth, name=name)


# ---- few queries ----

#: Heads, key heads and queries. Up to 16 queries per key head, the native kernels do not pack the
#: keys; they have tiles of one, two and four queries.
FEW = [
    (1, 1, 1), (2, 2, 2), (3, 1, 1), (2, 1, 2), (4, 2, 3), (7, 1, 1), (4, 1, 3), (1, 1, 15),
    (4, 2, 8), (17, 1, 1), (2, 1, 9),
]  # fmt: skip


def served(width, dtype, backend, device):
    """The width that the backend serves: at most 128 in float32 and float64 on Triton."""
    # On the CPU the interpreter computes bfloat16 in float32.
    narrow = dtype.itemsize > 2 or (dtype == torch.bfloat16 and device == "cpu")
    return min(width, 128) if backend == "triton" and narrow else width


@pytest.mark.isa
@pytest.mark.parametrize("width", [1, 7, 16, 33, 64, 130])
@pytest.mark.parametrize(("heads", "key_heads", "queries"), FEW)
def test_few_queries(heads, key_heads, queries, width, backend, device):
    width = served(width, torch.float64, backend, device)
    common = {"key_heads": key_heads, "dtype": torch.float64, "device": device, "seed": 11}
    w = weights("per head", heads, 2, queries, device=device)
    for keys in (1, 18, 271):
        inputs = scores_inputs(2, heads, queries, width, keys=keys, **common)
        check(inputs, self_keep=False)
        kinds = {"policy": "per-head", "padding": 0.3, "zero_sizes": 0.1}
        inputs = scores_inputs(2, heads, queries, width, keys=keys, **common, **kinds)
        for eps in (0.0, 1e-2):
            check({**inputs, "query_weight": w}, self_keep=False, eps=eps, head_reduce="none")


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [5, 48, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_of_few_queries(dtype, width, layout, backend, device):
    width = served(width, dtype, backend, device)
    common = {"dtype": dtype, "device": device, "layout": layout, "seed": 12}
    for heads, key_heads, rows in ((1, 1, 1), (6, 2, 1), (4, 2, 7)):
        for kinds in ({}, {"policy": "hard", "padding": 0.2}):
            inputs = scores_inputs(2, heads, 83, width, key_heads=key_heads, **common, **kinds)
            options = {"query_index": range(83 - rows, 83)}
            got = tokenops.attention_scores(**inputs, **options)
            plain = oracle.recipe_scores(**inputs, **options)
            wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
            truth = oracle.scores(**wide, **options)
            assert_within_error_budget(got, plain, truth, magnitude=truth)


@pytest.mark.isa
@pytest.mark.native_only
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_query_has_the_same_bits_alone_and_among_few(dtype, backend):
    """For any tile and any number of threads."""
    kinds = {"key_heads": 2, "policy": "hard", "dtype": dtype}
    inputs = scores_inputs(2, 4, 1100, 64, **kinds)
    rows, before = [9, 1, 1099, 400, 7], torch.get_num_threads()
    try:
        for count in range(1, 6):
            w = torch.eye(count)[:, None].expand(-1, 2, -1)  # one query at a time
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for i in range(count):
                    alone, among = (
                        tokenops.attention_scores(
                            **inputs, head_reduce="none", query_index=index, query_weight=weight
                        )
                        for index, weight in (([rows[i]], None), (rows[:count], w[i].double()))
                    )
                    assert_same_bits(among, alone, name=f"{i} of {count}, {threads} threads")
    finally:
        torch.set_num_threads(before)


# ---- layouts ----


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype, layout, backend, device):
    kinds = {"policy": "hard", "key_heads": 2, "dtype": dtype, "device": device, "seed": 9}
    inputs = scores_inputs(2, 4, 21, 12, layout=layout, **kinds)
    dense = {n: t.clone(memory_format=torch.contiguous_format) for n, t in inputs.items()}
    w = torch.linspace(-1, 1, 42, dtype=torch.float64, device=device).view(21, 2)[:, 1]
    tolerance = {} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-13}
    for head_reduce in REDUCTIONS:
        for index in (None, [0], [4, 2]):
            rows = w[: len(index)] if index else w
            got, expected = (
                tokenops.attention_scores(
                    **x, head_reduce=head_reduce, query_weight=rows, query_index=index
                )
                for x in (inputs, dense)
            )
            if backend == "native":
                assert_same_bits(got, expected)
            else:
                torch.testing.assert_close(got, expected, **tolerance)


def test_stride_zero_gradients(backend, device):
    inputs = scores_inputs(2, 2, 11, 4, policy="soft", dtype=torch.float64, device=device)
    leaves = {n: t.requires_grad_() for n, t in inputs.items()}
    for head_reduce in REDUCTIONS:
        for index in (None, [1, 5]):
            options = {"head_reduce": head_reduce, "query_index": index, "exclude_self": True}
            got = torch.autograd.grad(
                tokenops.attention_scores(**leaves, **options).sum(), list(leaves.values())
            )
            expected = torch.autograd.grad(
                oracle.scores(**leaves, **options).sum(), list(leaves.values())
            )
            for name, a, b in zip(leaves, got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


# ---- derivatives ----


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        ({}, {"head_reduce": "none"}),
        ({"policy": "soft", "key_heads": 1}, {"eps": 1e-2, "exclude_self": True}),
        ({"policy": "per-head", "zero_sizes": 0.0}, {"is_causal": True}),
        ({"policy": "soft", "key_heads": 1}, {"is_causal": True, "head_reduce": "none"}),
        ({"policy": "soft"}, {"query_index": [0, -1], "head_reduce": "sum"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight", [None, "each", "per head"])
def test_gradcheck(weight, kinds, options, backend, device):
    inputs = scores_inputs(1, 2, 4, 3, dtype=torch.float64, device=device, seed=10, **kinds)
    if "policy" in inputs:
        inputs["policy"] = inputs["policy"] + 0.1
    if weight is not None:
        rows = 2 if "query_index" in options else 4
        inputs["query_weight"] = weights(weight, 2, 1, rows, device=device)
    names = list(inputs)

    def call(*values):
        return tokenops.attention_scores(**dict(zip(names, values, strict=True)), **options)

    values = [inputs[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(call, values)
    if weight != "each":
        assert torch.autograd.gradgradcheck(call, values)


def test_only_inputs_that_require_a_gradient_get_one(backend, device):
    inputs = scores_inputs(1, 2, 7, 4, policy="soft", zero_sizes=0.0, device=device)
    inputs["query_weight"] = torch.rand(7, device=device)
    expected = gradients(tokenops.attention_scores, inputs, cotangent(inputs, "mean"))
    for name, t in inputs.items():
        leaf = t.clone().requires_grad_()
        score = tokenops.attention_scores(**{**inputs, name: leaf})
        (got,) = torch.autograd.grad(score, leaf, cotangent(inputs, "mean").float())
        torch.testing.assert_close(got, expected[name], msg=name)
    score = tokenops.attention_scores(**inputs)
    assert not score.requires_grad


def test_score_at_a_dropped_key_has_a_gradient(backend, device):
    """A predictor learns about dropped tokens from this gradient."""
    inputs = scores_inputs(1, 2, 9, 4, policy="hard", device=device)
    policy = inputs["policy"].requires_grad_()
    score = tokenops.attention_scores(**inputs, self_keep=False)
    assert (score[policy == 0] == 0).all()
    (gradient,) = torch.autograd.grad((score * torch.rand(9, device=device)).sum(), policy)
    assert (gradient[policy == 0] != 0).all()
    assert math.isfinite(gradient.sum().item())
