"""What a round tries next: the space of a trial's parameters, the first points, and the sampler's proposals.

The sampler is asked on a study in memory. It holds the round's completed trials and, expressed for this
round, those of the round before. So the stored study holds what this round did and nothing else, and a
proposal follows from stored results and a seed alone: any process that asks gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import optuna
import torch
from optuna.trial import FixedTrial, FrozenTrial, create_trial
from torch import nn

from autoprune.config import Decay, Search
from autoprune.heuristics import DEFAULTS, Heuristics
from autoprune.search.context import RoundContext
from autoprune.search.trial import TrialParams
from autoprune.structure import densify


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What one round may try: the study's choices, and pruning rates up to the round's ceiling."""

    search: Search
    ceiling: float
    heuristics: Heuristics = DEFAULTS

    @property
    def min_rate(self) -> float:
        """The lowest pruning rate of the round."""
        return self.heuristics.min_rate_share * self.ceiling

    def contains(self, params: TrialParams) -> bool:
        """Return whether a trial of this round could have had these parameters."""
        return (
            self.min_rate <= params.prune_rate <= self.ceiling
            and self.search.lr[0] <= params.lr <= self.search.lr[1]
            and params.decay in self.search.decays
            and params.criterion in self.search.criteria
            and params.strategy in self.search.strategies
        )

    def clip_lr(self, lr: float) -> float:
        """Return the learning rate of the space that is nearest to `lr`."""
        low, high = self.search.lr
        return min(max(lr, low), high)

    def snap(self, params: TrialParams) -> TrialParams:
        """Return the parameters as a trial runs them: a rate near the ceiling becomes the ceiling."""
        near = params.prune_rate >= self.heuristics.snap_share * self.ceiling
        return replace(params, prune_rate=self.ceiling) if near else params


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The parameters of a finished trial, and its value as this round would judge it."""

    params: TrialParams
    value: float


def suggest(trial: optuna.Trial | FixedTrial, space: SearchSpace) -> TrialParams:
    """Let a trial's sampler choose its parameters, and return them as the trial runs them."""
    trial.suggest_float("prune_rate", space.min_rate, space.ceiling)
    trial.suggest_float("lr", *space.search.lr, log=True)
    decay = trial.suggest_categorical("decay", space.search.decays)
    trial.suggest_categorical("criterion", space.search.criteria)
    trial.suggest_categorical("strategy", space.search.strategies)
    if decay == "step":
        trial.suggest_float("step_gamma", 0.1, 0.5)
        trial.suggest_int("step_milestones", 1, 3)
    elif decay == "exponential":
        trial.suggest_float("exponential_gamma", 1e-3, 1e-1, log=True)
    elif decay == "onecycle":
        trial.suggest_float("onecycle_peak", 0.2, 0.5)
    else:
        trial.suggest_float(f"{decay}_final", 0.0, 0.1)
    return space.snap(TrialParams.from_optuna(trial.params))


def make_sampler(kind: str, seed: int, heuristics: Heuristics = DEFAULTS) -> optuna.samplers.BaseSampler:
    """Return the sampler that a study names: `tpe`, `gp` or `random`."""
    if kind == "gp":
        return optuna.samplers.GPSampler(
            n_startup_trials=heuristics.startup_trials, seed=seed % 2**32, warn_independent_sampling=False
        )
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed % 2**32)
    return optuna.samplers.TPESampler(n_startup_trials=heuristics.startup_trials, seed=seed % 2**32)


def propose(
    space: SearchSpace, sampler: optuna.samplers.BaseSampler, observations: Iterable[Observation]
) -> TrialParams:
    """Return what a sampler would try next after these observations; those outside the space are left out.

    Of very many, the latest count, so that the thousandth trial is proposed as fast as the two hundredth.
    """
    memory = optuna.create_study(direction="maximize", sampler=sampler)
    inside = [o for o in observations if space.contains(o.params)][-space.heuristics.max_observations :]
    memory.add_trials([_frozen_trial(o, space) for o in inside])
    trial = memory.ask()
    suggest(trial, space)
    return TrialParams.from_optuna(trial.params)


def _frozen_trial(observation: Observation, space: SearchSpace) -> FrozenTrial:
    fixed = FixedTrial(observation.params.to_optuna())
    suggest(fixed, space)
    return create_trial(params=fixed.params, distributions=fixed.distributions, value=observation.value)


def initial_points(context: RoundContext, space: SearchSpace) -> list[TrialParams]:
    """Return where the first round starts: at the ceiling, at a safe low rate, and at a higher lr."""
    deep, shallow = (_prior(context, space, rate) for rate in (space.ceiling, space.min_rate))
    return [deep, shallow, *_other_lrs(deep, space)[:1]]


def next_points(best: TrialParams, space: SearchSpace) -> list[TrialParams]:
    """Return where a later round starts: the last round's best at the new ceiling, and at a safe low rate."""
    deep = replace(_with_allowed_criterion(best, space), prune_rate=space.ceiling)
    return [deep, replace(deep, prune_rate=space.min_rate)]


def points_at_ceiling(points: Sequence[TrialParams], space: SearchSpace) -> list[TrialParams]:
    """Return what to try once a trial recovered at the ceiling: only accuracy is left to gain.

    The rate stays at the ceiling, and the learning rate moves to both sides of the first point's.
    """
    return [points[0], *_other_lrs(points[0], space)]


def _with_allowed_criterion(params: TrialParams, space: SearchSpace) -> TrialParams:
    """Return another round's parameters; a criterion that the study no longer names is replaced."""
    if params.criterion in space.search.criteria:
        return params
    return replace(params, criterion=space.search.criteria[0])


def _other_lrs(params: TrialParams, space: SearchSpace) -> list[TrialParams]:
    step = space.heuristics.lr_step
    return [replace(params, lr=space.clip_lr(params.lr * factor)) for factor in (step, 1 / step)]


def _prior(context: RoundContext, space: SearchSpace, rate: float) -> TrialParams:
    """Return a first point: ranked by what scores best untuned, with a learning rate that fits the rate.

    The more of the weights goes, the higher the learning rate that recovers it (the idea of ALLR: Zimmer et
    al. 2023, "How I learned to stop worrying and love retraining", section 3). Theirs is linear in the
    change, which puts it at its highest for whole channels; on a log scale it agrees with what was measured:
    ResNet-20 on CIFAR-10, 35 % removed, 190 steps: lr 0.01 gave 90.2 % top-1, 0.03 gave 89.1, 0.1 gave 86.7.
    """
    decays = space.search.decays
    decay: Decay = "cosine" if "cosine" in decays else decays[0]
    choices = list(product(space.search.criteria, space.search.strategies))
    criterion, strategy = context.screen(rate, choices)
    params = TrialParams(
        prune_rate=rate, lr=1.0, decay=decay, criterion=criterion, strategy=strategy,
        **_middle_of_decay(decay),
    )  # fmt: skip
    change = _weight_change(context, space.snap(params))
    low, high = space.search.lr
    return replace(params, lr=space.clip_lr(low * (high / low) ** change))


def _middle_of_decay(decay: Decay) -> dict[str, Any]:
    """Return the middle of `suggest`'s ranges of a decay's own parameters; cosine and linear end at 0."""
    middles: dict[Decay, dict[str, Any]] = {
        "cosine": {"final": 0.0}, "linear": {"final": 0.0},
        "step": {"gamma": 0.2, "milestones": 2}, "exponential": {"gamma": 0.01},
        "onecycle": {"peak": 0.3},
    }  # fmt: skip
    return middles[decay]


def _weight_change(context: RoundContext, params: TrialParams) -> float:
    """Return the share of the weights' norm that a trial's plan takes away, in [0, 1]."""
    start = context.start
    plan = context.choose_plan(params.prune_rate, params.criterion, params.strategy)
    pruned = densify(start.model, start.graph, plan)
    return math.sqrt(max(0.0, 1 - _square_norm(pruned) / _square_norm(start.model)))


def _square_norm(model: nn.Module) -> float:
    weights = [p.detach() for p in model.parameters() if p.ndim > 1]
    return sum(float(torch.sum(w.double() ** 2)) for w in weights)
