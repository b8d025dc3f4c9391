# SPDX-License-Identifier: Apache-2.0
"""The steps of ``benchmarks.gpu_check``, in the order of knowledge per second.

Every operator once, in many processes side by side; tests, all of the compiled kernels and a share
of Triton's, which have to be compiled first; times, each alone on the device; memory and races;
rivals that take long to compile. On the CPU the same steps run at tiny sizes, without those that
need a GPU.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runner import Step

#: Expressions for the names of smoke tests, which run side by side: those first whose kernels take
#: long to compile. "merge" is also in the names of merge_wavg and unmerge.
OPERATORS = ("attention_scores", "policy_attention", "match", "merge", "nearest")
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "(float16 and not bfloat16)"}
#: Smoke tests under compute-sanitizer, by backend. Native tests without a kernel are skipped.
KERNELS = {"native": "", "triton": " and (attention or nearest)"}

VARIABLES = "CUDA|NVIDIA|OMP_|PYTORCH|TOKENOPS|TORCH|TRITON"


@dataclass(frozen=True)
class Plan:
    device: str  # "cuda", or "cpu" for a rehearsal
    folder: Path  # for results
    cache: Path | None = None  # archive of compiled Triton kernels
    share: str = "1/6"  # of Triton's tests
    patience: float = 1.0  # factor for all time limits

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def step(self, name: str, seconds: float, command: str, *more: str, **options: Any) -> Step:
        """A step that runs a module; ``{device}`` in its command is the plan's, and so on."""
        words = [word.format_map(vars(self)) for word in command.split()]
        command_line = [sys.executable, "-m", *words, *more]
        return Step(name, command_line, seconds * self.patience, **options)

    def suite(self, name: str, seconds: float, *arguments: str) -> Step:
        """A step of tests, which are recorded, and which go on after a CUDA error."""
        command = f"benchmarks.gpu.suite --device {{device}} --record {{folder}}/{name}.jsonl"
        return self.step(name, seconds, command, *arguments, goes_on=True)

    def times(self, name: str, seconds: float, choice: str) -> Step:
        """A step that times cases."""
        sizes = "--samples 20 --budget 0.5" if self.on_gpu else "--rehearse --threads 1"
        graph = "--cuda-graph" if name.startswith("graph") else ""
        command = (
            "benchmarks.measure --device {device} --no-memory --dtype bfloat16 --resume "
            f"{sizes} {graph} {choice} --out {{folder}}/{name}.csv"
        )
        return self.step(name, seconds, command, goes_on=True)


def phases(plan: Plan) -> list[list[Step]]:
    """What to run, one phase after the other; the steps of a phase run side by side."""
    no_gpu = "" if plan.on_gpu else "it needs a GPU"
    no_cache = "" if plan.cache else "no archive was named"
    shell = f"nvidia-smi; nvcc --version; env | grep -E '^({VARIABLES})'"
    ceilings = "benchmarks.gpu.ceilings --device {device} --out {folder}/ceilings.json"
    if not plan.on_gpu:
        ceilings += " --seconds 0.01"
    launches = "benchmarks.host --count --out {folder}/launches.json"
    alone = [
        plan.step("compiled-here", 5, "benchmarks.gpu_cache --count"),
        plan.step("ceilings", 20, ceilings),
        plan.times("graph-models", 25, "--op models --rivals"),
        plan.step("launches", 20, launches, left_out=no_gpu),
        plan.times("graph-matching", 30, "--op matching --rivals eager triton"),
        plan.times("graph-merging", 30, "--op merging --rivals eager index triton"),
        plan.times("events-merging", 30, "--op merging --rivals eager index"),
        plan.times("events-attention", 40, "--op attention --rivals eager sdpa+bias"),
        plan.times("graph-attention", 25, "--op attention --rivals eager"),
    ]
    # One case of each operator, for compiling is slow.
    compiled = "--op attention --rivals compile flex --case "
    compiled += "vit-b-256 vit-b-256-class" if plan.on_gpu else "vit-b-256-class"
    return [
        [
            plan.step("machine", 30, "torch.utils.collect_env"),
            Step("variables", ["sh", "-c", shell], 30 * plan.patience),
            plan.step("library", 80, "benchmarks.gpu.library --device {device}"),
            plan.step("cache", 40, "benchmarks.gpu_cache --unpack {cache}", left_out=no_cache),
        ],
        _all_smoke(plan),
        _tests(plan),
        *([step] for step in alone),
        _sanitizers(plan, no_gpu),
        [plan.times("compiled", 60, compiled)],
    ]


def _smoke(plan: Plan, name: str, backend: str, names: str = "", *options: str) -> Step:
    arguments = ("--backend", backend, "-k", names, *options, "tests/test_smoke.py")
    return plan.suite(name, 70, *arguments)


def _all_smoke(plan: Plan) -> list[Step]:
    steps = [plan.step("info", 30, "tokenops.info"), _smoke(plan, "smoke-native", "native")]
    if not plan.on_gpu:
        return [*steps, _smoke(plan, "smoke-reference", "reference")]
    for operator, dtype in itertools.product(OPERATORS, DTYPES):
        names = f"{operator} and {DTYPES[dtype]}"
        steps.append(_smoke(plan, f"smoke-{operator}-{dtype}", "triton", names))
    return steps


def _tests(plan: Plan) -> list[Step]:
    def test(name: str, backend: str, share: str) -> Step:
        path = "tests/ops" if plan.on_gpu else "tests/ops/test_token_map.py"
        paths = (path, "tests/test_cuda.py") if backend == "default" else (path,)
        return plan.suite(f"tests-{name}", 90, "--backend", backend, "--share", share, *paths)

    steps = [test("default", "default", "1/1")]
    if not plan.on_gpu:
        return [*steps, *(test(name, name, "1/8") for name in ("native", "reference"))]
    number, of = map(int, plan.share.split("/"))
    steps += [test(f"native-{i}", "native", f"{i}/4") for i in range(1, 5)]
    first = 9 * (number - 1)
    steps += [test(f"triton-{i}", "triton", f"{first + i}/{9 * of}") for i in range(1, 10)]
    return steps


def _sanitizers(plan: Plan, left_out: str) -> list[Step]:
    """Small shapes under compute-sanitizer: compiled kernels, then Triton's."""
    own_blocks = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor with bounds of its own
    steps = []
    for tool, backend in itertools.product(("memcheck", "racecheck", "initcheck"), KERNELS):
        name = tool if backend == "native" else f"{tool}-{backend}"
        names = DTYPES["float16"] + KERNELS[backend]
        options = ("--unfilled",) if tool == "initcheck" else ()
        suite = _smoke(plan, name, backend, names, *options)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool == "initcheck":  # PyTorch's own kernels read padding that nothing has written
            command += ["--kernel-name-exclude", "kernel_substring=2at6native"]
        seconds = 110 * plan.patience
        steps.append(Step(name, [*command, *suite.command], seconds, own_blocks, left_out))
    return steps
