"""The record of a run as plain values; the report, the terminal and `--json` are made from it alone.

A `RunRecord` is derived: `storage.RunStore` holds the truth, and `search.read_run` makes a record from it
at any time, also for a run that was interrupted. Accuracies of trials and rounds are on the search split;
accuracies in `before` and `after` are on the test split, which nothing else has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Action = Literal["promote", "lower", "go_back", "finish", "stop"]
StoppedBy = Literal["target", "floor", "budget", "rounds"]
TrialState = Literal["complete", "failed", "running"]


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """The measurements of one model.

    Attributes:
        top1: the top-1 on the test split, in [0, 1]; `low` and `high` are its 95 % interval over
            `num_samples`.
        loss: the mean loss on the test split; None where the study brings a score but no loss.
        search_top1: the top-1 of the same model on the search split, which the floor applies to.
        latency_ms: the median over interleaved runs of one example on this machine; None where it was not
            measured.
        latency_spread_ms: half the distance between the quartiles of those runs.
        widths: layer name -> number of output channels.
    """

    top1: float
    low: float
    high: float
    num_samples: int
    loss: float | None
    search_top1: float
    macs: int
    params: int
    size_bytes: int
    latency_ms: float | None
    latency_spread_ms: float | None
    widths: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class EpochPoint:
    """The record of one epoch of a fine-tuning."""

    epoch: float
    lr: float
    train_loss: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The end of a complete learning-rate schedule inside a trial.

    Attributes:
        epochs: the number of epochs of fine-tuning up to this rung.
        top1: the top-1 on the search split.
    """

    epochs: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """The record of one trial of a round.

    Attributes:
        params: the parameters that were tried (`prune_rate`, `lr`, `decay`, `criterion`, ...).
        prune_rate: the achieved share that was removed of the round's starting model, in the target's
            metric.
        cost_share: the share of the original's cost that is left, in the target's metric.
        top1: the top-1 on the search split after fine-tuning; None when the trial failed or still runs.
        before_tuning: the same top-1 before fine-tuning, after batch-norm recalibration.
        rungs: the rungs that the trial reached; the top-1 of the last rung is `top1`.
        recovered: whether the top-1 is at or above the round's floor.
        promoted: whether the model became the next round's baseline.
        seconds: the time of the whole trial; `tuning_seconds` of them went into fine-tuning.
        failure: why the trial failed, in one sentence; empty otherwise.
    """

    number: int
    state: TrialState
    params: dict[str, Any]
    prune_rate: float | None = None
    cost_share: float | None = None
    macs: int | None = None
    num_params: int | None = None
    top1: float | None = None
    low: float | None = None
    high: float | None = None
    loss: float | None = None
    before_tuning: float | None = None
    rungs: tuple[Rung, ...] = ()
    recovered: bool = False
    promoted: bool = False
    epochs: tuple[EpochPoint, ...] = ()
    seconds: float = 0.0
    tuning_seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True, kw_only=True)
class SensitivityCell:
    """The top-1 lost when one group alone is pruned by `ratio`, in percentage points (negative: gained)."""

    group: str
    ratio: float
    drop_pp: float
    low_pp: float
    high_pp: float
    macs_share_removed: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The record of one round attempt.

    Attributes:
        number: the number of the attempt, from 1.
        started_from: the round whose promoted model the attempt started from; 0 is the baseline.
        ceiling: the highest pruning rate searched, as a share of the starting model's cost.
        floor: the lowest acceptable top-1 of this round.
        planned_trials: the number of planned trials, with `epochs` of fine-tuning each.
        cost_share: the cost of the starting model over the original's, in the target's metric.
        action: the controller's decision; None while the round runs.
        reason: the reason for the action, in plain words.
    """

    number: int
    started_from: int
    ceiling: float
    floor: float
    planned_trials: int
    epochs: float
    cost_share: float
    trials: tuple[TrialRecord, ...]
    sensitivity: tuple[SensitivityCell, ...]
    action: Action | None
    reason: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The final, longer fine-tuning.

    Attributes:
        before: the top-1 on the search split before this fine-tuning.
        search_top1: the top-1 on the search split after this fine-tuning.
        kept: whether the delivered model is the tuned one.
    """

    epochs: tuple[EpochPoint, ...]
    before: float
    search_top1: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """The wall-clock seconds of one stage (`baseline`, `analysis`, `search`, `finish`), over all rounds."""

    stage: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """The size of one split of the data, and the digest that pins the split's content."""

    name: str
    num_samples: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class FrozenPart:
    """A parameter dimension that may not shrink, and the reason."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The test accuracy after minus before, on the same samples, with its paired 95 % interval."""

    delta_pp: float
    low_pp: float
    high_pp: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run.

    Attributes:
        reached: whether the target was met inside the floor.
        stopped_by: the cause of the end.
        message: one sentence on the result, the cause of the end, and the changes to make if the run fell
            short.
    """

    reached: bool
    stopped_by: StoppedBy
    message: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of one run, with everything that people want to read.

    Attributes:
        command: the command line that makes this run again.
        study: the resolved settings as plain values.
        target: the target as given; `target_share` is the same as a fraction of the original's cost.
        max_drop_pp: the allowed loss of top-1 on the search split; `floor` is the top-1 that follows.
        before: the original model.
        after: the delivered model; None until the run is finished.
        environment: the versions, the device and the machine.
        tuning: the final fine-tuning; None where there was none.
    """

    name: str
    command: str
    started: str
    seconds: float
    study: dict[str, Any]
    target: str
    target_metric: str
    target_share: float
    max_drop_pp: float
    floor: float
    before: ModelSummary
    after: ModelSummary | None
    difference: Difference | None
    rounds: tuple[RoundRecord, ...]
    outcome: Outcome | None
    timings: tuple[StageTime, ...]
    data: tuple[SplitSummary, ...]
    frozen: tuple[FrozenPart, ...]
    environment: dict[str, str]
    tuning: Tuning | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of `run`.

    Attributes:
        reached: whether the target was met inside the floor. Otherwise the deepest model inside the floor
            is delivered.
        stopped_by: the cause of the run's end.
        message: one sentence on the result, the cause of the end, and the changes to make if the run fell
            short.
        before, after: the original and the delivered model, on the test split.
        out: the folder of the run.
        model_file: the delivered file, encrypted unless asked otherwise.
        report: the report, an HTML page.
        record: the record of the run, which holds every number.
    """

    reached: bool
    stopped_by: StoppedBy
    message: str
    before: ModelSummary
    after: ModelSummary
    out: Path
    model_file: Path
    report: Path
    record: RunRecord
