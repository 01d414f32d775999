"""The pictures of a run as Plotly figures, for the dashboard, which draws them itself.

`plots` draws the same for the report. Here a round's own trials stand out, and pointing at one says what it
tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from autoprune.formatting import METRICS, percent, setting
from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.report.narrative import delivered_trial
from autoprune.report.plots import COLOURS

LAYOUT: dict[str, Any] = {
    "template": "none", "font": {"size": 13}, "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    "legend": {"orientation": "h", "y": -0.2}, "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)", "title": {"x": 0.02, "font": {"size": 15}},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLOURS["muted"]},
}  # fmt: skip


def path(record: RunRecord, here: RoundRecord | None = None) -> go.Figure:
    """Accuracy over cost: trials, promoted line, floor and target; this round's floor and reach."""
    figure = go.Figure(layout=LAYOUT)
    metric = METRICS.get(record.target_metric, record.target_metric)
    others = [(r, t) for r in record.rounds if here is None or r.number != here.number for t in r.trials]
    own = [(here, t) for t in here.trials] if here is not None else []
    _dots(figure, others, "trials" if here is None else "other rounds", COLOURS["pale"])
    _dots(figure, own, f"round {here.number}" if here else "", COLOURS["good"])
    won = [(r, t) for r in record.rounds for t in r.trials if t.promoted]
    line = [(100.0, 100 * record.before.search_top1), *((100 * _share(t), 100 * _top1(t)) for _, t in won)]
    figure.add_scatter(
        x=[x for x, _ in line], y=[y for _, y in line], mode="lines+markers", name="promoted",
        line={"color": COLOURS["accent"]}, hovertemplate="%{x:.1f} % left: %{y:.2f} %<extra></extra>",
    )  # fmt: skip
    made = delivered_trial(record)
    if made is not None and record.after is not None:
        figure.add_scatter(
            x=[100 * _share(made[1])], y=[100 * record.after.search_top1], mode="markers", name="delivered",
            marker={"color": COLOURS["accent"], "size": 11, "symbol": "diamond"},
            hovertemplate="delivered: %{x:.1f} % left, %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=100 * record.floor, line={"color": COLOURS["bad"], "dash": "dash"},
        annotation_text=f"floor {percent(record.floor, 2)}", annotation_position="bottom left",
    )  # fmt: skip
    figure.add_vline(x=100 * record.target_share, line={"color": COLOURS["muted"], "dash": "dot"},
                     annotation_text=f"target {percent(record.target_share)}",
                     annotation_position="bottom left")  # fmt: skip
    if here is not None:
        deepest = 100 * here.cost_share * (1 - here.ceiling)
        figure.add_hline(y=100 * here.floor, line={"color": COLOURS["bad"], "dash": "dot", "width": 1},
                         annotation_text="this round's floor", annotation_position="top left")  # fmt: skip
        figure.add_vrect(x0=deepest, x1=100 * here.cost_share, fillcolor=COLOURS["pale"], opacity=0.25,
                         line_width=0, annotation_text=f"this round removes up to {percent(here.ceiling)}",
                         annotation_position="top right", annotation_xanchor="left")  # fmt: skip
    figure.update_xaxes(title=f"{metric} left, % of the original", autorange="reversed")
    figure.update_yaxes(title="top-1 on the search split, %", range=_readable(record))
    figure.update_layout(title_text="Accuracy over cost")
    return figure


def _dots(
    figure: go.Figure, chosen: Sequence[tuple[RoundRecord, TrialRecord]], name: str, colour: str
) -> None:
    shown = [(r, t) for r, t in chosen if t.top1 is not None and t.cost_share is not None]
    if shown:
        figure.add_scatter(
            x=[100 * _share(t) for _, t in shown], y=[100 * _top1(t) for _, t in shown], mode="markers",
            name=name, text=[_told(r, t) for r, t in shown], hovertemplate="%{text}<extra></extra>",
            marker={"color": colour, "size": 9,
                    "symbol": ["circle" if t.recovered else "circle-open" for _, t in shown]},
        )  # fmt: skip


def _told(one: RoundRecord, trial: TrialRecord) -> str:
    reached = f"{percent(trial.top1, 2)} with {percent(trial.cost_share)} left"
    head = f"round {one.number} trial {trial.number}: {reached}"
    return "<br>".join([head, *(f"{name} {setting(value)}" for name, value in trial.params.items())])


def _readable(record: RunRecord) -> list[float]:
    """Leave what fell far below the floor out of sight, so that the floor's neighbourhood can be read."""
    start, floor = 100 * record.before.search_top1, 100 * record.floor
    tops = [100 * t.top1 for r in record.rounds for t in r.trials if t.top1 is not None]
    room = max(start - floor, 0.5)
    lowest = min([floor, *tops])
    return [max(lowest - 0.5 * room, floor - 5 * room), min(100.5, max([start, *tops]) + 0.5 * room)]


def _top1(trial: TrialRecord) -> float:
    return trial.top1 if trial.top1 is not None else 0.0


def _share(trial: TrialRecord) -> float:
    return trial.cost_share if trial.cost_share is not None else 1.0


def widths(
    before: Mapping[str, int], after: Mapping[str, int], title: str, counted: str = "output channels"
) -> go.Figure:
    """How wide every layer or group was and is, input at the top."""
    names = [n for n in before if n in after]
    figure = go.Figure(layout=LAYOUT)
    for label, values, colour in (("before", before, COLOURS["pale"]), ("after", after, COLOURS["accent"])):
        figure.add_bar(
            x=[values[n] for n in names], y=names, name=label, orientation="h", marker={"color": colour}
        )
    figure.update_layout(
        title_text=title,
        barmode="overlay",
        height=200 + 18 * len(names),
        legend={"y": 1, "yanchor": "bottom", "x": 0},
        margin={"t": 80},
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title=counted)
    return figure


def sensitivity(one: RoundRecord) -> go.Figure:
    """Change of top-1 when one group alone is pruned, for every ratio that was measured."""
    figure = go.Figure(layout=LAYOUT)
    for group in dict.fromkeys(c.group for c in one.sensitivity):
        cells = sorted((c for c in one.sensitivity if c.group == group), key=lambda c: c.ratio)
        figure.add_scatter(
            x=[0, *(100 * c.ratio for c in cells)],
            y=[0, *(-c.drop_pp for c in cells)],
            mode="lines+markers",
            name=group,
        )
    figure.update_xaxes(title="removed of the group, %")
    figure.update_yaxes(title="change of top-1, pp")
    figure.update_layout(title_text="Sensitivity: one group alone, untuned")
    return figure
