# SPDX-License-Identifier: Apache-2.0
"""Launches of ``nearest`` and ``match``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tokenops.ops.matching.triton import match, nearest

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}
ALL = {**HALF, "f32": torch.float32, "f64": torch.float64}

CASES: dict[str, Callable[[], object]] = {}


def _rows(dtype: torch.dtype, *shape: int, strided: bool = False) -> Tensor:
    """[B, N, D] or [B, H, N, D]; a strided one has no two channels side by side."""
    if strided:
        return torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device="meta").mT
    return torch.empty(shape, dtype=dtype, device="meta")


def _nearest(
    dtype: torch.dtype, *shape: int, similarity: str = "cosine", masks: bool = False,
    strided: bool = False,
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        x = _rows(dtype, *shape, strided=strided)
        mask = torch.empty(shape[0], shape[-2], dtype=torch.bool, device="meta") if masks else None
        return nearest(x, x, mask, mask, similarity)

    return call


def _match(
    dtype: torch.dtype, *shape: int, r: int = 16, prefix: int = 0, stride: int = 2,
    listed: bool = False, cells: tuple[int, int, int] | None = None, drawn: int = 0,
    protected: bool = False, threshold: float | None = None, thresholds: bool = False,
    order: str = "position",
) -> Callable[[], object]:  # fmt: skip
    def call() -> object:
        tokens = shape[-2]
        indices: tuple[Tensor | None, Tensor | None] = None, None
        if listed:
            count = tokens // 4
            index = torch.empty(tokens, dtype=torch.int64, device="meta")
            indices = index[count:], index[:count]
        mask = torch.empty(tokens, dtype=torch.bool, device="meta") if protected else None
        rule: tuple[int, int, int] = (stride, 0, 1) if cells is None else cells
        cell = torch.empty(drawn, dtype=torch.int32, device="meta") if drawn else None
        least = torch.empty(shape[0], device="meta") if thresholds else None
        return match(
            _rows(dtype, *shape), r, prefix, mask, *indices, *rule, cell, threshold, least, order,
            "cosine",
        )  # fmt: skip

    return call


# Few and many rows; rows that stay on the chip, in one piece or in chunks, and rows that do not.
for _name, _dtype in HALF.items():
    if _name == "f16":  # as bfloat16, but for its range
        CASES["nearest f16 D64"] = _nearest(_dtype, 2, 197, 64)
        continue
    for _width in (16, 32, 64, 80, 128, 160, 320, 640):
        CASES[f"nearest {_name} D{_width}"] = _nearest(_dtype, 2, 197, _width)
        CASES[f"nearest {_name} D{_width} many"] = _nearest(_dtype, 512, 197, _width)
    for _width in (64, 320, 640):
        CASES[f"nearest {_name} D{_width} huge"] = _nearest(_dtype, 2, 65536, _width)
        CASES[f"nearest {_name} D{_width} strided"] = _nearest(_dtype, 2, 197, _width, strided=True)
        CASES[f"nearest {_name} D{_width} masks dot"] = _nearest(
            _dtype, 2, 197, _width, masks=True, similarity="dot"
        )
for _name, _dtype in ALL.items():
    for _width in (64, 128, 320):
        if _name not in HALF:
            CASES[f"nearest {_name} D{_width}"] = _nearest(_dtype, 2, 197, _width)
            CASES[f"nearest {_name} D{_width} huge"] = _nearest(_dtype, 2, 16384, _width)
            CASES[f"nearest {_name} D{_width} masks dot"] = _nearest(
                _dtype, 2, 197, _width, masks=True, similarity="dot"
            )
        CASES[f"nearest {_name} D{_width} heads"] = _nearest(_dtype, 2, 12, 197, _width)
        CASES[f"nearest {_name} D{_width} heads huge"] = _nearest(_dtype, 2, 12, 16384, _width)

CASES["match bf16 D64"] = _match(torch.bfloat16, 256, 197, 64, prefix=1)
CASES["match bf16 D64 listed"] = _match(torch.bfloat16, 2, 197, 64, listed=True)
CASES["match bf16 D320 listed"] = _match(torch.bfloat16, 2, 4096, 320, listed=True)
CASES["match bf16 D64 grid"] = _match(torch.bfloat16, 2, 197, 64, prefix=1, cells=(2, 14, 2))
CASES["match bf16 D64 grid drawn"] = _match(
    torch.bfloat16, 2, 197, 64, prefix=1, cells=(2, 14, 2), drawn=49
)
CASES["match bf16 D320 grid drawn"] = _match(
    torch.bfloat16, 2, 4096, 320, cells=(2, 64, 2), drawn=1024
)
CASES["match bf16 D64 thresholds"] = _match(torch.bfloat16, 2, 197, 64, thresholds=True)
CASES["match f32 D64 many tokens"] = _match(torch.float32, 2, 5000, 64)
for _tokens, _order, _threshold, _listed in itertools.product(
    (24, 60, 100, 197, 400, 1025, 2048, 4096), ("position", "tome"), (None, 0.5), (False, True)
):
    if (_threshold or _listed) and _tokens not in (197, 4096):
        continue
    _label = f"match N{_tokens} {_order}"
    _label += " threshold" if _threshold is not None else ""
    _label += " listed" if _listed else ""
    CASES[_label] = _match(
        torch.float16, 2, _tokens, 64, r=6, listed=_listed, protected=_listed,
        threshold=_threshold, order=_order,
    )  # fmt: skip
