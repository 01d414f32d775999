"""The summary of a sweep: the answer, a table, the same as CSV, JSON and HTML, and a Pareto front a study."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoprune import formatting
from autoprune.pipeline.sweep import Row
from autoprune.record import ModelSummary
from autoprune.report import packaged, plots, unbroken

HEADS = ("study", "target", "seed", "fate", "top-1 before", "top-1 after", "change, pp", "MACs left",
         "parameters left", "latency left", "time")  # fmt: skip
ALL = {head: head for head in HEADS}
# the columns of a terminal, under names that leave 80 columns room for a study's
SHORT = {
    "study": "study", "target": "target", "seed": "seed", "fate": "fate",
    "top-1 after": "top-1", "change, pp": "pp", "MACs left": "MACs", "time": "time",
}  # fmt: skip
TEXT = HEADS[:4]  # the columns that are words; the others are numbers
LOOKS = (("accent", "o", "-"), ("good", "s", "--"), ("bad", "^", ":"), ("muted", "D", "-."))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One delivered model in the plane of cost and accuracy.

    Attributes:
        study: it belongs to; `name` tells it from the study's others.
        low_pp, high_pp: the 95 % interval of `delta_pp`, where it is known.
    """

    study: str
    name: str
    macs_share: float
    delta_pp: float
    low_pp: float | None = None
    high_pp: float | None = None


def write_summary(rows: Sequence[Row], out: Path) -> tuple[Path, ...]:
    """Write `sweep.csv`, `sweep.json`, `sweep.html` and, once there are models, `pareto.png`."""
    table, page, numbers = out / "sweep.csv", out / "sweep.html", out / "sweep.json"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(numbers_of(rows[0])))
        writer.writeheader()
        writer.writerows(numbers_of(row) for row in rows)
    numbers.write_text(json.dumps([numbers_of(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    figure = pareto(rows)
    if figure is not None:
        plots.save_png(figure, out / "pareto.png")
    page.write_text(_render(rows, figure), encoding="utf-8")
    return (table, numbers, page, *([out / "pareto.png"] if figure is not None else []))


def _render(rows: Sequence[Row], figure: Figure | None) -> str:
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"duration": formatting.duration, "unbroken": unbroken}
    heads, shown = table_of(rows)
    return page.from_string(packaged("sweep.html.j2")).render(
        css=packaged("page.css"), answer=answer(rows), ranges=ranges(rows), heads=heads, text=TEXT,
        rows=list(zip(rows, shown, strict=True)),
        svg=plots.to_svg(figure, "pareto") if figure is not None else "",
        seconds=sum(row.record.seconds for row in rows if row.record is not None),
    )  # fmt: skip


def answer(rows: Sequence[Row]) -> str:
    """What came of the sweep, in one sentence."""
    fates = Counter[str](row.fate for row in rows)
    runs = formatting.plural(len(rows), "run")
    words = {"not reached": "fell short", "failed": "failed", "stopped": "stopped", "waiting": "to be done"}
    others = [f"{fates[fate]} {word}" for fate, word in words.items() if fates[fate]]
    return ", ".join([f"{fates['reached']} of {runs} reached the target", *others]) + "."


def ranges(rows: Sequence[Row]) -> list[str]:
    """A sentence for each study: from its most accurate to its cheapest model that no other one beats."""
    told = []
    for study, found in _by_study(points(rows)).items():
        best = front(found)
        cheapest, last = best[0], best[-1]
        text = f"{study}: {_place(last)}"
        if last is not cheapest:
            text += f", and down to {_place(cheapest)}"
        told.append(text + ".")
    return told


def _place(point: Point) -> str:
    change = f"{formatting.signed(point.delta_pp, 2)} pp of top-1"
    return f"{formatting.percent(point.macs_share)} of the MACs at {change}"


def table_of(
    rows: Sequence[Row], names: Mapping[str, str] = ALL
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The named columns for people; one in which nothing stands is left out."""
    full = [cells(row) for row in rows]
    places = [n for n, head in enumerate(HEADS) if head in names]
    used = [n for n in places if any(line[n] != formatting.MISSING for line in full)]
    return tuple(names[HEADS[n]] for n in used), [tuple(line[n] for n in used) for line in full]


def cells(row: Row) -> tuple[str, ...]:
    """A row for people, in the order of `HEADS`."""
    record, job = row.record, row.job
    target = job.target or (record.target if record else formatting.MISSING)
    seed = job.seed if job.seed is not None else (record.study.get("seed") if record else None)
    first = (Path(job.study).stem, target, formatting.MISSING if seed is None else str(seed), row.fate)
    if record is None or record.after is None:
        known = formatting.percent(record.before.top1, 2) if record else formatting.MISSING
        return (*first, known, *[formatting.MISSING] * (len(HEADS) - 5))
    before, after = record.before, record.after
    latency = (
        after.latency_ms / before.latency_ms if before.latency_ms and after.latency_ms is not None else None
    )
    return (
        *first, formatting.percent(before.top1, 2), formatting.percent(after.top1, 2),
        formatting.signed(100 * (after.top1 - before.top1), 2), formatting.percent(after.macs / before.macs),
        formatting.percent(after.params / before.params), formatting.percent(latency),
        formatting.duration(record.seconds),
    )  # fmt: skip


def numbers_of(row: Row) -> dict[str, object]:
    """A row for machines."""
    record = row.record
    after: ModelSummary | None = record.after if record else None
    paired = record.difference if record else None
    return {
        "study": row.job.study, "target": row.job.target or (record.target if record else None),
        "seed": row.job.seed if row.job.seed is not None else (record.study.get("seed") if record else None),
        "fate": row.fate, "reason": row.reason, "folder": str(row.folder),
        "top1_before": record.before.top1 if record else None, "top1_after": after.top1 if after else None,
        "change_pp": paired.delta_pp if paired else None,
        "change_low_pp": paired.low_pp if paired else None,
        "change_high_pp": paired.high_pp if paired else None,
        "num_samples": after.num_samples if after else None,
        "macs_before": record.before.macs if record else None, "macs_after": after.macs if after else None,
        "params_before": record.before.params if record else None,
        "params_after": after.params if after else None,
        "latency_ms_before": record.before.latency_ms if record else None,
        "latency_ms_after": after.latency_ms if after else None,
        "seconds": record.seconds if record else None,
    }  # fmt: skip


def points(rows: Iterable[Row]) -> list[Point]:
    """The delivered models."""
    return [
        Point(
            study=Path(row.job.study).stem, name=_told_apart(row),
            macs_share=row.record.after.macs / row.record.before.macs,
            delta_pp=100 * (row.record.after.top1 - row.record.before.top1),
            low_pp=row.record.difference.low_pp if row.record.difference else None,
            high_pp=row.record.difference.high_pp if row.record.difference else None,
        )
        for row in rows
        if row.record is not None and row.record.after is not None
    ]  # fmt: skip


def _told_apart(row: Row) -> str:
    job, record = row.job, row.record
    target = job.target or (record.target if record else "")
    return target if job.seed is None else f"{target}, seed {job.seed}"


def _by_study(found: Iterable[Point]) -> dict[str, list[Point]]:
    by: dict[str, list[Point]] = {}
    for point in found:
        by.setdefault(point.study, []).append(point)
    return by


def front(found: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both cost and accuracy, cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.macs_share, -p.delta_pp)):
        if not best or point.delta_pp > best[-1].delta_pp:
            best.append(point)
    return best


def pareto(rows: Iterable[Row]) -> Figure | None:
    """Accuracy kept over MACs left, a front for each study."""
    found = points(rows)
    if not found:
        return None
    with plots.style():
        figure = Figure(figsize=(plots.WIDTH_IN, 4.0))
        axes = figure.add_subplot()
        for number, (study, own) in enumerate(_by_study(found).items()):
            _front_line(axes, study, own, LOOKS[number % len(LOOKS)])
        axes.axhline(0, color=plots.COLOURS["muted"], linewidth=0.8)
        axes.annotate("as the original", (0, 0), (3, 3), xycoords=("axes fraction", "data"), ha="left",
                      textcoords="offset points", fontsize=8, color=plots.COLOURS["muted"])  # fmt: skip
        axes.margins(x=0.12, y=0.15)
        axes.invert_xaxis()  # cheaper is to the right, as in a run's own picture
        axes.set_xlabel("MACs left, % of the original")
        axes.set_ylabel("change of top-1 on the test split, pp")
        plots.legend_above(axes)
    return figure


def _front_line(axes: Axes, study: str, own: Sequence[Point], look: tuple[str, str, str]) -> None:
    colour, marker, line = plots.COLOURS[look[0]], look[1], look[2]
    best = front(own)
    beaten = [p for p in own if p not in best]
    hollow: Any = {"facecolors": "none", "edgecolors": colour, "marker": marker, "s": 26}
    axes.scatter([100 * p.macs_share for p in beaten], [p.delta_pp for p in beaten], **hollow)
    axes.plot([100 * p.macs_share for p in best], [p.delta_pp for p in best], marker=marker, markersize=5.5,
              linestyle=line, linewidth=1.5, color=colour, label=study)  # fmt: skip
    for point in own:
        if point.low_pp is not None and point.high_pp is not None:
            x = 100 * point.macs_share
            axes.plot([x, x], [point.low_pp, point.high_pp], color=colour, linewidth=0.9, alpha=0.5)
    for point in best[:12]:
        axes.annotate(point.name, (100 * point.macs_share, point.delta_pp), (6, 5), fontsize=8,
                      textcoords="offset points", color=plots.COLOURS["ink"])  # fmt: skip
