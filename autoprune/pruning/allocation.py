"""Allocation: how many units each group keeps, and which units, so that the network has a requested cost.

Every group has a *ladder* of counts that it may keep. A strategy gives each step down a price. The steps in
the order of their price are a path from the whole network to the smallest, and the shortest stretch of the
path that meets the limit is the plan (a search over whole steps, so it cannot stall between two equal
plans). The excess of the last step is given back where it is worth most.

`uniform` removes the same ratio everywhere. `global` puts one threshold on the scores of all groups.
`isomorphic` puts one threshold on the scores of groups that are coupled alike, so that each such kind loses
the same share (Fang et al. 2024, "Isomorphic Pruning for Vision Models", section 3.2). `sensitivity` pays
the least predicted loss per unit of cost saved. Costs are the graph's own.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from autoprune.config import METRICS, Metric
from autoprune.errors import UnreachableError, UsageError
from autoprune.plan import PruningPlan
from autoprune.pruning.criteria import Scores
from autoprune.pruning.sensitivity import SensitivityTable
from autoprune.structure import ChannelGraph, Group

Strategy = Literal["uniform", "global", "isomorphic", "sensitivity"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
Counts = NDArray[np.int64]
Prices = NDArray[np.float64]

TOLERANCE = 0.01  # of the whole network's cost, from below; the promise of README's `--target`
NUM_WAYPOINTS = 24  # costs at which `sensitivity` computes anew the saving of a unit of each group; a guess
PRIOR = 0.05  # of the typical loss, times the squared ratio: decides where no loss was measured; a guess
LEAST = 1e-9  # of the whole cost: the assumed saving of a step that saves nothing, or less (latency)
MAX_EXCHANGE = 3  # further steps of one group tried to come closer to the limit; a guess


def allocate(  # noqa: PLR0913 - a plan has that many conditions
    graph: ChannelGraph, scores: Scores, *, metric: Metric, limit: float, strategy: str = "sensitivity",
    table: SensitivityTable | None = None, emphasis: Mapping[str, float] | None = None,
) -> PruningPlan:  # fmt: skip
    """Return the plan that costs at most `limit`, and at most 1 % of the network's cost less.

    Args:
        graph: the graph of the network; each group keeps one of its `allowed_counts`.
        scores: the score of every unit, by group; the units with the lowest scores go first.
        metric: the metric of `limit`; latency needs a graph `with_latency_model`.
        limit: the highest cost allowed, absolute, in the unit of the metric.
        strategy: one of `STRATEGIES`.
        table: the sensitivities measured on this graph; needed by `sensitivity` only.
        emphasis: factors, each above 0, on the price of removing units, by group; 1 for groups without one.

    Raises:
        UnreachableError: no plan is that close to the limit; the error names the nearest cost.
        UsageError: the metric or the strategy is not known, or the table or a latency model is missing.
    """
    _check(graph, metric, strategy, table)
    problem = _Problem(graph=graph, scores=scores, metric=metric)
    steps = np.zeros(len(graph.groups), dtype=np.int64)
    if problem.cost(steps) <= limit:
        return PruningPlan.full(graph)
    if problem.cost(problem.num_steps) > limit:
        raise _unreachable(problem, limit, problem.cost(problem.num_steps))
    factors = [(emphasis or {}).get(g.name, 1.0) for g in graph.groups]
    prices = [p * f for p, f in zip(_prices(problem, strategy, table), factors, strict=True)]
    for waypoint in _waypoints(problem, limit) if strategy == "sensitivity" else [limit]:
        savings = problem.savings(steps) if strategy == "sensitivity" else np.ones(len(steps))
        priced = [p / s for p, s in zip(prices, savings, strict=True)]
        steps = _descend(problem, priced, steps, waypoint)
    steps = _close_in(problem, priced, steps, limit)
    if limit - problem.cost(steps) > TOLERANCE * problem.full_cost:
        raise _unreachable(problem, limit, problem.cost(steps))
    return problem.plan(steps)


def _check(graph: ChannelGraph, metric: str, strategy: str, table: SensitivityTable | None) -> None:
    if metric not in METRICS:
        raise UsageError(f"cannot allocate for {metric!r}", f"choose from {', '.join(METRICS)}")
    if metric == "latency" and graph.latency is None:
        raise UsageError(
            "the graph knows no latency", "give it one with autoprune.structure.with_latency_model"
        )
    if strategy not in STRATEGIES:
        raise UsageError(f"there is no strategy {strategy!r}", f"choose from {', '.join(STRATEGIES)}")
    if strategy == "sensitivity" and table is None:
        raise UsageError("strategy sensitivity needs a table", "measure one with autoprune.sensitivity first")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """The ladders of all groups and the costs of their steps; step 0 keeps all units."""

    graph: ChannelGraph
    scores: Scores
    metric: Metric

    @cached_property
    def ladders(self) -> list[Counts]:
        return [g.allowed_counts for g in self.graph.groups]

    @cached_property
    def num_steps(self) -> Counts:
        return np.array([len(ladder) - 1 for ladder in self.ladders], dtype=np.int64)

    @cached_property
    def full_cost(self) -> float:
        return self.cost(np.zeros(len(self.ladders), dtype=np.int64))

    def cost(self, steps: Counts) -> float:
        """Return the cost of the network with each group `steps` (num_groups,) down its ladder."""
        names = (g.name for g in self.graph.groups)
        counts = {n: int(x[s]) for n, x, s in zip(names, self.ladders, steps, strict=True)}
        return self.graph.cost_of_counts(counts).of(self.metric)

    def savings(self, steps: Counts) -> Prices:
        """Return the cost that one more removed unit of each group saves, (num_groups,), above 0."""
        present_cost = self.cost(steps)
        savings = np.ones(len(steps))
        for index, ladder in enumerate(self.ladders):
            if steps[index] < self.num_steps[index]:
                further = steps.copy()
                further[index] += 1
                units = ladder[steps[index]] - ladder[steps[index] + 1]
                savings[index] = max(present_cost - self.cost(further), LEAST * self.full_cost) / units
        return savings

    def order(self, index: int) -> Counts:
        """Return the positions of a group's units, the least important unit first, (num_units,)."""
        return np.argsort(self.scores[self.graph.groups[index].name], kind="stable")

    def plan(self, steps: Counts) -> PruningPlan:
        """Return the plan that keeps the most important units of each group, `steps` down its ladder."""
        keep = {
            group.name: np.sort(self.order(i)[group.num_units - ladder[s] :])
            for i, (group, ladder, s) in enumerate(zip(self.graph.groups, self.ladders, steps, strict=True))
        }
        return PruningPlan(keep=keep, num_units={g.name: g.num_units for g in self.graph.groups})


def _prices(problem: _Problem, strategy: str, table: SensitivityTable | None) -> list[Prices]:
    """Return the price of each step of each ladder, rising down it; for `sensitivity`, per removed unit."""
    if strategy == "sensitivity":
        assert table is not None  # _check saw to it
        return _loss_prices(problem, table)
    if strategy == "uniform":
        return [1 - ladder[1:] / ladder[0] for ladder in problem.ladders]
    prices = [_score_prices(problem, index) for index in range(len(problem.ladders))]
    return _ranks(problem, prices) if strategy == "isomorphic" else prices


def _score_prices(problem: _Problem, index: int) -> Prices:
    """Return the mean score of the units that each step of a group's ladder removes."""
    group, ladder = problem.graph.groups[index], problem.ladders[index]
    total = np.concatenate([[0.0], np.cumsum(problem.scores[group.name][problem.order(index)])])
    removed = group.num_units - ladder
    return np.asarray(np.diff(total[removed]) / np.diff(removed), dtype=np.float64)


def _ranks(problem: _Problem, prices: list[Prices]) -> list[Prices]:
    """Replace each price by the share of units that are no dearer, among groups that are coupled alike."""
    kinds: dict[Hashable, list[int]] = {}
    for index, group in enumerate(problem.graph.groups):
        kinds.setdefault(_coupling(group), []).append(index)
    ranks = list(prices)
    for members in kinds.values():
        all_prices = np.concatenate([prices[i] for i in members])
        units = np.concatenate([-np.diff(problem.ladders[i]) for i in members])
        order = np.argsort(all_prices, kind="stable")
        share = np.empty(len(order))
        share[order] = np.cumsum(units[order]) / sum(problem.graph.groups[i].num_units for i in members)
        ends = np.cumsum([len(prices[i]) for i in members])
        for i, group_ranks in zip(members, np.split(share, ends[:-1]), strict=True):
            ranks[i] = group_ranks
    return ranks


def _coupling(group: Group) -> Hashable:
    """Return a key of a group's coupled members without its width; structurally equal groups share it."""
    return tuple(sorted((m.role, m.dim, m.name.rpartition(".")[2], m.index.shape[1]) for m in group.members))


def _loss_prices(problem: _Problem, table: SensitivityTable) -> list[Prices]:
    """Return the predicted loss per removed unit, made to rise: a dear step joins cheap steps behind it."""
    groups = [(g, x) for g, x in zip(problem.graph.groups, problem.ladders, strict=True) if len(x) > 1]
    typical = float(np.median([table.loss_at(g.name, 0.5) for g, _ in groups])) if groups else 0.0
    prices = []
    for group, ladder in zip(problem.graph.groups, problem.ladders, strict=True):
        removed = group.num_units - ladder
        ratio = removed / group.num_units
        loss = np.zeros(1) if len(ladder) == 1 else table.loss_at(group.name, ratio)
        predicted = loss + PRIOR * max(typical, 1e-6) * ratio**2
        units = np.diff(removed)
        prices.append(rising(np.diff(predicted) / units, units.astype(np.float64)))
    return prices


def _waypoints(problem: _Problem, limit: float) -> Iterator[float]:
    """Give the costs on the way down; all limits share them, so plans for lower limits go on from here."""
    for waypoint in problem.full_cost * (1 - np.arange(1, NUM_WAYPOINTS) / NUM_WAYPOINTS):
        if waypoint <= limit:
            break
        yield float(waypoint)
    yield limit


def _descend(problem: _Problem, priced: list[Prices], steps: Counts, limit: float) -> Counts:
    """Descend by the cheapest step first until the cost meets the limit, and return the steps."""
    ahead = [np.full(problem.num_steps[i] - s, i) for i, s in enumerate(steps)]
    groups = np.concatenate(ahead).astype(np.int64)
    prices = np.concatenate([p[s:] for p, s in zip(priced, steps, strict=True)])
    path = groups[np.argsort(prices, kind="stable")]

    def after(length: int) -> Counts:
        return steps + np.bincount(path[:length], minlength=len(steps))

    low, high = 0, len(path)  # the whole path meets the limit, by the check in `allocate`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.cost(after(middle)) <= limit else (middle + 1, high)
    return after(low)


def _close_in(problem: _Problem, priced: list[Prices], steps: Counts, limit: float) -> Counts:
    """Undo the steps that fit the limit; far below it, remove more of one group and undo steps again."""
    best = _give_back(problem, priced, steps, limit)
    cost, enough = problem.cost(best), limit - TOLERANCE * problem.full_cost
    for further in range(1, MAX_EXCHANGE + 1):
        for index in np.flatnonzero(steps + further <= problem.num_steps):
            if cost >= enough:
                return best
            moved = steps.copy()
            moved[index] += further
            moved = _give_back(problem, priced, moved, limit, spared=int(index))
            if problem.cost(moved) > cost:
                best, cost = moved, problem.cost(moved)
    return best


def _give_back(
    problem: _Problem, priced: list[Prices], steps: Counts, limit: float, spared: int | None = None
) -> Counts:
    """Undo steps while the limit allows, the dearest first; a group whose step does not fit is left."""
    steps = steps.copy()
    heap = [(-priced[i][s - 1], i) for i, s in enumerate(steps) if s > 0 and i != spared]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        steps[index] -= 1
        if problem.cost(steps) > limit:
            steps[index] += 1
        elif steps[index] > 0:
            heapq.heappush(heap, (-priced[index][steps[index] - 1], index))
    return steps


def rising(values: Prices, weights: Prices) -> Prices:
    """Return the rising sequence (n,) that is nearest in weighted squares (pool adjacent violators).

    Ayer et al. 1955, "An empirical distribution function for sampling with incomplete information".
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, heavy, length = blocks.pop()
            total = heavy + block[1]
            block = ((mean * heavy + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    means, lengths = [b[0] for b in blocks], [b[2] for b in blocks]
    return np.repeat(np.asarray(means, dtype=np.float64), lengths)


def _unreachable(problem: _Problem, limit: float, nearest: float) -> UnreachableError:
    share, nearest_text = (
        nearest / problem.full_cost,
        nearest if isinstance(nearest, int) else f"{nearest:.4g}",
    )
    return UnreachableError(
        f"no plan costs {problem.metric} of {limit:.6g} to within 1 %; the nearest that can be had is "
        f"{nearest_text} ({share:.1%} of the present)",
        f"ask for {problem.metric} of {nearest_text}, lower round_to or min_keep, or exclude fewer layers",
        nearest_cost=float(nearest),
    )
