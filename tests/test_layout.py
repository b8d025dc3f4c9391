# SPDX-License-Identifier: Apache-2.0
"""Rules for source files: the files of an operator family, and the imports that are allowed.

A new family is a folder in ``tokenops/ops``; these tests report the files that it lacks.
"""

import ast
import importlib
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import tokenops
from tokenops import _library

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tokenops"
OPERATORS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").is_file())

#: The modules that compute; ``api`` and ``schema`` only call them.
IMPLEMENTATIONS = ("reference", "composed", "triton")

SOURCES = sorted(
    path
    for folder in ("tokenops", "csrc", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)


def imports(path):
    """Absolute names that a module of the package imports, also within functions."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # In "from . import x", x may be a module or a name in a module.
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def modules(*patterns):
    return sorted(path for pattern in patterns for path in PACKAGE.glob(pattern))


def test_there_are_operators():
    assert {"attention", "matching", "merging"} <= set(OPERATORS)


@pytest.mark.parametrize("word", OPERATORS)
def test_an_operator_is_complete(word):
    required = {
        f"tokenops/ops/{word}/api.py": "the public function: docstring, checks, choice of backend",
        f"tokenops/ops/{word}/schema.py": "schema, fake and backward of the registered operators",
        f"tokenops/ops/{word}/reference.py": "plain PyTorch, the oracle",
        f"tokenops/ops/{word}/composed.py": "fast plain PyTorch, which serves where no kernel does",
        f"tokenops/ops/{word}/samples.py": "samples and calls, for the tests of all operators",
        f"tokenops/ops/{word}/triton/__init__.py": "Triton kernels",
        f"csrc/{word}": "compiled kernels",
        f"csrc/{word}/{word}_cpu.cpp": "kernels for the CPU, with their registration",
        f"tests/ops/test_{word}.py": "forward and gradients on each backend, dtype and layout",
        f"benchmarks/{word}.py": "cases of the benchmarks",
    }
    missing = [f"{path} ({what})" for path, what in required.items() if not (ROOT / path).exists()]
    assert not missing, f"family {word!r} lacks: " + "; ".join(missing)


def test_no_orphans():
    """Each folder of kernels belongs to an operator family."""
    assert {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} <= set(OPERATORS)


@pytest.mark.parametrize("word", OPERATORS)
def test_every_public_operator_is_exported(word):
    api = importlib.import_module(f"tokenops.ops.{word}.api")
    public = [name for name in _library.operators if hasattr(api, name)]
    assert public, f"tokenops/ops/{word}/schema.py registers no public operator"
    for name in public:
        assert getattr(tokenops, name) is getattr(api, name)


# ---- imports: api -> schema -> implementations, and never back ----


def test_implementations_never_import_one_another_or_the_api():
    """Shared code is in common.py; imports of the same kind in another family are allowed."""
    wrong = []
    for path in modules("ops/*/*.py", "ops/*/triton/*.py"):
        kind = path.parent.name if path.parent.name == "triton" else path.stem
        if kind not in (*IMPLEMENTATIONS, "common"):
            continue
        for name, line in imports(path):
            parts = name.split(".")
            if parts[:2] != ["tokenops", "ops"]:
                continue
            others = {"api", "schema", *IMPLEMENTATIONS} - {kind}
            if others & set(parts[3:4]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_schemas_do_not_import_the_api():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("ops/*/schema.py")
        for name, line in imports(path)
        if name.startswith("tokenops.ops.") and "api" in name.split(".")
    ]
    assert not wrong, "\n".join(wrong)


def test_schemas_and_references_import_torch_alone():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("ops/*/schema.py", "ops/*/reference.py", "ops/*/composed.py")
        for name, line in imports(path)
        if name.split(".")[0] in ("numpy", "triton", "transformers", "timm", "diffusers")
    ]
    assert not wrong, "\n".join(wrong)


def test_plumbing_knows_no_operator():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("_*.py", "_*/*.py")
        if path.name != "__init__.py" or path.parent != PACKAGE
        for name, line in imports(path)
        if name.startswith("tokenops.ops")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circular_imports():
    """Imports within functions count, too."""
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in modules("**/*.py")}
    files = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {}
    for module, path in files.items():
        # "from module import x" imports module.x if that is a module, else module.
        found = {n if n in files else n.rpartition(".")[0] for n, _ in imports(path)}
        graph[module] = found & set(files)
    list(TopologicalSorter(graph).static_order())  # raises a CycleError that names the modules


def test_drop_ins_and_integrations_use_public_names():
    # They also use the argument checks. dtensor.py completes the registration of operators, in a
    # module of its own because of its slow imports.
    plumbing = {("dtensor.py", "_library")}
    wrong = []
    for path in modules("compat/*.py", "integrations/*.py"):
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] != "tokenops" or parts[1:2] in (["compat"], ["integrations"]):
                continue
            if parts[1:] == ["_checks"] or (path.name, parts[1]) in plumbing:
                continue
            if any(part.startswith("_") for part in parts) or parts[1:2] == ["ops"]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_package_are_relative():
    wrong = []
    for path in modules("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            else:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "tokenops" for name in names):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


# ---- files ----


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_file(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    mark = "#" if path.suffix == ".py" else "//"
    assert lines[0] == f"{mark} SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= 600, f"{len(lines)} lines; split it"


def test_the_walk_names_functions_that_exist():
    """Each line of the lists in CONTRIBUTING.md that follow a call."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ *((?:csrc|tokenops)/\S+): (\w+(?:, \w+)*)", text, re.MULTILINE)
    assert len(lines) > 30
    wrong = [
        f"{path}: {name}"
        for path, names in lines
        for name in names.split(", ")
        if not re.search(
            rf"(?:def|class) {name}\b" if path.endswith(".py") else rf"(?<!return)[\w>)] {name}\(",
            (ROOT / path).read_text(encoding="utf-8"),
        )
    ]
    assert not wrong, wrong
