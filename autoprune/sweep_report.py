"""The summary of a sweep: a table for people, the same as CSV, JSON and HTML, and the Pareto front."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from autoprune import plots, wording
from autoprune.record import ModelSummary
from autoprune.sweep import Row

HEADS = ("study", "target", "seed", "fate", "top-1 before", "top-1 after", "change, pp", "MACs left",
         "parameters left", "latency left", "time")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Point:
    """One delivered model in the plane of cost and accuracy."""

    name: str
    macs_share: float
    delta_pp: float


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
    svg = plots.to_svg(figure, "pareto") if figure is not None else ""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("autoprune") / "sweep.html.j2").read_text(encoding="utf-8"))
    done = sum(row.is_done for row in rows)
    page.write_text(
        template.render(
            heads=HEADS, rows=[(row, cells(row)) for row in rows], svg=svg, done=done, colours=plots.COLOURS
        ),
        encoding="utf-8",
    )
    return (table, numbers, page, *([out / "pareto.png"] if figure is not None else []))


def cells(row: Row) -> tuple[str, ...]:
    """A row for people, in the order of `HEADS`."""
    record, job = row.record, row.job
    target = job.target or (record.target if record else wording.MISSING)
    seed = job.seed if job.seed is not None else (record.study.get("seed") if record else None)
    first = (Path(job.study).stem, target, wording.MISSING if seed is None else str(seed), row.fate)
    if record is None or record.after is None:
        known = wording.percent(record.before.top1, 2) if record else wording.MISSING
        return (*first, known, *[wording.MISSING] * (len(HEADS) - 5))
    before, after = record.before, record.after
    latency = (
        after.latency_ms / before.latency_ms if before.latency_ms and after.latency_ms is not None else None
    )
    return (
        *first, wording.percent(before.top1, 2), wording.percent(after.top1, 2),
        wording.signed(100 * (after.top1 - before.top1), 2), wording.percent(after.macs / before.macs),
        wording.percent(after.params / before.params), wording.percent(latency),
        wording.duration(record.seconds),
    )  # fmt: skip


def numbers_of(row: Row) -> dict[str, object]:
    """A row for machines."""
    record = row.record
    after: ModelSummary | None = record.after if record else None
    return {
        "study": row.job.study, "target": row.job.target or (record.target if record else None),
        "seed": row.job.seed if row.job.seed is not None else (record.study.get("seed") if record else None),
        "fate": row.fate, "reason": row.reason, "folder": str(row.folder),
        "top1_before": record.before.top1 if record else None, "top1_after": after.top1 if after else None,
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
            name=row.job.name, macs_share=row.record.after.macs / row.record.before.macs,
            delta_pp=100 * (row.record.after.top1 - row.record.before.top1),
        )
        for row in rows
        if row.record is not None and row.record.after is not None
    ]  # fmt: skip


def front(found: Iterable[Point]) -> list[Point]:
    """Those that no other beats in both cost and accuracy, cheapest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.macs_share, -p.delta_pp)):
        if not best or point.delta_pp > best[-1].delta_pp:
            best.append(point)
    return best


def pareto(rows: Iterable[Row]) -> Figure | None:
    """Accuracy kept over MACs left, with the front."""
    found = points(rows)
    if not found:
        return None
    best = front(found)
    with plots.style():
        figure = Figure(figsize=(plots.WIDTH_IN, 4.0))
        axes = figure.add_subplot()
        axes.scatter([100 * p.macs_share for p in found], [p.delta_pp for p in found], s=26,
                     facecolors="none", edgecolors=plots.COLOURS["muted"], label="delivered")  # fmt: skip
        axes.plot([100 * p.macs_share for p in best], [p.delta_pp for p in best], marker="o", markersize=5,
                  color=plots.COLOURS["accent"], label="not beaten by another")  # fmt: skip
        for point in best[:12]:
            axes.annotate(point.name, (100 * point.macs_share, point.delta_pp), (5, 5),
                          textcoords="offset points", fontsize=8, color=plots.COLOURS["ink"])  # fmt: skip
        axes.axhline(0, color=plots.COLOURS["rule"], linewidth=1)
        axes.set_xlabel("MACs left, % of the original")
        axes.set_ylabel("change of top-1 on the test split, pp")
        axes.legend(frameon=False, loc="lower right", handletextpad=0.4)
    return figure
