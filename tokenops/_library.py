# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with PyTorch: one call does all that the framework asks for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAMESPACE = "tokenops"

#: Names of all operators, and of those that users call; the rest serve their backwards.
defined: list[str] = []
operators: list[str] = []

#: Shapes and dtypes of each operator's results, as tracing sees them.
fakes: dict[str, Callable[..., Any]] = {}
references: dict[str, Callable[..., Any]] = {}

_shared: dict[str, frozenset[str]] = {}
_library = torch.library.Library(NAMESPACE, "DEF")


def acc_dtype(x: Tensor) -> torch.dtype:
    """Type of sums, weights and similarities: float64 for double data, float32 for all other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keep autocast from lowering the precision of a reference; not every device knows autocast."""
    if _knows_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# torch.compile takes the answer for granted; PyTorch 2.11 cannot trace the question.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    defined.append(name)
    if public:
        operators.append(name)
    qualified = f"{NAMESPACE}::{name}"
    fakes[name], references[name] = fake, _contiguous(reference)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, references[name], "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            qualified, backward, setup_context=setup_context, lib=_library
        )
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    _shared[name] = frozenset(shared)
    torch.library.register_vmap(qualified, _batch_rule(operator, _shared[name]), lib=_library)


def implement(name: str, kernel: Callable[..., Any], key: str, *, instead: bool = False) -> None:
    """Give an operator a kernel in Python for one kind of device.

    Args:
        name: Name of the operator.
        kernel: Takes the operator's arguments, behind the set of dispatch keys.
        key: ``"CPU"`` or ``"CUDA"``.
        instead: Whether it takes the place of another kernel.
    """
    options = {"allow_override": True} if instead else {}  # unknown to older versions of PyTorch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of a replacement
        _library.impl(name, kernel, key, with_keyset=True, **options)


def _contiguous(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The reference with dense outputs, as the fakes promise and as compiled graphs rely on.

    The registered backward differentiates the operator, so that nothing in it need be recorded.
    """

    def kernel(*args: Any) -> Any:
        with torch.no_grad():
            return pytree.tree_map_only(Tensor, Tensor.contiguous, reference(*args))

    return kernel


def shared_arguments(name: str) -> frozenset[str]:
    """Arguments of an operator that may come with one dimension, meant for every image."""
    return _shared[name]


def _pairs(argument: Any, dim: Any) -> Iterable[tuple[Any, Any]]:
    """An argument, or each of a list, with the dimension that is mapped."""
    return zip(argument, dim, strict=True) if isinstance(argument, list) else [(argument, dim)]


def _batch_rule(operator: Any, shared: frozenset[str]) -> Callable[..., Any]:
    """Vectorize by folding the mapped dimension into the batch: every image is independent."""
    names = [argument.name for argument in operator._schema.arguments]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        lead = next(
            (a.movedim(d, 0) if d is not None else a.unsqueeze(0))
            for argument, dim, n in zip(args, in_dims, names, strict=False)
            if n not in shared
            for a, d in _pairs(argument, dim)
            if isinstance(a, Tensor)
        )
        batch = lead.shape[1]

        def fold(argument: Any, dim: Any, name: str) -> Any:
            if isinstance(argument, list):
                return [fold(a, d, name) for a, d in zip(argument, dim, strict=True)]
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
