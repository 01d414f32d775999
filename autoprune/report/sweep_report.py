"""The summary of a sweep: one sentence, a table, the same as CSV, JSON and HTML, each study's Pareto front.

A `Job` is one study with one target and one seed; a `JobResult` is its result, read from its
run.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autoprune import formatting
from autoprune.record import ModelSummary, RunRecord
from autoprune.report import plots
from autoprune.report.page import keep_units_together, read_asset
from autoprune.serialization import json_text

JobState = Literal["reached", "not reached", "failed", "stopped", "waiting"]
# A column's name in full, and in a terminal: there 80 columns leave room for a study's name.
COLUMNS = {
    "study": "study", "target": "target", "seed": "seed", "state": "state", "top-1 before": None,
    "top-1 after": "top-1", "change, pp": "pp", "MACs left": "MACs", "parameters left": None,
    "latency left": None, "time": "time",
}  # fmt: skip
TEXT_COLUMNS = ("study", "target", "seed", "state")
LOOKS = (("accent", "o", "-"), ("good", "s", "--"), ("bad", "^", ":"), ("muted", "D", "-."))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep; a `target` or `seed` of None leaves what the study says."""

    study: str
    target: str | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the job's folder."""
        parts = [Path(self.study).stem]
        parts += [self.target.replace("=", "-")] if self.target else []
        parts += [f"seed-{self.seed}"] if self.seed is not None else []
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """A job and its result; `record` is None where the original was not measured."""

    job: Job
    state: JobState
    folder: Path
    record: RunRecord | None
    reason: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing of the job is left to do."""
        return self.state in ("reached", "not reached")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One delivered model in the plane of cost and accuracy.

    Attributes:
        study: the study that the model belongs to; `name` tells it from the study's other models.
        low_pp, high_pp: the ends of the 95 % interval of `delta_pp`, where it is known.
    """

    study: str
    name: str
    macs_share: float
    delta_pp: float
    low_pp: float | None = None
    high_pp: float | None = None


def write_sweep_report(rows: Sequence[JobResult], out: Path) -> tuple[Path, ...]:
    """Write `sweep.csv`, `sweep.json`, `sweep.html` and, once there are models, `pareto.png`.

    Return the paths of the files.

    Return the paths of the files.
    """
    table, page, numbers = out / "sweep.csv", out / "sweep.html", out / "sweep.json"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row_numbers(rows[0])))
        writer.writeheader()
        writer.writerows(row_numbers(row) for row in rows)
    numbers.write_text(json_text([row_numbers(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    figure = pareto(rows)
    if figure is not None:
        plots.save_png(figure, out / "pareto.png")
    page.write_text(_render(rows, figure), encoding="utf-8")
    return (table, numbers, page, *([out / "pareto.png"] if figure is not None else []))


def _render(rows: Sequence[JobResult], figure: Figure | None) -> str:
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"duration": formatting.duration, "keep_units_together": keep_units_together}
    table = sweep_table(rows)
    return page.from_string(read_asset("sweep.html.j2")).render(
        css=read_asset("page.css"), answer=sweep_answer(rows), ranges=sweep_ranges(rows), heads=table.heads,
        text=TEXT_COLUMNS, rows=list(zip(rows, table.rows, strict=True)),
        svg=plots.to_svg(figure, "pareto") if figure is not None else "",
        seconds=sum(row.record.seconds for row in rows if row.record is not None),
    )  # fmt: skip


def sweep_answer(rows: Sequence[JobResult]) -> str:
    """Describe the result of the sweep in one sentence."""
    states = Counter[str](row.state for row in rows)
    runs = formatting.plural(len(rows), "run")
    words = {"not reached": "fell short", "failed": "failed", "stopped": "stopped", "waiting": "to be done"}
    others = [f"{states[state]} {word}" for state, word in words.items() if states[state]]
    return ", ".join([f"{states['reached']} of {runs} reached the target", *others]) + "."


def sweep_ranges(rows: Sequence[JobResult]) -> list[str]:
    """Return a sentence for each study: the most accurate and the cheapest model of its Pareto front."""
    sentences = []
    for study, points in _by_study(pareto_points(rows)).items():
        front = pareto_front(points)
        cheapest, most_accurate = front[0], front[-1]
        text = f"{study}: {_place(most_accurate)}"
        if most_accurate is not cheapest:
            text += f", and down to {_place(cheapest)}"
        sentences.append(text + ".")
    return sentences


def _place(point: Point) -> str:
    change = f"{formatting.signed(point.delta_pp, 2)} pp of top-1"
    return f"{formatting.percent(point.macs_share)} of the MACs at {change}"


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """A sweep for people: `heads` name the columns, and each of `rows` has one text a column."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sweep_table(results: Sequence[JobResult], *, short: bool = False) -> SweepTable:
    """Return the table of a sweep without its empty columns.

    Args:
        results: the jobs' results, one row each.
        short: take only the columns that fit a terminal, under their short names.
    """
    rows = [row_cells(result) for result in results]
    heads = [brief if short else name for name, brief in COLUMNS.items()]
    used = [
        (column, head)
        for column, head in enumerate(heads)
        if head is not None and any(row[column] != formatting.MISSING for row in rows)
    ]
    return SweepTable(
        heads=tuple(head for _, head in used), rows=tuple(tuple(row[c] for c, _ in used) for row in rows)
    )


def row_cells(row: JobResult) -> tuple[str, ...]:
    """Return a job's row for people, in the order of `COLUMNS`."""
    record, job = row.record, row.job
    target = job.target or (record.target if record else formatting.MISSING)
    seed = job.seed if job.seed is not None else (record.study.get("seed") if record else None)
    first = (Path(job.study).stem, target, formatting.MISSING if seed is None else str(seed), row.state)
    if record is None or record.after is None:
        before = formatting.percent(record.before.top1, 2) if record else formatting.MISSING
        return (*first, before, *[formatting.MISSING] * (len(COLUMNS) - 5))
    original, after = record.before, record.after
    latency = (
        after.latency_ms / original.latency_ms
        if original.latency_ms and after.latency_ms is not None
        else None
    )
    return (
        *first, formatting.percent(original.top1, 2), formatting.percent(after.top1, 2),
        formatting.signed(100 * (after.top1 - original.top1), 2),
        formatting.percent(after.macs / original.macs), formatting.percent(after.params / original.params),
        formatting.percent(latency),
        formatting.duration(record.seconds),
    )  # fmt: skip


def row_numbers(row: JobResult) -> dict[str, object]:
    """Return a job's row for machines, by column name."""
    record = row.record
    after: ModelSummary | None = record.after if record else None
    paired = record.difference if record else None
    return {
        "study": row.job.study, "target": row.job.target or (record.target if record else None),
        "seed": row.job.seed if row.job.seed is not None else (record.study.get("seed") if record else None),
        "state": row.state, "reason": row.reason, "folder": str(row.folder),
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


def pareto_points(rows: Iterable[JobResult]) -> list[Point]:
    """Return the delivered models as points."""
    return [
        Point(
            study=Path(row.job.study).stem, name=_point_name(row),
            macs_share=row.record.after.macs / row.record.before.macs,
            delta_pp=100 * (row.record.after.top1 - row.record.before.top1),
            low_pp=row.record.difference.low_pp if row.record.difference else None,
            high_pp=row.record.difference.high_pp if row.record.difference else None,
        )
        for row in rows
        if row.record is not None and row.record.after is not None
    ]  # fmt: skip


def _point_name(row: JobResult) -> str:
    job, record = row.job, row.record
    target = job.target or (record.target if record else "")
    return target if job.seed is None else f"{target}, seed {job.seed}"


def _by_study(points: Iterable[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.study, []).append(point)
    return groups


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other point beats in both cost and accuracy, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.macs_share, -p.delta_pp)):
        if not best or point.delta_pp > best[-1].delta_pp:
            best.append(point)
    return best


def pareto(rows: Iterable[JobResult]) -> Figure | None:
    """Draw the change of top-1 over the MACs left, with a front for each study."""
    points = pareto_points(rows)
    if not points:
        return None
    with plots.style():
        figure = Figure(figsize=(plots.WIDTH_IN, 4.0))
        axes = figure.add_subplot()
        for number, (study, own) in enumerate(_by_study(points).items()):
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
    best = pareto_front(own)
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
