"""The seats of a round: `planned` of them, each taken by one trial at a time, by any process.

A process takes the lowest free seat by adding a running trial that names the seat and its owner. Trial
numbers are given out atomically, so of two that took the same seat the lower number has it, and the other
withdraws: there are never more trials than planned, and no lock is needed. What a trial will be suggested is
written whole before the first suggestion. A trial whose owner has died is failed by the coordinator, which
frees its seat; whoever takes it next tries the same parameters.
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

SEAT, OWNER, WITHDRAWN, TOKEN, POINT = "seat", "owner", "withdrawn", "token", "point"
TAKEN = (TrialState.RUNNING, TrialState.COMPLETE)
NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A seat that this process has.

    Attributes:
        again: what a trial was to try here whose process died; None where the seat is fresh.
        deaths: how many processes died on it.
    """

    trial: FrozenTrial
    seat: int
    again: dict[str, Any] | None
    deaths: int


class Given(optuna.samplers.BaseSampler):
    """Suggests one point that was chosen before; what it lacks comes from the middle of the range."""

    def __init__(self, point: dict[str, Any]) -> None:
        self._point = point
        self._else = optuna.samplers.RandomSampler(seed=0)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing is sampled together."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing is sampled together."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """The point's value, if this round may try it."""
        value = self._point.get(name)
        if value is not None and distribution._contains(distribution.to_internal_repr(value)):
            return value
        return self._else.sample_independent(study, trial, name, distribution)


def take(study: optuna.Study, planned: int, owner: int) -> Taken | None:
    """The lowest free seat, or None where all are taken."""
    while True:
        trials = study.get_trials(deepcopy=False)
        taken = {t.user_attrs.get(SEAT, n) for n, t in enumerate(_counting(trials))}
        free = next((seat for seat in range(planned) if seat not in taken), None)
        if free is None or len(taken) >= planned:
            return None
        mine = _sit_down(study, free, owner)
        rivals = [t.number for t in study.get_trials(deepcopy=False, states=TAKEN) if _seat(t) == free]
        if min(rivals) == mine.number:
            before = [t for t in trials if _seat(t) == free and t.state is TrialState.FAIL]
            died = [t for t in before if WITHDRAWN not in t.user_attrs]
            again = next((t.user_attrs[POINT] for t in reversed(died) if POINT in t.user_attrs), None)
            return Taken(trial=mine, seat=free, again=again, deaths=len(died))
        study._storage.set_trial_user_attr(mine._trial_id, WITHDRAWN, True)
        study.tell(mine.number, state=TrialState.FAIL)


def sit(study: optuna.Study, taken: Taken, point: dict[str, Any]) -> optuna.Trial:
    """The live trial of a seat, which will be suggested this point."""
    study._storage.set_trial_user_attr(taken.trial._trial_id, POINT, point)
    study.sampler = Given(point)
    return optuna.Trial(study, taken.trial._trial_id)


def running(study: optuna.Study) -> list[FrozenTrial]:
    """The trials under way."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def free_(study: optuna.Study, alive: Collection[int]) -> list[FrozenTrial]:
    """Fail the running trials whose owner is not alive; gives them."""
    left = [t for t in running(study) if t.user_attrs.get(OWNER, NOBODY) not in alive]
    for trial in left:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return left


def is_withdrawn(trial: FrozenTrial) -> bool:
    """Whether it only lost a race for a seat."""
    return WITHDRAWN in trial.user_attrs


def is_mine(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether nobody has failed this trial in the meantime."""
    return study._storage.get_trial(trial._trial_id).state is TrialState.RUNNING


def tell(study: optuna.Study, trial: optuna.Trial, value: float) -> bool:
    """Finish a trial; False where it was taken from this process before."""
    try:
        return study.tell(trial, value, skip_if_finished=True).state is TrialState.COMPLETE
    except UpdateFinishedTrialError:
        return False


def _counting(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.state in TAKEN and not is_withdrawn(t)]


def _seat(trial: FrozenTrial) -> int | None:
    seat = trial.user_attrs.get(SEAT)
    return None if seat is None or is_withdrawn(trial) else int(seat)


def _sit_down(study: optuna.Study, seat: int, owner: int) -> FrozenTrial:
    token = uuid4().hex
    who = {SEAT: seat, OWNER: owner, TOKEN: token}
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=who))
    newest = reversed(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
    return next(t for t in newest if t.user_attrs.get(TOKEN) == token)
