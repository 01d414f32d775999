"""Recorded trials of bench_sampler.py, and the surrogate that answers in their place.

Three regressors are tried on each round's trials: a Gaussian process, a random forest, and the three
nearest recorded trials. The one with the best cross-validated R2 answers. The noise is that of the trials
that were run twice, drawn from the pairs whose score is nearest; what the surrogate misses in
cross-validation is more than that, because part of the landscape is lost in it.
"""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.ensemble import RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from autoprune.config import DECAYS, Search
from autoprune.search.proposals import SearchSpace, suggest
from autoprune.search.trial import TrialParams

Point = dict[str, Any]  # as Optuna stores a trial's parameters, and as the CSV files hold them

Array = NDArray[np.float64]
FOLDS = 10
NEAR = 8  # pairs of runs whose difference is drawn from
POOL = 4_000  # random points among which the best is looked for
LEAST_ERROR = 0.002  # added to errors before their logarithm is taken
RUNG = "rung"  # the kind of a first rung alone, whose top-1 is that after recalibration
CRITERIA = ("l1", "l2", "taylor")


@dataclass(frozen=True, kw_only=True)
class Key:
    """Names a recorded trial: kind is `first` (where a round begins), `random`, `again` or `rung`."""

    cell: str
    round: int
    kind: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Trial(Key):
    """One recorded trial; `rungs` holds (epochs, top-1) at the end of each."""

    seed: int
    ceiling: float
    first_rung: float
    point: Point
    rate: float
    cost_share: float
    untuned: float
    rungs: tuple[tuple[float, float], ...]
    top1: float
    seconds: float
    failure: str

    @property
    def key(self) -> Key:
        """Its name."""
        return Key(cell=self.cell, round=self.round, kind=self.kind, number=self.number)

    @property
    def of(self) -> tuple[str, int]:
        """Cell and round."""
        return self.cell, self.round

    def row(self, dump: Callable[[Any], str]) -> dict[str, Any]:
        """As it stands in the CSV."""
        rounded = {"rate": 5, "cost_share": 5, "untuned": 5, "top1": 5, "seconds": 2}
        row = {name: getattr(self, name) for name in FIELDS}
        return (
            row
            | {name: round(row[name], digits) for name, digits in rounded.items()}
            | {"point": dump(self.point), "rungs": dump(self.rungs)}
        )


FIELDS = [f.name for f in fields(Trial)]


def read_trials(path: Path) -> list[Trial]:
    """All of a CSV's; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_trial(row) for row in csv.DictReader(file)]


def _trial(row: dict[str, str]) -> Trial:
    whole, text, parsed = {"round", "number", "seed"}, {"cell", "kind", "failure"}, {"point", "rungs"}
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name in text:
            values[name] = value
        elif name in parsed:
            values[name] = json.loads(value)
        else:
            values[name] = int(value) if name in whole else float(value)
    values["rungs"] = tuple((e, t) for e, t in values["rungs"])
    return Trial(**values)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well a regressor does in cross-validation: R2 of the log error, and rank correlation."""

    name: str
    r2: float
    rho: float
    predicted: Array


class World:
    """Answers for one round of one network.

    Args:
        trials: the round's recorded ones.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = [t for t in trials if not t.failure and t.kind != RUNG]
        self.rungs = {t.number: t for t in trials if not t.failure and t.kind == RUNG}
        self.ceiling = trials[0].ceiling
        self.space = SearchSpace(search=Search(), ceiling=self.ceiling)
        self.known = [t.point for t in sorted(self._kind("first"), key=lambda t: t.number)][:3]
        self._x = np.array([_features(t.point, self.ceiling, t.first_rung) for t in self.trials])
        self._y = _to_log([t.top1 for t in self.trials])
        self.fits = [self._fit(name) for name in REGRESSORS]
        self.chosen = max(self.fits, key=lambda f: f.r2)
        self._model = REGRESSORS[self.chosen.name]().fit(self._x, self._y)
        pairs = np.array([_to_log([a.top1, b.top1]) for a, b in self.repeats])
        self._levels, self._apart = pairs.mean(axis=1), (pairs[:, 0] - pairs[:, 1]) / math.sqrt(2)
        self._answers: dict[str, float] = {}

    def _kind(self, kind: str) -> list[Trial]:
        return [t for t in self.trials if t.kind == kind]

    def _fit(self, name: str) -> Fit:
        """Trials of one point stay together, or the repeated ones would be known."""
        predicted, groups = np.empty_like(self._y), [json.dumps(t.point) for t in self.trials]
        names = sorted(set(groups))
        for _, held in KFold(FOLDS, shuffle=True, random_state=0).split(names):
            is_held = np.isin(groups, [names[i] for i in held])
            model = REGRESSORS[name]().fit(self._x[~is_held], self._y[~is_held])
            predicted[is_held] = model.predict(self._x[is_held])
        rho = float(spearmanr(self._y, predicted).statistic)
        return Fit(name=name, r2=float(r2_score(self._y, predicted)), rho=rho, predicted=predicted)

    def mean(self, point: Point) -> float:
        """Top-1 without noise."""
        key = json.dumps(point, sort_keys=True)
        if key not in self._answers:
            self._answers[key] = float(self.means([point])[0])
        return self._answers[key]

    def means(self, points: Sequence[Point]) -> Array:
        """The same for many."""
        x = np.array([_features(p, self.ceiling, 0.2) for p in points])
        return _from_log(np.asarray(self._model.predict(x)))

    def observe(self, point: Point, rng: np.random.Generator) -> float:
        """Top-1 as a trial would find it."""
        mean = _to_log([self.mean(point)])[0]
        near = np.argsort(np.abs(self._levels - mean))[:NEAR]
        return float(_from_log(mean + rng.choice((-1, 1)) * rng.choice(self._apart[near])))

    @cached_property
    def pool(self) -> tuple[list[Point], Array]:
        """Random points of the round's space, and what they score."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        points = []
        for number in range(POOL):
            asked = study.ask()
            suggest(asked, self.space)
            at_ceiling = {"prune_rate": self.ceiling} if number % 3 == 0 else {}
            points.append(dict(asked.params) | at_ceiling)
        return points, self.means(points)

    @cached_property
    def rates(self) -> Array:
        """Of the pool."""
        return np.array([params_of(p, self.ceiling).prune_rate for p in self.pool[0]])

    @property
    def repeats(self) -> list[tuple[Trial, Trial]]:
        """Trials that were run twice, with another seed."""
        again = {t.number: t for t in self._kind("again")}
        return [(t, again[t.number]) for t in self._kind("random") if t.number in again]

    def noise(self) -> tuple[float, float]:
        """Standard deviation in points of top-1, of the better half: missed by, and between two real runs."""
        top1 = np.array([t.top1 for t in self.trials])
        middle = float(np.median(top1))
        misses = (top1 - _from_log(self.chosen.predicted))[top1 >= middle]
        pairs = [(a.top1, b.top1) for a, b in self.repeats if (a.top1 + b.top1) / 2 >= middle]
        apart = np.array([a - b for a, b in pairs])
        real = float(np.sqrt(np.mean(apart**2) / 2)) if len(apart) else math.nan
        return 100 * float(np.sqrt(np.mean(misses**2))), 100 * real


def _gaussian_process() -> Any:
    kernel = ConstantKernel(1.0) * Matern(length_scale=np.full(NUM_FEATURES, 2.0), nu=2.5) + WhiteKernel(0.1)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    return _Quiet(make_pipeline(StandardScaler(), process))


class _Quiet:
    """A regressor whose fit does not say that a length scale came to its bound."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def fit(self, x: Array, y: Array) -> _Quiet:
        """In place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model.fit(x, y)
        return self

    def predict(self, x: Array) -> Array:
        """As the model does."""
        return np.asarray(self.model.predict(x))


def _forest() -> Any:
    return RandomForestRegressor(60, min_samples_leaf=2, max_features=0.5, random_state=0)


def _nearest() -> Any:
    return make_pipeline(StandardScaler(), KNeighborsRegressor(3, weights="distance"))


REGRESSORS: dict[str, Callable[[], Any]] = {
    "Gaussian process": _gaussian_process, "forest": _forest, "3 nearest": _nearest,
}  # fmt: skip


def _to_log(top1: Sequence[float]) -> Array:
    return -np.log(1 + LEAST_ERROR - np.minimum(np.asarray(top1), 1.0))


def _from_log(y: Array) -> Array:
    return np.clip(1 + LEAST_ERROR - np.exp(-y), 0.0, 1.0)


def params_of(point: Point, ceiling: float) -> TrialParams:
    """A recorded trial's parameters as it ran them: a rate near the ceiling became the ceiling."""
    return SearchSpace(search=Search(), ceiling=ceiling).snap(TrialParams.from_optuna(point))


def _features(point: Point, ceiling: float, first_rung: float) -> list[float]:
    """Rate, learning rate (highest, mean and last of the schedule), shape, criterion, first rung."""
    params = params_of(point, ceiling)
    mean, last = _factors(point)
    return [
        params.prune_rate, math.log(params.lr), math.log(params.lr * mean), last,
        *(float(params.decay == d) for d in DECAYS),
        *(float(params.criterion == c) for c in CRITERIA), first_rung,
    ]  # fmt: skip


NUM_FEATURES = 4 + len(DECAYS) + len(CRITERIA) + 1


def _factors(point: Point) -> tuple[float, float]:
    """The mean and the last learning rate of a schedule over its highest."""
    decay = point["decay"]
    if decay == "step":
        gamma, drops = point["step_gamma"], point["step_milestones"]
        return sum(gamma**i for i in range(drops + 1)) / (drops + 1), gamma**drops
    if decay == "exponential":
        gamma = point["exponential_gamma"]
        return (1 - gamma) / -math.log(gamma), gamma
    if decay == "onecycle":
        return 0.5 + 0.05 * point["onecycle_peak"], 0.0
    final = point[f"{decay}_final"]
    return (1 + final) / 2, final
