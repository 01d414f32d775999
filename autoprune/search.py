"""One round: an Optuna study whose trials choose how much to prune, how to rank, and how to fine-tune.

The value of a trial is lexicographic: recovered trials count what they removed, the others what they are
short of the floor (negative), so that the sampler, the dashboard and the controller agree on what is best.
The first trials are known-good points; a fresh sampler is seeded for every trial from (seed, round, seat),
so a run that was stopped and resumed asks for the same trials as one that was not. The seat of a trial is
its place among the finished ones: a trial of a killed process gives its seat, and its parameters, back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
import torch
from torch import nn

from autoprune import events as ev
from autoprune.budget import Meter, Speed
from autoprune.config import Search
from autoprune.controller import Goal, State, TrialSummary, has_recovered
from autoprune.densify import densify
from autoprune.errors import TrialError
from autoprune.history import CHECKPOINT, RESULT, RoundPlan, read_trials
from autoprune.record import TrialRecord
from autoprune.splits import derive_seed
from autoprune.store import RunStore, fail_left_running_, put, scored
from autoprune.train import EpochRecord
from autoprune.trial import Ground, TrialParams, TrialResult, run_trial

FAILED_VALUE = -1.0  # top-1 cannot fall short by more; NaN would teach the sampler nothing
STARTUP_TRIALS = 4  # measured on a surrogate of 8 to 32 trials: fewer random trials lose nothing
SHALLOW = 0.5  # the lowest rate searched, as a share of the ceiling
SNAP = 0.95  # rates from this share of the ceiling on become the ceiling, or targets are missed by a hair
TIE_WEIGHT = 1e-3  # of top-1 beside the rate

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundJob:
    """All that a round works with."""

    ground: Ground
    plan: RoundPlan
    goal: Goal
    state: State
    store: RunStore
    meter: Meter
    speed: Speed
    on_event: ev.OnEvent

    @property
    def search(self) -> Search:
        """The study's search settings."""
        return self.ground.study.search


def search_round(job: RoundJob, study: optuna.Study, known: Sequence[Point]) -> None:
    """Run the round's trials until the planned number is finished or the budget affords no more.

    Args:
        job: what to work with.
        study: of this round; its finished trials count, those that a stopped process left are tried again.
        known: points to start with, most promising first.
    """
    again = [t.params for t in fail_left_running_(study) if t.params]
    while (seat := len(scored(study))) < job.plan.trials and _affordable(job, study):
        if again:
            study.enqueue_trial(again.pop(0))
        elif seat < len(known):
            study.enqueue_trial(known[seat])
        study.sampler = make_sampler(job.search.sampler, derive_seed(job.ground.seed, seat))
        _one_trial(job, study, seat)


def make_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler that a study names."""
    if kind == "gp":
        return optuna.samplers.GPSampler(n_startup_trials=STARTUP_TRIALS, seed=seed % 2**32)
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed % 2**32)
    return optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed % 2**32)


def suggest(trial: optuna.Trial, search: Search, ceiling: float) -> TrialParams:
    """Let the sampler choose a trial's parameters, those of its decay included."""
    trial.suggest_float("prune_rate", SHALLOW * ceiling, ceiling)
    trial.suggest_float("lr", *search.lr, log=True)
    decay = trial.suggest_categorical("decay", search.decays)
    trial.suggest_categorical("criterion", search.criteria)
    trial.suggest_categorical("strategy", search.strategies)
    if decay == "step":
        trial.suggest_float("step_gamma", 0.1, 0.5)
        trial.suggest_int("step_milestones", 1, 3)
    elif decay == "exponential":
        trial.suggest_float("exponential_gamma", 1e-3, 1e-1, log=True)
    else:
        trial.suggest_float(f"{decay}_final", 0.0, 0.1)
    return params_of(trial.params, ceiling)


def params_of(point: Mapping[str, Any], ceiling: float) -> TrialParams:
    """A trial's parameters, from what the storage holds."""
    rate, decay = point["prune_rate"], point["decay"]
    return TrialParams(
        prune_rate=ceiling if rate >= SNAP * ceiling else rate, lr=point["lr"], decay=decay,
        gamma=point.get(f"{decay}_gamma"), milestones=point.get(f"{decay}_milestones"),
        final=point.get(f"{decay}_final", 0.0), criterion=point["criterion"], strategy=point["strategy"],
    )  # fmt: skip


def value_of(record: TrialRecord, job: RoundJob) -> float:
    """What the sampler maximises: the rate removed if recovered, otherwise minus the shortfall.

    Equal rates differ by their accuracy, which weighs too little to stand against a rate.
    """
    if record.top1 is None or record.prune_rate is None:
        return FAILED_VALUE
    if _recovered(record, job):
        return record.prune_rate + TIE_WEIGHT * record.top1
    return max(FAILED_VALUE, min(-1e-9, record.top1 - job.plan.floor))


def first_points(job: RoundJob) -> list[Point]:
    """Where the first round starts: at the ceiling and at a safe low rate, with learning rates that fit.

    The more of the weights goes, the higher the rate that recovers it (the idea of ALLR: Zimmer et al. 2023,
    "How I learned to stop worrying and love retraining", section 3). Theirs is linear in the change and so
    at its highest for whole channels; on a log scale it meets what was measured. ResNet-20 on CIFAR-10,
    35 % removed, 190 steps: 0.01 -> 90.2, 0.03 -> 89.1, 0.1 -> 86.7 % top-1.
    """
    return [_point(job, rate) for rate in (job.plan.ceiling, SHALLOW * job.plan.ceiling)]


def next_points(job: RoundJob, previous: optuna.Study) -> list[Point]:
    """Where a later round starts: the last round's best at the new ceiling, and at a safe low rate."""
    trials = [t for t in read_trials(previous) if t.top1 is not None]
    if not trials:
        return first_points(job)
    best = next((t for t in trials if t.promoted), max(trials, key=lambda t: t.top1 or 0.0))
    ceiling = job.plan.ceiling
    return [best.params | {"prune_rate": ceiling}, best.params | {"prune_rate": SHALLOW * ceiling}]


def _one_trial(job: RoundJob, study: optuna.Study, seat: int) -> None:
    trial = study.ask()
    params = suggest(trial, job.search, job.plan.ceiling)
    job.on_event(ev.TrialStarted(round=job.plan.number, trial=trial.number, params=trial.params))
    result = run_trial(
        job.ground, params, epochs=job.plan.epochs, seed=derive_seed(job.ground.seed, seat),
        on_epoch=lambda e: _tell_epoch(job, trial.number, e),
    )  # fmt: skip
    _keep(job, study, trial, result)


def _keep(job: RoundJob, study: optuna.Study, trial: optuna.Trial, result: TrialResult) -> None:
    """Store the model first, then the result, then that the trial is finished."""
    record = result.record
    if record.top1 is not None and record.top1 >= job.goal.floor - 1e-9:
        assert result.model is not None
        assert result.plan is not None
        put(trial, **{CHECKPOINT: job.store.save(result.model, result.plan)})
    if record.epochs:
        job.meter.spend(record.epochs[-1].epoch)
    put(trial, **{RESULT: _with_verdict(record, job)})
    study.tell(trial, value_of(record, job))
    told = next(t for t in read_trials(study) if t.number == trial.number)
    job.on_event(ev.TrialFinished(round=job.plan.number, record=told))
    tell_budget(job.meter, job.on_event)


def tell_budget(meter: Meter, on_event: ev.OnEvent) -> None:
    """Say how much is used."""
    on_event(
        ev.BudgetUsed(
            seconds=meter.seconds, seconds_total=meter.budget.seconds,
            epochs=meter.epochs, epochs_total=meter.budget.epochs,
        )
    )  # fmt: skip


def _with_verdict(record: TrialRecord, job: RoundJob) -> TrialRecord:
    return replace(record, recovered=_recovered(record, job))


def _recovered(record: TrialRecord, job: RoundJob) -> bool:
    if record.top1 is None or record.prune_rate is None or record.cost_share is None:
        return False
    summary = TrialSummary(
        number=record.number, prune_rate=record.prune_rate, cost_share=record.cost_share, top1=record.top1
    )
    return has_recovered(job.goal, job.state, summary)


def _affordable(job: RoundJob, study: optuna.Study) -> bool:
    """Whether one more trial fits, by what the round's trials took or, before the first, by the estimate."""
    took = [t.seconds for t in read_trials(study) if t.epochs]
    estimate = job.plan.epochs * job.speed.epoch_s + job.speed.trial_s
    return job.meter.affords(max(took) if took else estimate, job.plan.epochs)


def _tell_epoch(job: RoundJob, trial: int, epoch: EpochRecord) -> None:
    job.on_event(
        ev.EpochFinished(
            round=job.plan.number, trial=trial, epoch=epoch.epoch, epochs=job.plan.epochs,
            lr=epoch.lr, train_loss=epoch.train_loss, images_per_s=epoch.images_per_s,
        )
    )  # fmt: skip
    if job.meter.left().seconds < 0:
        raise TrialError("the time budget ran out during fine-tuning", "give the run a larger --budget")


def _point(job: RoundJob, rate: float) -> Point:
    search = job.search
    decay = "cosine" if "cosine" in search.decays else search.decays[0]
    low, high = search.lr
    point: Point = {
        "prune_rate": rate, "decay": decay, "criterion": search.criteria[0],
        "strategy": search.strategies[0],
    }  # fmt: skip
    if decay in ("cosine", "linear"):
        point[f"{decay}_final"] = 0.0
    change = _weight_change(job.ground, rate, search.criteria[0], search.strategies[0])
    return point | {"lr": min(max(low * (high / low) ** change, low), high)}


def _weight_change(ground: Ground, rate: float, criterion: str, strategy: str) -> float:
    """The share of the weights' norm that a rate takes away, in [0, 1]."""
    params = TrialParams(prune_rate=rate, lr=1.0, decay="linear", criterion=criterion, strategy=strategy)
    pruned = densify(ground.model, ground.graph, ground.choose(params))
    return math.sqrt(max(0.0, 1 - _square_norm(pruned) / _square_norm(ground.model)))


def _square_norm(model: nn.Module) -> float:
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return sum(float(torch.sum(w.double() ** 2)) for w in weights)
