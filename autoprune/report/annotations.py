"""The notes, figures and summaries that optuna-dashboard shows, written into the run's own Optuna studies.

Each study gets a note (Markdown), figures, a name for its objective, and a one-line `summary` among its user
attributes, all through optuna-dashboard's public functions. So `optuna-dashboard sqlite:///.../study.sqlite3`
shows a run without autoprune. Nothing here is read back: a run goes on without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import ExperimentalWarning

from autoprune.errors import AutopruneError
from autoprune.formatting import ACTIONS, count, duration, percent, plural, setting, signed
from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.report import figures
from autoprune.report.narrative import answer, caution, ending, trial_status
from autoprune.report.page import keep_units_together
from autoprune.search import checkpoint_of, read_run
from autoprune.storage import FINAL, RunStore, set_attrs

if TYPE_CHECKING:
    import plotly.graph_objects as go

SUMMARY = "summary"
SCORE = "removed (negative: short of the floor)"
TOP1 = "top-1 on the search split"


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """The content that one study shows; `figures` is called only if the study lacks this `summary`."""

    summary: str
    objective: str
    note: str
    figures: Callable[[], Mapping[str, go.Figure | None]]


def annotate_studies(store: RunStore) -> None:
    """Write the note, figures and summary of every study of a run that lacks its present summary.

    A stopped process leaves at worst a study without its summary, which the next call writes again. A note
    that a person has changed stays, once the round is decided.
    """
    record = read_run(store)
    annotations: dict[int | str, Annotation] = {0: _original(record)}
    annotations |= {r.number: _round(store, record, r) for r in record.rounds}
    if record.outcome is not None:
        annotations[FINAL] = _final(record)
    for number, annotation in annotations.items():
        study = store.study(number)
        if study is not None and study.user_attrs.get(SUMMARY) != annotation.summary:
            store.guard()
            _save(study, annotation)


def _save(study: optuna.Study, annotation: Annotation) -> None:
    # Here, because it imports scikit-learn, which takes seconds, and most commands of the package never save.
    from optuna_dashboard import save_note, save_plotly_graph_object

    for name, figure in annotation.figures().items():
        if figure is not None:
            save_plotly_graph_object(study, figure, graph_object_id=name)
    save_note(study, annotation.note)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # experimental since Optuna 3.2
        study.set_metric_names([annotation.objective])
    set_attrs(study, **{SUMMARY: annotation.summary})  # last: it says that the rest is there


def _original(record: RunRecord) -> Annotation:
    before = record.before
    note = f"""# {record.name}: the original

Top-1 is {percent(before.search_top1, 2)} on the search split and {percent(before.top1, 2)} on the test split,
with {count(before.macs)} MACs and {count(before.params)} parameters.

The run looks for a network of **{record.target}** that stays at or above **{percent(record.floor, 2)}** on
the search split ({record.max_drop_pp:g} pp less than the original). It began {record.started} on
{record.environment.get("device", "this machine")}.

Make it again: `{record.command}`
"""
    summary = f"original: {percent(before.search_top1, 1)}, {count(before.macs)} MACs"
    return Annotation(summary=summary, objective=TOP1, note=note, figures=dict)


def _round(store: RunStore, record: RunRecord, round_record: RoundRecord) -> Annotation:
    return Annotation(
        summary=_round_summary(round_record), objective=SCORE, note=_round_note(round_record),
        figures=lambda: {
            "path": figures.path(record, round_record), "sensitivity": figures.sensitivity(round_record),
            "curves": figures.curves(round_record.trials), "widths": _promoted_widths(store, round_record),
        },
    )  # fmt: skip


def _round_summary(record: RoundRecord) -> str:
    if record.action is None:
        return f"running: {plural(record.planned_trials, 'trial')} planned"
    scored = [t for t in record.trials if t.top1 is not None]
    best = max(scored, key=lambda t: (t.promoted, t.top1 or 0.0), default=None)
    if best is None:
        return ACTIONS[record.action]
    result = f"{ACTIONS[record.action]}: {percent(best.cost_share)} left, {percent(best.top1, 2)}"
    return result if best.promoted else f"{result}, below its floor"


def _round_note(record: RoundRecord) -> str:
    origin = "the original" if record.started_from == 0 else f"what round {record.started_from} promoted"
    took = "" if record.action is None else f" It took {duration(record.seconds)}."
    lines = [
        f"# Round {record.number}: {ACTIONS.get(record.action or '', 'running')}",
        "",
        record.reason[:1].upper() + record.reason[1:] + "." if record.reason else "No decision yet.",
        "",
        f"It started from {origin} with {percent(record.cost_share)} of the cost left, could remove up to "
        f"{percent(record.ceiling)} of that, and had to stay at or above {percent(record.floor, 2)}: "
        f"{plural(record.planned_trials, 'trial')} of {record.epochs:.3g} epochs.{took}",
        "",
    ]
    if record.trials and record.action is not None:
        heads = (
            "trial",
            "removed",
            "left",
            "before tuning",
            "top-1",
            "95 % interval",
            "time",
            "settings",
            "",
        )
        lines += [_table_row(*heads), "|---:|---:|---:|---:|---:|---:|---:|---|---|"]
        lines += [_trial_row(trial) for trial in record.trials]
    return "\n".join(lines)


def _trial_row(trial: TrialRecord) -> str:
    settings = ", ".join(f"{k} {setting(v)}" for k, v in trial.params.items() if k != "prune_rate")
    interval = "" if trial.low is None else f"{percent(trial.low)} to {percent(trial.high)}"
    return _table_row(
        str(trial.number), percent(trial.prune_rate), percent(trial.cost_share),
        percent(trial.before_tuning, 2), percent(trial.top1, 2), interval, duration(trial.seconds), settings,
        trial_status(trial),
    )  # fmt: skip


def _table_row(*cells: str) -> str:
    """Return a line of a Markdown table, its cells set apart by wide spaces.

    The dashboard gives the columns of a table no room.

    The dashboard gives the columns of a table no room.
    """
    return "".join(f"| \u2003{keep_units_together(cell)} " for cell in cells) + "|"


def _promoted_widths(store: RunStore, record: RoundRecord) -> go.Figure | None:
    """Draw the units left of each group in the promoted network; return None without such a network."""
    promoted = next((t.number for t in record.trials if t.promoted), None)
    if promoted is None:
        return None
    try:
        plan = store.load_checkpoint(checkpoint_of(store, record.number, promoted)).plan
    except AutopruneError:  # a figure is no reason to stop a run
        return None
    after = {name: len(keep) for name, keep in plan.keep.items()}
    return figures.widths(plan.num_units, after, "Units left of each group", "units")


def _final(record: RunRecord) -> Annotation:
    after, before, outcome = record.after, record.before, record.outcome
    assert after is not None
    assert outcome is not None
    verdict = "target reached" if outcome.reached else "target not reached"
    change = f"{signed(100 * (after.top1 - before.top1))} pp"
    summary = f"{verdict}: {percent(1 - after.macs / before.macs)} fewer MACs, {change}"
    rounds = [_table_row("round", "decision", "reason"), "|---:|---|---|"]
    rounds += [_table_row(str(r.number), ACTIONS[r.action or "stop"], r.reason) for r in record.rounds]
    sentences = [answer(record), outcome.message, caution(record), ending(record), "\n".join(rounds)]
    note = "\n\n".join([f"# {verdict.capitalize()}", *filter(None, sentences)]) + "\n"
    return Annotation(
        summary=summary, objective=TOP1, note=note,
        figures=lambda: {
            "path": figures.path(record),
            "widths": figures.widths(before.widths, after.widths, "Layer widths"),
        },
    )  # fmt: skip
