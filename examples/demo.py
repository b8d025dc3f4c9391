# SPDX-License-Identifier: Apache-2.0
"""Runs a ViT-B/16 on a photograph in four ways: ``make demo ARGS=...``.

``dense`` is the unchanged model, ``eager ToMe`` merges tokens by PyTorch operators, ``tokenops`` by
the kernels of this project, and ``slicing bound`` slices to the same token counts at no cost.
Prints a table and draws the patches of the photograph that became one token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import rivals
import torch
from matplotlib import cbook
from picture import draw
from PIL import Image
from table import print_columns
from torch import Tensor
from tqdm import tqdm

import tokenops
from tokenops.compat.tome import parse_r
from tokenops.integrations.transformers import apply_patch, last_trace

CHECKPOINT = "google/vit-base-patch16-224"
SEED = 0
HUB_SECONDS = 4.0

#: Returns the logits and the number of tokens after the last layer.
Run = Callable[[], tuple[Tensor, int]]


def main() -> None:
    options = parse_options()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    steps = 4 + 4 * (2 + options.repeats)
    progress = tqdm(total=steps, leave=False, unit="step", disable=None)  # None: on a terminal only

    progress.set_description("loading the model")
    model, weights = load_model()
    model = model.to(device)
    schedule = parse_r(model.config.num_hidden_layers, options.r)
    photo = load_photo(options.image)
    crops = random_crops(photo, model.config.image_size, options.batch).to(device)
    progress.update()

    with torch.inference_mode():
        progress.set_description("comparing logits")
        runs = make_runs(model, crops, schedule)
        difference = (runs["eager ToMe"]()[0] - runs["tokenops"]()[0]).abs().max().item()
        progress.update(2)

        progress.set_description("drawing")
        picture = options.out / "merged_tokens.png"
        draw_groups(model, photo, schedule, weights, picture)
        progress.update()

        progress.set_description("measuring time")
        runs = make_runs(model.to(dtype), crops.to(dtype), schedule)
        tokens, peaks = {}, {}
        for name, run in runs.items():
            tokens[name] = run()[1]  # also a warm-up
            progress.update()
        samples = measure.interleave(runs, options.repeats, device, progress.update)
        progress.set_description("measuring memory")
        for name, run in runs.items():
            peaks[name] = measure.peak_bytes(run, device)
            progress.update()
    progress.close()

    print(f"ViT-B/16 with {weights}")
    print(f"{options.batch} crops of {options.image or 'grace_hopper.jpg'}, r = {options.r}")
    print(f"{options.dtype} on {machine(device)}\n")
    print_table(samples, peaks, tokens, options.batch)
    print(f"\nms         median of {options.repeats} interleaved runs, without disturbed ones")
    if min(sum(s.clean for s in one) for one in samples.values()) < 3:
        print("           BUSY MACHINE: few undisturbed runs, so the least disturbed third")
    counter = "CUDA's allocator" if device.type == "cuda" else "torch.profiler"
    print(f"peak MB    of tensors except model and input, by {counter}")
    print(f"logits     eager ToMe and tokenops differ by at most {difference:.1e} (float32)")
    print(f"picture    {picture}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--r", type=positive, default=8, help="tokens to merge in each layer (8)")
    parser.add_argument("--batch", type=positive, default=8, help="images in a batch (8)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)"
    )
    parser.add_argument("--image", type=Path, help="photograph to use instead of Grace Hopper")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="(build/demo)")
    parser.add_argument("--repeats", type=positive, default=9, help="timed runs of each row (9)")
    options = parser.parse_args()
    if options.image is not None and not options.image.is_file():
        parser.error(f"--image: there is no file {options.image}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: PyTorch finds no CUDA device")
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_model() -> tuple[Any, str]:
    """The model, pretrained if the hub or its cache has it, and a name of its weights."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for local in (True, False):
        if local or hub_answers():
            try:
                model = ViTForImageClassification.from_pretrained(
                    CHECKPOINT, local_files_only=local
                )
            except (OSError, ValueError):
                continue
            return model.eval(), f"pretrained weights ({CHECKPOINT})"
    torch.manual_seed(SEED)
    model = ViTForImageClassification(ViTConfig(num_labels=1000))
    return model.eval(), f"random weights (seed {SEED}; the Hugging Face hub can't be reached)"


def hub_answers() -> bool:
    """Whether the hub answers soon; in a thread, since the name lookup has no timeout."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def ask() -> None:
        url = f"{constants.ENDPOINT}/{CHECKPOINT}/resolve/main/config.json"
        try:
            with urllib.request.urlopen(url, timeout=HUB_SECONDS) as reply:
                answers.append(reply.status)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers == [200]


def load_photo(path: Path | None) -> Image.Image:
    """The largest square from the middle of the photograph."""
    if path is None:
        path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photo = Image.open(path).convert("RGB")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))


def random_crops(photo: Image.Image, size: int, count: int) -> Tensor:
    """Squares of half to all of the photo, [count, 3, size, size] in the range of the ViT."""
    draw_from = np.random.default_rng(SEED)
    crops = []
    for _ in range(count):
        side = int(photo.width * draw_from.uniform(0.5, 1.0))
        left, top = draw_from.integers(0, photo.width - side, size=2, endpoint=True).tolist()
        crops.append(to_pixels(photo.crop((left, top, left + side, top + side)), size))
    return torch.stack(crops)


def to_pixels(photo: Image.Image, size: int) -> Tensor:
    resized = photo.resize((size, size), Image.Resampling.BICUBIC)
    return torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 127.5 - 1.0


def make_runs(model: Any, crops: Tensor, schedule: list[int]) -> dict[str, Run]:
    """The rows of the table; their models share one set of weights."""
    eager, sliced, merged = (
        copy.deepcopy(model, {id(p): p for p in model.parameters()}) for _ in range(3)
    )
    rivals.replace_layers(eager, rivals.eager_tome, schedule)
    rivals.replace_layers(sliced, rivals.slicing, schedule)
    apply_patch(merged, schedule)

    def make_run(model: Any) -> Run:
        def run() -> tuple[Tensor, int]:
            tokens = model.vit(crops).last_hidden_state
            return model.classifier(tokens[:, 0]), tokens.shape[1]

        return run

    models = {"dense": model, "eager ToMe": eager, "tokenops": merged, "slicing bound": sliced}
    return {name: make_run(model) for name, model in models.items()}


def draw_groups(
    model: Any, photo: Image.Image, schedule: list[int], weights: str, path: Path
) -> None:
    """Draw the segments of patches after a third, two thirds and all of the layers."""
    merged = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    apply_patch(merged, schedule, track_source=True)
    pixels = to_pixels(photo, model.config.image_size)[None].to(model.device)
    merged(pixels)
    patches = model.config.image_size // model.config.patch_size
    panels = []
    for layer in (len(schedule) // 3, 2 * len(schedule) // 3, len(schedule)):
        source = last_trace(merged).sources[layer - 1]
        labels = source.assign[0, 1:].reshape(patches, patches).cpu().numpy()
        panels.append((f"after layer {layer}: {source.num_tokens - 1} tokens", labels))
    square = photo.resize((patches * 40, patches * 40), Image.Resampling.LANCZOS)
    caption = (
        f"ViT-B/16 with {weights.split(' (')[0]}, r = {schedule[0]} tokens merged in each layer"
    )
    draw(square, panels, path, caption)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    backends = ", ".join(tokenops.available_backends())
    return f"CPU, {torch.get_num_threads()} threads; backends of tokenops: {backends}"


def print_table(
    samples: dict[str, list[measure.Sample]],
    peaks: dict[str, int],
    tokens: dict[str, int],
    batch: int,
) -> None:
    ms = {
        name: 1e3 * statistics.median(s.seconds for s in measure.undisturbed(one))
        for name, one in samples.items()
    }
    rows = [("", "ms", "images/s", "peak MB", "tokens left", "over the bound")]
    for name, value in ms.items():
        over = 100 * (value / ms["slicing bound"] - 1)
        rows.append(
            (
                name,
                f"{value:.1f}",
                f"{1e3 * batch / value:.1f}",
                f"{peaks[name] / 1e6:.1f}",
                f"{tokens[name]}",
                f"{over:+.1f} %" if name != "slicing bound" else "",
            )
        )
    print_columns(rows)


if __name__ == "__main__":
    main()
