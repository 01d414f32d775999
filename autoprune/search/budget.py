"""How far a budget goes: rounds x trials x epochs, from the measured speed, reckoned anew before each round.

A `BudgetTracker` knows what is used up; `allot_round` is pure. A budget in time counts the wall clock of all
processes of a run from the moment the original is measured (training it comes before). A budget in epochs
counts the epochs of fine-tuning in trials and at the end. A share is kept for the final tuning; exporting and
reporting come on top.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from autoprune.config import Budget, Control, Search
from autoprune.heuristics import DEFAULTS, Heuristics
from autoprune.search.controller import State


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine works with this network, in seconds.

    Attributes:
        epoch_s: of one epoch of fine-tuning.
        trial_s: of a trial besides its epochs.
        analysis_s: of an analysis.
    """

    epoch_s: float
    trial_s: float
    analysis_s: float

    def trial_seconds(self, epochs: float) -> float:
        """Return the seconds of a trial of so many epochs."""
        return epochs * self.epoch_s + self.trial_s


@dataclass(frozen=True, kw_only=True)
class Remaining:
    """What is left of a budget; infinite where the budget does not limit it."""

    seconds: float
    epochs: float


@dataclass(frozen=True, kw_only=True)
class RoundBudget:
    """What one round may spend: `trials` of `epochs` epochs each."""

    trials: int
    epochs: float


class BudgetTracker:
    """A budget and what is used of it.

    Args:
        budget: the whole of it.
        seconds: used by earlier processes of the run.
        epochs: used by earlier processes of the run.
    """

    def __init__(self, budget: Budget, *, seconds: float = 0.0, epochs: float = 0.0) -> None:
        self.budget = budget
        self.epochs = epochs
        self._started = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """The seconds used so far."""
        return time.monotonic() - self._started

    def spend(self, epochs: float) -> None:
        """Count these epochs of fine-tuning as used."""
        self.epochs += epochs

    def count_at_least(self, epochs: float) -> None:
        """Count at least so many epochs as used: what all processes of the run have used together."""
        self.epochs = max(self.epochs, epochs)

    def remaining(self, *, reserve: float = 0.0) -> Remaining:
        """Return what is left when a share `reserve` of the whole budget is kept for later."""
        seconds, epochs = self.budget.seconds, self.budget.epochs
        return Remaining(
            seconds=math.inf if seconds is None else (1 - reserve) * seconds - self.seconds,
            epochs=math.inf if epochs is None else (1 - reserve) * epochs - self.epochs,
        )

    def share_of(self, seconds: float, epochs: float) -> float:
        """Return the share of the whole budget that so many seconds and epochs are."""
        by_time = seconds / self.budget.seconds if self.budget.seconds is not None else 0.0
        return max(by_time, epochs / self.budget.epochs if self.budget.epochs is not None else 0.0)

    def affords(self, seconds: float, epochs: float, *, reserve: float) -> bool:
        """Return whether so many seconds and epochs fit into what is left beside the reserve."""
        remaining = self.remaining(reserve=reserve)
        return remaining.seconds >= seconds and remaining.epochs >= epochs - 1e-9


def rung_epochs(epochs: float, *, extend: bool, heuristics: Heuristics = DEFAULTS) -> tuple[float, ...]:
    """Return the epochs of each rung of a trial: complete schedules, one after the other.

    Args:
        epochs: planned for the trial.
        extend: whether a last rung beyond the planned epochs may follow.
        heuristics: what shapes the run.
    """
    extension = (heuristics.extension_factor * epochs,) if extend else ()
    first = max(heuristics.first_rung_share * epochs, heuristics.min_rung_epochs)
    if first > heuristics.max_first_rung_share * epochs:
        return (epochs, *extension)
    return (first, epochs - first, *extension)


def rounds_ahead(state: State, target_share: float) -> int:
    """Return how many promotions at the present ceiling lead to the target, at least one."""
    if state.ceiling <= 0 or state.current.cost_share <= target_share:
        return 1
    rounds = math.log(target_share / state.current.cost_share) / math.log(1 - state.ceiling)
    return max(1, math.ceil(rounds - 1e-6))


@dataclass(frozen=True, kw_only=True)
class Allotment:
    """What the size of a round follows from.

    Attributes:
        remaining: of the budget, without what is reserved.
        speed: as measured or estimated; `analysis_s` is that of each round to come.
        rounds: to come, this one included.
        epochs_scale: the controller's factor on the epochs of a trial.
        min_epochs: of a trial; a round has rather fewer trials than shorter ones.
        workers: processes that run trials at the same time.
    """

    remaining: Remaining
    speed: Speed
    rounds: int
    epochs_scale: float
    min_epochs: float
    workers: int = 1


def allot_round(allotment: Allotment, search: Search, heuristics: Heuristics = DEFAULTS) -> RoundBudget:
    """Return how many trials of how many epochs the next round gets.

    What the study fixes stays. The rest follows from the round's part of what is left, without the seconds of
    the analyses to come. With several workers, each turn of the clock holds as many trials.
    """
    if search.trials is not None and search.epochs is not None:
        return RoundBudget(trials=search.trials, epochs=search.epochs * allotment.epochs_scale)
    speed, workers, scale = allotment.speed, allotment.workers, allotment.epochs_scale
    part = 1 / (allotment.rounds + heuristics.retry_rounds)
    seconds = part * (allotment.remaining.seconds - allotment.rounds * speed.analysis_s)
    epochs = part * allotment.remaining.epochs
    if search.epochs is not None:
        each = search.epochs * scale
        fitting = min(workers * seconds / speed.trial_seconds(each), epochs / each)
        return RoundBudget(trials=_clip_trials(fitting, workers, heuristics), epochs=each)

    def affordable_epochs(trials: int) -> float:
        turns = math.ceil(trials / workers)
        return min((seconds / turns - speed.trial_s) / speed.epoch_s, epochs / trials)

    trials = search.trials or _clip_trials(
        _trials_in(workers * seconds, epochs, speed, heuristics) / scale, workers, heuristics
    )
    enough = max(heuristics.enough_epochs, allotment.min_epochs)
    while search.trials is None and trials > 1 and affordable_epochs(trials) < enough:
        trials -= 1
    each = min(heuristics.max_epochs, max(heuristics.min_epochs, affordable_epochs(trials)))
    return RoundBudget(trials=trials, epochs=each)


def _trials_in(seconds: float, epochs: float, speed: Speed, heuristics: Heuristics) -> float:
    """Return a number of trials that grows with the root of all epochs, so that each keeps enough of them."""
    total = min(epochs, seconds / speed.epoch_s)
    trials = heuristics.trials_per_root_epoch * math.sqrt(max(0.0, total))
    spare = seconds - trials * speed.trial_s
    return heuristics.trials_per_root_epoch * math.sqrt(max(0.0, min(epochs, spare / speed.epoch_s)))


def _clip_trials(trials: float, workers: int, heuristics: Heuristics) -> int:
    most = max(heuristics.max_trials, workers)
    return most if trials >= most else max(heuristics.min_trials, round(trials))


def forecast_ceilings(state: State, control: Control, target_share: float) -> list[float]:
    """Return the ceilings of the rounds to come if each of them succeeds at its ceiling."""
    ceilings: list[float] = []
    share, ceiling = state.current.cost_share, state.ceiling
    while share > target_share * (1 + 1e-9) and len(ceilings) < control.max_rounds:
        ceiling = min(ceiling, control.max_ceiling, 1 - target_share / share)
        ceilings.append(ceiling)
        share *= 1 - ceiling
        ceiling *= control.raise_factor
    return ceilings
