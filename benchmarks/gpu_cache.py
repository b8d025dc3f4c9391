# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for ``benchmarks.gpu_check`` without a GPU.

``python -m benchmarks.gpu_cache`` makes the calls that the check makes, with a stand-in for the
driver, and packs Triton's cache into an archive, which the check unpacks. The cache stores absolute
paths, so that it is in the same folder on every machine. It serves an H100 or H200, the Triton
version that fills it, and these sources: fill it again after a change of a kernel. Needs a C
compiler, for the stand-in.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .gpu.runner import replacing

ROOT = Path(__file__).resolve().parent.parent

#: Folder of the cache, on every machine.
FOLDER = Path("/tmp/tokenops-triton-cache")
#: The archive, by default.
ARCHIVE = ROOT / "build" / "triton-cache.tar.xz"

#: Written when an archive is unpacked: newer kernels were compiled afterwards.
STAMP = "unpacked"
VERSIONS = "versions"


def versions() -> str:
    return f"Python {platform.python_version()}, Triton {importlib.metadata.version('triton')}"


def build_stand_in(folder: Path, *more: Path) -> Path:
    """Compile the stand-in for libcuda, with more sources."""
    library = folder / "libcuda.so.1"
    source = Path(__file__).parent / "gpu" / "libcuda.c"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += [*map(str, (source, *more)), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def fill(folder: Path, jobs: int, only: tuple[str, ...]) -> int:
    """Compile into a folder, in several processes; returns the number of calls that raised."""
    from .gpu import prefill

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        library = build_stand_in(Path(temporary))
        # Read by Triton and OpenMP when a process starts.
        os.environ.update(TRITON_CACHE_DIR=str(folder), TRITON_LIBCUDA_PATH=temporary)
        os.environ["OMP_NUM_THREADS"] = "1"
        names = [name for name in prefill.calls() if name.startswith(only)]
        with ProcessPoolExecutor(
            jobs, get_context("spawn"), initializer=prefill.start, initargs=(library,)
        ) as pool:
            compiled, found, stopped = map(sum, zip(*pool.map(prefill.make, names), strict=True))
    (folder / VERSIONS).write_text(versions(), encoding="utf-8")
    print(f"compiled {compiled}, found {found}, {stopped} calls stopped")
    return stopped


def pack(folder: Path, archive: Path) -> None:
    with replacing(archive) as temporary, tarfile.open(temporary, "w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != STAMP:
                tar.add(path, str(path.relative_to(folder)))


def unpack(archive: Path, folder: Path) -> str:
    """Unpack an archive into a folder; returns what it contains."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(folder, filter="data")
    made_with = (folder / VERSIONS).read_text(encoding="utf-8")
    (folder / STAMP).touch()
    text = f"{len(kernels(folder))} kernels, made with {made_with}"
    if made_with != versions():
        text += f"; of no use here: this is {versions()}"
    return text


def kernels(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.cubin"))


def count(folder: Path) -> str:
    """Number of kernels in the cache that were compiled on this machine."""
    stamp = folder / STAMP
    since = stamp.stat().st_mtime if stamp.is_file() else 0.0
    found = kernels(folder)
    new = sum(path.stat().st_mtime > since for path in found)
    return f"{new} of {len(found)} kernels were compiled here"


def main(arguments: list[str] | None = None) -> int:
    """Fill the cache and pack it, or unpack it; returns 1 if a call raised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_cache", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="the archive")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the cache")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names of calls")
    parser.add_argument("--unpack", type=Path, metavar="ARCHIVE", help="only unpack this archive")
    text = "only count kernels that were compiled here"
    parser.add_argument("--count", action="store_true", help=text)
    options = parser.parse_args(arguments)
    if options.unpack:
        print(unpack(options.unpack, options.folder))
        return 0
    if options.count:
        print(count(options.folder))
        return 0
    stopped = fill(options.folder, options.jobs, tuple(options.only))
    pack(options.folder, options.out)
    size = options.out.stat().st_size / 2**20
    print(f"{len(kernels(options.folder))} kernels in {options.out}, {size:.1f} MiB")
    return int(stopped > 0)


if __name__ == "__main__":
    sys.exit(main())
