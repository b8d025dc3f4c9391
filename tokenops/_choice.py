# SPDX-License-Identifier: Apache-2.0
"""The backend that the user chose: a context variable, and attributes that Dynamo can trace."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from . import _checks

#: Names of all backends, in the order of preference.
BACKENDS = ("native", "triton", "composed", "reference")


class _Choice(NamedTuple):
    owner: use_backend
    name: str | None
    entered: bool  # whether a with statement made the choice and will end it


_choices: ContextVar[tuple[_Choice, ...]] = ContextVar("tokenops_backend", default=())
_default = os.environ.get("TOKENOPS_BACKEND") or None  # default of the process

#: Choices made inside a function that torch.compile is tracing. Dynamo traces assignments to a
#: global variable, but not to a context variable. Outside tracing the tuple is empty, unless a
#: graph breaks inside a with statement: the choice then holds in all threads until that ends.
_traced: tuple[str | None, ...] = ()


class _State(ModuleType):
    """The current choice as an attribute of a module.

    Dynamo guards on attributes of modules, but not on context variables. A compiled function reads
    this attribute before each call, in the caller's context, and compiles again if it has changed.
    """

    @property
    def chosen(self) -> str | None:
        choices = _choices.get()
        return choices[-1].name if choices else _default


_state = _State("tokenops._choice._state")


def _check_name(where: str, name: object) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{where} must be a str or None, got {_checks.describe(name)}")
    if name is not None and name not in BACKENDS:
        choices = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"{where} must be one of {choices} or None, got {_checks.brief(name)}")


class use_backend:  # noqa: N801 - used like torch.set_grad_enabled
    """Choose the backend of all operators: as a function, a context manager or a decorator.

    An explicit choice never falls back silently: an operator that the backend cannot serve raises
    ``NotImplementedError`` with the reason. ``None`` lets tokenops take the fastest backend for the
    tensors' device. The environment variable ``TOKENOPS_BACKEND`` is the default.

    Args:
        name: ``"native"``: compiled kernels. ``"triton"``: Triton kernels. ``"composed"``: plain
            PyTorch optimized for speed, which serves where no kernel does. ``"reference"``: plain
            PyTorch that reads like the formula, the oracle of all tests. Or ``None``.

    Raises:
        TypeError: If ``name`` is not a str.
        ValueError: If no backend has this name.

    Note:
        The choice belongs to a thread and, within ``asyncio``, to a task; a task starts with the
        choice of the code that created it. Leaving a context ends only its own choice, even if
        contexts are left out of order. The function form chooses for the rest of the enclosing
        context. A decorated generator or coroutine makes the choice while its own code runs; a
        plain ``with`` in a generator also affects the code that iterates over it.

        A backward runs on the backend of its forward. A function compiled by ``torch.compile``
        compiles again when the choice changes; within it, choose by a ``with`` statement or a
        decorator. Activation checkpointing computes forwards again during the backward: choose
        within the checkpointed function.

    Example:
        >>> import torch, tokenops
        >>> with tokenops.use_backend("reference"):
        ...     token_map = tokenops.match(torch.randn(1, 8, 4), 2)
    """

    def __init__(self, name: str | None) -> None:
        _check_name("use_backend: name", name)
        self._name = name
        if torch.compiler.is_dynamo_compiling():
            return
        # A call of the function form replaces the previous one. A with statement also calls
        # __init__ first: the previous choice stays below, for when the with statement ends.
        choices = _choices.get()
        if len(choices) > 1 and not choices[-1].entered and not choices[-2].entered:
            choices = (*choices[:-2], choices[-1])
        _choices.set((*choices, _Choice(self, name, entered=False)))

    def __enter__(self) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = (*_traced, self._name)
            return
        choices = _choices.get()
        if choices and choices[-1].owner is self and not choices[-1].entered:
            choices = choices[:-1]
        _choices.set((*choices, _Choice(self, self._name, entered=True)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = _traced[:-1]
            return
        choices = _choices.get()
        mine = [i for i, c in enumerate(choices) if c.owner is self and c.entered]
        if mine:  # otherwise another thread or task entered it, whose context ends with it
            end = mine[-1] + 1
            while end < len(choices) and not choices[end].entered:
                end += 1  # calls of the function form end with their context
            _choices.set(choices[: mine[-1]] + choices[end:])

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        _choices.set(tuple(c for c in _choices.get() if c.owner is not self))  # of __init__
        return _choosing(function, self._name)


def _choosing(function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
    """Wrap a function, coroutine or generator of any kind so that it runs under a choice."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with use_backend(name):
            return function(*args, **kwargs)

    async def await_it(*args: Any, **kwargs: Any) -> Any:
        with use_backend(name):
            return await function(*args, **kwargs)

    def iterate(*args: Any, **kwargs: Any) -> Any:
        generator = function(*args, **kwargs)
        resume, argument = generator.send, None
        try:
            while True:
                with use_backend(name):
                    value = resume(argument)
                try:
                    resume, argument = generator.send, (yield value)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    resume, argument = generator.throw, error
        except StopIteration as stop:
            return stop.value
        finally:
            with use_backend(name):
                generator.close()

    async def iterate_async(*args: Any, **kwargs: Any) -> Any:
        generator = function(*args, **kwargs)
        resume, argument = generator.asend, None
        try:
            while True:
                with use_backend(name):
                    value = await resume(argument)
                try:
                    resume, argument = generator.asend, (yield value)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    resume, argument = generator.athrow, error
        except StopAsyncIteration:
            return
        finally:
            with use_backend(name):
                await generator.aclose()

    for is_kind, wrapper in (
        (inspect.iscoroutinefunction, await_it),
        (inspect.isgeneratorfunction, iterate),
        (inspect.isasyncgenfunction, iterate_async),
    ):
        if is_kind(function):
            return functools.wraps(function)(wrapper)
    return functools.wraps(function)(call)


def chosen() -> str | None:
    """Return the name of the explicitly chosen backend, if any."""
    return _traced[-1] if _traced else _state.chosen


_check_name("TOKENOPS_BACKEND", _default)
