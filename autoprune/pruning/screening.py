"""Screening: a choice among plans of one cost by trying them, as predictions only add up single groups.

A plan is tried by building its network, estimating the batch-norm statistics anew and evaluating the
network on the setup's samples; a smaller network costs less to try than the whole one. `rank_plans` tries
given plans.

`refine` looks for better plans than the allocation's own: an evolution strategy with one parent (Rechenberg
1973) varies the price of each group by a factor, the allocation makes a plan of the same cost from these
prices, and the best plan tried is the next parent. The width of the variation grows with a success and
shrinks with a failure, so that one try in five succeeds.

An `IterativeSearch` goes to a low cost in steps: scores and curves are measured anew on the network that
each step leaves, because those of the first network say little about a network that has lost half of
itself. Plans straight from the first network compete at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoprune.config import Analysis, Metric, Target
from autoprune.data import Split, cache_batches
from autoprune.errors import UnreachableError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.allocation import allocate
from autoprune.pruning.criteria import Scores
from autoprune.pruning.criteria import score as score_units
from autoprune.pruning.sensitivity import (
    RECALIBRATE_BATCH,
    RECALIBRATE_BATCHES,
    SensitivityTable,
    sensitivity,
)
from autoprune.pruning.variants import VariantSetup, evaluate_fast
from autoprune.structure import ChannelGraph, densify
from autoprune.tasks import CLASSIFICATION, Task
from autoprune.training import recalibrate_

SAMPLES = 1024  # a guess: differences are paired, so a thousand tell more than their own intervals


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The settings of a search for plans of one cost; values without another origin are guesses.

    Attributes:
        criteria, strategies: each pair makes a first plan; measured together: benchmarks/bench_oneshot.py.
        tries: the number of varied plans beyond the first plans; 0 only chooses among the first plans.
        seed: the seed of the variation, and of the samples that criteria see.
        width: the width of the first variation, in the logarithm of a price.
        growth, shrinkage: the factors of the width after a success and a failure. 1.5 * 0.9**4 is about 1,
            so that one success in five keeps the width (Rechenberg 1973).
        switch_share: the share of the tries that take another criterion's scores.
        num_finalists: the number of the best plans that are compared again, on more samples.
        spared_factor: the factor on the price of channels that sums join, where a first plan spares them.
        step: the share of the cost that one step of an `IterativeSearch` leaves.
        nearest: a limit closer to a step's cost than this share starts from the step before.
        step_tries: the number of varied plans, as `tries`, at each step on the way.
        step_share: the share of the samples that curves are measured on after the first step.
    """

    criteria: tuple[str, ...] = ("l1", "l2", "taylor", "jacobian")
    strategies: tuple[str, ...] = ("sensitivity", "global")
    tries: int = 24
    seed: int = 0
    width: float = 0.5
    growth: float = 1.5
    shrinkage: float = 0.9
    switch_share: float = 0.2
    num_finalists: int = 6
    spared_factor: float = 1e3
    step: float = 0.8
    nearest: float = 0.92
    step_tries: int = 8
    step_share: float = 0.5


SEARCH = SearchSettings()


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A plan, its network's evaluation before any fine-tuning, and its criterion and strategy."""

    plan: PruningPlan
    evaluation: Evaluation
    criterion: str = ""
    strategy: str = ""

    @property
    def loss_key(self) -> float:
        """The key of comparisons, lower is better: the loss, or 1e9 times (1 - score) without one."""
        loss = self.evaluation.loss
        return loss if math.isfinite(loss) else 1e9 * (1 - self.evaluation.top1)


def make_setup(  # noqa: PLR0913 - where and on what to try are the caller's to say
    model: nn.Module, graph: ChannelGraph, split: Split, *, calibration: Split | None,
    num_samples: int = SAMPLES, device: torch.device | str = "cpu", task: Task = CLASSIFICATION,
) -> VariantSetup:  # fmt: skip
    """Return the setup to try plans on: `num_samples` of a split, and data that estimate statistics."""
    part = split.subset(min(1.0, num_samples / len(split)), seed=0)
    return VariantSetup(
        model=model, graph=graph, split=cache_batches(part), device=torch.device(device),
        calibration=None if calibration is None else cache_batches(calibration),
        num_batches=RECALIBRATE_BATCHES, batch_size=RECALIBRATE_BATCH, task=task,
    )  # fmt: skip


def rank_plans(setup: VariantSetup, plans: Sequence[PruningPlan]) -> tuple[Candidate, ...]:
    """Evaluate each plan on the setup's samples, and return all as candidates, the best first.

    The model is left unchanged. Each plan costs a recalibration and an evaluation of its network.
    """
    candidates = [Candidate(plan=p, evaluation=evaluate_fast(setup, _built(setup, p))) for p in plans]
    return tuple(sorted(candidates, key=lambda s: s.loss_key))


def refine(
    setup: VariantSetup, rankings: Mapping[str, Scores], target: Target, *,
    table: SensitivityTable | None = None, settings: SearchSettings = SEARCH, finals: Split | None = None,
) -> Candidate:  # fmt: skip
    """Return the best plan within a target; on the setup's samples it is never worse than the allocation's.

    Args:
        setup: the network, the samples, and the data that estimate statistics anew.
        rankings: the scores by criterion.
        target: the highest cost of the plan.
        table: the sensitivity table, for the strategy `sensitivity`.
        settings: the settings of the search; the keys of `rankings` say which criteria compete.
        finals: more samples, on which the best candidates are compared again; None lets the setup's samples
            decide.

    Raises:
        UnreachableError: no criterion makes a plan of that cost.
    """
    stage = _Stage(setup=setup, rankings=rankings, table=table, before=PruningPlan.full(setup.graph))
    limit = target.absolute(setup.graph.cost().of(target.metric))
    goal = _Goal(metric=target.metric, limit=limit, settings=settings)
    return _select_best(_evolve([stage], goal, np.random.default_rng(settings.seed)), finals).candidate


class IterativeSearch:
    """A search for plans of ever lower cost in steps; the measurements of one cost serve the next.

    Args:
        setup: the network, the samples, and the data that estimate statistics and feed criteria.
        retrace: returns the graph of a network that a plan leaves, under the bounds of the setup's graph.
        table: the sensitivity table of the setup's network.
        metric: the metric of the costs.
        settings: the settings of the search.
        finals: more samples, on which the best plans of a cost are compared again; None lets the setup's
            samples decide.
    """

    def __init__(
        self, setup: VariantSetup, retrace: Callable[[nn.Module], ChannelGraph], *, table: SensitivityTable,
        metric: Metric = "macs", settings: SearchSettings = SEARCH, finals: Split | None = None,
    ) -> None:  # fmt: skip
        self.retrace, self.metric, self.settings, self.finals = retrace, metric, settings, finals
        self.first = _Stage(
            setup=setup, rankings=_rankings(setup, settings), table=table,
            before=PruningPlan.full(setup.graph),
        )  # fmt: skip
        self.full_cost = setup.graph.cost().of(metric)
        self.stages: list[_Stage] = []  # the network after each step

    def at(self, limit: float) -> Candidate:
        """Return the best plan that costs `limit`, absolute in the search's metric.

        Raises:
            UnreachableError: no plan has that cost.
        """
        depth = num_steps(self.full_cost, limit, self.settings)
        while len(self.stages) < depth:
            self._step()
        stages = [self.first, self.stages[depth - 1]] if depth else [self.first]
        goal = _Goal(metric=self.metric, limit=limit, settings=self.settings)
        rng = np.random.default_rng([self.settings.seed, depth])
        return _select_best(_evolve(stages, goal, rng), self.finals).candidate

    def _step(self) -> None:
        """Append the stage of the network that one more step leaves."""
        number, settings = len(self.stages) + 1, self.settings
        stages = [self.first, *self.stages[-1:]]
        goal = _Goal(
            metric=self.metric, limit=self.full_cost * settings.step**number,
            settings=replace(settings, tries=settings.step_tries),
        )  # fmt: skip
        try:
            population = _evolve(stages, goal, np.random.default_rng([settings.seed, 0, number]))
        except UnreachableError:
            self.stages.append(stages[-1])
        else:
            best = min(population, key=lambda f: f.candidate.loss_key)
            self.stages.append(_next_stage(best, self.retrace, settings))


def num_steps(full_cost: float, limit: float, settings: SearchSettings = SEARCH) -> int:
    """Return the number of steps to the last cost from which the limit is worth a step of its own."""
    share = limit / full_cost / settings.nearest
    return max(0, math.floor(math.log(share) / math.log(settings.step) + 1e-9))


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """The highest cost of a plan, and the settings of the search for plans."""

    metric: Metric
    limit: float
    settings: SearchSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """A network to start from; the plan `before` leads to it from the first network."""

    setup: VariantSetup
    rankings: Mapping[str, Scores]
    table: SensitivityTable | None
    before: PruningPlan

    def first_plans(self, goal: _Goal) -> list[_Individual]:
        """Evaluate each criterion's plan by each strategy, and by `global` sparing channels that sums join.

        A curve shows how much such channels matter; a threshold on scores does not.
        """
        groups = self.setup.graph.groups
        joined = np.array([sum(m.role == "out" for m in g.members) > 1 for g in groups])
        plain, spared = np.zeros(len(groups)), np.where(joined, math.log(goal.settings.spared_factor), 0.0)
        attempts = [(c, s, plain) for s in goal.settings.strategies for c in self.rankings]
        if joined.any() and not joined.all():
            attempts += [(c, "global", spared) for c in self.rankings if "global" in goal.settings.strategies]
        return [i for attempt in attempts if (i := self.evaluate(goal, *attempt)) is not None]

    def evaluate(
        self, goal: _Goal, criterion: str, strategy: str, factors: NDArray[np.float64]
    ) -> _Individual | None:
        """Evaluate the plan at prices varied by factors (logarithms); return None if no plan fits."""
        names = [g.name for g in self.setup.graph.groups]
        emphasis = dict(zip(names, np.exp(factors).tolist(), strict=True))
        try:
            plan = self.allocate(goal, criterion, strategy, emphasis)
        except UnreachableError:
            return None
        model = _built(self.setup, plan)
        candidate = Candidate(
            plan=self.before.compose(plan), evaluation=evaluate_fast(self.setup, model),
            criterion=criterion, strategy=strategy,
        )  # fmt: skip
        return _Individual(stage=self, candidate=candidate, model=model, factors=factors)

    def allocate(
        self, goal: _Goal, criterion: str, strategy: str, emphasis: Mapping[str, float]
    ) -> PruningPlan:
        return allocate(
            self.setup.graph, self.rankings[criterion], metric=goal.metric, limit=goal.limit,
            strategy=strategy, table=self.table, emphasis=emphasis,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Individual:
    """A plan that was tried, the stage that it starts from, and its network with new statistics."""

    stage: _Stage
    candidate: Candidate
    model: nn.Module
    factors: NDArray[np.float64]


def _evolve(
    stages: Sequence[_Stage], goal: _Goal, rng: np.random.Generator
) -> list[_Individual]:  # fmt: skip
    """Try each stage's first plans, then variations of the best so far, and return the best few of all."""
    settings = goal.settings
    population = [individual for stage in stages for individual in stage.first_plans(goal)]
    if not population:
        stages[0].allocate(goal, next(iter(stages[0].rankings)), settings.strategies[0], {})  # raises why
    best = min(population, key=lambda f: f.candidate.loss_key)
    stage, strategy = best.stage, best.candidate.strategy
    factors, width = best.factors, settings.width
    for _ in range(settings.tries):
        switches = rng.uniform() < settings.switch_share
        criterion = str(rng.choice(list(stage.rankings))) if switches else best.candidate.criterion
        varied = factors + width * rng.normal(size=len(factors))
        new = stage.evaluate(goal, criterion, strategy, varied)
        if new is None:
            continue
        population = sorted([*population, new], key=lambda f: f.candidate.loss_key)[: settings.num_finalists]
        if new is population[0]:
            best, factors, width = new, varied, width * settings.growth
        else:
            width *= settings.shrinkage
    return sorted(population, key=lambda f: f.candidate.loss_key)[: settings.num_finalists]


def _select_best(population: Sequence[_Individual], finals: Split | None) -> _Individual:
    """Return the best individual, by the final samples where there are any."""
    if finals is None or len(population) == 1:
        return population[0]
    finalists = []
    for individual in population:
        setup = replace(individual.stage.setup, split=finals)
        candidate = replace(individual.candidate, evaluation=evaluate_fast(setup, individual.model))
        finalists.append(replace(individual, candidate=candidate))
    return min(finalists, key=lambda f: f.candidate.loss_key)


def _next_stage(
    best: _Individual, retrace: Callable[[nn.Module], ChannelGraph], settings: SearchSettings
) -> _Stage:
    before = best.stage.setup
    setup = replace(before, model=best.model, graph=retrace(best.model))
    table = sensitivity(
        setup.model, setup.graph, setup.split, settings=Analysis(share=settings.step_share),
        calibration=setup.calibration, device=setup.device, task=setup.task,
    )  # fmt: skip
    rankings = _rankings(setup, settings)
    return _Stage(setup=setup, rankings=rankings, table=table, before=best.candidate.plan)


def _rankings(setup: VariantSetup, settings: SearchSettings) -> dict[str, Scores]:
    return {
        c: score_units(
            setup.model, setup.graph, c, split=setup.calibration, device=setup.device, task=setup.task,
            seed=settings.seed,
        )
        for c in settings.criteria
    }  # fmt: skip


def _built(setup: VariantSetup, plan: PruningPlan) -> nn.Module:
    """Return the pruned network, recalibrated."""
    pruned = densify(setup.model, setup.graph, plan)
    if setup.calibration is not None:
        recalibrate_(
            pruned, setup.calibration, num_batches=setup.num_batches, batch_size=setup.batch_size,
            device=setup.device,
        )  # fmt: skip
    return pruned
