"""What a run reports while it works: frozen values, given to the `on_event` callback in order.

The pipeline and the search emit them, the terminal draws them, and nothing depends on anyone listening. An
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
    """Everything was checked; the run's folder exists."""

    name: str
    out: Path
    target: str
    max_drop_pp: float
    budget: str
    device: str
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage began; `round` is 0 outside rounds, `detail` says in a few words what it does."""

    stage: Stage
    round: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    """The current stage has done `done` of `total` steps (sensitivity points, baseline epochs, ...)."""

    stage: Stage
    round: int
    done: float
    total: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class BaselineMeasured:
    """The original on the search split, and what the run aims at.

    Attributes:
        cost: of the original in the target's metric; `target_share` of it is allowed.
        floor: lowest acceptable top-1 on the search split.
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
    """A round attempt was planned: `trials` trials of `epochs` epochs, rates up to `ceiling`."""

    round: int
    started_from: int
    ceiling: float
    floor: float
    trials: int
    epochs: float
    cost_share: float


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial's parameters were chosen."""

    round: int
    trial: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EpochFinished:
    """One epoch (or the last part of one) of fine-tuning; `trial` is None in the final tuning."""

    round: int
    trial: int | None
    epoch: float
    epochs: float
    lr: float
    train_loss: float
    images_per_s: float


@dataclass(frozen=True, kw_only=True)
class TrialFinished:
    """A trial was scored, or failed (`record.state`)."""

    round: int
    record: TrialRecord


@dataclass(frozen=True, kw_only=True)
class RoundDecided:
    """The controller decided; `ceiling`, `cost_share` and `top1` are those after the decision."""

    round: int
    action: Action
    reason: str
    ceiling: float
    cost_share: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class BudgetUsed:
    """How much of the budget is used; totals are None where the budget does not limit them."""

    seconds: float
    seconds_total: float | None
    epochs: float
    epochs_total: float | None


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark for people: something was adapted, and why."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    """The run's files are written."""

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
    """Do nothing with an event."""
