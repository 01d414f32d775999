"""The numbers behind the pictures of a run: `plots` draws them for the report, `figures` for the browser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from autoprune.formatting import METRICS
from autoprune.record import EpochPoint, RunRecord, TrialRecord
from autoprune.report.narrative import delivered_trial


@dataclass(frozen=True, kw_only=True)
class TrialPoint:
    """A trial in the plane of cost and accuracy, both in percent: the cost `left`, and `top1`."""

    round: int
    trial: TrialRecord
    left: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class PathSeries:
    """Accuracy over cost, in percent, on the search split.

    Attributes:
        metric: the unit of the cost.
        original: top-1 of the original, which has 100 % of the cost.
        trials: every trial that has a score, round by round.
        delivered: the delivered network's trial, with the top-1 after the final tuning.
        bottom, top: the ends of the accuracy axis; trials below it are out of sight.
    """

    metric: str
    original: float
    trials: tuple[TrialPoint, ...]
    delivered: TrialPoint | None
    floor: float
    target: float
    bottom: float
    top: float

    @property
    def promoted(self) -> tuple[TrialPoint, ...]:
        """The trials that became the next round's starting point."""
        return tuple(p for p in self.trials if p.trial.promoted)


def path_series(record: RunRecord) -> PathSeries | None:
    """Return the way from the original to the delivered network; None where no trial has a score."""
    trials = tuple(
        TrialPoint(round=r.number, trial=t, left=100 * t.cost_share, top1=100 * t.top1)
        for r in record.rounds
        for t in r.trials
        if t.top1 is not None and t.cost_share is not None
    )
    if not trials:
        return None
    original, floor = 100 * record.before.search_top1, 100 * record.floor
    delivered = _delivered(record, trials)
    bottom = _bottom(trials, original, floor)
    ends = [100 * record.after.search_top1] if record.after else []
    highest = max([original, *ends, *(p.top1 for p in trials)])
    return PathSeries(
        metric=METRICS.get(record.target_metric, record.target_metric), original=original, trials=trials,
        delivered=delivered, floor=floor, target=100 * record.target_share, bottom=bottom,
        top=highest + 0.16 * (highest - bottom),
    )  # fmt: skip


def _delivered(record: RunRecord, trials: tuple[TrialPoint, ...]) -> TrialPoint | None:
    source = delivered_trial(record)
    if source is None or record.after is None:
        return None
    number, trial = source[0].number, source[1].number
    point = next(p for p in trials if (p.round, p.trial.number) == (number, trial))
    return replace(point, top1=100 * record.after.search_top1)


def _bottom(trials: tuple[TrialPoint, ...], original: float, floor: float) -> float:
    """Return the lower end of the accuracy axis, so that the floor's neighbourhood stays readable.

    A trial far below the floor would flatten everything else.
    """
    room = max(original - floor, 0.5)
    lowest = min(p.top1 for p in trials)
    return max(min(lowest, floor) - 0.3 * room, floor - 4 * room)


@dataclass(frozen=True, kw_only=True)
class Width:
    """Output channels of a layer, or units of a group, `before` and `after`."""

    name: str
    before: int
    after: int


def width_series(before: Mapping[str, int], after: Mapping[str, int]) -> list[Width]:
    """Return the widths of the layers or groups that are in both mappings, in the network's order."""
    return [Width(name=n, before=width, after=after[n]) for n, width in before.items() if n in after]


def schedules(trial: TrialRecord) -> Iterator[list[EpochPoint]]:
    """Yield a trial's learning curve in pieces: a schedule that starts again is a line of its own."""
    ends, part = {rung.epochs for rung in trial.rungs}, list[EpochPoint]()
    for point in trial.epochs:
        part.append(point)
        if point.epoch in ends:
            yield part
            part = []
    if part:
        yield part
