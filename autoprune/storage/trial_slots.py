"""The trial slots of a round: a planned number of them, each held by one trial at a time, by any process.

A process claims the lowest free slot by adding a running trial that names the slot and its owner. Optuna
gives trial numbers out atomically, so of two trials that claim the same slot the lower number holds it, and
the other one withdraws. There are never more trials than planned, and no lock is needed.

The point that a trial will be suggested is stored whole before the first suggestion. The coordinator fails
the running trials of processes that have died, which frees their slots; whoever claims such a slot next
tries the same point again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from autoprune.storage.optuna_private import contains, live_trial, set_trial_attr

# Keys of a trial's user attributes; version 0.1.0 called a slot `seat`, and its runs are still resumed.
SLOT, OWNER, WITHDRAWN, TOKEN, POINT = "seat", "owner", "withdrawn", "token", "point"
HOLDING = (TrialState.RUNNING, TrialState.COMPLETE)
NO_OWNER = -1  # the owner of a trial in a run that only one process can reach


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A slot that this process holds.

    Attributes:
        trial: the running trial that holds it.
        number: of the slot, from 0.
        retry_point: the point that a trial of a dead process was to try here; None where the slot is fresh.
        num_deaths: how many processes died while they ran a trial of this slot.
    """

    trial: FrozenTrial
    number: int
    retry_point: dict[str, Any] | None
    num_deaths: int


class FixedPointSampler(optuna.samplers.BaseSampler):
    """A sampler that suggests one given point.

    A parameter that the point lacks, or whose value the round does not allow any more, is drawn at random
    with a fixed seed.
    """

    def __init__(self, point: dict[str, Any]) -> None:
        self._point = point
        self._fallback = optuna.samplers.RandomSampler(seed=0)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """No parameters are sampled jointly."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """No parameters are sampled jointly."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return the point's value if the distribution contains it."""
        value = self._point.get(name)
        if value is not None and contains(distribution, value):
            return value
        return self._fallback.sample_independent(study, trial, name, distribution)


def claim_slot(study: optuna.Study, num_slots: int, owner: int) -> Slot | None:
    """Claim the lowest free slot of a round, or return None where all are held."""
    while True:
        trials = study.get_trials(deepcopy=False)
        held = {t.user_attrs.get(SLOT, n) for n, t in enumerate(_holding(trials))}
        free = next((number for number in range(num_slots) if number not in held), None)
        if free is None or len(held) >= num_slots:
            return None
        claim = _add_running_trial(study, free, owner)
        rivals = [t.number for t in study.get_trials(deepcopy=False, states=HOLDING) if _slot_of(t) == free]
        if min(rivals) == claim.number:
            failed = [t for t in trials if _slot_of(t) == free and t.state is TrialState.FAIL]
            points = [t.user_attrs[POINT] for t in failed if POINT in t.user_attrs]
            return Slot(
                trial=claim, number=free, retry_point=points[-1] if points else None, num_deaths=len(failed)
            )
        set_trial_attr(study, claim, WITHDRAWN, True)
        study.tell(claim.number, state=TrialState.FAIL)


def start_trial(study: optuna.Study, slot: Slot, point: dict[str, Any]) -> optuna.Trial:
    """Store the point of a slot's trial, and return the live trial that will be suggested it."""
    set_trial_attr(study, slot.trial, POINT, point)
    study.sampler = FixedPointSampler(point)
    return live_trial(study, slot.trial)


def finish_trial(study: optuna.Study, trial: optuna.Trial, value: float) -> bool:
    """Complete a trial; return False where it was failed from outside before."""
    try:
        return study.tell(trial, value, skip_if_finished=True).state is TrialState.COMPLETE
    except UpdateFinishedTrialError:
        return False


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that are running at this moment."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def release_stale(study: optuna.Study, alive: Collection[int]) -> list[FrozenTrial]:
    """Fail the running trials whose owner is not among the living processes, and return them."""
    stale = [t for t in running_trials(study) if t.user_attrs.get(OWNER, NO_OWNER) not in alive]
    for trial in stale:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return stale


def is_withdrawn(trial: FrozenTrial) -> bool:
    """Return whether a trial only lost a race for a slot."""
    return WITHDRAWN in trial.user_attrs


def _holding(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state in HOLDING and not is_withdrawn(t)]


def _slot_of(trial: FrozenTrial) -> int | None:
    slot = trial.user_attrs.get(SLOT)
    return None if slot is None or is_withdrawn(trial) else int(slot)


def _add_running_trial(study: optuna.Study, slot: int, owner: int) -> FrozenTrial:
    token = uuid4().hex  # `add_trial` does not return the number that the trial got
    attributes = {SLOT: slot, OWNER: owner, TOKEN: token}
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=attributes))
    newest_first = reversed(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    return next(t for t in newest_first if t.user_attrs.get(TOKEN) == token)
