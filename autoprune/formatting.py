"""How numbers are said to people: one way for each kind, in the terminal and in the report alike.

Percentages of a whole are written with a space before the sign, differences of percentages are `pp`, counts
have SI prefixes and three digits, and a minus is a minus, not a hyphen. A missing number is a dash.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.record import Difference, ModelSummary, RoundRecord, RunRecord, TrialRecord

MISSING = "–"  # noqa: RUF001 an en dash, the usual sign for "no value" in a table
MINUS = "−"  # noqa: RUF001
METRICS = {"macs": "MACs", "params": "parameters", "size": "size of the weights", "memory": "memory",
           "latency": "latency"}  # fmt: skip
ACTIONS = {
    "promote": "promoted",
    "lower": "ceiling lowered",
    "go_back": "went back",
    "finish": "target reached",
    "stop": "stopped",
}


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: 0.9173 -> `91.7 %`."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign, and none on a zero: -0.23 -> `−0.2`."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def count(value: float | None) -> str:
    """A count with three digits and an SI prefix: 40813184 -> `40.8 M`."""
    return MISSING if value is None else _scaled(value, ("", "k", "M", "G", "T"))


def size(num_bytes: float | None) -> str:
    """A file size in decimal units: 1085000 -> `1.09 MB`."""
    return MISSING if num_bytes is None else _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = 0 if step == 0 else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f} {units[step]}".rstrip()


def milliseconds(value: float | None) -> str:
    """A latency with three digits: 4.187 -> `4.19 ms`."""
    if value is None:
        return MISSING
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} ms"


def duration(seconds: float) -> str:
    """A time span: 83 -> `1:23 min`, 4.2 -> `4.2 s`, 7325 -> `2:02 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes = whole // 60
    return f"{minutes}:{whole % 60:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def clock(seconds: float) -> str:
    """A running time that does not change its width every second: 83 -> `0:01:23`."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def plural(number: int, noun: str) -> str:
    """A number of things: `1 trial`, `3 trials`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def setting(value: object) -> str:
    """One trial parameter or setting: floats with three digits, everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the before/after table; `change` says the difference in the way that fits the number."""

    label: str
    before: str
    after: str
    change: str
    note: str = ""


def comparison(before: ModelSummary, after: ModelSummary | None, difference: Difference | None) -> list[Row]:
    """The before/after table: accuracy, MACs, parameters, size, latency."""
    rows = [
        Row(
            label="top-1",
            before=percent(before.top1, 2),
            after=percent(after.top1, 2) if after else MISSING,
            change=f"{signed(100 * (after.top1 - before.top1), 2)} pp" if after else MISSING,
            note=interval(difference) if difference else "",
        ),
        Row(
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
        rows.append(Row(label=label, before=say(old), after=say(new), change=_shrunk(old, new)))
    if before.latency_ms is not None:
        row = _latency(before, after)
        is_same = after is not None and (after.macs, after.params) == (before.macs, before.params)
        rows.append(
            replace(row, change=MISSING) if is_same else row
        )  # the same network: what differs is noise
    return rows


def interval(difference: Difference) -> str:
    """The paired interval of an accuracy difference, in words."""
    return f"95 % interval {signed(difference.low_pp, 2)} to {signed(difference.high_pp, 2)} pp"


def _band(model: ModelSummary) -> str:
    return f"{100 * model.low:.2f} to {100 * model.high:.2f}"


def _shrunk(old: float, new: float | None) -> str:
    return MISSING if new is None or not old else f"{signed(100 * (new / old - 1))} %"


def _latency(before: ModelSummary, after: ModelSummary | None) -> Row:
    new = after.latency_ms if after else None
    change = f"{before.latency_ms / new:.2f}× faster" if before.latency_ms and new else MISSING  # noqa: RUF001
    if before.latency_ms and new and new > before.latency_ms:
        change = f"{new / before.latency_ms:.2f}× slower"  # noqa: RUF001
    spreads = [m.latency_spread_ms for m in (before, after) if m and m.latency_spread_ms is not None]
    return Row(
        label="latency",
        before=milliseconds(before.latency_ms),
        after=milliseconds(new),
        change=change,
        note=f"median, ± {' and '.join(f'{s:.2f}' for s in spreads)} ms" if spreads else "median",
    )


def delivered(record: RunRecord) -> tuple[RoundRecord, TrialRecord] | None:
    """The trial that made the delivered network; None where that is the original, or nothing yet."""
    after = record.after
    if after is None or after.params == record.before.params:
        return None
    size = (after.macs, after.params)
    made = [(r, t) for r in record.rounds for t in r.trials if (t.macs, t.num_params) == size]
    known = record.tuning.before if record.tuning else after.search_top1
    return min(made, key=lambda m: (abs((m[1].top1 or 0.0) - known), -m[0].number), default=None)


def caution(record: RunRecord) -> str:
    """What to know where the test split lost more than was allowed on the search split; empty otherwise."""
    after, found = record.after, record.difference
    if after is None or found is None or found.delta_pp >= -record.max_drop_pp:
        return ""
    allowed = f"{record.max_drop_pp:g} pp"
    lost = f"{signed(100 * (after.search_top1 - record.before.search_top1), 2)} pp"
    chance = (
        "the allowed loss lies inside, so this may be chance"
        if found.high_pp >= -record.max_drop_pp >= found.low_pp
        else "more than chance explains"
    )
    return (
        f"The {allowed} that were allowed are kept on the search split, where trials are chosen ({lost}), "
        f"and not on the test split, which no trial has seen ({signed(found.delta_pp, 2)} pp). With "
        f"n = {after.num_samples:,} the {interval(found)}: {chance}. A split flatters what was chosen on it; "
        "a larger one, or a smaller --max-drop, leaves less room for that."
    )


def ending(record: RunRecord) -> str:
    """How the delivered network came about, after the last round; empty where there is none."""
    if record.after is None:
        return ""
    made, tuning = delivered(record), record.tuning
    if made is None:
        return "The original is delivered: no trial stayed inside the floor."
    one, trial = made
    who = f"trial {trial.number} of round {one.number}"
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
    """What the round promoted last has: the next one starts from it."""
    promoted = [(r, t) for r in record.rounds for t in r.trials if t.promoted]
    if not promoted:
        return "nothing is promoted yet"
    one, trial = promoted[-1]
    metric = METRICS.get(record.target_metric, record.target_metric)
    return (
        f"round {one.number} promoted a network with {percent(trial.cost_share)} of the {metric} "
        f"and {percent(trial.top1, 2)} top-1 on the search split"
    )


def answer(record: RunRecord) -> str:
    """The whole run in one sentence."""
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
