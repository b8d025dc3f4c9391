# SPDX-License-Identifier: Apache-2.0
"""Compiles the native library if possible; the rest of the package is plain Python.

Environment variables (CONTRIBUTING.md has more on them):
    TOKENOPS_BUILD     auto (default): compile if torch and a compiler are there, else make a
                       pure-Python package; none: pure; cpu, cuda: compile or fail; emulate: the
                       CUDA kernels as C++ for the CPU, to test them.
    TOKENOPS_CUDA_ARCHS  compute capabilities to compile for, "8.0 9.0a 10.0 12.0" by default.
    TOKENOPS_INSPECT   1: always build the pybind11 module, 0: never; by default in place only.
    TOKENOPS_SANITIZE  sanitizers to compile with, for example "address,undefined".
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext as plain_build_ext

MODE = os.environ.get("TOKENOPS_BUILD") or "auto"
INSPECT = os.environ.get("TOKENOPS_INSPECT") or "in-place"
SANITIZE = os.environ.get("TOKENOPS_SANITIZE") or ""
CUDA_ARCHS = (os.environ.get("TOKENOPS_CUDA_ARCHS") or "8.0 9.0a 10.0 12.0").split()
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install"} & set(sys.argv)
# torch 2.10, the oldest version that the library supports
TARGET = ("TORCH_TARGET_VERSION", "0x020a000000000000")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
LINK_FLAGS = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
if SANITIZE:
    FLAGS += [*LINK_FLAGS, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    FLAGS += ["-fno-wrapv"]  # Python's own -fwrapv would hide signed overflow


class CannotCompileError(Exception):
    """The library cannot be compiled, for the reason in the message."""


def native() -> tuple[list[Extension], dict[str, Any], type]:
    """Return the extensions, the record of the build and the command that compiles them."""
    if MODE == "none":
        raise CannotCompileError("TOKENOPS_BUILD=none at build time")
    try:
        import torch
        from torch.utils import cpp_extension as torch_build
    except Exception as error:
        hint = "pip install --no-build-isolation compiles against the installed one"
        raise CannotCompileError(f"no torch at build time ({error}); {hint}") from error
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        raise CannotCompileError(f"torch {torch.__version__} at build time, 2.10 needed")
    compiler = shlex.split(torch_build.get_cxx_compiler())
    if not shutil.which(compiler[0]):
        raise CannotCompileError(f"no C++ compiler at build time ({compiler[0]} not found)")

    nvcc, no_cuda = None, None
    if MODE in ("cpu", "emulate"):
        no_cuda = f"TOKENOPS_BUILD={MODE} at build time"
    elif MODE == "auto" and torch.version.cuda is None:
        no_cuda = f"torch {torch.__version__} at build time, which has no CUDA"
    else:
        nvcc = find_nvcc()
        no_cuda = nvcc_obstacle(nvcc, torch.version.cuda)
    if MODE == "cuda" and no_cuda:
        raise CannotCompileError(no_cuda)

    sources = ["csrc/isa.cpp", *sorted(map(str, Path("csrc").glob("*/*.cpp")))]
    if MODE == "emulate":
        sources = ["csrc/emulated.cpp"]
    library = torch_build.CppExtension(
        "tokenops._C",
        sources,
        depends=sorted(map(str, [*Path("csrc").glob("**/*.*h"), *Path("csrc").glob("**/*.cu")])),
        define_macros=[TARGET],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS + ([] if no_cuda else cuda_link_flags(nvcc)),
        py_limited_api=True,
    )
    library.nvcc = nvcc
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    record = {
        "built": "emulated" if MODE == "emulate" else "cpu" if no_cuda else "cuda",
        "compiler": version.partition("\n")[0],
        "flags": " ".join(FLAGS),
        "torch": torch.__version__,
        "torch_target": TARGET[1],
        "no_cuda": no_cuda,
        "cuda_archs": [] if no_cuda else CUDA_ARCHS,
    }
    return [library, *inspect_module(torch_build)], record, torch_build.BuildExtension


def find_nvcc() -> str | None:
    """Path of nvcc: in CUDA_HOME, else the first one in PATH, else in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_obstacle(nvcc: str | None, torch_cuda: str | None) -> str | None:
    """Why nvcc is not used, or None. ``auto`` needs the major version of CUDA that torch has."""
    if not nvcc:
        return "no nvcc at build time (CUDA_HOME names its toolkit)"
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    name = ".".join(map(str, version))
    if version < (12, 8):
        return f"nvcc {name} at build time, 12.8 needed"
    if MODE == "auto" and torch_cuda and torch_cuda.partition(".")[0] != str(version[0]):
        return (
            f"nvcc {name} at build time, but torch is for CUDA {torch_cuda} (TOKENOPS_BUILD=cuda)"
        )
    return None


def cuda_link_flags(nvcc: str) -> list[str]:
    """Flags that link the CUDA runtime statically, so that no certain version must be installed."""
    listing = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    lines = [text for text in listing.stderr.splitlines() if "LIBRARIES=" in text]
    if not lines:
        raise CannotCompileError(f"{nvcc} --dryrun does not print LIBRARIES=")
    folders = shlex.split(lines[0].partition("LIBRARIES=")[2])
    return [*folders, "-lcudart_static", "-ldl", "-lpthread", "-lrt"]


def compile_cuda(nvcc: str, include_dirs: list[str], folder: str) -> list[str]:
    """Compile all CUDA sources; write the output of ptxas (registers, spills) to ptxas.log."""
    os.makedirs(folder, exist_ok=True)
    number = [arch.replace(".", "") for arch in CUDA_ARCHS]
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in number]
    # All other devices compile the PTX of the oldest architecture.
    codes.append(f"-gencode=arch=compute_{number[0]},code=compute_{number[0]}")
    flags = ["-std=c++17", "-O3", "-D" + "=".join(TARGET), "-Xptxas=-v", "-Xcompiler=-fPIC"]
    flags += ["-Xcompiler=-fvisibility=hidden", "--compress-mode=size", "-lineinfo"]
    sources = sorted(Path("csrc").glob("**/*.cu"))
    workers = os.cpu_count() or 1
    flags.append(f"--threads={max(1, workers // len(sources))}")  # architectures in parallel
    includes = [f"-isystem={path}" for path in include_dirs]

    def compile_one(source: Path) -> tuple[str, str]:
        target = os.path.join(folder, "-".join(source.with_suffix(".o").parts))
        command = [nvcc, *flags, *codes, *includes, "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.stderr.write(done.stderr)
            raise RuntimeError(f"nvcc could not compile {source}")
        return target, done.stderr

    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(compile_one, sources))
    Path(folder, "ptxas.log").write_text("".join(log for _, log in done), encoding="utf-8")
    return [target for target, _ in done]


def inspect_module(torch_build: Any) -> list[Extension]:
    """The pybind11 module, which is optional unless TOKENOPS_INSPECT=1."""
    if INSPECT == "0" or SANITIZE:
        return []
    try:
        import pybind11
    except ImportError:
        return [] if INSPECT != "1" else sys.exit("setup.py: TOKENOPS_INSPECT=1 needs pybind11")
    return [
        Extension(
            "tokenops._inspect",
            ["csrc/inspect.cpp"],
            include_dirs=[pybind11.get_include(), *torch_build.include_paths()],
            define_macros=[TARGET, ("TOKENOPS_FLAGS", json.dumps(" ".join(FLAGS)))],
            extra_compile_args=FLAGS,
            language="c++",
            optional=INSPECT != "1",
        )
    ]


def build_ext_command(base: type, record: dict[str, Any]) -> type:
    """Make a ``build_ext`` that falls back to a pure-Python package if it cannot compile."""

    class build_ext(base):  # type: ignore[misc] # noqa: N801 - the name setuptools looks for
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # else objects go to a temporary folder, which is deleted
                name = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
                self.build_temp = os.path.join("build", name)

        def build_extension(self, extension: Extension) -> None:
            if getattr(extension, "nvcc", None):
                folder = os.path.join(self.build_temp, "cuda")
                try:
                    extension.extra_objects = compile_cuda(
                        extension.nvcc, extension.include_dirs, folder
                    )
                except RuntimeError as error:
                    if MODE == "cuda":
                        raise
                    self.warn(f"CUDA kernels are left out: {error}")
                    record.update(built="cpu", no_cuda=str(error), cuda_archs=[])
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                self.warn(f"{extension.name} is left out: {error}")

        def run(self) -> None:
            inplace, result = self.inplace, record
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel and not inplace and INSPECT != "1":  # _inspect is for one version of Python
                self.extensions = [e for e in self.extensions if e.py_limited_api]
            try:
                if self.extensions:
                    super().run()
            except Exception as error:
                if MODE != "auto" or "build_ext" in self.distribution.commands:
                    raise
                why = f"compiling it failed ({error}); TOKENOPS_BUILD=cpu shows the messages"
                result = {"built": None, "reason": why}
                self.extensions = self.distribution.ext_modules = []
                if wheel:
                    wheel.root_is_pure = True
            package = Path("tokenops" if inplace else f"{self.build_lib}/tokenops")
            package.mkdir(parents=True, exist_ok=True)
            if not self.extensions:
                print(f"tokenops: pure Python, no compiled library: {result['reason']}")
                for stale in (*package.glob("_C.*"), *package.glob("_inspect.*")):
                    stale.unlink()
            result = {"mode": MODE, "sanitizers": SANITIZE, **result}
            text = json.dumps(result, indent=2) + "\n"
            (package / "_build_info.json").write_text(text, encoding="utf-8")

    return build_ext


class clean_build(build):  # noqa: N801 - as above
    """``build`` that removes the files of an earlier build and always runs ``build_ext``."""

    def get_sub_commands(self) -> list[str]:
        names = super().get_sub_commands()
        return names if "build_ext" in names else [*names, "build_ext"]

    def run(self) -> None:
        shutil.rmtree(os.path.join(self.build_lib, "tokenops"), ignore_errors=True)
        super().run()


MODES = ("auto", "none", "cpu", "cuda", "emulate")
if MODE not in MODES:
    sys.exit(f"setup.py: TOKENOPS_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
extensions: list[Extension] = []
record: dict[str, Any] = {}
base: type = plain_build_ext
try:
    if COMPILING:
        extensions, record, base = native()
except CannotCompileError as error:
    if MODE in ("cpu", "cuda", "emulate"):
        sys.exit(f"setup.py: TOKENOPS_BUILD={MODE} is not possible: {error}")
    record = {"built": None, "reason": str(error)}
abi3 = extensions and INSPECT != "1" and not sysconfig.get_config_var("Py_GIL_DISABLED")
setup(
    ext_modules=extensions,
    cmdclass={"build": clean_build, "build_ext": build_ext_command(base, record)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {},
)
