# SPDX-License-Identifier: Apache-2.0
"""What is timed. The operators of ``tokenops/ops/<word>/`` have their cases in ``CASES["<word>"]``.

Shapes: ViT-B/16 at 224 pixels (197 tokens), ViT-L/16 at 512 (1025 tokens), Stable Diffusion 1.5 at
512 (4096 tokens, two images by classifier-free guidance) and at 1024 (16384 tokens), and 65536
tokens, where scores of all pairs no longer are a sensible thing to store. Attention: 16 images of
ViT-B/16 at 224, one of ViT-L/16 at 512, and 8192 tokens for the memory that it takes. Scores also
of one row and of 64 rows of ViT-B/16, of ViT-L/14 at 336 (577 tokens) and of decoders.

A GPU has sizes of its own, in ``GPU_CASES``: more images, and the tokens of vision-language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from .attention import AttentionShape, setup_attention, setup_attention_step, setup_scores
from .cases import Case, Shape
from .matching import setup_match
from .merging import backward, forward, merge_pair, unmerge_pair, wavg_pair

VIT_B = Shape(batch=32, tokens=197, width=768, r=16, prefix=1)
VIT_L = Shape(batch=4, tokens=1025, width=1024, r=40, prefix=1)
SD = Shape(batch=2, tokens=4096, width=320, r=2048, grid=(64, 64, 2, 2))
N16384 = Shape(batch=2, tokens=16384, width=320, r=8192, grid=(128, 128, 2, 2))
N65536 = Shape(batch=1, tokens=65536, width=64, r=32768, grid=(256, 256, 2, 2))

_TOO_LARGE = "not run: it stores 49152 x 16384 scores, 3.2 GB in float32"

DYNAMIC_VIT_EPS = 1e-6
HEADS_B = AttentionShape(batch=16, heads=12, tokens=197, width=64)
HEADS_L = AttentionShape(batch=1, heads=16, tokens=1025, width=64)
HEADS_B8 = replace(HEADS_B, batch=8)
HEADS_L336 = AttentionShape(batch=1, heads=16, tokens=577, width=64)
HEADS_7B = AttentionShape(batch=1, heads=32, tokens=2048, width=128)
HEADS_GROUPED = AttentionShape(batch=1, heads=28, tokens=4096, width=128, key_heads=4)
HEADS_8192 = AttentionShape(batch=1, heads=8, tokens=8192, width=64, eps=DYNAMIC_VIT_EPS)

_TOO_LARGE_MAPS = "not run: it stores several attention maps of 2.1 GB each in float32"

#: Attention by name: what is timed forward, and forward and backward.
ATTENTION: dict[str, AttentionShape] = {
    "vit-b": replace(HEADS_B, eps=DYNAMIC_VIT_EPS),
    "vit-l-512": replace(HEADS_L, eps=DYNAMIC_VIT_EPS),
    "vit-b-packed": replace(HEADS_B, eps=DYNAMIC_VIT_EPS, packed=True),
    "vit-b-hard": replace(HEADS_B, weights="hard", keep=0.5, eps=DYNAMIC_VIT_EPS),
    "vit-l-512-hard": replace(HEADS_L, weights="hard", keep=0.5, eps=DYNAMIC_VIT_EPS),
    "vit-b-size": replace(HEADS_B, weights="size"),
    "vit-l-512-size": replace(HEADS_L, weights="size"),
    "vit-b-keep70": replace(HEADS_B, weights="hard", keep=0.7),
    "vit-b-keep50": replace(HEADS_B, weights="hard", keep=0.5),
    "vit-b-keep35": replace(HEADS_B, weights="hard", keep=0.35),
    "vit-l-512-keep50": replace(HEADS_L, weights="hard", keep=0.5),
}


def _scores() -> Iterator[Case]:
    """The class token's scores and those of all queries; then of one row and of 64 rows."""
    operator = "attention_scores"
    for name, heads in (("vit-b", HEADS_B), ("vit-l-512", HEADS_L)):
        for weights in ("class", "columns"):
            shape = replace(heads, weights=weights)
            memory = ("tokenops", "eager") if heads is HEADS_L else ()
            yield Case(operator, f"{name}-{weights}", shape, setup_scores, memory=memory)
    for name, heads in (
        ("vit-b-8", HEADS_B8),
        ("vit-l-336", HEADS_L336),
        ("llama-7b", HEADS_7B),
        ("qwen2-7b", HEADS_GROUPED),
    ):
        for rows in (1, 64):
            shape = replace(heads, weights="last", rows=rows)
            yield Case(operator, f"{name}-last{rows}", shape, setup_scores)


def _attention_steps() -> Iterator[Case]:
    """Forward and backward; hard policies without a gradient too, as where tokens are removed."""
    operator = "policy_attention_forward_backward"
    for name, shape in ATTENTION.items():
        memory = ("tokenops", "eager", "sdpa") if name == "vit-l-512" else ()
        yield Case(operator, name, shape, setup_attention_step, memory=memory)
        if shape.skips_exactly:
            shape = replace(shape, policy_grad="none")
            yield Case(operator, f"{name}-none", shape, setup_attention_step)


CASES: dict[str, tuple[Case, ...]] = {
    "matching": (
        Case("match", "vit-b", replace(VIT_B, width=64), setup_match),
        Case("match", "vit-b-qkv", replace(VIT_B, width=64, heads=12), setup_match),
        Case("match", "vit-l-512", replace(VIT_L, width=64), setup_match),
        Case("match", "sd", SD, setup_match, memory=("tokenops", "eager")),
        Case("match", "n16384", N16384, setup_match, memory=("tokenops", "reference", "eager")),
        Case(
            "match",
            "n65536",
            N65536,
            setup_match,
            skip=dict.fromkeys(("eager", "compile", "bmm", "bmm+max"), _TOO_LARGE),
            memory=("tokenops",),
        ),
    ),
    "merging": (
        Case("merge", "vit-b", VIT_B, forward(merge_pair)),
        Case("merge", "vit-l-512", VIT_L, forward(merge_pair)),
        Case("merge", "sd", SD, forward(merge_pair)),
        Case("merge", "overhead", Shape(1, 16, 64, 4), forward(merge_pair)),
        Case("merge_wavg", "vit-b", VIT_B, forward(wavg_pair)),
        Case("unmerge", "vit-b", VIT_B, forward(unmerge_pair)),
        Case("unmerge", "sd", SD, forward(unmerge_pair)),
        Case("merge_backward", "vit-b", VIT_B, backward(merge_pair)),
        Case("merge_wavg_backward", "vit-b", VIT_B, backward(wavg_pair)),
        Case("unmerge_backward", "vit-b", VIT_B, backward(unmerge_pair)),
    ),
    "attention": (
        *(Case("policy_attention", *named, setup_attention) for named in ATTENTION.items()),
        *_attention_steps(),
        Case(
            "policy_attention_forward_backward",
            "n8192",
            HEADS_8192,
            setup_attention_step,
            skip=dict.fromkeys(("reference", "eager", "compile", "sdpa+bias"), _TOO_LARGE_MAPS),
            memory=("tokenops", "sdpa"),
        ),
        *_scores(),
    ),
}


def _on_gpu(cases: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, device="cuda") for case in cases)


VIT_B_256 = replace(VIT_B, batch=256)
VIT_L_32 = replace(VIT_L, batch=32)
SD_16 = replace(SD, batch=16)
N16384_640 = replace(N16384, width=640)
VLM_2880 = Shape(batch=8, tokens=2880, width=64, r=1440)

GPU_HEADS: dict[str, AttentionShape] = {
    "vit-b-256": replace(HEADS_B, batch=256, eps=DYNAMIC_VIT_EPS),
    "vit-l-512-32": replace(HEADS_L, batch=32, eps=DYNAMIC_VIT_EPS),
    "vit-b-256-size": replace(HEADS_B, batch=256, weights="size"),
    "vit-l-512-32-size": replace(HEADS_L, batch=32, weights="size"),
    "vlm-576": AttentionShape(32, 16, 576, 64),
    "vlm-2880": AttentionShape(8, 16, 2880, 64),
    "vlm-2880-keep50": AttentionShape(8, 16, 2880, 64, weights="hard", keep=0.5),
    "n16384-10": AttentionShape(2, 10, 16384, 64, eps=DYNAMIC_VIT_EPS),
}

#: Heads by name whose maps of all pairs do not fit, or take too long.
_NO_MAPS = dict.fromkeys(("reference", "eager", "compile", "sdpa+bias"), _TOO_LARGE_MAPS)

GPU_CASES: dict[str, tuple[Case, ...]] = {
    "matching": _on_gpu(
        (
            Case("match", "vit-b-256", replace(VIT_B_256, width=64), setup_match),
            Case("match", "vit-b-256-qkv", replace(VIT_B_256, width=64, heads=12), setup_match),
            Case("match", "vit-l-512-32", replace(VIT_L_32, width=64), setup_match),
            Case("match", "sd-2", SD, setup_match),
            Case("match", "sd-16", SD_16, setup_match),
            Case("match", "n16384-320", N16384, setup_match),
            Case("match", "n16384-640", N16384_640, setup_match),
            Case("match", "vlm-2880", VLM_2880, setup_match),
        )
    ),
    "merging": _on_gpu(
        Case(name, shape_name, shape, setup)
        for name, setup in (
            ("merge", forward(merge_pair)),
            ("merge_wavg", forward(wavg_pair)),
            ("unmerge", forward(unmerge_pair)),
            ("merge_backward", backward(merge_pair)),
            ("merge_wavg_backward", backward(wavg_pair)),
            ("unmerge_backward", backward(unmerge_pair)),
        )
        for shape_name, shape in (
            ("vit-b-256", VIT_B_256),
            ("vit-l-512-32", VIT_L_32),
            ("sd-2", SD),
            ("sd-16", SD_16),
            ("vlm-2880-4096", replace(VLM_2880, width=4096)),
        )
        if shape.grid is None or "wavg" not in name
    ),
    "attention": _on_gpu(
        (
            *(
                Case(
                    operator,
                    name,
                    shape,
                    setup,
                    skip=_NO_MAPS if shape.tokens > 8192 else {},
                )
                for operator, setup in (
                    ("policy_attention", setup_attention),
                    ("policy_attention_forward_backward", setup_attention_step),
                )
                for name, shape in GPU_HEADS.items()
            ),
            *(
                Case("attention_scores", f"{name}-{weights}", heads, setup_scores)
                for name, weights, heads in (
                    ("vit-b-256", "class", replace(HEADS_B, batch=256, weights="class")),
                    ("vlm-2880", "columns", replace(GPU_HEADS["vlm-2880"], weights="columns")),
                )
            ),
        )
    ),
}


def all_cases() -> Iterator[Case]:
    """Every case, in the order of the tables; those for the CPU first."""
    for table in (CASES, GPU_CASES):
        for cases in table.values():
            yield from cases


def operators() -> list[str]:
    """Names that ``--op`` takes: operators, and the folders that hold them."""
    return [*CASES, *dict.fromkeys(case.operator for case in all_cases())]


def select(
    operators: Iterable[str] = (), names: Iterable[str] = (), device: str = "cpu"
) -> list[Case]:
    """A device's cases of some operators or folders and of some names; all where none are given."""
    wanted, called = set(operators), set(names)
    return [
        case
        for word, cases in (GPU_CASES if device == "cuda" else CASES).items()
        for case in cases
        if (not wanted or word in wanted or case.operator in wanted)
        and (not called or case.name in called)
    ]


def find(operator: str, name: str) -> Case:
    """One case.

    Raises:
        ValueError: If there is no such case.
    """
    for case in all_cases():
        if (case.operator, case.name) == (operator, name):
            return case
    raise ValueError(f"there is no case {name!r} of {operator!r}")
