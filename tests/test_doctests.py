# SPDX-License-Identifier: Apache-2.0
"""Docstrings: every public function has an example, and all examples run."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import tokenops
from tokenops import _library


def public_modules():
    """All modules of the package whose path has no underscore and that need no other library."""
    names = ["tokenops"]
    for module in pkgutil.walk_packages(tokenops.__path__, "tokenops."):
        parts = module.name.split(".")
        if not any(p.startswith("_") for p in parts) and "integrations" not in parts:
            names.append(module.name)
    return names


@pytest.mark.parametrize("name", public_modules())
def test_examples_run(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF)
    assert results.failed == 0


@pytest.mark.parametrize("name", sorted({*tokenops.__all__, "random"}))
def test_everything_public_is_documented(name):
    """A summary of one line; for callables also sections of arguments and an example."""
    thing = getattr(tokenops, name)
    text = inspect.getdoc(thing)
    summary, _, rest = text.partition("\n")
    assert summary.endswith("."), f"{name}: the first line must end with a period"
    assert not rest or rest.startswith("\n")
    examples = doctest.DocTestFinder(recurse=False).find(thing, name)
    assert any(e.examples for e in examples), f"{name} has no example"
    parameters = inspect.signature(thing).parameters
    for parameter in parameters:
        assert f"{parameter}:" in text, f"{name}: {parameter} is not described"


@pytest.mark.parametrize("name", _library.operators)
def test_operators_say_what_they_promise(name):
    text = inspect.getdoc(getattr(tokenops, name))
    for section in ("Args", "Shape", "Returns", "Raises", "Note", "Example", "References"):
        assert f"\n{section}:\n" in text, f"{name}: no section {section!r}"
    note = re.search(r"\nNote:\n((?:    .*\n|\n)+)", text)[1]
    assert re.search("etermini", note), f"{name}: the note does not say whether it is deterministic"
    assert re.search("ifferentia", note), f"{name}: the note does not mention gradients"
