"""Near misses: models below the floor that the rest of the budget may bring back to it.

Trials are short beside what is kept for the final tuning. When the search ends without the target, a trial
that went deeper than the best model inside the floor, and came near the floor, may come back to it with all
of those epochs. If it does, it is delivered; if not, the best model inside the floor is delivered as it is.
Where a budget is short the search ends for such a trial, as one long schedule recovers more than several
short ones. The final tuning is longer than any trial's schedule, and its learning rate is higher for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoprune.heuristics import DEFAULTS, Heuristics
from autoprune.record import RoundRecord, Rung, TrialRecord
from autoprune.search.controller import EXACT, Goal, Promotion, State


@dataclass(frozen=True, kw_only=True)
class NearMiss:
    """A model that came near the floor, and the top-1 that its last gain promises after more epochs."""

    model: Promotion
    promised: float


def can_recover(goal: Goal, trial: TrialRecord, epochs: float, heuristics: Heuristics = DEFAULTS) -> bool:
    """Return whether a trial reached the target and may come back to the floor with so many more epochs.

    The gain per factor in epochs, from the first rung to the last one, is assumed to go on.
    """
    return (
        trial.top1 is not None
        and trial.cost_share is not None
        and goal.is_met_by(trial.cost_share)
        and is_near(goal, trial.top1, heuristics)
        and trial.top1 + _expected_gain(trial, epochs, since=0) >= goal.floor
    )


def is_near(goal: Goal, top1: float, heuristics: Heuristics = DEFAULTS) -> bool:
    """Return whether a model is worth keeping for the end: inside the floor, or a little below."""
    return top1 >= goal.floor - heuristics.near_margin


def best_near_miss(
    goal: Goal, state: State, rounds: Iterable[RoundRecord], epochs: float, heuristics: Heuristics = DEFAULTS
) -> NearMiss | None:
    """Return the model that is worth so many more epochs, all that are left, if there is one.

    A model that reaches the target always is, and of several the nearest to the floor: what it costs if it
    fails is the polish of a network that misses the target. The same holds where only the original could be
    delivered. Otherwise it is the cheapest that may come back, if the gain of its last rung, per factor in
    epochs, goes on.
    """
    misses = [
        NearMiss(
            model=Promotion(round=r.number, trial=t.number, cost_share=t.cost_share, top1=t.top1),
            promised=t.top1 + _expected_gain(t, epochs),
        )
        for r in rounds
        for t in r.trials
        if t.top1 is not None
        and t.cost_share is not None
        and t.top1 < goal.floor - EXACT
        and is_near(goal, t.top1, heuristics)
        and t.cost_share < heuristics.max_cost_ratio * state.best.cost_share
    ]
    at_target = [m for m in misses if goal.is_met_by(m.model.cost_share)]
    if at_target:
        return max(at_target, key=lambda m: m.model.top1)
    if state.best.round == 0:
        return max(misses, key=lambda m: (m.promised, -m.model.cost_share), default=None)
    hopeful = [
        m for m in misses if m.model.top1 + heuristics.hope_factor * (m.promised - m.model.top1) >= goal.floor
    ]
    return min(hopeful, key=lambda m: (m.model.cost_share, -m.promised), default=None)


def final_lr(
    lr: float, rungs: Sequence[Rung], epochs: float, limits: tuple[float, float],
    heuristics: Heuristics = DEFAULTS,
) -> float:  # fmt: skip
    """Return the learning rate of the final tuning, from that of a trial whose last schedule was shorter.

    The longer a schedule, the higher the rate that serves it: by the root of its length, as far as
    `max_lr_factor` (measured: docs/log.md).
    """
    if not rungs:
        return lr
    length = rungs[-1].epochs - (rungs[-2].epochs if len(rungs) > 1 else 0.0)
    factor = min(heuristics.max_lr_factor, max(1.0, math.sqrt(epochs / length)))
    return max(lr, min(lr * factor, limits[1]))


def with_recovered(goal: Goal, state: State, model: Promotion) -> State:
    """Return the end of a run whose near miss came back to the floor."""
    reached = goal.is_met_by(model.cost_share)
    return replace(state, best=model, ended="target" if reached else state.ended)


def _expected_gain(trial: TrialRecord, epochs: float, *, since: int = -2) -> float:
    """Return the top-1 that so many more epochs promise, by the gain from rung `since` to the last one."""
    if len(trial.rungs) < 2:
        return 0.0
    before, last = trial.rungs[since], trial.rungs[-1]
    per_factor = (last.top1 - before.top1) / math.log(last.epochs / before.epochs)
    return max(0.0, per_factor * math.log1p(epochs / last.epochs))
