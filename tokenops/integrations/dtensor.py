# SPDX-License-Identifier: Apache-2.0
"""Sharding of the operators over the batch: importing this module registers it with DTensor.

Images are independent, so operators on a batch that is sharded over devices do not communicate.
DTensor takes longer to import than tokenops, so this module is imported only on request:

    import tokenops.integrations.dtensor

Plain tensors passed with a sharded metric (masks, lists, the draws of a random split) hold the
whole batch and must be the same on every rank: seed the generators of all ranks alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .. import _library
from .._library import overloads, shared_arguments


def _register(name: str, operator: Any) -> None:
    shared = shared_arguments(name)
    names = [argument.name for argument in operator._schema.arguments]
    outputs = len(operator._schema.returns)

    @register_sharding(operator)  # type: ignore[untyped-decorator]
    def strategies(*args: Any) -> list[tuple[list[Placement], list[Placement | None]]]:
        def place(argument: Any, name: str, placement: Placement) -> Placement | None:
            if not hasattr(argument, "shape"):
                return None
            one_for_all = name in shared and len(argument.shape) == 1
            return Replicate() if one_for_all else placement

        return [
            (
                [placement] * outputs,
                [place(a, n, placement) for a, n in zip(args, names, strict=False)],
            )
            for placement in (Replicate(), Shard(0))
        ]


for _ops in overloads.values():
    for _name, _operator in vars(_ops).items():
        _register(_name, _operator)


def _distribute(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make replicated DTensors of the plain tensors if the first argument is a DTensor."""
    first = arguments[0]
    if not isinstance(first, DTensor):
        return arguments
    mesh = first.device_mesh
    everywhere = [Replicate()] * mesh.ndim
    return tuple(
        DTensor.from_local(a, mesh, everywhere, run_check=False)
        if isinstance(a, Tensor) and not isinstance(a, DTensor)
        else a
        for a in arguments
    )


_library.distribute = _distribute
