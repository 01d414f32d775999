"""Read a run's studies back: the controller's outcomes, the rounds as records, the run as a record.

Everything here is derived from the storage alone, which is what makes resuming a replay and lets the report
be made again at any time. `RoundPlan` is what a round's study was created with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from autoprune.record import (
    Difference,
    FrozenPart,
    ModelSummary,
    Outcome,
    RoundRecord,
    RunRecord,
    SensitivityCell,
    SplitSummary,
    StageTime,
    TrialRecord,
    Tuning,
)
from autoprune.search.budget import Speed
from autoprune.search.controller import Goal, RoundOutcome, TrialSummary
from autoprune.serialization import from_plain
from autoprune.storage import CHECKPOINT, FINAL, RunStore, completed_trials, is_withdrawn

RESULT = "result"  # a trial's record, complete but for number, state and params
STATES: dict[TrialState, Any] = {TrialState.COMPLETE: "complete", TrialState.RUNNING: "running"}


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """What a round attempt is to do; kept as attributes of its study.

    Attributes:
        number: of the attempt, from 1.
        started_from: round whose promoted model is the start, `checkpoint` its weights.
        trials: to be finished; `epochs` of fine-tuning each.
        analysis_seconds: spent on `sensitivity`; 0 where an earlier attempt's was taken over.
    """

    number: int
    started_from: int
    checkpoint: str
    ceiling: float
    floor: float
    cost_share: float
    trials: int
    epochs: float
    sensitivity: tuple[SensitivityCell, ...]
    analysis_seconds: float


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has used so far of its budget, over all its processes."""

    seconds: float
    epochs: float


def read_goal(store: RunStore) -> Goal:
    """The run's goal, as its baseline was measured."""
    return from_plain(Goal, _baseline(store)["goal"])


def read_plan(study: optuna.Study) -> RoundPlan:
    """What this round was to do."""
    return from_plain(RoundPlan, study.user_attrs)


def is_decided(study: optuna.Study) -> bool:
    """Whether the controller has judged this round."""
    return "action" in study.user_attrs


def summaries(study: optuna.Study) -> tuple[TrialSummary, ...]:
    """The round's scored trials, as the controller reads them."""
    return tuple(
        TrialSummary(number=t.number, prune_rate=t.prune_rate, cost_share=t.cost_share, top1=t.top1)
        for t in read_trials(study)
        if t.prune_rate is not None and t.cost_share is not None and t.top1 is not None
    )


def outcomes(store: RunStore) -> list[RoundOutcome]:
    """All decided rounds, for `controller.replay`."""
    return [
        RoundOutcome(trials=summaries(study), budget_left=study.user_attrs["budget_left"])
        for study in store.rounds()
        if is_decided(study)
    ]


def checkpoint_of(store: RunStore, number: int, trial: int) -> str:
    """The artifact of a trial's model; round 0 is the baseline."""
    study = store.study(number)
    assert study is not None, f"round {number} is not in the store"
    artifact = study.trials[trial].user_attrs[CHECKPOINT]
    assert isinstance(artifact, str)
    return artifact


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """All trials of a round, those that failed or still run included."""
    promoted, known = study.user_attrs.get("promoted"), getattr(study._storage, "records", {})
    return tuple(
        replace(record, promoted=True) if record.number == promoted else record
        for record in (
            _known_or_read(t, known)
            for t in study.get_trials(deepcopy=False)
            if t.state is not TrialState.WAITING and not is_withdrawn(t)
        )
    )


def _known_or_read(trial: FrozenTrial, known: dict[int, TrialRecord]) -> TrialRecord:
    """A finished trial is read once: a round of a thousand trials looks back at all of them after each."""
    if trial.number not in known:
        record = _read_trial(trial)
        if not trial.state.is_finished():
            return record
        known[trial.number] = record
    return known[trial.number]


def read_round(study: optuna.Study) -> RoundRecord:
    """One round attempt; `action` is None while it is undecided."""
    plan, attributes = read_plan(study), study.user_attrs
    trials = read_trials(study)
    return RoundRecord(
        number=plan.number,
        started_from=plan.started_from,
        ceiling=plan.ceiling,
        floor=plan.floor,
        planned_trials=plan.trials,
        epochs=plan.epochs,
        cost_share=plan.cost_share,
        trials=trials,
        sensitivity=plan.sensitivity,
        action=attributes.get("action"),
        reason=attributes.get("reason", ""),
        seconds=plan.analysis_seconds + sum(t.seconds for t in trials),
    )


def spent(store: RunStore) -> Spent:
    """What the finished parts of the run have used: the seconds in which any trial ran, and all epochs."""
    studies = list(store.rounds())
    trials = [t for study in studies for t in read_trials(study)]
    return Spent(
        seconds=sum(read_plan(study).analysis_seconds + _busy_seconds(study) for study in studies),
        epochs=sum(t.epochs[-1].epoch for t in trials if t.epochs),
    )


def _busy_seconds(study: optuna.Study) -> float:
    """The time in which trials that were finished ran, counted once where several ran at a time."""
    total, until = 0.0, 0.0
    for trial in sorted(completed_trials(study), key=lambda t: t.datetime_start or datetime.min):
        if trial.datetime_start is None or trial.datetime_complete is None:
            continue
        began, ended = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def measured_speed(store: RunStore) -> Speed | None:
    """From the last round whose trials were tuned; None before there is one."""
    for study in reversed(list(store.rounds())):
        tuned = [t for t in read_trials(study) if t.epochs]
        if tuned:
            epochs = sum(t.epochs[-1].epoch for t in tuned)
            tuning_s = sum(t.tuning_seconds for t in tuned)
            return Speed(
                epoch_s=tuning_s / epochs,
                trial_s=(sum(t.seconds for t in tuned) - tuning_s) / len(tuned),
                analysis_s=read_plan(study).analysis_seconds,
            )
    return None


def pack(correct: NDArray[np.bool_] | None) -> str | None:
    """Per-sample results as text, so that a later process can compare on the same samples."""
    return None if correct is None else np.packbits(correct).tobytes().hex()


def unpack(text: str | None, num_samples: int) -> NDArray[np.bool_] | None:
    """What `pack` made."""
    if text is None:
        return None
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(packed, count=num_samples).astype(np.bool_)


def read_run(store: RunStore) -> RunRecord:
    """Everything about the run, finished or not."""
    start = _baseline(store)
    final_study = store.study(FINAL)
    final = final_study.user_attrs if final_study is not None else {}
    rounds = tuple(read_round(study) for study in store.rounds())
    goal = read_goal(store)
    times = _stage_times(start, rounds, final)
    return RunRecord(
        name=store.name,
        command=start["command"],
        started=start["started"],
        seconds=sum(t.seconds for t in times),
        study=start["settings"],
        target=start["target"],
        target_metric=start["target_metric"],
        target_share=goal.target_share,
        max_drop_pp=goal.max_drop_pp,
        floor=goal.floor,
        before=from_plain(ModelSummary, final.get("before", start["before"])),
        after=from_plain(ModelSummary, final["after"]) if "after" in final else None,
        difference=from_plain(Difference, final["difference"]) if "difference" in final else None,
        rounds=rounds,
        outcome=from_plain(Outcome, final["outcome"]) if "outcome" in final else None,
        timings=times,
        data=from_plain(tuple[SplitSummary, ...], start["data"]),
        frozen=from_plain(tuple[FrozenPart, ...], start["frozen"]),
        environment=start["environment"],
        tuning=from_plain(Tuning, final["tuning"]) if final.get("tuning") else None,
    )


def _baseline(store: RunStore) -> dict[str, Any]:
    study = store.study(0)
    assert study is not None, "a store is opened only where there is a baseline"
    return study.user_attrs


def _stage_times(
    start: Mapping[str, Any], rounds: Iterable[RoundRecord], final: Mapping[str, Any]
) -> tuple[StageTime, ...]:
    trials = sum(t.seconds for r in rounds for t in r.trials)
    analysis = sum(r.seconds for r in rounds) - trials
    times = {"baseline": start["seconds"], "analysis": analysis, "search": trials}
    if "seconds" in final:
        times["finish"] = final["seconds"]
    return tuple(StageTime(stage=stage, seconds=seconds) for stage, seconds in times.items())


def _read_trial(trial: FrozenTrial) -> TrialRecord:
    result: Mapping[str, Any] = trial.user_attrs.get(RESULT, {})
    state = STATES.get(trial.state, "failed")
    if result.get("failure"):
        state = "failed"
    stopped = "" if state != "failed" or result else "the process that ran it was stopped"
    known = {"failure": stopped} | dict(result)
    merged = known | {"number": trial.number, "state": state, "params": trial.params}
    return from_plain(TrialRecord, merged)
