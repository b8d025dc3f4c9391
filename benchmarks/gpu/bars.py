# SPDX-License-Identifier: Apache-2.0
"""What is to be reached on a GPU, as shares of the ceilings that the same run has measured.

An H100 moves 3.0 TB/s and an H200 4.3: a bar in microseconds would ask too much of one or too
little of the other. Each bar of time is a floor divided by a share, and the floor is the largest of
the times that bytes, products, exponentials and one launch need on the device at hand. The tables
show what the same rule asks of an H100 and an H200 as they are known.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import store


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most.

    Attributes:
        bytes: Bytes per second, read and written together.
        flops: Operations per second of bfloat16 products.
        exps: Exponentials per second.
        launch: Seconds of a launch in a replayed graph.
        name: The device.
    """

    bytes: float
    flops: float
    exps: float
    launch: float
    name: str = ""


H100 = Ceilings(3.0e12, 800e12, 4.2e12, 2.5e-6, "H100")
H200 = Ceilings(4.3e12, 790e12, 4.2e12, 2.5e-6, "H200")


@dataclass(frozen=True)
class Work:
    """Least work of a case."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0

    def floor(self, device: Ceilings) -> tuple[float, str]:
        """Seconds that a device needs, and which ceiling says so."""
        times = {
            "copy rate": self.bytes / device.bytes,
            "matmul rate": self.flops / device.flops,
            "exp rate": self.exps / device.exps,
            "launch": device.launch,
        }
        name = max(times, key=lambda key: times[key])
        return times[name], name


class Table:
    """Rows of a CSV file by operator, case and rival, in bfloat16."""

    def __init__(self, *paths: Path) -> None:
        self.rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in (
            row for path in paths for row in store.read(path) if row["dtype"] == "bfloat16"
        ):
            self.rows[row["operator"], row["case"], row["rival"]] = row

    def us(self, operator: str, case: str, rival: str = "tokenops") -> float:
        """Median in microseconds; NaN where nothing was measured."""
        return self.number(operator, case, rival, "median_us")

    def times(self, operator: str, case: str, rival: str) -> float:
        """How many times as long a rival takes."""
        return ratio(self.us(operator, case, rival), self.us(operator, case))

    def work(self, operator: str, case: str) -> Work:
        """Least work of a case; of attention the exponentials too, by the sizes in its row."""
        row = self.rows.get((operator, case, "tokenops"), {})
        exps = 0
        if row and operator.startswith("policy_attention"):
            # "B1 H28/4 N2880 D128": 28 heads of queries that share 4 of keys
            sizes = {s[0]: int(s[1:].partition("/")[0]) for s in row["shape"].split()[:3]}
            exps = sizes["B"] * sizes["H"] * sizes["N"] ** 2 * (2 if "backward" in operator else 1)
        return Work(float(row.get("bytes") or "nan"), float(row.get("flops") or "nan"), exps)

    def number(self, operator: str, case: str, rival: str, column: str) -> float:
        """A column as a number; NaN where there is none."""
        text = self.rows.get((operator, case, rival), {}).get(column, "")
        return float(text) if text else float("nan")


def ratio(a: float, b: float) -> float:
    """a / b; NaN where b is no time, as a difference of two disturbed times may be."""
    return a / b if b > 0 else float("nan")


@dataclass(frozen=True)
class Bar:
    """Something to be reached.

    Attributes:
        text: What, with its unit.
        value: As measured; NaN if it was not.
        relation: ``"<="`` or ``">="``: how the value is to the limit.
        limit: The limit on a device.
        by: What the limit comes from.
    """

    text: str
    value: float
    relation: str
    limit: Callable[[Ceilings], float]
    by: str

    def verdict(self, device: Ceilings) -> str:
        """``"reached"``, ``"MISSED"``, or nothing."""
        if self.value != self.value:
            return ""
        limit = self.limit(device)
        met = self.value <= limit if self.relation == "<=" else self.value >= limit
        return "reached" if met else "MISSED"


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


def all_bars(graph: Table, events: Table, folder: Path, device: Ceilings) -> list[Bar]:
    """Every bar. ``graph`` holds times of replayed graphs, ``events`` of eager calls."""
    return [
        *_whole(folder),
        *_matching(graph, device),
        *_merging(graph, events, device),
        *_attention(graph, events, device),
    ]


def _matching(graph: Table, device: Ceilings) -> list[Bar]:
    found = []
    for case in VIT:
        work = graph.work("match", case)
        # 8 us where a launch takes 2.5
        found.append(within(f"match {case}", graph.us("match", case), work, 2.5 / 8, device))
        found.append(times(f"match {case}", graph.times("match", case, "eager"), 4, "eager"))
    for case in ("n16384-320", "n16384-640"):
        work = Work(flops=graph.work("match", case).flops)
        found.append(within(f"match {case}", graph.us("match", case), work, 0.45, device))
        value = graph.times("match", case, "bmm+max")
        found.append(times(f"match {case}", value, 1.3, "bmm+max"))
    return found


def _merging(graph: Table, events: Table, device: Ceilings) -> list[Bar]:
    found = []
    for operator in (*MERGES, *(f"{name}_backward" for name in MERGES)):
        for case in (*VIT, *SD, "vlm-2880-4096"):
            if "wavg" in operator and case in SD:
                continue  # Stable Diffusion has no sizes
            name = f"{operator} {case}"
            least = {"sd-2": 5, "sd-16": 5, "vlm-2880-4096": 0}.get(case, 3.5)
            if least:
                value = events.times(operator, case, "eager")
                found.append(times(name, value, least, "eager"))
            us, work = events.us(operator, case), events.work(operator, case)
            if not work.bytes < 64e6:
                found.append(within(name, us, work, 0.8, device))
            elif work.bytes >= 8e6:
                found.append(times(name, events.times(operator, case, "copy"), 0.7, "equal copy"))
            elif not operator.endswith("_backward"):  # eager backwards wait for the host
                found.append(within(name, graph.us(operator, case), Work(), 0.5, device))
    return found


def _attention(graph: Table, events: Table, device: Ceilings) -> list[Bar]:
    def backward(rival: str, case: str) -> float:
        return events.us(STEP, case, rival) - events.us(ATTENTION, case, rival)

    found = []
    forward, both = events.work(ATTENTION, "vit-b-256"), events.work(STEP, "vit-b-256")
    rest = Work(both.bytes - forward.bytes, both.flops - forward.flops, both.exps - forward.exps)
    name = f"{ATTENTION} vit-b-256"
    found.append(within(name, events.us(ATTENTION, "vit-b-256"), forward, 0.6, device))
    found.append(within(f"{name} backward", backward("tokenops", "vit-b-256"), rest, 0.5, device))
    found.append(times(name, events.times(ATTENTION, "vit-b-256", "eager"), 10, "eager"))
    for case in ("vit-l-512-32", "vlm-2880", "n16384-10"):
        value = events.times(ATTENTION, case, "sdpa")
        found.append(times(f"{ATTENTION} {case}", value, 0.8, "sdpa"))
        value = ratio(backward("sdpa", case), backward("tokenops", case))
        found.append(times(f"{ATTENTION} {case} backward", value, 0.7, "sdpa"))
    for case in ("vit-b-256-size", "vit-l-512-32-size"):
        value = events.times(ATTENTION, case, "unweighted")
        found.append(times(f"{ATTENTION} {case}", value, 0.9, "unweighted"))
        value = events.times(ATTENTION, case, "sdpa+bias")
        found.append(times(f"{ATTENTION} {case}", value, 1.5, "sdpa+bias"))
    for case in ("vit-b-256-class", "vlm-2880-columns"):
        value = graph.times("attention_scores", case, "eager")
        found.append(times(f"attention_scores {case}", value, 1, "eager"))
    return found


def _whole(folder: Path) -> list[Bar]:
    """A layer's launches, and a whole model."""
    launches, vit = load(folder / "launches.json"), load(folder / "vit.json")
    count = launches.get("layer", float("nan"))
    dense, ours = vit.get("dense", float("nan")), vit.get("tokenops", float("nan"))
    return [
        Bar("kernels of a ToMe layer's token work", count, "<=", lambda d: 3, "one each"),
        times("ViT-B/16, one image", ratio(dense, ours), 1, "dense"),
    ]


def load(path: Path) -> dict[str, float]:
    """A JSON file of numbers; nothing if there is none."""
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def table(folder: Path) -> str:
    """The bars as a Markdown table; a bar whose case was not measured says so."""
    path = folder / "ceilings.json"
    if not path.is_file():
        return "No ceilings were measured, so nothing can be compared with them.\n"
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
        value, limit, *others = (
            f"{number:.3g}" for number in (bar.value, *map(bar.limit, (device, H100, H200)))
        )
        lines.append(
            f"| {bar.text} | {value} | {bar.relation} {limit} | {bar.by} | "
            f"{' / '.join(others)} | {bar.verdict(device)} |"
        )
    return "\n".join(lines) + "\n"
