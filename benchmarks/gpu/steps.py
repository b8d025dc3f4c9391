# SPDX-License-Identifier: Apache-2.0
"""What ``benchmarks.gpu_check`` runs, by knowledge gained per second.

Everything once, right or wrong, in many processes side by side; the tests, those of the compiled
kernels entirely and of Triton's a share, whose kernels must be compiled first; times, each alone on
the device; memory and races; rivals that take long to compile. On the CPU the same steps run at
sizes that take no time, and those that only a GPU can do say so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from .runner import Step

#: Public operators, those first whose kernels take long to compile.
OPERATORS = (
    "attention_scores", "policy_attention", "match", "merge", "merge_wavg", "nearest", "unmerge",
)  # fmt: skip
MERGING = ("merge", "merge_wavg", "unmerge")
DTYPES = ("float32", "float16", "bfloat16")
#: Cases with rivals that torch.compile makes: one of each operator, for compiling is slow.
COMPILED = ("vit-b-256", "vit-b-256-class")

NO_GPU = "it needs a GPU"


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        folder: Folder for results.
        cache: Archive of compiled Triton kernels, if there is one.
        share: Triton's tests that run, for example ``"1/6"``.
        patience: Factor for all limits of time.
    """

    device: str
    folder: Path
    cache: Path | None = None
    share: str = "1/6"
    patience: float = 1.0

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device == "cuda"

    def step(self, name: str, seconds: float, *arguments: str, **options: object) -> Step:
        """A step that runs a module of the benchmarks."""
        command = [sys.executable, "-m", *arguments]
        return Step(name, command, seconds * self.patience, **options)  # type: ignore[arg-type]


def phases(plan: Plan) -> list[list[Step]]:
    """What to run, one phase after the other; the steps of a phase run side by side."""
    return [
        _preparations(plan),
        _smoke(plan),
        _tests(plan),
        [plan.step("compiled-here", 5, "benchmarks.gpu_cache", "--count")],
        *([step] for step in _times(plan)),
        _sanitizers(plan),
        [_compiled(plan)],
    ]


def _preparations(plan: Plan) -> list[Step]:
    device = ("--device", plan.device)
    cache = "no archive was named" if plan.cache is None else ""
    unpack = ("benchmarks.gpu_cache", "--unpack", str(plan.cache))
    return [
        plan.step("machine", 30, "benchmarks.gpu.describe"),
        plan.step("library", 80, "benchmarks.gpu.library", *device),
        plan.step("cache", 40, *unpack, left_out=cache),
    ]


def _smoke(plan: Plan) -> list[Step]:
    if not plan.on_gpu:  # one process for all
        smoke = _smoke_step(plan, "smoke-float32", 70, "--dtype", "float32")
        return [plan.step("info", 30, "tokenops.info"), smoke]
    return [
        plan.step("info", 30, "tokenops.info"),
        *(
            _smoke_step(plan, f"smoke-{check}-{dtype}", 70, "--only", check, "--dtype", dtype)
            for check in OPERATORS
            for dtype in DTYPES
        ),
    ]


def _smoke_step(plan: Plan, name: str, seconds: float, *arguments: str, left_out: str = "") -> Step:
    record = ("--record", str(plan.folder / f"{name}.csv"))
    command = ("benchmarks.smoke", "--device", plan.device, *arguments, *record)
    return plan.step(name, seconds, *command, left_out=left_out, goes_on=True)


def _tests(plan: Plan) -> list[Step]:
    number, of = map(int, plan.share.split("/"))
    triton = (_part((number - 1) * 9 + part, of * 9) for part in range(1, 10))
    everywhere = "tests/ops" if plan.on_gpu else "tests/ops/test_token_map.py"
    steps = [_test(plan, "tests-default", "default", "1/1", everywhere, "tests/test_cuda.py")]
    if plan.on_gpu:
        steps += [_test(plan, f"tests-native-{i}", "native", _part(i, 4)) for i in range(1, 5)]
        steps += [
            _test(plan, f"tests-triton-{i}", "triton", share)
            for i, share in enumerate(triton, start=1)
        ]
    else:
        few = "tests/ops/test_token_map.py"
        steps.append(_test(plan, "tests-native", "native", _part(1, 8), few))
        steps.append(_test(plan, "tests-reference", "reference", _part(1, 8), few))
    # Where the compiled library serves these, Triton's kernels are tried besides.
    left_out = "" if plan.on_gpu else NO_GPU
    for name, only in (("match", ("match",)), ("merging", MERGING)):
        arguments = ("--backend", "triton", "--only", *only)
        name = f"smoke-triton-{name}"
        steps.append(_smoke_step(plan, name, 90, *arguments, left_out=left_out))
    return steps


def _part(number: int, of: int) -> str:
    return f"{number}/{of}"


def _test(plan: Plan, name: str, backend: str, share: str, *paths: str) -> Step:
    return plan.step(
        name,
        90,
        "benchmarks.gpu.suite",
        *("--device", plan.device, "--backend", backend, "--share", share),
        *("--record", str(plan.folder / f"{name}.csv")),
        *(paths or ("tests/ops",)),
        goes_on=True,
    )


def _times(plan: Plan) -> list[Step]:
    device, left_out = ("--device", plan.device), "" if plan.on_gpu else NO_GPU
    small = () if plan.on_gpu else ("--seconds", "0.01")

    def out(name: str) -> tuple[str, str]:
        return "--out", str(plan.folder / name)

    vit = ("benchmarks.vit", *device, *out("vit.json"))
    vit += ("--seconds", "4") if plan.on_gpu else (*small, "--layers", "2", "--tokens", "20")
    ceilings = ("benchmarks.gpu.ceilings", *device, *out("ceilings.json"), *small)
    launches = ("benchmarks.host", "--count", *out("launches.json"))
    return [
        plan.step("ceilings", 20, *ceilings),
        plan.step("vit", 25, *vit),
        plan.step("launches", 20, *launches, left_out=left_out),
        _bench(plan, "graph-matching", 30, "matching", "eager", "triton", graph=True),
        _bench(plan, "graph-merging", 30, "merging", "eager", "index", "triton", graph=True),
        _bench(plan, "events-merging", 30, "merging", "eager", "index"),
        _bench(plan, "events-attention", 40, "attention", "eager", "sdpa+bias"),
        _bench(plan, "graph-attention", 25, "attention", "eager", graph=True),
    ]


def _bench(
    plan: Plan, name: str, seconds: float, operators: str, *rivals: str, graph: bool = False
) -> Step:
    """Times of all cases of some operators, to a CSV file that grows case by case."""
    return plan.step(
        name,
        seconds,
        *("benchmarks.run", "--device", plan.device, "--no-memory", "--dtype", "bfloat16"),
        *(("--samples", "20", "--budget", "0.5") if plan.on_gpu else ("--rehearse",)),
        *(() if plan.on_gpu else ("--threads", "1")),
        *(("--cuda-graph",) if graph else ()),
        *("--op", operators, "--rivals", *rivals, "--resume"),
        *("--out", str(plan.folder / f"{name}.csv")),
        goes_on=True,
    )


def _sanitizers(plan: Plan) -> list[Step]:
    """Small shapes under compute-sanitizer: compiled kernels, then Triton's."""
    fresh = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor a block that has bounds
    left_out = "" if plan.on_gpu else NO_GPU
    steps = []
    for tool in ("memcheck", "racecheck", "initcheck"):
        # PyTorch's own kernels leave padding unwritten; what counts are reads by ours.
        exclude = ["--kernel-name-exclude", "kernel_substring=2at6native"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += exclude if tool == "initcheck" else []
        command += [sys.executable, "-m", "benchmarks.smoke", "--device", "cuda"]
        command += ["--dtype", "float16", "--only"]
        for name, only in (
            (tool, ["match", *MERGING]),
            (f"{tool}-triton", ["nearest", "attention_scores", "policy_attention"]),
        ):
            seconds = 110 * plan.patience
            steps.append(Step(name, [*command, *only], seconds, fresh, left_out))
    return steps


def _compiled(plan: Plan) -> Step:
    step = _bench(plan, "compiled", 60, "attention", "compile", "flex")
    cases = COMPILED if plan.on_gpu else COMPILED[1:]
    return Step(step.name, [*step.command, "--case", *cases], step.seconds, goes_on=True)
