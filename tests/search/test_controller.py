from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.config import Control
from autoprune.search.controller import (
    EXACT,
    Decision,
    Goal,
    RoundOutcome,
    State,
    TrialSummary,
    best_recovered,
    decide,
    initial_state,
    replay,
    round_floor,
)

GOAL = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=0.5)
CONTROL = Control(first_ceiling=0.35, max_ceiling=0.6)


def trial(state: State, rate: float, top1: float, number: int = 0) -> TrialSummary:
    return TrialSummary(
        number=number, prune_rate=rate, cost_share=state.current.cost_share * (1 - rate), top1=top1
    )


def judge(state: State, *trials: TrialSummary, budget_left: bool = True) -> Decision:
    return decide(GOAL, CONTROL, state, RoundOutcome(trials=trials, budget_left=budget_left))


def test_the_recovered_trial_that_removed_most_is_promoted() -> None:
    state = initial_state(GOAL, CONTROL)
    decision = judge(state, trial(state, 0.2, 0.95, 0), trial(state, 0.3, 0.9, 1), trial(state, 0.35, 0.8, 2))
    assert (decision.action, decision.promoted) == ("promote", 1)
    assert decision.state.current.cost_share == pytest.approx(0.7)
    assert decision.state.best == decision.state.current


def test_ties_go_to_accuracy() -> None:
    state = initial_state(GOAL, CONTROL)
    assert judge(state, trial(state, 0.3, 0.9, 0), trial(state, 0.3, 0.91, 1)).promoted == 1


def test_rates_that_hardly_differ_are_ties_unless_only_one_reaches_the_target() -> None:
    state = initial_state(GOAL, CONTROL)
    assert judge(state, trial(state, 0.301, 0.9, 0), trial(state, 0.3, 0.91, 1)).promoted == 1
    assert judge(state, trial(state, 0.5, 0.9, 0), trial(state, 0.499, 0.91, 1)).promoted == 0


def test_the_ceiling_rises_after_a_promotion_at_the_ceiling() -> None:
    goal = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=0.1)
    state = initial_state(goal, CONTROL)
    outcome = RoundOutcome(trials=(trial(state, 0.35, 0.9),), budget_left=True)
    decision = decide(goal, CONTROL, state, outcome)
    assert decision.state.ceiling == pytest.approx(0.35 * 1.25)
    assert "rises" in decision.reason


def test_the_ceiling_never_asks_for_more_than_the_target_needs() -> None:
    state = judge(initial_state(GOAL, CONTROL), trial(initial_state(GOAL, CONTROL), 0.35, 0.9)).state
    assert state.ceiling == pytest.approx(1 - 0.5 / 0.65)


def test_a_near_target_is_reached_in_one_round() -> None:
    goal = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=0.8)
    state = initial_state(goal, CONTROL)
    assert state.ceiling == pytest.approx(0.2)
    assert round_floor(goal, state) == pytest.approx(goal.floor)
    outcome = RoundOutcome(trials=(trial(state, state.ceiling, 0.892),), budget_left=False)
    decision = decide(goal, CONTROL, state, outcome)
    assert (decision.action, decision.state.ended) == ("finish", "target")


def test_an_early_round_may_spend_its_share_of_the_drop() -> None:
    state = initial_state(GOAL, CONTROL)
    share = math.log(0.65) / math.log(0.5)
    assert round_floor(GOAL, state) == pytest.approx(0.9 - share * 0.01)


def test_no_recovery_lowers_goes_back_once_and_stops() -> None:
    state = initial_state(GOAL, CONTROL)
    actions = []
    while state.ended is None:
        decision = judge(state, trial(state, state.ceiling, 0.5))
        actions.append(decision.action)
        state = decision.state
    assert actions == ["lower"] * 3 + ["go_back"] + ["lower"] * 3 + ["stop"]
    assert state.ended == "floor"
    assert state.epochs_scale == CONTROL.budget_growth


def test_going_back_returns_to_the_model_before_the_current_one() -> None:
    first = judge(initial_state(GOAL, CONTROL), trial(initial_state(GOAL, CONTROL), 0.3, 0.9)).state
    state = first
    while state.path == first.path:
        state = judge(state).state
    assert state.current.round == 0
    assert state.best == first.best


def test_a_model_inside_the_goals_floor_is_kept_though_its_round_asked_for_more() -> None:
    state = initial_state(GOAL, CONTROL)
    decision = judge(state, trial(state, 0.3, 0.891), budget_left=False)
    assert (decision.action, decision.state.ended) == ("stop", "budget")
    assert decision.state.best.cost_share == pytest.approx(0.7)


def test_a_round_without_scored_trials_is_judged() -> None:
    assert judge(initial_state(GOAL, CONTROL)).action == "lower"


def test_a_target_that_is_met_already_needs_no_round() -> None:
    goal = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=1.0)
    assert initial_state(goal, CONTROL).ended == "target"


unit = st.floats(0, 1)
controls = st.builds(
    Control,
    first_ceiling=st.floats(0.1, 0.6),
    max_ceiling=st.just(0.7),
    raise_factor=st.floats(1, 2),
    lower_factor=st.floats(0.1, 0.95),
    min_rate=st.floats(0.01, 0.1),
    max_rounds=st.integers(1, 30),
)
goals = st.builds(
    Goal, baseline_top1=st.floats(0.3, 1), max_drop_pp=st.floats(0, 5), target_share=st.floats(0.02, 1.2)
)
draws = st.lists(
    st.tuples(st.lists(st.tuples(unit, st.floats(-0.08, 0.02)), max_size=4), st.booleans()), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(goal=goals, control=controls, draws=draws)
def test_the_run_always_ends_inside_its_limits(
    goal: Goal, control: Control, draws: list[tuple[list[tuple[float, float]], bool]]
) -> None:
    state, outcomes = initial_state(goal, control), []
    while state.ended is None:
        shots, spent = draws[len(outcomes)] if len(outcomes) < len(draws) else ([], False)
        trials = tuple(
            trial(state, state.ceiling * rate, goal.baseline_top1 + gain, n)
            for n, (rate, gain) in enumerate(shots)
        )
        outcome = RoundOutcome(trials=trials, budget_left=not spent)
        best = best_recovered(goal, state, trials)
        floor, decision = round_floor(goal, state), decide(goal, control, state, outcome)
        after = decision.state

        assert goal.floor - EXACT <= floor <= goal.baseline_top1 + EXACT
        assert decision.promoted == (best.number if best else None)
        assert all(p.top1 >= goal.floor - EXACT for p in (*after.path, after.best))
        assert after.best.cost_share <= min(state.best.cost_share, after.current.cost_share) + EXACT
        assert after.ceiling <= max(control.max_ceiling, state.ceiling)
        assert after.current.cost_share * (1 - after.ceiling) >= min(goal.target_share, 1) - 1e-9 or (
            decision.action == "finish"
        )
        assert after.round == state.round + 1 <= control.max_rounds
        assert outcome.budget_left or after.ended is not None
        assert (after.ended == "target") == (decision.action == "finish")
        assert decision.reason
        outcomes.append(outcome)
        state = after
    assert replay(goal, control, outcomes) == state
    if state.ended == "target":
        assert state.best.cost_share <= goal.target_share + EXACT or goal.target_share >= 1


@settings(max_examples=100, deadline=None)
@given(goal=goals, shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=2))
def test_the_floor_falls_along_the_way(goal: Goal, shares: list[float]) -> None:
    low, high = sorted(shares)
    assert goal.floor - EXACT <= goal.floor_at(low) <= goal.floor_at(high) + EXACT
    assert goal.floor_at(high) <= goal.baseline_top1 + EXACT
