# SPDX-License-Identifier: Apache-2.0
"""Compiles ``csrc/`` against the headers of PyTorch versions that are not installed.

    python tests/headers.py                  # every version of VERSIONS, and the newest release
    python tests/headers.py 2.10.0 2.11.0

The headers of the stable ABI are taken from the wheels for macOS, which are the smallest and have
the same headers as the wheels for Linux. They are kept in ``build/headers``: a second run neither
downloads them nor looks up the newest release. The compilers check everything, including templates,
and generate no code. CUDA sources are compiled if there is an nvcc.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "2.13.0", "newest")
ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "headers"
FOLDERS = ("headeronly", "csrc/stable", "csrc/inductor/aoti_torch")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # as setup.py has it


def headers(version: str, cache: Path = CACHE) -> Path:
    """The folder with the headers of a version, or of the ``"newest"`` one, downloaded once."""
    folder = cache / version
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        wheel = download(version, Path(scratch))
        unpacked = Path(scratch) / "headers"
        with zipfile.ZipFile(wheel) as archive:
            wanted = tuple(f"torch/include/torch/{name}/" for name in FOLDERS)
            archive.extractall(unpacked, [n for n in archive.namelist() if n.startswith(wanted)])
        (unpacked / "version").write_text(wheel.name.split("-")[1] + "\n")
        unpacked.rename(folder)
    return folder


def download(version: str, folder: Path) -> Path:
    """The wheel of a version for a system that is not this one."""
    name = "torch" if version == "newest" else f"torch=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    command += [str(folder), "--only-binary=:all:", "--python-version=3.12"]
    command += ["--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64", name]
    # pip's constraints for this environment must not limit the newest release.
    subprocess.run(command, check=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})
    return next(folder.glob("torch-*.whl"))


def commands(include: Path, scratch: Path) -> dict[str, list[str]]:
    """Compile command of each source by name; CUDA sources are also compiled as emulated C++."""
    import pybind11

    found = {}
    includes = [f"-isystem{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    for source in sorted(ROOT.glob("csrc/**/*.cpp")):
        flags = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", TARGET]
        flags += ['-DTOKENOPS_FLAGS=""', f"-isystem{include}", *includes]
        found[str(source.relative_to(ROOT))] = [*compiler, *flags, str(source)]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    for source in sorted(ROOT.glob("csrc/**/*.cu")) if nvcc else []:
        name = str(source.relative_to(ROOT))
        flags = ["-std=c++17", "--cuda", "-arch=compute_90a", "-code=compute_90a", "-Xcicc=-O0"]
        output = str(scratch / name.replace("/", "-"))
        found[name] = [str(nvcc), *flags, TARGET, f"-isystem={include}", str(source), "-o", output]
    return found


def compile_all(include: Path) -> dict[str, str]:
    """Error output of the compiler for each source that does not compile."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        todo = commands(include, Path(scratch))

        def compile_one(command: list[str]) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, capture_output=True, text=True)

        done = zip(todo, pool.map(compile_one, todo.values()), strict=True)
        return {name: run.stderr for name, run in done if run.returncode != 0}


def main(arguments: list[str] | None = None) -> int:
    """Compile against the given versions; return 1 if a source does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    status = 0
    for version in parser.parse_args(arguments).versions:
        folder = headers(version)
        number = (folder / "version").read_text().strip()
        wrong = compile_all(folder / "torch" / "include")
        name = number if version == number else f"{version} ({number})"
        result = "failed" if wrong else "all of csrc/ compiles"
        print(f"headers of torch {name}: {result}", flush=True)
        for source, text in wrong.items():
            print(f"{source}:\n{text}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
