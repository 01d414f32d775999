from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna
import pytest

from autoprune.config import DECAYS, Search
from autoprune.search.proposals import (
    Observation,
    SearchSpace,
    initial_points,
    make_sampler,
    next_points,
    points_at_ceiling,
    propose,
    suggest,
)
from autoprune.search.trial import TrialParams
from autoprune.storage.run_store import quiet_optuna
from tests.search.test_trial import context

__all__ = ["context"]  # the fixture

SPACE = SearchSpace(search=Search(), ceiling=0.4)
GOOD = TrialParams(
    prune_rate=0.4, lr=0.02, decay="linear", final=0.01, criterion="l1", strategy="sensitivity"
)


@pytest.mark.parametrize("kind", ["tpe", "gp", "random"])
def test_samplers_repeat_for_a_seed_and_cover_every_decay(kind: str) -> None:
    def draw(seed: int, count: int) -> list[TrialParams]:
        past: list[Observation] = []
        for number in range(count):
            params = propose(SPACE, make_sampler(kind, seed + number), past)
            assert SPACE.contains(params)
            past.append(Observation(params=params, value=params.prune_rate))
        return [p.params for p in past]

    with quiet_optuna():
        few = 7 if kind == "gp" else 30
        assert draw(1, few) == draw(1, few)
        assert draw(1, 3) != draw(2, 3)
        if kind != "gp":
            assert {p.decay for p in draw(1, few)} == set(DECAYS)


@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay_makes_a_schedule_of_its_own_parameters(decay: Any) -> None:
    space = SearchSpace(search=Search(decays=(decay,)), ceiling=0.4)
    with quiet_optuna():
        trial = optuna.create_study().ask()
        params = suggest(trial, space)
    schedule = params.schedule(0.1)
    assert schedule.decay == decay
    assert 0.2 <= params.prune_rate <= 0.4


def test_advice_follows_what_was_good() -> None:
    """Ten trials say that a learning rate of 0.02 keeps the floor and others do not."""
    values = {lr: -abs(lr - 0.02) for lr in (0.001, 0.002, 0.1, 0.15, 0.2)}
    values |= dict.fromkeys((0.018, 0.019, 0.02, 0.021, 0.022), 0.4)
    past = [Observation(params=replace(GOOD, lr=lr), value=value) for lr, value in values.items()]
    with quiet_optuna():
        near = [0.01 < propose(SPACE, make_sampler("tpe", seed), past).lr < 0.04 for seed in range(20)]
        blind = [0.01 < propose(SPACE, make_sampler("tpe", seed), []).lr < 0.04 for seed in range(20)]
    assert sum(near) > 1.5 * sum(blind)


def test_what_lies_outside_the_space_is_no_advice() -> None:
    strange = [replace(GOOD, prune_rate=0.41), replace(GOOD, lr=0.3), replace(GOOD, criterion="fpgm")]
    assert not any(SPACE.contains(p) for p in strange)
    with quiet_optuna():
        with_them, without = (
            propose(SPACE, make_sampler("random", 3), [Observation(params=p, value=0.1) for p in points])
            for points in (strange, [])
        )
    assert with_them == without


def test_the_first_points_are_the_prior_at_the_ceiling_and_a_safe_one(context: Any) -> None:
    deep, shallow, hotter = initial_points(context, SPACE)
    assert (deep.prune_rate, shallow.prune_rate) == (0.4, SPACE.min_rate)
    assert shallow.lr < deep.lr, "the less goes, the lower the learning rate"
    assert hotter.lr > deep.lr
    assert all(SPACE.contains(p) for p in (deep, shallow, hotter))


def test_a_later_round_takes_a_criterion_that_is_still_asked_for() -> None:
    deep, safe = next_points(replace(GOOD, criterion="fpgm"), SPACE)
    assert deep == GOOD
    assert safe.prune_rate == pytest.approx(0.2)


def test_a_settled_round_looks_to_both_sides_of_the_first_learning_rate() -> None:
    lrs = [p.lr for p in points_at_ceiling([GOOD], SPACE)]
    assert lrs == pytest.approx([0.02, 0.06, 0.02 / 3])
    assert {p.prune_rate for p in points_at_ceiling([GOOD], SPACE)} == {0.4}
