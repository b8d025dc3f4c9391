# SPDX-License-Identifier: Apache-2.0
"""Bad input: the right exception, with a message that names the operator and the argument."""

import math

import numpy as np
import pytest
import torch

import tokenops
from tokenops import TokenMap, _backend
from tokenops.testing import as_layout, exact_metric, nearest_regret
from tokenops.testing.samples import Sizes, calls

B, N, M, C, D = 2, 8, 5, 3, 4

X = torch.zeros(B, N, C)
Y = torch.zeros(B, M, C)
METRIC = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))
KEYS = METRIC[:, None].expand(B, 3, N, D)
MAP = TokenMap.from_assign(torch.arange(N).expand(B, N) % M, M)
LABELS = MAP.assign
SOURCES, DESTINATIONS = torch.arange(0, N, 2), torch.arange(1, N, 2)
ALL = torch.ones(N, dtype=torch.bool)
Q = METRIC[:, None].expand(B, 6, N, D)
ONES = torch.ones(B, N)
NAN = ONES.masked_fill(torch.arange(N) == 3, math.nan)


def match(metric=METRIC, r=2, **options):
    return lambda: tokenops.match(metric, r, **options)


def nearest(a=METRIC, b=METRIC, **options):
    return lambda: tokenops.nearest(a, b, **options)


def merge(x=X, token_map=MAP, **options):
    return lambda: tokenops.merge(x, token_map, **options)


def merge_wavg(x=X, token_map=MAP, size=None, **options):
    return lambda: tokenops.merge_wavg(x, token_map, size, **options)


def unmerge(y=Y, token_map=MAP, **options):
    return lambda: tokenops.unmerge(y, token_map, **options)


def attend(q=Q, k=KEYS, v=KEYS, policy=None, **options):
    return lambda: tokenops.policy_attention(q, k, v, policy, **options)


def scores(q=Q, k=KEYS, **options):
    return lambda: tokenops.attention_scores(q, k, **options)


def from_assign(assign=LABELS, num_tokens=M, counts=None):
    return lambda: TokenMap.from_assign(assign, num_tokens, counts)


def split(sources=SOURCES, destinations=DESTINATIONS, **options):
    return match(split=(sources, destinations), **options)


# Call, exception, and words of its message: operator and argument, often also what was expected and
# got.
CASES = {
    # match
    "match: list": (match([[1.0]]), TypeError, "match: metric", "floating-point", "list"),
    "match: None": (match(None), TypeError, "match: metric", "NoneType"),
    "match: int64": (match(METRIC.long()), TypeError, "match: metric", "int64"),
    "match: bool": (match(METRIC > 0), TypeError, "match: metric", "bool"),
    "match: complex": (match(METRIC.cfloat()), TypeError, "match: metric", "complex64"),
    "match: float8": (match(METRIC.to(torch.float8_e4m3fn)), TypeError, "match: metric", "float16"),
    "match: 2-D": (match(METRIC[0]), ValueError, "match: metric", "3-D or 4-D", "[8, 4]"),
    "match: 5-D": (match(KEYS[None]), ValueError, "match: metric", "3-D or 4-D"),
    "match: no heads": (match(KEYS[:, :0]), ValueError, "match: metric", "head"),
    "match: r negative": (match(r=-1), ValueError, "match: r", ">= 0", "-1"),
    "match: r float": (match(r=2.0), TypeError, "match: r", "an int", "float"),
    "match: r bool": (match(r=True), TypeError, "match: r", "an int", "bool"),
    "match: r None": (match(r=None), TypeError, "match: r", "an int", "NoneType"),
    "match: r float tensor": (match(r=torch.tensor(2.0)), TypeError, "match: r", "float32"),
    "match: r bool tensor": (match(r=torch.tensor(True)), TypeError, "match: r", "bool"),
    "match: r 1-D": (match(r=torch.tensor([2])), TypeError, "match: r", "without dimensions"),
    "match: r negative tensor": (match(r=torch.tensor(-1)), ValueError, "match: r", "int -1"),
    "match: r NumPy bool": (match(r=np.True_), TypeError, "match: r", "an int"),
    "match: r NumPy float": (match(r=np.float32(2)), TypeError, "match: r", "an int"),
    "match: r array": (match(r=np.array([2])), TypeError, "match: r", "an int"),
    "match: r meta": (match(r=torch.tensor(2, device="meta")), TypeError, "match: r", "meta"),
    "match: NumPy": (match(METRIC.numpy()), TypeError, "match: metric", "ndarray"),
    "match: r str": (match(r="2"), TypeError, "match: r", "an int", "str"),
    "match: prefix negative": (match(num_prefix=-1), ValueError, "match: num_prefix", ">= 0"),
    "match: prefix > N": (match(num_prefix=9), ValueError, "match: num_prefix", "8", "9"),
    "match: prefix bool": (match(num_prefix=True), TypeError, "match: num_prefix", "an int"),
    "match: prefix float": (match(num_prefix=1.0), TypeError, "match: num_prefix", "an int"),
    "match: order": (match(order="ToMe"), ValueError, "match: order", "'tome'", "'ToMe'"),
    "match: order None": (match(order=None), TypeError, "match: order", "a str"),
    "match: similarity": (match(similarity="l2"), ValueError, "match: similarity", "'dot'", "'l2'"),
    "match: similarity int": (match(similarity=0), TypeError, "match: similarity", "a str"),
    "match: threshold str": (match(threshold="0.5"), TypeError, "match: threshold", "float"),
    "match: threshold bool": (match(threshold=True), TypeError, "match: threshold", "bool"),
    "match: threshold integers": (
        match(threshold=torch.tensor(1)), TypeError, "match: threshold", "floating-point", "int64",
    ),
    "match: threshold shape": (match(threshold=X), ValueError, "match: threshold", "[] or [2]"),
    "match: threshold NaN": (match(threshold=math.nan), ValueError, "match: threshold", "nan"),
    "match: protected int": (match(protected=ALL.int()), TypeError, "match: protected", "bool"),
    "match: protected list": (match(protected=[0, 1]), TypeError, "match: protected", "bool"),
    "match: protected short": (match(protected=ALL[1:]), ValueError, "match: protected", "[7]"),
    "match: protected batch": (
        match(protected=ALL.expand(3, N)), ValueError, "match: protected", "[2, 8]", "[3, 8]",
    ),
    "match: protected 3-D": (match(protected=ALL[None, None]), ValueError, "match: protected"),
    "match: protected device": (
        match(protected=ALL.to("meta")), ValueError, "match: protected", "on cpu", "on meta",
    ),
    "match: all protected": (match(protected=ALL), ValueError, "match: r", "r = 2", "image 0"),
    "match: few sources": (
        match(r=4, protected=torch.arange(N) == 2), ValueError, "match: r", "3 sources",
    ),
    "match: no destination": (
        match(protected=torch.arange(N) % 2 == 1), ValueError, "match: r", "0 destinations",
    ),
    "match: split str": (match(split="alternate"), TypeError, "match: split", "str"),
    "match: split function": (match(split=tokenops.alternate), TypeError, "match: split"),
    "match: split triple": (match(split=(SOURCES,) * 3), TypeError, "match: split", "pair"),
    # explicit splits
    "split: lists": (split([0, 2], [1, 3]), TypeError, "match: split[0]", "int64", "list"),
    "split: float": (split(SOURCES.float()), TypeError, "match: split[0]", "float32"),
    "split: bool": (split(destinations=ALL), TypeError, "match: split[1]", "bool"),
    "split: int16": (split(SOURCES.short()), TypeError, "match: split[0]", "int16"),
    "split: 3-D": (split(SOURCES[None, None]), ValueError, "match: split[0]", "1-D or 2-D"),
    "split: 0-D": (split(destinations=SOURCES[0]), ValueError, "match: split[1]", "1-D or 2-D"),
    "split: batch": (split(SOURCES.expand(3, 4)), ValueError, "match: split[0]", "[2, Ns]"),
    "split: device": (split(SOURCES.to("meta")), ValueError, "match: split[0]", "on cpu"),
    "split: too long": (split(torch.arange(9)), ValueError, "match: split[0]", "at most 8"),
    "split: negative": (split(SOURCES - 1), ValueError, "match: split", "[0, 8)", "-1"),
    "split: beyond": (split(destinations=DESTINATIONS + 1), ValueError, "match: split", "to 8"),
    "split: prefix": (split(num_prefix=1), ValueError, "match: split", "[1, 8)", "prefix"),
    "split: overlap": (split(destinations=SOURCES), ValueError, "match: split", "at most once"),
    "split: repeat": (split(SOURCES * 0), ValueError, "match: split", "at most once"),
    "split: overlap in one image": (
        split(torch.tensor([[0], [1]]), torch.tensor([1])), ValueError, "match: split", "overlap",
    ),
    # splits by name
    "strided: zero": (lambda: tokenops.strided(0), ValueError, "strided: k", ">= 1", "0"),
    "strided: float": (lambda: tokenops.strided(2.0), TypeError, "strided: k", "an int"),
    "random: negative": (lambda: tokenops.random(-1), ValueError, "random: num_sources", ">= 0"),
    "random: bool": (lambda: tokenops.random(True), TypeError, "random: num_sources", "an int"),
    "random: too many": (
        match(split=tokenops.random(8), num_prefix=1), ValueError, "random: num_sources", "7", "8",
    ),
    "random: seed": (lambda: tokenops.random(2, 0), TypeError, "random: generator", "Generator"),
    "grid: zero": (lambda: tokenops.grid(0, 4, 1, 2), ValueError, "grid: h", ">= 1"),
    "grid: float": (lambda: tokenops.grid(2, 4.0, 1, 2), TypeError, "grid: w", "an int"),
    "grid: seed": (lambda: tokenops.grid(2, 4, 1, 1, 7), TypeError, "grid: generator"),
    "grid: too small": (
        match(split=tokenops.grid(2, 3, 1, 1)), ValueError, "grid: h * w", "8 tokens", "2 * 3 = 6",
    ),
    "grid: prefix": (
        match(split=tokenops.grid(2, 4, 2, 2), num_prefix=1), ValueError, "grid: h * w", "7 tokens",
    ),
    # nearest
    "nearest: array": (nearest(METRIC.numpy()), TypeError, "nearest: a", "ndarray"),
    "nearest: b int": (nearest(b=METRIC.int()), TypeError, "nearest: b", "int32"),
    "nearest: a 2-D": (nearest(METRIC[0]), ValueError, "nearest: a", "3-D or 4-D"),
    "nearest: ranks": (nearest(b=KEYS), ValueError, "nearest: b", "[2, 3, 8, 4]"),
    "nearest: dtypes": (nearest(b=METRIC.half()), TypeError, "nearest: b", "float32", "float16"),
    "nearest: widths": (nearest(b=METRIC[..., 1:]), ValueError, "nearest: b", "[2, 8, 3]"),
    "nearest: batches": (nearest(b=METRIC[:1]), ValueError, "nearest: b", "[1, 8, 4]"),
    "nearest: heads": (nearest(KEYS, KEYS[:, :2]), ValueError, "nearest: b", "[2, 3, 8, 4]"),
    "nearest: no heads": (nearest(KEYS[:, :0], KEYS[:, :0]), ValueError, "nearest: a", "head"),
    "nearest: devices": (nearest(b=METRIC.to("meta")), ValueError, "nearest: b", "on cpu"),
    "nearest: similarity": (nearest(similarity="cos"), ValueError, "nearest: similarity", "'cos'"),
    "nearest: a_mask float": (nearest(a_mask=X[..., 0]), TypeError, "nearest: a_mask", "bool"),
    "nearest: b_mask shape": (nearest(b_mask=ALL), ValueError, "nearest: b_mask", "[2, 8]", "[8]"),
    "nearest: b_mask device": (
        nearest(b_mask=ALL.expand(B, N).to("meta")), ValueError, "nearest: b_mask", "on meta",
    ),
    # merge
    "merge: int": (merge(X.int()), TypeError, "merge: x", "int32"),
    "merge: 4-D": (merge(X[None]), ValueError, "merge: x", "3-D"),
    "merge: N": (merge(Y), ValueError, "merge: x", "[2, 8, C]", "[2, 5, 3]"),
    "merge: B": (merge(X[:1]), ValueError, "merge: x", "[2, 8, C]", "[1, 8, 3]"),
    "merge: device": (merge(X.to("meta")), ValueError, "merge: x", "on cpu", "on meta"),
    "merge: map": (merge(token_map=LABELS), TypeError, "merge: token_map", "TokenMap"),
    "merge: swapped": (merge(MAP, X), TypeError, "merge: x", "TokenMap"),
    "merge: reduce": (merge(reduce="max"), ValueError, "merge: reduce", "'amax'", "'max'"),
    "merge: reduce None": (merge(reduce=None), TypeError, "merge: reduce", "a str"),
    "merge: weight int": (merge(weight=LABELS), TypeError, "merge: weight", "int32"),
    "merge: weight float": (merge(weight=0.5), TypeError, "merge: weight", "float 0.5"),
    "merge: weight shape": (merge(weight=X), ValueError, "merge: weight", "[2, 8]", "[2, 8, 3]"),
    "merge: weight 1-D": (merge(weight=X[0, :, 0]), ValueError, "merge: weight", "2-D or 3-D"),
    "merge: weight device": (
        merge(weight=X[..., 0].to("meta")), ValueError, "merge: weight", "on cpu",
    ),
    # merge of a list
    "merge: str": (merge("xy"), TypeError, "merge: x", "a list of tensors", "str 'xy'"),
    "merge: None": (merge(None), TypeError, "merge: x", "a tensor or a list", "NoneType"),
    "merge: dict": (merge({"q": X}), TypeError, "merge: x", "a list of tensors", "dict"),
    "merge: generator": (merge(x for x in (X, X)), TypeError, "merge: x", "generator"),
    "merge: list, None": (merge([X, None]), TypeError, "merge: x[1]", "NoneType"),
    "merge: list, nested": (merge([[X], X]), TypeError, "merge: x[0]", "list"),
    "merge: list, int": (merge([X, X, X.int()]), TypeError, "merge: x[2]", "int32"),
    "merge: list, 4-D": (merge([X, X[None]]), ValueError, "merge: x[1]", "3-D"),
    "merge: list, N": (merge([X, Y]), ValueError, "merge: x[1]", "[2, 8, C]", "[2, 5, 3]"),
    "merge: list, B": (merge((X[:1],)), ValueError, "merge: x[0]", "[2, 8, C]", "[1, 8, 3]"),
    "merge: list, device": (
        merge([X, X.to("meta")]), ValueError, "merge: x[1]", "on cpu", "on meta",
    ),
    "merge: list, map": (merge([X, X], LABELS), TypeError, "merge: token_map", "TokenMap"),
    "merge: list, reduce": (merge([X, X], reduce="max"), ValueError, "merge: reduce", "'max'"),
    "merge: empty list, reduce": (merge([], reduce="max"), ValueError, "merge: reduce", "'max'"),
    "merge: list, weight": (
        merge([X, X], reduce="sum", weight=X), ValueError, "merge: weight", "[2, 8]", "[2, 8, 3]",
    ),
    "merge: list, weight int": (
        merge([X, X], weight=LABELS), TypeError, "merge: weight", "int32",
    ),
    # merge_wavg
    "wavg: bool": (merge_wavg(X > 0), TypeError, "merge_wavg: x", "bool"),
    "wavg: N": (merge_wavg(X[:, 1:]), ValueError, "merge_wavg: x", "[2, 8, C]"),
    "wavg: map": (merge_wavg(token_map=None), TypeError, "merge_wavg: token_map", "NoneType"),
    "wavg: size int": (merge_wavg(size=LABELS), TypeError, "merge_wavg: size", "int32"),
    "wavg: size M": (merge_wavg(size=Y[..., 0]), ValueError, "merge_wavg: size", "[2, 5]"),
    "wavg: weight": (merge_wavg(weight=X), ValueError, "merge_wavg: weight", "[2, 8, 1]"),
    "wavg: weight str": (merge_wavg(weight="mean"), TypeError, "merge_wavg: weight", "str"),
    # unmerge
    "unmerge: long": (unmerge(Y.long()), TypeError, "unmerge: y", "int64"),
    "unmerge: 2-D": (unmerge(Y[0]), ValueError, "unmerge: y", "3-D"),
    "unmerge: N for M": (unmerge(X), ValueError, "unmerge: y", "[2, 5, C]", "[2, 8, 3]"),
    "unmerge: map": (unmerge(token_map=(LABELS,)), TypeError, "unmerge: token_map", "tuple"),
    "unmerge: residual": (unmerge(residual=Y), ValueError, "unmerge: residual", "[2, 8, 3]"),
    "unmerge: residual bool": (unmerge(residual=X > 0), TypeError, "unmerge: residual", "bool"),
    "unmerge: residual C": (unmerge(residual=X[..., :2]), ValueError, "unmerge: residual"),
    "unmerge: residual device": (
        unmerge(residual=X.to("meta")), ValueError, "unmerge: residual", "on cpu",
    ),
    "unmerge: int": (unmerge(3), TypeError, "unmerge: y", "a tensor or a list", "int 3"),
    "unmerge: list, bool": (unmerge([Y, Y > 0]), TypeError, "unmerge: y[1]", "bool"),
    "unmerge: list, N for M": (
        unmerge([Y, X]), ValueError, "unmerge: y[1]", "[2, 5, C]", "[2, 8, 3]",
    ),
    "unmerge: list, residual": (
        unmerge([Y, Y], residual=X), ValueError, "unmerge: residual", "None", "[2, 8, 3]",
    ),
    "unmerge: list, residuals": (
        unmerge([Y, Y], residual=[X, X]), ValueError, "unmerge: residual", "None", "list",
    ),
    # policy_attention
    "attend: q list": (attend([1.0]), TypeError, "policy_attention: q", "floating-point", "list"),
    "attend: q 3-D": (attend(METRIC), ValueError, "policy_attention: q", "4-D", "[2, 8, 4]"),
    "attend: q int": (attend(Q.int()), TypeError, "policy_attention: q", "int32"),
    "attend: k 3-D": (attend(k=METRIC), ValueError, "policy_attention: k", "4-D", "[2, 8, 4]"),
    "attend: k dtype": (
        attend(k=KEYS.double()), TypeError, "policy_attention: k", "torch.float32 as q", "float64",
    ),
    "attend: k batch": (attend(k=KEYS[:1]), ValueError, "policy_attention: k", "[1, 3, 8, 4]"),
    "attend: k width": (attend(k=KEYS[..., 1:]), ValueError, "policy_attention: k", "[2, 3, 8, 3]"),
    "attend: heads": (
        attend(KEYS[:, :2]), ValueError, "policy_attention: k", "divides the 2 heads", "[2, 3, 8",
    ),
    "attend: no heads": (attend(Q[:, :0]), ValueError, "policy_attention: k", "the 0 heads"),
    "attend: no key heads": (attend(k=KEYS[:, :0]), ValueError, "policy_attention: k", "divides"),
    "attend: k device": (attend(k=KEYS.to("meta")), ValueError, "policy_attention: k", "on cpu"),
    "attend: v None": (attend(v=None), TypeError, "policy_attention: v", "NoneType"),
    "attend: v dtype": (attend(v=KEYS.half()), TypeError, "policy_attention: v", "float16"),
    "attend: v heads": (
        attend(v=Q), ValueError, "policy_attention: v", "[2, 3, 8, 4]", "[2, 6, 8, 4]",
    ),
    "attend: v keys": (attend(v=KEYS[:, :, 1:]), ValueError, "policy_attention: v", "[2, 3, 7, 4]"),
    "attend: v device": (attend(v=KEYS.to("meta")), ValueError, "policy_attention: v", "on meta"),
    "attend: policy int": (attend(policy=LABELS), TypeError, "policy_attention: policy", "int32"),
    "attend: policy float": (attend(policy=0.5), TypeError, "policy_attention: policy", "0.5"),
    "attend: policy shape": (
        attend(policy=ONES[:, 1:]), ValueError, "policy_attention: policy", "[2, 8] or ",
        "[2, 8, 1]", "[2, 6, 8]", "[2, 7]",
    ),
    "attend: policy heads": (
        attend(policy=ONES[:, None].expand(B, 3, N)), ValueError, "policy", "[2, 6, 8]", "[2, 3",
    ),
    "attend: policy 1-D": (attend(policy=ONES[0]), ValueError, "policy_attention: policy", "[8]"),
    "attend: policy device": (
        attend(policy=ONES.to("meta")), ValueError, "policy_attention: policy", "on cpu", "on meta",
    ),
    "attend: policy negative": (
        attend(policy=ONES - 1.5), ValueError, "policy_attention: policy", ">= 0", "-0.5",
    ),
    "attend: policy NaN": (
        attend(policy=NAN), ValueError, "policy_attention: policy", ">= 0", "nan",
    ),
    "attend: size int": (attend(size=LABELS), TypeError, "policy_attention: size", "int32"),
    "attend: size bool": (attend(size=ONES > 0), TypeError, "policy_attention: size", "bool"),
    "attend: size shape": (
        attend(size=ONES[:, None]), ValueError, "policy_attention: size", "[2, 8] or [2, 8, 1]",
    ),
    "attend: size negative": (
        attend(size=-ONES), ValueError, "policy_attention: size", ">= 0", "-1.0",
    ),
    "attend: size NaN": (attend(size=NAN), ValueError, "policy_attention: size", "nan"),
    "attend: size device": (attend(size=ONES.to("meta")), ValueError, "policy_attention: size"),
    "attend: mask float": (
        attend(key_padding_mask=ONES), TypeError, "policy_attention: key_padding_mask", "bool",
        "float32",
    ),
    "attend: mask shape": (
        attend(key_padding_mask=ALL), ValueError, "policy_attention: key_padding_mask", "[2, 8]",
    ),
    "attend: mask device": (
        attend(key_padding_mask=(ONES > 1).to("meta")), ValueError, "key_padding_mask", "on cpu",
    ),
    "attend: position float": (
        attend(query_position=ONES), TypeError, "policy_attention: query_position", "int64",
    ),
    "attend: position list": (
        attend(query_position=[0]), TypeError, "policy_attention: query_position", "list",
    ),
    "attend: position shape": (
        attend(query_position=SOURCES), ValueError, "query_position", "[8] or [2, 8]", "[4]",
    ),
    "attend: position 3-D": (
        attend(query_position=LABELS[None]), ValueError, "query_position", "1-D or 2-D",
    ),
    "attend: self_keep": (
        attend(Q[:, :, 1:], policy=ONES), ValueError, "policy_attention: self_keep", "7 queries",
        "8 keys", "query_position",
    ),
    "attend: eps negative": (attend(eps=-1e-6), ValueError, "policy_attention: eps", ">= 0"),
    "attend: eps NaN": (attend(eps=math.nan), ValueError, "policy_attention: eps", "nan"),
    "attend: eps inf": (attend(eps=math.inf), ValueError, "policy_attention: eps", "inf"),
    "attend: eps None": (attend(eps=None), TypeError, "policy_attention: eps", "a float"),
    "attend: eps bool": (attend(eps=True), TypeError, "policy_attention: eps", "bool True"),
    "attend: scale str": (attend(scale="auto"), TypeError, "policy_attention: scale", "'auto'"),
    "attend: scale NaN": (attend(scale=math.nan), ValueError, "policy_attention: scale", "finite"),
    "attend: policy_grad": (
        attend(policy_grad="soft"), ValueError, "policy_attention: policy_grad", "'kept'", "'soft'",
    ),
    "attend: policy_grad bool": (
        attend(policy_grad=False), TypeError, "policy_attention: policy_grad", "a str",
    ),
    # attention_scores
    "scores: q 3-D": (scores(METRIC), ValueError, "attention_scores: q", "4-D", "[2, 8, 4]"),
    "scores: k dtype": (scores(k=KEYS.half()), TypeError, "attention_scores: k", "float16"),
    "scores: heads": (scores(KEYS[:, :2]), ValueError, "attention_scores: k", "divides"),
    "scores: policy": (scores(policy=-ONES), ValueError, "attention_scores: policy", "-1.0"),
    "scores: size": (scores(size=NAN), ValueError, "attention_scores: size", "nan"),
    "scores: mask": (
        scores(key_padding_mask=ONES), TypeError, "attention_scores: key_padding_mask",
    ),
    "scores: self_keep": (
        scores(Q[:, :, 1:], policy=ONES), ValueError, "attention_scores: self_keep", "7 queries",
    ),
    "scores: weight int": (
        scores(query_weight=LABELS), TypeError, "attention_scores: query_weight", "int32",
    ),
    "scores: weight shape": (
        scores(query_weight=ONES[:, 1:]), ValueError, "attention_scores: query_weight", "[8]",
        "[2, 8]", "[2, 6, 8]", "[2, 7]",
    ),
    "scores: weights of rows": (
        scores(query_weight=ONES, query_index=[0, 1]), ValueError, "query_weight", "[2, 2]",
    ),
    "scores: weight device": (
        scores(query_weight=ONES.to("meta")), ValueError, "attention_scores: query_weight", "cpu",
    ),
    "scores: index float": (
        scores(query_index=ONES), TypeError, "attention_scores: query_index", "float32",
    ),
    "scores: index of floats": (
        scores(query_index=[0.0]), TypeError, "attention_scores: query_index", "an int", "0.0",
    ),
    "scores: index of bools": (scores(query_index=[True]), TypeError, "query_index", "an int"),
    "scores: index int": (scores(query_index=0), TypeError, "attention_scores: query_index"),
    "scores: index beyond": (
        scores(query_index=[0, 8]), ValueError, "attention_scores: query_index", "[-8, 8)", "8",
    ),
    "scores: index below": (
        scores(query_index=(-9,)), ValueError, "attention_scores: query_index", "[-8, 8)", "-9",
    ),
    "scores: tensor beyond": (
        scores(query_index=SOURCES + 3), ValueError, "query_index", "[-8, 8)", "from 3 to 9",
    ),
    "scores: index 0-D": (scores(query_index=SOURCES[0]), ValueError, "query_index", "1-D or 2-D"),
    "scores: index batch": (
        scores(query_index=SOURCES.expand(3, 4)), ValueError, "query_index", "[2, 4]", "[3, 4]",
    ),
    "scores: index device": (
        scores(query_index=SOURCES.to("meta")), ValueError, "attention_scores: query_index",
    ),
    "scores: head_reduce": (
        scores(head_reduce="max"), ValueError, "attention_scores: head_reduce", "'sum'", "'max'",
    ),
    "scores: head_reduce None": (
        scores(head_reduce=None), TypeError, "attention_scores: head_reduce", "a str",
    ),
    "scores: lse True": (scores(lse=True), TypeError, "attention_scores: lse", "bool True"),
    "scores: lse dtype": (
        scores(lse=Q[..., 0].double()), TypeError, "attention_scores: lse", "float32", "float64",
    ),
    "scores: lse shape": (
        scores(lse=Q), ValueError, "attention_scores: lse", "[2, 6, 8]", "[2, 6, 8, 4]",
    ),
    "scores: lse device": (
        scores(lse=Q[..., 0].to("meta")), ValueError, "attention_scores: lse", "on cpu",
    ),
    "scores: eps": (scores(eps=-1.0), ValueError, "attention_scores: eps", ">= 0"),
    "scores: scale": (scores(scale=math.inf), ValueError, "attention_scores: scale", "finite"),
    # token maps
    "labels: list": (from_assign([[0, 1]]), TypeError, "TokenMap.from_assign: assign", "list"),
    "labels: float": (from_assign(LABELS.float()), TypeError, "from_assign: assign", "float32"),
    "labels: uint8": (from_assign(LABELS.byte()), TypeError, "from_assign: assign", "uint8"),
    "labels: 1-D": (from_assign(LABELS[0]), ValueError, "from_assign: assign", "2-D"),
    "labels: beyond": (from_assign(num_tokens=4), ValueError, "from_assign: assign", "[-1, 4)"),
    "labels: below": (from_assign(LABELS - 2), ValueError, "from_assign: assign", "-2 to 2"),
    "labels: wild": (
        from_assign(LABELS.long() + 2**32), ValueError, "from_assign: assign", "4294967296",
    ),
    "labels: M float": (from_assign(num_tokens=5.0), TypeError, "from_assign: num_tokens"),
    "labels: M bool": (from_assign(num_tokens=True), TypeError, "from_assign: num_tokens"),
    "labels: M negative": (from_assign(num_tokens=-1), ValueError, "from_assign: num_tokens"),
    "counts: float": (from_assign(counts=X[:, 0, 0]), TypeError, "from_assign: counts", "int32"),
    "counts: int": (from_assign(counts=3), TypeError, "from_assign: counts", "int 3"),
    "counts: shape": (from_assign(counts=SOURCES), ValueError, "from_assign: counts", "[2]"),
    "counts: 2-D": (from_assign(counts=LABELS), ValueError, "from_assign: counts", "1-D"),
    "counts: negative": (
        from_assign(counts=torch.tensor([-1, 5])), ValueError, "from_assign: counts", "[0, 6)",
    ),
    "counts: beyond": (
        from_assign(counts=torch.tensor([5, 6])), ValueError, "from_assign: counts", "5 to 6",
    ),
    "counts: wrap": (
        from_assign(counts=torch.tensor([5, 2**32])), ValueError, "counts", "4294967296",
    ),
    "counts: members of padding": (
        from_assign(counts=torch.tensor([5, 3])), ValueError, "assign", "counts[1] is 3",
    ),
    "compose: tensor": (lambda: MAP.compose(LABELS), TypeError, "TokenMap.compose: earlier"),
    "compose: order": (lambda: MAP.compose(MAP), ValueError, "compose: earlier", "8 tokens"),
    "compose: batch": (
        lambda: MAP.compose(TokenMap.identity(3, N)), ValueError, "compose: earlier", "2 images",
    ),
    # backends
    "backend: name": (
        lambda: tokenops.use_backend("cuda"), ValueError, "use_backend: name", "'native'", "'cuda'",
    ),
    "backend: type": (lambda: tokenops.use_backend(0), TypeError, "use_backend: name", "int 0"),
    "backend: operator": (
        lambda: tokenops.why_not("attend"), ValueError, "why_not: operator", "'match'", "'attend'",
    ),
    # testing
    "testing: layout": (
        lambda: as_layout(X, "strided"), ValueError, "as_layout: layout", "'strided'",
    ),
    "testing: width": (lambda: exact_metric(1, 2, 3), ValueError, "exact_metric: shape", "power"),
    "testing: heads": (lambda: exact_metric(1, 3, 2, 4), ValueError, "exact_metric: shape", "8"),
    "testing: similarity": (
        lambda: nearest_regret(METRIC, METRIC, LABELS, similarity="l1"), ValueError, "similarity",
    ),
}  # fmt: skip


def test_there_are_enough_cases():
    assert len(CASES) >= 70


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, error, *words = CASES[case]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    message = str(raised.value)
    for word in words:
        assert word in message, message


GOOD = {f"{call.operator}-{call.name}": call for call in calls(Sizes())}
TENSORS = [
    (name, argument)
    for name, call in GOOD.items()
    for argument in call.tensors
    if call.name != "list"  # the tensors of a list have no names; CASES covers them
]


@pytest.mark.parametrize("name", GOOD)
def test_backend_that_cannot_serve(name, monkeypatch):
    monkeypatch.setattr(_backend, "_interpreting", False)
    call = GOOD[name]
    with tokenops.use_backend("triton"), pytest.raises(NotImplementedError) as raised:
        call.function(**call.tensors)
    assert str(raised.value).startswith(f"{call.operator}")
    assert ": backend 'triton' was chosen" in str(raised.value)


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_bad_tensors(name, argument):
    """Every tensor of every call: another type, dtype, layout, rank or device is an error."""
    call = GOOD[name]
    good = call.tensors[argument]
    call.function(**call.tensors)
    for bad in ("tensor", good.long(), good.cfloat(), good.to_sparse()):
        with pytest.raises(TypeError, match=rf"^{call.operator}: {argument}\W") as raised:
            call.function(**{**call.tensors, argument: bad})
        assert "\n" not in str(raised.value)
    bad = [good[0, 0], good[:, None, None].expand(-1, 3, 3, *good.shape[1:])]
    if len(call.tensors) > 1 and argument != next(iter(call.tensors)):
        bad.append(good.to("meta"))
    for tensor in bad:
        with pytest.raises(ValueError, match=rf"^{call.operator}: {argument}\W") as raised:
            call.function(**{**call.tensors, argument: tensor})
        assert "\n" not in str(raised.value)


def test_integers_of_other_libraries(backend, device):
    """Objects with ``__index__`` are accepted as int."""
    token_map = tokenops.match(METRIC.to(device), np.int64(2), num_prefix=np.int32(1))
    assert token_map.num_tokens == N - 2
    two = torch.tensor(2, dtype=torch.uint8, device=device)
    assert tokenops.match(METRIC.to(device), two, num_prefix=two).num_tokens == N - 2
    assert TokenMap.from_assign(LABELS.to(device), np.int16(M)).num_tokens == M
    assert isinstance(tokenops.strided(np.int64(3)).k, int)


def test_clamped_rather_than_refused(backend, device):
    """Numbers that are too large are clamped."""
    metric, every = METRIC.to(device), ALL.to(device)
    assert tokenops.match(metric, 1000).num_tokens == N - N // 2
    assert tokenops.match(metric, 0).num_tokens == N
    assert tokenops.match(metric, 3, num_prefix=N).num_tokens == N
    assert tokenops.match(metric, 3, protected=every, threshold=0.0).counts.tolist() == [N, N]
    assert tokenops.match(metric, 3, protected=~every).num_tokens == N - 3
