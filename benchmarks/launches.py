# SPDX-License-Identifier: Apache-2.0
"""Calls that together launch every Triton kernel with all its settings, to be recorded.

A call is made from its label: ``"attention all eps bf16 N577 D80"`` has an operator, words for
arguments, a dtype and sizes. In a template of labels ``"{a,b}"`` stands for a and for b.

Tensors have no memory (device ``meta``). A string describes one: its axes, after ``@`` the order of
the axes in memory if it is another one, and its dtype: ``s`` (of sums and weights), ``i`` (int32),
``l`` (int64), ``b`` (bool), or the dtype of the call. ``"BHND@BN3HD"`` is a part of a packed qkv;
``"BMC@"`` has strides of 0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenops import _backend

DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
}  # fmt: skip

#: Tensors by name of the argument. Optional ones are passed where a call sets them to True.
TENSORS = {
    "q": "BHQD@BN3HD", "k": "BHND@BN3HD", "v": "BHNV@BN3HV", "policy": "BN s", "size": "BN s",
    "key_padding_mask": "BN b", "query_position": "Q i", "lse": "BHQ s", "p_eps": "BHR s",
    "argmax": "BHR i", "grad_lse": "BHQ s",
    "a": "BND", "b": "BND", "a_mask": "BN b", "b_mask": "BN b", "metric": "BND", "protected": "N b",
    "src_index": "S l", "dst_index": "T l", "cell": "G i", "thresholds": "B s",
    "x": "BNC", "y": "BMC", "residual": "BNC", "assign": "BN i", "offsets": "BO i",
    "members": "BN i", "weight": "BN s", "scale": "BM s", "out": "BMC", "grad": "BMC",
}  # fmt: skip

#: Other arguments, where a call does not set them.
OPTIONS = {
    "self_keep": False, "exclude_self": False, "eps": 0.0, "is_causal": False,
    "policy_grad": "exact", "head_reduce": "mean", "need_v": True, "need_policy": False,
    "need_size": False, "r": 16, "num_prefix": 0, "stride": 2, "grid_width": 0, "cell_height": 1,
    "order": "position", "similarity": "cosine", "reduce": "sum", "mean": False,
}  # fmt: skip

_ROWS = {"out": "BQHV", "grad_out": "BQHV"}
_X, _Y, _OUT = {"x": "BNC@BCN"}, {"y": "BMC@"}, {"grad": "BMC@", "out": "BMC@"}

#: Operators by the first word of a label, with sizes and arguments of all their calls.
OPERATORS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "attention": [("policy_attention", {"B": 2, "H": 12, "self_keep": True})],
    "scores": [("attention_scores", {"B": 2, "H": 12, "self_keep": True})],
    "backward": [("policy_attention_backward", {"B": 8, "H": 12, "N": 1025, **_ROWS})],
    "nearest": [("nearest", {"B": 2, "N": 197})],
    "match": [("match", {"B": 2, "N": 197, "D": 64})],
    "merge": [("merge", {})],
    "wavg": [("merge_wavg", {})],
    "unmerge": [("unmerge", {})],
    "pair_dot": [("pair_dot", {})],
    "reduce_backward": [("merge_reduce_backward", {})],
    "strided": [
        ("merge_wavg", {**_X, "size": True}),
        ("unmerge", {**_Y, "residual": "BNC@BCN", "mean": True}),
        ("pair_dot", {**_X, **_Y}),
        ("merge_reduce_backward", {**_X, **_OUT, "reduce": "amax"}),
        ("merge_reduce_backward", {**_X, **_OUT, "reduce": "prod"}),
    ],
    "invert": [("invert", {"B": 8})],
}

_ALL = {"policy": True, "size": True, "key_padding_mask": True, "is_causal": True}
_QUERIES = {"policy": True, "key_padding_mask": True, "query_position": True}
_POLICY = {"policy": True, "self_keep": True, "need_policy": True}

#: Sizes and arguments by word of a label, or by its first word and another one.
WORDS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"is_causal": True}, "hard": {"policy": True}, "size": {"size": True},
    "eps": {"policy": True, "eps": 1e-6}, "all": _ALL, "attention position": _QUERIES,
    "scores position": _QUERIES, "scores size": {"size": True, "exclude_self": True},
    "scores all": {**_ALL, "exclude_self": True},
    "backward policy": _POLICY, "backward kept": {**_POLICY, "policy_grad": "kept"},
    "backward all": {
        **_ALL, **_POLICY, "policy": "BHN s", "query_position": "BN i", "eps": 1e-6,
        "exclude_self": True, "grad_lse": True, "need_size": True,
    },
    "masks": {"a_mask": True, "b_mask": True}, "dot": {"similarity": "dot"},
    "heads": {"H": 12, "a": "BHND", "b": "BHND"}, "many": {"B": 512}, "huge": {},
    "nearest strided": {"a": "BND@BDN", "b": "BND@BDN"},
    "listed": {"src_index": True, "dst_index": True}, "drawn": {"cell": True},
    "grid": {"grid_width": 14, "cell_height": 2}, "thresholds": {"thresholds": True},
    "threshold": {"threshold": 0.5}, "tome": {"order": "tome"}, "position": {}, "tokens": {},
    "factors": {"weight": True, "scale": True}, "sum": {},
    "unmerge all": {"weight": True, "scale": True, "residual": True, "mean": True},
    **{word: {"reduce": word} for word in ("mean", "amax", "amin", "prod")},
}  # fmt: skip

_KINDS = "{plain,causal,hard,size,all,eps,all eps,position}"
_SHAPES = "{C1 B1,C1 B131072,C320 B1,C320 B1024,C384 B1,C384 B1024,C768 B1,C768 B1024}"
_MERGES = "{merge mean,wavg size,unmerge all,pair_dot,reduce_backward amax,reduce_backward prod}"

#: Templates of labels, with sizes and arguments that no word stands for. Half precision comes as
#: bfloat16, mostly: float16 has the same settings.
LABELS: dict[str, dict[str, Any]] = {
    f"attention {_KINDS} {{bf16 N1025,bf16 N197,f32 N197,f64 N197}} D64": {},
    "attention {plain,hard,all,all eps} bf16 N577 D256": {},
    "attention {plain,hard,all,all eps} {bf16,f16,f32,f64} N577 D80": {},
    "attention all eps {bf16,f32,f64} N577 D1": {},
    "attention position {bf16,f32,f64} N577 D64 Nq9": {},
    "scores {plain,size,eps,all eps} {bf16,f32,f64} N577 D64": {},
    "scores {plain,position} {bf16,f32,f64} N577 D64 Nq1": {},
    "scores all eps {bf16 N577 D80,f32 N577 D80,f64 N577 D80,bf16 N577 D256}": {},
    "scores position {bf16 N577 D80,f32 N577 D80,f64 N577 D80,bf16 N577 D256} Nq1": {},
    "attention position bf16 N197 D64 Nq9": {},
    "backward all f16 D64": {},
    "backward {plain,policy eps,policy,kept,size,causal,all} bf16 D{64,128}": {},
    "backward {plain,policy eps,all} {bf16 D256,f32 D64,f32 D128,f32 D256,f64 D64}": {},
    "backward {plain,policy eps,all} f64 D{128,256}": {},
    # Heads of q and of v whose widths take different numbers of parts.
    "backward policy eps {f32 D64 Dv128,bf16 D256 Dv64}": {"N": 300, "v": "BHNV"},
    "backward {all f32,plain bf16} D80": {},
    "nearest f16 D64": {},
    "nearest bf16 D{16,32,64,80,128,160,320,640}{, many}": {},
    "nearest bf16 D{64,320,640} huge": {"N": 65536},
    "nearest bf16 D{64,320,640} {strided,masks dot}": {},
    "nearest {f16,bf16} D{64,128,320} heads": {},
    "nearest {f16,bf16} D{64,128,320} heads huge": {"N": 16384},
    "nearest {f32,f64} D{64,128,320}{, masks dot, heads}": {},
    "nearest {f32,f64} D{64,128,320}{ huge, heads huge}": {"N": 16384},
    "match bf16 D64": {"B": 256, "num_prefix": 1},
    "match bf16 D64 {listed,thresholds}": {},
    "match bf16 D320 listed": {"N": 4096},
    "match bf16 D64 grid{, drawn}": {"num_prefix": 1, "G": 49},
    "match bf16 D320 grid drawn": {"N": 4096, "grid_width": 64, "G": 1024},
    "match f32 D64 many tokens": {"B": 2, "N": 5000},
    "match N{24,60,100,197,400,1025,2048,4096} {position,tome}": {"r": 6},
    "match N{197,4096} {position,tome} threshold": {"r": 6},
    "match N{197,4096} {position,tome} {,threshold }listed": {"r": 6, "protected": True},
    f"{_MERGES} {{bf16,f32,f64}} {_SHAPES}": {},
    f"{_MERGES} f16 C768 B1024": {},
    "merge {sum,sum factors,amax,amin,prod} {f16,bf16,f32,f64} C768 B1024": {},
    "{wavg,unmerge,strided} {f16,bf16,f32,f64} C768 B1024": {},
    "invert {5 to 3,50 to 30,100 to 90,197 to 181,577 to 400,1025 to 985,2000 to 1800,"
    "4096 to 2048}": {},
}


def cases() -> dict[str, Callable[[], None]]:
    found = {}
    for template, arguments in LABELS.items():
        texts = re.split(r"[{}]", template)
        for parts in itertools.product(*(text.split(",") for text in texts)):
            label = "".join(parts)
            found[label] = partial(call, label, **arguments)
    return found


def call(label: str, **arguments: Any) -> None:
    """Make a labelled call, which launches Triton kernels."""
    first, *words = re.sub(r"(\d+) to (\d+)", r"N\1 M\2", label).split()
    dtype = torch.float16
    for word in words:
        if size := re.fullmatch(r"([A-Z][a-z]?)(\d+)", word):
            name = {"Nq": "Q", "Dv": "V"}.get(size[1], size[1])
            arguments[name] = int(size[2])
        elif word in DTYPES:
            dtype = DTYPES[word]
        else:
            arguments = {**WORDS.get(f"{first} {word}", WORDS.get(word, {})), **arguments}
    for operator, common in OPERATORS[first]:
        launch(operator, dtype, {**common, **arguments})


def launch(operator: str, dtype: torch.dtype, given: dict[str, Any]) -> None:
    """Call an operator's Triton kernels with arguments and sizes by name.

    Raises:
        TypeError: If the operator has no argument of a name.
    """
    sizes = {"3": 3, "N": 197, "M": 181, **{n: v for n, v in given.items() if n.isupper()}}
    n, m, d = sizes["N"], sizes["M"], sizes.get("D", 1)
    options = {**OPTIONS, "scale": d**-0.5, "num_tokens": m}
    sizes = {"Q": n, "V": d, "O": m + 1, "S": n - n // 4, "T": n // 4, **sizes}
    sizes["R"] = sizes["Q"] if given.get("eps") else 0
    schema = getattr(torch.ops.tokenops, operator).default._schema.arguments
    if unknown := {n for n in given if not n.isupper()} - {a.name for a in schema}:
        raise TypeError(f"{operator} has no arguments {sorted(unknown)}")
    flat = []
    for argument in schema:
        name, kind = argument.name, str(argument.type)
        if "Tensor" in kind:
            text = given.get(name, kind == "Tensor")
            text = TENSORS[name] if text is True else text
            flat.append(tensor(text, dtype, sizes) if text else None)
        else:
            flat.append(given.get(name, options.get(name)))
    _backend._in_triton[operator](*flat)


def tensor(text: str, dtype: torch.dtype, sizes: dict[str, int]) -> Tensor:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = {"s": sums, "i": torch.int32, "l": torch.int64, "b": torch.bool, "": dtype}
    layout, _, kind = text.partition(" ")
    axes, at, memory = layout.partition("@")
    strides, step = {}, 1
    for axis in reversed(memory if at else axes):
        strides[axis] = step
        step *= max(1, sizes[axis])
    strides.setdefault("Q", strides.get("N", 0))  # the first Q of N rows
    shape, stride = [sizes[axis] for axis in axes], [strides.get(axis, 0) for axis in axes]
    return torch.empty_strided(shape, stride, dtype=kinds[kind], device="meta")
