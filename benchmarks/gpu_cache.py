# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels for ``benchmarks.gpu_check``, without a GPU: ``python -m benchmarks.gpu_cache``.

A GPU that is there for a quarter of an hour should not wait for compilers. This makes the calls
that the check makes, with a stand-in for the driver, and packs Triton's cache into one archive,
which the check unpacks. The cache stores absolute paths, so that it lies at one fixed place, here
and there. It holds for an H100 and an H200, for the Triton version that fills it, and for these
sources: fill it again after a change of a kernel. Needs a C compiler, for the stand-in.
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
from pathlib import Path

from .gpu.runner import new_archive

ROOT = Path(__file__).resolve().parent.parent

#: Where the cache lies, on every machine.
FOLDER = Path("/tmp/tokenops-triton-cache")
#: The archive, by default.
ARCHIVE = ROOT / "build" / "triton-cache.tar.xz"

#: Written when an archive is unpacked: what is newer was compiled afterwards.
STAMP = "unpacked"
VERSIONS = "versions"


def versions() -> str:
    """What a cache depends on besides the sources."""
    return f"Python {platform.python_version()}, Triton {importlib.metadata.version('triton')}"


def build_stand_in(folder: Path, *more: Path) -> Path:
    """Compile the stand-in for libcuda, with more sources.

    Raises:
        SystemExit: If there is no C compiler.
    """
    library = folder / "libcuda.so.1"
    source = Path(__file__).parent / "gpu" / "libcuda.c"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    command += [*map(str, (source, *more)), "-o", str(library)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"benchmarks.gpu_cache: the stand-in for libcuda: {error}") from None
    return library


def fill(folder: Path, jobs: int, only: list[str]) -> int:
    """Compile into a folder, in so many processes; the result counts those that went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        library = build_stand_in(Path(temporary))
        variables = {
            **os.environ,
            "TRITON_CACHE_DIR": str(folder),
            "TRITON_LIBCUDA_PATH": temporary,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "benchmarks.gpu.prefill", "--library", str(library)]
        command += ["--only", *only] if only else []
        running = [
            subprocess.Popen([*command, "--part", f"{job}/{jobs}"], cwd=ROOT, env=variables)
            for job in range(1, jobs + 1)
        ]
        bad = sum(process.wait() != 0 for process in running)
    (folder / VERSIONS).write_text(versions(), encoding="utf-8")
    return bad


def pack(folder: Path, archive: Path) -> None:
    """Put the cache into an archive."""
    with new_archive(archive, "w:xz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != STAMP:
                tar.add(path, str(path.relative_to(folder)))


def unpack(archive: Path, folder: Path) -> str:
    """Put an archive's files where Triton will look for them, and tell what they are."""
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
    """Compiled kernels of a cache."""
    return list(folder.glob("*/*.cubin"))


def count(folder: Path) -> str:
    """How many kernels of the cache were compiled on this machine."""
    stamp = folder / STAMP
    since = stamp.stat().st_mtime if stamp.is_file() else 0.0
    found = kernels(folder)
    new = sum(path.stat().st_mtime > since for path in found)
    return f"{new} of {len(found)} kernels were compiled here"


def main(arguments: list[str] | None = None) -> int:
    """Fill the cache and pack it, or unpack it; the result says whether all went well."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, default=ARCHIVE, help="the archive")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the cache, to try things out")
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of names of calls")
    parser.add_argument("--unpack", type=Path, metavar="ARCHIVE", help="do no more than that")
    parser.add_argument("--count", action="store_true", help="kernels that were compiled here")
    options = parser.parse_args(arguments)
    if options.unpack:
        print(unpack(options.unpack, options.folder))
        return 0
    if options.count:
        print(count(options.folder))
        return 0
    bad = fill(options.folder, options.jobs, options.only)
    pack(options.folder, options.out)
    size = options.out.stat().st_size / 2**20
    print(f"{len(kernels(options.folder))} kernels in {options.out}, {size:.1f} MiB")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
