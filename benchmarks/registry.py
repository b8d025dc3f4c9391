# SPDX-License-Identifier: Apache-2.0
"""All cases, by the word of their file: ``benchmarks/<word>.py`` lists its ``CASES``.

Shapes: ViT-B/16 at 224 pixels (197 tokens), ViT-L/16 at 512 (1025 tokens), Stable Diffusion 1.5 at
512 (4096 tokens, two images by classifier-free guidance) and at 1024 (16384 tokens), and 65536
tokens, whose scores of all pairs are too many to store. Attention: 16 images of ViT-B/16 at 224,
one of ViT-L/16 at 512, and 8192 tokens for the memory that it takes. Scores also of one row and of
64 rows of ViT-B/16, of ViT-L/14 at 336 (577 tokens) and of decoders. GPUs have sizes of their own:
more images, and the tokens of vision-language models.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import attention, matching, merging, models
from .cases import Case

CASES: dict[str, tuple[Case, ...]] = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (matching, merging, attention, models)
}


def all_cases() -> list[Case]:
    """Every case, in the order of the tables; cases for the CPU first."""
    cases = [case for family in CASES.values() for case in family]
    return sorted(cases, key=lambda case: case.device)


def operators() -> list[str]:
    """Names that ``--op`` takes: families, and operators."""
    return [*CASES, *dict.fromkeys(case.operator for case in all_cases())]


def select(
    operators: Iterable[str] = (),
    names: Iterable[str] = (),
    device: str = "cpu",
    on_request: bool = False,
) -> list[Case]:
    """A device's cases of some operators or families and of some names, by default all.

    Those on request are selected by their names, or instead of all others by ``on_request``.
    """
    wanted, called = {*operators}, {*names}
    return [
        case
        for word, cases in CASES.items()
        for case in cases
        if case.device == device
        and (not wanted or word in wanted or case.operator in wanted)
        and (case.name in called if called else case.on_request == on_request)
    ]


def find(operator: str, name: str) -> Case:
    """One case; a ValueError if there is none."""
    for case in all_cases():
        if (case.operator, case.name) == (operator, name):
            return case
    raise ValueError(f"there is no case {name!r} of {operator!r}")
