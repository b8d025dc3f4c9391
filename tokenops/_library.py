# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with PyTorch: one call gives an operator all it owes to the framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAMESPACE = "tokenops"

#: Names of the operators that users call, as they register; the rest serve their backwards.
operators: list[str] = []

_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    shared: Iterable[str] = (),
    public: bool = False,
) -> None:
    """Define an operator in ``torch.ops.tokenops``.

    Compiled libraries add faster kernels per device afterwards; until they do, and on every other
    device, the reference serves.

    Args:
        schema: Schema string without the namespace.
        reference: Plain PyTorch implementation for any device.
        fake: Shape and dtype propagation for tracing.
        backward: Backward formula, itself made of differentiable operators.
        setup_context: Saves what ``backward`` needs.
        shared: Names of arguments that may come with one dimension only, meant for every image of
            the batch; all other tensor arguments and all outputs lead with the batch.
        public: Whether a public function of the same name calls it.
    """
    name = schema.partition("(")[0]
    if public:
        operators.append(name)
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(qualified, _batch_rule(operator, frozenset(shared)), lib=_library)


def _batch_rule(operator: Any, shared: frozenset[str]) -> Callable[..., Any]:
    """Vectorize by folding the mapped dimension into the batch: every image is independent."""
    names = [argument.name for argument in operator._schema.arguments]

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        lead = next(
            (a.movedim(d, 0) if d is not None else a.unsqueeze(0))
            for a, d, n in zip(args, in_dims, names, strict=False)
            if isinstance(a, Tensor) and n not in shared
        )
        batch = lead.shape[1]

        def fold(argument: Any, dim: int | None, name: str) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if dim is None:
                if name in shared and argument.dim() == 1:
                    return argument
                argument = argument.unsqueeze(0).expand(size, *argument.shape)
            else:
                argument = argument.movedim(dim, 0)
                if name in shared and argument.dim() == 2:
                    argument = argument.unsqueeze(1).expand(size, batch, argument.shape[1])
            return argument.reshape(size * batch, *argument.shape[2:])

        folded = [fold(a, d, n) for a, d, n in zip(args, in_dims, names, strict=False)]
        outputs = operator(*folded)
        unfolded = pytree.tree_map(lambda t: t.reshape(size, batch, *t.shape[1:]), outputs)
        return unfolded, pytree.tree_map(lambda _: 0, unfolded)

    return rule
