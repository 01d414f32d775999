"""The pictures of a round or a run as Plotly figures, for optuna-dashboard to draw from a study.

`plots` draws the same series for the report. Here a round's own trials stand out, and pointing at a trial
shows its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from autoprune.formatting import percent, setting, signed
from autoprune.pruning import COLUMNS, cells
from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.report.plots import COLOURS
from autoprune.report.series import TrialPoint, path_series, schedules, width_series

LAYOUT: dict[str, Any] = {
    "template": "none", "font": {"size": 13}, "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
    "legend": {"orientation": "h", "y": -0.2}, "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)", "title": {"x": 0.02, "font": {"size": 15}},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": COLOURS["muted"]},
}  # fmt: skip


def path(record: RunRecord, round_record: RoundRecord | None = None) -> go.Figure | None:
    """Draw accuracy over cost, with the trials, the promoted line, the floor and the target.

    With `round_record`, its trials stand out, and its own floor and the costs it may reach are drawn too.
    """
    series = path_series(record)
    if series is None:
        return None
    figure = go.Figure(layout=LAYOUT)
    number = 0 if round_record is None else round_record.number
    others = [p for p in series.trials if p.round != number]
    _dots(figure, others, "trials" if round_record is None else "other rounds", "pale")
    _dots(figure, [p for p in series.trials if p.round == number], f"round {number}", "good")
    line = [(100.0, series.original), *((p.left, p.top1) for p in series.promoted)]
    figure.add_scatter(
        x=[x for x, _ in line], y=[y for _, y in line], mode="lines+markers", name="promoted",
        line={"color": COLOURS["accent"]}, hovertemplate="%{x:.1f} % left: %{y:.2f} %<extra></extra>",
    )  # fmt: skip
    if series.delivered is not None:
        figure.add_scatter(
            x=[series.delivered.left], y=[series.delivered.top1], mode="markers", name="delivered",
            marker={"color": COLOURS["accent"], "size": 11, "symbol": "diamond"},
            hovertemplate="delivered: %{x:.1f} % left, %{y:.2f} %<extra></extra>",
        )  # fmt: skip
    figure.add_hline(
        y=series.floor, line={"color": COLOURS["bad"], "dash": "dash"},
        annotation_text=f"floor {percent(record.floor, 2)}", annotation_position="bottom left",
    )  # fmt: skip
    figure.add_vline(x=series.target, line={"color": COLOURS["muted"], "dash": "dot"},
                     annotation_text=f"target {percent(record.target_share)}",
                     annotation_position="bottom left")  # fmt: skip
    if round_record is not None:
        _reach(figure, round_record)
    figure.update_xaxes(title=f"{series.metric} left, % of the original", autorange="reversed")
    figure.update_yaxes(title="top-1 on the search split, %", range=[series.bottom, series.top])
    return figure.update_layout(title_text="Accuracy over cost")


def _dots(figure: go.Figure, points: Sequence[TrialPoint], name: str, colour: str) -> None:
    if points:
        figure.add_scatter(
            x=[p.left for p in points], y=[p.top1 for p in points], mode="markers", name=name,
            text=[_hover_text(p) for p in points], hovertemplate="%{text}<extra></extra>",
            marker={"color": COLOURS[colour], "size": 9,
                    "symbol": ["circle" if p.trial.recovered else "circle-open" for p in points]},
        )  # fmt: skip


def _hover_text(point: TrialPoint) -> str:
    head = f"round {point.round} trial {point.trial.number}: {point.top1:.2f} % with {point.left:.1f} % left"
    return "<br>".join([head, *(f"{name} {setting(value)}" for name, value in point.trial.params.items())])


def _reach(figure: go.Figure, round_record: RoundRecord) -> None:
    deepest = 100 * round_record.cost_share * (1 - round_record.ceiling)
    figure.add_hline(y=100 * round_record.floor, line={"color": COLOURS["bad"], "dash": "dot", "width": 1},
                     annotation_text="this round's floor", annotation_position="top left")  # fmt: skip
    figure.add_vrect(x0=deepest, x1=100 * round_record.cost_share, fillcolor=COLOURS["pale"], opacity=0.25,
                     line_width=0,
                     annotation_text=f"this round removes up to {percent(round_record.ceiling)}",
                     annotation_position="top right", annotation_xanchor="left")  # fmt: skip


def widths(
    before: Mapping[str, int], after: Mapping[str, int], title: str, unit: str = "output channels"
) -> go.Figure:
    """Draw the width of every layer or group before and after, the input at the top."""
    series = width_series(before, after)
    figure = go.Figure(layout=LAYOUT)
    names = [width.name for width in series]
    for label, values, colour in (("before", [w.before for w in series], "pale"),
                                  ("after", [w.after for w in series], "accent")):  # fmt: skip
        figure.add_bar(x=values, y=names, name=label, orientation="h", marker={"color": COLOURS[colour]})
    figure.update_layout(
        title_text=title, barmode="overlay", height=200 + 18 * len(names),
        legend={"y": 1, "yanchor": "bottom", "x": 0}, margin={"t": 80},
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure.update_xaxes(title=unit)


def sensitivity(round_record: RoundRecord) -> go.Figure | None:
    """Draw the change of top-1 when one group alone is pruned, by the share of it that is removed."""
    if not round_record.sensitivity:
        return None
    rows = cells(round_record.sensitivity)
    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows.values())]
    changes = [[-cell.drop_pp if (cell := row[c]) else None for c in used] for row in rows.values()]
    figure = go.Figure(layout=LAYOUT)
    figure.add_heatmap(
        x=[percent(COLUMNS[c], 0) for c in used], y=list(rows), xgap=2, ygap=2,
        z=changes, text=[["" if pp is None else signed(pp) for pp in row] for row in changes],
        texttemplate="%{text}", textfont={"size": 11}, showscale=False, zmax=0,
        colorscale=[[0, COLOURS["bad"]], [1, "white"]],
        hovertemplate="%{y} without %{x}: %{z:+.2f} pp<extra></extra>",
    )  # fmt: skip
    figure.update_layout(title_text="Sensitivity: top-1 lost by one group, pp",
                         height=160 + 24 * len(rows))  # fmt: skip
    figure.update_xaxes(title="removed of the group", type="category")
    return figure.update_yaxes(autorange="reversed", automargin=True)


def curves(trials: Sequence[TrialRecord]) -> go.Figure | None:
    """Draw the training loss of a round's trials; the promoted one stands out."""
    figure = go.Figure(layout=LAYOUT)
    for trial in trials:
        for number, part in enumerate(schedules(trial)):
            figure.add_scatter(
                x=[p.epoch for p in part], y=[p.train_loss for p in part], mode="lines+markers",
                name=f"trial {trial.number}", legendgroup=str(trial.number), showlegend=number == 0,
                line={"width": 3 if trial.promoted else 1},
            )  # fmt: skip
    if not figure.data:
        return None
    figure.update_xaxes(title="epochs of fine-tuning")
    return figure.update_yaxes(title="training loss").update_layout(title_text="Learning curves")
