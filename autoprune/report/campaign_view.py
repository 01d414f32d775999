"""A run told as Optuna studies for people: the list reads as the campaign, each study says what it did.

From a `RunRecord` and the storage's own trials. A study's name says how it ended, its note why; facts are
attributes in words, plots and files lie beside it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from optuna.trial import FrozenTrial
from optuna_dashboard import _custom_plot_data as plot_data
from optuna_dashboard import _note as notes

from autoprune.formatting import ACTIONS, count, duration, percent, plural, setting, signed
from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.report import interactive, plots
from autoprune.report.narrative import answer, caution, ending
from autoprune.report.page import fate
from autoprune.report.trial_table import trials_csv
from autoprune.report.view_storage import StudyView
from autoprune.storage import CHECKPOINT

SCORE = "removed (negative: short of the floor)"
TOP1 = "top-1 on the search split"
FILE = "artifacts:"  # optuna.artifacts keeps what it knows of a file under this prefix

Files = dict[str, Callable[[], bytes]]


class Attached:
    """Files of one study or trial: what the dashboard has to know of each, and how each is made."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.attrs: dict[str, str] = {}
        self.files: Files = {}

    def add(self, name: str, kind: str, make: Callable[[], bytes]) -> None:
        """Offer a file."""
        artifact = str(uuid5(NAMESPACE_URL, f"{self.owner}/{name}"))
        known = {"artifact_id": artifact, "filename": name, "mimetype": kind, "encoding": None}
        self.attrs[FILE + artifact] = json.dumps(known)
        self.files[artifact] = make


@dataclass(frozen=True, kw_only=True, eq=False)
class Campaign:
    """A run, and what is known beside its record.

    Attributes:
        label: of the run in the list.
        trials: the storage's, by the last part of their study's name.
        link: where a study is shown, by its key.
        plan_of: the pruning plan of a checkpoint, as text.
    """

    label: str
    record: RunRecord
    trials: Mapping[str, Sequence[FrozenTrial]]
    link: Callable[[str], str]
    plan_of: Callable[[str], bytes]

    def key(self, number: int) -> str:
        """Of a round's study; 0 is the original."""
        return f"{self.label}/{_part(number)}"


def views(run: Campaign) -> list[StudyView]:
    """All studies of a run, in the order of the campaign, which is the order of their ids."""
    for number in range(len(run.record.rounds) + 1):
        run.link(run.key(number))
    if run.record.outcome is not None:
        run.link(f"{run.label}/final")
    found = [_original(run), *(_round(run, one) for one in run.record.rounds)]
    return [*found, _final(run)] if run.record.outcome is not None else found


def _part(number: int) -> str:
    return f"round-{number:02d}"


def _original(run: Campaign) -> StudyView:
    record, before = run.record, run.record.before
    attached = Attached(run.key(0))
    attached.add("trials.csv", "text/csv", lambda: trials_csv(record).encode())
    facts = {
        "target": record.target, "max_drop": f"{record.max_drop_pp:g} pp", "floor": percent(record.floor, 2),
        "MACs": count(before.macs), "parameters": count(before.params),
        "top-1": f"{percent(before.search_top1, 2)} on the search split",
        "top-1, test split": percent(before.top1, 2),
        "device": record.environment.get("device", ""), "command": record.command, "started": record.started,
    }  # fmt: skip
    note = (
        f"# {record.name}\n\n{answer(record)}\n\n"
        f"The original, as it was measured before anything was removed. The run looks for a network of "
        f"**{record.target}** that stays at or above **{percent(record.floor, 2)}** on the search split.\n\n"
        f"Make it again: `{record.command}`\n"
    )
    title = f"original: {percent(before.search_top1, 1)}, {count(before.macs)} MACs"
    shown = [_with(t, {}, {}) for t in run.trials.get("round-00", ())]
    return _study(attached, title, note, facts, [interactive.path(record)], shown)


def _round(run: Campaign, one: RoundRecord) -> StudyView:
    attached = Attached(run.key(one.number))
    by_number = {t.number: t for t in one.trials}
    trials = [t for t in run.trials.get(_part(one.number), ()) if t.number in by_number]
    shown = [_told(run, one, t, by_number[t.number], attached.files) for t in trials]
    facts = {
        "decision": ACTIONS.get(one.action or "", "running"), "reason": one.reason,
        "started from": "the original" if one.started_from == 0 else _part(one.started_from),
        "ceiling": percent(one.ceiling), "floor": percent(one.floor, 2),
        "trials": _done(one), "epochs a trial": f"{one.epochs:.3g}",
        "left at the start": percent(one.cost_share), "took": duration(one.seconds),
    }  # fmt: skip
    figures = [interactive.path(run.record, one)]
    if one.sensitivity:
        figures.append(interactive.sensitivity(one))
    figures += _promoted_widths(run, one, trials)
    view = _study(attached, _summary(one), _round_note(run, one), facts, figures, shown)
    return replace(view, trial_notes={n: _trial_note(t, one) for n, t in by_number.items()})


def _promoted_widths(run: Campaign, one: RoundRecord, trials: Sequence[FrozenTrial]) -> list[Any]:
    """How wide the promoted network still is, group by group; nothing where its plan cannot be read."""
    promoted = {t.number for t in one.trials if t.promoted}
    kept = [t.user_attrs.get(CHECKPOINT) for t in trials if t.number in promoted]
    if not kept or not isinstance(kept[0], str):
        return []
    plan = json.loads(run.plan_of(kept[0])).get("groups", {})
    names = [n for n in dict.fromkeys([*(c.group for c in one.sensitivity), *plan]) if n in plan]
    before = {name: plan[name]["num_units"] for name in names}
    after = {name: len(plan[name]["keep"]) for name in names}
    return [interactive.widths(before, after, "Units left of each group", "units")] if plan else []


def _summary(one: RoundRecord) -> str:
    if one.action is None:
        return f"running: {_done(one)} trials finished"
    best = _best(one)
    if best is None:
        return ACTIONS[one.action]
    said = f"{percent(best.cost_share)} left, {percent(best.top1, 2)}"
    return f"{ACTIONS[one.action]}: {said}" + ("" if best.promoted else ", below its floor")


def _done(one: RoundRecord) -> str:
    return f"{sum(t.state != 'running' for t in one.trials)} of {one.planned_trials}"


def _best(one: RoundRecord) -> TrialRecord | None:
    scored = [t for t in one.trials if t.top1 is not None]
    return max(scored, key=lambda t: (t.promoted, t.top1 or 0.0), default=None)


def _round_note(run: Campaign, one: RoundRecord) -> str:
    start = run.link(run.key(one.started_from))
    origin = "the original" if one.started_from == 0 else f"what round {one.started_from} promoted"
    lines = [
        f"# Round {one.number}: {ACTIONS.get(one.action or '', 'running')}",
        "",
        one.reason[:1].upper() + one.reason[1:] + "." if one.reason else "No decision yet.",
        "",
        f"It started from [{origin}]({start}) with {percent(one.cost_share)} of the cost "
        f"left, could remove up to {percent(one.ceiling)} of that, and had to stay at or above "
        f"{percent(one.floor, 2)}: {plural(one.planned_trials, 'trial')} of {one.epochs:.3g} epochs.",
        "",
        _row("trial", "removed", "left", "before tuning", "top-1", ""),
        "|---:|---:|---:|---:|---:|---|",
        *(
            _row(
                str(t.number),
                percent(t.prune_rate),
                percent(t.cost_share),
                percent(t.before_tuning, 2),
                percent(t.top1, 2),
                fate(t),
            )
            for t in one.trials
        ),
    ]
    if one.number < len(run.record.rounds):
        lines += ["", f"Next: [round {one.number + 1}]({run.link(run.key(one.number + 1))})"]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    """A line of a table; the dashboard gives its columns no room of their own."""
    return "".join(f"| \u2003{cell} " for cell in cells) + "|"


def _final(run: Campaign) -> StudyView:
    record, after, attached = run.record, run.record.after, Attached(f"{run.label}/final")
    assert after is not None
    assert record.outcome is not None
    attached.add("widths.png", "image/png", lambda: _drawn(record, "widths"))
    facts = {
        "outcome": record.outcome.message,
        "top-1": f"{percent(after.top1, 2)} on the test split, n = {after.num_samples:,}",
        "MACs": count(after.macs), "parameters": count(after.params), "took": duration(record.seconds),
    }  # fmt: skip
    change = f"{signed(100 * (after.top1 - record.before.top1))} pp"
    verdict = "target reached" if record.outcome.reached else "target not reached"
    title = f"{verdict}: {percent(1 - after.macs / record.before.macs)} fewer MACs, {change}"
    told = [answer(record), record.outcome.message, caution(record), ending(record)]
    note = "\n\n".join([f"# {verdict.capitalize()}", *filter(None, told)]) + "\n"
    widths = interactive.widths(record.before.widths, after.widths, "Layer widths")
    shown = [_with(t, {}, {}) for t in run.trials.get("final", ())]
    return _study(attached, title, note, facts, [interactive.path(record), widths], shown)


def _study(
    attached: Attached, title: str, note: str, facts: dict[str, str], figures: Sequence[Any],
    trials: Sequence[FrozenTrial],
) -> StudyView:  # fmt: skip
    key = attached.owner
    metric = TOP1 if key.endswith(("/round-00", "/final")) else SCORE
    system: dict[str, Any] = {"study:metric_names": [metric], **attached.attrs}
    system |= {notes.note_ver_key(None): 1, **notes.split_body(note, None)}
    for place, figure in enumerate(figures):
        prefix = f"{plot_data.SYSTEM_ATTR_PLOT_DATA}plot-{place}:"
        system |= plot_data.split_plot_data(figure.to_json(), prefix)
    return StudyView(
        key=key, name=f"{key}  {title}", user_attrs=facts, system_attrs=system, trials=trials,
        files=attached.files,
    )  # fmt: skip


def _told(
    run: Campaign, one: RoundRecord, trial: FrozenTrial, record: TrialRecord, files: Files
) -> FrozenTrial:
    attached = Attached(f"{run.key(one.number)}/{trial.number}")
    attached.add("report.md", "text/markdown", lambda: _trial_note(record, one).encode())
    if len(record.epochs) > 1:
        alone = replace(run.record, rounds=(replace(one, trials=(replace(record, promoted=True),)),))
        attached.add("curve.png", "image/png", lambda: _drawn(alone, "curves"))
    checkpoint = trial.user_attrs.get(CHECKPOINT)
    if isinstance(checkpoint, str):
        attached.add("plan.json", "application/json", lambda: run.plan_of(checkpoint))
    files |= attached.files
    system: dict[str, Any] = dict(attached.attrs)
    if record.top1 is not None:
        system["constraints"] = [0.0 if record.recovered else max(1e-9, one.floor - record.top1)]
    return _with(trial, dict(_facts(record)), system)


def _facts(record: TrialRecord) -> Iterator[tuple[str, Any]]:
    yield "fate", fate(record)
    for name in ("top1", "low", "high", "before_tuning", "cost_share", "macs", "num_params", "seconds"):
        value = getattr(record, name)
        if value is not None:
            yield name, round(value, 6) if isinstance(value, float) else value


def _with(trial: FrozenTrial, facts: dict[str, Any], system: dict[str, Any]) -> FrozenTrial:
    kept = {k: v for k, v in trial._system_attrs.items() if not k.startswith((FILE, "constraints"))}
    values = None if trial.values is None else [round(v, 4) for v in trial.values]  # large letters show them
    params = {k: round(v, 6) if isinstance(v, float) else v for k, v in trial.params.items()}
    return FrozenTrial(
        number=trial.number, state=trial.state, value=None, values=values,
        datetime_start=trial.datetime_start, datetime_complete=trial.datetime_complete, params=params,
        distributions=trial.distributions, user_attrs=facts, system_attrs=kept | system,
        intermediate_values=trial.intermediate_values, trial_id=trial._trial_id,
    )  # fmt: skip


def _trial_note(record: TrialRecord, one: RoundRecord) -> str:
    lines = [f"# Round {one.number}, trial {record.number}: {fate(record)}", ""]
    if record.cost_share is not None:
        lines += [
            f"It removed {percent(record.prune_rate)} of where the round started; that leaves "
            f"{percent(record.cost_share)} of the original's cost: {count(record.macs)} MACs, "
            f"{count(record.num_params)} parameters.", "",
        ]  # fmt: skip
    if record.top1 is not None:
        band = f"{percent(record.low, 2)} to {percent(record.high, 2)}"
        lines += [
            f"Top-1 on the search split: **{percent(record.top1, 2)}** (95 % interval {band}), "
            f"{percent(record.before_tuning, 2)} before fine-tuning; the round's floor was "
            f"{percent(one.floor, 2)}.", "",
        ]  # fmt: skip
    if record.rungs:
        rows = [_row(f"{r.epochs:.3g}", percent(r.top1, 2)) for r in record.rungs]
        lines += [_row("epochs", "top-1 at the end of a schedule"), "|---:|---:|", *rows, ""]
    lines += [_row("setting", "value"), "|---|---|"]
    lines += [_row(name, setting(value)) for name, value in record.params.items()]
    tuned = f", {duration(record.tuning_seconds)} of it fine-tuning" if record.tuning_seconds else ""
    return "\n".join([*lines, "", f"It took {duration(record.seconds)}{tuned}."]) + "\n"


def _drawn(record: RunRecord, name: str) -> bytes:
    with plots.style():
        figure = plots.PLOTS[name](record)
        if figure is None:
            return b""
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
