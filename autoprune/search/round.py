"""One round: an Optuna study whose trials choose how much to prune, how to rank, and how to fine-tune.

The value of a trial is lexicographic: recovered trials count what they removed, the others what they are
short of the floor (negative), so that the sampler, the dashboard and the controller agree on what is best.

What a trial tries follows from the stored trials and from (seed, round, slot), so a run that was stopped and
resumed tries the same as one that was not. Any number of processes share the slots of a round; when a process
is killed, its slot becomes free, and the next trial there tries the same parameters.

Trials climb rungs (`trial`), and leave when they have recovered, or when the trials before them say that they
cannot.
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
from autoprune.heuristics import Heuristics
from autoprune.record import TrialRecord
from autoprune.search.budget import BudgetTracker, Speed, rung_epochs
from autoprune.search.context import RoundContext, RunContext
from autoprune.search.controller import State, TrialSummary, has_recovered
from autoprune.search.history import RESULT, RoundEntry, read_round, read_trials, used_budget
from autoprune.search.near_miss import can_recover, is_near
from autoprune.search.proposals import (
    Observation,
    SearchSpace,
    initial_points,
    make_sampler,
    next_points,
    points_at_ceiling,
    propose,
    suggest,
)
from autoprune.search.trial import (
    RungState,
    TrialHooks,
    TrialParams,
    TrialResult,
    failed_record,
    run_trial,
)
from autoprune.storage import (
    CHECKPOINT,
    OWNER,
    POINT,
    POLL_S,
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
TIE_WEIGHT = 1e-3  # of top-1 beside the rate: it decides between equal rates and never against a rate


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundSearch:
    """A round that is being searched.

    Attributes:
        entry: what the round is to do, as its study says.
        state: of the controller before the round.
        speed: what an epoch and a trial take here.
    """

    run: RunContext
    context: RoundContext
    entry: RoundEntry
    state: State
    speed: Speed

    @property
    def settings(self) -> Search:
        """The study's search settings."""
        return self.run.problem.study.search

    @property
    def heuristics(self) -> Heuristics:
        """The study's shares, thresholds and factors."""
        return self.run.problem.heuristics

    @property
    def space(self) -> SearchSpace:
        """What the round may try."""
        return SearchSpace(search=self.settings, ceiling=self.entry.ceiling, heuristics=self.heuristics)

    def share_of_budget(self, epochs: float) -> float:
        """Return the share of the whole budget that a trial of so many epochs takes."""
        return self.run.budget.share_of(self.speed.trial_seconds(epochs), epochs)

    def is_budget_short(self) -> bool:
        """Return whether the budget holds few such trials, and the study leaves their number open."""
        if self.settings.trials is not None or self.settings.epochs is not None:
            return False
        return self.share_of_budget(self.entry.epochs) > self.heuristics.short_budget_share


@dataclass(frozen=True, kw_only=True)
class TrialAnnouncement:
    """What rank 0 tells the other ranks of a trial that all of them train together."""

    round: int
    params: TrialParams
    rungs: tuple[float, ...]
    seed: int


def search_round(search: RoundSearch, study: optuna.Study, points: Sequence[TrialParams]) -> None:
    """Run trials until the planned number is completed, or the budget affords no more.

    The coordinator, or a process that is alone, stays until nobody runs a trial of the round any more, and
    releases the slots of processes that died. A worker returns when there is no slot for it.

    Args:
        search: the round.
        study: of the round. Its completed trials count; those that a stopped process left are tried again.
        points: to start with, most promising first.
    """
    run = search.run
    monitor, reported = StaleMonitor(run.store), {t.number for t in completed_trials(study)}
    while True:
        if run.member is not None:
            run.member.check()
        if run.is_coordinator:
            release_stale(study, _living_processes(run, monitor))
        run.budget.count_at_least(used_budget(run.store).epochs)
        needs_trial = not _has_enough_trials(search, study) and _affords_trial(search, study)
        slot = claim_slot(study, search.entry.trials, run.owner) if needs_trial else None
        if slot is not None:
            _run_slot(search, study, slot, points)
        _report_finished(search, study, reported)
        if slot is None:
            if not run.is_coordinator or not running_trials(study):
                return
            time.sleep(POLL_S)


def starting_points(search: RoundSearch) -> list[TrialParams]:
    """Return what the round tries first: in a later round, what was best in the one before."""
    number, store = search.entry.number, search.run.store
    previous = store.study(number - 1) if number > 1 else None
    scored = [t for t in read_trials(previous) if t.top1 is not None] if previous is not None else []
    if not scored:
        return initial_points(search.context, search.space)
    best = next((t for t in scored if t.promoted), max(scored, key=lambda t: t.top1 or 0.0))
    return next_points(TrialParams.from_optuna(best.params), search.space)


def next_point(
    search: RoundSearch, study: optuna.Study, points: Sequence[TrialParams], slot: int | None = None
) -> TrialParams:
    """Return what to try in a slot (by default the next one): a starting point, then the sampler's proposal.

    Once a trial has recovered at the ceiling, the rate stays there.
    """
    slot, space = len(completed_trials(study)) if slot is None else slot, search.space
    at_ceiling = _has_recovered_at_ceiling(search, study)
    points = points_at_ceiling(points, space) if at_ceiling and points else points
    if slot < len(points):
        return points[slot]
    sampler = make_sampler(search.settings.sampler, derive_seed(search.context.seed, slot), search.heuristics)
    observations = [*_of_previous_round(search), *_of_this_round(study), *_of_running_trials(study)]
    params = propose(space, sampler, observations)
    return replace(params, prune_rate=space.ceiling) if at_ceiling else params


def should_tune_near_miss(search: RoundSearch, study: optuna.Study) -> bool:
    """Return whether the rest of a short budget belongs to a near miss at the target.

    Something has to be inside the floor already, so that there is a result if that trial does not come back.
    """
    trials = read_trials(study)
    is_safe = search.state.best.round > 0 or any(t.recovered for t in trials)
    if not search.is_budget_short() or not is_safe or any(_reaches_target(t, search) for t in trials):
        return False
    remaining = search.run.budget.remaining()
    epochs = min(remaining.epochs, remaining.seconds / search.speed.epoch_s)
    return any(can_recover(search.run.goal, t, epochs, search.heuristics) for t in trials)


def value_of(record: TrialRecord, search: RoundSearch) -> float:
    """Return what the sampler maximises: the rate removed if recovered, otherwise minus the shortfall.

    Equal rates differ by their accuracy, which weighs too little to stand against a rate.
    """
    if record.top1 is None or record.prune_rate is None:
        return FAILED_VALUE
    if _is_recovered(record, search):
        return record.prune_rate + TIE_WEIGHT * record.top1
    # Below 0 even at the floor: a trial there that removed nothing has not recovered.
    return max(FAILED_VALUE, min(-1e-9, record.top1 - search.entry.floor))


def same_failure(study: optuna.Study) -> str | None:
    """Return why all trials of a round failed, if they did so in the same way."""
    records = [t for t in read_trials(study) if t.state != "running" and t.seconds > 0]
    kinds = {re.sub(r"[\d.]+(e[-+]?\d+)?", "#", t.failure) for t in records}
    if not records or len(kinds) > 1 or not records[0].failure:
        return None
    return records[0].failure


def report_budget(budget: BudgetTracker, on_event: ev.OnEvent) -> None:
    """Report how much of the budget is used."""
    on_event(
        ev.BudgetUsed(
            seconds=budget.seconds, seconds_total=budget.budget.seconds,
            epochs=budget.epochs, epochs_total=budget.budget.epochs,
        )
    )  # fmt: skip


def _living_processes(run: RunContext, monitor: StaleMonitor) -> set[int]:
    if run.member is None:
        return set()
    return {p.number for p in monitor.refresh() if p.state in ("working", "silent")}


def _report_finished(search: RoundSearch, study: optuna.Study, reported: set[int]) -> None:
    """Report what was finished since the last look, here or in another process."""
    for record in read_trials(study):
        if record.number not in reported and record.state != "running" and record.seconds > 0:
            reported.add(record.number)
            search.run.on_event(ev.TrialFinished(round=search.entry.number, record=record))


def _has_recovered_at_ceiling(search: RoundSearch, study: optuna.Study) -> bool:
    ceiling = search.entry.ceiling * (1 - 1e-9)  # the float noise of a stored parameter
    return any(t.recovered and t.params["prune_rate"] >= ceiling for t in read_trials(study))


def _has_enough_trials(search: RoundSearch, study: optuna.Study) -> bool:
    """Return whether trials reached the target inside the floor, and enough was spent on bettering them.

    Nothing but accuracy is left to gain then. The final tuning gains more of it with the same epochs, but
    first a few trials, long enough to tell learning rates apart, may show which rate serves it best.
    """
    reached = sum(_reaches_target(t, search) for t in read_trials(study))
    if search.settings.trials is not None or not reached:
        return should_tune_near_miss(search, study)
    epochs = rung_epochs(search.entry.epochs, extend=False, heuristics=search.heuristics)[0]
    if epochs < search.heuristics.informative_epochs:
        return True
    return reached * search.share_of_budget(epochs) > search.heuristics.extra_trials_share


def _affords_trial(search: RoundSearch, study: optuna.Study) -> bool:
    """Return whether one more trial fits, by what the round's trials took or, before them, by the estimate.

    What the running trials of other processes will use counts as used.
    """
    run, epochs = search.run, search.entry.epochs
    planned = 1.01 * epochs  # 1 % for whole batches; trials that climbed beyond it say nothing of this one
    seconds = [t.seconds for t in read_trials(study) if t.epochs and t.epochs[-1].epoch <= planned]
    reserved = epochs * sum(t.user_attrs.get(OWNER) != run.owner for t in running_trials(study))
    is_first = search.entry.number == 1 and not study.get_trials(deepcopy=False)
    reserve = 0.0 if is_first else search.heuristics.final_share  # without a trial there is nothing to tune
    return run.budget.affords(
        max(seconds) if seconds else search.speed.trial_seconds(epochs),
        epochs + reserved,
        reserve=reserve,
    )


def _reaches_target(record: TrialRecord, search: RoundSearch) -> bool:
    return record.recovered and record.cost_share is not None and search.run.goal.is_met_by(record.cost_share)


def _of_this_round(study: optuna.Study) -> list[Observation]:
    return [
        Observation(params=TrialParams.from_optuna(t.params), value=t.value)
        for t in completed_trials(study)
        if t.value is not None
    ]


def _of_running_trials(study: optuna.Study) -> list[Observation]:
    """Count what others try at this moment as the worst value so far, so that it is not tried twice."""
    worst = min((t.value for t in completed_trials(study) if t.value is not None), default=FAILED_VALUE)
    points = [t.user_attrs[POINT] for t in running_trials(study) if POINT in t.user_attrs]
    return [Observation(params=TrialParams.from_optuna(point), value=worst) for point in points]


def _of_previous_round(search: RoundSearch) -> list[Observation]:
    """Return the trials of the round before, expressed for this one.

    After a failure they started from the same network: rate and floor are comparable. After a promotion, a
    rate is scaled by the ceilings: the same share of the ceiling is assumed to be as hard to recover from as
    before.
    """
    number, store = search.entry.number, search.run.store
    previous = store.study(number - 1) if number > 1 else None
    if previous is None:
        return []
    entry = read_round(previous)
    same_start = entry.started_from == search.entry.started_from
    factor = 1.0 if same_start else search.entry.ceiling / entry.ceiling
    values = {t.number: t.value for t in completed_trials(previous)}
    observations = []
    for record in read_trials(previous):
        if record.number in values:
            params = TrialParams.from_optuna(record.params)
            value = (
                value_of(record, search)
                if same_start
                else _scaled_value(record, factor, values[record.number] or FAILED_VALUE)
            )
            params = replace(params, prune_rate=factor * params.prune_rate)
            observations.append(Observation(params=params, value=value))
    return observations


def _scaled_value(record: TrialRecord, factor: float, value: float) -> float:
    if record.recovered and record.prune_rate is not None and record.top1 is not None:
        return factor * record.prune_rate + TIE_WEIGHT * record.top1
    return value


def _run_slot(search: RoundSearch, study: optuna.Study, slot: Slot, points: Sequence[TrialParams]) -> None:
    """Run the trial of a slot that this process holds, and store its result."""
    point = slot.retry_point or next_point(search, study, points, slot.number).to_optuna()
    trial = start_trial(study, slot, point)
    on_event, number = search.run.on_event, search.entry.number
    try:
        params = suggest(trial, search.space)
        on_event(ev.TrialStarted(round=number, trial=trial.number, params=trial.params))
        if slot.num_deaths >= search.heuristics.max_deaths:
            result = _give_up(slot)
        else:
            result = _run_trial(search, trial, params, slot.number)
        _store_result(search, study, trial, result)
    except UpdateFinishedTrialError:
        on_event(ev.Note(message=f"trial {trial.number} was given to another process: left out here"))


def _run_trial(search: RoundSearch, trial: optuna.Trial, params: TrialParams, slot: int) -> TrialResult:
    budget, extend = search.run.budget, search.settings.epochs is None
    rungs = rung_epochs(search.entry.epochs, extend=extend, heuristics=search.heuristics)
    seed = derive_seed(search.context.seed, slot)
    hooks = TrialHooks(
        should_continue=lambda state: _should_continue(search, state),
        seconds_left=lambda: budget.remaining().seconds,
        on_epoch=lambda epoch: _report_epoch(search, trial.number, epoch),
    )
    announcement = TrialAnnouncement(round=search.entry.number, params=params, rungs=rungs, seed=seed)
    distributed.send_job(announcement)
    with distributed.shared_work():
        return run_trial(search.context, params, rungs=rungs, seed=seed, hooks=hooks)


def _give_up(slot: Slot) -> TrialResult:
    """Fail a trial that killed process after process, instead of trying it once more."""
    reason = f"{slot.num_deaths} processes died running it (out of memory?)"
    # It took no time, but a record of 0 seconds is one whose trial has no result yet.
    return TrialResult(record=failed_record(reason, seconds=1e-3), model=None, plan=None)


def _should_continue(search: RoundSearch, rung: RungState) -> bool:
    """Return whether a trial climbs to the next rung: it has not recovered yet, and it still can.

    From the first rung to the second it can if the largest gain that a trial of this run made there is
    enough. Beyond the planned epochs it can if what it gained on its last rung is enough once more, and the
    budget has the epochs; where that is short, a trial at the target leaves them to the final tuning.
    """
    goal, top1 = search.run.goal, rung.top1s[-1]
    summary = TrialSummary(number=-1, prune_rate=rung.prune_rate, cost_share=rung.cost_share, top1=top1)
    if has_recovered(goal, search.state, summary):
        return False
    at_target = goal.is_met_by(rung.cost_share)
    floor = goal.floor if at_target else search.entry.floor
    if len(rung.top1s) == 1:
        gains = _first_gains(search.run)
        return len(gains) < search.heuristics.min_known_gains or top1 + max(gains) >= floor
    if at_target and search.is_budget_short() and is_near(goal, top1, search.heuristics):
        return False
    can_reach_floor = top1 + (top1 - rung.top1s[-2]) >= floor
    return can_reach_floor and search.run.budget.affords(
        rung.next_epochs * search.speed.epoch_s, rung.epochs + rung.next_epochs,
        reserve=search.heuristics.final_share,
    )  # fmt: skip


def _first_gains(run: RunContext) -> list[float]:
    """Return what the trials of this run gained from the first rung to the second."""
    trials = [t for study in run.store.rounds() for t in read_trials(study)]
    return [t.rungs[1].top1 - t.rungs[0].top1 for t in trials if len(t.rungs) > 1]


def _store_result(search: RoundSearch, study: optuna.Study, trial: optuna.Trial, result: TrialResult) -> None:
    """Store the model, then the result, then that the trial is complete: a reader never sees half of it."""
    run, record = search.run, result.record
    if record.top1 is not None and is_near(run.goal, record.top1, search.heuristics):
        assert result.model is not None
        assert result.plan is not None
        set_attrs(trial, **{CHECKPOINT: run.store.save_checkpoint(result.model, result.plan)})
    if record.epochs:
        run.budget.spend(record.epochs[-1].epoch)
    record = replace(record, recovered=_is_recovered(record, search))
    set_attrs(trial, **{RESULT: record})
    if not finish_trial(study, trial, value_of(record, search)):
        raise UpdateFinishedTrialError
    report_budget(run.budget, run.on_event)


def _is_recovered(record: TrialRecord, search: RoundSearch) -> bool:
    if record.top1 is None or record.prune_rate is None or record.cost_share is None:
        return False
    summary = TrialSummary(
        number=record.number, prune_rate=record.prune_rate, cost_share=record.cost_share, top1=record.top1
    )
    return has_recovered(search.run.goal, search.state, summary)


def _report_epoch(search: RoundSearch, trial: int, epoch: EpochRecord) -> None:
    search.run.on_event(
        ev.EpochFinished(
            round=search.entry.number, trial=trial, epoch=epoch.epoch, epochs=search.entry.epochs,
            lr=epoch.lr, train_loss=epoch.train_loss, images_per_s=epoch.images_per_s,
        )
    )  # fmt: skip
