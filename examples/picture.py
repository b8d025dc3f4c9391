# SPDX-License-Identifier: Apache-2.0
"""Draws a photograph beside its segments: the patches that became one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

INK = "#1f2933"
SEAM = "#ffffff"


def draw(
    photo: Image.Image, panels: Sequence[tuple[str, np.ndarray]], path: Path, caption: str
) -> None:
    """Write a picture of ``photo``, square, and a panel for each (title, labels [h, w])."""
    figure = Figure(figsize=(3.3 * (1 + len(panels)), 3.85), dpi=150, facecolor="white")
    axes = figure.subplots(1, 1 + len(panels))
    pixels = np.asarray(photo)
    rows, columns = panels[0][1].shape
    show(axes[0], pixels, f"photograph: {rows * columns} patches")
    for axis, (title, labels) in zip(axes[1:], panels, strict=True):
        show(axis, mean_colours(pixels, labels), title)
        axis.add_collection(LineCollection(seams(labels, pixels.shape[0]), colors=SEAM, lw=0.9))
    figure.text(0.5, 0.03, caption, ha="center", color=INK, fontsize=9)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.91, bottom=0.09, wspace=0.04)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(axis: Axes, pixels: np.ndarray, title: str) -> None:
    size = pixels.shape[0]
    axis.imshow(pixels, extent=(0, size, size, 0), interpolation="antialiased")
    axis.set_title(title, fontsize=11, color=INK)
    axis.set_axis_off()


def mean_colours(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each segment of patches filled with the mean colour of its pixels."""
    patch = pixels.shape[0] // labels.shape[0]
    full = np.kron(labels, np.ones((patch, patch), dtype=labels.dtype))
    groups = full.ravel()
    count = np.maximum(np.bincount(groups), 1)
    channels = [
        (np.bincount(groups, pixels[..., c].ravel()) / count)[full] for c in range(pixels.shape[2])
    ]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def seams(labels: np.ndarray, size: int) -> list[list[tuple[float, float]]]:
    """Lines between neighbouring patches of different segments, in pixels."""
    rows, columns = labels.shape
    high, wide = size / rows, size / columns
    lines = [
        [(x * wide, y * high), (x * wide, (y + 1) * high)]
        for y, x in zip(*np.nonzero(labels[:, 1:] != labels[:, :-1]), strict=True)
        for x in (x + 1,)
    ]
    lines += [
        [(x * wide, y * high), ((x + 1) * wide, y * high)]
        for y, x in zip(*np.nonzero(labels[1:] != labels[:-1]), strict=True)
        for y in (y + 1,)
    ]
    return lines
