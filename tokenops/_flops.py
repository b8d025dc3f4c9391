# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the operators for ``torch.utils.flop_counter``, told to it when somebody imports it.

Its import takes longer than that of all of tokenops, for it imports Triton.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"

#: Formulas by name of the operator, for when the counter is imported.
_formulas: dict[str, Callable[..., int]] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Give an operator, all of its overloads, a formula that takes shapes in place of tensors."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER], name, formula)
        return
    _formulas[name] = formula
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _tell(counter: ModuleType, name: str, formula: Callable[..., int]) -> None:
    operator = getattr(torch.ops.tokenops, name)
    counter.register_flop_formula(operator)(lambda *args, out_shape, **kwargs: formula(*args))


class _Finder:
    """Finds the counter as the others do, to add the formulas to it once it is executed."""

    asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER or self.asking:
            return None
        self.asking = True  # the others
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                while _formulas:
                    _tell(module, *_formulas.popitem())

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
