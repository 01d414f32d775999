"""Rows of the coverage benchmark: their CSV, and the Markdown page that is made from it.

One row is one network under one tool. Both tools fill the same columns; what a tool cannot say stays empty.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

OURS, PEER = "autoprune", "torch-pruning"
LEGEND = (
    "MACs in millions, parameters in thousands, before > after removing 40 % of the units of every group at "
    "random. *Cost*: predicted MACs and parameters equal those counted on the dense network. *Apart*: "
    "largest difference, dense against masked, float64. Seconds are CPU seconds. *Memory*: peak over the "
    "model's own."
)
COUNTED = (
    "Trace, groups, plan and densify against building the pruner and one step. A network that a tool does "
    "not finish counts with the time until it failed or was ended at its limit."
)
DONE = {"exact", "ok"}  # outcomes that count as completed
REACH_WANTED = {True: 0.90, False: 0.99}  # with attention, without
SLOW_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network under one tool.

    Attributes:
        outcome: autoprune: exact, inexact, miscounted; Torch-Pruning: ok, wrong shapes; either: exception,
            timeout, memory, crash.
        detail: of a failure.
        note: on the strength of the comparison.
        reach: share of the multiply-adds in operators that at least one group shrinks.
        frozen: JSON, parameter dimensions kept by reason.
        macs_after: as the tool predicts (autoprune) or as counted (Torch-Pruning).
        counted_macs: of the pruned network, by torch.utils.flop_counter.
        difference: largest, dense against masked, over the largest output, float64.
        effect: the same between masked and original: what the removal changes.
        trace_s: graph and groups; Torch-Pruning: building the pruner.
        densify_s: the dense network; Torch-Pruning: its step, which also ranks.
        spent_s: wall seconds in trace, plan and densify, up to the failure or limit where there was one.
        peak_ratio: peak memory during these over the model's parameters and buffers.
    """

    model: str
    tool: str
    outcome: str = ""
    detail: str = ""
    note: str = ""
    groups: int | None = None
    units: int | None = None
    reach: float | None = None
    frozen: str = ""
    macs: int | None = None
    macs_after: int | None = None
    counted_macs_before: int | None = None
    counted_macs: int | None = None
    params: int | None = None
    params_after: int | None = None
    counted_params: int | None = None
    difference: float | None = None
    effect: float | None = None
    trace_s: float | None = None
    plan_s: float | None = None
    densify_s: float | None = None
    trace_cpu_s: float | None = None
    plan_cpu_s: float | None = None
    densify_cpu_s: float | None = None
    spent_s: float | None = None
    spent_cpu_s: float | None = None
    model_mb: float | None = None
    peak_ratio: float | None = None
    process_s: float | None = None
    process_peak_mb: float | None = None
    commit: str = ""
    date: str = ""

    @property
    def is_done(self) -> bool:
        """Whether the tool completed the network."""
        return self.outcome in DONE


Rows = dict[tuple[str, str], Row]


def read_rows(path: Path) -> Rows:
    """Rows of a CSV by network and tool; none where there is no file."""
    if not path.exists():
        return {}
    hints = get_type_hints(Row)
    rows = {}
    with path.open(newline="", encoding="utf-8") as file:
        for raw in csv.DictReader(file):
            row = Row(**{k: _parsed(v, hints[k]) for k, v in raw.items() if k in hints})  # type: ignore[arg-type]
            rows[row.model, row.tool] = row
    return rows


def _parsed(text: str, hint: object) -> object:
    if hint is str:
        return text
    if text == "":
        return None
    return int(text) if hint == int | None else float(text)


def write_rows(path: Path, rows: Rows) -> None:
    """Replace the CSV at once, so that a reader or a break never sees half of it."""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in rows.values():
            writer.writerow({k: _short(v) for k, v in asdict(row).items()})
    part.replace(path)


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def page(rows: Rows, environment: Sequence[str]) -> str:
    """The Markdown page: headline, environment, table, sums, frozen reasons, failures."""
    ours = [r for r in rows.values() if r.tool == OURS]
    peer = {r.model: r for r in rows.values() if r.tool == PEER}
    parts = [
        "# Coverage of networks",
        "",
        *(f"- {line}" for line in (*_headline(ours, peer), *environment)),
        "",
        *_summary(ours, peer),
        "## Networks",
        "",
        LEGEND,
        "",
        *_networks(ours, peer),
        "",
        "## What stays, and why",
        "",
        *_frozen(ours),
        "",
        *_failures(rows),
    ]
    return "\n".join(parts) + "\n"


def _headline(ours: list[Row], peer: dict[str, Row]) -> list[str]:
    exact = [r for r in ours if r.is_done]
    counted = [r for r in ours if _is_counted(r)]
    worst = max((r.difference for r in ours if r.difference is not None), default=0.0)
    line = (
        f"**autoprune: {len(exact)} of {len(ours)} networks exact** (worst difference {worst:.0e}), "
        f"cost predicted to the last multiply-add on {len(counted)}, {_sum(ours):.1f} CPU s in all"
    )
    if not peer:
        return [line]
    done = sum(r.is_done for r in peer.values())
    return [
        line,
        f"**Torch-Pruning: {done} of {len(peer)} complete**, {_sum(peer.values()):.1f} CPU s in all",
    ]


def _is_counted(row: Row) -> bool:
    return (
        row.counted_macs is not None
        and row.counted_macs == row.macs_after
        and row.counted_macs_before == row.macs
        and row.counted_params == row.params_after
    )


def _sum(rows: Iterable[Row], *, wall: bool = False) -> float:
    return sum((r.spent_s if wall else r.spent_cpu_s) or 0.0 for r in rows)


def _summary(ours: list[Row], peer: dict[str, Row]) -> list[str]:
    both = [(r, peer[r.model]) for r in ours if r.model in peer]
    completed = [(a, b) for a, b in both if a.is_done and b.is_done]
    reach = [r.reach for r in ours if r.reach is not None]
    peaks = [r.peak_ratio for r in ours if r.peak_ratio is not None]
    lines = ["## Sums", ""]
    if reach:
        lines.append(
            f"Share of MACs within reach: median {statistics.median(reach):.1%}, least {min(reach):.1%}. "
            f"Slowest: {_slowest(ours)}. Peak memory over the model's own: "
            f"median {statistics.median(peaks):.1f}, most {max(peaks):.1f}."
        )
        lines.append("")
    if both:
        lines += [
            COUNTED,
            "",
            "| networks | n | autoprune, CPU s | Torch-Pruning, CPU s | ratio | wall s | wall s | ratio |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            _sum_line("all, limits counted", both),
            _sum_line("completed by both", completed),
            "",
        ]
    return lines


def _slowest(rows: list[Row]) -> str:
    timed = [r for r in rows if r.spent_cpu_s is not None]
    if not timed:
        return "none"
    row = max(timed, key=lambda r: r.spent_cpu_s or 0)
    return f"{row.model} with {row.spent_cpu_s:.1f} CPU s"


def _sum_line(title: str, pairs: list[tuple[Row, Row]]) -> str:
    cells = [title, str(len(pairs))]
    for wall in (False, True):
        a, b = (_sum((p[i] for p in pairs), wall=wall) for i in (0, 1))
        cells += [f"{a:.1f}", f"{b:.1f}", f"{b / a:.1f}" if a else "-"]
    return f"| {' | '.join(cells)} |"


def _networks(ours: list[Row], peer: dict[str, Row]) -> list[str]:
    head = ["network", "outcome", "groups", "units", "reach", "MACs", "parameters", "cost", "apart"]
    head += ["trace", "plan", "densify", "sum", "memory"]
    if peer:
        head += ["Torch-Pruning", "build", "step", "sum", "MACs after"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in ours:
        cells = _own_cells(row)
        if peer:
            cells += _peer_cells(peer.get(row.model))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _own_cells(row: Row) -> list[str]:
    cost = ""
    if row.counted_macs is not None:
        cost = "equal" if _is_counted(row) else f"**{row.counted_macs / 1e6:.1f}**"
    return [
        row.model,
        row.outcome + (" *" if row.note else ""),
        _n(row.groups),
        _n(row.units),
        _n(row.reach, "{:.1%}"),
        _change(row.macs, row.macs_after, 1e6),
        _change(row.params, row.params_after, 1e3),
        cost,
        _n(row.difference, "{:.0e}"),
        *_seconds(row, ("trace_cpu_s", "plan_cpu_s", "densify_cpu_s")),
        _n(row.peak_ratio, "{:.1f}"),
    ]


def _peer_cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * 5
    seconds = _seconds(row, ("trace_cpu_s", "densify_cpu_s"))
    return [row.outcome, *seconds, _n(row.counted_macs, "{:.0f}", 1e6)]


def _seconds(row: Row, names: tuple[str, ...]) -> list[str]:
    return [*(_n(getattr(row, n), "{:.2f}") for n in names), _n(row.spent_cpu_s, "{:.2f}")]


def _n(value: float | None, form: str = "{:d}", unit: float = 1) -> str:
    return "" if value is None else form.format(value / unit if unit != 1 else value)


def _change(before: int | None, after: int | None, unit: float) -> str:
    return "" if before is None or after is None else f"{before / unit:.0f} > {after / unit:.0f}"


def _frozen(ours: list[Row]) -> list[str]:
    dims: Counter[str] = Counter()
    networks: Counter[str] = Counter()
    for row in ours:
        for reason, count in (json.loads(row.frozen) if row.frozen else {}).items():
            dims[reason] += count
            networks[reason] += 1
    lines = ["| reason | parameter dimensions | networks |", "|---|---:|---:|"]
    return lines + [f"| {r} | {n} | {networks[r]} |" for r, n in dims.most_common()]


def _failures(rows: Rows) -> list[str]:
    tests: list[tuple[str, Callable[[Row], bool]]] = [
        ("Not completed", lambda r: not r.is_done),
        ("Remarks on the comparison (marked * above)", lambda r: bool(r.note)),
        (f"Above {SLOW_S:.0f} CPU seconds", lambda r: r.tool == OURS and (r.spent_cpu_s or 0) > SLOW_S),
    ]
    lines = []
    for title, test in tests:
        hits = [r for r in rows.values() if test(r)]
        if hits:
            lines += [f"## {title}", ""]
            lines += [f"- {r.model}, {r.tool}: {r.outcome}. {_told(r)}" for r in hits]
            lines.append("")
    return lines


def _told(row: Row) -> str:
    text = "; ".join(t for t in (row.detail, row.note) if t) or f"{row.spent_cpu_s or 0:.1f} CPU s"
    return text.replace("|", "/")
