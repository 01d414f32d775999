"""The last chance: a model that missed the floor by little gets what is left of the budget.

Trials are short beside what is kept for the final tuning. When the search ends without the target, a trial
that went deeper than the best model inside the floor, and came near it, may come back to the floor with all
of those epochs. If it does, it is delivered; if not, the best model inside the floor is, as it is. Where a
budget is short, the search ends for such a trial: one long schedule recovers more than several short ones.
A final tuning is longer than any trial, and its learning rate is higher for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoprune.record import RoundRecord, Rung, TrialRecord
from autoprune.search.controller import EXACT, Goal, Promotion, State

NEAR = 0.015  # of top-1 below the floor: models further off are not kept; a guess
DEEPER = 0.97  # of the best model's cost: a smaller gain is not worth the risk; a guess
HOTTEST = 2.0  # times a trial's learning rate, for the final tuning
HOPE = 2.0  # times what the last gain promises, for a model that is short of the target; a guess


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A trial that came near the floor, and the top-1 that its last gain promises."""

    model: Promotion
    promised: float


def is_hopeful(goal: Goal, trial: TrialRecord, epochs: float) -> bool:
    """Whether a trial reached the target, and may come back to the floor with so many more epochs.

    What it gained so far, per factor in epochs, is taken to go on.
    """
    return (
        trial.top1 is not None
        and trial.cost_share is not None
        and goal.is_met_by(trial.cost_share)
        and is_near(goal, trial.top1)
        and trial.top1 + _gain(trial, epochs, since=0) >= goal.floor
    )


def is_near(goal: Goal, top1: float) -> bool:
    """Whether a model is worth keeping for the end: inside the floor, or a little below."""
    return top1 >= goal.floor - NEAR


def nearest_miss(goal: Goal, state: State, rounds: Iterable[RoundRecord], epochs: float) -> Miss | None:
    """The model that is worth all of so many more epochs to come back to the floor, if there is one.

    A model that reaches the target always is, the nearest to the floor first: what it costs if it fails is
    the polish of a network that misses the target. The same holds where there is nothing but the original to
    deliver. Otherwise it is the cheapest that may come back: what a trial gained on its last rung, per factor
    in epochs, is taken to go on.
    """
    misses = [
        Miss(
            model=Promotion(round=r.number, trial=t.number, cost_share=t.cost_share, top1=t.top1),
            promised=t.top1 + _gain(t, epochs),
        )
        for r in rounds
        for t in r.trials
        if t.top1 is not None
        and t.cost_share is not None
        and t.top1 < goal.floor - EXACT
        and is_near(goal, t.top1)
        and t.cost_share < DEEPER * state.best.cost_share
    ]
    at_target = [m for m in misses if goal.is_met_by(m.model.cost_share)]
    if at_target:
        return max(at_target, key=lambda m: m.model.top1)
    if state.best.round == 0:
        return max(misses, key=lambda m: (m.promised, -m.model.cost_share), default=None)
    hopeful = [m for m in misses if m.model.top1 + HOPE * (m.promised - m.model.top1) >= goal.floor]
    return min(hopeful, key=lambda m: (m.model.cost_share, -m.promised), default=None)


def final_rate(lr: float, rungs: Sequence[Rung], epochs: float, limits: tuple[float, float]) -> float:
    """The learning rate of the final tuning, from that of a trial whose last schedule was shorter.

    The longer a schedule, the higher the rate that serves it: by the root of its length, as far as
    twice (measured: docs/log.md).
    """
    if not rungs:
        return lr
    length = rungs[-1].epochs - (rungs[-2].epochs if len(rungs) > 1 else 0.0)
    factor = min(HOTTEST, max(1.0, math.sqrt(epochs / length)))
    return max(lr, min(lr * factor, limits[1]))


def saved(goal: Goal, state: State, model: Promotion) -> State:
    """The end of a run whose last chance came back to the floor."""
    reached = goal.is_met_by(model.cost_share)
    return replace(state, best=model, ended="target" if reached else state.ended)


def _gain(trial: TrialRecord, epochs: float, *, since: int = -2) -> float:
    """What so many more epochs promise, by what was gained from a rung to the last one."""
    if len(trial.rungs) < 2:
        return 0.0
    before, last = trial.rungs[since], trial.rungs[-1]
    per_factor = (last.top1 - before.top1) / math.log(last.epochs / before.epochs)
    return max(0.0, per_factor * math.log1p(epochs / last.epochs))
