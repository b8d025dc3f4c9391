# SPDX-License-Identifier: Apache-2.0
"""Merging's launches that ship, each kernel in every setting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tokenops.ops.merging import triton

_DTYPES = {
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
}  # fmt: skip

#: Images and channels: tiles of each width, for devices that are full and for ones that are not.
_SHAPES = {
    f"C{channels} B{batch}": (batch, channels)
    for channels in (1, 320, 384, 768)
    for batch in (1, 1024 if channels > 1 else 1 << 17)
}
_TOKENS, _OUTPUTS = 197, 181

_Call = Callable[[torch.dtype, int, int], object]


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _map(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fields assign, offsets and members."""
    shapes = (batch, _TOKENS), (batch, _OUTPUTS + 1), (batch, _TOKENS)
    assign, offsets, members = (_empty(*shape, dtype=torch.int32) for shape in shapes)
    return assign, offsets, members


def _factors(dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    """A weight for each input and a scale for each output."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return _empty(batch, _TOKENS, dtype=sums), _empty(batch, _OUTPUTS, dtype=sums)


def _merge(reduce: str, factors: bool, dtype: torch.dtype, batch: int, channels: int) -> object:
    x = _empty(batch, _TOKENS, channels, dtype=dtype)
    weight, scale = _factors(dtype, batch) if factors else (None, None)
    return triton.merge(x, *_map(batch), weight, scale, reduce)


def _wavg(sizes: bool, dtype: torch.dtype, batch: int, channels: int) -> object:
    x = _empty(batch, _TOKENS, channels, dtype=dtype)
    size = _factors(dtype, batch)[0] if sizes else None
    return triton.merge_wavg(x, *_map(batch), size)


def _unmerge(everything: bool, mean: bool, dtype: torch.dtype, batch: int, channels: int) -> object:
    y = _empty(batch, _OUTPUTS, channels, dtype=dtype)
    weight, scale = _factors(dtype, batch) if everything else (None, None)
    residual = _empty(batch, _TOKENS, channels, dtype=dtype) if everything else None
    return triton.unmerge(y, *_map(batch), weight, scale, residual, mean)


def _pair_dot(dtype: torch.dtype, batch: int, channels: int) -> object:
    x = _empty(batch, _TOKENS, channels, dtype=dtype)
    y = _empty(batch, _OUTPUTS, channels, dtype=dtype)
    return triton.pair_dot(x, y, *_map(batch))


def _select(reduce: str, dtype: torch.dtype, batch: int, channels: int) -> object:
    x = _empty(batch, _TOKENS, channels, dtype=dtype)
    out = _empty(batch, _OUTPUTS, channels, dtype=dtype)
    return triton.merge_select_backward(out, x, out, *_map(batch), reduce)


def _strided(dtype: torch.dtype, batch: int, channels: int) -> object:
    """Channels that do not lie side by side, and a gradient of no stride."""
    x = _empty(batch, channels, _TOKENS, dtype=dtype).mT
    out = _empty(1, 1, 1, dtype=dtype).expand(batch, _OUTPUTS, channels)
    index = _map(batch)
    size = _factors(dtype, batch)[0]
    return (
        triton.merge_wavg(x, *index, size),
        triton.unmerge(out, *index, None, None, x, True),
        triton.pair_dot(x, out, *index),
        triton.merge_select_backward(out, x, out, *index, "amax"),
        triton.merge_select_backward(out, x, out, *index, "prod"),
    )


def _invert(tokens: int, outputs: int) -> object:
    return triton.invert(_empty(8, tokens, dtype=torch.int32), outputs)


#: In all settings, then in one setting of each type, then in one alone.
_OFTEN: dict[str, _Call] = {
    "merge mean": functools.partial(_merge, "mean", False),
    "wavg size": functools.partial(_wavg, True),
    "unmerge all": functools.partial(_unmerge, True, True),
    "pair_dot": _pair_dot,
    "select amax": functools.partial(_select, "amax"),
    "select prod": functools.partial(_select, "prod"),
}
_SELDOM: dict[str, _Call] = {
    "merge sum": functools.partial(_merge, "sum", False),
    "merge sum factors": functools.partial(_merge, "sum", True),
    "merge amax": functools.partial(_merge, "amax", False),
    "merge amin": functools.partial(_merge, "amin", False),
    "merge prod": functools.partial(_merge, "prod", False),
    "wavg": functools.partial(_wavg, False),
    "unmerge": functools.partial(_unmerge, False, False),
    "strided": _strided,
}


def _cases() -> dict[str, Callable[[], object]]:
    cases: dict[str, Callable[[], object]] = {}
    for dtype_name, dtype in _DTYPES.items():
        for shape_name, shape in _SHAPES.items():
            largest = shape_name == "C768 B1024"
            if dtype == torch.float16 and not largest:  # settings are those of bfloat16
                continue
            for name, call in {**_OFTEN, **(_SELDOM if largest else {})}.items():
                label = f"{name} {dtype_name} {shape_name}"
                cases[label] = functools.partial(call, dtype, *shape)
    for tokens, outputs in ((5, 3), (50, 30), (100, 90), (197, 181), (577, 400), (1025, 985),
                            (2000, 1800), (4096, 2048)):  # fmt: skip
        cases[f"invert {tokens} to {outputs}"] = functools.partial(_invert, tokens, outputs)
    return cases


CASES: dict[str, Callable[[], object]] = _cases()
