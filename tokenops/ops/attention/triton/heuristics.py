# SPDX-License-Identifier: Apache-2.0
"""Launch settings of the attention kernels, chosen from dtype, head width and architecture.

``block_m`` is queries and ``block_n`` keys of a tile. Tables are indexed by the bytes of an element
and the head width, rounded up to 64, 128 or 256. Registers limit the sizes of tiles.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...._triton.launch import BEFORE_3_7, Settings, heuristic

_Table = dict[tuple[int, int], Settings]
_Pairs = dict[tuple[int, int], tuple[Settings, Settings]]

#: Largest head width by bytes of an element: no device has room for tiles of wider heads.
MAX_WIDTH = {2: 256, 4: 128, 8: 128}

#: Up to this number of keys a program can hold all of them.
MAX_SHORT = 256

#: Forward pass over many keys: settings without and with eps or query positions, which take
#: registers.
_LONG: _Pairs = {
    (2, 64): (Settings(128, 32, 4, 3), Settings(64, 32, 4, 2)),
    (2, 128): (Settings(128, 32, 8, 2), Settings(64, 32, 8, 2)),
    (2, 256): (Settings(64, 32, 8, 2), Settings(32, 32, 8, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 1)),
    (4, 128): (Settings(16, 32, 4, 1), Settings(16, 16, 4, 1)),
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 32, 4, 1)),
    (8, 128): (Settings(16, 16, 4, 1), Settings(16, 16, 8, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG[4, 64] = Settings(32, 32, 8, 2), Settings(32, 32, 4, 1)

#: The same for GPUs with warpgroup MMA, which leaves more registers.
_LONG_SM90: _Pairs = {
    **_LONG,
    (2, 64): (Settings(128, 64, 4, 3), Settings(64, 32, 4, 2)),
    (2, 128): (Settings(128, 64, 8, 2), Settings(64, 32, 4, 2)),
    (2, 256): (Settings(64, 32, 8, 2), Settings(64, 16, 8, 2)),
    (4, 64): (Settings(64, 32, 4, 2), Settings(32, 32, 4, 1)),
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 16, 4, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG_SM90[2, 128] = _LONG_SM90[2, 128][0], Settings(64, 32, 8, 2)
_LONG_SM100: _Pairs = {
    **_LONG_SM90,
    (4, 64): _LONG[4, 64],
    (8, 64): (Settings(16, 32, 4, 1), Settings(16, 32, 8, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _LONG_SM100[4, 64] = _LONG[4, 64][0], Settings(32, 32, 8, 1)
_LONG_BY_ARCH = {"sm_90": _LONG_SM90, "sm_100": _LONG_SM100, "sm_103": _LONG_SM100}

#: Backward kernels: settings of plain calls (q, k and v alone) and of all others.
_DQ: _Pairs = {
    (2, 64): (Settings(64, 64, 4, 2), Settings(64, 32, 4, 3)),
    (2, 128): (Settings(64, 64, 8, 2), Settings(64, 32, 8, 2)),
    (2, 256): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(32, 16, 8, 2)),
    (8, 64): (Settings(16, 16, 8, 1), Settings(16, 16, 8, 1)),
}
_DKDV: _Pairs = {
    (2, 64): (Settings(32, 64, 4, 2), Settings(32, 64, 4, 2)),
    (2, 128): (Settings(32, 64, 8, 2), Settings(32, 64, 8, 2)),
    (2, 256): (Settings(32, 32, 4, 2), Settings(32, 32, 4, 2)),
    (4, 64): (Settings(32, 32, 4, 2), Settings(16, 32, 8, 2)),
    (8, 64): (Settings(16, 16, 4, 1), Settings(16, 16, 4, 1)),
}
if BEFORE_3_7:  # 4 warps spill registers
    _DKDV[4, 64] = Settings(32, 32, 8, 2), Settings(16, 32, 8, 2)

#: Attention scores.
_SCORES: _Table = {
    (2, 64): Settings(64, 128, 8, 3),
    (2, 128): Settings(64, 128, 8, 2),
    (2, 256): Settings(64, 64, 8, 2),
    (4, 64): Settings(32, 64, 4, 2),
    (4, 128): Settings(16, 32, 4, 1),
    (8, 64): Settings(16, 32, 4, 1),
    (8, 128): Settings(16, 16, 4, 1),
}
if BEFORE_3_7:  # 64 keys spill registers on sm_100
    _SCORES[2, 256] = Settings(64, 32, 8, 2)


def _rounded(width: int) -> int:
    return 64 if width <= 64 else 128 if width <= 128 else 256


@heuristic
def attention_forward(
    arch: str, itemsize: int, width: int, seqlen_q: int, has_policy: bool, eps_or_positions: bool
) -> Settings:
    """Settings for many keys; ``eps_or_positions``: with eps or query positions."""
    found = _LONG_BY_ARCH.get(arch, _LONG)[itemsize, _rounded(width)][eps_or_positions]
    if seqlen_q <= 16 and found.block_m > 16:  # 16: the smallest tile of tl.dot
        return Settings(16, found.block_n, 4, found.num_stages)
    if BEFORE_3_7 and has_policy and found == Settings(128, 64, 4, 3):  # 4 warps spill
        return replace(found, num_warps=8)
    return found


def attention_forward_short(
    arch: str,
    dtype: torch.dtype,
    width: int,
    seqlen_q: int,
    seqlen_k: int,
    uses_positions: bool,
    has_eps: bool,
    padding: bool,
) -> Settings | None:
    """Settings for few keys, ``block_n`` for the widest chunk; None if registers do not suffice.

    Masks by position take registers, and so does the search for the maximum that eps needs.
    """
    if seqlen_k == 0 or seqlen_k > MAX_SHORT or dtype.itemsize > 2 or width > 64:
        return None
    takes_registers = uses_positions or has_eps
    if has_eps and (padding or dtype == torch.float16):
        return None
    if takes_registers and arch in ("sm_100", "sm_103"):
        return None
    block_m = 32 if BEFORE_3_7 and uses_positions and padding else 64
    return Settings(16 if seqlen_q <= 16 else block_m, 64 if takes_registers else 128, 4, 1)


def _backward(table: _Pairs, arch: str, itemsize: int, width: int, is_plain: bool) -> Settings:
    # Wider operands of float32 and float64 are split.
    key = (itemsize, _rounded(width)) if itemsize <= 2 else (itemsize, 64)
    return table[key][_small(arch, is_plain)]


def _small(arch: str, is_plain: bool) -> bool:
    """Whether tiles have to be small, on AMD GPUs always: they have 64 KB of shared memory."""
    return not is_plain or arch.startswith("gfx")


@heuristic
def attention_backward_dq(arch: str, itemsize: int, width: int, is_plain: bool) -> Settings:
    """Settings of the kernel of dq."""
    found = _backward(_DQ, arch, itemsize, width, is_plain)
    if BEFORE_3_7 and found.num_stages > 2 and arch.startswith("sm_8"):
        return replace(found, num_stages=2)  # Triton 3.6 spills registers with three
    return found


@heuristic
def attention_backward_dkdv(arch: str, itemsize: int, width: int, is_plain: bool) -> Settings:
    """Settings of the kernel of dk and dv."""
    found = _backward(_DKDV, arch, itemsize, width, is_plain)
    if BEFORE_3_7 and itemsize == 2 and _small(arch, is_plain):  # larger ones spill registers
        if width <= 64 and arch.startswith("sm_8"):
            return replace(found, num_stages=1)
        if 64 < width <= 128 and arch in ("sm_100", "sm_103"):
            return replace(found, block_n=32)
    return found


@heuristic
def attention_scores(itemsize: int, width: int, seqlen_q: int) -> Settings:
    """Settings of the sums over queries."""
    found = _SCORES[itemsize, _rounded(width)]
    return found if seqlen_q > 16 else Settings(16, found.block_n, 4, 1)
