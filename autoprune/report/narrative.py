"""Sentences and the comparison table about a run, for the terminal, the report and the browser alike.

Each function takes a `RunRecord`, whose run may still be going on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.formatting import METRICS, MISSING, count, milliseconds, percent, signed, size
from autoprune.record import Difference, ModelSummary, RoundRecord, RunRecord, TrialRecord


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One line of the before/after table; `change` is the difference in the form that fits the number."""

    label: str
    before: str
    after: str
    change: str
    note: str = ""


def comparison(
    before: ModelSummary, after: ModelSummary | None, difference: Difference | None
) -> list[ComparisonRow]:
    """Return the before/after table: accuracy, MACs, parameters, size, latency."""
    rows = [
        ComparisonRow(
            label="top-1",
            before=percent(before.top1, 2),
            after=percent(after.top1, 2) if after else MISSING,
            change=f"{signed(100 * (after.top1 - before.top1), 2)} pp" if after else MISSING,
            note=interval(difference) if difference else "",
        ),
        ComparisonRow(
            label="95 % interval",
            before=_band(before),
            after=_band(after) if after else MISSING,
            change="",
            note=f"test split, n = {before.num_samples:,}",
        ),
    ]
    costs = (
        ("MACs", before.macs, after.macs if after else None, count),
        ("parameters", before.params, after.params if after else None, count),
        ("weights", before.size_bytes, after.size_bytes if after else None, size),
    )
    for label, old, new, say in costs:
        rows.append(ComparisonRow(label=label, before=say(old), after=say(new), change=_shrunk(old, new)))
    if before.latency_ms is not None:
        row = _latency(before, after)
        is_same = after is not None and (after.macs, after.params) == (before.macs, before.params)
        rows.append(
            replace(row, change=MISSING) if is_same else row
        )  # the same network: what differs is noise
    return rows


def interval(difference: Difference) -> str:
    """Return the paired interval of an accuracy difference in words."""
    return f"95 % interval {signed(difference.low_pp, 2)} to {signed(difference.high_pp, 2)} pp"


def _band(model: ModelSummary) -> str:
    return f"{100 * model.low:.2f} to {100 * model.high:.2f}"


def _shrunk(old: float, new: float | None) -> str:
    return MISSING if new is None or not old else f"{signed(100 * (new / old - 1))} %"


def _latency(before: ModelSummary, after: ModelSummary | None) -> ComparisonRow:
    new = after.latency_ms if after else None
    change = f"{before.latency_ms / new:.2f}× faster" if before.latency_ms and new else MISSING  # noqa: RUF001
    if before.latency_ms and new and new > before.latency_ms:
        change = f"{new / before.latency_ms:.2f}× slower"  # noqa: RUF001
    spreads = [m.latency_spread_ms for m in (before, after) if m and m.latency_spread_ms is not None]
    return ComparisonRow(
        label="latency",
        before=milliseconds(before.latency_ms),
        after=milliseconds(new),
        change=change,
        note=f"median, ± {' and '.join(f'{s:.2f}' for s in spreads)} ms" if spreads else "median",
    )


def delivered_trial(record: RunRecord) -> tuple[RoundRecord, TrialRecord] | None:
    """Return the trial that made the delivered network; None where the original or nothing is delivered."""
    after = record.after
    if after is None or after.params == record.before.params:
        return None
    size = (after.macs, after.params)
    candidates = [(r, t) for r in record.rounds for t in r.trials if (t.macs, t.num_params) == size]
    top1 = record.tuning.before if record.tuning else after.search_top1
    return min(candidates, key=lambda m: (abs((m[1].top1 or 0.0) - top1), -m[0].number), default=None)


def trial_status(trial: TrialRecord) -> str:
    """Return a trial's status: `running`, `promoted`, `recovered`, `below the floor`, or its failure."""
    if trial.state == "running":
        return "running"
    if trial.state == "failed":
        return trial.failure or "failed"
    return "promoted" if trial.promoted else "recovered" if trial.recovered else "below the floor"


def caution(record: RunRecord) -> str:
    """Return a warning where the test split lost more than was allowed, otherwise an empty text."""
    after, difference = record.after, record.difference
    if after is None or difference is None or difference.delta_pp >= -record.max_drop_pp:
        return ""
    allowed = f"{record.max_drop_pp:g} pp"
    search_change = f"{signed(100 * (after.search_top1 - record.before.search_top1), 2)} pp"
    chance = (
        "the allowed loss lies inside, so this may be chance"
        if difference.high_pp >= -record.max_drop_pp >= difference.low_pp
        else "more than chance explains"
    )
    return (
        f"The {allowed} that were allowed are kept on the search split, where trials are chosen "
        f"({search_change}), and not on the test split, which no trial has seen "
        f"({signed(difference.delta_pp, 2)} pp). With "
        f"n = {after.num_samples:,} the {interval(difference)}: {chance}. A split flatters what was chosen "
        "on it; a larger one, or a smaller --max-drop, leaves less room for that."
    )


def ending(record: RunRecord) -> str:
    """Describe how the delivered network came about after the last round; return "" before the delivery."""
    if record.after is None:
        return ""
    source, tuning = delivered_trial(record), record.tuning
    if source is None:
        return "The original is delivered: no trial stayed inside the floor."
    round_record, trial = source
    who = f"trial {trial.number} of round {round_record.number}"
    if tuning is None or not tuning.epochs:
        return f"{who.capitalize()} is delivered as it was: nothing of the budget was left to tune it longer."
    took = f"{tuning.epochs[-1].epoch:.3g} epochs"
    before, after = percent(tuning.before, 2), percent(tuning.search_top1, 2)
    if not tuning.kept:
        return f"{took} more gave {after}, less than {before}: {who} is delivered as it was."
    if tuning.before < record.floor:
        return (
            f"{who.capitalize()} had missed the floor with {before}. What was left of the budget, {took}, "
            f"brought it to {after}: it is delivered."
        )
    return f"What was left of the budget, {took}, took {who} from {before} to {after}: it is delivered."


def _so_far(record: RunRecord) -> str:
    """Describe the network that was promoted last, from which the next round starts."""
    promoted = [(r, t) for r in record.rounds for t in r.trials if t.promoted]
    if not promoted:
        return "nothing is promoted yet"
    round_record, trial = promoted[-1]
    metric = METRICS.get(record.target_metric, record.target_metric)
    return (
        f"round {round_record.number} promoted a network with {percent(trial.cost_share)} of the {metric} "
        f"and {percent(trial.top1, 2)} top-1 on the search split"
    )


def answer(record: RunRecord) -> str:
    """Describe the whole run in one sentence."""
    before, after = record.before, record.after
    if after is None:
        return f"{record.name}: not finished; {_so_far(record)}."
    if after.params == before.params:
        return f"{record.name}: nothing was removed; the original is delivered as it was."
    parts = [
        f"{100 * (1 - after.macs / before.macs):.1f} % fewer MACs",
        f"{100 * before.top1:.2f} → {100 * after.top1:.2f} % top-1 "
        f"({signed(100 * (after.top1 - before.top1), 2)} pp"
        + (f", {interval(record.difference)})" if record.difference else ")"),
    ]
    if before.latency_ms and after.latency_ms:
        where = record.environment.get("device", "this machine")
        parts.append(f"{_latency(before, after).change} on {where}")
    return f"{record.name}: {', '.join(parts)}."
