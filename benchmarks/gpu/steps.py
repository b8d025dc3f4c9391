# SPDX-License-Identifier: Apache-2.0
"""The steps of ``benchmarks.gpu_check``, in the order of knowledge per second.

Every operator once, in many processes side by side; tests, all of the compiled kernels and a share
of Triton's, which have to be compiled first; times, each alone on the device; memory and races;
rivals that take long to compile. On the CPU the same steps run at tiny sizes, without those that
need a GPU.
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
TRITON = ("nearest", "attention_scores", "policy_attention")  # have no compiled CUDA kernel
DTYPES = ("float32", "float16", "bfloat16")
#: Cases for rivals by torch.compile: one of each operator, for compiling is slow.
COMPILED = ("vit-b-256", "vit-b-256-class")

NO_GPU = "it needs a GPU"

VARIABLES = "CUDA|NVIDIA|OMP_|PYTORCH|TOKENOPS|TORCH|TRITON"


@dataclass(frozen=True)
class Plan:
    """How to run."""

    device: str  # "cuda", or "cpu" for a rehearsal
    folder: Path  # for results
    cache: Path | None = None  # archive of compiled Triton kernels
    share: str = "1/6"  # of Triton's tests
    patience: float = 1.0  # factor for all time limits

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def step(self, name: str, seconds: float, module: str, *arguments: str, **options: str) -> Step:
        """A step that runs a module."""
        command = [sys.executable, "-m", module, *arguments]
        return Step(name, command, seconds * self.patience, **options)

    def cases(
        self, name: str, seconds: float, module: str, *arguments: str, **options: str
    ) -> Step:
        """A step whose cases are recorded, and which goes on after a CUDA error."""
        record = str(self.folder / f"{name}.jsonl")
        arguments = ("--device", self.device, "--record", record, *arguments)
        return self.step(name, seconds, module, *arguments, goes_on=True, **options)

    def times(
        self, name: str, seconds: float, operators: str, *rivals: str, cases: tuple[str, ...] = ()
    ) -> Step:
        """A step that times the cases of some operators."""
        quick = ("--samples", "20", "--budget", "0.5")
        arguments = ("--device", self.device, "--no-memory", "--dtype", "bfloat16", "--resume")
        arguments += quick if self.on_gpu else ("--rehearse", "--threads", "1")
        arguments += ("--cuda-graph",) if name.startswith("graph") else ()
        arguments += ("--op", operators, "--rivals", *rivals)
        arguments += ("--case", *cases) if cases else ()
        out = ("--out", str(self.folder / f"{name}.csv"))
        return self.step(name, seconds, "benchmarks.measure", *arguments, *out, goes_on=True)


def phases(plan: Plan) -> list[list[Step]]:
    """What to run, one phase after the other; the steps of a phase run side by side."""
    tiny = () if plan.on_gpu else ("--seconds", "0.01")
    device, left_out = ("--device", plan.device), "" if plan.on_gpu else NO_GPU

    cases = COMPILED if plan.on_gpu else COMPILED[1:]

    def out(name: str) -> tuple[str, str]:
        return "--out", str(plan.folder / name)

    launches = ("benchmarks.host", "--count", *out("launches.json"))
    alone = [
        plan.step("compiled-here", 5, "benchmarks.gpu_cache", "--count"),
        plan.step("ceilings", 20, "benchmarks.gpu.ceilings", *device, *out("ceilings.json"), *tiny),
        plan.times("graph-models", 25, "models"),
        plan.step("launches", 20, *launches, left_out=left_out),
        plan.times("graph-matching", 30, "matching", "eager", "triton"),
        plan.times("graph-merging", 30, "merging", "eager", "index", "triton"),
        plan.times("events-merging", 30, "merging", "eager", "index"),
        plan.times("events-attention", 40, "attention", "eager", "sdpa+bias"),
        plan.times("graph-attention", 25, "attention", "eager"),
    ]
    return [
        _preparations(plan),
        _smoke(plan),
        _tests(plan),
        *([step] for step in alone),
        _sanitizers(plan, left_out),
        [plan.times("compiled", 60, "attention", "compile", "flex", cases=cases)],
    ]


def _preparations(plan: Plan) -> list[Step]:
    cache = "no archive was named" if plan.cache is None else ""
    unpack = ("benchmarks.gpu_cache", "--unpack", str(plan.cache))
    shell = f"nvidia-smi; nvcc --version; env | grep -E '^({VARIABLES})'"
    return [
        plan.step("machine", 30, "torch.utils.collect_env"),
        Step("variables", ["sh", "-c", shell], 30 * plan.patience),
        plan.step("library", 80, "benchmarks.gpu.library", "--device", plan.device),
        plan.step("cache", 40, *unpack, left_out=cache),
    ]


def _smoke(plan: Plan) -> list[Step]:
    info, smoke = plan.step("info", 30, "tokenops.info"), "benchmarks.smoke"
    if not plan.on_gpu:
        return [info, plan.cases("smoke-float32", 70, smoke, "--dtype", "float32")]
    return [
        info,
        *(
            plan.cases(f"smoke-{name}-{dtype}", 70, smoke, "--only", name, "--dtype", dtype)
            for name in OPERATORS
            for dtype in DTYPES
        ),
    ]


def _tests(plan: Plan) -> list[Step]:
    def test(name: str, backend: str, share: str, *paths: str) -> Step:
        arguments = ("--backend", backend, "--share", share, *paths)
        return plan.cases(f"tests-{name}", 90, "benchmarks.gpu.suite", *arguments)

    everywhere = "tests/ops"
    if not plan.on_gpu:
        everywhere = "tests/ops/test_token_map.py"
        steps = [test(name, name, "1/8", everywhere) for name in ("native", "reference")]
    else:
        number, of = map(int, plan.share.split("/"))
        steps = [test(f"native-{i}", "native", f"{i}/4", everywhere) for i in range(1, 5)]
        for i in range(1, 10):
            share = f"{(number - 1) * 9 + i}/{of * 9}"
            steps.append(test(f"triton-{i}", "triton", share, everywhere))
    steps.insert(0, test("default", "default", "1/1", everywhere, "tests/test_cuda.py"))
    # Triton kernels of operators that the compiled library serves by default.
    for name, only in (("match", ("match",)), ("merging", MERGING)):
        arguments = ("benchmarks.smoke", "--backend", "triton", "--only", *only)
        left_out = "" if plan.on_gpu else NO_GPU
        steps.append(plan.cases(f"smoke-triton-{name}", 90, *arguments, left_out=left_out))
    return steps


def _sanitizers(plan: Plan, left_out: str) -> list[Step]:
    """Small shapes under compute-sanitizer: compiled kernels, then Triton's."""
    own_blocks = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor with bounds of its own
    steps = []
    for tool in ("memcheck", "racecheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "initcheck":  # PyTorch's own kernels read padding that nothing has written
            command += ["--kernel-name-exclude", "kernel_substring=2at6native"]
        command += [sys.executable, "-m", "benchmarks.smoke", "--device", "cuda"]
        command += ["--dtype", "float16", "--only"]
        for name, only in ((tool, ("match", *MERGING)), (f"{tool}-triton", TRITON)):
            seconds = 110 * plan.patience
            steps.append(Step(name, [*command, *only], seconds, own_blocks, left_out))
    return steps
