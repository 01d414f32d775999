"""Sensitivity: the accuracy that is lost when one group alone is pruned by a ratio.

Each probe is the network with one group shrunk, and with batch-norm statistics estimated anew where a
calibration split is given. It is measured on the search split against the intact network on the same
samples (`variants`). Bisection chooses the ratios that are measured. A probe also says whether it changed
the forward pass at all: a probe that changed nothing measured nothing.

`SensitivityTable.loss_at` predicts the loss of a group at any ratio: the measured loss increases are made
to rise with the ratio (a gain counts as no loss, never as a loss) and are joined by a monotone cubic
(Fritsch and Carlson 1980).
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

from autoprune.config import Analysis
from autoprune.data import Split
from autoprune.errors import ArtifactError, UsageError
from autoprune.metrics import Evaluation, difference_pp
from autoprune.plan import PruningPlan
from autoprune.pruning.criteria import Scores
from autoprune.pruning.criteria import score as score_units
from autoprune.pruning.variants import VariantResult, VariantSetup, choose_evaluator, miscounted
from autoprune.structure import ChannelGraph
from autoprune.tasks import CLASSIFICATION, Task

MIN_SHARE = 0.5  # of the search split; config.Analysis.share has the same bound
RECALIBRATE_BATCHES, RECALIBRATE_BATCH = 4, 128  # measured: 10 choose no better (docs/analysis.md)
ANALYSIS = Analysis()
CRITERION = "l2"  # of the units that go first; in a group alone other criteria order much alike: a guess


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """The rule that chooses which ratios of a group are measured.

    Attributes:
        first: the position of a curve's first measurement, as a share of its ratios; a guess.
        min_points, max_points: the numbers of points per group; measured: nine choose no better
            (docs/analysis.md).
        worth: the least area that is worth a third point: the rise of the drop in percentage points times
            the share of the ratios between the point's neighbours; measured: docs/analysis.md.
        collapse_pp: the drop of top-1, in percentage points, beyond which a curve is not followed: such a
            network is broken, whatever the figure. A guess.
    """

    first: float = 0.4
    min_points: int = 2
    max_points: int = 3
    worth: float = 4.0
    collapse_pp: float = 20.0


BISECTION = Bisection()
# Slope beyond the last ratio measured over the slope to there: networks break, they do not bend. Measured on
# ResNet-20/CIFAR-10 at half the MACs without fine-tuning: loss 1.47 with 1; 1.40 with 2, 4 and 8.
BEYOND = 2.0


@dataclass(frozen=True, kw_only=True)
class SensitivityPoint:
    """The measurement of a network in which one group alone is pruned by `ratio`.

    Attributes:
        group: the name of the group.
        ratio: the share of the group's units that is removed, rounded to whole units.
        top1, loss: the top-1 and the mean loss of the pruned network on the search split.
        drop_pp: the loss of top-1 against the intact network, in percentage points; negative for a gain.
        low_pp, high_pp: the 95 % interval of `drop_pp`, from the paired samples.
        num_samples: the number of samples that were evaluated.
        macs_share_removed: the share of the network's multiply-adds that goes with these units.
        changed: whether the output changed; False means that the point says nothing.
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
    """All measured points of a network, and the intact network on the same samples.

    Attributes:
        points: the measured points.
        baseline: the result of the intact network.
        method: `partial` or `whole` (see `variants`).
        reason: why the method is not `partial`; empty where it is.
        seconds: the time that the measurement took.
        miscounted: the groups whose pruned network does not have the predicted cost.
        of: the digest of the network and the data that were measured; empty in tables stored without it.
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
        """Return the predicted increase of the loss: 0 at ratio 0, never falling; (n,) for ratios (n,).

        Where there is no loss (a study's own score without a loss), the result is the drop of the score.
        Beyond the last measured ratio the curve rises more steeply than before that ratio (see `BEYOND`).

        Raises:
            UsageError: the group was not measured.
        """
        curve = self._curves.get(group)
        if curve is None:
            raise UsageError(
                f"the sensitivity table has no group {group!r}", "measure the graph that is to be pruned"
            )
        losses = curve.at(np.atleast_1d(np.asarray(ratio, dtype=np.float64)))
        return losses if isinstance(ratio, np.ndarray) else float(losses[0])

    @cached_property
    def _curves(self) -> dict[str, _Curve]:
        measured: dict[str, dict[float, float]] = {}
        has_loss = math.isfinite(self.baseline.loss)
        for point in self.points:
            rise = point.loss - self.baseline.loss if has_loss else point.drop_pp / 100
            measured.setdefault(point.group, {})[point.ratio] = rise
        return {group: _Curve.through(rises) for group, rises in measured.items()}

    def to_frame(self) -> pd.DataFrame:
        """Return the points as a data frame, one row for each point."""
        return pd.DataFrame(
            [asdict(p) for p in self.points], columns=[f.name for f in fields(SensitivityPoint)]
        )

    def to_json(self) -> str:
        """Return the table as JSON, which `from_json` reads; numbers that are not finite become null."""
        baseline = {k: _plain(getattr(self.baseline, k)) for k in ("top1", "loss", "num_samples")}
        points = [point_values(p) for p in self.points]
        metadata = {n: getattr(self, n) for n in ("method", "reason", "seconds", "miscounted", "of")}
        return json.dumps({"autoprune_sensitivity": 1, "baseline": baseline, "points": points} | metadata)

    @classmethod
    def from_json(cls, text: str) -> SensitivityTable:
        """Return the table that `to_json` wrote as this text.

        Raises:
            ArtifactError: the text is no sensitivity table of a known version.
        """
        try:
            document = json.loads(text)
            if document["autoprune_sensitivity"] != 1:
                raise ValueError
            points = [point_from_values(p) for p in document["points"]]
            metadata = {n: document[n] for n in ("method", "reason", "seconds", "of") if n in document}
            metadata["miscounted"] = tuple(document.get("miscounted", ()))
            return cls(points=tuple(points), baseline=Evaluation(**_number(document["baseline"])), **metadata)
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
        rises = np.array([0.0, *(measured[r] for r in sorted(measured))])
        # A network whose loss is no number is broken: it counts as worse than all that were measured.
        worst = float(rises[np.isfinite(rises)].max()) + 1.0
        finite = np.nan_to_num(rises, nan=worst, posinf=worst)
        return cls(ratios=ratios, losses=np.maximum.accumulate(np.maximum(finite, 0.0)))

    def at(self, ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        last = self.ratios[-1]
        slope = BEYOND * (self.losses[-1] - self.losses[-2]) / (last - self.ratios[-2])
        inside = PchipInterpolator(self.ratios, self.losses)(np.minimum(ratios, last))
        return np.asarray(inside + slope * np.maximum(ratios - last, 0.0), dtype=np.float64)


def sensitivity(  # noqa: PLR0913 - public: the network, the data, and what a caller may leave out
    model: nn.Module, graph: ChannelGraph, split: Split, *, settings: Analysis = ANALYSIS,
    calibration: Split | None = None, device: torch.device | str = "cpu", task: Task = CLASSIFICATION,
    known: SensitivityTable | None = None, seconds: float = math.inf,
    on_point: Callable[[SensitivityPoint], None] | None = None,
) -> SensitivityTable:  # fmt: skip
    """Measure the accuracy that pruning each group alone loses; its units of the least l2 norm go first.

    Of a group's ratios two or three are measured, chosen by bisection, each on all samples; the curve
    between them is interpolated. The cost is about a tenth of evaluating the network once per group and
    ratio; see docs/analysis.md.

    Args:
        model: the network that `graph` was traced from; it is left unchanged.
        graph: the groups of the network.
        split: the search split.
        settings: the ratios, and the share of the split. With `exact` every ratio is measured, by the
            network's own arithmetic: the result is that of masking each group and evaluating the whole
            network, to the sample. The field `known` is for a run, which passes the table as `known`.
        calibration: training data that estimate the batch-norm statistics of each variant anew; None leaves
            the statistics alone.
        device: the device to run on.
        task: the task whose loss and score are measured.
        known: the points of this very network that were measured before; they are not measured again. Where
            no other point is requested and their table has a baseline, nothing is measured.
        seconds: the time allowed: once each group has a point, further points are measured only within it.
        on_point: called with every point as it is measured.

    Raises:
        UsageError: the share is below half or above 1, a ratio is not between 0 and 1, or `known` is of
            another network or of other data.
    """
    _check(settings)
    began = time.perf_counter()
    setup = VariantSetup(
        model=model, graph=graph, split=split.subset(settings.share, seed=0), calibration=calibration,
        device=torch.device(device), num_batches=RECALIBRATE_BATCHES, batch_size=RECALIBRATE_BATCH,
        task=task, exact=settings.exact,
    )  # fmt: skip
    digest = fingerprint(setup)
    if known is not None and known.of not in ("", digest):
        raise UsageError(
            "the known sensitivities are those of another network, or of other data", "measure them anew"
        )
    survey = _Survey(
        graph=graph, counts=ratio_counts(graph, settings.ratios),
        bisection=None if settings.exact else BISECTION,
        scores=score_units(model, graph, CRITERION, split=calibration, device=device, task=task),
        points={} if known is None else {(p.group, p.ratio): p for p in known.points},
    )  # fmt: skip
    pending = survey.next_points()
    if not pending and known is not None and math.isfinite(known.baseline.top1):
        return replace(known, points=survey.table_points())
    (evaluator, reason), pass_s = choose_evaluator(setup), 0.0
    while pending and (not survey.has_all() or time.perf_counter() - began + pass_s <= seconds):
        pass_began, plans = time.perf_counter(), [survey.plan(p) for p in pending]
        for planned, result in zip(pending, evaluator.measure(plans), strict=True):
            point = survey.add(planned, result, evaluator.baseline)
            if on_point is not None:
                on_point(point)
        pending, pass_s = survey.next_points(), time.perf_counter() - pass_began
    return SensitivityTable(
        points=survey.table_points(), baseline=evaluator.baseline, reason=reason,
        method="whole" if reason else "partial", miscounted=miscounted(setup, survey.furthest()),
        seconds=time.perf_counter() - began, of=digest,
    )  # fmt: skip


def fingerprint(setup: VariantSetup) -> str:
    """Return the SHA-256 of what a point depends on beside group and ratio: weights, samples, method."""
    splits = [s.digest() for s in (setup.split, setup.calibration) if s is not None]
    digest = hashlib.sha256(" ".join((*splits, CRITERION, str(setup.exact))).encode())
    for name, tensor in setup.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A group, and the number of its units that a probe removes."""

    group: str
    num_removed: int


def max_num_points(graph: ChannelGraph, ratios: Sequence[float], *, exact: bool = False) -> int:
    """Return the highest number of points that `sensitivity` measures at these ratios."""
    per_group = ratio_counts(graph, ratios).values()
    return sum(len(counts) if exact else min(BISECTION.max_points, len(counts)) for counts in per_group)


def ratio_counts(graph: ChannelGraph, ratios: Sequence[float]) -> dict[str, list[int]]:
    """Return for each group the numbers of removed units that these ratios round to, rising."""
    per_group = {}
    for group in graph.groups:
        highest = group.num_units - group.min_keep
        counts = {min(highest, max(1, round(r * group.num_units))) for r in ratios}
        per_group[group.name] = sorted(n for n in counts if n > 0)
    return per_group


def next_counts(counts: Sequence[int], drops: Mapping[int, float], bisection: Bisection | None) -> list[int]:
    """Return the counts of one group to measure next: the middle of the least certain interval.

    Args:
        counts: the numbers of removed units, rising.
        drops: the measured counts and their drops, in percentage points.
        bisection: the rule of choice; None measures all counts, as does a rule for `max_points` counts or
            fewer.
    """
    if bisection is None or len(counts) <= bisection.max_points:
        return [n for n in counts if n not in drops]
    if not drops or len(drops) >= bisection.max_points:
        return [] if drops else [counts[int(bisection.first * len(counts))]]
    measured, limit = [i for i, n in enumerate(counts) if n in drops], bisection.collapse_pp
    capped = [drops[counts[i]] if drops[counts[i]] <= limit else limit for i in measured]
    positions, heights = [-1, *measured, len(counts)], np.maximum.accumulate([0.0, *capped, limit])
    gaps = [
        ((heights[k + 1] - heights[k]) * (high - low) / (len(counts) + 1), low, high)
        for k, (low, high) in enumerate(pairwise(positions))
        if high - low > 1 and (len(measured) < bisection.min_points or high < len(counts))
    ]
    area, low, high = max(gaps, default=(0.0, 0, 0))
    is_worth_it = area > 0 if len(measured) < bisection.min_points else area >= bisection.worth
    return [counts[(low + high) // 2]] if is_worth_it else []


@dataclass(frozen=True, kw_only=True, eq=False)
class _Survey:
    """The state of a measurement: the counts that may be measured, and the points so far."""

    graph: ChannelGraph
    counts: dict[str, list[int]]
    bisection: Bisection | None
    scores: Scores
    points: dict[tuple[str, float], SensitivityPoint]

    def next_points(self) -> list[PlannedPoint]:
        """Return the points of the next pass: for each group where its curve is least certain."""
        pending = []
        for group in self.graph.groups:
            counts, width = self.counts[group.name], group.num_units
            points = {n: self.points.get((group.name, n / width)) for n in counts}
            drops = {n: p.drop_pp for n, p in points.items() if p is not None}
            following = next_counts(counts, drops, self.bisection)
            pending += [PlannedPoint(group=group.name, num_removed=n) for n in following]
        return pending

    def has_all(self) -> bool:
        """Return whether each group that can be pruned has a point."""
        return {name for name, counts in self.counts.items() if counts} <= {name for name, _ in self.points}

    def plan(self, planned: PlannedPoint) -> PruningPlan:
        width = self.graph.group(planned.group).num_units
        keep = np.sort(np.argsort(self.scores[planned.group], kind="stable")[planned.num_removed :])
        return PruningPlan(keep={planned.group: keep}, num_units={planned.group: width})

    def add(self, planned: PlannedPoint, result: VariantResult, baseline: Evaluation) -> SensitivityPoint:
        width = self.graph.group(planned.group).num_units
        macs_left = self.graph.cost_of_counts({planned.group: width - planned.num_removed}).macs
        gain_pp, interval = difference_pp(result.evaluation, baseline)
        point = SensitivityPoint(
            group=planned.group, ratio=planned.num_removed / width, top1=result.evaluation.top1,
            loss=result.evaluation.loss, drop_pp=-gain_pp, low_pp=-interval.high, high_pp=-interval.low,
            num_samples=result.evaluation.num_samples,
            macs_share_removed=1 - macs_left / self.graph.cost().macs, changed=result.changed,
        )  # fmt: skip
        self.points[point.group, point.ratio] = point
        return point

    def furthest(self) -> list[PruningPlan]:
        """Return for each group the plan of its point with the most units removed."""
        return [
            self.plan(
                PlannedPoint(
                    group=name, num_removed=max(n for n in counts if (name, n / width) in self.points)
                )
            )
            for name, counts in self.counts.items()
            for width in [self.graph.group(name).num_units]
            if any((name, n / width) in self.points for n in counts)
        ]

    def table_points(self) -> tuple[SensitivityPoint, ...]:
        """Return the points, sorted by group in the graph's order and by ratio."""
        names = [g.name for g in self.graph.groups]
        points = (p for p in self.points.values() if p.group in self.counts)
        return tuple(sorted(points, key=lambda p: (names.index(p.group), p.ratio)))


def _check(settings: Analysis) -> None:
    ratios, share = settings.ratios, settings.share
    if not MIN_SHARE <= share <= 1:
        raise UsageError(
            f"sensitivity on a share of {share:g} of the search split is not allowed",
            "take at least half of it (0.5), better all: less says too little about the layers",
        )
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise UsageError(f"ratios={tuple(ratios)} is not allowed", "give one or more ratios between 0 and 1")


def point_values(point: SensitivityPoint) -> dict[str, Any]:
    """Return a point as plain values; numbers that are not finite become null."""
    return {k: _plain(v) for k, v in asdict(point).items()}


def point_from_values(values: dict[str, Any]) -> SensitivityPoint:
    """Return the point that `point_values` made these values of."""
    return SensitivityPoint(**_number(values))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(values: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in values.items()}
