"""What a run did, as plain values: the report, the terminal and `--json` are made from a `RunRecord` alone.

A record is derived: `storage.RunStore` holds the truth, and `search.read_run` makes one of these from it at
any time, also for a run that was interrupted. Accuracies of trials and rounds are on the search split; those
in `before` and `after` are on the test split, which nothing else has seen.
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
    """One model, measured.

    Attributes:
        top1: on the test split; `low` and `high` are its 95 % interval over `num_samples`.
        loss: mean on the test split; None where the study brings a score but no loss.
        search_top1: the same model on the search split, where the floor lives.
        latency_ms: median over interleaved runs of one example on this machine; None where not measured.
        latency_spread_ms: half the distance between the quartiles of those runs.
        widths: layer name -> output channels.
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
    """One epoch of a trial's fine-tuning."""

    epoch: float
    lr: float
    train_loss: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class Rung:
    """The end of a complete learning-rate schedule inside a trial.

    Attributes:
        epochs: of fine-tuning up to here.
        top1: on the search split.
    """

    epochs: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a round.

    Attributes:
        params: what was tried (`prune_rate`, `lr`, `decay`, `criterion`, ...).
        prune_rate: removed of the round's starting model, achieved, in the target's metric.
        cost_share: what is left of the original's cost in the target's metric.
        top1: on the search split after fine-tuning; None when the trial failed or still runs.
        before_tuning: the same before fine-tuning, after batch-norm recalibration.
        rungs: how far it climbed; the last one's top-1 is `top1`.
        recovered: at or above the round's floor.
        promoted: became the next round's baseline.
        seconds: all of the trial; `tuning_seconds` of them went into fine-tuning.
        failure: why it failed, in one sentence; empty otherwise.
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
    """One group alone, pruned by `ratio`: accuracy lost in percentage points (negative: gained)."""

    group: str
    ratio: float
    drop_pp: float
    low_pp: float
    high_pp: float
    macs_share_removed: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round attempt.

    Attributes:
        number: of the attempt, from 1.
        started_from: round whose promoted model it started from; 0 is the baseline.
        ceiling: highest pruning rate searched, of the starting model's cost.
        floor: lowest acceptable top-1 of this round.
        planned_trials: how many trials were planned; `epochs` of fine-tuning each.
        cost_share: of the starting model, in the target's metric.
        action: the controller's decision, None while the round runs; `reason` says why in plain words.
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
        search_top1: after it, `before` it, on the search split.
        kept: the delivered model is the tuned one.
    """

    epochs: tuple[EpochPoint, ...]
    before: float
    search_top1: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """Wall-clock seconds of one stage, all rounds together (`baseline`, `analysis`, `search`, `finish`)."""

    stage: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split of the data: its size, and the digest that pins its content."""

    name: str
    num_samples: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class FrozenPart:
    """A parameter dimension that may not shrink, and why."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Test accuracy after minus before, on the same samples, with its paired 95 % interval."""

    delta_pp: float
    low_pp: float
    high_pp: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the run ended.

    Attributes:
        reached: the target was met inside the floor.
        stopped_by: what ended it.
        message: one sentence: what was reached, what stopped it, and what to change if it fell short.
    """

    reached: bool
    stopped_by: StoppedBy
    message: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything about one run that people want to read.

    Attributes:
        study: the resolved settings as plain values.
        target: as given; `target_share` is the same as a fraction of the original's cost.
        max_drop_pp: allowed loss of top-1 on the search split; `floor` is the top-1 that follows.
        before: the original; `after`: the delivered model, None until the run is finished.
        environment: versions, device, machine.
        tuning: the final one; None where there was none.
        command: the command line that makes this run again.
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
    """What `run` gives back; `record` holds every number.

    Attributes:
        reached: the target was met inside the floor; otherwise the deepest model inside the floor is
            delivered, and `message` says in one sentence what stopped the run and what to change.
        before, after: the original and the delivered model, on the test split.
        model_file: the delivered file, encrypted unless asked otherwise.
        report: the page.
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
