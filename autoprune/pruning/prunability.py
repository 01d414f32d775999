"""Prunability: how far a network can be pruned in one step, and which groups are fragile.

For falling shares of its multiply-adds the network is pruned as a trial would prune it, without
fine-tuning: several criteria make a plan each, and the plan that is best on a part of the samples is
measured on all samples, with batch-norm statistics estimated anew. A share is *safe* where little accuracy
is lost; *marginal* where at least half of the accuracy above guessing is left for a fine-tuning to start
from; *hopeless* below. The borders are guesses that fit ResNet-20 on CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from torch import nn

from autoprune.config import Target
from autoprune.data import Split
from autoprune.errors import UnreachableError
from autoprune.pruning.criteria import score as score_units
from autoprune.pruning.screening import SEARCH, Candidate, IterativeSearch, refine
from autoprune.pruning.sensitivity import SensitivityTable
from autoprune.pruning.variants import VariantSetup
from autoprune.structure import ChannelGraph, densify
from autoprune.training import evaluate, recalibrate_

Region = Literal["safe", "marginal", "hopeless"]
SAFE_PP = 5.0  # top-1 lost without fine-tuning; one epoch brings such a network back. A guess
MARGINAL = 0.5  # of the accuracy above guessing; a guess that fits ResNet-20 on CIFAR-10
COLUMNS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEAR = 0.05  # half the distance of two columns: a column shows the point that is this close to it
FREE_PP, FRAGILE_PP = 1.0, 10.0  # top-1 lost when half of a group goes; guesses
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)  # of the multiply-adds
RECALIBRATE_BATCHES = 10  # of 128: the chosen plan is measured with more care than its rivals; a guess


class MeasuredPoint(Protocol):
    """A measured point of a group, as a sensitivity table or a run's record holds it."""

    @property
    def group(self) -> str:
        """The name of the group."""

    @property
    def ratio(self) -> float:
        """The share of the group's units that is removed."""

    @property
    def drop_pp(self) -> float:
        """The loss of top-1, in percentage points; negative for a gain."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The drop of one group at one ratio, in percentage points, measured or read off the group's curve."""

    drop_pp: float
    is_measured: bool


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """The result of pruning the whole network to a share of its multiply-adds, without fine-tuning.

    Attributes:
        macs_share: the share of the multiply-adds that is left.
        top1: the top-1 on all samples; `low` and `high` are its 95 % interval.
        region: the region of the top-1.
    """

    macs_share: float
    top1: float
    low: float
    high: float
    region: Region


def cells(
    points: Iterable[MeasuredPoint], columns: Sequence[float] = COLUMNS
) -> dict[str, list[Cell | None]]:
    """Return the drops of each group at these ratios, by group name.

    A drop is measured or lies on a rising line between measured points; it is None beyond the last point.
    """
    by_group: dict[str, list[MeasuredPoint]] = {}
    for point in points:
        by_group.setdefault(point.group, []).append(point)
    return {group: [_cell(group_points, c) for c in columns] for group, group_points in by_group.items()}


def _cell(points: list[MeasuredPoint], column: float) -> Cell | None:
    nearest = min(points, key=lambda p: abs(p.ratio - column))
    if abs(nearest.ratio - column) < NEAR:
        return Cell(drop_pp=nearest.drop_pp, is_measured=True)
    drop = drop_at(points, column)
    return None if drop is None else Cell(drop_pp=drop, is_measured=False)


def drop_at(points: Iterable[MeasuredPoint], ratio: float) -> float | None:
    """Return the drop at a ratio, on a rising line through one group's points, or None beyond the last."""
    ordered = sorted(points, key=lambda p: p.ratio)
    if not ordered or ratio > ordered[-1].ratio:
        return None
    rising = np.maximum.accumulate([0.0, *(p.drop_pp for p in ordered)])
    return float(np.interp(ratio, [0.0, *(p.ratio for p in ordered)], rising))


def free_and_fragile(points: Iterable[MeasuredPoint]) -> tuple[list[str], list[str]]:
    """Return the names of the free groups and of the fragile groups.

    Losing half of a free group costs at most 1 percentage point of top-1. A group is fragile if losing half
    of it costs more than 10 points, or if half lies beyond its measured ratios.
    """
    half = {g: row[0] for g, row in cells(points, (0.5,)).items()}
    free = [g for g, c in half.items() if c is not None and c.drop_pp <= FREE_PP]
    fragile = [g for g, c in half.items() if c is None or c.drop_pp > FRAGILE_PP]
    return free, fragile


def region(top1: float, intact: float, num_classes: int) -> Region:
    """Return the region of a score, by its place between the intact network's score and guessing."""
    chance = 1 / max(num_classes, 2)
    if 100 * (intact - top1) <= SAFE_PP:
        return "safe"
    return "marginal" if top1 - chance >= MARGINAL * (intact - chance) else "hopeless"


def prunability_sentence(prospects: Sequence[Prospect]) -> str:
    """Say in one sentence how far this network can be pruned in one step."""
    lowest = {
        r: min((p.macs_share for p in prospects if p.region == r), default=None) for r in ("safe", "marginal")
    }
    safe, marginal = lowest["safe"], lowest["marginal"]
    parts = []
    if safe is not None:
        parts.append(f"safe down to {safe:.0%} of the MACs")
    if marginal is not None:
        parts.append(f"marginal down to {marginal:.0%}, where fine-tuning has to bring it back")
    if not parts:
        return "Even a little pruning breaks this network without fine-tuning: prune in small rounds."
    end = (
        "below that hopeless in one step"
        if any(p.region == "hopeless" for p in prospects)
        else "not tried further"
    )
    return f"In one step this network is {'; '.join(parts)}; {end}.".replace("%", " %")


def one_shot_prospects(
    setup: VariantSetup,
    split: Split,
    *,
    table: SensitivityTable,
    num_classes: int,
    tries: int = 0,
    retrace: Callable[[nn.Module], ChannelGraph] | None = None,
) -> tuple[Prospect, ...]:
    """Prune a network to ever smaller shares of its multiply-adds, and measure each pruned network.

    The first hopeless share ends the series; shares that no plan reaches are left out. The model is left
    unchanged.

    Args:
        setup: the network, and the samples on which plans are compared.
        split: all samples, on which the chosen plan of every share is measured.
        table: the sensitivity table of the network.
        num_classes: the number of classes of the data; 0 where the targets are no classes.
        tries: 0 compares one plan for each criterion. Above 0, better plans are searched for in steps, with
            that many varied plans at every share: ten times slower and more (figures: docs/analysis.md).
        retrace: returns the graph of a pruned network, under the bounds of the setup's graph; needed with
            `tries`.
    """
    model, graph, device, calibration = setup.model, setup.graph, setup.device, setup.calibration
    assert calibration is not None, "a pruned network needs its statistics estimated anew"
    choose = _searching(setup, table, tries, retrace) if tries and retrace else _comparing(setup, table)
    full_macs, prospects = graph.cost().macs, list[Prospect]()
    for share in SHARES:
        try:
            plan = choose(share * full_macs).plan
        except UnreachableError:
            continue
        pruned = densify(model, graph, plan)
        recalibrate_(pruned, calibration, num_batches=RECALIBRATE_BATCHES, device=device)
        after = evaluate(pruned, split, device=device, task=setup.task)
        prospects.append(
            Prospect(
                macs_share=graph.cost(plan).macs / full_macs, top1=after.top1, low=after.interval.low,
                high=after.interval.high, region=region(after.top1, table.baseline.top1, num_classes),
            )
        )  # fmt: skip
        if prospects[-1].region == "hopeless":
            break
    return tuple(prospects)


def _comparing(setup: VariantSetup, table: SensitivityTable) -> Callable[[float], Candidate]:
    """Return a function from a cost to the best of one plan for each criterion."""
    settings = replace(SEARCH, strategies=("sensitivity",), tries=0)
    rankings = {
        c: score_units(
            setup.model, setup.graph, c, split=setup.calibration, device=setup.device, task=setup.task
        )
        for c in settings.criteria
    }
    return lambda limit: refine(
        setup, rankings, Target(metric="macs", value=limit, relative=False), table=table, settings=settings
    )


def _searching(
    setup: VariantSetup, table: SensitivityTable, tries: int, retrace: Callable[[nn.Module], ChannelGraph]
) -> Callable[[float], Candidate]:
    """Return a function from a cost to the best plan that an iterative search finds."""
    return IterativeSearch(setup, retrace, table=table, settings=replace(SEARCH, tries=tries)).at
