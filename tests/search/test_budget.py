from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.config import Budget, Control, Search
from autoprune.heuristics import DEFAULTS
from autoprune.search.budget import (
    Allotment,
    BudgetTracker,
    Remaining,
    RoundBudget,
    Speed,
    allot_round,
    forecast_ceilings,
    rounds_ahead,
    rung_epochs,
)
from autoprune.search.controller import Goal, initial_state
from tests.clock import Clock


def allot(
    remaining: Remaining, speed: Speed, search: Search, rounds: int, scale: float, *,
    min_epochs: float = DEFAULTS.enough_epochs, workers: int = 1,
) -> RoundBudget:  # fmt: skip
    allotment = Allotment(
        remaining=remaining, speed=speed, rounds=rounds, epochs_scale=scale, min_epochs=min_epochs,
        workers=workers,
    )  # fmt: skip
    return allot_round(allotment, search)


SPEED = Speed(epoch_s=2.0, trial_s=1.0, analysis_s=5.0)
GOAL = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=0.5)


def test_a_study_that_fixes_both_gets_both() -> None:
    budget = allot(Remaining(seconds=10, epochs=math.inf), SPEED, Search(trials=9, epochs=3), 2, 2.0)
    assert (budget.trials, budget.epochs) == (9, 6)


@given(
    seconds=st.floats(60, 1e5),
    rounds=st.integers(1, 6),
    scale=st.sampled_from([1.0, 2.0]),
    epoch_s=st.floats(0.1, 100),
)
def test_a_round_fits_into_its_part_of_the_time(
    seconds: float, rounds: int, scale: float, epoch_s: float
) -> None:
    speed = Speed(epoch_s=epoch_s, trial_s=0.5, analysis_s=1.0)
    budget = allot(Remaining(seconds=seconds, epochs=math.inf), speed, Search(), rounds, scale)
    assert 1 <= budget.trials <= DEFAULTS.max_trials
    assert budget.trials >= DEFAULTS.min_trials or budget.epochs < 2 * DEFAULTS.enough_epochs * (
        DEFAULTS.min_trials + 1
    )
    needed = budget.trials * (budget.epochs * epoch_s + speed.trial_s) + rounds * speed.analysis_s
    assert needed <= seconds or budget.epochs == DEFAULTS.min_epochs


@given(epochs=st.floats(2, 1e4), rounds=st.integers(1, 6))
def test_a_round_fits_into_its_part_of_the_epochs(epochs: float, rounds: int) -> None:
    budget = allot(Remaining(seconds=math.inf, epochs=epochs), SPEED, Search(), rounds, 1.0)
    used, most = budget.trials * budget.epochs, DEFAULTS.max_trials * DEFAULTS.max_epochs
    assert min(0.4 * epochs / rounds, most) <= used <= epochs / rounds + 1e-6


def test_fixed_epochs_leave_the_number_of_trials_to_the_budget() -> None:
    budget = allot(Remaining(seconds=150, epochs=math.inf), SPEED, Search(epochs=5), 1, 1.0)
    assert (budget.trials, budget.epochs) == (9, 5)


def test_more_budget_buys_more_trials_of_more_epochs() -> None:
    small, large = (
        allot(Remaining(seconds=s, epochs=math.inf), SPEED, Search(), 2, 1.0) for s in (100, 1000)
    )
    assert small.trials < large.trials
    assert small.epochs < large.epochs


def test_a_meter_keeps_a_share_for_the_end() -> None:
    whole = 10 / (1 - DEFAULTS.final_share)
    budget = BudgetTracker(Budget(epochs=whole), epochs=5)
    assert budget.affords(1e9, 4.9, reserve=DEFAULTS.final_share)
    budget.spend(4.0)
    assert not budget.affords(0, 1.1, reserve=DEFAULTS.final_share)
    assert math.isclose(budget.remaining().epochs, whole - 9)
    assert math.isclose(budget.remaining(reserve=DEFAULTS.final_share).epochs, 1.0)


def test_a_ladder_is_made_of_complete_schedules() -> None:
    assert rung_epochs(6.0, extend=False) == pytest.approx((1.2, 4.8))
    assert rung_epochs(6.0, extend=True) == pytest.approx((1.2, 4.8, 12.0))
    assert rung_epochs(1.0, extend=False) == pytest.approx((0.3, 0.7))
    assert rung_epochs(0.5, extend=False) == (0.5,), "a rung must be long enough to say something"


def test_trials_are_rather_fewer_than_shorter_than_what_was_needed() -> None:
    left = Remaining(seconds=math.inf, epochs=12)
    free = allot(left, SPEED, Search(), 1, 1.0)
    held = allot(left, SPEED, Search(), 1, 1.0, min_epochs=4.0)
    assert held.trials < free.trials
    assert held.epochs >= 4.0 > free.epochs


def test_a_tracker_counts_what_earlier_processes_used(clock: Clock) -> None:
    reserve = DEFAULTS.final_share
    budget = BudgetTracker(Budget(seconds=100 / (1 - reserve)), seconds=90)
    clock.advance(4.0)
    assert budget.seconds == pytest.approx(94)
    assert not budget.affords(6.1, 1.0, reserve=reserve)
    assert budget.affords(5.9, 1.0, reserve=reserve)


def test_the_forecast_ends_at_the_target() -> None:
    control = Control(first_ceiling=0.35)
    ceilings = forecast_ceilings(initial_state(GOAL, control), control, 0.5)
    assert math.isclose(math.prod(1 - c for c in ceilings), 0.5)
    assert len(ceilings) == rounds_ahead(initial_state(GOAL, control), 0.5) == 2


def test_a_small_budget_goes_into_few_trials_that_can_recover() -> None:
    budget = allot(Remaining(seconds=10, epochs=math.inf), SPEED, Search(), 1, 1.0)
    assert budget.trials == 1
    assert budget.epochs > 0.5


def test_workers_make_rounds_of_more_trials_that_take_no_longer() -> None:
    left, speed = Remaining(seconds=600, epochs=math.inf), Speed(epoch_s=2.0, trial_s=1.0, analysis_s=0.0)
    alone = allot(left, speed, Search(), 1, 1.0)
    for workers in (2, 4, 8, 64):
        many = allot(left, speed, Search(), 1, 1.0, workers=workers)
        assert many.trials > alone.trials
        in_turn = math.ceil(many.trials / workers)
        assert in_turn * (many.epochs * speed.epoch_s + speed.trial_s) <= left.seconds + 1e-6
    by_epochs = allot(Remaining(seconds=math.inf, epochs=40), speed, Search(), 1, 1.0, workers=4)
    assert by_epochs.trials * by_epochs.epochs <= 40
