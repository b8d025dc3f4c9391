# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables: ``python -m benchmarks.report --help``.

A table NAME stands in a Markdown file between the comments ``<!-- benchmarks:NAME:start -->`` and
``<!-- benchmarks:NAME:end -->``, and is written anew from ``benchmarks/results/cpu.csv``; a NAME
like ``cuda-summary`` takes ``benchmarks/results/cuda.csv``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from . import store
from .cases import ATTENTION_LEGEND, FAIR, LEGEND, RIVALS, YARDSTICKS
from .registry import CASES
from .store import Row

ROOT = Path(__file__).resolve().parent.parent

_BLOCK = re.compile(
    r"(?P<start><!-- benchmarks:(?P<name>[a-z0-9-]+):start -->\n)(?P<body>.*?)"
    r"(?P<end><!-- benchmarks:(?P=name):end -->)",
    re.DOTALL,
)
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_ATTENTION = {case.operator for case in CASES["attention"]}
_DASH, _TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


class Group(dict[str, Row]):
    """Rows of one run of a case in one dtype, by rival."""

    @property
    def ours(self) -> Row:
        """The row of tokenops."""
        return self["tokenops"]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Rows by run, in the order of the file."""
    found: dict[tuple[str, ...], Group] = {}
    for row in rows:
        key = tuple(row[name] for name in store.KEY)
        found.setdefault(key, Group())[row["rival"]] = row
    return [group for group in found.values() if "tokenops" in group]


def duration(microseconds: str) -> str:
    """A time in a unit that suits it, with three digits."""
    value = float(microseconds)
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{store.number(value / size, 3)} {unit}"
    return f"{store.number(value, 3)} µs"


def _title(row: Row) -> str:
    """What was timed, in words."""
    name = row["operator"].replace("_forward_backward", " forward+backward")
    return name.replace("_backward", " backward")


def _table(head: list[str], body: list[list[str]], left: int) -> list[str]:
    """A Markdown table whose first columns are flush left and the others flush right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *body]]


def _mark(row: Row) -> str:
    """A star on figures from samples that other work on the machine disturbed."""
    return "\\*" if row["statistics"] == "all" else ""


def _time(group: Group) -> str:
    return duration(group.ours["median_us"]) + _mark(group.ours)


def _factor(group: Group, rival: str) -> str:
    """How many times as long as tokenops a rival takes."""
    row = group.get(rival)
    if row is None:
        return _DASH
    if not row["ratio"]:
        return row["status"]
    return f"{store.number(float(row['ratio']), 3)}{_TIMES}{_mark(row)}"


def _notes(chosen: list[Group], rivals: tuple[str, ...]) -> list[str]:
    """Lines under a table: what did not run and why, and which figures to mistrust."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for group in chosen:
        for rival in rivals:
            row = group.get(rival)
            if row is not None and row["status"] != "ok":
                text = f"{row['status']}: {row['note']}".replace("skipped: ", "")
                reasons.setdefault((row["operator"] + " " + row["case"], text), []).append(rival)
    lines = []
    for (case, text), names in reasons.items():
        lines.append(f"{case}, {', '.join(dict.fromkeys(names))}: {text}.")
    shown = ("tokenops", *rivals)
    if any(name in g and _mark(g[name]) for g in chosen for name in shown):
        lines.append(
            "\\* disturbed: too few samples kept the processor; the median is over all samples."
        )
    if any(g.ours["mode"] == "quick" for g in chosen):
        lines.append("From a quick run: not for quoting.")
    return ["", *(f"- {line}" for line in lines)] if lines else []


def _shape(group: Group, everything: list[Group]) -> str:
    """Sizes, and what else tells runs of the same case apart."""
    text = group.ours["shape"]
    if len({g.ours["threads"] for g in everything}) > 1:
        text += f", {group.ours['threads']} threads"
    if len({g.ours["timer"] for g in everything}) > 1:
        text += f", {group.ours['timer']}"
    return text


def hardware(rows: list[Row]) -> list[str]:
    """What the figures were measured on."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for group in groups(rows):
        names = ("hardware", "cores", "level", "threads", "torch", "python", "tokenops", "malloc")
        found.setdefault(tuple(group.ours[n] for n in names), []).append(group.ours)
    lines = []
    for (name, cores, level, threads, torch, python, version, malloc), ours in found.items():
        peaks = []
        for dtype, short in _SHORT.items():
            of_type = [row for row in ours if row["dtype"] == dtype]
            if of_type:
                peak = max(float(row["peak_gflops"]) for row in of_type)
                mm = max(float(row["mm_gflops"]) for row in of_type)
                source = of_type[0]["peak_source"]
                peaks.append(f"{short} {peak:.0f} GFLOP/s by {source}, {mm:.0f} by torch.mm")
        isa = next((f" ({row['isa']} kernels)" for row in ours if row["isa"]), "")
        allocator = {"tuned": "; malloc keeps large blocks", "": ""}.get(malloc, f"; {malloc}")
        days = sorted({row["date"] for row in ours})
        lines.append(
            f"{name}, {cores} cores ({level}), {threads} threads; torch {torch}, Python {python}, "
            f"tokenops {version}{isa}{allocator}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"
            f". Measured ceilings: {'; '.join(peaks)}."
        )
    return lines


def _summary(
    pick: Callable[[Row], bool], others: tuple[str, ...]
) -> Callable[[list[Row]], list[str]]:
    """A table of a line per case: time of tokenops, and the factors of others, per dtype."""

    def table(rows: list[Row]) -> list[str]:
        chosen = [g for g in groups(rows) if pick(g.ours)]
        return _one_line_each(chosen, others) if chosen else []

    return table


def _one_line_each(everything: list[Group], others: tuple[str, ...]) -> list[str]:
    dtypes = [d for d in _SHORT if any(g.ours["dtype"] == d for g in everything)]
    lines: dict[tuple[str, str, str], dict[str, Group]] = {}
    for group in everything:
        key = (group.ours["operator"], group.ours["case"], _shape(group, everything))
        lines.setdefault(key, {})[group.ours["dtype"]] = group
    head = ["operator", "shape"]
    for dtype in dtypes:
        head += [f"{_SHORT[dtype]} tokenops", *others]
    body = []
    for (_, _, shape), by_dtype in lines.items():
        cells = [_title(next(iter(by_dtype.values())).ours), shape]
        for dtype in dtypes:
            if dtype in by_dtype:
                found = by_dtype[dtype]
                cells += [_time(found), *(_factor(found, rival) for rival in others)]
            else:
                cells += [_DASH] * (1 + len(others))
        body.append(cells)
    return _table(head, body, left=2) + _notes(everything, others)


def _detail(
    pick: Callable[[Row], bool], others: tuple[str, ...]
) -> Callable[[list[Row]], list[str]]:
    """A table of everything about some cases."""

    def table(rows: list[Row]) -> list[str]:
        chosen = [g for g in groups(rows) if pick(g.ours)]
        if not chosen:
            return []
        head = [
            "operator",
            "shape",
            "dtype",
            "served by",
            "tokenops",
            f"p20{_DASH}p80",
            "best",
            "bound",
        ]
        head += ["share of bound", *others, "clean samples"]
        body = []
        for group in chosen:
            ours = group.ours
            span = f"{duration(ours['p20_us'])}{_DASH}{duration(ours['p80_us'])}"
            bound = f"{duration(ours['bound_us'])} ({ours['bound_by']})"
            body.append([
                _title(ours),
                _shape(group, chosen),
                _SHORT.get(ours["dtype"], ours["dtype"]),
                ours["backend"],
                _time(group),
                span,
                duration(ours["best_us"]),
                bound,
                f"{float(ours['bound_share']):.0%}",
                *(_factor(group, rival) for rival in others),
                f"{ours['clean']} of {ours['samples']}",
            ])  # fmt: skip
        return _table(head, body, left=4) + _notes(chosen, others)

    return table


def memory(rows: list[Row]) -> list[str]:
    """Peak memory of one call beyond its inputs."""
    everything = groups(rows)
    chosen = [g for g in everything if any(row["extra_mb"] for row in g.values())]
    if not chosen:
        return []
    possible = (*RIVALS, *YARDSTICKS)
    names = [n for n in possible if any(g.get(n, {}).get("extra_mb") for g in chosen)]
    body = []
    for group in chosen:
        ours = group.ours
        cells = [_title(ours), _shape(group, everything), _SHORT.get(ours["dtype"], "")]
        for name in names:
            extra = group.get(name, {}).get("extra_mb")
            cells.append(f"{extra} MB" if extra else _DASH)
        body.append(cells)
    return _table(["operator", "shape", "dtype", *names], body, left=3)


def legend(rows: list[Row]) -> list[str]:
    """Who is who."""
    attending = [row["operator"] in _ATTENTION for row in rows]
    others = {r["rival"] for r, attends in zip(rows, attending, strict=True) if not attends}
    lines = [f"- *{name}*: {text}." for name, text in LEGEND.items() if name in others]
    present = {r["rival"] for r, attends in zip(rows, attending, strict=True) if attends}
    for name, text in {**LEGEND, **ATTENTION_LEGEND}.items():
        if name not in present or (name in others and name not in ATTENTION_LEGEND):
            continue
        lines.append(f"- *{name}*{' of attention' if name in others else ''}: {text}.")
    return lines


def _is_backward(row: Row) -> bool:
    return row["operator"].endswith("_backward") and row["operator"] not in _ATTENTION


def _is_overhead(row: Row) -> bool:
    return row["case"] == "overhead"


def _is_merging(row: Row) -> bool:
    others = _ATTENTION | {"match"}
    return row["operator"] not in others and not _is_backward(row) and not _is_overhead(row)


def _is_attention(row: Row) -> bool:
    return row["operator"] in _ATTENTION


def _is_scores(row: Row) -> bool:
    return row["operator"] == "attention_scores"


def _is_proportional(row: Row) -> bool:
    return _is_attention(row) and row["case"].endswith("-size")


def _is_keep(row: Row) -> bool:
    return _is_attention(row) and "-keep" in row["case"]


def _is_policy(row: Row) -> bool:
    special = _is_scores(row) or _is_proportional(row) or _is_keep(row)
    return _is_attention(row) and not special


def _is_main(row: Row) -> bool:
    """Cases that stand in the short tables and in the plot."""
    return not _is_keep(row)


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "hardware": hardware,
    "summary": _summary(lambda row: not _is_attention(row), ("eager", "compile", "index")),
    "attention": _summary(
        lambda row: _is_attention(row) and _is_main(row) and not _is_scores(row),
        ("eager", "compile", "sdpa+bias", "sdpa"),
    ),
    "received": _summary(_is_scores, ("eager", "compile")),
    "match": _detail(
        lambda row: row["operator"] == "match",
        ("reference", "eager", "compile", "bmm", "bmm+max"),
    ),
    "merge": _detail(_is_merging, ("reference", "eager", "compile", "index", "copy")),
    "backward": _detail(_is_backward, ("reference", "eager", "compile", "index", "copy")),
    "policy": _detail(
        _is_policy, ("reference", "eager", "compile", "flex", "sdpa+bias", "sdpa", "unweighted")
    ),
    "proportional": _detail(
        _is_proportional, ("reference", "eager", "compile", "sdpa+bias", "sdpa", "unweighted")
    ),
    "keep": _detail(_is_keep, ("reference", "eager", "sdpa+bias", "sdpa", "unweighted")),
    "scores": _detail(_is_scores, ("reference", "eager", "compile", "sdpa")),
    "overhead": _detail(_is_overhead, ("reference", "eager", "compile", "index", "copy")),
    "memory": memory,
    "legend": legend,
}


def render(name: str, results: Path = store.RESULTS) -> str:
    """One table as text that ends in a newline; empty without results.

    Raises:
        ValueError: If there is no such table.
    """
    device, _, table = name.rpartition("-")
    if table not in TABLES:
        choices = ", ".join(TABLES)
        raise ValueError(f"there is no table {name!r}; choose from {choices}, or cuda-NAME")
    lines = TABLES[table](store.read(results / f"{device or 'cpu'}.csv"))
    return "".join(line + "\n" for line in lines)


def update(text: str, results: Path = store.RESULTS) -> str:
    """A Markdown text with all its tables written anew.

    Raises:
        ValueError: If a marker has no partner or there is no table of its name.
    """
    markers = len(re.findall(r"<!-- benchmarks:[^>]*-->", text))
    if markers != 2 * len(_BLOCK.findall(text)):
        raise ValueError("a benchmarks marker has no partner, or a name that is not [a-z0-9-]+")
    return _BLOCK.sub(
        lambda found: found["start"] + render(found["name"], results) + found["end"], text
    )


def fairest(group: Group) -> tuple[str, float] | None:
    """The fastest rival that computes the same without tokenops, and the factor that it takes.

    Returns:
        None if none was measured.
    """
    ratios = {name: group[name]["ratio"] for name in FAIR if name in group}
    found = [(float(ratio), name) for name, ratio in ratios.items() if ratio]
    return min(found)[::-1] if found else None


_COLORS = dict(zip(FAIR, ("#31688e", "#90be6d", "#f9a03f", "#b56576", "#6d597a"), strict=True))


def plot(path: Path, rows: list[Row]) -> None:
    """Draw how many times as long as tokenops the fairest rival takes, a panel per dtype.

    Raises:
        SystemExit: Without matplotlib or results.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("benchmarks.report: --plot needs matplotlib") from None
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "tokenops"  # the same file from the same figures
    from matplotlib import pyplot as plt

    bars = [(g, best) for g in groups(rows) if _is_main(g.ours) and (best := fairest(g))]
    dtypes = [d for d in _SHORT if any(g.ours["dtype"] == d for g, _ in bars)]
    if not dtypes:
        raise SystemExit("benchmarks.report: nothing to plot yet")
    count = max(sum(g.ours["dtype"] == d for g, _ in bars) for d in dtypes)
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(5.5 * len(dtypes), 1.4 + 0.24 * count), squeeze=False, sharex=True
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        chosen = [(g, best) for g, best in bars if g.ours["dtype"] == dtype]
        for y, (_, (rival, ratio)) in enumerate(chosen):
            # A bar starts at 1, where both are as fast.
            axis.barh(y, ratio - 1, 0.7, left=1, color=_COLORS[rival])
            label = f" {store.number(ratio, 2)}{_TIMES} "
            side = "left" if ratio >= 1 else "right"
            axis.text(ratio, y, label, va="center", ha=side, fontsize=7)
        axis.set_yticks(range(len(chosen)))
        axis.set_yticklabels([f"{_title(g.ours)} {g.ours['case']}" for g, _ in chosen], fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"{dtype}: tokenops over its fastest rival", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15, y=0.01)
    present = [name for name in FAIR if any(rival == name for _, (rival, _) in bars)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in present]
    figure.legend(
        handles, present, title="fastest rival that computes the same", fontsize=8,
        title_fontsize=8, loc="lower center", ncols=len(present), frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    stable = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=stable)
    plt.close(figure)


def documents() -> list[Path]:
    """Markdown files that may hold tables."""
    return [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if p.exists()]


def main(argv: list[str] | None = None) -> int:
    """Print and write the tables, or check that they are fresh.

    Returns:
        The exit status: 1 if a check finds a stale file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write results into Markdown files, between their marker comments.",
    )
    parser.add_argument("files", nargs="*", type=Path, help="README.md and docs/ by default")
    parser.add_argument("--check", action="store_true", help="fail if a file is stale; write none")
    parser.add_argument("--print", action="store_true", help="print all tables; write nothing")
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of CSV files")
    parser.add_argument("--device", default="cpu", help="results to print or plot: cpu or cuda")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed-ups: .png or .svg")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None:
        plot(arguments.plot, store.read(arguments.results / f"{arguments.device}.csv"))
        return 0
    if arguments.print:
        for name in TABLES:
            print(f"## {name}\n\n{render(f'{arguments.device}-{name}', arguments.results)}")
        return 0
    stale = []
    for path in arguments.files or documents():
        text = path.read_text(encoding="utf-8")
        try:
            fresh = update(text, arguments.results)
        except ValueError as error:
            raise SystemExit(f"benchmarks.report: {path.name}: {error}") from None
        if fresh != text:
            stale.append(path)
            if not arguments.check:
                path.write_text(fresh, encoding="utf-8")
    for path in stale:
        if arguments.check:
            print(f"{path.name} is stale: run python -m benchmarks.report", file=sys.stderr)
        else:
            print(f"wrote {path.name}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
