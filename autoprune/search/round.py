"""One round: an Optuna study whose trials choose how much to prune, how to rank, and how to fine-tune.

The value of a trial is lexicographic: recovered trials count what they removed, the others what they are
short of the floor (negative), so that the sampler, the dashboard and the controller agree on what is best.
What a trial tries follows from the stored trials and from (seed, round, seat), so a run that was stopped and
resumed asks for the same trials as one that was not. The seat of a trial is its place in the round; any
number of processes take seats, and a trial of a killed process gives its seat, and its parameters, back.

A trial climbs a ladder of complete learning-rate schedules and leaves it on a rung: when it has recovered,
or when the trials before it say that it cannot. Only annealed models are ever compared.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from autoprune import events as ev
from autoprune.config import Search
from autoprune.data import derive_seed
from autoprune.record import TrialRecord
from autoprune.search.budget import FINAL_SHARE, Meter, Speed, ladder
from autoprune.search.controller import Goal, State, TrialSummary, has_recovered
from autoprune.search.history import RESULT, RoundPlan, read_plan, read_trials, spent
from autoprune.search.near_miss import is_hopeful, is_near
from autoprune.search.proposals import Past, Point, Space, advise, make_sampler, settled_points, suggest
from autoprune.search.trial import Climb, Ground, TrialParams, TrialResult, failed_record, run_trial
from autoprune.storage import (
    CHECKPOINT,
    NO_OWNER,
    OWNER,
    POINT,
    POLL_S,
    Member,
    RunStore,
    Slot,
    StaleMonitor,
    claim_slot,
    completed_trials,
    finish_trial,
    release_stale,
    running_trials,
    set_attrs,
    start_trial,
)
from autoprune.training import EpochRecord, distributed

FAILED_VALUE = -1.0  # top-1 cannot fall short by more; NaN would teach the sampler nothing
TIE_WEIGHT = 1e-3  # of top-1 beside the rate
MAX_DEATHS = 5  # of processes on one seat, before its trial counts as failed; a guess
TELLING_EPOCHS = 1.0  # shorter schedules say little about the learning rate of a long one; a guess
TELLING_SHARE = 0.15  # of the budget, for more trials once the target is reached; a guess
SHORT = 0.05  # a budget is short when one trial takes more of it; a guess
KNOWN_GAINS = 2  # trials that went from the first rung to the second before one is given up there


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
    me: Member | None = None

    @property
    def owner(self) -> int:
        """The name of this process on its trials."""
        return NO_OWNER if self.me is None else self.me.number

    @property
    def search(self) -> Search:
        """The study's search settings."""
        return self.ground.study.search

    @property
    def space(self) -> Space:
        """What the round may try."""
        return Space.of(self.search, self.plan.ceiling)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the other ranks of this process have to know of a trial."""

    round: int
    params: TrialParams
    epochs: tuple[float, ...]
    seed: int


def search_round(job: RoundJob, study: optuna.Study, known: Sequence[Point]) -> None:
    """Run trials until the planned number is finished or the budget affords no more.

    The coordinator, or a process that is alone, stays until nobody runs a trial of the round any more, and
    frees the seats of those who died. A worker leaves when there is no seat for it.

    Args:
        job: what to work with.
        study: of this round; its finished trials count, those that a stopped process left are tried again.
        known: points to start with, most promising first.
    """
    leads = job.me is None or job.me.role == "coordinator"
    monitor, told = StaleMonitor(job.store), {t.number for t in completed_trials(study)}
    while True:
        if job.me is not None:
            job.me.check()
        if leads:
            release_stale(study, _alive(job, monitor))
        goes_on = not _is_served(job, study) and _affordable(job, study)
        taken = claim_slot(study, job.plan.trials, job.owner) if goes_on else None
        if taken is not None:
            _one_trial(job, study, taken, known)
        _tell_finished(job, study, told)
        if taken is None:
            if not leads or not running_trials(study):
                return
            time.sleep(POLL_S)


def _alive(job: RoundJob, monitor: StaleMonitor) -> set[int]:
    if job.me is None:
        return set()
    return {p.number for p in monitor.refresh() if p.state in ("working", "silent")}


def _tell_finished(job: RoundJob, study: optuna.Study, told: set[int]) -> None:
    """Say what was finished since, here or elsewhere."""
    for record in read_trials(study):
        if record.number not in told and record.state != "running" and record.seconds > 0:
            told.add(record.number)
            job.on_event(ev.TrialFinished(round=job.plan.number, record=record))


def next_point(job: RoundJob, study: optuna.Study, known: Sequence[Point], seat: int | None = None) -> Point:
    """What to try in this seat (the next one): a known point while there are some, then the sampler's advice.

    Once a trial has recovered at the ceiling, the rate stays there.
    """
    seat, space = len(completed_trials(study)) if seat is None else seat, job.space
    settled = _is_settled(job, study)
    points = settled_points(known, space) if settled and known else known
    if seat < len(points):
        return points[seat]
    sampler = make_sampler(job.search.sampler, derive_seed(job.ground.seed, seat))
    point = advise(space, sampler, [*_earlier(job), *_own(study), *_under_way(study)])
    return point | {"prune_rate": space.ceiling} if settled else point


def _is_settled(job: RoundJob, study: optuna.Study) -> bool:
    return any(
        t.recovered and t.params["prune_rate"] >= job.plan.ceiling * (1 - 1e-9) for t in read_trials(study)
    )


def _is_served(job: RoundJob, study: optuna.Study) -> bool:
    """Whether trials reached the target inside the floor, and enough was spent on bettering them.

    Nothing but accuracy is left to gain then. The final tuning gains more of it with the same epochs, but
    first a few trials, long enough to tell learning rates apart, may show which rate serves it best.
    """
    reached = sum(_reaches(t, job) for t in read_trials(study))
    if job.search.trials is not None or not reached:
        return should_tune_near_miss(job, study)
    epochs = ladder(job.plan.epochs, longer=False)[0]
    return epochs < TELLING_EPOCHS or reached * _share_of_a_trial(job, epochs) > TELLING_SHARE


def should_tune_near_miss(job: RoundJob, study: optuna.Study) -> bool:
    """Whether the rest of a short budget belongs to a trial at the target that missed the floor by little.

    Something has to be inside the floor already, so that there is a result if it does not come back.
    """
    trials = read_trials(study)
    is_safe = job.state.best.round > 0 or any(t.recovered for t in trials)
    if not _is_short(job) or not is_safe or any(_reaches(t, job) for t in trials):
        return False
    left = job.meter.left()
    epochs = min(left.epochs, left.seconds / job.speed.epoch_s)
    return any(is_hopeful(job.goal, t, epochs) for t in trials)


def _is_short(job: RoundJob) -> bool:
    """Whether the budget holds few trials of this round's length, and the study leaves their number open."""
    if job.search.trials is not None or job.search.epochs is not None:
        return False
    return _share_of_a_trial(job, job.plan.epochs) > SHORT


def _share_of_a_trial(job: RoundJob, epochs: float) -> float:
    """What part of the whole budget a trial of so many epochs takes."""
    return job.meter.share_of(job.speed.trial_of(epochs), epochs)


def _reaches(record: TrialRecord, job: RoundJob) -> bool:
    return record.recovered and record.cost_share is not None and job.goal.is_met_by(record.cost_share)


def _own(study: optuna.Study) -> list[Past]:
    return [Past(point=t.params, value=t.value) for t in completed_trials(study) if t.value is not None]


def _under_way(study: optuna.Study) -> list[Past]:
    """What others try at this moment, with the worst value so far, so that it is not tried twice."""
    worst = min((t.value for t in completed_trials(study) if t.value is not None), default=FAILED_VALUE)
    under_way = [t.user_attrs[POINT] for t in running_trials(study) if POINT in t.user_attrs]
    return [Past(point=point, value=worst) for point in under_way]


def _earlier(job: RoundJob) -> list[Past]:
    """The trials of the round before, told for this one.

    After a failure they started from the same network: rate and floor are comparable. After a promotion,
    the same share of the ceiling is taken to ask as much of the network as it did then.
    """
    before = job.store.study(job.plan.number - 1) if job.plan.number > 1 else None
    if before is None:
        return []
    plan = read_plan(before)
    same = plan.started_from == job.plan.started_from
    factor = 1.0 if same else job.plan.ceiling / plan.ceiling
    values = {t.number: t.value for t in completed_trials(before)}
    return [
        Past(
            point=t.params | {"prune_rate": factor * t.params["prune_rate"]},
            value=value_of(t, job) if same else _told_value(t, factor, values[t.number] or FAILED_VALUE),
        )
        for t in read_trials(before)
        if t.number in values
    ]


def _told_value(record: TrialRecord, factor: float, value: float) -> float:
    if record.recovered and record.prune_rate is not None and record.top1 is not None:
        return factor * record.prune_rate + TIE_WEIGHT * record.top1
    return value


def value_of(record: TrialRecord, job: RoundJob) -> float:
    """What the sampler maximises: the rate removed if recovered, otherwise minus the shortfall.

    Equal rates differ by their accuracy, which weighs too little to stand against a rate.
    """
    if record.top1 is None or record.prune_rate is None:
        return FAILED_VALUE
    if _recovered(record, job):
        return record.prune_rate + TIE_WEIGHT * record.top1
    return max(FAILED_VALUE, min(-1e-9, record.top1 - job.plan.floor))


def _one_trial(job: RoundJob, study: optuna.Study, taken: Slot, known: Sequence[Point]) -> None:
    point = taken.retry_point or next_point(job, study, known, taken.number)
    trial = start_trial(study, taken, point)
    try:
        params = suggest(trial, job.space)
        job.on_event(ev.TrialStarted(round=job.plan.number, trial=trial.number, params=trial.params))
        result = (
            _spared(taken) if taken.num_deaths >= MAX_DEATHS else _tried(job, trial, params, taken.number)
        )
        _keep(job, study, trial, result)
    except UpdateFinishedTrialError:
        job.on_event(ev.Note(message=f"trial {trial.number} was given to another process: left out here"))


def _tried(job: RoundJob, trial: optuna.Trial, params: TrialParams, seat: int) -> TrialResult:
    epochs = ladder(job.plan.epochs, longer=job.search.epochs is None)
    seed = derive_seed(job.ground.seed, seat)
    distributed.send_job(Task(round=job.plan.number, params=params, epochs=epochs, seed=seed))
    with distributed.shared_work():
        return run_trial(
            job.ground, params, epochs=epochs, seed=seed, goes_on=lambda climb: _goes_on(job, climb),
            seconds_left=lambda: job.meter.left().seconds,
            on_epoch=lambda e: _tell_epoch(job, trial.number, e),
        )  # fmt: skip


def _spared(taken: Slot) -> TrialResult:
    """A trial that killed process after process is not tried once more."""
    reason = f"{taken.num_deaths} processes died running it (out of memory?)"
    return TrialResult(record=failed_record(reason, seconds=1e-3), model=None, plan=None)


def _goes_on(job: RoundJob, climb: Climb) -> bool:
    """Whether a trial climbs to the next rung: it has not recovered yet, and it still can.

    From the first rung to the second it can if the largest gain that a trial of this run made there is
    enough. Beyond the planned epochs it can if what it gained on its last rung is enough once more, and the
    budget has the epochs; where that is short, a trial at the target leaves them to the final tuning.
    """
    top1 = climb.tops[-1]
    summary = TrialSummary(number=-1, prune_rate=climb.prune_rate, cost_share=climb.cost_share, top1=top1)
    if has_recovered(job.goal, job.state, summary):
        return False
    is_at_target = job.goal.is_met_by(climb.cost_share)
    floor = job.goal.floor if is_at_target else job.plan.floor
    if len(climb.tops) == 1:
        gains = _gains(job)
        return len(gains) < KNOWN_GAINS or top1 + max(gains) >= floor
    if is_at_target and _is_short(job) and is_near(job.goal, top1):
        return False
    hopeful = top1 + (top1 - climb.tops[-2]) >= floor
    return hopeful and job.meter.affords(
        climb.next_epochs * job.speed.epoch_s, climb.done + climb.next_epochs
    )


def _gains(job: RoundJob) -> list[float]:
    """What the trials of this run gained from the first rung to the second."""
    trials = [t for study in job.store.rounds() for t in read_trials(study)]
    return [t.rungs[1].top1 - t.rungs[0].top1 for t in trials if len(t.rungs) > 1]


def _keep(job: RoundJob, study: optuna.Study, trial: optuna.Trial, result: TrialResult) -> None:
    """Store the model first, then the result, then that the trial is finished."""
    record = result.record
    if record.top1 is not None and is_near(job.goal, record.top1):
        assert result.model is not None
        assert result.plan is not None
        set_attrs(trial, **{CHECKPOINT: job.store.save_checkpoint(result.model, result.plan)})
    if record.epochs:
        job.meter.spend(record.epochs[-1].epoch)
    set_attrs(trial, **{RESULT: _with_verdict(record, job)})
    if not finish_trial(study, trial, value_of(record, job)):
        raise UpdateFinishedTrialError
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
    """Whether one more trial fits, by what the round's trials took or, before the first, by the estimate.

    What all processes have used counts, and what the trials under way will use.
    """
    planned = 1.01 * job.plan.epochs  # those that climbed beyond it took longer
    took = [t.seconds for t in read_trials(study) if t.epochs and t.epochs[-1].epoch <= planned]
    estimate = job.speed.trial_of(job.plan.epochs)
    job.meter.epochs = max(job.meter.epochs, spent(job.store).epochs)
    reserved = job.plan.epochs * sum(t.user_attrs.get(OWNER) != job.owner for t in running_trials(study))
    is_first = job.plan.number == 1 and not study.get_trials(deepcopy=False)
    keep = 0.0 if is_first else FINAL_SHARE  # without a trial there is nothing to tune
    return job.meter.affords(max(took) if took else estimate, job.plan.epochs + reserved, keep=keep)


def same_failure(study: optuna.Study) -> str | None:
    """Why all trials of the round failed, if they did so in the same way."""
    records = [t for t in read_trials(study) if t.state != "running" and t.seconds > 0]
    ways = {re.sub(r"[\d.]+(e[-+]?\d+)?", "#", t.failure) for t in records}
    if not records or len(ways) > 1 or not records[0].failure:
        return None
    return records[0].failure


def _tell_epoch(job: RoundJob, trial: int, epoch: EpochRecord) -> None:
    job.on_event(
        ev.EpochFinished(
            round=job.plan.number, trial=trial, epoch=epoch.epoch, epochs=job.plan.epochs,
            lr=epoch.lr, train_loss=epoch.train_loss, images_per_s=epoch.images_per_s,
        )
    )  # fmt: skip
