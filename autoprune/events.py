"""The events that a run reports while it works: frozen values, given to the `on_event` callback in order.

The pipeline and the search emit events, the terminal draws them, and nothing depends on a listener. An
exception raised by a listener (Ctrl-C above all) stops the run with its state intact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoprune.record import Action, ModelSummary, Outcome, TrialRecord

Stage = Literal["check", "baseline", "analysis", "search", "finish"]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """The event that everything was checked and the run's folder exists."""

    name: str
    out: Path
    target: str
    max_drop_pp: float
    budget: str
    device: str
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """The start of a stage; `round` is 0 outside rounds, `detail` is a short description of the stage."""

    stage: Stage
    round: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """The progress of a stage: `done` of `total` steps (sensitivity points, baseline epochs, ...)."""

    stage: Stage
    round: int
    done: float
    total: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class BaselineMeasured:
    """The measurement of the original on the search split, and the aim of the run.

    Attributes:
        floor: the lowest acceptable top-1 on the search split.
        cost: the cost of the original in the target's metric; `target_share` of it is allowed.
    """

    top1: float
    num_samples: int
    floor: float
    metric: str
    cost: float
    target_share: float
    macs: int
    params: int


@dataclass(frozen=True, kw_only=True)
class RoundStarted:
    """The plan of a round attempt: `trials` trials of `epochs` epochs, pruning rates up to `ceiling`."""

    round: int
    started_from: int
    ceiling: float
    floor: float
    trials: int
    epochs: float
    cost_share: float


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """The start of a trial, whose parameters were chosen."""

    round: int
    trial: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EpochFinished:
    """The end of an epoch of fine-tuning, or of its last part; `trial` is None in the final tuning."""

    round: int
    trial: int | None
    epoch: float
    epochs: float
    lr: float
    train_loss: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class TrialFinished:
    """The end of a trial, which was scored or failed (`record.state`)."""

    round: int
    record: TrialRecord


@dataclass(frozen=True, kw_only=True)
class RoundDecided:
    """The controller's decision; `ceiling`, `cost_share` and `top1` are the values after it."""

    round: int
    action: Action
    reason: str
    ceiling: float
    cost_share: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class BudgetUsed:
    """The used part of the budget; a total is None where the budget does not limit it."""

    seconds: float
    seconds_total: float | None
    epochs: float
    epochs_total: float | None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark for people on something that was adapted, and why."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The end of the run, whose files are written."""

    outcome: Outcome
    before: ModelSummary
    after: ModelSummary
    out: Path
    files: tuple[Path, ...]


Event = (
    RunStarted
    | StageStarted
    | StageProgress
    | BaselineMeasured
    | RoundStarted
    | TrialStarted
    | EpochFinished
    | TrialFinished
    | RoundDecided
    | BudgetUsed
    | Note
    | RunFinished
)
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """Ignore an event: do nothing with it."""
