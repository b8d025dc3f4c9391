# SPDX-License-Identifier: Apache-2.0
"""Draws digits and their kept pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

INK = "#1f2933"
#: Colours of pixels that the first stage dropped, and that a later stage dropped.
DROPPED = np.array([[0.96, 0.87, 0.70], [0.86, 0.93, 0.97]])


def draw(images: np.ndarray, stages: Mapping[str, np.ndarray], path: Path, caption: str) -> None:
    """Write a row of ``images`` [n, h, w] and, by name, a row of ``stages`` [n, h, w] for each.

    A stage is 0 for pixels that the first stage dropped, 1 for pixels that a later stage dropped,
    and 2 for kept pixels.
    """
    rows = {"digits": np.full(images.shape, 2), **stages}
    figure = Figure(figsize=(0.95 * len(images) + 1.1, 0.95 * len(rows) + 0.5), facecolor="white")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for row, (name, stage) in zip(axes, rows.items(), strict=True):
        row[0].text(-0.2, 0.5, name, transform=row[0].transAxes, ha="right", va="center", color=INK)
        for axis, image, of_image in zip(row, images, stage, strict=True):
            grey = np.repeat(1 - image[..., None], 3, axis=2)
            colours = np.where(of_image[..., None] == 2, grey, DROPPED[np.minimum(of_image, 1)])
            axis.imshow(colours, vmin=0, vmax=1)
            axis.set_axis_off()
    figure.text(0.5, 0.02, caption, ha="center", color=INK, fontsize=9)
    figure.subplots_adjust(left=0.1, right=0.99, top=0.98, bottom=0.1, wspace=0.08, hspace=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
