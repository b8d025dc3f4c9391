# SPDX-License-Identifier: Apache-2.0
"""Rules for the arguments of all functions: integers, layouts, messages of one line."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import tokenops
from tokenops import TokenMap, _checks
from tokenops.compat import dynamicvit, evit, tome, tomesd
from tokenops.layers import KeepPredictor, MergeStep, PolicyAttention

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 12, 4, generator=GENERATOR)
Q = torch.randn(2, 2, 12, 4, generator=GENERATOR)
SCORES = X[..., 0]
LABELS = torch.arange(12).expand(2, 12) % 4
MAP = TokenMap.from_assign(LABELS, 4)

#: Functions with an argument that is a count, here 4.
COUNTS = {
    "match: r": lambda n: tokenops.match(X, n).assign,
    "match: num_prefix": lambda n: tokenops.match(X, 2, num_prefix=n).assign,
    "strided: k": lambda n: tokenops.match(X, 4, split=tokenops.strided(n)).assign,
    "grid: w": lambda n: tokenops.match(X, 4, split=tokenops.grid(3, n, 1, 2)).assign,
    "grid: h": lambda n: tokenops.match(X, 4, split=tokenops.grid(n, 3, 2, 1)).assign,
    "grid: sy": lambda n: tokenops.match(X, 4, split=tokenops.grid(12, 1, n, 1)).assign,
    "grid: sx": lambda n: tokenops.match(X, 4, split=tokenops.grid(1, 12, 1, n)).assign,
    "TokenMap.from_assign: num_tokens": lambda n: TokenMap.from_assign(LABELS, n).offsets,
    "prune: keep": lambda n: tokenops.prune(SCORES, n).assign,
    "prune: num_prefix": lambda n: tokenops.prune(SCORES, 2, num_prefix=n).assign,
    "topk_keep: k": lambda n: tokenops.topk_keep(SCORES, n),
    "topk_keep: num_prefix": lambda n: tokenops.topk_keep(SCORES, 2, num_prefix=n),
    "attention_scores: query_index": lambda n: tokenops.attention_scores(Q, Q, query_index=[1, n]),
    "MergeStep: r": lambda n: MergeStep(n)(X, X)[0],
    "MergeStep: num_prefix": lambda n: MergeStep(2, num_prefix=n)(X, X)[0],
    "KeepPredictor: dim": lambda n: KeepPredictor(n)(X).shape,
    "PolicyAttention: dim": lambda n: PolicyAttention(n, 2)(X)[0].shape,
    "PolicyAttention: num_heads": lambda n: PolicyAttention(4, n)(X)[0].shape,
    "bipartite_soft_matching: r": lambda n: tome.bipartite_soft_matching(X, n, True)[0](X),
    "kth_bipartite_soft_matching: k": lambda n: tome.kth_bipartite_soft_matching(X, n)[0](X),
    "bipartite_soft_matching_random2d: r": lambda n: tomesd.bipartite_soft_matching_random2d(
        X, 4, 3, 2, 2, n, no_rand=True
    )[0](X),
    "class_attention: num_prefix": lambda n: evit.class_attention(Q, Q, num_prefix=n),
    "complement_idx: dim": lambda n: evit.complement_idx(LABELS[:, :2], n),
    "drop_tokens: tokens": lambda n: evit.drop_tokens(X, SCORES[:, 1:], tokens=n)[0],
    "drop_tokens: num_prefix": lambda n: evit.drop_tokens(X, SCORES[:, 4:], tokens=2, num_prefix=n)[
        0
    ],
}


class Index:
    def __index__(self) -> int:
        return 4


INTEGERS = {
    "int64": np.int64(4),
    "uint8": np.uint8(4),
    "array": np.array(4),
    "tensor": torch.tensor(4),
    "int8 tensor": torch.tensor(4, dtype=torch.int8),
    "index": Index(),
}
NO_INTEGERS = {
    "bool": True,
    "NumPy bool": np.True_,
    "float": 4.0,
    "NumPy float": np.float64(4.0),
    "str": "4",
    "float tensor": torch.tensor(4.0),
    "bool tensor": torch.tensor(True),
    "1-D tensor": torch.tensor([[4]]),
    "1-D array": np.array([4]),
    "list": [4],
}


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("function", COUNTS)
def test_integers_are_what_has_an_index(function, integer):
    assert type(INTEGERS[integer]) is not int
    expected, got = (torch.as_tensor(COUNTS[function](number)) for number in (4, INTEGERS[integer]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("value", NO_INTEGERS)
@pytest.mark.parametrize("function", COUNTS)
def test_what_is_no_integer(function, value):
    with pytest.raises((TypeError, ValueError)) as raised:
        COUNTS[function](NO_INTEGERS[value])
    # prune and topk_keep take a tensor with a number for each image.
    if not (function in ("prune: keep", "topk_keep: k") and "tensor" in value):
        assert raised.type is TypeError
    # A layer's step is of the operator that it calls.
    assert function.partition(": ")[2] in str(raised.value) or "MergeStep" in function
    assert "\n" not in str(raised.value)


def test_random_split_takes_any_integer():
    for number in (4, np.int64(4), torch.tensor(4)):
        assert type(tokenops.random(number).num_sources) is int


def test_numbers_below_the_least_are_named():
    for number in (np.int64(-1), torch.tensor(-1)):
        with pytest.raises(ValueError, match="match: r must be >= 0, got int -1"):
            tokenops.match(X, number)


def test_a_tensor_has_no_value_while_it_is_traced():
    four = torch.tensor(4)
    with FakeTensorMode() as mode:
        fake, count = mode.from_tensor(X), torch.empty((), dtype=torch.int64)
        with pytest.raises(TypeError, match="match: r must be an int under tracing"):
            tokenops.match(fake, count)
    with pytest.raises(TypeError, match="match: r must be an int under tracing"):
        torch.func.vmap(lambda r: tokenops.match(X, r).assign)(torch.tensor([3, 4]))
    compiled = torch.compile(
        lambda x, r: tokenops.match(x, r).assign, backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="an int under tracing"):
        compiled(X, four)


# ---- layouts ----


def _nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(5, 4), torch.ones(7, 4)], layout=layout)


LAYOUTS = {
    "jagged": lambda: _nested(torch.jagged),
    "nested": lambda: _nested(torch.strided),
    "sparse": lambda: X.to_sparse(),
    "mkldnn": lambda: X.to_mkldnn(),
}

#: Functions of one tensor of a wrong layout, which is the first that they check.
TENSORS = {
    "match: metric": lambda t: tokenops.match(t, 2),
    "match: protected": lambda t: tokenops.match(X, 2, protected=t),
    "nearest: a": lambda t: tokenops.nearest(t, X),
    "nearest: b": lambda t: tokenops.nearest(X, t),
    "merge: x": lambda t: tokenops.merge(t, MAP),
    "merge: x[1]": lambda t: tokenops.merge([X, t], MAP),
    "merge: weight": lambda t: tokenops.merge(X, MAP, weight=t),
    "merge_wavg: size": lambda t: tokenops.merge_wavg(X, MAP, t),
    "unmerge: y": lambda t: tokenops.unmerge(t, MAP),
    "unmerge: residual": lambda t: tokenops.unmerge(X[:, :4], MAP, residual=t),
    "policy_attention: q": lambda t: tokenops.policy_attention(t, Q, Q),
    "policy_attention: v": lambda t: tokenops.policy_attention(Q, Q, t),
    "policy_attention: policy": lambda t: tokenops.policy_attention(Q, Q, Q, t),
    "policy_attention: size": lambda t: tokenops.policy_attention(Q, Q, Q, size=t),
    "attention_scores: k": lambda t: tokenops.attention_scores(Q, t),
    "attention_scores: query_weight": lambda t: tokenops.attention_scores(Q, Q, query_weight=t),
    "attention_scores: lse": lambda t: tokenops.attention_scores(Q, Q, lse=t),
    "prune: scores": lambda t: tokenops.prune(t, 2),
    "gumbel_keep: logits": tokenops.gumbel_keep,
    "keep_ratio_loss: decisions": lambda t: tokenops.keep_ratio_loss(t, 0.5),
    "bipartite_soft_matching: metric": lambda t: tome.bipartite_soft_matching(t, 2),
    "kth_bipartite_soft_matching: metric": lambda t: tome.kth_bipartite_soft_matching(t, 2),
    "softmax_with_policy: attn": lambda t: dynamicvit.softmax_with_policy(t, X[..., 0]),
    "batch_index_select: x": lambda t: dynamicvit.batch_index_select(t, LABELS),
    "masked_mean: x": lambda t: dynamicvit.masked_mean(t, X[..., 0]),
    "masked_mean: policy": lambda t: dynamicvit.masked_mean(X, t),
    "drop_tokens: x": lambda t: evit.drop_tokens(t, SCORES),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", TENSORS)
def test_tensors_of_other_layouts(function, layout):
    with pytest.raises(TypeError) as raised:
        TENSORS[function](LAYOUTS[layout]())
    message = str(raised.value)
    assert message.startswith(f"{function} must be a")
    assert "\n" not in message


def test_index_tensors_of_other_layouts():
    for call in (
        lambda: TokenMap.from_assign(LABELS.to_sparse(), 4),
        lambda: TokenMap.from_assign(LABELS, 4, torch.tensor([4, 4]).to_sparse()),
        lambda: tokenops.prune(SCORES, torch.tensor([4, 4]).to_sparse()),
        lambda: tokenops.match(X, 2, protected=(LABELS > 2).to_sparse()),
    ):
        with pytest.raises(TypeError, match=r"must be a dense tensor .* got a sparse_coo"):
            call()


# ---- messages ----


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Lines:
    def __repr__(self) -> str:
        return "a\nb" * 100


@pytest.mark.parametrize(
    "value",
    [
        list(range(100_000)),
        [[[[1.0] * 9] * 9] * 9] * 9,
        "x" * 10_000,
        b"x" * 10_000,
        dict.fromkeys(range(100), "y" * 100),
        np.zeros((50, 50)),
        [torch.zeros(100, 100)] * 50,
        torch.zeros(100, 100),
        Lines(),
        Broken(),
        10**5000,
        tuple(Lines() for _ in range(9)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_are_one_short_line(value):
    words = _checks.describe(value)
    assert "\n" not in words
    assert len(words) <= _checks.LONGEST + len(type(value).__name__) + 1
    for call in (
        lambda: tokenops.match(X, 2, order=value),
        lambda: tokenops.match(X, 2, split=value),
        lambda: tokenops.use_backend(value),
        lambda: tokenops.why_not(value),
        lambda: evit.drop_tokens(X, SCORES[:, 1:], value),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 300


def test_short_values_are_written_out():
    assert _checks.describe([1, 2.5, "a"]) == "list [1, 2.5, 'a']"
    assert _checks.describe(None) == "NoneType None"
    assert _checks.describe([torch.zeros(2).half()]) == (
        "list [a float16 tensor of shape [2] on cpu]"
    )
    assert _checks.describe(_nested(torch.strided)) == "a nested float32 tensor on cpu"
    assert _checks.describe(X.to_sparse()) == (
        "a sparse_coo float32 tensor of shape [2, 12, 4] on cpu"
    )
