"""Choosing among plans of one cost by trying them: predictions add up what each group costs alone.

A plan is tried by building its network, estimating the batch-norm statistics anew and evaluating it on the
setup's samples; a smaller network costs less to try than the whole one. `rank_plans` does this with given
plans.

`refine` looks for better plans than the allocation's own: an evolution strategy with one parent (Rechenberg
1973) varies the price of each group by a factor, the allocation makes a plan of the same cost from them, and
the best one tried is the next parent. The width of the variation grows with a success and shrinks with a
failure, so that one try in five succeeds.

An `IterativeSearch` goes to a low cost in steps: scores and curves are measured anew on what each step
leaves, because they say little about a network of which half is gone. Plans straight from the first network
compete at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from autoprune.config import Metric
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

CRITERIA = ("l1", "l2", "taylor", "jacobian")
STRATEGIES = ("sensitivity", "global")
SAMPLES = 1024  # differences between plans are paired, so a thousand tell more than their own intervals
TRIES = 24
STEP_TRIES = 8  # of a step on the way
STEP = 0.8  # of the cost that a step leaves
NEAREST = 0.92  # of a mark's cost: limits closer to it start from the mark before
STEP_SHARE = 0.5  # of the setup's samples that curves are measured on after the first step
WIDTH = 0.5  # of the first variation, in the logarithm of a price
GROWTH, SHRINKAGE = 1.5, 0.9  # 1.5 * 0.9**4 is about 1: one success in five keeps the width
SWITCH = 0.2  # of the tries take another ranking
FINALISTS = 6  # the best of the tries meet again on more samples
SPARED = 1e3  # factor on the price of channels that sums join, where a first plan leaves them alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A plan, what its network does before any fine-tuning, and which criterion and strategy made it."""

    plan: PruningPlan
    evaluation: Evaluation
    criterion: str = ""
    strategy: str = ""

    @property
    def loss_key(self) -> float:
        """What is compared: the loss, or the missing score where there is no loss."""
        loss = self.evaluation.loss
        return loss if math.isfinite(loss) else 1e9 * (1 - self.evaluation.top1)


def make_setup(  # noqa: PLR0913 - where and on what to try are the caller's to say
    model: nn.Module, graph: ChannelGraph, split: Split, *, calibration: Split | None,
    num_samples: int = SAMPLES, device: torch.device | str = "cpu", task: Task = CLASSIFICATION,
) -> VariantSetup:  # fmt: skip
    """What plans are tried on: `num_samples` of a split, and data that estimate statistics anew."""
    part = split.subset(min(1.0, num_samples / len(split)), seed=0)
    return VariantSetup(
        model=model, graph=graph, split=cache_batches(part), device=torch.device(device),
        calibration=None if calibration is None else cache_batches(calibration),
        num_batches=RECALIBRATE_BATCHES, batch_size=RECALIBRATE_BATCH, task=task,
    )  # fmt: skip


def rank_plans(setup: VariantSetup, plans: Sequence[PruningPlan]) -> tuple[Candidate, ...]:
    """Every plan tried on the setup's samples, the best first; the model is left as it was found."""
    found = [Candidate(plan=p, evaluation=evaluate_fast(setup, _built(setup, p))) for p in plans]
    return tuple(sorted(found, key=lambda s: s.loss_key))


def refine(  # noqa: PLR0913 - what `allocate` wants, and how long to look
    setup: VariantSetup, rankings: Mapping[str, Scores], *, metric: Metric, limit: float,
    strategies: Sequence[str] = ("sensitivity",), table: SensitivityTable | None = None,
    tries: int = TRIES, seed: int = 0, finals: Split | None = None,
) -> Candidate:  # fmt: skip
    """The best plan found that costs `limit`: never worse, on the setup, than the allocation's own.

    Args:
        setup: the samples, and the data that estimate statistics anew.
        rankings: scores by criterion.
        metric: see `allocate`, as `limit` and `table`.
        limit: what the plan may cost.
        strategies: each makes a first plan with each criterion, and the best goes on.
        table: for the strategy `sensitivity`.
        tries: plans beyond the first ones; 0 only chooses among these.
        seed: of the variation.
        finals: more samples, on which the best tried meet again; None lets the setup's decide.

    Raises:
        UnreachableError: no criterion makes a plan that costs `limit`.
    """
    stage = _Stage(setup=setup, rankings=rankings, table=table, before=PruningPlan.full(setup.graph))
    goal = _Goal(metric=metric, limit=limit, strategies=tuple(strategies))
    return _select_best(_evolve([stage], goal, tries, np.random.default_rng(seed)), finals).candidate


class IterativeSearch:
    """Plans of ever lower cost, looked for in steps; what was learned on the way is kept for the next cost.

    Args:
        setup: the samples, and the data that estimate statistics and feed criteria.
        retrace: the graph of a network that a plan leaves, under the bounds of the setup's.
        metric: what costs speak of.
        table: of the setup's network.
        criteria, strategies: those that compete.
        seed: of the variation, and of the samples that criteria see.
        finals: more samples, on which the best plans of a cost meet again; None lets the setup's decide.
    """

    def __init__(  # noqa: PLR0913 - one whole stage: each argument is a decision of its caller
        self, setup: VariantSetup, retrace: Callable[[nn.Module], ChannelGraph], *, metric: Metric,
        table: SensitivityTable, criteria: Sequence[str] = CRITERIA,
        strategies: Sequence[str] = STRATEGIES, seed: int = 0, finals: Split | None = None,
    ) -> None:  # fmt: skip
        self.retrace, self.metric, self.seed, self.finals = retrace, metric, seed, finals
        self.criteria, self.strategies = tuple(criteria), tuple(strategies)
        self.first = _Stage(
            setup=setup, rankings=_ranked(setup, criteria, seed), table=table,
            before=PruningPlan.full(setup.graph),
        )  # fmt: skip
        self.present = setup.graph.cost().of(metric)
        self.steps: list[_Stage] = []  # the network after each mark

    def at(self, limit: float, *, tries: int = TRIES) -> Candidate:
        """The best plan found that costs `limit`.

        Raises:
            UnreachableError: no plan costs that.
        """
        depth = num_steps(self.present, limit)
        while len(self.steps) < depth:
            self._step()
        stages = [self.first, self.steps[depth - 1]] if depth else [self.first]
        rng = np.random.default_rng([self.seed, depth])
        return _select_best(_evolve(stages, self._wish(limit), tries, rng), self.finals).candidate

    def _step(self) -> None:
        """Go down to the next mark."""
        number = len(self.steps) + 1
        stages = [self.first, *self.steps[-1:]]
        goal = self._wish(self.present * STEP**number)
        try:
            found = _evolve(stages, goal, STEP_TRIES, np.random.default_rng([self.seed, 0, number]))
        except UnreachableError:
            self.steps.append(stages[-1])
        else:
            best = min(found, key=lambda f: f.candidate.loss_key)
            self.steps.append(_next_stage(best, self.retrace, self.criteria, self.seed))

    def _wish(self, limit: float) -> _Goal:
        return _Goal(metric=self.metric, limit=limit, strategies=self.strategies)


def num_steps(present: float, limit: float) -> int:
    """How many steps lead to the last mark from which the limit is still worth a step of its own."""
    return max(0, math.floor(math.log(limit / present / NEAREST) / math.log(STEP) + 1e-9))


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """What a plan is to cost, and how prices are made."""

    metric: Metric
    limit: float
    strategies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """A network to start from; `before` leads to it from the first one."""

    setup: VariantSetup
    rankings: Mapping[str, Scores]
    table: SensitivityTable | None
    before: PruningPlan

    def own(self, goal: _Goal) -> list[_Individual]:
        """Each criterion's plan by each strategy, once more without the channels that sums join.

        A curve knows how much such channels matter; a threshold on scores does not.
        """
        groups = self.setup.graph.groups
        joined = np.array([sum(m.role == "out" for m in g.members) > 1 for g in groups])
        plain, spared = np.zeros(len(groups)), np.where(joined, math.log(SPARED), 0.0)
        ways = [(c, s, plain) for s in goal.strategies for c in self.rankings]
        if joined.any() and not joined.all():
            ways += [(c, "global", spared) for c in self.rankings if "global" in goal.strategies]
        return [found for way in ways if (found := self.tried(goal, *way)) is not None]

    def tried(
        self, goal: _Goal, criterion: str, strategy: str, factors: NDArray[np.float64]
    ) -> _Individual | None:
        """The plan by varied prices, the logarithms of their factors given; None if none has this cost."""
        names = [g.name for g in self.setup.graph.groups]
        emphasis = dict(zip(names, np.exp(factors).tolist(), strict=True))
        try:
            plan = self.allocated(goal, criterion, strategy, emphasis)
        except UnreachableError:
            return None
        model = _built(self.setup, plan)
        candidate = Candidate(
            plan=self.before.compose(plan), evaluation=evaluate_fast(self.setup, model),
            criterion=criterion, strategy=strategy,
        )  # fmt: skip
        return _Individual(stage=self, candidate=candidate, model=model, factors=factors)

    def allocated(
        self, goal: _Goal, criterion: str, strategy: str, emphasis: Mapping[str, float]
    ) -> PruningPlan:
        return allocate(
            self.setup.graph, self.rankings[criterion], metric=goal.metric, limit=goal.limit,
            strategy=strategy, table=self.table, emphasis=emphasis,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Individual:
    """A plan tried, the stage that it starts from, and its network with new statistics."""

    stage: _Stage
    candidate: Candidate
    model: nn.Module
    factors: NDArray[np.float64]


def _evolve(
    stages: Sequence[_Stage], goal: _Goal, tries: int, rng: np.random.Generator
) -> list[_Individual]:  # fmt: skip
    """Every stage's own plans, then those varied around the best so far; of all, the best few."""
    found = [f for stage in stages for f in stage.own(goal)]
    if not found:
        stages[0].allocated(goal, next(iter(stages[0].rankings)), goal.strategies[0], {})  # raises why
    best = min(found, key=lambda f: f.candidate.loss_key)
    stage, strategy = best.stage, best.candidate.strategy
    factors, width = best.factors, WIDTH
    for _ in range(tries):
        switches = rng.uniform() < SWITCH
        criterion = str(rng.choice(list(stage.rankings))) if switches else best.candidate.criterion
        varied = factors + width * rng.normal(size=len(factors))
        new = stage.tried(goal, criterion, strategy, varied)
        if new is None:
            continue
        found = sorted([*found, new], key=lambda f: f.candidate.loss_key)[:FINALISTS]
        if new is found[0]:
            best, factors, width = new, varied, width * GROWTH
        else:
            width *= SHRINKAGE
    return sorted(found, key=lambda f: f.candidate.loss_key)[:FINALISTS]


def _select_best(found: Sequence[_Individual], finals: Split | None) -> _Individual:
    """The best, by more samples where there are more."""
    if finals is None or len(found) == 1:
        return found[0]
    again = []
    for one in found:
        setup = replace(one.stage.setup, split=finals)
        candidate = replace(one.candidate, evaluation=evaluate_fast(setup, one.model))
        again.append(replace(one, candidate=candidate))
    return min(again, key=lambda f: f.candidate.loss_key)


def _next_stage(
    found: _Individual, retrace: Callable[[nn.Module], ChannelGraph], criteria: Sequence[str], seed: int
) -> _Stage:
    before = found.stage.setup
    setup = replace(before, model=found.model, graph=retrace(found.model))
    table = sensitivity(
        setup.model, setup.graph, setup.split.subset(STEP_SHARE, seed=0), calibration=setup.calibration,
        device=setup.device, task=setup.task,
    )  # fmt: skip
    return _Stage(
        setup=setup, rankings=_ranked(setup, criteria, seed), table=table, before=found.candidate.plan
    )  # fmt: skip


def _ranked(setup: VariantSetup, criteria: Sequence[str], seed: int) -> dict[str, Scores]:
    return {
        c: score_units(
            setup.model, setup.graph, c, split=setup.calibration, device=setup.device, task=setup.task,
            seed=seed,
        )
        for c in criteria
    }  # fmt: skip


def _built(setup: VariantSetup, plan: PruningPlan) -> nn.Module:
    """The pruned network, recalibrated."""
    pruned = densify(setup.model, setup.graph, plan)
    if setup.calibration is not None:
        recalibrate_(
            pruned, setup.calibration, num_batches=setup.num_batches, batch_size=setup.batch_size,
            device=setup.device,
        )  # fmt: skip
    return pruned
