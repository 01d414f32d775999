"""The pictures of a run, each a function from a `RunRecord` to a matplotlib figure.

One drawing serves twice: as a PNG on white paper, and as an SVG inside the report, where the colours below
become CSS variables, so that the page decides between light and dark and between fonts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from autoprune.formatting import percent, signed
from autoprune.pruning import COLUMNS, Cell, MeasuredPoint, Prospect, cells
from autoprune.record import RunRecord
from autoprune.report.series import PathSeries, path_series, schedules, width_series

# Name of the CSS variable -> its colour on white. All differ, since the SVG is searched for them.
COLOURS = {
    "ink": "#1c2126", "muted": "#68727d", "rule": "#dfe3e7", "paper": "#fefefe",
    "accent": "#2463c9", "good": "#147a52", "bad": "#b9480e", "pale": "#c9d6ea",
}  # fmt: skip
WIDTH_IN = 8.4
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "autoprune", "font.size": 9, "axes.labelsize": 9,
    "axes.titlesize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
    "axes.edgecolor": COLOURS["rule"], "axes.labelcolor": COLOURS["muted"], "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6, "xtick.major.size": 0, "ytick.major.size": 0, "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": "none", "lines.solid_capstyle": "round", "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
}  # fmt: skip
STRONG = 0.6  # from this strength on, a cell's colour makes grey letters hard to read; a guess
MAX_LABELLED = 70  # layers or groups whose names are written out; beyond, names would overlap; a guess

Draw = Callable[[RunRecord], Figure | None]


@contextmanager
def style() -> Iterator[None]:
    """Draw in the report's style for the length of a `with` block."""
    with mpl.rc_context(STYLE):
        yield


def draw_all(record: RunRecord) -> dict[str, Figure]:
    """Draw every picture that this record has the numbers for; return the figures by name."""
    with style():
        figures = {name: draw(record) for name, draw in PLOTS.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG on white."""
    with style():
        figure.savefig(path, dpi=160)


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element in the page's colours and fonts; `name` keeps its ids apart."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--font)", svg)
    svg = re.sub(r"(font: [^;\"]*?px) [^;\"]+", r"\1 var(--font)", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", '<svg role="img"', 1)


def path(record: RunRecord) -> Figure | None:
    """Draw accuracy over cost, with every trial, the promoted line, the floor and the target."""
    series = path_series(record)
    if series is None:
        return None
    figure = Figure(figsize=(WIDTH_IN, 4.0))
    axes = figure.add_subplot()
    _dots(axes, series)
    _promoted_line(axes, series)
    _delivered(axes, series)
    axes.axhline(series.floor, color=COLOURS["bad"], linewidth=1, dashes=(5, 3))
    axes.axvline(series.target, color=COLOURS["muted"], linewidth=1, dashes=(2, 2))
    axes.set_xlim(102, min(series.target, *(p.left for p in series.trials)) - 4)
    axes.set_ylim(series.bottom, series.top)
    axes.annotate(f"floor {percent(record.floor)}", (0, series.floor), (3, 3), va="bottom", ha="left",
                  xycoords=("axes fraction", "data"), textcoords="offset points", color=COLOURS["bad"],
                  fontsize=8.5)  # fmt: skip
    axes.annotate(f"target {percent(record.target_share, 0)}", (series.target, 1), (4, -3),
                  xycoords=("data", "axes fraction"), textcoords="offset points", va="top",
                  color=COLOURS["muted"], fontsize=8.5)  # fmt: skip
    axes.set_xlabel(f"{series.metric} left, % of the original")
    axes.set_ylabel("top-1 on the search split, %")
    legend_above(axes)
    return figure


def legend_above(axes: Axes) -> None:
    """Put a legend in one line above the picture, where it covers nothing."""
    axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0,
                borderaxespad=0.4, handletextpad=0.4, columnspacing=1.4)  # fmt: skip


def _dots(axes: Axes, series: PathSeries) -> None:
    bottom = series.bottom
    above = [p for p in series.trials if p.top1 >= bottom]
    kinds = (
        ("recovered", [p for p in series.trials if p.trial.recovered], "o", COLOURS["good"], COLOURS["good"]),
        ("below its floor", [p for p in above if not p.trial.recovered], "o", "none", COLOURS["muted"]),
        ("lower still", [p for p in series.trials if p.top1 < bottom], "v", "none", COLOURS["muted"]),
    )
    for label, points, marker, face, edge in kinds:
        if points:
            axes.scatter([p.left for p in points], [max(p.top1, bottom + 0.05) for p in points],
                         s=26, marker=marker, facecolors=face, edgecolors=edge, linewidths=1.1, label=label,
                         zorder=3, clip_on=False)  # fmt: skip


def _promoted_line(axes: Axes, series: PathSeries) -> None:
    line = [(100.0, series.original), *((p.left, p.top1) for p in series.promoted)]
    for point in series.promoted:
        axes.annotate(str(point.round), (point.left, point.top1), (-7, 6), textcoords="offset points",
                      ha="center", fontsize=9, fontweight="bold", color=COLOURS["accent"])  # fmt: skip
    axes.plot(*zip(*line, strict=True), color=COLOURS["accent"], linewidth=1.8, zorder=4,
              label="promoted, by round",
              marker="o", markersize=6.5, markerfacecolor=COLOURS["paper"], markeredgewidth=1.8)  # fmt: skip
    axes.annotate("original", line[0], (-5, 9), textcoords="offset points", ha="left", fontsize=8.5,
                  color=COLOURS["accent"])  # fmt: skip


def _delivered(axes: Axes, series: PathSeries) -> None:
    """Mark the delivered network, with a line from the trial that it was tuned from."""
    point = series.delivered
    if point is None:
        return
    start = max(series.bottom, 100 * (point.trial.top1 or 0.0))
    axes.plot([point.left, point.left], [start, point.top1], color=COLOURS["accent"], linewidth=1.2,
              linestyle=":", zorder=4)  # fmt: skip
    axes.plot([point.left], [point.top1], "D", color=COLOURS["accent"], markersize=6.5, zorder=5,
              linestyle="none", label="delivered")  # fmt: skip


def widths(record: RunRecord) -> Figure | None:
    """Draw the channels of every layer before and after, in the network's order."""
    after = record.after
    if after is None or not after.widths:
        return None
    series = width_series(record.before.widths, after.widths)
    names, old, new = [w.name for w in series], [w.before for w in series], [w.after for w in series]
    figure = Figure(figsize=(WIDTH_IN, 0.7 + 0.2 * min(len(names), MAX_LABELLED)))
    axes = figure.add_subplot()
    rows = range(len(names))
    axes.barh(rows, old, height=0.72, color=COLOURS["pale"], label="before")
    axes.barh(rows, new, height=0.72, color=COLOURS["accent"], label="after")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max(old))
    if len(names) <= MAX_LABELLED:
        axes.set_yticks(list(rows), names)
        for row, (was, now) in enumerate(zip(old, new, strict=True)):
            text = f"{was} → {now}" if was != now else f"{was}"
            axes.annotate(text, (was, row), (5, 0), textcoords="offset points", va="center", fontsize=8,
                          color=COLOURS["ink"] if was != now else COLOURS["muted"])  # fmt: skip
    else:
        axes.set_ylabel(f"{len(names)} layers, input at the top")
        axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("output channels")
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), handlelength=1, borderpad=0)
    return figure


def sensitivity(record: RunRecord) -> Figure | None:
    """Draw the accuracy lost when one group alone is pruned, as the first round measured it."""
    first = next((r for r in record.rounds if r.sensitivity), None)
    return None if first is None else heat_map(first.sensitivity)


def heat_map(points: Sequence[MeasuredPoint]) -> Figure:
    """Draw the losses by group and ratio; one that was read off a curve has a smaller, paler number."""
    rows = cells(points)
    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows.values())]
    worst = max(1.0, *(p.drop_pp for p in points))
    figure = Figure(figsize=(WIDTH_IN, 0.6 + 0.21 * min(len(rows), MAX_LABELLED)))
    axes = figure.add_subplot()
    axes.set_xlim(-0.5, len(used) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for line, row in enumerate(rows.values()):
        for column, cell in ((column, row[c]) for column, c in enumerate(used)):
            if cell is not None:
                _heat_cell(axes, (column, line), cell, worst, labelled=len(rows) <= MAX_LABELLED)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(used)), [percent(COLUMNS[c], 0) for c in used])
    axes.set_title("removed of the group", loc="left", color=COLOURS["muted"])
    axes.set_yticks(range(len(rows)), list(rows)) if len(rows) <= MAX_LABELLED else axes.set_yticks([])
    return figure


def _heat_cell(axes: Axes, cell_xy: tuple[int, int], cell: Cell, worst: float, *, labelled: bool) -> None:
    strength = min(1.0, max(0.0, cell.drop_pp) / worst) ** 0.5  # the root keeps small losses visible
    axes.barh(
        cell_xy[1], 0.97, left=cell_xy[0] - 0.485, height=0.9, color=COLOURS["bad"], alpha=0.85 * strength
    )
    if labelled:
        look: Any = {"fontsize": 8 if cell.is_measured else 7}
        look["color"] = COLOURS["ink" if cell.is_measured or strength > STRONG else "muted"]
        axes.annotate(signed(-cell.drop_pp), cell_xy, ha="center", va="center", **look)


def write_analysis_plots(
    points: Sequence[MeasuredPoint], prospects: Sequence[Prospect], intact: float, folder: Path
) -> None:
    """Write the pictures of an analysis, `sensitivity.png` and `prunability.png`, into a folder.

    Args:
        points: the points of the sensitivity table.
        prospects: the top-1 that is left at several costs.
        intact: top-1 of the network before anything is removed, in [0, 1].
        folder: an existing folder.
    """
    with style():
        save_png(heat_map(points), folder / "sensitivity.png")
        save_png(prunability(prospects, intact), folder / "prunability.png")


def prunability(prospects: Sequence[Prospect], intact: float) -> Figure:
    """Draw top-1 over the multiply-adds left, for pruning in one step without fine-tuning."""
    with style():
        figure = Figure(figsize=(WIDTH_IN, 3.0))
        axes = figure.add_subplot()
        colours = {"safe": COLOURS["good"], "marginal": COLOURS["accent"], "hopeless": COLOURS["bad"]}
        shares = [1.0, *(p.macs_share for p in prospects)]
        axes.plot(shares, [100 * intact, *(100 * p.top1 for p in prospects)],
                  color=COLOURS["muted"], linewidth=1.2)  # fmt: skip
        for region, colour in colours.items():
            points = [p for p in prospects if p.region == region]
            if points:
                axes.plot([p.macs_share for p in points], [100 * p.top1 for p in points], "o", color=colour,
                          label=region)  # fmt: skip
        axes.invert_xaxis()
        axes.xaxis.set_major_formatter(lambda value, _: percent(value, 0))
        axes.set_xlabel("MACs left")
        axes.set_ylabel("top-1, %")
        axes.legend(frameon=False)
    return figure


def curves(record: RunRecord) -> Figure | None:
    """Draw the training loss and the learning rate of every trial; the promoted ones stand out."""
    trials = [t for r in record.rounds for t in r.trials if len(t.epochs) > 1]
    if not trials:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.0))
    left, right = figure.subplots(1, 2)
    for trial in sorted(trials, key=lambda t: t.promoted):
        look = {"color": COLOURS["accent"], "linewidth": 1.8} if trial.promoted else {
            "color": COLOURS["muted"], "linewidth": 0.8, "alpha": 0.55}  # fmt: skip
        for part in schedules(trial):
            epochs = [p.epoch for p in part]
            left.plot(epochs, [p.train_loss for p in part], marker="o", markersize=2.5, **look)
            right.plot(epochs, [p.lr for p in part], marker="o", markersize=2.5, **look)
    highest = max((p.lr for t in trials for p in t.epochs), default=1.0) or 1.0
    right.set_yscale("log")
    right.set_ylim(highest / 1000, highest * 1.5)  # decays end at or near zero: three decades tell enough
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.yaxis.set_minor_locator(NullLocator())
    for axes, title in ((left, "training loss"), (right, "learning rate")):
        axes.set_title(title, loc="left", color=COLOURS["ink"])
        axes.set_xlabel("epochs of fine-tuning")
        axes.set_xlim(left=0)
    return figure


def tuning(record: RunRecord) -> Figure | None:
    """Draw the training loss and the learning rate of the final fine-tuning."""
    final = record.tuning
    if final is None or len(final.epochs) < 2:
        return None
    look: Any = {"color": COLOURS["accent"], "linewidth": 1.8}
    figure = Figure(figsize=(WIDTH_IN, 2.4))
    left, right = figure.subplots(1, 2)
    left.plot([p.epoch for p in final.epochs], [p.train_loss for p in final.epochs], **look)
    right.plot([p.epoch for p in final.epochs], [p.lr for p in final.epochs], **look)
    for axes, title in ((left, "training loss"), (right, "learning rate")):
        axes.set_title(title, loc="left", color=COLOURS["ink"])
        axes.set_xlabel("epochs of the final tuning")
        axes.set_xlim(left=0)
    return figure


PLOTS: dict[str, Draw] = {
    "path": path, "widths": widths, "sensitivity": sensitivity, "curves": curves, "tuning": tuning,
}  # fmt: skip
