# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown tables and as a plot: ``python -m benchmarks.report --help``.

A table NAME stands in a Markdown file between the comments ``<!-- benchmarks:NAME:start -->`` and
``<!-- benchmarks:NAME:end -->``, and is written anew from ``benchmarks/results/cpu.csv``; a NAME
like ``cuda-summary`` takes ``benchmarks/results/gpu.csv``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from . import store
from .cases import ATTENTION_LEGEND, FAIR, LEGEND, RIVALS, YARDSTICKS
from .registry import CASES

ROOT = Path(__file__).resolve().parent.parent

_BLOCK = re.compile(
    r"(?P<start><!-- benchmarks:(?P<name>[a-z0-9-]+):start -->\n).*?"
    r"(?P<end><!-- benchmarks:(?P=name):end -->)",
    re.DOTALL,
)
_KEY = list(store.KEY)
_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
_FAMILY = {case.operator: word for word, cases in CASES.items() for case in cases}
_DASH, _TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def load(path: Path) -> pd.DataFrame:
    """Rows of a file as text, with cells of tables: kind, title, time and factor."""
    rows = pd.DataFrame(columns=list(store.COLUMNS), dtype=str)
    if path.exists():
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    star = rows.statistics.replace({"all": "\\*", "clean": ""})
    title = rows.operator.str.replace("_forward_backward", " forward+backward")
    factor = rows.ratio.map(lambda text: store.number(float(text), 3) + _TIMES if text else "")
    return rows.assign(
        kind=[kind_of(*names) for names in zip(rows.operator, rows.case, strict=True)],
        title=title.str.replace("_backward", " backward"),
        time=rows.median_us.map(duration) + star,
        factor=(factor + star).where(rows.ratio != "", rows.status),
    )


def kind_of(operator: str, case: str) -> str:
    """The detailed table in which a case stands."""
    family = _FAMILY.get(operator)
    if operator == "attention_scores":
        return "scores"
    if family == "attention":
        return "proportional" if case.endswith("-size") else "keep" if "-keep" in case else "policy"
    if family == "merging" and case != "overhead":
        return "backward" if operator.endswith("_backward") else "merge"
    return {"matching": "match", "merging": "overhead"}.get(family, "models")


def duration(microseconds: str) -> str:
    """A time in a unit that suits it, with three digits; nothing if it was not measured."""
    if not microseconds:
        return ""
    value = float(microseconds)
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{store.number(value / size, 3)} {unit}"
    return f"{store.number(value, 3)} µs"


def _runs(rows: pd.DataFrame, rivals: Iterable[str], values: str = "factor") -> pd.DataFrame:
    """The rows of tokenops with a column for each rival; shapes name settings that differ."""
    ours = rows[rows.rival == "tokenops"].set_index(_KEY, drop=False)
    wide = rows.pivot(index=_KEY, columns="rival", values=values).reindex(columns=list(rivals))
    ours = ours.drop(columns="tokenops")  # the version: a column of the rival may replace it
    ours = ours.join(wide.astype(object).where(wide.notna() & (wide != ""), _DASH))
    for name, unit in (("threads", " threads"), ("timer", "")):
        if ours[name].nunique() > 1:
            ours["shape"] += ", " + ours[name] + unit
    return ours.reset_index(drop=True)


def _table(head: list[str], body: Iterable[Iterable[str]], left: int) -> list[str]:
    """A Markdown table whose first columns are flush left and the others flush right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *body]]


def _notes(rows: pd.DataFrame, rivals: tuple[str, ...]) -> list[str]:
    """Lines under a table: the rivals that did not run and why, and figures to mistrust."""
    shown = rows[rows.rival.isin(["tokenops", *rivals])]
    bad = shown[(shown.status != "ok") & (shown.rival != "tokenops")]
    name = bad.operator + " " + bad.case
    text = (bad.status + ": " + bad.note).str.replace("skipped: ", "")
    lines = [
        f"{case}, {', '.join(names.unique())}: {reason}."
        for (case, reason), names in bad.rival.groupby([name, text], sort=False)
    ]
    if (shown.statistics == "all").any():
        lines.append(
            "\\* disturbed: too few samples kept the processor; the median is over all samples."
        )
    if (shown["mode"] == "quick").any():
        lines.append("From a quick run: not for quoting.")
    return ["", *(f"- {line}" for line in lines)] if lines else []


def _lines(rows: pd.DataFrame, rivals: tuple[str, ...]) -> list[str]:
    """A line per case: time of tokenops and factors of rivals, per dtype."""
    if rows.empty:
        return []
    runs = _runs(rows, rivals)
    dtypes = [dtype for dtype in _SHORT if (runs.dtype == dtype).any()]
    line = ["title", "case", "shape"]
    wide = runs.pivot(index=line, columns="dtype", values=["time", *rivals]).fillna(_DASH)
    wide = wide.reindex(pd.MultiIndex.from_frame(runs[line].drop_duplicates()))
    cells = wide[[(name, dtype) for dtype in dtypes for name in ("time", *rivals)]].to_numpy()
    body = [[title, shape, *row] for (title, _, shape), row in zip(wide.index, cells, strict=True)]
    head = [name for dtype in dtypes for name in (f"{_SHORT[dtype]} tokenops", *rivals)]
    return _table(["operator", "shape", *head], body, left=2) + _notes(rows, rivals)


def _summary(kinds: tuple[str, ...], rivals: tuple[str, ...], rows: pd.DataFrame) -> list[str]:
    return _lines(rows[rows.kind.isin(kinds)], rivals)


def _headline(rows: pd.DataFrame) -> list[str]:
    """A line per case of a few, with the fastest rival that computes the same."""
    rows = rows[rows.case.isin(["vit-b", "sd", "vit-b-size", "vit-b-class", "vit-b-columns"])]
    best = fairest(rows)
    best = best.assign(rival="fastest rival", factor=best.factor + " " + best.rival)
    return _lines(pd.concat([rows[rows.rival == "tokenops"], best]), ("fastest rival",))


def _detail(kind: str, rivals: tuple[str, ...], rows: pd.DataFrame) -> list[str]:
    """All figures of some cases, a line per case and dtype."""
    rows = rows[rows.kind == kind]
    if rows.empty:
        return []
    runs = _runs(rows, rivals)
    table = pd.DataFrame({
        "operator": runs.title,
        "shape": runs["shape"],
        "dtype": runs.dtype.replace(_SHORT),
        "served by": runs.backend,
        "tokenops": runs.time,
        f"p20{_DASH}p80": runs.p20_us.map(duration) + _DASH + runs.p80_us.map(duration),
        "best": runs.best_us.map(duration),
        "bound": runs.bound_us.map(duration) + " (" + runs.bound_by + ")",
        "share of bound": runs.bound_share.map(lambda share: share and f"{float(share):.0%}"),
        **{name: runs[name] for name in rivals},
        "clean samples": runs.clean + " of " + runs.samples,
    })  # fmt: skip
    return _table(list(table), table.to_numpy(), left=4) + _notes(rows, rivals)


def _memory(rows: pd.DataFrame) -> list[str]:
    used = rows[rows.extra_mb != ""]
    names = [name for name in (*RIVALS, *YARDSTICKS) if (used.rival == name).any()]
    if not names:
        return []
    runs = _runs(rows.assign(cell=rows.extra_mb.map(lambda mb: mb and mb + " MB")), names, "cell")
    runs = runs[(runs[names] != _DASH).any(axis=1)]
    runs["dtype"] = runs.dtype.replace(_SHORT)
    body = runs[["title", "shape", "dtype", *names]].to_numpy()
    return _table(["operator", "shape", "dtype", *names], body, left=3)


def _hardware(rows: pd.DataFrame) -> list[str]:
    """The machine that the figures were measured on."""
    names = ["hardware", "cores", "level", "threads", "torch", "python", "tokenops", "malloc"]
    lines = []
    measured = rows[(rows.rival == "tokenops") & (rows.status == "ok")]
    for values, ours in measured.groupby(names, sort=False):
        name, cores, level, threads, torch, python, version, malloc = values
        peaks = []
        for dtype, of in ours.groupby("dtype", sort=False):
            peak, mm = (of[c].astype(float).max() for c in ("peak_gflops", "mm_gflops"))
            source = of.peak_source.iloc[0]
            peaks.append(f"{_SHORT[dtype]} {peak:.0f} GFLOP/s by {source}, {mm:.0f} by torch.mm")
        isa = next((f" ({isa} kernels)" for isa in ours.isa if isa), "")
        allocator = {"tuned": "; malloc keeps large blocks", "": ""}.get(malloc, f"; {malloc}")
        days = " to ".join(dict.fromkeys((ours.date.min(), ours.date.max())))
        lines.append(
            f"{name}, {cores} cores ({level}), {threads} threads; torch {torch}, Python {python}, "
            f"tokenops {version}{isa}{allocator}; {days}. Measured ceilings: {'; '.join(peaks)}."
        )
    return lines


def _legend(rows: pd.DataFrame) -> list[str]:
    attends = rows.operator.map(_FAMILY) == "attention"
    present, others = set(rows.rival[attends]), set(rows.rival[~attends])
    lines = [f"- *{name}*: {text}." for name, text in LEGEND.items() if name in others]
    for name, text in {**LEGEND, **ATTENTION_LEGEND}.items():
        if name in present and (name not in others or name in ATTENTION_LEGEND):
            lines.append(f"- *{name}*{' of attention' if name in others else ''}: {text}.")
    return lines


_MERGING = ("reference", "eager", "compile", "index", "copy")
_ATTENTION = ("sdpa+bias", "sdpa", "unweighted")
_DETAILS = {
    "match": ("reference", "eager", "compile", "bmm", "bmm+max"),
    "merge": _MERGING,
    "backward": _MERGING,
    "policy": ("reference", "eager", "compile", "flex", *_ATTENTION),
    "proportional": ("reference", "eager", "compile", *_ATTENTION),
    "keep": ("reference", "eager", *_ATTENTION),
    "scores": ("reference", "eager", "compile", "sdpa"),
    "overhead": _MERGING,
    "models": ("eager", "dense", "slicing"),
}
_SUMMARIES = {
    "summary": (("match", "merge", "backward", "overhead"), ("eager", "compile", "index")),
    "attention": (("policy", "proportional"), ("eager", "compile", "sdpa+bias", "sdpa")),
    "received": (("scores",), ("eager", "compile")),
}
TABLES: dict[str, Callable[[pd.DataFrame], list[str]]] = {
    "hardware": _hardware,
    "headline": _headline,
    **{name: partial(_summary, *of) for name, of in _SUMMARIES.items()},
    **{kind: partial(_detail, kind, rivals) for kind, rivals in _DETAILS.items()},
    "memory": _memory,
    "legend": _legend,
}


def render(name: str, results: Path = store.RESULTS) -> str:
    """One table as text that ends in a newline; empty without results.

    Raises:
        ValueError: If there is no such table.
    """
    device = "cuda" if name.startswith("cuda-") else "cpu"
    table = TABLES.get(name.removeprefix("cuda-"))
    if table is None:
        choices = ", ".join(TABLES)
        raise ValueError(f"there is no table {name!r}; choose from {choices}, or cuda-NAME")
    return "".join(line + "\n" for line in table(load(results / store.FILES[device])))


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


def fairest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each run, the row of the fastest rival that computes the same without tokenops."""
    fair = rows[rows.rival.isin(FAIR) & (rows.ratio != "")]
    ratio = fair.ratio.astype(float)
    return fair.loc[ratio.groupby([fair[name] for name in _KEY], sort=False).idxmin()]


_COLORS = dict(zip(FAIR, ("#31688e", "#90be6d", "#f9a03f", "#b56576", "#6d597a"), strict=True))


def plot(path: Path, rows: pd.DataFrame) -> None:
    """Draw how many times as long as tokenops the fastest fair rival takes, a panel per dtype."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "tokenops"  # the same file from the same figures
    from matplotlib import pyplot as plt

    bars = fairest(rows[rows.kind != "keep"])
    panels = [bars[bars.dtype == dtype] for dtype in _SHORT if (bars.dtype == dtype).any()]
    size = (5.5 * len(panels), 1.4 + 0.24 * max(map(len, panels)))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharex=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        ratios = panel.ratio.astype(float).to_numpy()
        # A bar starts at 1, where both are as fast.
        axis.barh(range(len(panel)), ratios - 1, 0.7, left=1, color=panel.rival.map(_COLORS))
        for y, ratio in enumerate(ratios):
            side = "left" if ratio >= 1 else "right"
            label = f" {store.number(ratio, 2)}{_TIMES} "
            axis.text(ratio, y, label, va="center", ha=side, fontsize=7)
        axis.set_yticks(range(len(panel)), panel.title + " " + panel.case, fontsize=8)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"{panel.dtype.iloc[0]}: tokenops over its fastest rival", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15, y=0.01)
    present = [name for name in FAIR if (bars.rival == name).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=_COLORS[name]) for name in present]
    figure.legend(
        handles, present, title="fastest rival that computes the same", fontsize=8,
        title_fontsize=8, loc="lower center", ncols=len(present), frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Write the tables; or check that they are fresh, and return 1 if a file is stale."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Write results into Markdown files, between their marker comments.",
    )
    parser.add_argument("files", nargs="*", type=Path, help="README.md and docs/ by default")
    parser.add_argument("--check", action="store_true", help="fail if a file is stale; write none")
    parser.add_argument("--results", type=Path, default=store.RESULTS, help="folder of CSV files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed-ups: .png or .svg")
    options = parser.parse_args(argv)
    if options.plot is not None:
        plot(options.plot, load(options.results / store.FILES["cpu"]))
        return 0
    stale = 0
    for path in options.files or (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        try:
            fresh = update(text, options.results)
        except ValueError as error:
            raise SystemExit(f"benchmarks.report: {path.name}: {error}") from None
        if fresh == text:
            continue
        if options.check:
            print(f"{path.name} is stale: run python -m benchmarks.report", file=sys.stderr)
            stale = 1
        else:
            path.write_text(fresh, encoding="utf-8")
            print(f"wrote {path.name}")
    return stale


if __name__ == "__main__":
    sys.exit(main())
