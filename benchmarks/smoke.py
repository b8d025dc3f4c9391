# SPDX-License-Identifier: Apache-2.0
"""The calls in the operators' samples at small sizes.

``tests/test_smoke.py`` makes and verifies them; ``benchmarks.gpu_cache`` compiles their kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenops import _library
from tokenops.testing import samples
from tokenops.testing.samples import Call, Sizes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: Sizes, and beginnings of the names of the calls that are made at these sizes: each call at the
#: first sizes, some at others, where kernels differ. Triton compiles kernels for each.
LONG = ("policy_attention", "attention_scores per head", "attention_scores sizes")
SIZES = (
    (Sizes(tokens=75, width=64, value_width=112, channels=37), ("",)),
    (Sizes(tokens=300, width=80, channels=40), (*LONG, "merge", "unmerge")),
    (Sizes(tokens=197, width=320), ("nearest cosine", "match plain", "match threshold")),
    (Sizes(batch=1, tokens=5000, width=64), ("match plain",)),
)


class Case(NamedTuple):
    operator: str
    name: str
    sizes: Sizes

    def call(self, dtype: torch.dtype, device: torch.device | str) -> Call:
        family = _library.defined[self.operator].module.rpartition(".")[0]
        sizes = replace(self.sizes, dtype=dtype, device=device)
        calls = importlib.import_module(f"{family}.samples").calls(sizes)
        return next(call for call in calls if call[:2] == self[:2])


def cases() -> Iterator[Case]:
    known = sorted(call[:2] for call in samples.calls(Sizes()))
    for beginning in {beginning for _, names in SIZES for beginning in names}:
        if not any(" ".join(name).startswith(beginning) for name in known):
            raise ValueError(f"no call's name begins with {beginning!r}")
    for operator, name in known:
        for sizes, names in SIZES:
            if f"{operator} {name}".startswith(names):
                yield Case(operator, name, sizes)


def outcome(call: Call) -> list[Tensor]:
    """Results of a call, then its gradients."""
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in call.tensors.items()}
    results = call.function(**leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    inputs = [t for t in leaves.values() if t.requires_grad]
    terms = [(t.double() * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sum()
             for t in results if t.requires_grad]  # fmt: skip
    gradients = torch.autograd.grad(sum(terms), inputs, allow_unused=True) if terms else ()
    return [t.detach() for t in results] + [g for g in gradients if g is not None]
