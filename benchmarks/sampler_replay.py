"""Rounds played against a surrogate of recorded trials, as the product proposes (`search.proposals`).

A way is a sampler with its start-up trials, the points that it begins with, and the results that it gets.
All ways play with the same seeds, so that differences are paired. The tasks of a round are:

* `deepest`: one in twenty keeps the floor at four fifths of the ceiling; the loss is the rate that the best
  trial falls short of the best rate that keeps the floor, in points of the starting network's MACs;
* `ceiling`: the floor is kept at the ceiling by a tenth of what can be tried there; the same loss;
* `settled`: every trial recovers, and all are at the ceiling; the loss is in points of top-1.

The winner is the controller's: the most removed among those that were seen to recover, then accuracy. Its
accuracy counts without noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import optuna
from sampler_worlds import Point, World, params_of
from scipy.stats import rankdata

from autoprune.config import Decay
from autoprune.search.controller import TIE
from autoprune.search.proposals import (
    Observation,
    SearchSpace,
    make_sampler,
    next_points,
    points_at_ceiling,
    propose,
)
from autoprune.search.round import FAILED_VALUE, TIE_WEIGHT
from autoprune.search.trial import TrialParams

Goal = Literal["deepest", "ceiling", "settled"]
GOALS: tuple[Goal, ...] = ("deepest", "ceiling", "settled")
Encoding = Callable[[Sequence["Seen"], Sequence[Observation]], list[Observation]]
DEEP, NEAR, TOP = 0.8, 0.02, 0.95  # of the ceiling; rates this near; quantile of what they score
FEW = 0.9  # quantile of what is scored at the ceiling
DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A trial as the round saw it; `mean` is what it is worth without noise."""

    point: Point
    rate: float
    top1: float
    mean: float
    recovered: bool
    value: float

    @property
    def past(self) -> Observation:
        """What the sampler is told."""
        return Observation(params=TrialParams.from_optuna(self.point), value=self.value)


def as_valued(own: Sequence[Seen], earlier: Sequence[Observation]) -> list[Observation]:
    """What the product tells: the lexicographic value."""
    return [*earlier, *(s.past for s in own)]


def as_ranked(own: Sequence[Seen], earlier: Sequence[Observation]) -> list[Observation]:
    """Ranks of the values: a step between failing and recovering is no larger than any other."""
    past = as_valued(own, earlier)
    if not past:
        return past
    return [replace(p, value=float(r)) for p, r in zip(past, rankdata([p.value for p in past]), strict=True)]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a round is searched.

    Attributes:
        begins: with the points that the product begins with.
        line: once settled, that many trials after them search the learning rate alone.
        most: trials that are played.
        is_slow: played with fewer seeds.
    """

    name: str
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    begins: bool = True
    told: Encoding = as_valued
    decays: tuple[Decay, ...] | None = None
    line: int = 0
    most: int = 16
    is_slow: bool = False


def product(kind: str) -> Callable[[int], optuna.samplers.BaseSampler]:
    """The product's own sampler."""
    return lambda seed: make_sampler(kind, seed)


def tpe(startup: int, *, group: bool = False) -> Callable[[int], optuna.samplers.BaseSampler]:
    """TPE otherwise set."""
    return lambda seed: optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, group=group)


PRODUCT = Way(name="tpe, 4 start-up trials (the product)", sampler=product("tpe"), most=32)
WAYS = (
    PRODUCT,
    Way(name="tpe, 1", sampler=tpe(1)),
    Way(name="tpe, 10 (Optuna's own)", sampler=tpe(10)),
    Way(name="tpe, 4, grouped", sampler=tpe(4, group=True)),
    Way(name="gp, 4", sampler=product("gp"), most=8, is_slow=True),
    Way(name="gp, 4, told ranks", sampler=product("gp"), told=as_ranked, most=8, is_slow=True),
    Way(name="random", sampler=product("random"), most=32),
    Way(name="tpe, 4, from nothing", sampler=product("tpe"), begins=False, most=32),
    Way(name="random, from nothing", sampler=product("random"), begins=False),
    Way(name="tpe, 4, cosine and linear alone", sampler=product("tpe"), decays=("cosine", "linear")),
    Way(name="tpe, 4, cosine alone", sampler=product("tpe"), decays=("cosine",)),
)
SETTLED_WAYS = (
    Way(name="tpe, 4, one on the line first", sampler=product("tpe"), line=1),
    Way(name="tpe, 4, three on the line first", sampler=product("tpe"), line=3),
    Way(
        name="tpe, 4, cosine alone, three on the line first",
        sampler=product("tpe"), line=3, decays=("cosine",),
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Round:
    """A round to be searched: its floor, and the best that can be had."""

    world: World
    goal: Goal
    floor: float
    best: float
    share: float

    @classmethod
    def of(cls, world: World, goal: Goal) -> Round:
        """With the floor that the goal asks for."""
        _, means = world.pool
        at_ceiling = means[world.rates >= world.ceiling]
        if goal == "settled":
            return cls(world=world, goal=goal, floor=0.0, best=float(at_ceiling.max()), share=1.0)
        if goal == "ceiling":
            floor = float(np.quantile(at_ceiling, FEW))
        else:
            near = np.abs(world.rates - DEEP * world.ceiling) < NEAR
            floor = float(np.quantile(means[near], TOP))
        kept = means >= floor
        return cls(
            world=world, goal=goal, floor=floor, best=float(world.rates[kept].max()), share=float(kept.mean())
        )

    def loss(self, trials: Sequence[Seen]) -> float:
        """Of the controller's winner, in points."""
        recovered = [s for s in trials if s.recovered]
        most = max((s.rate for s in recovered), default=0.0)
        if self.goal != "settled":
            return 100 * (self.best - most)
        tied = [s for s in recovered if s.rate >= most - TIE]
        return 100 * (self.best - max(tied, key=lambda s: s.top1).mean)


def play(
    one: Round, way: Way, seed: int, trials: int, *, earlier: Sequence[Observation] = (),
    known: Sequence[Point] | None = None,
) -> list[Seen]:  # fmt: skip
    """Search a round as `search.next_point` does, one trial after the other."""
    world, own = one.world, list[Seen]()
    space = world.space
    if way.decays is not None:
        space = replace(space, search=replace(space.search, decays=way.decays))
    begin = list(world.known if known is None else known) if way.begins else []
    for slot in range(min(trials, way.most)):
        settled = one.goal == "settled" or any(
            s.recovered and s.point["prune_rate"] >= world.ceiling * (1 - 1e-9) for s in own
        )
        points = _points_at_ceiling(begin, space) if settled and begin else begin
        if slot < len(points):
            point = points[slot]
        elif settled and own and slot < len(points) + way.line:
            point = _on_the_line(own, space)
        else:
            sampler = way.sampler(seed * 1000 + slot)
            point = propose(space, sampler, way.told(own, earlier)).to_optuna()
        if settled:
            point = point | {"prune_rate": world.ceiling}
        own.append(_tried(one, point, seed * 1000 + slot))
    return own


def _tried(one: Round, point: Point, seed: int) -> Seen:
    """The noise belongs to the slot: all ways meet the same luck there."""
    world = one.world
    rate = params_of(point, world.ceiling).prune_rate
    top1 = round(world.observe(point, np.random.default_rng(seed)), DECIMALS)
    recovered = top1 >= one.floor
    short = max(FAILED_VALUE, min(-1e-9, top1 - one.floor))
    value = rate + TIE_WEIGHT * top1 if recovered else short
    return Seen(point=point, rate=rate, top1=top1, mean=world.mean(point), recovered=recovered, value=value)


def _points_at_ceiling(points: Sequence[Point], space: SearchSpace) -> list[Point]:
    return [p.to_optuna() for p in points_at_ceiling([TrialParams.from_optuna(p) for p in points], space)]


def _on_the_line(own: Sequence[Seen], space: SearchSpace) -> Point:
    """The best trial, half way (in logarithms) to the better of its neighbours in learning rate."""
    most = max(s.rate for s in own)
    tied = sorted((s for s in own if s.rate >= most - TIE), key=lambda s: s.point["lr"])
    best = max(range(len(tied)), key=lambda i: tied[i].top1)
    low, high = space.search.lr
    beside = [tied[i] for i in (best - 1, best + 1) if 0 <= i < len(tied)]
    here = tied[best].point["lr"]
    if len(beside) < 2:  # the best is at the end of what was tried
        factor = 2.0 if best else 0.5
        return tied[best].point | {"lr": min(max(here * factor, low), high)}
    towards = max(beside, key=lambda s: s.top1).point["lr"]
    return tied[best].point | {"lr": float(np.sqrt(here * towards))}


STARTS = (
    "from nothing",
    "first points (as the first round)",
    "best and a safe one (next_points)",
    "first points, imported trials",
    "first point, then next_points, imported trials",
    "next_points, imported trials (the product)",
)


def second(first: Round, then: Round, start: str, seed: int, trials: int) -> list[Seen]:
    """A round of eight trials, and the one after it, begun in one of `STARTS`."""
    before = play(first, PRODUCT, seed, 8)
    won = max(before, key=lambda s: (s.recovered, s.rate if s.recovered else 0.0, s.top1))
    factor = then.world.ceiling / first.world.ceiling
    earlier = [
        Observation(
            params=TrialParams.from_optuna(s.point | {"prune_rate": factor * s.point["prune_rate"]}),
            value=factor * s.rate + TIE_WEIGHT * s.top1 if s.recovered else s.value,
        )
        for s in before
    ]
    later = [p.to_optuna() for p in next_points(TrialParams.from_optuna(won.point), then.world.space)]
    known = later if "next_points" in start else then.world.known
    if start.startswith("first point,"):
        known = [then.world.known[0], *known]
    way = replace(PRODUCT, begins=start != STARTS[0])
    return play(then, way, seed + 5000, trials, known=known, earlier=earlier if "imported" in start else ())
