"""How far a budget goes: rounds x trials x epochs, planned from measured speed and planned again each round.

A `Meter` knows what is used up; `plan_round` is pure. A time budget counts the wall clock of all processes
of a run from the moment the original is measured (training it comes before); an epoch budget counts
fine-tuning epochs in trials and at the end. A share is kept for the final tuning; exporting and reporting
come after the budget.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from autoprune.config import Budget, Control, Search
from autoprune.search.controller import State

FINAL_SHARE = 0.4  # of the whole budget, for the final tuning at least; a guess
FIRST_RUNG = 0.2  # of a trial's epochs, as a complete schedule before the rest: what is lost if it goes on
MIN_RUNG = 0.3  # epochs: a shorter schedule says nothing about a longer one; a guess
MOST_ON_FIRST = 0.4  # of a trial's epochs: where the first rung would take more, there is none; a guess
BEYOND = 2.0  # a trial near its floor may take this many times its epochs more
RETRY_ROUNDS = 0.5  # rounds' worth of budget kept for one that fails; a guess
MIN_TRIALS, MAX_TRIALS = 3, 24  # TPE gains over its start-up trials only from about 8 on
MIN_EPOCHS = 0.1  # of one trial: below it nothing can recover
ENOUGH_EPOCHS = 1.0  # one trial that recovers says more than several that cannot; a guess
MAX_EPOCHS = 100.0  # of one trial: a guess; more belongs into the study's own settings
TRIALS_PER_ROOT_EPOCH = 1.3  # 6 epochs in a round make 3 trials of 2, 40 make 8 of 5, 200 make 18 of 11


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured on this machine with this network: seconds of one epoch, and of a trial around its epochs."""

    epoch_s: float
    trial_s: float
    analysis_s: float

    def trial_of(self, epochs: float) -> float:
        """Seconds of a trial of so many epochs."""
        return epochs * self.epoch_s + self.trial_s


@dataclass(frozen=True, kw_only=True)
class Left:
    """What is left of a budget; infinite where it does not limit."""

    seconds: float
    epochs: float


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What one round is to spend: `trials` of `epochs` epochs each."""

    trials: int
    epochs: float


class Meter:
    """A running budget.

    Args:
        budget: the whole of it.
        seconds: used by earlier processes of the run.
        epochs: the same.
    """

    def __init__(self, budget: Budget, *, seconds: float = 0.0, epochs: float = 0.0) -> None:
        self.budget = budget
        self.epochs = epochs
        self._started = time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        """Used so far."""
        return time.monotonic() - self._started

    def spend(self, epochs: float) -> None:
        """Note that fine-tuning took these epochs."""
        self.epochs += epochs

    def left(self, *, keep: float = 0.0) -> Left:
        """What is left when a share `keep` of the whole budget is kept for later."""
        seconds, epochs = self.budget.seconds, self.budget.epochs
        return Left(
            seconds=math.inf if seconds is None else (1 - keep) * seconds - self.seconds,
            epochs=math.inf if epochs is None else (1 - keep) * epochs - self.epochs,
        )

    def share_of(self, seconds: float, epochs: float) -> float:
        """What part of the whole budget this would be."""
        by_time = seconds / self.budget.seconds if self.budget.seconds is not None else 0.0
        return max(by_time, epochs / self.budget.epochs if self.budget.epochs is not None else 0.0)

    def affords(self, trial_s: float, epochs: float, *, keep: float = FINAL_SHARE) -> bool:
        """Whether a trial of this length still fits before what is kept, the final tuning."""
        left = self.left(keep=keep)
        return left.seconds >= trial_s and left.epochs >= epochs - 1e-9


def ladder(epochs: float, *, longer: bool) -> tuple[float, ...]:
    """The epochs of each rung of a trial: complete schedules one after the other.

    Args:
        epochs: planned for the trial.
        longer: a last rung beyond the plan may follow.
    """
    beyond, first = (BEYOND * epochs,) if longer else (), max(FIRST_RUNG * epochs, MIN_RUNG)
    if first > MOST_ON_FIRST * epochs:
        return (epochs, *beyond)
    return (first, epochs - first, *beyond)


def rounds_ahead(state: State, target_share: float) -> int:
    """How many promotions at the present ceiling lead to the target, at least one."""
    if state.ceiling <= 0 or state.current.cost_share <= target_share:
        return 1
    rounds = math.log(target_share / state.current.cost_share) / math.log(1 - state.ceiling)
    return max(1, math.ceil(rounds - 1e-6))


def plan_round(  # noqa: PLR0913 - all that a round's size follows from
    left: Left, speed: Speed, search: Search, rounds: int, epochs_scale: float, *,
    at_least: float = ENOUGH_EPOCHS, workers: int = 1,
) -> Effort:  # fmt: skip
    """How many trials of how many epochs the next of `rounds` rounds gets.

    What the study fixes stays; the rest follows from the round's part of what is left, analysis of this
    round and the later ones taken off. Trials are rather fewer than shorter than `at_least` epochs. With
    several workers, each round of the clock holds as many trials at a time.
    """
    if search.trials is not None and search.epochs is not None:
        return Effort(trials=search.trials, epochs=search.epochs * epochs_scale)
    part = 1 / (rounds + RETRY_ROUNDS)
    seconds = part * (left.seconds - rounds * speed.analysis_s)
    epochs = part * left.epochs
    if search.epochs is not None:
        each = search.epochs * epochs_scale
        fitting = min(workers * seconds / speed.trial_of(each), epochs / each)
        return Effort(trials=_clipped(fitting, workers), epochs=each)

    def affordable(trials: int) -> float:
        in_turn = math.ceil(trials / workers)
        return min((seconds / in_turn - speed.trial_s) / speed.epoch_s, epochs / trials)

    trials = search.trials or _clipped(_trials_in(workers * seconds, epochs, speed) / epochs_scale, workers)
    while search.trials is None and trials > 1 and affordable(trials) < max(ENOUGH_EPOCHS, at_least):
        trials -= 1
    return Effort(trials=trials, epochs=min(MAX_EPOCHS, max(MIN_EPOCHS, affordable(trials))))


def _trials_in(seconds: float, epochs: float, speed: Speed) -> float:
    """A number of trials that leaves each of them enough epochs: it grows with the root of all epochs."""
    in_all = min(epochs, seconds / speed.epoch_s)
    trials = TRIALS_PER_ROOT_EPOCH * math.sqrt(max(0.0, in_all))
    spare = seconds - trials * speed.trial_s
    return TRIALS_PER_ROOT_EPOCH * math.sqrt(max(0.0, min(epochs, spare / speed.epoch_s)))


def _clipped(trials: float, workers: int) -> int:
    most = max(MAX_TRIALS, workers)
    return most if trials >= most else max(MIN_TRIALS, round(trials))


def forecast(state: State, control: Control, target_share: float) -> list[float]:
    """The ceilings of the rounds to come if each succeeds at its ceiling."""
    ceilings: list[float] = []
    share, ceiling = state.current.cost_share, state.ceiling
    while share > target_share * (1 + 1e-9) and len(ceilings) < control.max_rounds:
        ceiling = min(ceiling, control.max_ceiling, 1 - target_share / share)
        ceilings.append(ceiling)
        share *= 1 - ceiling
        ceiling *= control.raise_factor
    return ceilings
