"""What a search works with: a problem, a run of it, a round, each built once; run and round hold the problem.

A `Problem` is a study that passed all checks: network, data, device, and the target in absolute numbers. A
`RunContext` is the process's run of it: where it is stored, what it aims at, what it may still spend. A
`RoundContext` is what all trials of a round have in common: the dense network they start from, its
sensitivity, and the scores of its units. A trial needs the round's context alone; it knows nothing of storage
or Optuna.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprune.config import Budget, Metric, Study, Target
from autoprune.data import Data
from autoprune.errors import RunError, TrialError, UnreachableError
from autoprune.events import OnEvent
from autoprune.heuristics import Heuristics
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning import Scores, SensitivityTable, allocate, make_setup, rank_plans, score
from autoprune.search.budget import BudgetTracker
from autoprune.search.controller import Goal
from autoprune.storage import NO_OWNER, Member, RunStore
from autoprune.structure import ChannelGraph, measure_latency_share
from autoprune.tasks import Task
from autoprune.training import evaluate


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A study that passed all checks.

    Attributes:
        task: how the network is used, from the study.
        original: the network, a copy of the study's on the CPU; untrained where the study trains a baseline.
            It is the teacher of every fine-tuning, and what plans are composed for.
        graph: of the original.
        example: one real input, as the network takes it.
        original_cost: in the target's metric; `target_cost` is what the result may cost.
        search_evaluation: the original on the search split; None where it is still to be trained, or where
            this process joins a run that has measured it.
    """

    study: Study
    task: Task
    target: Target
    budget: Budget
    original: nn.Module
    graph: ChannelGraph
    data: Data
    device: torch.device
    example: tuple[Tensor, ...]
    original_cost: float
    target_cost: float
    search_evaluation: Evaluation | None = None

    @property
    def metric(self) -> Metric:
        """The metric of the target, in which costs are compared."""
        return self.target.metric

    @property
    def target_share(self) -> float:
        """The target as a share of the original's cost."""
        return self.target_cost / self.original_cost

    @property
    def heuristics(self) -> Heuristics:
        """The study's shares, thresholds and factors."""
        return self.study.heuristics

    def evaluate_on_search(self, model: nn.Module) -> Evaluation:
        """Evaluate a model on the search split."""
        return evaluate(model, self.data.search, device=self.device, task=self.task)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunContext:
    """A run, as seen by one of the processes that work on it.

    Attributes:
        goal: the floor and the target share, as the stored baseline was measured.
        budget: what is used of it, by all processes.
        member: this process among those that work on the run; None where nobody else can.
    """

    problem: Problem
    store: RunStore
    goal: Goal
    budget: BudgetTracker
    on_event: OnEvent
    member: Member | None = None

    @property
    def is_coordinator(self) -> bool:
        """Whether this process plans and judges rounds."""
        return self.member is None or self.member.role == "coordinator"

    @property
    def owner(self) -> int:
        """The number under which this process owns trials."""
        return NO_OWNER if self.member is None else self.member.number


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundStart:
    """The dense network that a round starts from, its graph, and its plan as seen from the original."""

    model: nn.Module
    graph: ChannelGraph
    plan: PruningPlan


@dataclass(frozen=True, kw_only=True, eq=False)
class RoundContext:
    """What all trials of a round have in common.

    Attributes:
        target_cost: what the result may cost, in the target's metric. A resumed run has measured the
            original's latency anew, so that it may differ from the problem's.
        table: how sensitive the start's groups are; None only in tests and benchmarks that need none.
        seed: of the round.
    """

    problem: Problem
    start: RoundStart
    target_cost: float
    table: SensitivityTable | None
    seed: int
    _scores: dict[str, Scores] = field(default_factory=dict, repr=False)

    def scores(self, criterion: str) -> Scores:
        """Score the start's units by a criterion, once for all trials of the round."""
        if criterion not in self._scores:
            problem = self.problem
            self._scores[criterion] = score(
                self.start.model, self.start.graph, criterion, split=problem.data.train,
                device=problem.device, task=problem.task, seed=self.seed,
            )  # fmt: skip
        return self._scores[criterion]

    def choose_plan(self, prune_rate: float, criterion: str, strategy: str) -> PruningPlan:
        """Return the plan that removes `prune_rate` of the start's cost, or the nearest one to it.

        Raises:
            TrialError: no plan is near it.
        """
        limit, scores = self.cost_limit(prune_rate), self.scores(criterion)
        # Widths come in steps, so that no plan may cost what was asked for; the error names the nearest cost.
        try:
            return self._allocate(scores, limit, strategy)
        except UnreachableError as error:
            nearest = error.nearest_cost
        try:
            return self._allocate(scores, nearest, strategy)
        except UnreachableError as error:
            raise TrialError(error.message, error.hint) from None

    def screen(self, prune_rate: float, choices: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """Return the (criterion, strategy) whose plan scores best at this rate before any fine-tuning.

        Each plan is evaluated on a thousand search samples with batch-norm statistics estimated anew. Where
        the study's own loss or score raises, the first choice is returned, and the trials record what went
        wrong.
        """
        if len(choices) == 1:
            return choices[0]
        problem = self.problem
        try:
            plans = {choice: self.choose_plan(prune_rate, *choice) for choice in choices}
            setup = make_setup(
                self.start.model, self.start.graph, problem.data.search, calibration=problem.data.train,
                device=problem.device, task=problem.task,
            )  # fmt: skip
            best = rank_plans(setup, list(plans.values()))[0].plan
        except RunError:
            raise
        except Exception:  # the user's loss or score may raise anything
            return choices[0]
        return next(choice for choice, plan in plans.items() if plan is best)

    def cost_limit(self, prune_rate: float) -> float:
        """Return what a network pruned by this rate may cost; never less than the target needs."""
        present = self.start.graph.cost().of(self.problem.metric)
        return max(self.target_cost, (1 - prune_rate) * present)

    def cost_of(self, plan: PruningPlan, model: nn.Module) -> float:
        """Return what a trial's network costs.

        A predicted latency gives way to a measured one where the two are further apart than the measurement's
        spread, so that noise decides nothing.
        """
        problem = self.problem
        cost = self.start.graph.cost(plan).of(problem.metric)
        if problem.metric != "latency":
            return cost
        share, spread = measure_latency_share(problem.original, model, problem.example, problem.device)
        measured = share * problem.original_cost
        return measured if abs(measured - cost) > spread * problem.original_cost else cost

    def _allocate(self, scores: Scores, limit: float, strategy: str) -> PruningPlan:
        table = self.table if strategy == "sensitivity" else None
        return allocate(
            self.start.graph, scores, metric=self.problem.metric, limit=limit, strategy=strategy, table=table
        )
