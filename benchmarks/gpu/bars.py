# SPDX-License-Identifier: Apache-2.0
"""Bars on a GPU, as shares of ceilings that the same run has measured.

An H100 moves 3.0 TB/s and an H200 4.3: a bar in microseconds would be wrong for one of them. A time
may be at most the floor of its work divided by a share. The floor is the longest of the times that
bytes, products, exponentials and one launch need on the device at hand. The tables also show the
limits on an H100 and an H200 with the figures below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import store
from ..merging import WITH_SIZES

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
        self.rows = {
            (row["operator"], row["case"], row["rival"]): row
            for path in paths
            for row in store.read(path)
            if row["dtype"] == "bfloat16"
        }

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
        if math.isnan(self.value):
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


def beats(table: Table, operator: str, case: str, rival: str, least: float) -> Bar:
    """The same of a case in a table."""
    return times(f"{operator} {case}", table.times(operator, case, rival), least, rival)


def all_bars(graph: Table, events: Table, folder: Path, device: Ceilings) -> Iterator[Bar]:
    """Every bar. ``graph`` has times of replayed graphs, ``events`` of eager calls."""
    launches = load(folder / "launches.json").get("layer", NAN)
    yield Bar("kernels of a ToMe layer's token work", launches, "<=", lambda d: 3, "one each")
    yield beats(graph, "model", "vit-b", "dense", 1)
    for case in VIT:
        work = graph.work("match", case)
        # 8 us where a launch takes 2.5
        yield within(f"match {case}", graph.us("match", case), work, 2.5 / 8, device)
        yield beats(graph, "match", case, "eager", 4)
    for case in ("n16384-320", "n16384-640"):
        work = Work(flops=graph.work("match", case).flops)
        yield within(f"match {case}", graph.us("match", case), work, 0.45, device)
        yield beats(graph, "match", case, "bmm+max", 1.3)
    for operator in (*MERGES, *(f"{name}_backward" for name in MERGES)):
        for case in (*VIT, *SD, "vlm-2880-4096"):
            if operator not in WITH_SIZES or case not in SD:
                yield from _merging(operator, case, graph, events, device)
    yield from _attention(events, device)
    for case in ("vit-b-256-class", "vlm-2880-columns"):
        yield beats(graph, "attention_scores", case, "eager", 1)


def _merging(
    operator: str, case: str, graph: Table, events: Table, device: Ceilings
) -> Iterator[Bar]:
    if case in (*VIT, *SD):
        yield beats(events, operator, case, "eager", 5 if case in SD else 3.5)
    name, work = f"{operator} {case}", events.work(operator, case)
    if not work.bytes < 64e6:
        yield within(name, events.us(operator, case), work, 0.8, device)
    elif work.bytes >= 8e6:
        yield beats(events, operator, case, "copy", 0.7)
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
    yield beats(events, ATTENTION, case, "eager", 10)
    for case in ("vit-l-512-32", "vlm-2880", "n16384-10"):
        yield beats(events, ATTENTION, case, "sdpa", 0.8)
        value = ratio(backward("sdpa", case), backward("tokenops", case))
        yield times(f"{ATTENTION} {case} backward", value, 0.7, "sdpa")
    for case in ("vit-b-256-size", "vit-l-512-32-size"):
        yield beats(events, ATTENTION, case, "unweighted", 0.9)
        yield beats(events, ATTENTION, case, "sdpa+bias", 1.5)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(folder: Path) -> str:
    ceilings = load(folder / "ceilings.json")
    if not ceilings:
        return "Without measured ceilings there are no bars.\n"
    device = Ceilings(**ceilings)
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
    graph, events = (Table(*sorted(folder.glob(f"{n}-*.csv"))) for n in ("graph", "events"))
    for bar in all_bars(graph, events, folder, device):
        if math.isnan(bar.value):
            lines.append(f"| {bar.text} | not measured | | {bar.by} | | |")
            continue
        limit, h100, h200 = (f"{bar.limit(d):.3g}" for d in (device, H100, H200))
        lines.append(
            f"| {bar.text} | {bar.value:.3g} | {bar.relation} {limit} | {bar.by} | {h100} / {h200} "
            f"| {bar.verdict(device)} |"
        )
    return "\n".join(lines) + "\n"
