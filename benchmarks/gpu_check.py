# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one run of eight minutes: ``python -m benchmarks.gpu_check``.

Small shapes of every operator, the tests of CUDA tensors, times against bars, and
compute-sanitizer, until a deadline. Nothing is downloaded or installed. A compiled library in the
package, and an archive of compiled Triton kernels (``benchmarks.gpu_cache``), save most of the
time; without them the run compiles as much as it can. After a failure it goes on.

All logs, results and the summary are in the folder that ``--out`` names and, at any moment, in an
archive beside it. ``--device cpu`` rehearses the run without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from . import store
from .gpu import bars, record
from .gpu.runner import Outcome, Run
from .gpu.steps import Plan, phases
from .gpu_cache import ARCHIVE, FOLDER

ROOT = Path(__file__).resolve().parent.parent

#: Number of failures of a step that the summary shows.
SHOWN = 8


def environment(device: str) -> dict[str, str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = f"{os.environ.get('PATH', os.defpath)}:{home}/bin"
    return {
        **os.environ,
        **({"CUDA_HOME": home, "PATH": path} if os.path.isdir(home) else {}),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",  # a crash writes a traceback
        "TRITON_CACHE_DIR": str(FOLDER),
        "OMP_NUM_THREADS": "2" if device == "cuda" else "1",  # many processes run side by side
    }


def failures(folder: Path) -> dict[str, list[str]]:
    """By step, a line for each case that failed, or that a killed process did not end."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in record.read(path).values():
            if row.result not in record.GOOD:
                last = (row.message.strip().splitlines() or ["it did not end"])[-1]
                found.setdefault(path.stem, []).append(f"{row.case}: {last}")
    for path in sorted(folder.glob("*.csv")):
        for time in store.read(path):
            if time["status"] in ("failed", "differs"):
                case = " ".join(time[key] for key in ("operator", "case", "rival", "status"))
                found.setdefault(path.stem, []).append(f"{case}: {time['note']}")
    return found


def summary(outcomes: dict[str, Outcome], folder: Path, device: str) -> str:
    """Outcomes of the steps, failed cases, and bars, in Markdown."""
    lines = [] if device == "cuda" else ["A rehearsal on the CPU: its figures mean nothing.", ""]
    lines += ["| step | result | s | last line |", "| --- | --- | --- | --- |"]
    for name, o in outcomes.items():
        last = o.last[:110].replace("|", "/")
        lines.append(f"| {name} | {o.result[:150]} | {o.seconds:.0f} | {last} |")
    failed = failures(folder)
    number = sum(map(len, failed.values()))
    lines += ["", f"{number} cases failed." if number else "No case failed so far."]
    for name, cases in failed.items():
        lines += [f"- {name}: {case[:220]}" for case in cases[:SHOWN]]
        if len(cases) > SHOWN:
            lines.append(f"- {name}: and {len(cases) - SHOWN} more")
    return "\n".join([*lines, "", bars.table(folder)])


def main(arguments: list[str] | None = None) -> int:
    """Run all phases; returns the number of steps that failed or did not end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, default=480, help="seconds for all (480)")
    parser.add_argument("--resume", action="store_true", help="skip what an earlier run did")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--archive", type=Path, help="OUT.tar.gz by default")
    parser.add_argument("--share", default="1/6", help="share of the tests of Triton's kernels")
    parser.add_argument("--patience", type=float, default=1.0, help="factor for limits of steps")
    options = parser.parse_args(arguments)
    driver = shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()
    if options.device == "cuda" and not driver:
        parser.error("there is no GPU; --device cpu rehearses the run without one")
    out = options.out.resolve()
    archive = (options.archive or out.with_name(out.name + ".tar.gz")).resolve()
    if out in archive.parents:
        parser.error(f"--archive must be outside of {out}")
    cache = ARCHIVE if ARCHIVE.is_file() else None
    plan = Plan(options.device, out, cache, options.share, options.patience)
    run = Run(
        phases(plan),
        out,
        archive,
        deadline=options.deadline,
        environment=environment(options.device),
        cwd=ROOT,
        summarise=lambda outcomes: summary(outcomes, out, options.device),
        label=options.device,
        resume=options.resume,
    )
    outcomes = run.go()
    print((out / "summary.md").read_text(encoding="utf-8"))
    print(f"Everything is in {archive}")
    return sum(not o.result.startswith(("ok", "left out")) for o in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
