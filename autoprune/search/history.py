"""What a run's studies hold, written and read back as typed values.

Each kind of study has an entry: the baseline, a round with the controller's decision, the delivered model.
Their fields are the user attributes of the study; no other module knows these attributes by name. Everything
else is derived from the entries and the trials, which is what makes resuming a replay and lets the report
be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from autoprune.pruning import SensitivityTable
from autoprune.record import (
    Action,
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
from autoprune.storage import CHECKPOINT, FINAL, RunStore, cached_records, completed_trials, is_withdrawn

RESULT = "result"  # a trial's attribute: its record, complete but for number, state and params
STATES: dict[TrialState, Any] = {TrialState.COMPLETE: "complete", TrialState.RUNNING: "running"}


@dataclass(frozen=True, kw_only=True)
class BaselineEntry:
    """How a run was started, and its original measured; of the study `round-00`.

    Attributes:
        command: the command line that makes the run again; `sources` are the SHA-256 of the files in it.
        artifacts: the artifact store that was given, None where checkpoints lie in the run's folder.
        started: in UTC, as ISO 8601.
        settings: the resolved study as plain values.
        test_correct: what `pack_bits` made of the per-sample results on the test split.
        seconds: what training and measuring the original took.
    """

    command: str
    sources: dict[str, str]
    artifacts: str | None
    started: str
    settings: dict[str, Any]
    target: str
    target_metric: str
    goal: Goal
    before: ModelSummary
    test_correct: str | None
    data: tuple[SplitSummary, ...]
    frozen: tuple[FrozenPart, ...]
    environment: dict[str, str]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundEntry:
    """What a round attempt is to do; of the study `round-NN`.

    Attributes:
        number: of the attempt, from 1.
        started_from: round whose promoted model is the start, `checkpoint` its weights.
        trials: to be completed; `epochs` of fine-tuning each.
        table: the whole sensitivity table as JSON; `sensitivity` is what people read of it.
        analysis_seconds: spent on the analysis; 0 where an earlier attempt's was taken over.
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
    table: str
    analysis_seconds: float

    def sensitivity_table(self) -> SensitivityTable:
        """Return the sensitivity of the round's start."""
        return SensitivityTable.from_json(self.table)


@dataclass(frozen=True, kw_only=True)
class DecisionEntry:
    """What the controller decided about a round; added to the round's study."""

    budget_left: bool
    promoted: int | None
    reason: str
    action: Action


@dataclass(frozen=True, kw_only=True)
class FinalEntry:
    """The delivered model; of the study `final`.

    Attributes:
        started_from: round that made the model, before it was tuned for `tuned_epochs`.
        seconds: what the final tuning and the measurements took.
    """

    before: ModelSummary
    after: ModelSummary
    difference: Difference
    outcome: Outcome
    started_from: int
    tuned_epochs: float
    tuning: Tuning | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class UsedBudget:
    """What a run has used of its budget so far, over all its processes."""

    seconds: float
    epochs: float


def read_baseline(store: RunStore) -> BaselineEntry:
    """Read the baseline's entry; a store is opened for reading only where there is one."""
    study = store.study(0)
    assert study is not None, "the original is not measured yet"
    return from_plain(BaselineEntry, study.user_attrs)


def read_round(study: optuna.Study) -> RoundEntry:
    """Read what a round was to do."""
    return from_plain(RoundEntry, study.user_attrs)


def read_decision(study: optuna.Study) -> DecisionEntry | None:
    """Read what the controller decided about a round, None while it has not judged it."""
    return from_plain(DecisionEntry, study.user_attrs) if is_decided(study) else None


def read_final(store: RunStore) -> FinalEntry | None:
    """Read the delivered model's entry, None before it was measured."""
    study = store.study(FINAL)
    return None if study is None else from_plain(FinalEntry, study.user_attrs)


def is_decided(study: optuna.Study) -> bool:
    """Return whether the controller has judged a round."""
    return "action" in study.user_attrs


def trial_summaries(study: optuna.Study) -> tuple[TrialSummary, ...]:
    """Return the round's scored trials as the controller reads them."""
    return tuple(
        TrialSummary(number=t.number, prune_rate=t.prune_rate, cost_share=t.cost_share, top1=t.top1)
        for t in read_trials(study)
        if t.prune_rate is not None and t.cost_share is not None and t.top1 is not None
    )


def round_outcomes(store: RunStore) -> list[RoundOutcome]:
    """Return all judged rounds, for `controller.replay`."""
    decisions = [(study, read_decision(study)) for study in store.rounds()]
    return [
        RoundOutcome(trials=trial_summaries(study), budget_left=decision.budget_left)
        for study, decision in decisions
        if decision is not None
    ]


def checkpoint_of(store: RunStore, number: int, trial: int) -> str:
    """Return the checkpoint's id of a trial's model; round 0 is the baseline."""
    study = store.study(number)
    assert study is not None, f"round {number} is not in the store"
    artifact = study.trials[trial].user_attrs[CHECKPOINT]
    assert isinstance(artifact, str)
    return artifact


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """Return the records of a round's trials, those that failed or still run included."""
    promoted, cache = study.user_attrs.get("promoted"), cached_records(study)
    records = (
        _read_trial_once(t, cache)
        for t in study.get_trials(deepcopy=False)
        if t.state is not TrialState.WAITING and not is_withdrawn(t)
    )
    return tuple(replace(r, promoted=True) if r.number == promoted else r for r in records)


def _read_trial_once(trial: FrozenTrial, cache: dict[int, TrialRecord]) -> TrialRecord:
    """Read a finished trial once: a round of a thousand trials looks back at all of them after each."""
    if trial.number not in cache:
        record = _read_trial(trial)
        if not trial.state.is_finished():
            return record
        cache[trial.number] = record
    return cache[trial.number]


def _read_trial(trial: FrozenTrial) -> TrialRecord:
    result: Mapping[str, Any] = trial.user_attrs.get(RESULT, {})
    state = STATES.get(trial.state, "failed")
    if result.get("failure"):
        state = "failed"
    failure = "" if state != "failed" or result else "the process that ran it was stopped"
    values = {"failure": failure} | dict(result)
    values |= {"number": trial.number, "state": state, "params": trial.params}
    return from_plain(TrialRecord, values)


def round_record(study: optuna.Study) -> RoundRecord:
    """Return one round attempt as people read it; `action` is None while it is not judged."""
    entry, decision, trials = read_round(study), read_decision(study), read_trials(study)
    return RoundRecord(
        number=entry.number,
        started_from=entry.started_from,
        ceiling=entry.ceiling,
        floor=entry.floor,
        planned_trials=entry.trials,
        epochs=entry.epochs,
        cost_share=entry.cost_share,
        trials=trials,
        sensitivity=entry.sensitivity,
        action=decision.action if decision else None,
        reason=decision.reason if decision else "",
        seconds=entry.analysis_seconds + sum(t.seconds for t in trials),
    )


def used_budget(store: RunStore) -> UsedBudget:
    """Return what the finished parts of a run used: seconds in which a trial ran, epochs of all trials."""
    studies = list(store.rounds())
    trials = [t for study in studies for t in read_trials(study)]
    return UsedBudget(
        seconds=sum(read_round(study).analysis_seconds + _busy_seconds(study) for study in studies),
        epochs=sum(t.epochs[-1].epoch for t in trials if t.epochs),
    )


def _busy_seconds(study: optuna.Study) -> float:
    """Return the time in which completed trials ran, counted once where several ran at a time."""
    total, until = 0.0, 0.0
    for trial in sorted(completed_trials(study), key=lambda t: t.datetime_start or datetime.min):
        if trial.datetime_start is None or trial.datetime_complete is None:
            continue
        began, ended = trial.datetime_start.timestamp(), trial.datetime_complete.timestamp()
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def measured_speed(store: RunStore) -> Speed | None:
    """Return the speed of the last round whose trials were tuned, None before there is one."""
    for study in reversed(list(store.rounds())):
        tuned = [t for t in read_trials(study) if t.epochs]
        if tuned:
            epochs = sum(t.epochs[-1].epoch for t in tuned)
            tuning_s = sum(t.tuning_seconds for t in tuned)
            return Speed(
                epoch_s=tuning_s / epochs,
                trial_s=(sum(t.seconds for t in tuned) - tuning_s) / len(tuned),
                analysis_s=read_round(study).analysis_seconds,
            )
    return None


def pack_bits(correct: NDArray[np.bool_] | None) -> str | None:
    """Return per-sample results as text, so that a later process can compare on the same samples."""
    return None if correct is None else np.packbits(correct).tobytes().hex()


def unpack_bits(text: str | None, num_samples: int) -> NDArray[np.bool_] | None:
    """Return what `pack_bits` was given."""
    if text is None:
        return None
    packed = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    return np.unpackbits(packed, count=num_samples).astype(np.bool_)


def read_run(store: RunStore) -> RunRecord:
    """Return everything about a run, finished or not."""
    baseline, final = read_baseline(store), read_final(store)
    rounds = tuple(round_record(study) for study in store.rounds())
    timings = _stage_times(baseline, rounds, final)
    return RunRecord(
        name=store.name,
        command=baseline.command,
        started=baseline.started,
        seconds=sum(t.seconds for t in timings),
        study=baseline.settings,
        target=baseline.target,
        target_metric=baseline.target_metric,
        target_share=baseline.goal.target_share,
        max_drop_pp=baseline.goal.max_drop_pp,
        floor=baseline.goal.floor,
        before=final.before if final else baseline.before,
        after=final.after if final else None,
        difference=final.difference if final else None,
        rounds=rounds,
        outcome=final.outcome if final else None,
        timings=timings,
        data=baseline.data,
        frozen=baseline.frozen,
        environment=baseline.environment,
        tuning=final.tuning if final else None,
    )


def _stage_times(
    baseline: BaselineEntry, rounds: tuple[RoundRecord, ...], final: FinalEntry | None
) -> tuple[StageTime, ...]:
    trials = sum(t.seconds for r in rounds for t in r.trials)
    analysis = sum(r.seconds for r in rounds) - trials
    times = {"baseline": baseline.seconds, "analysis": analysis, "search": trials}
    if final is not None:
        times["finish"] = final.seconds
    return tuple(StageTime(stage=stage, seconds=seconds) for stage, seconds in times.items())
