"""The controller: after each round, promote, lower the ceiling, go back once, finish or stop.

It is a pure state machine: `decide` takes a `State` and what a round's trials scored, and returns the next
`State` with the reason in plain words. Nothing is remembered elsewhere, so the state of a run is the fold of
`decide` over its finished rounds (`replay`), and resuming is replaying.

Costs are shares of the original's cost in the target's metric; rates are shares of the round's starting
model. Along the way from 1 to the target (in log cost) the floor falls from the baseline's top-1 to the
final floor, so that early rounds cannot eat all of the allowed drop.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autoprune.config import Control
from autoprune.record import Action, StoppedBy

EXACT = 1e-12  # the float noise in sums and ratios of counts
TIE = 0.005  # rates this near are equal: half of what an allocation may miss its limit by


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a run has to reach.

    Attributes:
        baseline_top1: the original's, on the search split.
        max_drop_pp: allowed loss of top-1, in percentage points.
        target_share: allowed cost, as a share of the original's; 1 or more means nothing is to be done.
    """

    baseline_top1: float
    max_drop_pp: float
    target_share: float

    @property
    def floor(self) -> float:
        """The lowest top-1 that is ever accepted."""
        return self.baseline_top1 - self.max_drop_pp / 100

    def is_met_by(self, cost_share: float) -> bool:
        """Return whether a model of this cost reaches the target."""
        return cost_share <= self.target_share + EXACT

    def floor_at(self, cost_share: float) -> float:
        """Return the floor of a model of this cost on its way to the target."""
        if cost_share >= 1 and self.target_share < 1:
            return self.baseline_top1
        if cost_share <= self.target_share:
            return self.floor
        progress = math.log(cost_share) / math.log(self.target_share)
        return self.baseline_top1 - progress * self.max_drop_pp / 100


@dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """What the controller decides by, of a finished trial's record; `prune_rate` is the one achieved."""

    number: int
    prune_rate: float
    cost_share: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """A model that a round may start from: round and trial that made it, (0, 0) for the baseline."""

    round: int
    trial: int
    cost_share: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run between two rounds.

    Attributes:
        round: round attempts decided so far.
        ceiling: highest pruning rate of the next round.
        epochs_scale: factor on the fine-tuning epochs of the next round.
        path: the promotions that led to the current model, the baseline first.
        best: the cheapest model inside the goal's floor so far: it is delivered if the target cannot be had.
            It may not be on `path`: the floor of its round may have been higher, or the run went back.
        went_back: going back is allowed once.
        ended: why there is no next round; None while there is one.
    """

    round: int
    ceiling: float
    epochs_scale: float
    path: tuple[Promotion, ...]
    best: Promotion
    went_back: bool
    ended: StoppedBy | None

    @property
    def current(self) -> Promotion:
        """The model that the next round starts from."""
        return self.path[-1]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the controller decided after a round; `promoted` is the trial that is the next baseline."""

    action: Action
    reason: str
    promoted: int | None
    state: State


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """A finished round: its scored trials, and whether budget was left after it."""

    trials: tuple[TrialSummary, ...]
    budget_left: bool


def initial_state(goal: Goal, control: Control) -> State:
    """Return the state before the first round."""
    baseline = Promotion(round=0, trial=0, cost_share=1.0, top1=goal.baseline_top1)
    return State(
        round=0,
        ceiling=_bounded(control.first_ceiling, goal, control, 1.0),
        epochs_scale=1.0,
        path=(baseline,),
        best=baseline,
        went_back=False,
        ended="target" if goal.target_share >= 1 else None,
    )


def round_floor(goal: Goal, state: State) -> float:
    """Return the lowest top-1 at which a trial of the next round counts as recovered.

    It is the floor on the way to the target at the depth that the ceiling allows. Where the current model is
    already below that, it may lose nothing more. It is never below the goal's floor.
    """
    on_the_way = goal.floor_at(state.current.cost_share * (1 - state.ceiling))
    return max(goal.floor, min(on_the_way, state.current.top1))


def has_recovered(goal: Goal, state: State, trial: TrialSummary) -> bool:
    """Return whether a trial of the next round keeps its floor and removed something.

    A trial that reaches the target leaves no later round to save accuracy for: the goal's floor is its floor.
    """
    reaches = goal.is_met_by(trial.cost_share)
    floor = goal.floor if reaches else round_floor(goal, state)
    removed = trial.cost_share < state.current.cost_share - EXACT
    return removed and trial.top1 >= floor - EXACT


def best_recovered(goal: Goal, state: State, trials: Iterable[TrialSummary]) -> TrialSummary | None:
    """Return the recovered trial that removed most; ties go to accuracy, then to the earlier trial.

    A trial that reaches the target is never tied with one that does not.
    """
    recovered = [t for t in trials if has_recovered(goal, state, t)]
    if not recovered:
        return None
    highest_rate = max(t.prune_rate for t in recovered)
    reaching = [t for t in recovered if goal.is_met_by(t.cost_share)]
    tied = reaching or [t for t in recovered if t.prune_rate >= highest_rate - TIE]
    return min(tied, key=lambda t: (-t.top1, t.cost_share, t.number))


def decide(goal: Goal, control: Control, state: State, outcome: RoundOutcome) -> Decision:
    """Return the decision about the round that followed `state`."""
    assert state.ended is None, "the run has ended; there is no round to judge"
    best = best_recovered(goal, state, outcome.trials)
    state = replace(state, best=_deepest(goal, state, outcome.trials))
    decision = _promote(goal, control, state, best) if best else _retreat(goal, control, state, outcome)
    return _limited(control, decision, outcome.budget_left)


def replay(goal: Goal, control: Control, outcomes: Sequence[RoundOutcome]) -> State:
    """Return the state after these rounds: the fold of `decide` over them."""
    state = initial_state(goal, control)
    for outcome in outcomes:
        state = decide(goal, control, state, outcome).state
    return state


def _deepest(goal: Goal, state: State, trials: Iterable[TrialSummary]) -> Promotion:
    inside = [
        t for t in trials if t.top1 >= goal.floor - EXACT and t.cost_share < state.best.cost_share - EXACT
    ]
    if not inside:
        return state.best
    best = min(inside, key=lambda t: (t.cost_share, -t.top1, t.number))
    return _promotion(state, best)


def _promotion(state: State, trial: TrialSummary) -> Promotion:
    return Promotion(round=state.round + 1, trial=trial.number, cost_share=trial.cost_share, top1=trial.top1)


def _promote(goal: Goal, control: Control, state: State, best: TrialSummary) -> Decision:
    ceiling = _bounded(best.prune_rate * control.raise_factor, goal, control, best.cost_share)
    reached = goal.is_met_by(best.cost_share)
    model = _promotion(state, best)
    after = replace(
        state,
        round=state.round + 1,
        ceiling=ceiling,
        path=(*state.path, model),
        best=model if reached else state.best,
        ended="target" if reached else None,
    )
    floor = goal.floor if reached else round_floor(goal, state)
    success = (
        f"trial {best.number} removed {_percent(best.prune_rate)} and kept top-1 {_percent(best.top1, 2)}, "
        f"at or above the floor {_percent(floor, 2)}"
    )
    if reached:
        return Decision(action="finish", reason=f"{success}; the target is reached",
                        promoted=best.number, state=after)  # fmt: skip
    moved = _moved(goal, state.ceiling, after)
    return Decision(action="promote", reason=f"{success}; {moved}", promoted=best.number, state=after)


def _moved(goal: Goal, before: float, after: State) -> str:
    ceiling = after.ceiling
    if after.current.cost_share * (1 - ceiling) <= goal.target_share * (1 + 1e-9):
        return f"a ceiling of {_percent(ceiling)} now reaches the target"
    if ceiling > before:
        return f"the ceiling rises from {_percent(before)} to {_percent(ceiling)}"
    if ceiling < before:
        return f"the ceiling follows what was recovered from, from {_percent(before)} to {_percent(ceiling)}"
    return f"the ceiling stays at {_percent(ceiling)}"


def _retreat(goal: Goal, control: Control, state: State, outcome: RoundOutcome) -> Decision:
    lowered = state.ceiling * control.lower_factor
    missed = _missed(goal, state, outcome.trials)
    after = replace(state, round=state.round + 1)
    if lowered >= control.min_rate:
        return Decision(
            action="lower",
            reason=f"{missed}; the ceiling falls from {_percent(state.ceiling)} to {_percent(lowered)}",
            promoted=None,
            state=replace(after, ceiling=lowered),
        )
    useless = f"{missed}; a ceiling below {_percent(control.min_rate)} is useless"
    if state.went_back:
        return Decision(action="stop", reason=f"{useless}, and going back was tried already",
                        promoted=None, state=replace(after, ended="floor"))  # fmt: skip
    return _go_back(goal, control, after, useless)


def _go_back(goal: Goal, control: Control, state: State, why: str) -> Decision:
    path = state.path[:-1] or state.path
    scale = state.epochs_scale * control.budget_growth
    where = f"the model of round {path[-1].round}" if path[-1].round else "the baseline"
    after = replace(
        state,
        path=path,
        epochs_scale=scale,
        went_back=True,
        ceiling=_bounded(control.first_ceiling, goal, control, path[-1].cost_share),
    )
    reason = f"{why}, so the search goes back once, to {where}, with {scale:g} times the epochs"
    return Decision(action="go_back", reason=reason, promoted=None, state=after)


def _missed(goal: Goal, state: State, trials: Sequence[TrialSummary]) -> str:
    floor = round_floor(goal, state)
    if not trials:
        return "no trial could be scored"
    nearest = max(trials, key=lambda t: t.top1)
    subject = f"none of {len(trials)} trials" if len(trials) > 1 else "the only trial has not"
    return (
        f"{subject} recovered to the floor {_percent(floor, 2)} "
        f"(nearest: {_percent(nearest.top1, 2)} with {_percent(nearest.prune_rate)} removed)"
    )


def _limited(control: Control, decision: Decision, budget_left: bool) -> Decision:
    """End the run at its limits, and keep what was decided about the round."""
    if decision.state.ended is not None:
        return decision
    ended: StoppedBy
    if not budget_left:
        ended, why = "budget", "the budget is used up"
    elif decision.state.round >= control.max_rounds:
        ended, why = "rounds", f"all of {control.max_rounds} rounds are used up"
    else:
        return decision
    action: Action = "promote" if decision.action == "promote" else "stop"
    reason = f"{decision.reason.split('; ')[0]}; {why}"
    return replace(decision, action=action, reason=reason, state=replace(decision.state, ended=ended))


def _bounded(ceiling: float, goal: Goal, control: Control, cost_share: float) -> float:
    """Return a ceiling between `min_rate` and `max_ceiling` that takes no more than the target needs."""
    needed = max(0.0, 1 - goal.target_share / cost_share)
    return min(max(ceiling, control.min_rate), control.max_ceiling, needed)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
