"""Sensitivity: how much accuracy goes when one group alone is pruned by a ratio.

Each probe is a dense network with one group shrunk, its batch-norm statistics estimated anew where a
calibration split is given, measured on the search split against the intact network on the same samples.
A probe also says whether it changed the forward pass at all: one that did not measured nothing.

The table answers `loss_at(group, ratio)`: the measured loss increases, made to rise with the ratio (a gain
counts as no loss, never as a loss) and joined by a monotone cubic (Fritsch & Carlson 1980).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.criteria import Scores
from autoprune.criteria import score as score_units
from autoprune.densify import densify
from autoprune.errors import ArtifactError, UsageError
from autoprune.evaluation import Loss, Score, borrowed, evaluate, recalibrate_
from autoprune.graph import ChannelGraph
from autoprune.metrics import Evaluation, difference_pp
from autoprune.plan import PruningPlan
from autoprune.splits import Split

MIN_SHARE = 0.5
RECALIBRATE_BATCHES, RECALIBRATE_BATCH = 10, 128  # measured: 20 batches are as good as 100 (evaluation.py)
CHANGE_BATCH = 64
CHANGED = 1e-6  # relative; float32 rounding of another channel count stays below
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
    """All probes, and the intact network on the same samples."""

    points: tuple[SensitivityPoint, ...]
    baseline: Evaluation

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
        points = [{k: _plain(v) for k, v in asdict(p).items()} for p in self.points]
        return json.dumps({"autoprune_sensitivity": 1, "baseline": baseline, "points": points})

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
            points = [SensitivityPoint(**_number(p)) for p in document["points"]]
            return cls(points=tuple(points), baseline=Evaluation(**_number(document["baseline"])))
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
    model: nn.Module, graph: ChannelGraph, split: Split, *, ratios: Sequence[float] = (0.25, 0.5, 0.75),
    share: float = 1.0, criterion: str = "l2", calibration: Split | None = None,
    device: torch.device | str = "cpu", loss: Loss | None = None, score: Score | None = None,
    on_point: Callable[[SensitivityPoint], None] | None = None,
) -> SensitivityTable:  # fmt: skip
    """Measure every group at every ratio; `len(planned_points(graph, ratios)) + 1` evaluations.

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
        loss: None is cross-entropy.
        score: the study's own score; None is top-1.
        on_point: told of every point as it is measured.

    Raises:
        UsageError: the share is less than half, or a ratio is no ratio.
    """
    _check(ratios, share)
    probe = _Probe(
        model=model, graph=graph, split=split.subset(share, seed=0), calibration=calibration,
        device=torch.device(device), loss=loss, score_of_model=score,
        scores=score_units(model, graph, criterion, split=calibration, device=device, loss=loss),
    )  # fmt: skip
    points = []
    for planned in planned_points(graph, ratios):
        points.append(probe.measure(planned))
        if on_point is not None:
            on_point(points[-1])
    return SensitivityTable(points=tuple(points), baseline=probe.baseline)


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A group and how many of its units a probe removes."""

    group: str
    num_removed: int


def planned_points(graph: ChannelGraph, ratios: Sequence[float]) -> list[PlannedPoint]:
    """The probes for these ratios: whole units, at least one, each number once."""
    planned = []
    for group in graph.groups:
        most = group.num_units - group.min_keep
        counts = {min(most, max(1, round(r * group.num_units))) for r in ratios}
        planned += [PlannedPoint(group=group.name, num_removed=n) for n in sorted(counts) if n > 0]
    return planned


@dataclass(frozen=True, kw_only=True, eq=False)
class _Probe:
    """What all probes of one table share."""

    model: nn.Module
    graph: ChannelGraph
    split: Split
    calibration: Split | None
    device: torch.device
    loss: Loss | None
    score_of_model: Score | None
    scores: Scores

    @cached_property
    def baseline(self) -> Evaluation:
        return self._evaluate(self.model)

    @cached_property
    def _intact(self) -> Tensor:
        return self._output(self.model)

    @cached_property
    def _sample(self) -> Tensor:
        return next(self.split.batches(CHANGE_BATCH, device=self.device))[0]

    def measure(self, planned: PlannedPoint) -> SensitivityPoint:
        """Shrink one group, measure, forget."""
        width = self.graph.group(planned.group).num_units
        kept = np.sort(np.argsort(self.scores[planned.group], kind="stable")[planned.num_removed :])
        plan = PruningPlan(keep={planned.group: kept}, num_units={planned.group: width})
        pruned = densify(self.model, self.graph, plan)
        changed = self._differs(self._output(pruned))
        if self.calibration is not None:
            recalibrate_(
                pruned, self.calibration, num_batches=RECALIBRATE_BATCHES, batch_size=RECALIBRATE_BATCH,
                device=self.device,
            )  # fmt: skip
        after = self._evaluate(pruned)
        gain_pp, interval = difference_pp(after, self.baseline)
        return SensitivityPoint(
            group=planned.group, ratio=planned.num_removed / width, top1=after.top1, loss=after.loss,
            drop_pp=-gain_pp, low_pp=-interval.high, high_pp=-interval.low, num_samples=after.num_samples,
            macs_share_removed=1 - self.graph.cost(plan).macs / self.graph.cost().macs, changed=changed,
        )  # fmt: skip

    def _evaluate(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.split, device=self.device, loss=self.loss, score=self.score_of_model)

    def _output(self, model: nn.Module) -> Tensor:
        """Everything that the model says about the first samples, in one row."""
        with borrowed(model, self.device, training=False), torch.no_grad():
            leaves = [x for x in tree_leaves(model(self._sample)) if isinstance(x, Tensor)]
        return torch.cat([x.detach().flatten().double() for x in leaves]) if leaves else torch.zeros(0)

    def _differs(self, output: Tensor) -> bool:
        if output.shape != self._intact.shape:
            return True
        scale = float(self._intact.abs().max()) if len(output) else 0.0
        return len(output) > 0 and float((output - self._intact).abs().max()) > CHANGED * scale


def _check(ratios: Sequence[float], share: float) -> None:
    if not MIN_SHARE <= share <= 1:
        raise UsageError(
            f"sensitivity on a share of {share:g} of the search split is not allowed",
            "take at least half of it (0.5), better all: less says too little about the layers",
        )
    if not ratios or not all(0 < r < 1 for r in ratios):
        raise UsageError(f"ratios={tuple(ratios)} is not allowed", "give one or more ratios between 0 and 1")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(values: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in values.items()}
