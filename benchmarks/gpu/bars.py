# SPDX-License-Identifier: Apache-2.0
"""Bars on a GPU, as shares of ceilings that the same run has measured.

An H100 moves 3.0 TB/s and an H200 4.3: a bar in microseconds would be wrong for one of them. A time
may be at most the floor of its work divided by a share. The floor is the longest of the times that
bytes, products, exponentials and one launch need on the device at hand. The tables also show the
limits on an H100 and an H200 with the figures below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import store

NAN = float("nan")


class Ceilings(NamedTuple):
    """The most that a device can do."""

    bytes: float  # per second, read and written together
    flops: float  # operations per second of bfloat16 products
    exps: float  # exponentials per second
    launch: float  # seconds of a launch in a replayed graph
    name: str = ""


H100 = Ceilings(3.0e12, 800e12, 4.2e12, 2.5e-6, "H100")
H200 = Ceilings(4.3e12, 790e12, 4.2e12, 2.5e-6, "H200")


class Work(NamedTuple):
    """Least work of a case."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0

    def floor(self, device: Ceilings) -> tuple[float, str]:
        """Seconds that a device needs, and the ceiling that limits it."""
        return max(
            (self.bytes / device.bytes, "copy rate"),
            (self.flops / device.flops, "matmul rate"),
            (self.exps / device.exps, "exp rate"),
            (device.launch, "launch"),
        )


class Table:
    """Rows of CSV files by operator, case and rival, in bfloat16."""

    def __init__(self, *paths: Path) -> None:
        self.rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in (row for path in paths for row in store.read(path)):
            if row["dtype"] == "bfloat16":
                self.rows[row["operator"], row["case"], row["rival"]] = row

    def us(self, operator: str, case: str, rival: str = "tokenops") -> float:
        """Median in microseconds; NaN without a measurement."""
        return float(self.rows.get((operator, case, rival), {}).get("median_us") or NAN)

    def times(self, operator: str, case: str, rival: str) -> float:
        """Time of a rival divided by that of tokenops."""
        return ratio(self.us(operator, case, rival), self.us(operator, case))

    def work(self, operator: str, case: str) -> Work:
        """Least work of a case; for attention with exponentials, by the sizes in its row."""
        row = self.rows.get((operator, case, "tokenops"), {})
        exps = 0
        if row and operator.startswith("policy_attention"):
            # "B1 H28/4 N2880 D128": 28 query heads that share 4 key heads
            sizes = {s[0]: int(s[1:].partition("/")[0]) for s in row["shape"].split()[:3]}
            exps = sizes["B"] * sizes["H"] * sizes["N"] ** 2 * (2 if "backward" in operator else 1)
        return Work(float(row.get("bytes") or NAN), float(row.get("flops") or NAN), exps)


def ratio(a: float, b: float) -> float:
    """a / b; NaN where b is not positive, as a difference of two disturbed times may be."""
    return a / b if b > 0 else NAN


class Bar(NamedTuple):
    """A limit for a measured value."""

    text: str  # name of the value, with its unit
    value: float  # NaN without a measurement
    relation: str  # "<=" or ">=": of the value to the limit
    limit: Callable[[Ceilings], float]  # on a device
    by: str  # source of the limit

    def verdict(self, device: Ceilings) -> str:
        """``"reached"``, ``"MISSED"``, or nothing without a measurement."""
        if self.value != self.value:
            return ""
        above = self.value - self.limit(device)
        return "reached" if above == 0 or (above > 0) == (self.relation == ">=") else "MISSED"


def within(text: str, us: float, work: Work, share: float, device: Ceilings) -> Bar:
    """A time of at most the floor of its work, divided by a share."""
    by = f"{share:.0%} of {work.floor(device)[1]}"
    return Bar(f"{text}, us", us, "<=", lambda d: work.floor(d)[0] / share * 1e6, by)


def times(text: str, value: float, least: float, rival: str) -> Bar:
    """A rival of the same run that takes at least so many times as long."""
    return Bar(f"{text}, {rival} / ours", value, ">=", lambda d: least, f"{rival}, same run")


ATTENTION = "policy_attention"
STEP = "policy_attention_forward_backward"
MERGES = ("merge", "merge_wavg", "unmerge")
VIT, SD = ("vit-b-256", "vit-l-512-32"), ("sd-2", "sd-16")


def all_bars(graph: Table, events: Table, folder: Path, device: Ceilings) -> Iterator[Bar]:
    """Every bar. ``graph`` has times of replayed graphs, ``events`` of eager calls."""
    yield from _whole(graph, folder)
    yield from _matching(graph, device)
    yield from _merging(graph, events, device)
    yield from _attention(events, device)
    for case in ("vit-b-256-class", "vlm-2880-columns"):
        value = graph.times("attention_scores", case, "eager")
        yield times(f"attention_scores {case}", value, 1, "eager")


def _whole(graph: Table, folder: Path) -> Iterator[Bar]:
    """The launches of a layer, and a whole model."""
    count = load(folder / "launches.json").get("layer", NAN)
    yield Bar("kernels of a ToMe layer's token work", count, "<=", lambda d: 3, "one each")
    yield times("ViT-B/16, one image", graph.times("model", "vit-b", "dense"), 1, "dense")


def _matching(graph: Table, device: Ceilings) -> Iterator[Bar]:
    for case in VIT:
        work = graph.work("match", case)
        # 8 us where a launch takes 2.5
        yield within(f"match {case}", graph.us("match", case), work, 2.5 / 8, device)
        yield times(f"match {case}", graph.times("match", case, "eager"), 4, "eager")
    for case in ("n16384-320", "n16384-640"):
        work = Work(flops=graph.work("match", case).flops)
        yield within(f"match {case}", graph.us("match", case), work, 0.45, device)
        yield times(f"match {case}", graph.times("match", case, "bmm+max"), 1.3, "bmm+max")


def _merging(graph: Table, events: Table, device: Ceilings) -> Iterator[Bar]:
    for operator in (*MERGES, *(f"{name}_backward" for name in MERGES)):
        for case in (*VIT, *SD, "vlm-2880-4096"):
            if "wavg" in operator and case in SD:
                continue  # Stable Diffusion has no sizes
            name = f"{operator} {case}"
            least = {"sd-2": 5, "sd-16": 5, "vlm-2880-4096": 0}.get(case, 3.5)
            if least:
                yield times(name, events.times(operator, case, "eager"), least, "eager")
            us, work = events.us(operator, case), events.work(operator, case)
            if not work.bytes < 64e6:
                yield within(name, us, work, 0.8, device)
            elif work.bytes >= 8e6:
                yield times(name, events.times(operator, case, "copy"), 0.7, "equal copy")
            elif not operator.endswith("_backward"):  # eager backwards wait for the host
                yield within(name, graph.us(operator, case), Work(), 0.5, device)


def _attention(events: Table, device: Ceilings) -> Iterator[Bar]:
    def backward(rival: str, case: str) -> float:
        return events.us(STEP, case, rival) - events.us(ATTENTION, case, rival)

    case, name = "vit-b-256", f"{ATTENTION} vit-b-256"
    forward = events.work(ATTENTION, case)
    rest = Work(*(a - b for a, b in zip(events.work(STEP, case), forward, strict=True)))
    yield within(name, events.us(ATTENTION, case), forward, 0.6, device)
    yield within(f"{name} backward", backward("tokenops", case), rest, 0.5, device)
    yield times(name, events.times(ATTENTION, case, "eager"), 10, "eager")
    for case in ("vit-l-512-32", "vlm-2880", "n16384-10"):
        name = f"{ATTENTION} {case}"
        yield times(name, events.times(ATTENTION, case, "sdpa"), 0.8, "sdpa")
        value = ratio(backward("sdpa", case), backward("tokenops", case))
        yield times(f"{name} backward", value, 0.7, "sdpa")
    for case in ("vit-b-256-size", "vit-l-512-32-size"):
        for rival, least in (("unweighted", 0.9), ("sdpa+bias", 1.5)):
            yield times(f"{ATTENTION} {case}", events.times(ATTENTION, case, rival), least, rival)


def load(path: Path) -> dict[str, float]:
    """A JSON file of numbers; empty if there is no file."""
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def table(folder: Path) -> str:
    """The bars as a Markdown table."""
    path = folder / "ceilings.json"
    if not path.is_file():
        return "Without measured ceilings there are no bars.\n"
    device = Ceilings(**json.loads(path.read_text(encoding="utf-8")))
    lines = ["| ceiling | here | H100 | H200 |", "| --- | --- | --- | --- |"]
    for name, unit, factor in (
        ("bytes", "copied, GB/s", 1e-9),
        ("flops", "bf16 products, TFLOP/s", 1e-12),
        ("exps", "exponentials, T/s", 1e-12),
        ("launch", "a launch, us", 1e6),
    ):
        values = (f"{getattr(d, name) * factor:.3g}" for d in (device, H100, H200))
        lines.append(f"| {unit} | {' | '.join(values)} |")
    lines += [
        "",
        f"| bar (bfloat16, {device.name}) | measured | limit | of | on an H100 / H200 | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    graph = Table(*sorted(folder.glob("graph-*.csv")))
    events = Table(*sorted(folder.glob("events-*.csv")))
    for bar in all_bars(graph, events, folder, device):
        if bar.value != bar.value:
            lines.append(f"| {bar.text} | not measured | | {bar.by} | | |")
            continue
        value, limit, h100, h200 = (
            f"{number:.3g}" for number in (bar.value, *map(bar.limit, (device, H100, H200)))
        )
        lines.append(
            f"| {bar.text} | {value} | {bar.relation} {limit} | {bar.by} | {h100} / {h200} "
            f"| {bar.verdict(device)} |"
        )
    return "\n".join(lines) + "\n"
