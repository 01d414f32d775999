"""Sensitivity: how much accuracy goes when one group alone is pruned by a ratio.

Each probe is the network with one group shrunk, its batch-norm statistics estimated anew where a calibration
split is given, measured on the search split against the intact network on the same samples (`probing`). Which
ratios are measured is found by bisection. A probe also says whether it changed the forward pass at all: one
that did not measured nothing.

The table answers `loss_at(group, ratio)`: the measured loss increases, made to rise with the ratio (a gain
counts as no loss, never as a loss) and joined by a monotone cubic (Fritsch & Carlson 1980).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import nn

from autoprune.data import Split
from autoprune.errors import ArtifactError, UsageError
from autoprune.metrics import Evaluation, difference_pp
from autoprune.plan import PruningPlan
from autoprune.pruning.criteria import Scores
from autoprune.pruning.criteria import score as score_units
from autoprune.pruning.variants import VariantResult, VariantSetup, choose_evaluator, miscounted
from autoprune.structure import ChannelGraph
from autoprune.tasks import CLASSIFICATION, Task

MIN_SHARE = 0.5
RECALIBRATE_BATCHES, RECALIBRATE_BATCH = 4, 128  # measured: 10 choose no better (docs/analysis.md)
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FIRST = 0.4  # where a curve is measured first, as a share of its ratios
MIN_POINTS, MAX_POINTS = 2, 3  # per group; measured: nine choose no better (docs/analysis.md)
WORTH = 4.0  # rise of the drop in pp times the ratio that lies between, for a third point
COLLAPSE_PP = 20.0
# Slope beyond the last ratio measured over the slope to there: networks break, they do not bend. Measured on
# ResNet-20/CIFAR-10 at half the MACs without fine-tuning: loss 1.47 with 1; 1.40 with 2, 4 and 8.
BEYOND = 2.0


@dataclass(frozen=True, kw_only=True)
class SensitivityPoint:
    """One group alone, pruned by `ratio`.

    Attributes:
        ratio: share of the units removed, as it came out in whole units.
        top1, loss: of the pruned network on the search split.
        drop_pp: top-1 lost against the intact network, in percentage points; negative is a gain.
        low_pp, high_pp: its 95 % interval, from the paired samples.
        num_samples: how many samples were looked at.
        macs_share_removed: share of the network's multiply-adds that goes with these units.
        changed: whether the output changed; False means that the probe measured nothing.
    """

    group: str
    ratio: float
    top1: float
    loss: float
    drop_pp: float
    low_pp: float
    high_pp: float
    num_samples: int
    macs_share_removed: float
    changed: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class SensitivityTable:
    """All probes, and the intact network on the same samples.

    Attributes:
        method: `partial` or `whole` (see `variants`); `reason` says why not the first.
        seconds: that the measurement took.
        miscounted: groups whose pruned network does not cost what was predicted.
        of: digest of the network and the data that were measured; empty where nobody noted it.
    """

    points: tuple[SensitivityPoint, ...]
    baseline: Evaluation
    method: str = "whole"
    reason: str = ""
    seconds: float = 0.0
    miscounted: tuple[str, ...] = ()
    of: str = ""

    @overload
    def loss_at(self, group: str, ratio: float) -> float: ...
    @overload
    def loss_at(self, group: str, ratio: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def loss_at(self, group: str, ratio: float | NDArray[np.float64]) -> float | NDArray[np.float64]:
        """Predicted increase of the loss, rising in the ratio, 0 at 0; (n,) for ratios (n,).

        Where there is no loss (a study's own score without a loss), the drop of the score instead.
        Beyond the last ratio measured it rises more steeply than it did to there.

        Raises:
            UsageError: the group was not measured.
        """
        curve = self._curves.get(group)
        if curve is None:
            raise UsageError(
                f"the sensitivity table has no group {group!r}", "measure the graph that is to be pruned"
            )
        found = curve.at(np.atleast_1d(np.asarray(ratio, dtype=np.float64)))
        return found if isinstance(ratio, np.ndarray) else float(found[0])

    @cached_property
    def _curves(self) -> dict[str, _Curve]:
        measured: dict[str, dict[float, float]] = {}
        has_loss = math.isfinite(self.baseline.loss)
        for point in self.points:
            rise = point.loss - self.baseline.loss if has_loss else point.drop_pp / 100
            measured.setdefault(point.group, {})[point.ratio] = rise
        return {group: _Curve.through(found) for group, found in measured.items()}

    def to_frame(self) -> pd.DataFrame:
        """One row a point."""
        return pd.DataFrame(
            [asdict(p) for p in self.points], columns=[f.name for f in fields(SensitivityPoint)]
        )

    def to_json(self) -> str:
        """A text form that `from_json` reads; numbers that are none become null."""
        baseline = {k: _plain(getattr(self.baseline, k)) for k in ("top1", "loss", "num_samples")}
        points = [point_values(p) for p in self.points]
        about = {n: getattr(self, n) for n in ("method", "reason", "seconds", "miscounted", "of")}
        return json.dumps({"autoprune_sensitivity": 1, "baseline": baseline, "points": points} | about)

    @classmethod
    def from_json(cls, text: str) -> SensitivityTable:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: the text is no sensitivity table of a known version.
        """
        try:
            document = json.loads(text)
            if document["autoprune_sensitivity"] != 1:
                raise ValueError
            points = [point_from_values(p) for p in document["points"]]
            about = {n: document[n] for n in ("method", "reason", "seconds", "of") if n in document}
            about["miscounted"] = tuple(document.get("miscounted", ()))
            return cls(points=tuple(points), baseline=Evaluation(**_number(document["baseline"])), **about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                "the text is not a sensitivity table of version 1", "measure again"
            ) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class _Curve:
    """A rising curve through (0, 0), straight beyond its last point."""

    ratios: NDArray[np.float64]
    losses: NDArray[np.float64]

    @classmethod
    def through(cls, measured: dict[float, float]) -> _Curve:
        ratios = np.array([0.0, *sorted(measured)])
        found = np.array([0.0, *(measured[r] for r in sorted(measured))])
        worst = float(found[np.isfinite(found)].max()) + 1.0  # a network that gives no number is broken
        finite = np.nan_to_num(found, nan=worst, posinf=worst)
        return cls(ratios=ratios, losses=np.maximum.accumulate(np.maximum(finite, 0.0)))

    def at(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        last = self.ratios[-1]
        slope = BEYOND * (self.losses[-1] - self.losses[-2]) / (last - self.ratios[-2])
        inside = PchipInterpolator(self.ratios, self.losses)(np.minimum(ratios, last))
        return np.asarray(inside + slope * np.maximum(ratios - last, 0.0), dtype=np.float64)


def sensitivity(  # noqa: PLR0913 - one whole stage: each argument is a decision of its caller
    model: nn.Module, graph: ChannelGraph, split: Split, *, ratios: Sequence[float] = TENTHS,
    share: float = 1.0, criterion: str = "l2", calibration: Split | None = None,
    device: torch.device | str = "cpu", task: Task = CLASSIFICATION,
    on_point: Callable[[SensitivityPoint], None] | None = None, exact: bool = False,
    collapse_pp: float = COLLAPSE_PP, known: SensitivityTable | None = None, seconds: float = math.inf,
) -> SensitivityTable:  # fmt: skip
    """Measure how much accuracy each group alone is worth.

    Of a group's `ratios` two or three are measured, found by bisection, each on all samples; the curve
    between them is interpolated. Cost: about a tenth of evaluating the network once per group and ratio;
    see docs/analysis.md.

    Args:
        model: the network that `graph` was traced from; left as it was found.
        graph: its groups.
        split: the search split.
        ratios: shares of a group's units removed, each in (0, 1).
        share: of the split that is looked at, at least half.
        criterion: which units go first.
        calibration: training data that estimate the batch-norm statistics of each probe anew, and feed a
            criterion that wants data; None leaves the statistics alone.
        device: where to run.
        task: what is measured.
        on_point: told of every point as it is measured.
        exact: measure every ratio, by the network's own arithmetic: the result is that of masking each group
            and evaluating the whole network, to the sample.
        collapse_pp: drop of top-1, in percentage points, beyond which a curve is not followed.
        known: points that this very network was measured at before, to go on from; where they are all that
            is wanted and their table has a baseline, nothing is measured.
        seconds: that it shall take: once each group has a point, further ones are measured only within them.

    Raises:
        UsageError: the share is less than half, a ratio is no ratio, or `known` is of something else.
    """
    _check(ratios, share)
    began = time.perf_counter()
    setup = VariantSetup(
        model=model, graph=graph, split=split.subset(share, seed=0), calibration=calibration,
        device=torch.device(device), num_batches=RECALIBRATE_BATCHES, batch_size=RECALIBRATE_BATCH,
        task=task, exact=exact,
    )  # fmt: skip
    of = fingerprint(setup, criterion)
    if known is not None and known.of not in ("", of):
        raise UsageError(
            "the known sensitivities are those of another network, or of other data", "measure them anew"
        )
    survey = _Survey(
        graph=graph, ladders=ratio_counts(graph, ratios), collapse_pp=None if exact else collapse_pp,
        scores=score_units(model, graph, criterion, split=calibration, device=device, task=task),
        points={} if known is None else {(p.group, p.ratio): p for p in known.points},
    )  # fmt: skip
    wave = survey.next_wave()
    if not wave and known is not None and math.isfinite(known.baseline.top1):
        return replace(known, points=survey.table_points())
    (probe, reason), wave_s = choose_evaluator(setup), 0.0
    while wave and (not survey.has_all() or time.perf_counter() - began + wave_s <= seconds):
        wave_began, plans = time.perf_counter(), [survey.plan(p) for p in wave]
        for planned, found in zip(wave, probe.measure(plans), strict=True):
            point = survey.add(planned, found, probe.baseline)
            if on_point is not None:
                on_point(point)
        wave, wave_s = survey.next_wave(), time.perf_counter() - wave_began
    return SensitivityTable(
        points=survey.table_points(), baseline=probe.baseline, reason=reason,
        method="whole" if reason else "partial", miscounted=miscounted(setup, survey.furthest()),
        seconds=time.perf_counter() - began, of=of,
    )  # fmt: skip


def fingerprint(setup: VariantSetup, criterion: str) -> str:
    """SHA-256 of what a point depends on but its group and ratio: weights, samples, how it is measured."""
    splits = [s.digest() for s in (setup.split, setup.calibration) if s is not None]
    found = hashlib.sha256(" ".join((*splits, criterion, str(setup.exact))).encode())
    for name, tensor in setup.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A group and how many of its units a probe removes."""

    group: str
    num_removed: int


def max_num_points(graph: ChannelGraph, ratios: Sequence[float], *, exact: bool = False) -> int:
    """How many points `sensitivity` measures at most."""
    ladders = ratio_counts(graph, ratios).values()
    return sum(len(counts) if exact else min(MAX_POINTS, len(counts)) for counts in ladders)


def ratio_counts(graph: ChannelGraph, ratios: Sequence[float]) -> dict[str, list[int]]:
    """Per group the numbers of removed units that these ratios mean."""
    ladders = {}
    for group in graph.groups:
        most = group.num_units - group.min_keep
        counts = {min(most, max(1, round(r * group.num_units))) for r in ratios}
        ladders[group.name] = sorted(n for n in counts if n > 0)
    return ladders


def next_counts(counts: Sequence[int], drops: Mapping[int, float], collapse_pp: float | None) -> list[int]:
    """What to measure next of one group: the middle of the interval in which its curve says least.

    Args:
        counts: numbers of removed units, rising.
        drops: those measured, and their drop.
        collapse_pp: a drop beyond it is no better known by measuring it. None measures all counts; so do
            three of them or fewer.
    """
    if collapse_pp is None or len(counts) <= MAX_POINTS:
        return [n for n in counts if n not in drops]
    if not drops or len(drops) >= MAX_POINTS:
        return [] if drops else [counts[int(FIRST * len(counts))]]
    known = [i for i, n in enumerate(counts) if n in drops]
    lost = [drops[counts[i]] if drops[counts[i]] <= collapse_pp else collapse_pp for i in known]
    places, heights = [-1, *known, len(counts)], np.maximum.accumulate([0.0, *lost, collapse_pp])
    gaps = [
        ((heights[k + 1] - heights[k]) * (high - low) / (len(counts) + 1), low, high)
        for k, (low, high) in enumerate(pairwise(places))
        if high - low > 1 and (len(known) < MIN_POINTS or high < len(counts))
    ]
    area, low, high = max(gaps, default=(0.0, 0, 0))
    worth = area > 0 if len(known) < MIN_POINTS else area >= WORTH
    return [counts[(low + high) // 2]] if worth else []


@dataclass(frozen=True, kw_only=True, eq=False)
class _Survey:
    """What one table will hold, and what it holds already."""

    graph: ChannelGraph
    ladders: dict[str, list[int]]
    collapse_pp: float | None
    scores: Scores
    points: dict[tuple[str, float], SensitivityPoint]

    def next_wave(self) -> list[PlannedPoint]:
        """What can be measured in one pass: for each group what its curve says is next."""
        wave = []
        for group in self.graph.groups:
            counts, width = self.ladders[group.name], group.num_units
            found = {n: self.points.get((group.name, n / width)) for n in counts}
            drops = {n: p.drop_pp for n, p in found.items() if p is not None}
            following = next_counts(counts, drops, self.collapse_pp)
            wave += [PlannedPoint(group=group.name, num_removed=n) for n in following]
        return wave

    def has_all(self) -> bool:
        """Whether each group that can be pruned has a point."""
        return {name for name, counts in self.ladders.items() if counts} <= {name for name, _ in self.points}

    def plan(self, planned: PlannedPoint) -> PruningPlan:
        width = self.graph.group(planned.group).num_units
        kept = np.sort(np.argsort(self.scores[planned.group], kind="stable")[planned.num_removed :])
        return PruningPlan(keep={planned.group: kept}, num_units={planned.group: width})

    def add(self, planned: PlannedPoint, found: VariantResult, baseline: Evaluation) -> SensitivityPoint:
        width = self.graph.group(planned.group).num_units
        left = self.graph.cost_of_counts({planned.group: width - planned.num_removed}).macs
        gain_pp, interval = difference_pp(found.evaluation, baseline)
        point = SensitivityPoint(
            group=planned.group, ratio=planned.num_removed / width, top1=found.evaluation.top1,
            loss=found.evaluation.loss, drop_pp=-gain_pp, low_pp=-interval.high, high_pp=-interval.low,
            num_samples=found.evaluation.num_samples,
            macs_share_removed=1 - left / self.graph.cost().macs, changed=found.changed,
        )  # fmt: skip
        self.points[point.group, point.ratio] = point
        return point

    def furthest(self) -> list[PruningPlan]:
        """For each group the plan of its last point."""
        return [
            self.plan(
                PlannedPoint(
                    group=name, num_removed=max(n for n in counts if (name, n / width) in self.points)
                )
            )
            for name, counts in self.ladders.items()
            for width in [self.graph.group(name).num_units]
            if any((name, n / width) in self.points for n in counts)
        ]

    def table_points(self) -> tuple[SensitivityPoint, ...]:
        """By group, in the graph's order, and ratio."""
        names = [g.name for g in self.graph.groups]
        mine = (p for p in self.points.values() if p.group in self.ladders)
        return tuple(sorted(mine, key=lambda p: (names.index(p.group), p.ratio)))


def _check(ratios: Sequence[float], share: float) -> None:
    if not MIN_SHARE <= share <= 1:
        raise UsageError(
            f"sensitivity on a share of {share:g} of the search split is not allowed",
            "take at least half of it (0.5), better all: less says too little about the layers",
        )
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise UsageError(f"ratios={tuple(ratios)} is not allowed", "give one or more ratios between 0 and 1")


def point_values(point: SensitivityPoint) -> dict[str, Any]:
    """A point as plain values; numbers that are none become null."""
    return {k: _plain(v) for k, v in asdict(point).items()}


def point_from_values(values: dict[str, Any]) -> SensitivityPoint:
    """The point of these values."""
    return SensitivityPoint(**_number(values))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(values: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in values.items()}
