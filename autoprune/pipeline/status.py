"""Where a run stands at this moment: its record, who works on it, and what they are at.

A run tells decisions and finished trials through its storage. What goes on between two of them is read off
the rest: a round's study begins when its analysis is done, and an analysis leaves its points as they come.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import datetime

import optuna
from optuna.trial import TrialState

from autoprune.config import Budget, Control
from autoprune.formatting import duration
from autoprune.location import DATABASE, RunLocation, RunReference
from autoprune.pipeline.baseline import is_measured
from autoprune.record import RoundRecord, RunRecord
from autoprune.search import checkpoint_of, kept_points, outcomes, read_goal, read_run, replay, spent
from autoprune.storage import (
    PROCESSES,
    Process,
    RunStore,
    list_processes,
    quiet_optuna,
    read_run_header,
    study_names_at,
)


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What can be known of a run from outside.

    Attributes:
        record: None while the original is still being measured.
        now: what goes on, or where the run was left; empty once it has ended.
        seconds_left: of a budget in time; what the present trial has used of it is not counted yet.
    """

    location: RunLocation
    name: str
    record: RunRecord | None
    processes: tuple[Process, ...]
    seconds_left: float | None
    now: str


def read_status(run: RunReference) -> RunStatus:
    """Read how a run stands.

    Raises:
        UsageError: there is no such run.
    """
    beginning = _beginning(run)
    if beginning is not None:
        return beginning
    told = read_run_header(run)
    with quiet_optuna(), closing(RunStore(told.location, told.name)) as store:
        record, processes = read_run(store), list_processes(store)
        used = spent(store).seconds
        seconds = Budget.parse(record.study["budget"]).counted(used).seconds
        left = None if seconds is None or record.outcome else max(0.0, seconds - used)
        now = "" if record.outcome else _now(store, record)
    if now and not _at_work(processes):
        again = f"{record.command} --resume" if record.command else "run(..., resume=True)"
        now = f"nobody works on it; it was left at {now}; go on with: {again}"
    return RunStatus(
        location=told.location, name=told.name, record=record, processes=processes, seconds_left=left, now=now
    )


def _beginning(run: RunReference) -> RunStatus | None:
    """A run whose original is not measured yet: all that there is of it are its processes."""
    if run.location.is_local and not (run.location.folder / DATABASE).is_file():
        return None
    begun = [
        s.removesuffix(f"/{PROCESSES}") for s in study_names_at(run.location) if s.endswith(f"/{PROCESSES}")
    ]
    name = run.name or min(begun, default=None)
    if name is None or name not in begun:
        return None
    with quiet_optuna(), closing(RunStore(run.location, name)) as store:
        if is_measured(store):
            return None
        processes = list_processes(store)
    now = "its original is being trained or measured; nothing is decided yet"
    if not _at_work(processes):
        now = "it was stopped before its original was measured; start it again"
    return RunStatus(
        location=run.location, name=name, record=None, processes=processes, seconds_left=None, now=now
    )


def _at_work(processes: tuple[Process, ...]) -> bool:
    return any(p.state in ("working", "silent") for p in processes)


def _now(store: RunStore, record: RunRecord) -> str:
    last = record.rounds[-1] if record.rounds else None
    if last is not None and last.action is None:
        return _searching(store, last)
    goal = read_goal(store)
    state = replay(goal, Control(**record.study["control"]), outcomes(store))
    if state.ended is not None:
        return "the end: final tuning, proof, export"
    original = store.study(0)
    assert original is not None
    table = kept_points(original, checkpoint_of(store, state.current.round, state.current.trial))
    points = f"{len(table.points)} points measured" if table else "no point measured yet"
    return f"round {state.round + 1}, analysis: {points}"


def _searching(store: RunStore, one: RoundRecord) -> str:
    study = store.study(one.number)
    assert study is not None
    done = sum(t.state != "running" for t in one.trials)
    running = [
        f"trial {t.number} has run for {duration(_since(t))}"
        for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    ]
    finished = f"round {one.number}, search: {done} of {one.planned_trials} trials finished"
    return ", ".join([finished, *running])


def _since(trial: optuna.trial.FrozenTrial) -> float:
    began = trial.datetime_start
    return 0.0 if began is None else max(0.0, (datetime.now(began.tzinfo) - began).total_seconds())
