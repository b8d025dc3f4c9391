# SPDX-License-Identifier: Apache-2.0
"""What serves without fast kernels, against the eager recipes: ``python -m benchmarks.fallback``.

Each variant is a process of its own: *no library*, and the compiled library at the levels of vector
instructions *portable* and *avx2*; *avx2 machine* keeps PyTorch's kernels below AVX-512 too, as a
CPU without it does, while the others may meet bfloat16 instructions that such CPUs lack. A figure
is the time of the eager recipe divided by that of tokenops, medians of interleaved samples; behind
it the same of the fastest samples. ``--all`` adds compiled kernels and the composed functions by
choice: they tell whose kernels step aside at a level (``SLOWER`` in ``tokenops/_backend.py``).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import tokenops

from . import machine
from .attention import setup_attention, setup_attention_step, setup_scores
from .cases import DTYPES, Case
from .matching import setup_match
from .merging import backward, forward, merge_pair, unmerge_pair, wavg_pair
from .registry import DYNAMIC_VIT_EPS, HEADS_B8, SD, VIT_B
from .timing import QUICK, REHEARSAL, CpuTimer, Policy, Rival, interleave

#: At least so many times as fast as the eager recipe.
BAR = 0.95

#: Variants by name, with the environment that makes them.
VARIANTS = {
    "no library": {"TOKENOPS_LIBRARY": os.path.join(os.sep, "nonexistent")},
    "portable": {"TOKENOPS_CPU_ISA": "portable"},
    "avx2": {"TOKENOPS_CPU_ISA": "avx2"},
    "avx2 machine": {
        "TOKENOPS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "avx512": {"TOKENOPS_CPU_ISA": "avx512"},
    "best": {},
}

_VIT = replace(VIT_B, batch=8)
_POLICY = replace(HEADS_B8, eps=DYNAMIC_VIT_EPS)
_SIZE = replace(HEADS_B8, weights="size")

CASES = (
    Case("match", "keys", replace(_VIT, width=64, heads=12), setup_match),
    Case("match", "plain", replace(_VIT, width=64), setup_match),
    Case("match", "sd", SD, setup_match),
    Case("merge", "mean", _VIT, forward(merge_pair)),
    Case("merge_wavg", "vit-b", _VIT, forward(wavg_pair)),
    Case("unmerge", "vit-b", _VIT, forward(unmerge_pair)),
    Case("merge_backward", "mean", _VIT, backward(merge_pair)),
    Case("merge_wavg_backward", "vit-b", _VIT, backward(wavg_pair)),
    Case("unmerge_backward", "vit-b", _VIT, backward(unmerge_pair)),
    Case("policy_attention", "size", _SIZE, setup_attention),
    Case("policy_attention", "policy", _POLICY, setup_attention),
    Case("policy_attention_forward_backward", "size", _SIZE, setup_attention_step),
    Case("policy_attention_forward_backward", "policy", _POLICY, setup_attention_step),
    Case("attention_scores", "class", replace(HEADS_B8, weights="class"), setup_scores),
    Case("attention_scores", "columns", replace(HEADS_B8, weights="columns"), setup_scores),
)


def case_rivals(case: Case, dtype: torch.dtype, everyone: bool) -> dict[str, Rival]:
    """The eager recipe and tokenops; with ``everyone`` also backends by choice."""
    work = case.prepare(dtype, torch.device("cpu"))
    made = {name: work.rivals[name]() for name in ("eager", "tokenops")}
    if everyone:
        there = [b for b in ("native", "composed") if b not in tokenops.why_not(case.public)]
        for name in there:
            with tokenops.use_backend(name):  # a backward belongs to its forward's backend
                ours = work.rivals["tokenops"]()
            made[name] = Rival(ours.call, partial(tokenops.use_backend, name))
    return made


def model_rivals(tiny: bool) -> dict[str, Rival]:
    """A patched ViT-S, four images, r = 8, and eager ToMe within the same model."""
    from transformers import ViTConfig, ViTForImageClassification

    from examples import rivals
    from tokenops.integrations.transformers import apply_patch

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    layers = 2 if tiny else 12
    config = ViTConfig(**sizes, num_hidden_layers=layers)
    eager = ViTForImageClassification(config).eval()
    ours = copy.deepcopy(eager)
    rivals.replace_layers(eager, rivals.eager_tome, [8] * layers)
    apply_patch(ours, 8)
    pixels = torch.randn(1 if tiny else 4, 3, 224, 224)
    return {
        "eager": Rival(lambda: eager(pixels).logits),
        "tokenops": Rival(lambda: ours(pixels).logits),
    }


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all cases in this process: for each one, seconds by rival."""
    policy = REHEARSAL if options.tiny else QUICK if options.quick else Policy(budget=4.0)
    cases = [case.tiny() if options.tiny else case for case in CASES]
    work: list[tuple[str, bool, Callable[[], dict[str, Rival]]]] = [
        (
            f"{case.operator} {case.name} {name}",
            not case.operator.endswith("backward"),
            partial(case_rivals, case, DTYPES[name], options.all),
        )
        for case in cases
        for name in options.dtypes
    ]
    work.append(("ViT-S B4 r8 float32", True, partial(model_rivals, options.tiny)))
    for name, inference, make in work:
        if options.only and not any(word in name for word in options.only):
            continue
        with torch.inference_mode(inference):
            found = interleave(make(), CpuTimer(), policy)
        yield {
            "case": name,
            "median": {rival: series.seconds(0.5) for rival, series in found.items()},
            "best": {rival: series.seconds(0.0) for rival, series in found.items()},
        }


def line(found: dict[str, Any]) -> tuple[str, bool]:
    """The line of a case, and whether tokenops is below the bar."""
    words = [f"  {found['case']:<52}{found['median']['eager'] * 1e3:9.3f} ms"]
    ratios = {}
    for rival in found["median"]:
        if rival != "eager":
            ratios[rival] = found["median"]["eager"] / found["median"][rival]
            best = found["best"]["eager"] / found["best"][rival]
            words.append(f"{rival} {ratios[rival]:5.2f}x ({best:5.2f}x)")
    below = ratios["tokenops"] < BAR
    return "   ".join([*words, "BELOW"] if below else words), below


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each variant and number of threads; 1 if a figure is below the bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fallback", description=__doc__)
    few = ["no library", "portable", "avx2"]
    parser.add_argument("--variants", nargs="+", default=few, choices=list(VARIANTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--only", nargs="+", default=[], help="cases with one of these words")
    parser.add_argument("--all", action="store_true", help="backends by choice too")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--tiny", action="store_true", help="sizes that take no time, to rehearse")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        warnings.filterwarnings("ignore", "tokenops: plain PyTorch serves")
        torch.set_num_threads(options.threads[0])
        for found in measure(options):
            print(json.dumps(found), flush=True)
        return 0
    print(f"{machine.cpu_model()}, torch {torch.__version__}; eager, and how much faster is")
    passed_on = sys.argv[1:] if arguments is None else arguments
    below = 0
    for threads in options.threads:
        for variant in options.variants:
            print(f"{variant}, {threads} threads")
            command = [sys.executable, "-m", "benchmarks.fallback", *passed_on]
            command += ["--child", "--threads", str(threads)]
            environment = {k: v for k, v in os.environ.items() if not k.startswith("TOKENOPS_")}
            environment |= VARIANTS[variant]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment
            ) as child:
                for text in child.stdout or ():
                    words, is_below = line(json.loads(text))
                    below += is_below
                    print(words, flush=True)
            if child.returncode != 0:
                raise subprocess.CalledProcessError(child.returncode, command)
    print(f"{below} below {BAR}")
    return int(below > 0)


if __name__ == "__main__":
    machine.run_again_with_tuned_malloc("benchmarks.fallback", sys.argv[1:])
    sys.exit(main())
