# SPDX-License-Identifier: Apache-2.0
"""FLOP formulas of the operators, registered when ``torch.utils.flop_counter`` is imported.

tokenops does not import flop_counter: it imports Triton, which takes longer than tokenops.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"

#: Formulas by name of the operator, until the counter is imported.
_formulas: dict[str, Callable[..., int]] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Register a formula, of shapes in place of tensors, for all overloads of an operator."""
    if COUNTER in sys.modules:
        _add_formula(sys.modules[COUNTER], name, formula)
        return
    _formulas[name] = formula
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add_formula(counter: ModuleType, name: str, formula: Callable[..., int]) -> None:
    operator = getattr(torch.ops.tokenops, name)
    counter.register_flop_formula(operator)(lambda *args, out_shape, **kwargs: formula(*args))


class _Finder:
    """Import hook that registers the formulas after flop_counter has been executed."""

    asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER or self.asking:
            return None
        self.asking = True  # find_spec below asks the other finders only
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                while _formulas:
                    _add_formula(module, *_formulas.popitem())

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
