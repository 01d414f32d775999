"""The status of a run at this moment: its record, the processes that work on it, and what they are doing.

A run stores decisions and finished trials. What goes on between two of them follows from the rest: a round's
study is created when its analysis is complete, and an analysis stores its points as they come.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime

import optuna

from autoprune.config import Budget, Control
from autoprune.formatting import duration
from autoprune.location import DATABASE, RunLocation, RunReference
from autoprune.pipeline.baseline import is_measured
from autoprune.record import RoundRecord, RunRecord
from autoprune.search import (
    checkpoint_of,
    load_points,
    read_baseline,
    read_run,
    replay,
    round_outcomes,
    used_budget,
)
from autoprune.storage import (
    PROCESSES,
    Process,
    RunStore,
    list_processes,
    quiet_optuna,
    read_run_header,
    running_trials,
    study_names_at,
)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a run, as any process can read it from its storage.

    Attributes:
        record: None while the original is still being measured.
        now: the present activity, or the point where the run was left; empty once the run has ended.
        seconds_left: the rest of a budget in time; the time of the present trial is not counted yet.
    """

    location: RunLocation
    name: str
    record: RunRecord | None
    processes: tuple[Process, ...]
    seconds_left: float | None
    now: str


def read_status(run: RunReference) -> RunStatus:
    """Read the status of a run.

    Raises:
        UsageError: there is no such run.
    """
    beginning = _status_before_baseline(run)
    if beginning is not None:
        return beginning
    header = read_run_header(run)
    with quiet_optuna(), closing(RunStore(header.location, header.name)) as store:
        record, processes = read_run(store), list_processes(store)
        used = used_budget(store).seconds
        seconds = Budget.parse(record.study["budget"]).counted(used).seconds
        seconds_left = None if seconds is None or record.outcome else max(0.0, seconds - used)
        now = "" if record.outcome else _stage_text(store, record)
    if now and not _is_active(processes):
        again = f"{record.command} --resume" if record.command else "run(..., resume=True)"
        now = f"nobody works on it; it was left at {now}; go on with: {again}"
    return RunStatus(
        location=header.location, name=header.name, record=record, processes=processes,
        seconds_left=seconds_left, now=now,
    )  # fmt: skip


def _status_before_baseline(run: RunReference) -> RunStatus | None:
    """Return the status of a run whose original is not measured yet: its processes are all there is of it."""
    if run.location.is_local and not (run.location.folder / DATABASE).is_file():
        return None
    suffix = f"/{PROCESSES}"
    names = [s.removesuffix(suffix) for s in study_names_at(run.location) if s.endswith(suffix)]
    name = run.name or min(names, default=None)
    if name is None or name not in names:
        return None
    with quiet_optuna(), closing(RunStore(run.location, name)) as store:
        if is_measured(store):
            return None
        processes = list_processes(store)
    now = "its original is being trained or measured; nothing is decided yet"
    if not _is_active(processes):
        now = "it was stopped before its original was measured; start it again"
    return RunStatus(
        location=run.location, name=name, record=None, processes=processes, seconds_left=None, now=now
    )


def _is_active(processes: tuple[Process, ...]) -> bool:
    return any(p.state in ("working", "silent") for p in processes)


def _stage_text(store: RunStore, record: RunRecord) -> str:
    last = record.rounds[-1] if record.rounds else None
    if last is not None and last.action is None:
        return _search_text(store, last)
    control = Control(**record.study["control"])
    state = replay(read_baseline(store).goal, control, round_outcomes(store))
    if state.ended is not None:
        return "the end: final tuning, verification, export"
    baseline = store.study(0)
    assert baseline is not None
    table = load_points(baseline, checkpoint_of(store, state.current.round, state.current.trial))
    points = f"{len(table.points)} points measured" if table else "no point measured yet"
    return f"round {state.round + 1}, analysis: {points}"


def _search_text(store: RunStore, record: RoundRecord) -> str:
    study = store.study(record.number)
    assert study is not None
    num_finished = sum(t.state != "running" for t in record.trials)
    running = [
        f"trial {t.number} has run for {duration(_seconds_since_start(t))}" for t in running_trials(study)
    ]
    progress = f"round {record.number}, search: {num_finished} of {record.planned_trials} trials finished"
    return ", ".join([progress, *running])


def _seconds_since_start(trial: optuna.trial.FrozenTrial) -> float:
    start = trial.datetime_start
    return 0.0 if start is None else max(0.0, (datetime.now(start.tzinfo) - start).total_seconds())
