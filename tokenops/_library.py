# SPDX-License-Identifier: Apache-2.0
"""Registration of operators with PyTorch: one call for schema, kernels, fake, autograd, vmap."""

from __future__ import annotations

import functools
import typing
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import _flops, _missing

NAMESPACE = "tokenops"


class Signature(NamedTuple):
    """Arguments and results of an operator, derived from the annotations of a function.

    A parameter whose annotation is a NamedTuple is a group: the schema has an argument for each
    field. So arguments that several operators or functions share are written once.
    """

    schema: str  # "(Tensor x, ...) -> Tensor"
    #: For each parameter of the function: the constructor of its group, or None, and the start and
    #: end of its arguments.
    steps: tuple[tuple[Callable[[Any], Any] | None, int, int], ...]
    takes_list: bool  # whether the first argument is a list of tensors

    @property
    def grouped(self) -> bool:
        return any(make is not None for make, _, _ in self.steps)

    def group(self, args: Sequence[Any]) -> list[Any]:
        """Group the flat arguments of the operator into the parameters of the function."""
        # Every call of a Python kernel comes here: half a microsecond.
        return [
            args[start] if make is None else make(args[start:end])
            for make, start, end in self.steps
        ]

    def flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function of the grouped parameters, so that it takes the flat arguments."""
        if not self.grouped:
            return function

        def call(*args: Any) -> Any:
            return function(*self.group(args))

        return call


_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", int: "SymInt",
    float: "float", float | None: "float?", bool: "bool", str: "str",
}  # fmt: skip


def signature_of(function: Callable[..., Any]) -> Signature:
    """Derive an operator's signature from a function's annotations."""
    hints = typing.get_type_hints(function)
    result = hints.pop("return")
    groups = tuple(hint if hasattr(hint, "_fields") else None for hint in hints.values())
    arguments: list[tuple[str, Any]] = []
    for (name, hint), group in zip(hints.items(), groups, strict=True):
        arguments += [(name, hint)] if group is None else typing.get_type_hints(group).items()
    fields = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in arguments)
    if hasattr(result, "_fields"):
        results = ", ".join(f"Tensor {name}" for name in result._fields)
    elif typing.get_origin(result) is tuple:
        results = ", ".join("Tensor" for _ in typing.get_args(result))
    else:
        results = _SCHEMA_TYPES[result]
    several = hasattr(result, "_fields") or typing.get_origin(result) is tuple
    schema = f"({fields}) -> ({results})" if several else f"({fields}) -> {results}"
    steps, start = [], 0
    for group in groups:
        end = start + (1 if group is None else len(group._fields))
        # as group._make, without its check of the length
        steps.append(
            (None if group is None else functools.partial(tuple.__new__, group), start, end)
        )
        start = end
    return Signature(schema, tuple(steps), arguments[0][1] == list[Tensor])


class Operator(NamedTuple):
    """The record of an operator; :func:`register` says what each field means.

    The functions take the operator's flat arguments.
    """

    name: str
    module: str  # of the reference: "tokenops.ops.<family>.reference"
    signature: Signature
    reference: Callable[..., Any]
    composed: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None
    setup_context: Callable[..., None] | None
    shared: frozenset[str]
    flops: Callable[..., int]


#: Records of all operators by name, and the names of the operators with a public function.
defined: dict[str, Operator] = {}
operators: list[str] = []

#: Overloads of the operators by backend; each is an attribute with the name of its operator. None
#: has the default overloads, for when no backend is chosen. A backend has the overloads that only
#: this backend serves, for example torch.ops.tokenops.merge.triton. A backward formula gets the
#: overloads of its forward. So graphs and backwards keep a choice, which affects no other code.
overloads: dict[str | None, SimpleNamespace] = {
    backend: SimpleNamespace() for backend in (None, "composed", "triton")
}

_library = torch.library.Library(NAMESPACE, "DEF")


class _References:
    """The reference of each operator, of flat arguments, as an attribute with its name."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in defined:  # tools such as inspect.unwrap look up other names
            raise AttributeError(name)
        return defined[name].reference


#: The references, which serve where a backward is itself differentiated.
references = _References()

#: Makes DTensors of plain tensors passed with DTensors; set by ``tokenops.integrations.dtensor``.
distribute: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the accumulation dtype, the "dtype of sums": float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def differentiates() -> bool:
    """Return whether a running backward may be differentiated, in reverse or forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def may_be_true(condition: Tensor) -> bool:
    """Return whether an element is true; always True on devices where reading synchronizes."""
    return not condition.is_cpu or bool(condition.any())


def block_entries(device: torch.device) -> int:
    """Return how many entries of a similarity or attention matrix to compute at a time.

    4 MiB of float32 stay in a CPU's cache; 64 MiB keep another device busy.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 24


#: Minimum number of rows of such a block, because each block reads all keys again.
ROWS_AT_LEAST = 64


def assume_constant_result(*functions: Any) -> None:
    """Let torch.compile call functions during tracing and treat their results as constants.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but imports the compiler,
    which takes longer than all of tokenops.
    """
    for function in functions:
        function._dynamo_marked_constant = True


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context that disables autocast, on devices that have it."""
    if knows_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def knows_autocast(device_type: str) -> bool:
    """Return whether a device type has autocast, whose state can be read only in this case."""
    return torch.amp.is_autocast_available(device_type)


assume_constant_result(knows_autocast)  # PyTorch 2.11 cannot trace is_autocast_available


def register(
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    composed: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    shared: Iterable[str] = (),
    flops: Callable[..., int] | None = None,
    public: bool = False,
) -> None:
    """Define an operator in ``torch.ops.tokenops`` and record it.

    The composed function serves every device without a kernel. The compiled library and
    ``serve_by_triton`` register kernels of a device.

    Args:
        reference: The formula in plain PyTorch, for any device: the oracle, which is differentiable
            by autograd in every mode and may be slow. Its name is the operator's name, and the
            operator's schema is derived from its annotations. All other functions take the same
            parameters, see :class:`Signature`.
        fake: Shape and dtype propagation for tracing.
        composed: Plain PyTorch optimized for speed, for any device; it need not be differentiable.
            The reference by default.
        backward: Backward formula ``(ops, ctx, *grads)``. It calls differentiable operators, which
            are the attributes of ``ops`` and take flat arguments. It returns a gradient for each
            flat argument, or a NamedTuple of gradients for a group. ``ctx.needs`` holds whether
            each flat argument needs a gradient; for a list, a tuple with an entry per tensor.
        setup_context: ``(ctx, inputs, output)``: saves tensors and options for ``backward``;
            ``inputs`` are the parameters of the reference.
        shared: Names of arguments that may be 1-D, without a batch dimension, and then apply to
            every image. The first dimension of all other tensor arguments and of all outputs is the
            batch.
        flops: FLOPs of the matrix products, as a function of the operator's arguments with shapes
            in place of tensors. 0 by default, as for PyTorch's elementwise operators.
        public: Whether a public function of the same name calls it.
    """
    name, signature = reference.__name__, signature_of(reference)
    operator = Operator(
        *(name, reference.__module__, signature, signature.flat(reference)),
        *(signature.flat(composed or reference), signature.flat(fake), backward, setup_context),
        *(frozenset(shared), signature.flat(flops or _no_flops)),
    )
    defined[name] = operator
    if public:
        operators.append(name)
    for backend in overloads:
        _define(operator, backend)
    kernel = dense(operator.composed)
    _library.impl(f"{name}.composed", kernel, "CompositeExplicitAutograd")
    _library.impl(name, _warn_of_missing_kernel(kernel), "CompositeExplicitAutograd")
    _flops.register(name, operator.flops)


def declare(function: Callable[..., Any]) -> Any:
    """Define an operator that only compiled libraries serve, from a function without a body.

    The kernel of another operator calls it, below autograd, vmap and tracing, so it needs neither a
    backward nor a fake.

    Returns:
        The operator, which takes flat arguments.
    """
    name = function.__name__
    _library.define(name + signature_of(function).schema)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _no_flops(*args: Any) -> int:
    return 0


def add_overloads(backend: str) -> None:
    """Define an overload of each operator for a backend, also of operators registered later."""
    overloads[backend] = SimpleNamespace()
    for operator in defined.values():
        _define(operator, backend)
        _flops.register(operator.name, operator.flops)  # a new overload changes the packet's hash


def _define(operator: Operator, backend: str | None) -> None:
    """Define one overload: schema, fake, autograd and vmap."""
    ops = overloads[backend]
    name = operator.name if backend is None else f"{operator.name}.{backend}"
    qualified = f"{NAMESPACE}::{name}"
    _library.define(name + operator.signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualified, operator.fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), operator.name)
    overload = getattr(packet, backend or "default")
    if operator.backward is not None:
        _library.impl(name, _autograd_rule(operator, overload, ops), "Autograd", with_keyset=True)
    torch.library.register_vmap(qualified, _batch_rule(overload, operator.shared), lib=_library)
    setattr(ops, operator.name, overload)


def _autograd_rule(operator: Operator, overload: Any, ops: SimpleNamespace) -> Callable[..., Any]:
    """Make the kernel for the Autograd key: record the backward formula, refuse tangents.

    It differs from ``torch.library.register_autograd`` in three ways. The formula gets ``ops``.
    ``ctx.needs`` is constant, and has an entry for each tensor of a list; PyTorch changes
    ``ctx.needs_input_grad`` during a backward, which other threads in the same graph would see.
    Tangents of forward mode are an error, because the kernels would drop them silently.
    """
    setup_context: Any = operator.setup_context
    formula: Any = operator.backward
    signature = operator.signature
    takes_list = signature.takes_list  # only the first argument can be a list

    def forward(ctx: Any, keys: Any, count: int, *args: Any) -> Any:
        needs = ctx.needs_input_grad[2:]
        if takes_list:
            args = list(args[:count]), *args[count:]
            needs = needs[:count], *needs[count:]
        ctx.needs = needs
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keys & torch._C._after_autograd_keyset, *args)
        setup_context(ctx, signature.group(args) if signature.grouped else args, output)
        return tuple(output) if takes_list else output

    def backward(ctx: Any, *grads: Any) -> Any:
        first, *rest = _spread(formula(ops, ctx, *([grads] if takes_list else grads)))
        return (None, None, *(first if takes_list else [first]), *rest)

    name = f"BackwardOf_{operator.name}"
    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded: Any = type(name, (torch.autograd.Function,), functions)

    def kernel(keys: Any, first: Any, *rest: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(operator.name, first, rest)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(first, *rest):
            if takes_list:
                return list(recorded.apply(keys, len(first), *first, *rest))
            return recorded.apply(keys, 1, first, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, first, *rest)

    return kernel


def _spread(gradients: tuple[Any, ...]) -> list[Any]:
    """Flatten gradients: replace each NamedTuple by its fields."""
    spread: list[Any] = []
    for gradient in gradients:
        spread += gradient if hasattr(gradient, "_fields") else [gradient]
    return spread


def _refuse_tangents(name: str, *args: Any) -> None:
    for tensor in pytree.tree_leaves(args):
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"torch.ops.{NAMESPACE}.{name}: only the public functions support forward-mode AD, "
                f"got a tensor with a tangent"
            )


def implement(name: str, kernel: Callable[..., Any], key: str, *, instead: bool = False) -> None:
    """Register a Python kernel of an operator, or of an overload, for one device type.

    Args:
        name: Name of the operator or overload: ``"merge"``, ``"merge.triton"``.
        kernel: Takes the dispatch key set, then the operator's arguments.
        key: ``"CPU"`` or ``"CUDA"``.
        instead: Whether it replaces another kernel.
    """
    options = {"allow_override": True} if instead else {}  # unknown to older versions of PyTorch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # the override
        _library.impl(name, kernel, key, with_keyset=True, **options)


def dense(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its outputs are contiguous, as the fakes promise.

    It runs without recording for autograd, because the operator has a registered backward.
    """

    def kernel(*args: Any) -> Any:
        if not torch.is_grad_enabled():  # entering no_grad takes microseconds
            return _contiguous(function(*args))
        with torch.no_grad():
            return _contiguous(function(*args))

    return kernel


def _contiguous(result: Any) -> Any:
    """Make a tensor, or each tensor of a list or tuple, contiguous."""
    if isinstance(result, Tensor):
        return result.contiguous()
    dense = [t.contiguous() for t in result]
    return dense if isinstance(result, list) else tuple(dense)


def _warn_of_missing_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that serves because there is no kernel: the first call warns."""

    def kernel(first: Any, *rest: Any) -> Any:
        _missing.warn(device_of(first, *rest).type)
        return function(first, *rest)

    return kernel


def device_of(first: Any, *rest: Any) -> torch.device:
    """Return the device of an operator's arguments; a list as the first argument may be empty."""
    tensor = rest[0] if isinstance(first, list) else first
    device: torch.device = tensor.device
    return device


def shared_arguments(name: str) -> frozenset[str]:
    """Return the arguments of an operator that may be 1-D and then apply to every image."""
    return defined[name].shared


def _pairs(argument: Any, dim: Any) -> Iterable[tuple[Any, Any]]:
    """Return the argument and its mapped dimension, or these of each tensor in a list."""
    return zip(argument, dim, strict=True) if isinstance(argument, list) else [(argument, dim)]


def _batch_rule(operator: Any, shared: frozenset[str]) -> Callable[..., Any]:
    """Make the vmap rule: fold the mapped dimension into the batch, as images are independent."""
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
