"""The tables and trees that commands print on stdout for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from autoprune.formatting import ACTIONS, METRICS, count, duration, percent, signed
from autoprune.report import ComparisonRow, answer, caution
from autoprune.serialization import to_plain

if TYPE_CHECKING:
    from autoprune.pipeline import RunForecast, RunStatus
    from autoprune.pruning import Cell, Prospect, SensitivityTable
    from autoprune.record import RunRecord, TrialRecord
    from autoprune.storage import Process
    from autoprune.structure import ChannelGraph, Frozen, Member
    from autoprune.structure import Group as ChannelGroup

GOOD, BAD, MUTED = "green", "yellow", "dim"
ROLES = {"out": "made by", "affine": "scaled by", "in": "read by"}
MAX_NAMES = 4  # parameters named for one reason to stay; the rest is counted


def _table(*columns: str) -> Table:
    """Return a plain table: the first column is text, the others are numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style=MUTED)
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """Return the table of the network before and after."""
    table = _table("", "before", "after", "change")
    for row in rows:
        table.add_row(row.label, row.before, Text(row.after, "bold"), row.change)
    return table


def plan_text(plan: RunForecast) -> RenderableType:
    """Return the forecast of a run, for `--dry-run`."""
    samples = ", ".join(f"{n} {s:,}" for n, s in plan.num_samples.items())
    baseline = (
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
        ("baseline", baseline),
        ("data", samples),
    )
    grid = Table.grid(padding=(0, 3, 0, 0))
    for label, text in facts:
        grid.add_row(Text(label, MUTED), text)
    rounds = _table("round", "removes up to", f"{METRICS.get(plan.metric, plan.metric)} left", "floor")
    for step in plan.rounds:
        shares = (percent(step.ceiling), percent(step.cost_share), percent(step.floor, 2))
        rounds.add_row(str(step.number), *shares)
    end = Text("Everything is in order. The rounds, if each succeeds at its ceiling:", GOOD)
    return Group(grid, Text(), end, Text(), rounds)


def status_text(status: RunStatus) -> RenderableType:
    """Return the status of a run: the answer, the present step, every round, and the processes."""
    record = status.record
    if record is None:
        return Group(Text(f"{status.name}: {status.now}", "bold"), *_processes(status.processes))
    table = _table("round", "from", "up to", "floor", "trials", "best", "left", "decision")
    for attempt in record.rounds:
        best = _best(attempt.trials)
        table.add_row(
            str(attempt.number), str(attempt.started_from or "start"), percent(attempt.ceiling),
            percent(attempt.floor, 2),
            f"{sum(t.state != 'running' for t in attempt.trials)} of {attempt.planned_trials}",
            percent(best.top1 if best else None, 2),
            percent(best.cost_share if best else None), ACTIONS.get(attempt.action or "", "running"),
        )  # fmt: skip
    end = record.outcome.message if record.outcome else _used(record, status.seconds_left)
    now = [Text(f"now: {status.now}")] if status.now else []
    warning = [Text(text, BAD)] if (text := caution(record)) else []
    rounds: list[RenderableType] = [Text(), table] if record.rounds else []
    processes = _processes(status.processes)
    return Group(Text(answer(record), "bold"), *now, Text(end), *warning, *rounds, *processes)


def _used(record: RunRecord, seconds_left: float | None) -> str:
    used = f"{duration(record.seconds)} of finished work"
    return (
        used if seconds_left is None else f"{used}, {duration(seconds_left)} of {record.study['budget']} left"
    )


def _processes(processes: Sequence[Process]) -> list[Text]:
    present = [_process_text(p) for p in processes if p.state in ("working", "silent")]
    num_ended = len(processes) - len(present)
    ended = f"{num_ended} earlier process{'es' if num_ended > 1 else ''}"
    earlier = [Text(ended, MUTED)] if num_ended else []
    return [Text(), *present, *earlier] if processes else []


def _process_text(process: Process) -> Text:
    silent = "" if process.state == "working" else ", silent"
    where = f"{process.role} on {process.host}, process {process.pid}"
    return Text(f"{where}, for {duration(process.seconds)}{silent}", BAD if silent else GOOD)


def _best(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the promoted trial, or the most accurate one; None where no trial has a score."""
    scored = [t for t in trials if t.top1 is not None]
    return max(scored, key=lambda t: (t.promoted, t.top1 or 0.0), default=None)


def sensitivity_text(table: SensitivityTable, prospects: Sequence[Prospect] = ()) -> RenderableType:
    """Return the analysis of a network: how far it can go, and the loss by each group alone.

    The losses are changes of top-1 when one group alone loses some channels.
    """
    from autoprune.pruning import COLUMNS, cells, free_and_fragile, prunability_sentence

    rows, base = cells(table.points), table.baseline
    used = [c for c in range(len(COLUMNS)) if any(row[c] is not None for row in rows.values())]
    drops = _table("removed", *(percent(COLUMNS[c], 0) for c in used))
    for name, row in rows.items():
        drops.add_row(name, *(_drop(row[c]) for c in used))
    unchanged = {p.group for p in table.points if not p.changed}
    head = f"top-1 {percent(base.top1, 2)} on n = {base.num_samples:,}; changes in percentage points, untuned"
    widest = max(((p.high_pp - p.low_pp) / 2 for p in table.points), default=0.0)
    took = f"{len(table.points)} points measured in {duration(table.seconds)}"
    how = f"{took}, 95 % intervals up to ± {widest:.1f}"
    notes = [how, *([f"whole evaluations, because {table.reason}"] if table.reason else [])]
    free, fragile = free_and_fragile(table.points)
    verdicts = {"free": free, "fragile": fragile}
    groups = [Text(f"{word}: {', '.join(names)}") for word, names in verdicts.items() if names]
    warnings: list[Text] = []
    if unchanged:
        warnings.append(Text(f"changed nothing when pruned: {', '.join(sorted(unchanged))}", BAD))
    if table.miscounted:
        warnings.append(Text(f"did not cost what was predicted: {', '.join(table.miscounted)}", BAD))
    prunability: list[RenderableType] = []
    if prospects:
        sentence = Text(prunability_sentence(prospects), "bold")
        prunability = [sentence, Text(), _prospects_table(prospects), Text()]
    how_measured = Text("; ".join(notes), MUTED)
    return Group(*prunability, Text(head), how_measured, Text(), drops, Text(), *groups, *warnings)


def _drop(cell: Cell | None) -> Text:
    """Return a drop of top-1 as text; one that was read off the curve is paler than a measured one."""
    if cell is None:
        return Text("")
    return Text(signed(-cell.drop_pp), "" if cell.is_measured else MUTED)


def _prospects_table(prospects: Sequence[Prospect]) -> Table:
    table = _table("MACs left", "top-1", "95 % interval", "")
    colours = {"safe": GOOD, "marginal": BAD, "hopeless": "red"}
    for prospect in prospects:
        interval = f"{percent(prospect.low)} to {percent(prospect.high)}"
        region = Text(prospect.region, colours[prospect.region])
        table.add_row(percent(prospect.macs_share, 0), percent(prospect.top1), interval, region)
    return table


def groups_tree(graph: ChannelGraph) -> RenderableType:
    """Return a tree with one branch for every group, then one for every reason to stay."""
    from autoprune.structure import BEHIND_LAYER_NORM

    cost = graph.cost()
    title = f"{count(cost.macs)} MACs, {count(cost.params)} parameters, {len(graph.groups)} groups"
    tree = Tree(Text(f"{title}; {percent(graph.reach)} of the MACs within reach", "bold"), guide_style="dim")
    for group in graph.groups:
        branch = tree.add(_heading(group, cost.macs))
        for role, words in ROLES.items():
            layers = dict.fromkeys(_layer(m) for m in group.members if m.role == role)
            if layers:
                branch.add(Text.assemble((f"{words} ", "dim"), ", ".join(layers)))
        if group.paddings:
            branch.add(Text.assemble(("padded by ", "dim"), ", ".join(p.module for p in group.paddings)))
    if not graph.frozen:
        return tree
    is_behind = any(f.reason.startswith(BEHIND_LAYER_NORM) for f in graph.frozen)
    hint = [Text("Channels behind layer norms may go with --norms rescale.", "dim")] if is_behind else []
    return Group(tree, Text(), _frozen_tree(graph.frozen), *hint)


def _heading(group: ChannelGroup, macs: int) -> Text:
    width = f"{group.num_units} units"
    positions = max((m.index.shape[1] for m in group.members if m.role == "out"), default=1)
    if positions > 1:
        width += f" of {positions} channels"
    share = f"{count(group.macs)} MACs at stake ({percent(group.macs / macs if macs else 0.0)})"
    return Text.assemble((group.name, "bold cyan"), f"  {width}, {share}")


def _layer(member: Member) -> str:
    return member.name.rpartition(".")[0] or member.name


def _frozen_tree(frozen: tuple[Frozen, ...]) -> Tree:
    tree = Tree(Text("These stay:", "bold"), guide_style="dim")
    ordered = sorted(frozen, key=lambda f: f.reason)
    for reason, same in groupby(ordered, key=lambda f: f.reason):
        parts = [f"{f.name} [dim {f.dim}]" for f in same]
        more = f" and {len(parts) - MAX_NAMES} more" if len(parts) > MAX_NAMES else ""
        tree.add(Text(reason)).add(Text(", ".join(parts[:MAX_NAMES]) + more, "dim"))
    return tree


def graph_document(graph: ChannelGraph) -> dict[str, Any]:
    """Return everything that the tree shows, and every member, as plain values."""
    groups = [
        {
            "name": g.name, "num_units": g.num_units, "macs": g.macs, "layers": list(g.layers),
            "members": [
                {"name": m.name, "dim": m.dim, "role": m.role, "positions_per_unit": m.index.shape[1]}
                for m in g.members
            ],
        }
        for g in graph.groups
    ]  # fmt: skip
    return {
        "groups": groups, "frozen": to_plain(graph.frozen),
        "cost": to_plain(graph.cost()), "reach": graph.reach,
    }  # fmt: skip
