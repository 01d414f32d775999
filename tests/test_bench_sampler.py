"""The sampler benchmark's surrogate and replay, on trials of which it is known what makes them good."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import optuna
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from sampler_replay import PRODUCT, WAYS, Round, play, second
from sampler_worlds import FIELDS, RUNG, Trial, World, read_trials

from autoprune.config import Search
from autoprune.search.proposals import SearchSpace, suggest
from autoprune.storage.run_store import quiet_optuna

BEST_LR = 0.03


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with quiet_optuna():
        yield


def made_up(number: int = 1, ceiling: float = 0.5) -> list[Trial]:
    """Accuracy falls with the distance of the learning rate from the best, and with the rate."""
    space = SearchSpace(search=Search(decays=("cosine", "linear")), ceiling=ceiling)
    rng = np.random.default_rng(number)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    deep = {"decay": "cosine", "cosine_final": 0.0, "criterion": "l1", "strategy": "sensitivity"}
    points = [deep | {"prune_rate": ceiling, "lr": lr} for lr in (0.01, 0.03, 0.003)]
    for _ in range(45):
        asked = study.ask()
        suggest(asked, space)
        points.append(dict(asked.params))
    points += points[3:13]
    kinds = [("first", i) for i in range(3)] + [("random", i) for i in range(45)]
    kinds += [("again", i) for i in range(10)]
    trials = []
    for (kind, place), point in zip(kinds, points, strict=True):
        off = math.log10(point["lr"] / BEST_LR)
        top1 = 0.96 - 0.05 * off**2 - 0.1 * point["prune_rate"] + rng.normal(0, 0.002)
        trials.append(
            Trial(
                cell="digits", round=number, kind=kind, number=place, seed=place, ceiling=ceiling,
                first_rung=0.2, point=point, rate=point["prune_rate"], cost_share=0.5, untuned=0.5,
                rungs=((1.0, top1 - 0.1), (5.0, top1)), top1=top1, seconds=1.0, failure="",
            )
        )  # fmt: skip
    return trials


@pytest.fixture(scope="module")
def world() -> World:
    return World(made_up())


def test_trials_come_back_from_the_csv(tmp_path: Path) -> None:
    trials, path = made_up(), tmp_path / "trials.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(t.row(json.dumps) for t in trials)
    back = read_trials(path)
    assert [t.key for t in back] == [t.key for t in trials]
    assert [t.point for t in back] == [t.point for t in trials]
    assert [t.top1 for t in back] == pytest.approx([t.top1 for t in trials], abs=1e-5)


def test_the_surrogate_knows_what_matters(world: World) -> None:
    assert world.chosen.r2 > 0.8
    point = world.known[0]
    good, bad = (world.mean(point | {"lr": lr}) for lr in (BEST_LR, 0.19))
    assert good > bad + 0.01
    assert world.mean(point | {"prune_rate": 0.25, "lr": BEST_LR}) > good


def test_rungs_are_no_trials() -> None:
    trials = made_up()
    alone = [Trial(**(vars(t) | {"kind": RUNG, "top1": 0.1})) for t in trials if t.kind == "random"]
    world = World([*trials, *alone])
    assert len(world.trials) == len(trials)
    assert world.rungs[3].top1 == 0.1


def test_a_round_begins_with_known_points_and_loses_less_the_longer_it_goes_on(world: World) -> None:
    one = Round.of(world, "ceiling")
    seen = play(one, PRODUCT, 0, 8)
    assert [s.point for s in seen[:2]] == world.known[:2]
    losses = [one.loss(seen[:n]) for n in range(1, 9)]
    assert losses == sorted(losses, reverse=True)
    assert [s.point for s in play(one, PRODUCT, 0, 8)] == [s.point for s in seen]
    nothing = next(w for w in WAYS if not w.begins)
    assert play(one, nothing, 0, 1)[0].point != world.known[0]


def test_a_settled_round_stays_at_the_ceiling(world: World) -> None:
    one = Round.of(world, "settled")
    seen = play(one, PRODUCT, 0, 6)
    assert {s.rate for s in seen} == {world.ceiling}
    assert one.loss(seen) == pytest.approx(100 * (one.best - max(seen, key=lambda s: s.top1).mean))


def test_a_second_round_begins_with_what_was_best(world: World) -> None:
    then = Round.of(World(made_up(2, 0.625)), "settled")
    seen = second(Round.of(world, "settled"), then, "next_points, imported trials (the product)", 0, 3)
    best = max(play(Round.of(world, "settled"), PRODUCT, 0, 8), key=lambda s: s.top1)
    assert seen[0].point == best.point | {"prune_rate": 0.625}
