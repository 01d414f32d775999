from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.config import Budget, Control, Search
from autoprune.search.budget import (
    ENOUGH_EPOCHS,
    FINAL_SHARE,
    MAX_TRIALS,
    MIN_EPOCHS,
    MIN_TRIALS,
    Left,
    Meter,
    Speed,
    forecast,
    ladder,
    plan_round,
    rounds_ahead,
)
from autoprune.search.controller import Goal, start
from tests.clock import Clock

SPEED = Speed(epoch_s=2.0, trial_s=1.0, analysis_s=5.0)
GOAL = Goal(baseline_top1=0.9, max_drop_pp=1.0, target_share=0.5)


def test_a_study_that_fixes_both_gets_both() -> None:
    effort = plan_round(Left(seconds=10, epochs=math.inf), SPEED, Search(trials=9, epochs=3), 2, 2.0)
    assert (effort.trials, effort.epochs) == (9, 6)


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
    effort = plan_round(Left(seconds=seconds, epochs=math.inf), speed, Search(), rounds, scale)
    assert 1 <= effort.trials <= MAX_TRIALS
    assert effort.trials >= MIN_TRIALS or effort.epochs < 2 * ENOUGH_EPOCHS * (MIN_TRIALS + 1)
    needed = effort.trials * (effort.epochs * epoch_s + speed.trial_s) + rounds * speed.analysis_s
    assert needed <= seconds or effort.epochs == MIN_EPOCHS


@given(epochs=st.floats(2, 1e4), rounds=st.integers(1, 6))
def test_a_round_fits_into_its_part_of_the_epochs(epochs: float, rounds: int) -> None:
    effort = plan_round(Left(seconds=math.inf, epochs=epochs), SPEED, Search(), rounds, 1.0)
    assert effort.trials * effort.epochs <= epochs / rounds + 1e-6


def test_fixed_epochs_leave_the_number_of_trials_to_the_budget() -> None:
    effort = plan_round(Left(seconds=150, epochs=math.inf), SPEED, Search(epochs=5), 1, 1.0)
    assert (effort.trials, effort.epochs) == (9, 5)


def test_more_budget_buys_more_trials_of_more_epochs() -> None:
    small, large = (
        plan_round(Left(seconds=s, epochs=math.inf), SPEED, Search(), 2, 1.0) for s in (100, 1000)
    )
    assert small.trials < large.trials
    assert small.epochs < large.epochs


def test_a_meter_keeps_a_share_for_the_end() -> None:
    whole = 10 / (1 - FINAL_SHARE)
    meter = Meter(Budget(epochs=whole), epochs=5)
    assert meter.affords(1e9, 4.9)
    meter.spend(4.0)
    assert not meter.affords(0, 1.1)
    assert math.isclose(meter.left().epochs, whole - 9)
    assert math.isclose(meter.left(keep=FINAL_SHARE).epochs, 1.0)


def test_a_ladder_is_made_of_complete_schedules() -> None:
    assert ladder(6.0, longer=False) == pytest.approx((1.2, 4.8))
    assert ladder(6.0, longer=True) == pytest.approx((1.2, 4.8, 12.0))
    assert ladder(1.0, longer=False) == pytest.approx((0.3, 0.7))
    assert ladder(0.5, longer=False) == (0.5,), "a rung must be long enough to say something"


def test_trials_are_rather_fewer_than_shorter_than_what_was_needed() -> None:
    left = Left(seconds=math.inf, epochs=12)
    free = plan_round(left, SPEED, Search(), 1, 1.0)
    held = plan_round(left, SPEED, Search(), 1, 1.0, at_least=4.0)
    assert held.trials < free.trials
    assert held.epochs >= 4.0 > free.epochs


def test_a_meter_counts_what_earlier_processes_used(clock: Clock) -> None:
    meter = Meter(Budget(seconds=100 / (1 - FINAL_SHARE)), seconds=90)
    clock.advance(4.0)
    assert meter.seconds == pytest.approx(94)
    assert not meter.affords(6.1, 1.0)
    assert meter.affords(5.9, 1.0)


def test_the_forecast_ends_at_the_target() -> None:
    control = Control(first_ceiling=0.35)
    ceilings = forecast(start(GOAL, control), control, 0.5)
    assert math.isclose(math.prod(1 - c for c in ceilings), 0.5)
    assert len(ceilings) == rounds_ahead(start(GOAL, control), 0.5) == 2


def test_a_small_budget_goes_into_few_trials_that_can_recover() -> None:
    effort = plan_round(Left(seconds=10, epochs=math.inf), SPEED, Search(), 1, 1.0)
    assert effort.trials == 1
    assert effort.epochs > 0.5


def test_workers_make_rounds_of_more_trials_that_take_no_longer() -> None:
    left, speed = Left(seconds=600, epochs=math.inf), Speed(epoch_s=2.0, trial_s=1.0, analysis_s=0.0)
    alone = plan_round(left, speed, Search(), 1, 1.0)
    for workers in (2, 4, 8, 64):
        many = plan_round(left, speed, Search(), 1, 1.0, workers=workers)
        assert many.trials > alone.trials
        in_turn = math.ceil(many.trials / workers)
        assert in_turn * (many.epochs * speed.epoch_s + speed.trial_s) <= left.seconds + 1e-6
    by_epochs = plan_round(Left(seconds=math.inf, epochs=40), speed, Search(), 1, 1.0, workers=4)
    assert by_epochs.trials * by_epochs.epochs <= 40
