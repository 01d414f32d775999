"""What a command prints on stdout when it is asked to tell and not to do: plans, standings, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoprune.formatting import ACTIONS, METRICS, count, duration, percent, signed
from autoprune.report import ComparisonRow, answer, caution

if TYPE_CHECKING:
    from autoprune.cli.doctor import Finding
    from autoprune.pipeline import RunForecast, RunStatus
    from autoprune.pruning import Cell, Prospect, SensitivityTable
    from autoprune.record import RunRecord, TrialRecord
    from autoprune.storage import Process

GOOD, BAD, MUTED = "green", "yellow", "dim"


def _table(*columns: str) -> Table:
    """A plain table: the first column is text, the others are numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style=MUTED)
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Before and after."""
    table = _table("", "before", "after", "change")
    for row in rows:
        table.add_row(row.label, row.before, Text(row.after, "bold"), row.change)
    return table


def plan_text(plan: RunForecast) -> RenderableType:
    """What a run would do, for `--dry-run`."""
    samples = ", ".join(f"{n} {s:,}" for n, s in plan.num_samples.items())
    known = (
        f"top-1 {percent(plan.top1, 2)} on the search split, floor {percent(plan.floor, 2)}"
        if plan.top1 is not None
        else "trained by the run itself"
    )
    facts = (
        ("run", f"{plan.name}: {plan.target}, budget {plan.budget}, on {plan.device}"),
        (
            "network",
            f"{count(plan.macs)} MACs, {count(plan.params)} parameters, {plan.num_groups} prunable groups",
        ),
        ("baseline", known),
        ("data", samples),
    )
    grid = Table.grid(padding=(0, 3, 0, 0))
    for label, text in facts:
        grid.add_row(Text(label, MUTED), text)
    rounds = _table("round", "removes up to", f"{METRICS.get(plan.metric, plan.metric)} left", "floor")
    for one in plan.rounds:
        rounds.add_row(str(one.number), percent(one.ceiling), percent(one.cost_share), percent(one.floor, 2))
    end = Text("Everything is in order. The rounds, if each succeeds at its ceiling:", GOOD)
    return Group(grid, Text(), end, Text(), rounds)


def status_text(told: RunStatus) -> RenderableType:
    """Where a run stands: the answer, what it is at, a line for every round, and who works on it."""
    record = told.record
    if record is None:
        return Group(Text(f"{told.name}: {told.now}", "bold"), *_processes(told.processes))
    table = _table("round", "from", "up to", "floor", "trials", "best", "left", "decision")
    for one in record.rounds:
        best = _best(one.trials)
        table.add_row(
            str(one.number), str(one.started_from or "start"), percent(one.ceiling), percent(one.floor, 2),
            f"{sum(t.state != 'running' for t in one.trials)} of {one.planned_trials}",
            percent(best.top1 if best else None, 2),
            percent(best.cost_share if best else None), ACTIONS.get(one.action or "", "running"),
        )  # fmt: skip
    end = record.outcome.message if record.outcome else _used(record, told.seconds_left)
    now = [Text(f"now: {told.now}")] if told.now else []
    warned = [Text(said, BAD)] if (said := caution(record)) else []
    rounds: list[RenderableType] = [Text(), table] if record.rounds else []
    return Group(Text(answer(record), "bold"), *now, Text(end), *warned, *rounds, *_processes(told.processes))


def _used(record: RunRecord, seconds_left: float | None) -> str:
    used = f"{duration(record.seconds)} of finished work"
    return (
        used if seconds_left is None else f"{used}, {duration(seconds_left)} of {record.study['budget']} left"
    )


def _processes(processes: Sequence[Process]) -> list[Text]:
    seen = [_process_text(one) for one in processes if one.state in ("working", "silent")]
    done = sum(one.state not in ("working", "silent") for one in processes)
    last = [Text(f"{done} earlier process{'es' if done > 1 else ''}", MUTED)] if done else []
    return [Text(), *seen, *last] if seen or last else []


def _process_text(one: Process) -> Text:
    silent = "" if one.state == "working" else ", silent"
    told = f"{one.role} on {one.host}, process {one.pid}, for {duration(one.seconds)}{silent}"
    return Text(told, BAD if silent else GOOD)


def _best(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """The promoted trial, or the most accurate."""
    scored = [t for t in trials if t.top1 is not None]
    return max(scored, key=lambda t: (t.promoted, t.top1 or 0.0), default=None)


def findings_text(findings: Sequence[Finding]) -> RenderableType:
    """What `autoprune doctor` found: the verdict first, advice where it is needed."""
    wrong = [one.name for one in findings if not one.ok]
    verdict = Text("A run would find everything that it needs.", GOOD)
    if wrong:
        verdict = Text(f"To be mended first: {', '.join(wrong)}.", BAD)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for one in findings:
        grid.add_row(Text(one.name, MUTED), Text(one.found))
        if not one.ok:
            grid.add_row("", Text(one.advice, BAD))
    return Group(verdict, Text(), grid)


def sensitivity_text(table: SensitivityTable, found: Sequence[Prospect] = ()) -> RenderableType:
    """How far the network can go; then the change of top-1 when one group alone loses some channels."""
    from autoprune.pruning import COLUMNS, cells, free_and_fragile, prunability_sentence

    rows, base = cells(table.points), table.baseline
    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows.values())]
    shown = _table("removed", *(percent(COLUMNS[c], 0) for c in used))
    for name, row in rows.items():
        shown.add_row(name, *(_drop(row[c]) for c in used))
    dead = {p.group for p in table.points if not p.changed}
    head = f"top-1 {percent(base.top1, 2)} on n = {base.num_samples:,}; changes in percentage points, untuned"
    widest = max(((p.high_pp - p.low_pp) / 2 for p in table.points), default=0.0)
    took = f"{len(table.points)} points measured in {duration(table.seconds)}"
    how = f"{took}, 95 % intervals up to ± {widest:.1f}"
    notes = [how, *([f"whole evaluations, because {table.reason}"] if table.reason else [])]
    free, fragile = free_and_fragile(table.points)
    said = [
        Text(f"{word}: {', '.join(names)}") for word, names in (("free", free), ("fragile", fragile)) if names
    ]
    silent = [Text(f"changed nothing when pruned: {', '.join(sorted(dead))}", BAD)] if dead else []
    if table.miscounted:
        silent.append(Text(f"did not cost what was predicted: {', '.join(table.miscounted)}", BAD))
    front: list[RenderableType] = [
        Text(prunability_sentence(found), "bold"),
        Text(),
        _prospects(found),
        Text(),
    ]
    front = front if found else []
    return Group(*front, Text(head), Text("; ".join(notes), MUTED), Text(), shown, Text(), *said, *silent)


def _drop(cell: Cell | None) -> Text:
    """A measured drop stands out against one that was read off the curve."""
    if cell is None:
        return Text("")
    return Text(signed(-cell.drop_pp), "" if cell.is_measured else MUTED)


def _prospects(found: Sequence[Prospect]) -> Table:
    shown = _table("MACs left", "top-1", "95 % interval", "")
    colours = {"safe": GOOD, "marginal": BAD, "hopeless": "red"}
    for one in found:
        interval = f"{percent(one.low)} to {percent(one.high)}"
        region = Text(one.region, colours[one.region])
        shown.add_row(percent(one.macs_share, 0), percent(one.top1), interval, region)
    return shown
