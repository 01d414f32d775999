from __future__ import annotations

from typing import Any

import optuna
import pytest

from autoprune.config import DECAYS, Search
from autoprune.search.proposals import (
    SHALLOW,
    Past,
    Point,
    Space,
    advise,
    first_points,
    make_sampler,
    next_points,
    settled_points,
    suggest,
)
from autoprune.storage.run_store import quiet_optuna
from tests.search.test_trial import ground

__all__ = ["ground"]  # the fixture

SPACE = Space.of(Search(), 0.4)
GOOD: Point = {
    "prune_rate": 0.4, "lr": 0.02, "decay": "linear", "linear_final": 0.01, "criterion": "l1",
    "strategy": "sensitivity",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tpe", "gp", "random"])
def test_samplers_repeat_for_a_seed_and_cover_every_decay(kind: str) -> None:
    def draw(seed: int, count: int) -> list[dict[str, object]]:
        past: list[Past] = []
        for number in range(count):
            point = advise(SPACE, make_sampler(kind, seed + number), past)
            assert SPACE.holds(point)
            past.append(Past(point=point, value=point["prune_rate"]))
        return [p.point for p in past]

    with quiet_optuna():
        few = 7 if kind == "gp" else 30
        assert draw(1, few) == draw(1, few)
        assert draw(1, 3) != draw(2, 3)
        if kind != "gp":
            assert {p["decay"] for p in draw(1, few)} == set(DECAYS)


@pytest.mark.parametrize("decay", DECAYS)
def test_every_decay_makes_a_schedule_of_its_own_parameters(decay: Any) -> None:
    space = Space.of(Search(decays=(decay,)), 0.4)
    with quiet_optuna():
        trial = optuna.create_study().ask()
        params = suggest(trial, space)
    schedule = params.schedule(0.1)
    assert schedule.decay == decay
    assert 0.2 <= params.prune_rate <= 0.4


def test_advice_follows_what_was_good() -> None:
    """Ten trials say that a learning rate of 0.02 keeps the floor and others do not."""
    past = [Past(point=GOOD | {"lr": lr}, value=-abs(lr - 0.02)) for lr in (0.001, 0.002, 0.1, 0.15, 0.2)]
    past += [Past(point=GOOD | {"lr": lr}, value=0.4) for lr in (0.018, 0.019, 0.02, 0.021, 0.022)]
    with quiet_optuna():
        near = [0.01 < advise(SPACE, make_sampler("tpe", seed), past)["lr"] < 0.04 for seed in range(20)]
        blind = [0.01 < advise(SPACE, make_sampler("tpe", seed), [])["lr"] < 0.04 for seed in range(20)]
    assert sum(near) > 1.5 * sum(blind)


def test_what_lies_outside_the_space_is_no_advice() -> None:
    strange = [GOOD | {"prune_rate": 0.41}, GOOD | {"lr": 0.3}, GOOD | {"criterion": "fpgm"}]
    assert not any(SPACE.holds(p) for p in strange)
    with quiet_optuna():
        told, untold = (
            advise(SPACE, make_sampler("random", 3), [Past(point=p, value=0.1) for p in points])
            for points in (strange, [])
        )
    assert told == untold


def test_the_first_points_are_the_prior_at_the_ceiling_and_a_safe_one(ground: Any) -> None:
    deep, shallow, hotter = first_points(ground, SPACE)
    assert (deep["prune_rate"], shallow["prune_rate"]) == (0.4, SHALLOW * 0.4)
    assert shallow["lr"] < deep["lr"], "the less goes, the lower the learning rate"
    assert hotter["lr"] > deep["lr"]
    assert all(SPACE.holds(p) for p in (deep, shallow, hotter))


def test_a_later_round_takes_a_criterion_that_is_still_asked_for() -> None:
    deep, safe = next_points(GOOD | {"criterion": "fpgm"}, SPACE)
    assert deep == GOOD | {"criterion": "l1"}
    assert safe["prune_rate"] == pytest.approx(0.2)


def test_a_settled_round_looks_to_both_sides_of_the_first_learning_rate() -> None:
    lrs = [p["lr"] for p in settled_points([GOOD], SPACE)]
    assert lrs == pytest.approx([0.02, 0.06, 0.02 / 3])
    assert {p["prune_rate"] for p in settled_points([GOOD], SPACE)} == {0.4}
